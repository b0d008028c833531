"""The bytes of a snapshot, on a stream of their own beside Raft's messages.

A SNAP message carries metadata only. The follower that got one asks its sender for the bytes, from
where it was interrupted if it was; nothing is installed before all of it is here and its hash is
right. The sender reads in a thread, keeps to a rate, and serves a few members at once, so that
proposals go on meanwhile.

    follower → sender    ask(index, term, configuration), go(offset)
    sender → follower    found(size, sha256) | gone | busy | trouble, then part(offset, data)…
"""

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

import trio
from msgspec import Meta

from ollamamax_p2p.consensus.core.messages import SnapshotMetadata
from ollamamax_p2p.consensus.core.raft_frames import NUMBER_MAX, is_configuration
from ollamamax_p2p.consensus.core.token_bucket import TokenBucket
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.state_machine import SnapshotReader, SnapshotWriter, StateMachine
from ollamamax_p2p.errors import (
    BlobNotFound,
    LocalTrouble,
    MalformedMessage,
    NoSources,
    PeerGone,
    PeerMisbehaved,
    StoreDamaged,
)
from ollamamax_p2p.host import ByteStream, MessageStream, PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.wire import Codec, Message, protocol_ids

KiB = 1024
MiB = 1024 * 1024

PART_BYTES_MAX = 1 * MiB
"""Of the snapshot in one message."""

PART_S = 0.25
"""At a low rate a part is what this long brings, so that the follower hears of its sender."""

PART_BYTES_MIN = 4 * KiB

ASK_BYTES_MAX = 64 * KiB
"""A configuration of thousands of members."""

STALL_S = 20.0
"""Without a message, or with one that is not taken, the other side is taken for gone."""

BUSY_PAUSE_S = 0.5
"""Before a follower asks again whose turn it is."""

SIZE_MAX = 64 * 1024 * MiB
"""Of a snapshot that is believed: names and digests, never blobs."""

READERS_MAX = 2
"""Threads that read and write snapshots, beside those that do the replica's work."""

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
_Place = Annotated[int, Meta(ge=0, le=SIZE_MAX)]


class Ask(Message, tag="ask", frozen=True):
    """Follower: I was told of this snapshot."""

    metadata: SnapshotMetadata


class Go(Message, tag="go", frozen=True):
    """Follower: send it, from here on."""

    offset: _Place


class Found(Message, tag="found", frozen=True):
    """Sender: here it is."""

    size: _Place
    sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Gone(Message, tag="gone", frozen=True):
    """Sender: there is a newer one, of which the leader will tell."""


class Busy(Message, tag="busy", frozen=True):
    """Sender: others are served; ask again."""


class Trouble(Message, tag="trouble", frozen=True):
    """Sender: it can't be read here."""


class Part(Message, tag="part", frozen=True):
    """Sender: the bytes from offset."""

    offset: _Place
    data: Annotated[bytes, Meta(min_length=1, max_length=PART_BYTES_MAX)]


FromFollower = Ask | Go
FromSender = Found | Gone | Busy | Trouble | Part

_follower_codec: Codec[FromFollower] = Codec(FromFollower, max_bytes=ASK_BYTES_MAX)
_sender_codec: Codec[FromSender] = Codec(FromSender, max_bytes=PART_BYTES_MAX + 4 * KiB)

_FollowerTalk = MessageStream[FromFollower, FromSender]
_SenderTalk = MessageStream[FromSender, FromFollower]


@asynccontextmanager
async def open_snapshot_streams(
    host: PeerHost,
    state_machine: StateMachine,
    *,
    is_member: Callable[[PeerId], bool],
    settings: ConsensusSettings,
    calls: trio.CapacityLimiter | None = None,
) -> AsyncIterator["SnapshotStreams"]:
    """Serve and fetch snapshots for as long as the block is open.

    is_member: asked before every part; a peer that is removed gets no further one.
    calls: the limiter, of one token, under which the owner calls this state machine, which wants no
    two calls at once; None if nobody else calls it.
    """
    async with trio.open_nursery() as nursery:
        streams = SnapshotStreams(
            host,
            state_machine,
            is_member=is_member,
            settings=settings,
            calls=calls or trio.CapacityLimiter(1),
            nursery=nursery,
        )
        host.set_handler(protocol_ids.RAFT_SNAPSHOT, streams._serve)
        try:
            yield streams
        finally:
            streams._closed = True
            nursery.cancel_scope.cancel()


class SnapshotStreams:
    """Made by `open_snapshot_streams`."""

    def __init__(
        self,
        host: PeerHost,
        state_machine: StateMachine,
        *,
        is_member: Callable[[PeerId], bool],
        settings: ConsensusSettings,
        calls: trio.CapacityLimiter,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._state_machine = state_machine
        self._is_member = is_member
        self._settings = settings
        self._calls = calls
        self._files = trio.CapacityLimiter(READERS_MAX)
        self._nursery = nursery
        self._serving: dict[PeerId, trio.CancelScope] = {}
        self._outgoing: dict[PeerId, trio.CancelScope] = {}
        self._fetching = trio.Lock()
        self._closed = False
        self.bytes_sent = 0
        """Of snapshots, to all, since this was opened."""
        self.bytes_received = 0

    # -- the follower's side

    async def fetch(self, peer: PeerId, metadata: SnapshotMetadata) -> None:
        """Receive the snapshot from the peer and install it; what came before an interruption, also
        of the program, is not sent again. One at a time; others wait.

        Raises NoSources if the peer has it no more (the leader will tell of a newer one) or can't
        read it; PeerGone and NotAdmitted, after which the same call goes on; MalformedMessage if
        the peer breaks the protocol or sent bytes twice that are not what it said; StoreFull and
        StoreDamaged for this machine's own disk.
        """
        async with self._fetching:
            stream = await self._host.open_stream(peer, protocol_ids.RAFT_SNAPSHOT)
            talk = _FollowerTalk(stream, sends=_follower_codec, receives=_sender_codec)
            try:
                found = await self._found(talk, metadata)
                # What was kept from before may be what is wrong, so there is a second try.
                if not await self._is_installed(talk, metadata, found):
                    await self._is_installed(talk, metadata, found, again=True)
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await talk.aclose()

    async def _found(self, talk: _FollowerTalk, metadata: SnapshotMetadata) -> Found:
        while True:
            await talk.send(Ask(metadata=metadata))
            match await _next(talk):
                case Found() as found:
                    return found
                case Gone():
                    raise _none(talk.peer, metadata, "has a newer one by now")
                case Trouble():
                    raise _none(talk.peer, metadata, "cannot read it")
                case Busy():
                    await trio.sleep(BUSY_PAUSE_S)
                case Part():
                    raise MalformedMessage(talk.peer, "it sent a part that was not asked for")

    async def _is_installed(
        self,
        talk: _FollowerTalk,
        metadata: SnapshotMetadata,
        found: Found,
        *,
        again: bool = False,
    ) -> bool:
        """Receive what is missing, and take it over; False if it should be tried once more."""
        machine = self._state_machine
        writer = await self._call(machine.receive_snapshot, metadata, found.size, found.sha256)
        try:
            # None if it can't be told from what comes now whether the sender is to blame.
            sha256 = hashlib.sha256() if writer.received == 0 else None
            await self._receive(talk, writer, found, sha256)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(writer.close, limiter=self._files)
        try:
            # Also if the hash is known to be wrong: this is what throws the bytes away.
            await self._call(machine.install_snapshot, metadata, found.size, found.sha256)
        except StoreDamaged as error:
            _log.warning("the snapshot at %d is not what it should be: %s", metadata.index, error)
            if again and sha256 is not None:
                # All of it came now. Should it be our disk that changed it, we go on asking, and
                # the log tells; a member must not be able to end us by what it sends.
                is_another = sha256.digest() != found.sha256
                why = "has another sha256" if is_another else f"cannot be used: {error}"
                raise MalformedMessage(
                    talk.peer, f"the snapshot it sent at {metadata.index} {why}"
                ) from None
            if again:
                raise
            return False
        return True

    async def _receive(
        self,
        talk: _FollowerTalk,
        writer: SnapshotWriter,
        found: Found,
        sha256: "hashlib._Hash | None",
    ) -> None:
        at = writer.received
        if at > found.size:
            return  # not of this snapshot: installing it will say so
        await talk.send(Go(offset=at))
        while at < found.size:
            part = await _next(talk)
            if not isinstance(part, Part) or part.offset != at:
                if isinstance(part, Trouble | Gone):
                    raise NoSources("the snapshot", f"peer {talk.peer} cannot read on")
                raise MalformedMessage(talk.peer, "it sent something else than the next part")
            if len(part.data) > found.size - at:
                raise MalformedMessage(talk.peer, "it sent more than the whole snapshot")
            await trio.to_thread.run_sync(_keep, writer, part.data, sha256, limiter=self._files)
            at += len(part.data)
            self.bytes_received += len(part.data)

    async def _call(self, method: Callable[..., Result], *args: object) -> Result:
        return await trio.to_thread.run_sync(method, *args, limiter=self._calls)

    # -- the sender's side

    async def _serve(self, stream: ByteStream) -> None:
        """The handler; the work runs in our nursery and ends with it."""
        if self._closed or not self._is_member(stream.peer):
            return
        over = trio.Event()
        self._nursery.start_soon(self._serve_and_tell, stream, over)
        await over.wait()

    async def _serve_and_tell(self, stream: ByteStream, over: trio.Event) -> None:
        peer = stream.peer
        talk = _SenderTalk(stream, sends=_sender_codec, receives=_follower_codec)
        before, scope = self._serving.get(peer), trio.CancelScope()
        self._serving[peer] = scope
        if before is not None:
            before.cancel()  # one per follower, who has lost it: the place goes to this one
        try:
            with scope:
                await self._answer(talk, scope)
        except PeerGone as error:
            _log.info("%s", error)
        except PeerMisbehaved as error:
            _log.warning("%s", error)
        finally:
            if self._serving.get(peer) is scope:
                del self._serving[peer]
            if self._outgoing.get(peer) is scope:
                del self._outgoing[peer]
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()
            over.set()

    async def _answer(self, talk: _SenderTalk, scope: trio.CancelScope) -> None:
        """Until the follower ends the stream, or the snapshot is gone."""
        while (message := await _within(talk.peer, talk.receive)) is not None:
            if not isinstance(message, Ask) or not _can_be(message.metadata):
                raise MalformedMessage(talk.peer, "it asked for no snapshot that can be")
            if not self._is_its_turn(talk.peer, scope):
                await _send(talk, Busy())
                continue
            reader = await self._open(talk, message.metadata)
            if reader is None:
                return
            try:
                await self._send_all(talk, reader)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(reader.close, limiter=self._files)
            return

    def _is_its_turn(self, peer: PeerId, scope: trio.CancelScope) -> bool:
        free = peer in self._outgoing or len(self._outgoing) < self._settings.snapshots_outgoing_max
        if free:
            self._outgoing[peer] = scope
        return free

    async def _open(self, talk: _SenderTalk, metadata: SnapshotMetadata) -> SnapshotReader | None:
        try:
            reader = await trio.to_thread.run_sync(
                self._state_machine.open_snapshot, metadata, limiter=self._files
            )
        except BlobNotFound:
            await _send(talk, Gone())
        except (LocalTrouble, OSError) as error:
            _log.error("cannot send the snapshot at %d: %s", metadata.index, error)
            await _send(talk, Trouble())
        else:
            return reader
        return None

    async def _send_all(self, talk: _SenderTalk, reader: SnapshotReader) -> None:
        """From wherever the follower says; again from another place if it says so."""
        await _send(talk, Found(size=reader.size, sha256=reader.sha256))
        rate = self._settings.snapshot_rate
        count = min(PART_BYTES_MAX, max(PART_BYTES_MIN, int(rate * PART_S)))
        bucket = TokenBucket(rate=rate, burst=count, now=trio.current_time())
        while (message := await _within(talk.peer, talk.receive)) is not None:
            if not isinstance(message, Go) or message.offset > reader.size:
                raise MalformedMessage(talk.peer, "it asked for a place beyond the snapshot")
            if not await self._send_from(talk, reader, message.offset, count, bucket):
                return

    async def _send_from(
        self,
        talk: _SenderTalk,
        reader: SnapshotReader,
        at: int,
        count: int,
        bucket: TokenBucket,
    ) -> bool:
        """To the end; False if it can't be read, or the follower is no member any more."""
        while at < reader.size:
            if not self._is_member(talk.peer):
                return False
            try:
                data = await trio.to_thread.run_sync(reader.read, at, count, limiter=self._files)
            except (LocalTrouble, OSError) as error:
                _log.error("cannot read the snapshot at %d: %s", reader.metadata.index, error)
                data = b""
            if not data:
                await _send(talk, Trouble())
                return False
            await trio.sleep(bucket.take(len(data), now=trio.current_time()))
            await _send(talk, Part(offset=at, data=data))
            at += len(data)
            self.bytes_sent += len(data)
        return True


def _keep(writer: SnapshotWriter, data: bytes, sha256: "hashlib._Hash | None") -> None:
    if sha256 is not None:
        sha256.update(data)
    writer.write(data)


def _can_be(metadata: SnapshotMetadata) -> bool:
    return (
        0 < metadata.index <= NUMBER_MAX
        and 0 < metadata.term <= NUMBER_MAX
        and is_configuration(metadata.conf_state)
    )


def _none(peer: PeerId, metadata: SnapshotMetadata, problem: str) -> NoSources:
    return NoSources(f"the snapshot at {metadata.index}", f"peer {peer} {problem}")


async def _next(talk: _FollowerTalk) -> FromSender:
    """The sender's next message. Raises PeerGone also if it ends the stream instead."""
    message = await _within(talk.peer, talk.receive)
    if message is None:
        raise PeerGone(talk.peer, "it ended the stream before the snapshot was whole")
    return message


async def _send(talk: _SenderTalk, message: FromSender) -> None:
    with trio.move_on_after(STALL_S) as waiting:
        await talk.send(message)
    if waiting.cancelled_caught:
        raise PeerGone(talk.peer, f"it has not read for {STALL_S:g} s")


async def _within(peer: PeerId, receive: Callable[[], Awaitable[Result]]) -> Result:
    with trio.move_on_after(STALL_S):
        return await receive()
    raise PeerGone(peer, f"it has been silent for {STALL_S:g} s")

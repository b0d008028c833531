"""Raft's messages over PeerHost: one long-lived stream per peer and direction.

A stream is opened when there is something to say to a connected peer, and kept; this module dials
nobody. Messages wait in two queues per peer, short ones and those that carry entries; what waits
when the writer comes by leaves as one frame, the short ones first. Nothing here waits for a peer:
what finds no room, no connection or no stream is dropped and reported, and Raft repairs it.
"""

import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import trio

from ollamamax_p2p.consensus.core.messages import Message
from ollamamax_p2p.consensus.core.raft_frames import (
    FRAME_BYTES_FULL,
    FRAME_BYTES_MAX,
    MESSAGES_MAX,
    OUR_HELLO,
    Batch,
    batch,
    common_version,
    decode_batch,
    decode_hello,
    encode_hello,
    encode_message,
    is_between_nodes,
    is_bulky,
    is_from,
)
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import FrameTooLarge, MalformedMessage, NotAdmitted, PeerGone
from ollamamax_p2p.host import ByteStream, PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.wire import FrameDecoder, encode_frame, protocol_ids

HELLO_TIMEOUT_S = 5.0
"""For the other side's hello; it is ready when it has taken the stream."""

REOPEN_PAUSE_S_MIN = 0.1
REOPEN_PAUSE_S_MAX = 5.0
"""After a lost stream, doubled each time. Two heartbeats at first, because most are lost with their
connection, and the next one ends the pause.
"""

WARNING_INTERVAL_S = 60.0
"""Between two log lines about one peer."""

HEADER_BYTES_MAX = 16
"""Of a frame and its batch, generously."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatistics:
    """What this node's transport knows of one member. Counts begin with the transport."""

    raft_id: int
    peer: PeerId
    connected: bool
    """Whether our stream to it is open, or may be opened now."""
    last_contact: float | None
    """On trio's clock: when the last frame of it came; None if none ever did."""
    queued: int
    queued_bytes: int
    sent: int
    sent_bytes: int
    received: int
    received_bytes: int
    dropped: int
    """Of ours to it: no connection, no room, or lost with the stream. Sent later ones may be lost
    on their way without anybody knowing."""
    refused: int
    """Of its to us: in another's name, to another, or nothing that one replica sends another."""
    unknown: int
    """Of its to us: of types that a newer version has."""


@asynccontextmanager
async def open_stream_transport(
    host: PeerHost,
    *,
    peer_of: Callable[[int], PeerId | None],
    id_of: Callable[[PeerId], int | None],
    deliver: Callable[[list[Message]], None],
    report_unreachable: Callable[[int], None],
    settings: ConsensusSettings,
) -> AsyncIterator["StreamTransport"]:
    """Carry messages for as long as the block is open.

    peer_of, id_of: members, both ways and with ourselves; None is nobody. Asked for every batch, so
    that a removed member is heard no more from that moment on.
    deliver: given what one frame brought, checked; it must not wait. Called in tasks of this block,
    never from `send`.
    report_unreachable: given a raft id soon after something to it was dropped, once for all that
    was dropped meanwhile; never called from `send`.
    """
    async with trio.open_nursery() as nursery:
        transport = StreamTransport(
            host,
            peer_of=peer_of,
            id_of=id_of,
            deliver=deliver,
            report_unreachable=report_unreachable,
            settings=settings,
            nursery=nursery,
        )
        await nursery.start(transport._follow)
        nursery.start_soon(transport._report)
        host.set_handler(protocol_ids.RAFT, transport._serve)
        try:
            yield transport
        finally:
            transport._closed = True
            nursery.cancel_scope.cancel()


class StreamTransport:
    """See `Transport`; made by `open_stream_transport`."""

    def __init__(
        self,
        host: PeerHost,
        *,
        peer_of: Callable[[int], PeerId | None],
        id_of: Callable[[PeerId], int | None],
        deliver: Callable[[list[Message]], None],
        report_unreachable: Callable[[int], None],
        settings: ConsensusSettings,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._peer_of = peer_of
        self._id_of = id_of
        self._deliver = deliver
        self._report_unreachable = report_unreachable
        self._settings = settings
        self._nursery = nursery
        self._connected: set[PeerId] = set()
        self._links: dict[PeerId, _Link] = {}
        self._unreachable: dict[int, None] = {}  # in order, unlike a set
        self._news = trio.Event()
        self._closed = False

    def send(self, messages: Iterable[Message]) -> None:
        """See `Transport`. Call it from trio's thread."""
        for message in messages:
            peer = self._peer_of(message.to)
            if peer is None or peer == self._host.peer_id or not self._link(peer).put(message):
                self._unreach(message.to)

    def statistics(self) -> tuple[PeerStatistics, ...]:
        """Of every member that anything was sent to or came from, by raft id."""
        found = [
            link.statistics(raft_id, connected=peer in self._connected)
            for peer, link in self._links.items()
            if (raft_id := self._id_of(peer)) is not None
        ]
        return tuple(sorted(found, key=lambda each: each.raft_id))

    def _link(self, peer: PeerId) -> "_Link":
        link = self._links.get(peer)
        if link is None:
            self._forget_strangers()
            link = self._links[peer] = _Link(self, peer)
        return link

    def _forget_strangers(self) -> None:
        """Those removed from the cluster are nobody's business any more."""
        for peer in [each for each in self._links if self._id_of(each) is None]:
            self._links.pop(peer).end()

    def _unreach(self, raft_id: int) -> None:
        self._unreachable[raft_id] = None
        self._news.set()

    async def _report(self) -> None:
        """A task of its own, because `send` is called from within a step of Raft."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            unreachable, self._unreachable = self._unreachable, {}
            for raft_id in unreachable:
                self._report_unreachable(raft_id)

    # -- who is there

    async def _follow(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        while True:
            # Behind by 1,024 events: what is connected now is all that matters.
            with suppress(PeerGone):
                async with self._host.watch() as events:
                    self._connected = {each.peer for each in self._host.connections()}
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    async for event in events:
                        self._notice(event.peer, event.change == "connected")

    def _notice(self, peer: PeerId, connected: bool) -> None:
        if connected:
            self._connected.add(peer)
            if peer in self._links:
                self._links[peer].may_open_at = -math.inf
            return
        self._connected.discard(peer)

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a stream to the peer can be opened."""
        return peer in self._connected

    # -- receiving

    async def _serve(self, stream: ByteStream) -> None:
        """The handler. It runs in the host's nursery, so it must end with our block."""
        if self._closed or self._id_of(stream.peer) is None:
            # Not a member (yet): it tries again. Nothing of it is read, and nothing kept for it.
            return
        link = self._link(stream.peer)
        over = trio.Event()
        self._nursery.start_soon(self._receive, link, stream, over)
        await over.wait()

    async def _receive(self, link: "_Link", stream: ByteStream, over: trio.Event) -> None:
        try:
            with trio.CancelScope() as scope:
                # A second stream means that the peer has lost the first.
                link.receiving.cancel()
                link.receiving = scope
                await self._listen(link, stream)
        except PeerGone as error:
            _log.debug("%s", error)
        except (MalformedMessage, FrameTooLarge) as error:
            link.warn(f"{type(error)(stream.peer, error.problem)}")
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()
            over.set()

    async def _listen(self, link: "_Link", stream: ByteStream) -> None:
        frames = _Frames(stream)
        hello = None
        with trio.move_on_after(HELLO_TIMEOUT_S):
            await stream.send_all(_framed(encode_hello()))
            hello = await frames.next()
        if hello is None:
            raise PeerGone(stream.peer, "it said no hello")
        theirs = decode_hello(hello)
        if common_version(OUR_HELLO, theirs) is None:
            link.warn(
                f"peer {stream.peer} speaks versions {theirs.lowest} to {theirs.highest} of "
                f"{protocol_ids.RAFT}, this node {OUR_HELLO.lowest} to {OUR_HELLO.highest}; "
                "upgrade the older node"
            )
            return
        while (payload := await frames.next()) is not None:
            self._take(link, payload)

    def _take(self, link: "_Link", payload: bytes) -> None:
        """One frame of a peer, on its way to the replica."""
        sender, own = self._id_of(link.peer), self._id_of(self._host.peer_id)
        if sender is None or own is None:
            link.refused += 1
            link.warn(f"peer {link.peer} sends Raft messages and is not a member")
            return
        found = decode_batch(payload)
        messages = [each for each in found.messages if each.to == own and is_from(each, sender)]
        link.last_contact = trio.current_time()
        link.received += len(messages)
        link.received_bytes += len(payload)
        self._complain(link, found, others=len(found.messages) - len(messages))
        if messages:
            self._deliver(messages)

    def _complain(self, link: "_Link", found: Batch, *, others: int) -> None:
        link.unknown += found.unknown
        link.refused += found.refused + others
        if found.refused:
            link.warn(f"peer {link.peer} sent {found.problem}; dropped")
        elif others:
            link.warn(f"peer {link.peer} sent a Raft message in another's name; dropped")

    # -- sending

    async def _keep(self, link: "_Link") -> None:
        """One stream to a peer, from the first message that waits for it until it is lost."""
        began = trio.current_time()
        try:
            with link.sending:
                await self._say(link)
        except (PeerGone, NotAdmitted) as error:
            _log.debug("%s", error)
        except (MalformedMessage, FrameTooLarge) as error:
            link.warn(f"{type(error)(link.peer, error.problem)}")
        finally:
            link.stopped(lived_s=trio.current_time() - began)
            raft_id = self._id_of(link.peer)
            if raft_id is not None:
                self._unreach(raft_id)

    async def _say(self, link: "_Link") -> None:
        stream = await self._host.open_stream(link.peer, protocol_ids.RAFT)
        try:
            frames = _Frames(stream)
            if await self._is_answered(link, stream, frames):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_await_end, frames, nursery.cancel_scope)
                    nursery.start_soon(self._write, link, stream, nursery.cancel_scope)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _is_answered(self, link: "_Link", stream: ByteStream, frames: "_Frames") -> bool:
        """Exchange hellos; whether there is a version in common."""
        answer = None
        with trio.move_on_after(HELLO_TIMEOUT_S):
            await stream.send_all(_framed(encode_hello()))
            answer = await frames.next()
        if answer is None:
            raise PeerGone(link.peer, "it did not answer our hello")
        # The other side warns of versions that do not meet; it does so for the other direction too.
        return common_version(OUR_HELLO, decode_hello(answer)) is not None

    async def _write(self, link: "_Link", stream: ByteStream, whole: trio.CancelScope) -> None:
        try:
            while True:
                await link.something_waits()
                payload, count = link.take()
                # A frame that is cut ends the stream, which `_say` does.
                with trio.fail_after(self._settings.send_stall_s):
                    await stream.send_all(_framed(payload))
                link.sent += count
                link.sent_bytes += len(payload)
        except (PeerGone, trio.TooSlowError) as error:
            _log.debug("stream to peer %s is lost: %s", link.peer, error)
            whole.cancel()


class _Link:
    """One peer: what waits for it, and what came of it."""

    def __init__(self, transport: StreamTransport, peer: PeerId) -> None:
        self.peer = peer
        self.may_open_at = -math.inf
        self.sending = trio.CancelScope()
        self.receiving = trio.CancelScope()
        self.last_contact: float | None = None
        self.sent = self.sent_bytes = self.received = self.received_bytes = 0
        self.dropped = self.refused = self.unknown = 0
        self._transport = transport
        self._settings = transport._settings
        self._short: deque[bytes] = deque()
        self._bulky: deque[bytes] = deque()
        self._bytes = 0
        self._waiting = trio.Event()
        self._open = False
        self._failures = 0
        self._warned_at = -math.inf

    def put(self, message: Message) -> bool:
        """Queue it; False if it was dropped."""
        if not is_between_nodes(message):
            raise ValueError(f"a {message.type.name} does not leave its node")
        if self._begin():
            encoded = encode_message(message)
            if self._has_room(message, encoded):
                (self._bulky if is_bulky(message) else self._short).append(encoded)
                self._bytes += len(encoded)
                self._waiting.set()
                return True
        self.dropped += 1
        return False

    def _begin(self) -> bool:
        """Have a stream to the peer, or begin to; False if there can be none now."""
        if self._open:
            return True
        can = self._transport.is_connected(self.peer) and trio.current_time() >= self.may_open_at
        if can and not self._transport._closed:
            self._open = True
            self.sending = trio.CancelScope()
            self._transport._nursery.start_soon(self._transport._keep, self)
        return self._open

    def _has_room(self, message: Message, encoded: bytes) -> bool:
        if len(encoded) + HEADER_BYTES_MAX > FRAME_BYTES_MAX:
            self.warn(f"a {message.type.name} of {len(encoded)} bytes fits no frame; dropped")
            return False
        return (
            len(self._short) + len(self._bulky) < self._settings.send_queue_messages
            and self._bytes + len(encoded) <= self._settings.send_queue_bytes
        )

    async def something_waits(self) -> None:
        """Until there is something for `take`."""
        await self._waiting.wait()

    def take(self) -> tuple[bytes, int]:
        """The next frame's payload, and how many messages are in it. At least one must wait."""
        taken: list[bytes] = []
        size = 0
        for queue in (self._short, self._bulky):
            while queue and len(taken) < MESSAGES_MAX and _fits(size, len(queue[0])):
                taken.append(queue.popleft())
                size += len(taken[-1])
        self._bytes -= size
        if not (self._short or self._bulky):
            self._waiting = trio.Event()
        return batch(taken), len(taken)

    def stopped(self, *, lived_s: float) -> None:
        """The stream is lost, or did not come about: what waits is old news."""
        self._open = False
        self.dropped += len(self._short) + len(self._bulky)
        self._short.clear()
        self._bulky.clear()
        self._bytes = 0
        self._waiting = trio.Event()
        self._failures = 1 if lived_s > REOPEN_PAUSE_S_MAX else self._failures + 1
        pause = REOPEN_PAUSE_S_MIN * 2.0 ** min(self._failures - 1, 30)
        self.may_open_at = trio.current_time() + min(pause, REOPEN_PAUSE_S_MAX)

    def end(self) -> None:
        """End both streams."""
        self.sending.cancel()
        self.receiving.cancel()

    def warn(self, text: str) -> None:
        """Log it, unless something about this peer was logged a moment ago."""
        if trio.current_time() >= self._warned_at + WARNING_INTERVAL_S:
            self._warned_at = trio.current_time()
            _log.warning("%s", text)

    def statistics(self, raft_id: int, *, connected: bool) -> PeerStatistics:
        return PeerStatistics(
            raft_id=raft_id,
            peer=self.peer,
            connected=connected,
            last_contact=self.last_contact,
            queued=len(self._short) + len(self._bulky),
            queued_bytes=self._bytes,
            sent=self.sent,
            sent_bytes=self.sent_bytes,
            received=self.received,
            received_bytes=self.received_bytes,
            dropped=self.dropped,
            refused=self.refused,
            unknown=self.unknown,
        )


class _Frames:
    """Whole frames of one stream."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(max_bytes=FRAME_BYTES_MAX)
        self._whole: deque[bytes] = deque()

    async def next(self) -> bytes | None:
        """None at the end. Raises PeerGone, FrameTooLarge."""
        if self._whole:
            await trio.lowlevel.checkpoint()
        while not self._whole:
            data = await self._stream.receive_some()
            if not data:
                return None
            self._whole.extend(self._decoder.feed(data))
        return self._whole.popleft()


async def _await_end(frames: _Frames, whole: trio.CancelScope) -> None:
    """Nothing more comes the other way, from this version; a newer one's is not understood."""
    with suppress(PeerGone, FrameTooLarge):
        while await frames.next() is not None:
            pass
    whole.cancel()


def _fits(size: int, more: int) -> bool:
    """Whether a frame that holds so much takes one more message."""
    return size == 0 or (
        size < FRAME_BYTES_FULL and size + more + HEADER_BYTES_MAX <= FRAME_BYTES_MAX
    )


def _framed(payload: bytes) -> bytes:
    return encode_frame(payload, max_bytes=FRAME_BYTES_MAX)

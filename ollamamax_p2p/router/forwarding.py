"""Forwarding: carry requests to another node's back ends, and the answers back as they come.

One long-lived stream per peer and direction carries many calls (opening a stream costs 5 ms, a
round trip on an open one 0.75). Deltas are batched by time, a call's answer waits for whoever reads
it slowly and holds up no other call, a cancelled call is cancelled there too, and a peer that has
fallen silent while calls are open is given up within SILENCE_S. docs/protocols/
request-forwarding.md tells the conversation, `core.messages` has the messages.
"""

import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadInput,
    CannotResume,
    DeadlineExceeded,
    MalformedMessage,
    NoCandidate,
    NotFound,
    OmxError,
    PeerGone,
    PeerMisbehaved,
    PeerUnreachable,
    QueueFull,
    by_code,
    code,
    restored,
)
from ollamamax_p2p.host import ByteStream, MessageStream, PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.inference.core.requests import REQUEST_BYTES_MAX, Delta
from ollamamax_p2p.router.core.messages import (
    CREDIT_BYTES,
    EVENTS_BYTES_MAX,
    FAILURE_CHARS_MAX,
    PIECE_BYTES,
    Alive,
    AnyAsk,
    Begun,
    Cancel,
    Credit,
    Event,
    Failed,
    FromAnswerer,
    FromAsker,
    News,
    Open,
    Over,
    Piece,
    Terms,
    answerer_codec,
    asker_codec,
    events_codec,
    request_codec,
)
from ollamamax_p2p.wire import protocol_ids

CALLS_PER_PEER_MAX = 2_048
"""Open at once on one stream, as many as clients of one node (`api.connections_max`); more are
refused as a full queue is."""

STREAMS_PER_PEER = 4
"""Streams on which one peer may ask at once: one, and more while lost ones are being noticed."""

REQUESTS_BYTES_MAX = 2 * REQUEST_BYTES_MAX
"""Of the requests on one stream that are coming, wait or are worked on."""

EVENTS_WAITING_MAX = 64
"""Of one call, between the engine and the network; beyond it the engine waits."""

BATCH_S = 0.01
"""Deltas that come within this after the last batch travel together. A reader sees no difference,
and a hundred tokens a second cost no more messages than a hundred."""

ALIVE_S = 1.0
SILENCE_S = 3.0
"""A peer that says nothing for this long while it owes an answer is given up."""

OUTBOX_MAX = 64
WRITE_MESSAGES_MAX = 16

Emit = Callable[[Event], Awaitable[None]]
"""Takes what happens to a request, in order; waits while the reader is behind."""

Serve = Callable[[PeerId, AnyAsk, Terms, Emit], Awaitable[None]]
"""Fulfils a request of a member by this node's back ends; returns once all is emitted."""

_SHARED = (BadInput, NotFound, QueueFull, NoCandidate, DeadlineExceeded, CannotResume)
# Errors that mean the same on both sides, words and all.

_THERE = (BackendUnavailable, BackendFailed)
# Told by class; their words may name addresses of that machine and stay in its log.

M = TypeVar("M")

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_forwarding(host: PeerHost, serve: Serve) -> AsyncIterator["Forwarding"]:
    """Ask and answer for as long as the block is open.

    serve: called for each request of an admitted peer, many at once. OmxErrors that it raises are
    the asker's answer; anything else is a fault of ours, logged, and the asker's answer too.
    """
    async with trio.open_nursery() as nursery:
        forwarding = Forwarding(host, serve, nursery)
        host.set_handler(protocol_ids.FORWARD, forwarding._answer)
        try:
            yield forwarding
        finally:
            forwarding._closed = True
            nursery.cancel_scope.cancel()


class _Outbox(Generic[M]):
    """What one stream is yet to send. Cancel-safe to put into, unlike a stream."""

    def __init__(self) -> None:
        self._waiting: deque[M] = deque()
        self._filled = trio.Event()
        self._writers = trio.lowlevel.ParkingLot()
        self._lost = False

    def put_now(self, message: M) -> None:
        """For what is small and bounded by the number of calls."""
        if not self._lost:
            self._waiting.append(message)
            self._filled.set()

    async def put(self, message: M) -> None:
        """Wait for room. Once the stream is lost everything put is dropped."""
        while len(self._waiting) >= OUTBOX_MAX and not self._lost:
            await self._writers.park()
        self.put_now(message)

    def lose(self) -> None:
        """The stream is over."""
        self._lost = True
        self._waiting.clear()
        self._writers.unpark_all()

    async def write_to(self, send: Callable[..., Awaitable[None]]) -> None:
        """Until cancelled, or until `send` raises. What waits together is sent together, up to
        WRITE_MESSAGES_MAX: a write through libp2p costs more than what is in it.
        """
        while True:
            while self._waiting:
                count = min(len(self._waiting), WRITE_MESSAGES_MAX)
                messages = [self._waiting.popleft() for _ in range(count)]
                self._writers.unpark(count=count)
                await send(*messages)
            self._filled = trio.Event()
            await self._filled.wait()


@dataclass(slots=True, eq=False)
class _Call:
    """A request of ours on its way."""

    batches: deque[tuple[int, tuple[Event, ...]]] = field(default_factory=deque)
    """Bytes that each took, and its events."""
    midway: bytearray = field(default_factory=bytearray)
    uncredited: int = 0
    """Bytes of `midway` for which no credit was given back."""
    came: trio.Event = field(default_factory=trio.Event)
    ended: FromAnswerer | None = None
    """Over or Failed."""

    def wake(self) -> None:
        self.came.set()


@dataclass(slots=True, eq=False)
class _Line:
    """Our stream to one peer."""

    peer: PeerId
    outbox: _Outbox[FromAsker] = field(default_factory=_Outbox)
    calls: dict[int, _Call] = field(default_factory=dict)
    heard_at: float = 0.0
    problem: str = ""
    """Why it is lost; empty while it is not."""


class Forwarding:
    """Made by `open_forwarding`."""

    def __init__(self, host: PeerHost, serve: Serve, nursery: trio.Nursery) -> None:
        self._host = host
        self._serve = serve
        self._nursery = nursery
        self._lines: dict[PeerId, _Line] = {}
        self._opening: dict[PeerId, trio.Lock] = {}
        self._streams: Counter[PeerId] = Counter()
        self._number = 0
        self._closed = False

    # -- asking

    async def run(self, peer: PeerId, request: AnyAsk, terms: Terms, emit: Emit) -> None:
        """Have a connected peer fulfil a request; returns once its last event is emitted.

        Cancelling cancels it there. Raises what its back end raised, PeerGone if the connection
        ended or fell silent before the end, NotAdmitted, BadRequest if it is too long to send.
        """
        body = request_codec.encode(request)
        line = await self._line_to(peer)
        self._number += 1
        number = self._number
        call = line.calls[number] = _Call()
        if len(line.calls) == 1:
            line.heard_at = trio.current_time()
        try:
            await line.outbox.put(Open(number=number, size=len(body), terms=terms))
            for start in range(0, len(body), PIECE_BYTES):
                await line.outbox.put(Piece(number=number, data=body[start : start + PIECE_BYTES]))
            await self._take(line, number, call, emit)
        finally:
            del line.calls[number]
            if call.ended is None and not line.problem:
                line.outbox.put_now(Cancel(number=number))

    async def _take(self, line: _Line, number: int, call: _Call, emit: Emit) -> None:
        while True:
            while call.batches:
                size, events = call.batches.popleft()
                for event in events:
                    await emit(event)
                if call.ended is None and not line.problem:
                    line.outbox.put_now(Credit(number=number, size=size))
            if isinstance(call.ended, Over):
                return
            if isinstance(call.ended, Failed):
                raise _failed(line.peer, call.ended)
            if line.problem:
                raise PeerGone(line.peer, line.problem)
            call.came = trio.Event()
            await call.came.wait()

    async def _line_to(self, peer: PeerId) -> _Line:
        lock = self._opening.setdefault(peer, trio.Lock())
        async with lock:
            try:
                line = self._lines.get(peer)
                if line is None:
                    stream = await self._host.open_stream(peer, protocol_ids.FORWARD)
                    line = self._lines[peer] = _Line(peer)
                    self._nursery.start_soon(self._keep_line, line, stream)
                return line
            finally:
                if not lock.statistics().tasks_waiting:
                    self._opening.pop(peer, None)

    async def _keep_line(self, line: _Line, stream: ByteStream) -> None:
        """Write and read one stream until it is lost, then let all who wait know."""
        talk = MessageStream(stream, sends=asker_codec, receives=answerer_codec)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_line, line, talk, nursery.cancel_scope)
                nursery.start_soon(_notice_silence, line, nursery.cancel_scope)
                await self._read_line(line, talk)
                nursery.cancel_scope.cancel()
        finally:
            line.problem = line.problem or "the connection ended"
            if self._lines.get(line.peer) is line:
                del self._lines[line.peer]
            line.outbox.lose()
            for call in line.calls.values():
                call.wake()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await talk.aclose()

    async def _write_line(
        self,
        line: _Line,
        talk: MessageStream[FromAsker, FromAnswerer],
        whole: trio.CancelScope,
    ) -> None:
        try:
            await line.outbox.write_to(talk.send)
        except PeerGone as error:
            line.problem = line.problem or str(error)
            whole.cancel()

    async def _read_line(self, line: _Line, talk: MessageStream[FromAsker, FromAnswerer]) -> None:
        try:
            while (message := await talk.receive()) is not None:
                line.heard_at = trio.current_time()
                if not isinstance(message, Alive):
                    self._heard(line, message)
                await trio.lowlevel.checkpoint()  # between thousands that came in one read
            line.problem = line.problem or "it ended the stream"
        except PeerGone as error:
            line.problem = line.problem or str(error)
        except PeerMisbehaved as error:
            _log.warning("%s", error)
            line.problem = str(error)

    def _heard(self, line: _Line, message: News | Over | Failed) -> None:
        call = line.calls.get(message.number)
        if call is None:  # cancelled meanwhile
            return
        if isinstance(message, News):
            call.midway += message.data
            call.uncredited += len(message.data)
            if len(call.midway) > EVENTS_BYTES_MAX:
                raise MalformedMessage(line.peer, "its answer is longer than it may be")
            if call.uncredited + sum(size for size, _ in call.batches) > CREDIT_BYTES:
                raise MalformedMessage(line.peer, "it sent more than it was given credit for")
            if message.more:
                if call.uncredited > CREDIT_BYTES // 2:
                    # Nothing can be taken before the rest is here.
                    size, call.uncredited = call.uncredited, 0
                    line.outbox.put_now(Credit(number=message.number, size=size))
                return
            try:
                events = events_codec.decode(bytes(call.midway))
            except MalformedMessage as error:
                raise MalformedMessage(line.peer, error.problem) from None
            call.batches.append((call.uncredited, events))
            call.uncredited = 0
            call.midway.clear()
        else:
            call.ended = message
        call.wake()

    # -- answering

    async def _answer(self, stream: ByteStream) -> None:
        """The handler: the work runs in our nursery, its task here only waits."""
        if self._closed:
            return
        over = trio.Event()
        self._nursery.start_soon(self._answer_and_tell, stream, over)
        await over.wait()

    async def _answer_and_tell(self, stream: ByteStream, over: trio.Event) -> None:
        peer = stream.peer
        self._streams[peer] += 1
        try:
            if self._streams[peer] <= STREAMS_PER_PEER:
                await self._answer_stream(stream)
            else:
                _log.warning("peer %s opened too many %s streams", peer, protocol_ids.FORWARD)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            over.set()

    async def _answer_stream(self, stream: ByteStream) -> None:
        talk = MessageStream(stream, sends=answerer_codec, receives=asker_codec)
        outbox: _Outbox[FromAnswerer] = _Outbox()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outbox.write_to, talk.send)
                answering = _Answering(talk.peer, self._serve, outbox, nursery)
                nursery.start_soon(answering.say_alive)
                while (message := await talk.receive()) is not None:
                    await answering.heard(message)
                    # Thousands may have come in one read; others have their turn between them.
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()  # nobody reads the answers any more
        except* PeerGone:
            pass
        except* PeerMisbehaved as group:
            _log.warning("%s", _first(group))
        finally:
            outbox.lose()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await talk.aclose()


async def _notice_silence(line: _Line, whole: trio.CancelScope) -> None:
    while True:
        await trio.sleep(ALIVE_S / 2)
        if line.calls and trio.current_time() - line.heard_at > SILENCE_S:
            line.problem = f"it said nothing for {SILENCE_S:g} s while it owed an answer"
            whole.cancel()
            return
        if not line.calls:
            line.heard_at = trio.current_time()


@dataclass(slots=True, eq=False)
class _Served:
    """A request of theirs."""

    size: int
    terms: Terms
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False
    """Nothing of it is missing."""
    credit: int = CREDIT_BYTES
    credited: trio.Event = field(default_factory=trio.Event)
    cancelled: bool = False


class _Answering:
    """One stream's calls, from the answerer's side."""

    def __init__(
        self,
        peer: PeerId,
        serve: Serve,
        outbox: _Outbox[FromAnswerer],
        nursery: trio.Nursery,
    ) -> None:
        self._peer = peer
        self._serve = serve
        self._outbox = outbox
        self._nursery = nursery
        self._calls: dict[int, _Served] = {}

    async def say_alive(self) -> None:
        """While anything is being worked on."""
        while True:
            await trio.sleep(ALIVE_S)
            if self._calls:
                await self._outbox.put(Alive())

    async def heard(self, message: FromAsker) -> None:
        """Raises MalformedMessage for what breaks the protocol."""
        if isinstance(message, Open):
            await self._open(message)
            return
        call = self._calls.get(message.number)
        if call is None:  # it has ended meanwhile
            return
        if isinstance(message, Piece):
            self._add(message, call)
        elif isinstance(message, Credit):
            call.credit = min(call.credit + message.size, CREDIT_BYTES)
            call.credited.set()
        else:
            call.cancelled = True
            call.scope.cancel()
            if not call.whole:
                del self._calls[message.number]

    async def _open(self, message: Open) -> None:
        if message.number in self._calls:
            raise MalformedMessage(self._peer, "it used a number twice at once")
        held = sum(call.size for call in self._calls.values())
        if len(self._calls) >= CALLS_PER_PEER_MAX or held + message.size > REQUESTS_BYTES_MAX:
            # Waits: whoever reads no refusals is not listened to either.
            await self._outbox.put(_failure(message.number, QueueFull(CALLS_PER_PEER_MAX, 1.0)))
            return
        self._calls[message.number] = _Served(message.size, message.terms)

    def _add(self, message: Piece, call: _Served) -> None:
        if call.whole:
            raise MalformedMessage(self._peer, "a request is longer than it said")
        call.body += message.data
        if len(call.body) > call.size:
            raise MalformedMessage(self._peer, "a request is longer than it said")
        if len(call.body) == call.size:
            call.whole = True
            self._nursery.start_soon(self._work, message.number, call)

    async def _work(self, number: int, call: _Served) -> None:
        last: FromAnswerer = Over(number=number)
        try:
            with call.scope:
                try:
                    await self._fulfil(number, call)
                except* Exception as group:  # noqa: BLE001 - a request's fault is not the node's
                    last = _failure(number, _first(group))
            if not call.cancelled:
                await self._outbox.put(last)
        finally:
            self._calls.pop(number, None)

    async def _fulfil(self, number: int, call: _Served) -> None:
        try:
            request = request_codec.decode(bytes(call.body))
        except MalformedMessage as error:
            raise BadInput(f"the request cannot be read: {error.problem}") from None
        call.body.clear()
        send, receive = trio.open_memory_channel[Event](EVENTS_WAITING_MAX)

        async def emit(event: Event) -> None:
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                await send.send(event)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._relay, number, call, receive)
            async with send:
                await self._serve(self._peer, request, call.terms, emit)

    async def _relay(
        self, number: int, call: _Served, receive: trio.MemoryReceiveChannel[Event]
    ) -> None:
        """What comes within BATCH_S of the last batch travels with the next; the first delta and
        the end go at once.
        """
        sent_at = -BATCH_S
        async with receive:
            async for event in receive:
                batch = [event]
                # Whoever asked waits for what comes after Begun, not for that.
                since = trio.current_time() if isinstance(event, Begun) else sent_at
                with trio.CancelScope(deadline=since + BATCH_S), suppress(trio.EndOfChannel):
                    while _may_wait(batch[-1], sent_at) and len(batch) < EVENTS_WAITING_MAX:
                        batch.append(await receive.receive())
                batch += _ready(receive)
                data = events_codec.encode(tuple(batch))
                for start in range(0, len(data), PIECE_BYTES):
                    piece = data[start : start + PIECE_BYTES]
                    await _spend(call, len(piece))
                    more = start + PIECE_BYTES < len(data)
                    await self._outbox.put(News(number=number, data=piece, more=more))
                sent_at = trio.current_time()


def _may_wait(event: Event, sent_at: float) -> bool:
    if isinstance(event, Delta):
        return trio.current_time() < sent_at + BATCH_S
    return isinstance(event, Begun)


def _ready(receive: trio.MemoryReceiveChannel[Event]) -> list[Event]:
    found: list[Event] = []
    try:
        while True:
            found.append(receive.receive_nowait())
    except (trio.WouldBlock, trio.EndOfChannel):
        return found


async def _spend(call: _Served, size: int) -> None:
    while call.credit < size:
        call.credited = trio.Event()
        await call.credited.wait()
    call.credit -= size


def _failure(number: int, error: BaseException) -> Failed:
    if isinstance(error, OmxError):
        _log.info("a forwarded request failed: %s", error)
        message = str(error) if isinstance(error, _SHARED) else ""
        after = error.retry_after_s if isinstance(error, QueueFull) else 0.0
        return Failed(
            number=number,
            code=code(error),
            message=message[:FAILURE_CHARS_MAX],
            retry_after_s=after,
        )
    _log.error("a forwarded request failed unexpectedly", exc_info=error)
    return Failed(number=number, code="internal_error", message="")


def _failed(peer: PeerId, failure: Failed) -> OmxError:
    """The peer's failure as an error of ours; its words are outside text."""
    words = "".join(each if each.isprintable() else "?" for each in failure.message)
    kind = by_code(failure.code)
    if kind is not None and issubclass(kind, QueueFull):
        return QueueFull(CALLS_PER_PEER_MAX, min(max(failure.retry_after_s, 0.0), 3600.0))
    if kind is not None and issubclass(kind, _SHARED) and words:
        return restored(failure.code, words)
    if kind is not None and issubclass(kind, _THERE):
        return kind(f"of peer {peer}", "it said so; its own log tells why")
    return PeerUnreachable(peer, "it could not answer; its own log tells why")


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group

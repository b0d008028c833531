"""Questions and answers: many at a time on one long-lived stream per peer and direction.

Opening a stream costs 5 ms, a round trip on an open one 0.75 ms (py-libp2p 0.8.1, design 4.2), so a
stream is opened for the first question and kept. Each question has a number and the answer carries
it; answers come in any order.

    asker → answerer    ask(number, body), cancel(number)
    answerer → asker    answer(number, body), failure(number, code, message)

Both sides bound what is in flight: the asker waits for a free place, the answerer reads no further
question until it has finished one. Deadlines are the caller's: a cancelled `ask` tells the
answerer, which stops working on it.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Generic, TypeVar

import trio
from msgspec import Meta

from ollamamax_p2p.errors import (
    BadInput,
    MalformedMessage,
    NoSources,
    NotFound,
    OmxError,
    OriginTrouble,
    PeerGone,
    PeerMisbehaved,
    PeerUnreachable,
    by_code,
    code,
    restored,
)
from ollamamax_p2p.host.message_stream import MessageStream
from ollamamax_p2p.host.peer_host import ByteStream, PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.wire import Codec, Message

STREAMS_PER_PEER = 4
"""Streams on which one peer may ask at once: one, and more while lost ones are being noticed."""

ENVELOPE_BYTES = 128
"""What goes around a body, generously."""

FAILURE_CHARS_MAX = 300

Q = TypeVar("Q")
A = TypeVar("A")

Number = Annotated[int, Meta(ge=0, lt=2**53)]

_log = logging.getLogger(__name__)


class Ask(Message, tag="ask", frozen=True):
    """Asker: answer this."""

    number: Number
    body: bytes


class Cancel(Message, tag="cancel", frozen=True):
    """Asker: the answer is not wanted any more; it may still arrive."""

    number: Number


class Answer(Message, tag="answer", frozen=True):
    """Answerer: here it is."""

    number: Number
    body: bytes


class Failure(Message, tag="failure", frozen=True):
    """Answerer: there is none."""

    number: Number
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=FAILURE_CHARS_MAX)]


FromAsker = Ask | Cancel
FromAnswerer = Answer | Failure

_SHARED = (NotFound, BadInput, NoSources, OriginTrouble)
# Errors that mean the same on both sides. The others are about the machine that raised them: their
# text stays there (it names paths), and here they are a peer that could not answer.


@asynccontextmanager
async def open_requests(
    host: PeerHost,
    protocol: str,
    *,
    requests: Codec[Q],
    answers: Codec[A],
    answer: Callable[[PeerId, Q], Awaitable[A]],
    in_flight_max: int = 64,
) -> AsyncIterator["Requests[Q, A]"]:
    """Ask and answer on this protocol for as long as the block is open.

    answer: called for each question of an admitted peer, several at once; an OmxError that it
    raises is the asker's answer, anything else is our own fault and ends the block.
    in_flight_max: questions at once, to one peer and from one stream; 64 hide a long round trip.
    """
    async with trio.open_nursery() as nursery:
        asking = Requests(
            host,
            protocol,
            requests=requests,
            answers=answers,
            answer=answer,
            in_flight_max=in_flight_max,
            nursery=nursery,
        )
        host.set_handler(protocol, asking._serve)
        try:
            yield asking
        finally:
            asking._closed = True
            nursery.cancel_scope.cancel()


@dataclass(slots=True, eq=False)
class _Pending:
    """A question on its way."""

    arrived: trio.Event = field(default_factory=trio.Event)
    reply: FromAnswerer | None = None
    """None once `arrived` is set means that the stream was lost."""


@dataclass(slots=True, eq=False)
class _Line:
    """Our stream to one peer."""

    talk: MessageStream[FromAsker, FromAnswerer]
    outbox: trio.MemorySendChannel[FromAsker]
    places: trio.Semaphore
    pending: dict[int, _Pending] = field(default_factory=dict)
    problem: str = ""
    """Why it is lost; empty while it is not."""


class Requests(Generic[Q, A]):
    """One protocol's questions. Made by `open_requests`."""

    def __init__(
        self,
        host: PeerHost,
        protocol: str,
        *,
        requests: Codec[Q],
        answers: Codec[A],
        answer: Callable[[PeerId, Q], Awaitable[A]],
        in_flight_max: int,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._protocol = protocol
        self._requests = requests
        self._answers = answers
        self._answer = answer
        self._in_flight_max = in_flight_max
        self._nursery = nursery
        self._from_asker: Codec[FromAsker] = Codec(
            FromAsker, max_bytes=requests.max_bytes + ENVELOPE_BYTES
        )
        # A failure must fit even where answers are tiny; a character takes up to four bytes.
        self._from_answerer: Codec[FromAnswerer] = Codec(
            FromAnswerer,
            max_bytes=max(answers.max_bytes, 4 * FAILURE_CHARS_MAX) + 2 * ENVELOPE_BYTES,
        )
        self._lines: dict[PeerId, _Line] = {}
        self._opening: dict[PeerId, trio.Lock] = {}
        self._serving: Counter[PeerId] = Counter()
        self._number = 0
        self._closed = False

    # -- asking

    async def ask(self, peer: PeerId, request: Q) -> A:
        """The peer's answer; waits while in_flight_max questions to it are open.

        Raises what the peer's `answer` raised if that means the same here (NotFound, BadInput,
        NoSources, OriginTrouble), PeerUnreachable if it could not answer for a reason of its own,
        PeerGone if the connection ended before the answer came, NotAdmitted, or MalformedMessage.
        """
        body = self._requests.encode(request)
        line = await self._line_to(peer)
        async with line.places:
            reply = await self._exchange(line, body)
        if isinstance(reply, Failure):
            raise _failed(peer, reply)
        try:
            return self._answers.decode(reply.body)
        except MalformedMessage as error:
            raise MalformedMessage(peer, error.problem) from None

    async def _exchange(self, line: _Line, body: bytes) -> FromAnswerer:
        self._number += 1
        number = self._number
        pending = line.pending[number] = _Pending()
        try:
            await self._put(line, Ask(number=number, body=body))
            await pending.arrived.wait()
        finally:
            del line.pending[number]
            if not pending.arrived.is_set():
                # Cancelled. Where the outbox is full the answer is dropped when it comes.
                with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                    line.outbox.send_nowait(Cancel(number=number))
        if pending.reply is None:
            raise PeerGone(line.talk.peer, line.problem)
        return pending.reply

    async def _put(self, line: _Line, message: FromAsker) -> None:
        try:
            await line.outbox.send(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PeerGone(line.talk.peer, line.problem) from None

    async def _line_to(self, peer: PeerId) -> _Line:
        async with self._opening.setdefault(peer, trio.Lock()):
            try:
                line = self._lines.get(peer)
                if line is None:
                    stream = await self._host.open_stream(peer, self._protocol)
                    line = self._lines[peer] = self._line_on(stream)
                return line
            finally:
                if not self._opening[peer].statistics().tasks_waiting:
                    del self._opening[peer]

    def _line_on(self, stream: ByteStream) -> _Line:
        talk = MessageStream(stream, sends=self._from_asker, receives=self._from_answerer)
        outbox, letters = trio.open_memory_channel[FromAsker](self._in_flight_max)
        line = _Line(talk, outbox, trio.Semaphore(self._in_flight_max))
        self._nursery.start_soon(self._keep_line, line, letters)
        return line

    async def _keep_line(self, line: _Line, letters: trio.MemoryReceiveChannel[FromAsker]) -> None:
        """Write and read one stream until it is lost, then let all who wait know."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, line, letters, nursery.cancel_scope)
                await self._read(line)
                nursery.cancel_scope.cancel()
        finally:
            line.problem = line.problem or "the connection ended"
            if self._lines.get(line.talk.peer) is line:
                del self._lines[line.talk.peer]
            letters.close()
            for pending in line.pending.values():
                pending.arrived.set()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await line.talk.aclose()

    async def _write(
        self,
        line: _Line,
        letters: trio.MemoryReceiveChannel[FromAsker],
        whole: trio.CancelScope,
    ) -> None:
        # A task of its own, because a send that is cancelled midway ends the stream for all.
        try:
            async for message in letters:
                await line.talk.send(message)
        except PeerGone as error:
            line.problem = line.problem or str(error)
            whole.cancel()

    async def _read(self, line: _Line) -> None:
        try:
            while (reply := await line.talk.receive()) is not None:
                pending = line.pending.get(reply.number)
                if pending is not None and not pending.arrived.is_set():
                    pending.reply = reply
                    pending.arrived.set()
            line.problem = "it ended the stream"
        except PeerGone as error:
            line.problem = str(error)
        except PeerMisbehaved as error:
            _log.warning("%s", error)
            line.problem = str(error)

    # -- answering

    async def _serve(self, stream: ByteStream) -> None:
        """The handler: the work runs in our nursery, its task here only waits."""
        if self._closed:
            return
        over = trio.Event()
        self._nursery.start_soon(self._serve_and_tell, stream, over)
        await over.wait()

    async def _serve_and_tell(self, stream: ByteStream, over: trio.Event) -> None:
        peer = stream.peer
        self._serving[peer] += 1
        try:
            if self._serving[peer] <= STREAMS_PER_PEER:
                await self._serve_stream(stream)
            else:
                _log.warning("peer %s opened too many %s streams", peer, self._protocol)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]
            over.set()

    async def _serve_stream(self, stream: ByteStream) -> None:
        talk = MessageStream(stream, sends=self._from_answerer, receives=self._from_asker)
        working: dict[int, trio.CancelScope] = {}
        places = trio.Semaphore(self._in_flight_max)
        try:
            async with trio.open_nursery() as nursery:
                while (message := await talk.receive()) is not None:
                    if isinstance(message, Cancel):
                        if message.number in working:
                            working[message.number].cancel()
                        continue
                    if message.number in working:
                        raise MalformedMessage(talk.peer, "it used a number twice at once")
                    await places.acquire()
                    scope = working[message.number] = trio.CancelScope()
                    nursery.start_soon(self._work, talk, message, scope, working, places)
                nursery.cancel_scope.cancel()  # nobody reads the answers any more
        except* PeerGone:
            pass
        except* PeerMisbehaved as group:
            _log.warning("%s", _first(group))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await talk.aclose()

    async def _work(
        self,
        talk: MessageStream[FromAnswerer, FromAsker],
        question: Ask,
        scope: trio.CancelScope,
        working: dict[int, trio.CancelScope],
        places: trio.Semaphore,
    ) -> None:
        """Answer one question."""
        try:
            reply: FromAnswerer | None = None
            with scope:
                reply = await self._reply_to(talk.peer, question)
            # Outside: a send that is cancelled midway would end the stream.
            if reply is not None:
                await talk.send(reply)
        finally:
            del working[question.number]
            places.release()

    async def _reply_to(self, peer: PeerId, question: Ask) -> FromAnswerer:
        try:
            request = self._requests.decode(question.body)
        except MalformedMessage as error:
            raise MalformedMessage(peer, error.problem) from None
        try:
            answer = await self._answer(peer, request)
        except OmxError as error:
            _log.info("no answer for peer %s: %s", peer, error)
            message = str(error) if isinstance(error, _SHARED) else ""
            return Failure(
                number=question.number, code=code(error), message=message[:FAILURE_CHARS_MAX]
            )
        return Answer(number=question.number, body=self._answers.encode(answer))


def _failed(peer: PeerId, failure: Failure) -> OmxError:
    """The peer's failure as an error of ours; its words are outside text."""
    words = _printable(failure.message)
    kind = by_code(failure.code)
    if kind is not None and issubclass(kind, _SHARED) and words:
        return restored(failure.code, words)
    return PeerUnreachable(peer, f"it could not answer ({_printable(failure.code)})")


def _printable(text: str) -> str:
    """Without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group

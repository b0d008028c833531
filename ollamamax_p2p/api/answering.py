"""From an HTTP request to an answer of the swarm and back: what every dialect does the same way.

A dialect (Ollama's, OpenAI's, Anthropic's) is a `Shape`: how parts, ends and errors look in it.
Here is what they share: who asks and how (`omx-*` headers), asking, streaming with one flush per
part, telling who answered, stopping the engine when the client goes.
"""

import re
import secrets
import string
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ollamamax_p2p.api.ollama_framing import Header, StatusError, ended_with_client
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.inference.core.requests import (
    NAME_CHARS_MAX,
    Delta,
    Finish,
    Logprob,
    TextRequest,
    ToolCall,
    Usage,
)
from ollamamax_p2p.router import Answer, Call, QueuePlace, Server

ANSWER_CHARS_MAX = 32 * 1024 * 1024
"""Of an answer that is collected before it is sent: an engine that never ends is stopped."""

OUTBOX_BYTES_MAX = 64 * 1024
"""Of an answer that wait for a client who does not read; then the engine waits too."""

DEADLINE_MS_MAX = 86_400_000
PRIORITIES: Mapping[str, int] = {"low": 0, "normal": 1, "high": 2}

_LABEL = re.compile(r"[\x21-\x7e]{1,256}")
_STRATEGY = re.compile(r"[a-z0-9_-]{1,64}")


class Shape(Protocol):
    """One answer in one dialect; made for one request, keeps what it must know between parts."""

    content_type: bytes
    """Of the stream."""

    def begin(self) -> bytes:
        """What comes before the first part."""

    def delta(self, part: Delta) -> bytes:
        """A part; b"" if it is not to be told."""

    def finish(self, part: Finish, moved: int) -> bytes:
        """The end. moved: how often the answer went over to another back end."""

    def broken(self, error: Exception) -> bytes:
        """The end of a stream that has begun and cannot go on."""

    def whole(self, answer: "WholeAnswer", headers: list[Header]) -> Response:
        """All of it at once, for a client that does not stream."""

    def refusal(self, error: Exception) -> Response:
        """An error in place of the answer."""


@dataclass(slots=True)
class WholeAnswer:
    """An answer that is over."""

    text: str = ""
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: Finish = field(default_factory=lambda: Finish(reason=""))
    moved: int = 0

    @property
    def usage(self) -> Usage:
        """What it took."""
        return self.finish.usage


# -- who asks ----------------------------------------------------------------------------------


class Asking:
    """A request's Call, and what is told about it in the headers of its answer."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """headers: of the request, names in lower case. Raises BadInput for a bad `omx-*` one."""
        self._place = 0
        self.on_queue: Callable[[QueuePlace], None] | None = None
        """Told of places in the queue too."""
        self.call = Call(
            user=_label(headers, "omx-user"),
            priority=_priority(headers),
            session=_label(headers, "omx-session"),
            strategy=_strategy(headers),
            deadline_s=_deadline_s(headers),
            on_queue=self._note_place,
        )

    def _note_place(self, place: QueuePlace) -> None:
        self._place = self._place or place.position
        if self.on_queue is not None:
            self.on_queue(place)

    def headers(self, server: Server, queued_s: float = 0.0) -> list[Header]:
        """Who answers, and how long that took to begin."""
        told = [
            (b"omx-node", _told(server.node)),
            (b"omx-backend", _told(server.backend)),
            (b"omx-queued-ms", str(round(queued_s * 1000)).encode()),
        ]
        if self._place:
            told.append((b"omx-queue-position", str(self._place).encode()))
        return told


def _told(name: str) -> bytes:
    """A name that a peer chose, as a header can carry it."""
    return re.sub(rb"[^\x21-\x7e]", b"?", name.encode("ascii", "replace"))[:256] or b"?"


def _label(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if value is None:
        return ""
    if not _LABEL.fullmatch(value):
        raise BadInput(f"{name} must be 1 to 256 visible ASCII characters")
    return value


def _priority(headers: Mapping[str, str]) -> int:
    value = headers.get("omx-priority", "normal")
    if value not in PRIORITIES:
        raise BadInput(f"omx-priority must be low, normal or high, not {value[:40]!r}")
    return PRIORITIES[value]


def _strategy(headers: Mapping[str, str]) -> str:
    value = headers.get("omx-strategy")
    if value is None:
        return ""
    if not _STRATEGY.fullmatch(value):
        raise BadInput(f"omx-strategy must be the name of a strategy, not {value[:40]!r}")
    return value


def _deadline_s(headers: Mapping[str, str]) -> float | None:
    value = headers.get("omx-deadline-ms")
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and 0 < int(value[:9]) <= DEADLINE_MS_MAX):
        raise BadInput(f"omx-deadline-ms must be 1 to {DEADLINE_MS_MAX:,}, not {value[:40]!r}")
    return int(value[:9]) / 1000


def named_model(model: str | None, if_missing: StatusError) -> str:
    """The model that a body names. Raises `if_missing`, or a 404 for a name that none can have."""
    if not model:
        raise if_missing
    if len(model) > NAME_CHARS_MAX:
        raise StatusError(404, f"model '{model[:NAME_CHARS_MAX]}…' not found")
    return model


# -- answering ---------------------------------------------------------------------------------


class StreamedAnswer:
    """An ASGI response that passes on every part as it comes."""

    def __init__(
        self, inference: ServedInference, request: TextRequest, asking: Asking, shape: Shape
    ) -> None:
        """Nothing is asked before the response is sent."""
        self._inference, self._request, self._asking = inference, request, asking
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and stream until the answer ends or the client goes."""
        # The engine is let go before the last write is waited for: that one cannot be cancelled
        # (the HTTP server shields it), and a client that takes nothing may hold it for long.
        async with ended_with_client(receive), _open_outbox(send) as outbox:
            begun = False
            try:
                async with self._inference.answer(self._request, self._asking.call) as answer:
                    begun = True
                    await self._stream(answer, outbox)
            except Exception as error:  # noqa: BLE001 - the border: told in the dialect's words
                if not begun:
                    await self._shape.refusal(error)(scope, receive, send)
                    return
                await outbox.put(self._shape.broken(error))

    async def _stream(self, answer: Answer, outbox: "_Outbox") -> None:
        shape = self._shape
        outbox.start(
            [
                (b"content-type", shape.content_type),
                *self._asking.headers(answer.server, answer.queued_s),
            ]
        )
        await outbox.put(shape.begin())
        async for part in answer:
            if isinstance(part, Delta):
                await outbox.put(shape.delta(part))
            else:
                await outbox.put(shape.finish(part, len(answer.servers) - 1))


class _Outbox:
    """Bytes on their way to one client. What comes while a write is under way goes with the next
    one: nothing waits for more to come, and a thousand parts a second do not take a thousand writes
    (a write through the HTTP server takes four turns of the event loop, a part one).
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: list[Header] | None = None
        self._waiting = bytearray()
        self._changed = trio.Event()
        self._room = trio.Event()
        self._closed = False

    def start(self, headers: list[Header]) -> None:
        """Begin an answer of status 200; without it nothing is written."""
        self._head = headers

    async def put(self, data: bytes) -> None:
        """Returns when it is taken; waits while the client takes nothing."""
        while len(self._waiting) > OUTBOX_BYTES_MAX:
            self._room = trio.Event()
            await self._room.wait()
        self._waiting += data
        self._changed.set()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._changed.set()

    async def write(self) -> None:
        """Write until it is closed and everything is written."""
        begun = False
        while self._waiting or not self._closed:
            if not self._waiting:
                await self._changed.wait()
                self._changed = trio.Event()
                continue
            if not begun and self._head is not None:
                begun = True
                head = {"type": "http.response.start", "status": 200, "headers": self._head}
                await self._send(head)
            data = bytes(self._waiting)
            self._waiting.clear()
            self._room.set()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        if begun:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _open_outbox(send: Send) -> AsyncIterator[_Outbox]:
    """Everything that was put is written when the block ends."""
    outbox = _Outbox(send)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.write)
        yield outbox
        outbox.close()


class CollectedAnswer:
    """An ASGI response that waits for the end and tells all at once."""

    def __init__(
        self, inference: ServedInference, request: TextRequest, asking: Asking, shape: Shape
    ) -> None:
        """Nothing is asked before the response is sent."""
        self._inference, self._request, self._asking = inference, request, asking
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, wait, answer; stops the engine if the client goes meanwhile."""
        async with ended_with_client(receive):
            try:
                async with self._inference.answer(self._request, self._asking.call) as answer:
                    whole = await collected(answer)
                    headers = self._asking.headers(answer.server, answer.queued_s)
                if whole.moved:
                    headers.append((b"omx-moved", str(whole.moved).encode()))
                response = self._shape.whole(whole, headers)
            except Exception as error:  # noqa: BLE001 - the border: told in the dialect's words
                response = self._shape.refusal(error)
            await response(scope, receive, send)


def answering(
    inference: ServedInference, request: TextRequest, asking: Asking, shape: Shape, *, stream: bool
) -> StreamedAnswer | CollectedAnswer:
    """The response to a request for text."""
    kind = StreamedAnswer if stream else CollectedAnswer
    return kind(inference, request, asking, shape)


async def collected(answer: Answer) -> WholeAnswer:
    """All parts in one. Raises BadInput if there is no end to it."""
    whole, texts, thoughts, chars = WholeAnswer(), [], [], 0
    async for part in answer:
        if isinstance(part, Finish):
            whole.finish = part
            continue
        texts.append(part.text)
        thoughts.append(part.thinking)
        whole.tool_calls += part.tool_calls
        whole.logprobs += part.logprobs
        chars += len(part.text) + len(part.thinking)
        if chars > ANSWER_CHARS_MAX:
            raise BadInput(f"the answer is longer than {ANSWER_CHARS_MAX:,} characters; stream it")
    whole.text, whole.thinking = "".join(texts), "".join(thoughts)
    whole.moved = len(answer.servers) - 1
    return whole


_ID_LETTERS = string.ascii_lowercase + string.digits


def tool_call_id(call: ToolCall) -> str:
    """The id that the engine gave, or a new one as Ollama makes them."""
    return call.id or "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(8))

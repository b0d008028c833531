"""Many requests on one WebSocket, each with its own flow control; docs/protocols/websocket.md.

A frame is JSON. A request's frame is the body of the Ollama endpoint of the same name with `id` and
`type` in it. Its answer is `delta` frames and one `done` or `error`, each with that id. A request
may send only as many deltas as it has credits: a client that takes no more of one answer holds that
answer's engine, and no other.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta
from starlette.websockets import WebSocket, WebSocketDisconnect

from ollamamax_p2p.api import go_json
from ollamamax_p2p.api.answering import Asking
from ollamamax_p2p.api.bodies import PullBody
from ollamamax_p2p.api.ollama_framing import (
    CLIENT_CLOSED,
    REQUEST_CANCELED,
    THREAD_BYTES,
    StatusError,
    decoded,
    status_and_text,
)
from ollamamax_p2p.api.ollama_generation_routes import (
    ChatShape,
    EmbedAnswer,
    GenerateShape,
    OllamaShape,
    embed_answer,
    load_or_unload,
    worded_for_embed,
)
from ollamamax_p2p.api.ollama_requests import parse_chat, parse_embed, parse_generate
from ollamamax_p2p.api.pull_stream import LINE_INTERVAL_S, PullReportLine
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import ServedNode
from ollamamax_p2p.api.shared_pulls import SharedPulls
from ollamamax_p2p.errors import BadInput, QueueFull, first_named
from ollamamax_p2p.inference.core.requests import Delta, TextRequest
from ollamamax_p2p.router import QueuePlace

REQUESTS_MAX = 64
"""At once on one connection; who wants more opens another."""

CREDITS = 64
"""What a request begins with."""

CREDITS_MAX = 1_024
"""What it may have; more are not counted. At 200 bytes each that is what TCP buffers anyway."""

FRAME_BYTES_MAX = 16 * 1024 * 1024
"""What a client may send at once, pictures in base64 and all."""

ID_CHARS_MAX = 64


class FrameHead(msgspec.Struct, frozen=True, kw_only=True):
    """What every frame from a client has."""

    type: str
    id: Annotated[str, Meta(min_length=1, max_length=ID_CHARS_MAX)]
    credits: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    """In a `credit`: how many more; in a request: with how many it begins."""
    omx: dict[str, str | int] | None = None
    """What HTTP has in `omx-*` headers, names without that: `{"priority": "high"}`."""


class Job:
    """One request that is being answered."""

    def __init__(self, head: FrameHead) -> None:
        self.id = head.id
        self.scope = trio.CancelScope()
        self.worded: Callable[[Exception], Exception] = lambda error: error
        """An error in the words of what was asked."""
        self._credits = min(CREDITS if head.credits is None else head.credits, CREDITS_MAX)
        self._more = trio.Event()

    def add_credits(self, count: int) -> None:
        """Let it send more."""
        self._credits = min(self._credits + count, CREDITS_MAX)
        self._more.set()

    async def spend_credit(self) -> None:
        """Returns when it may send another delta."""
        while not self._credits:
            self._more = trio.Event()
            await self._more.wait()
        self._credits -= 1


class RequestSocket:
    """One connection."""

    def __init__(
        self, websocket: WebSocket, inference: ServedInference, node: ServedNode, pulls: SharedPulls
    ) -> None:
        self._websocket = websocket
        self._inference, self._node, self._pulls = inference, node, pulls
        self._jobs: dict[str, Job] = {}
        self._turn = trio.Lock()
        """Whoever sends a frame."""

    async def serve(self) -> None:
        """Answer until the client goes; then everything it asked for is stopped."""
        await self._websocket.accept()
        async with trio.open_nursery() as nursery:
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    nursery.cancel_scope.cancel()
                    return
                raw = (message.get("text") or "").encode()
                await self._take(raw, nursery)

    async def _take(self, raw: bytes, nursery: trio.Nursery) -> None:
        try:
            head = await _in_thread_if_long(_head, raw)
        except BadInput as error:
            await self._error("", error)
            return
        known = self._jobs.get(head.id)
        if head.type == "cancel":
            if known is not None:
                known.scope.cancel()
        elif head.type == "credit":
            if known is not None:
                known.add_credits(head.credits or 0)
        elif head.type not in _SERVERS:
            shown = f"{head.type[:40]!r}"
            await self._error(head.id, BadInput(f"a frame of type {shown}, which does not exist"))
        elif known is not None:
            await self._error("", BadInput(f"id {head.id!r} is in use on this connection"))
        elif len(nursery.child_tasks) >= REQUESTS_MAX:  # those too that only have to be told
            await self._error(head.id, QueueFull(REQUESTS_MAX, 1.0))
        else:
            job = self._jobs[head.id] = Job(head)
            nursery.start_soon(self._answer, job, head, raw)

    async def _answer(self, job: Job, head: FrameHead, raw: bytes) -> None:
        with job.scope:
            try:
                last = await _SERVERS[head.type](self, job, head, raw)
            except WebSocketDisconnect:
                return
            except Exception as error:  # noqa: BLE001 - the border
                last = _error_frame(job.id, job.worded(error))
        if job.scope.cancelled_caught:
            last = _error_frame(job.id, StatusError(CLIENT_CLOSED, REQUEST_CANCELED))
        del self._jobs[job.id]  # before it is told: whoever hears it may use the id again
        await self._send_bytes(last)

    # -- what can be asked ---------------------------------------------------------------------

    # Each sends what comes before the end and gives the frame that ends it.

    async def _generate(self, job: Job, head: FrameHead, raw: bytes) -> bytes:
        body, wanted = await _in_thread_if_long(parse_generate, raw)
        empty = not wanted.prompt
        shape = GenerateShape(wanted)
        return await self._text(job, head, wanted, shape, empty=empty, unload=body.unloads)

    async def _chat(self, job: Job, head: FrameHead, raw: bytes) -> bytes:
        body, wanted = await _in_thread_if_long(parse_chat, raw)
        empty = not wanted.messages
        shape = ChatShape(wanted)
        return await self._text(job, head, wanted, shape, empty=empty, unload=body.unloads)

    async def _text(
        self,
        job: Job,
        head: FrameHead,
        wanted: TextRequest,
        shape: OllamaShape,
        *,
        empty: bool,
        unload: bool,
    ) -> bytes:
        asking = Asking(_headers(head))
        job.worded = shape.worded
        if empty:
            done, _ = await load_or_unload(self._inference, wanted, asking, unload=unload)
            return _line(job, "done", go_json.encode(shape.last(done)))
        return await self._stream(job, wanted, asking, shape)

    async def _stream(
        self, job: Job, wanted: TextRequest, asking: Asking, shape: OllamaShape
    ) -> bytes:
        last = b""
        async with trio.open_nursery() as nursery:
            places = _Places()
            asking.on_queue = places.note
            nursery.start_soon(self._tell_places, job, places)
            async with self._inference.answer(wanted, asking.call) as answer:
                places.close()
                server = answer.server
                await self._send(
                    {
                        "id": job.id,
                        "type": "start",
                        "node": server.node,
                        "backend": server.backend,
                        "queued_ms": round(answer.queued_s * 1000),
                    }
                )
                told = len(answer.servers)
                async for part in answer:
                    if len(answer.servers) > told:
                        told, server = len(answer.servers), answer.server
                        said = {"id": job.id, "type": "moved", "node": server.node}
                        await self._send(said | {"backend": server.backend})
                    if isinstance(part, Delta):
                        await job.spend_credit()
                        await self._send_bytes(_line(job, "delta", shape.delta(part)))
                    else:
                        moved = len(answer.servers) - 1
                        last = _line(job, "done", shape.finish(part, moved))
            nursery.cancel_scope.cancel()
        return last

    async def _tell_places(self, job: Job, places: "_Places") -> None:
        async for place in places:
            frame = {"id": job.id, "type": "queue", "position": place.position}
            await self._send(frame | {"eta_s": place.eta_s})

    async def _embed(self, job: Job, head: FrameHead, raw: bytes) -> bytes:
        asking = Asking(_headers(head))
        wanted = await _in_thread_if_long(parse_embed, raw)
        job.worded = worded_for_embed
        if wanted.inputs:
            found, _ = await self._inference.embed(wanted, asking.call)
            answer = await embed_answer(wanted, found)
        else:
            await self._inference.load(wanted.model, asking.call, keep_alive_s=wanted.keep_alive_s)
            answer = EmbedAnswer(model=wanted.model, embeddings=())
        return _line(job, "done", go_json.encode(answer))

    async def _pull(self, job: Job, head: FrameHead, raw: bytes) -> bytes:
        body = decoded(raw, PullFrame)
        wanted = PullBody(model=body.model, from_origin=body.from_origin, insecure=body.insecure)
        async with self._pulls.watch(wanted) as watcher:
            while True:
                states, outcome = await watcher.next()
                if states:  # only the newest: a client that lags wants to know where it stands
                    await job.spend_credit()
                    await self._send_bytes(_line(job, "delta", go_json.encode(states[-1])))
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome is not None:
                    return _line(job, "done", go_json.encode(PullReportLine(report=outcome)))
                await trio.sleep(LINE_INTERVAL_S)

    async def _events(self, job: Job, head: FrameHead, raw: bytes) -> bytes:
        async with self._node.events.subscribe() as events:
            await self._send({"id": job.id, "type": "start"})
            async for event in events:
                await job.spend_credit()
                await self._send_bytes(_line(job, "delta", go_json.encode(event)))
        raise AssertionError("a feed has no end")

    # -- frames --------------------------------------------------------------------------------

    async def _error(self, frame_id: str, error: Exception) -> None:
        await self._send_bytes(_error_frame(frame_id, error))

    async def _send(self, frame: Mapping[str, Any]) -> None:
        await self._send_bytes(go_json.encode(frame))

    async def _send_bytes(self, data: bytes) -> None:
        async with self._turn:
            await self._websocket.send_text(data.decode())


def _line(job: Job, kind: str, line: bytes) -> bytes:
    head = b'{"id":' + go_json.encode(job.id, floats=False) + f',"type":"{kind}"'.encode()
    return head + b',"line":' + line.rstrip(b"\n") + b"}"


def _error_frame(frame_id: str, error: Exception) -> bytes:
    status, text = status_and_text(error)
    frame: dict[str, Any] = {"id": frame_id, "type": "error", "status": status, "error": text}
    named = first_named(error)
    if isinstance(named, QueueFull):
        frame["retry_after_s"] = named.retry_after_s
    return go_json.encode(frame)


class PullFrame(PullBody, frozen=True, forbid_unknown_fields=False):
    """A pull, with the frame's own fields beside it."""


_SERVERS = {
    "generate": RequestSocket._generate,
    "chat": RequestSocket._chat,
    "embed": RequestSocket._embed,
    "pull": RequestSocket._pull,
    "events": RequestSocket._events,
}


class _Places:
    """Places in the queue, the newest only: whoever tells them may be slower than they change."""

    def __init__(self) -> None:
        self._place: QueuePlace | None = None
        self._changed = trio.Event()
        self._closed = False

    def note(self, place: QueuePlace) -> None:
        self._place = place
        self._changed.set()

    def close(self) -> None:
        """It waits no longer."""
        self._closed = True
        self._changed.set()

    def __aiter__(self) -> "_Places":
        return self

    async def __anext__(self) -> QueuePlace:
        await self._changed.wait()
        self._changed = trio.Event()
        if self._closed or self._place is None:
            raise StopAsyncIteration
        return self._place


def _head(raw: bytes) -> FrameHead:
    return decoded(raw, FrameHead, "Frame")


def _headers(head: FrameHead) -> dict[str, str]:
    given = head.omx or {}
    return {f"omx-{name.replace('_', '-')}": str(value) for name, value in given.items()}


async def _in_thread_if_long(parse: Any, raw: bytes) -> Any:
    if len(raw) > THREAD_BYTES:
        return await trio.to_thread.run_sync(parse, raw)
    return parse(raw)

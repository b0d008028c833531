"""How Ollama puts answers and errors on the wire: JSON, NDJSON, and the three shapes of an error.

An error that is found before an answer begins has its status and `application/json; charset=utf-8`;
one that is the first thing on a stream has its status and `application/json` without a charset
(Go's gin keeps a header that is set already); one that comes later is the last line of a stream
whose status was 200. Clients tell them apart by these.
"""

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ollamamax_p2p import errors
from ollamamax_p2p.api import go_json
from ollamamax_p2p.errors import BadInput, OmxError

BODY_BYTES_MAX = 48 * 1024 * 1024
"""A request may have 32 MiB between nodes, and pictures come in base64. Ollama has no limit."""

BODY_TIMEOUT_S = 60.0
"""For the whole body: a client that trickles holds no memory for ever."""

THREAD_BYTES = 64 * 1024
"""A longer body is parsed in a thread: 100,000 messages take 100 ms, which no other client's stream
is to wait for."""

JSON = "application/json; charset=utf-8"
STREAM_ERROR_JSON = "application/json"
NDJSON = "application/x-ndjson"

SERVER_BUSY = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's words, with its two spaces."""

REQUEST_CANCELED = "request canceled"
CLIENT_CLOSED = 499

Header = tuple[bytes, bytes]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_STATUS: dict[type[OmxError], int] = {
    errors.OmxError: 500,
    errors.BadInput: 400,
    errors.NotFound: 404,
    errors.NoCandidate: 503,
    errors.QueueFull: 503,
    errors.DeadlineExceeded: 504,
}
"""A class that is not listed has the status of the nearest one above it. Ollama has 500 for what is
not the client's fault; 503 and 504 tell what only a swarm has."""


class StatusError(Exception):
    """A status and a text that an endpoint chose, word for word; raised in `api` only."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class BodyTooLarge(BadInput):
    """More than BODY_BYTES_MAX."""

    def __init__(self) -> None:
        super().__init__("http: request body too large")


def status_and_text(error: BaseException) -> tuple[int, str]:
    """What Ollama's clients are told of an error: HTTP status and the text of `error`.

    A fault of ours is logged, and told without its text.
    """
    chosen = _first_chosen(error)
    if chosen is not None:
        return chosen.status, chosen.text
    named = errors.first_named(error)
    if named is None:
        _log.error("a request failed unexpectedly", exc_info=error)
        return 500, f"internal error: {type(error).__name__}; omx's log has the details"
    if isinstance(named, BodyTooLarge):
        return 413, str(named)
    if isinstance(named, errors.QueueFull):
        return 503, SERVER_BUSY
    return next(_STATUS[each] for each in type(named).__mro__ if each in _STATUS), str(named)


def retry_after(error: BaseException) -> list[Header]:
    """Headers that say when to come again, and what the place in the queue would have been, where
    the error knows; Ollama has none.
    """
    named = errors.first_named(error)
    if not isinstance(named, errors.QueueFull):
        return []
    return [
        (b"retry-after", str(max(1, round(named.retry_after_s))).encode()),
        (b"omx-queue-position", str(named.limit + 1).encode()),
    ]


def json_response(value: Any, status: int = 200, headers: Sequence[Header] = ()) -> Response:
    """One whole JSON answer."""
    return whole_response(go_json.encode(value), JSON, status, headers)


def error_response(status: int, text: str, headers: Sequence[Header] = ()) -> Response:
    """An error that was found before the answer began."""
    return json_response({"error": text}, status, headers)


def answer_error(error: BaseException) -> Response:
    """The same, for an exception."""
    status, text = status_and_text(error)
    return error_response(status, text, retry_after(error))


class NdjsonResponse:
    """An ASGI response of a line for each value, each sent at once; what `lines` raises is told in
    the shape that fits, and so is a fault of ours.

    The lines are made as fast as the client reads them, and closed when it goes. Raise before
    making the response what shall have the shape of an error found before.
    """

    def __init__(self, lines: AsyncIterator[Any], headers: Sequence[Header] = ()) -> None:
        """lines: values for `go_json.encode`; a generator is closed in the task that ran it."""
        self._lines = lines
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the lines end or the client goes."""
        async with ended_with_client(receive), _closing(self._lines) as lines:
            try:
                first = await anext(lines)
            except StopAsyncIteration:
                await start(send, 200, NDJSON, self._headers)
            except Exception as error:  # noqa: BLE001 - the border
                status, text = status_and_text(error)
                headers = [*self._headers, *retry_after(error)]
                body = go_json.encode({"error": text})
                response = whole_response(body, STREAM_ERROR_JSON, status, headers)
                await response(scope, receive, send)
                return
            else:
                await start(send, 200, NDJSON, self._headers)
                await send_more(send, go_json.encode(first) + b"\n")
                try:
                    async for value in lines:
                        await send_more(send, go_json.encode(value) + b"\n")
                except Exception as error:  # noqa: BLE001 - the border
                    text = status_and_text(error)[1]
                    await send_more(send, go_json.encode({"error": text}) + b"\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class LastLineOnly:
    """`stream: false` of pull, push and create: the last value alone, when it is all over. An error
    is told with its status. The content type has no charset (Ollama's tests pin that).
    """

    def __init__(self, lines: AsyncIterator[Any], headers: Sequence[Header] = ()) -> None:
        """lines: as for NdjsonResponse."""
        self._lines = lines
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait, then answer; closes the lines if the client goes."""
        async with ended_with_client(receive), _closing(self._lines) as lines:
            last: Any = None
            status, headers = 200, list(self._headers)
            try:
                async for value in lines:
                    last = value
            except Exception as error:  # noqa: BLE001 - the border
                status, text = status_and_text(error)
                last, headers = {"error": text}, [*headers, *retry_after(error)]
            body = go_json.encode(last)
            response = whole_response(body, STREAM_ERROR_JSON, status, headers)
            await response(scope, receive, send)


def last_line_only(lines: AsyncIterator[Any], headers: Sequence[Header] = ()) -> LastLineOnly:
    """See LastLineOnly."""
    return LastLineOnly(lines, headers)


@asynccontextmanager
async def ended_with_client(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client goes; leaving the block by that raises nothing.

    The request's body must have been read: what arrives next can only be the client's leaving.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def start(send: Send, status: int, content_type: str, headers: Iterable[Header] = ()) -> None:
    """Begin a streamed answer."""
    raw = [(b"content-type", content_type.encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_more(send: Send, data: bytes) -> None:
    """One flush. Returns when the system has taken it: a slow reader holds only its own work."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


def whole_response(
    body: bytes, content_type: str, status: int, headers: Iterable[Header] = ()
) -> Response:
    """An answer of exactly these bytes, and no header but these and its length."""
    response = Response(body, status)
    response.raw_headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    return response


@asynccontextmanager
async def _closing(lines: AsyncIterator[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    try:
        yield lines
    finally:
        if isinstance(lines, AsyncGenerator):
            await lines.aclose()


def _first_chosen(error: BaseException) -> StatusError | None:
    if isinstance(error, BaseExceptionGroup):
        found = (_first_chosen(each) for each in error.exceptions)
        return next((each for each in found if each is not None), None)
    return error if isinstance(error, StatusError) else None


# -- bodies ------------------------------------------------------------------------------------


async def read_bytes(request: Request) -> bytes:
    """The whole body. Raises BodyTooLarge, or BadInput if it does not arrive in time."""
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > BODY_BYTES_MAX:
        raise BodyTooLarge
    raw = bytearray()
    with trio.move_on_after(BODY_TIMEOUT_S) as scope:
        async for part in request.stream():
            raw += part
            if len(raw) > BODY_BYTES_MAX:
                raise BodyTooLarge
    if scope.cancelled_caught:
        raise BadInput(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s")
    return bytes(raw)


async def read_parsed(request: Request, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the whole body, which it does in a thread if the body is long."""
    raw = await read_bytes(request)
    if len(raw) > THREAD_BYTES:
        return await trio.to_thread.run_sync(parse, raw)
    return parse(raw)


async def read_json(request: Request, wanted: type[T], go_name: str = "") -> T:
    """The body as a typed value; see `decoded`. Raises BadInput."""
    return await read_parsed(request, lambda raw: decoded(raw, wanted, go_name))


def decoded(raw: bytes, wanted: type[T], go_name: str = "") -> T:
    """A JSON body as a typed value, in Go's words where it is not one: unknown fields are left out,
    null is as good as absent where the type allows None.

    go_name: of Ollama's struct, for its error texts. Raises BadInput.
    """
    if not raw.strip():
        raise BadInput("missing request body")
    try:
        return msgspec.json.decode(raw, type=wanted)
    except msgspec.ValidationError as error:
        raise BadInput(go_type_error(str(error), go_name or wanted.__name__)) from None
    except UnicodeDecodeError:
        raise BadInput("invalid character in string literal: not UTF-8") from None
    except RecursionError:
        raise BadInput("exceeded max depth") from None
    except msgspec.MsgspecError as error:
        raise BadInput(_go_syntax_error(str(error))) from None


_MISMATCH = re.compile(
    r"Expected `(?P<wanted>[^`]+)`, got `(?P<given>\w+)`(?: - at `(?P<path>.+)`)?$"
)
_GO_TYPES = {"str": "string", "int": "int", "float": "float64", "bool": "bool", "bytes": "[]uint8"}
_GO_TYPES |= {"array": "[]interface {}", "object": "map[string]interface {}"}
_GO_VALUES = {"str": "string", "int": "number", "float": "number"}


def go_type_error(problem: str, go_name: str) -> str:
    """msgspec's sentence on a value of a wrong type, as Go's json says it; others as they are."""
    found = _MISMATCH.match(problem)
    if found is None:
        return problem
    given = _GO_VALUES.get(found["given"], found["given"])
    kinds = [_GO_TYPES.get(kind, kind) for kind in found["wanted"].split(" | ") if kind != "null"]
    wanted = " or ".join(kinds) or "nil"
    if found["path"] is None:
        return f"json: cannot unmarshal {given} into Go value of type api.{go_name}"
    path = re.sub(r"\[[^\]]*\]", "", found["path"].removeprefix("$")).removeprefix(".")
    return f"json: cannot unmarshal {given} into Go struct field {go_name}.{path} of type {wanted}"


def _go_syntax_error(problem: str) -> str:
    if "truncated" in problem:
        return "unexpected EOF"
    return f"invalid character: {problem.removeprefix('JSON is malformed: ')}"

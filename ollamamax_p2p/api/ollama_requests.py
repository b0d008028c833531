"""Bodies of Ollama's inference endpoints, and the requests they become.

Every field may be null, which Go takes for absent. What Ollama refuses is refused in its words.
"""

import math
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ollamamax_p2p.api.answering import named_model
from ollamamax_p2p.api.ollama_framing import StatusError, decoded
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.inference.core.requests import (
    IMAGES_MAX,
    INPUTS_MAX,
    LOGPROBS_MAX,
    MESSAGES_MAX,
    REQUEST_BYTES_MAX,
    STOPS_MAX,
    TOKENS_MAX,
    TOOLS_MAX,
    AnyRequest,
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Options,
    ToolCall,
)

R = TypeVar("R", bound=AnyRequest)

FOREVER_S = -1.0
_INT64 = 2**63

Role = Annotated[str, Meta(max_length=64)]
Images = Annotated[tuple[bytes, ...], Meta(max_length=IMAGES_MAX)]
Tools = Annotated[tuple[dict[str, Any], ...], Meta(max_length=TOOLS_MAX)]
KeepAlive = int | float | str
Small = Annotated[int, Meta(ge=-(2**31), lt=2**31)]


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    keep_alive: KeepAlive | None = None
    options: dict[str, Any] | None = None

    @property
    def keep_alive_s(self) -> float | None:
        """As a request carries it. Raises BadInput."""
        return None if self.keep_alive is None else keep_alive_s(self.keep_alive)

    @property
    def unloads(self) -> bool:
        """Whether a body that asks for nothing asks for that."""
        return self.keep_alive_s == 0


class _TextBody(_Body, frozen=True):
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Small | None = None

    @property
    def streams(self) -> bool:
        """True unless it is refused."""
        return self.stream is not False


class GenerateBody(_TextBody, frozen=True):
    """Continues a prompt."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: Annotated[tuple[Small, ...], Meta(max_length=TOKENS_MAX)] | None = None
    raw: bool | None = None
    images: Images | None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool call names."""

    name: str = ""
    arguments: dict[str, Any] | None = None
    index: Small | None = None


class ToolCallBody(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of an earlier answer."""

    id: str | None = None
    function: CalledFunction = CalledFunction()


class MessageBody(msgspec.Struct, frozen=True, kw_only=True):
    """One message."""

    role: Role | None = None
    content: str | None = None
    thinking: str | None = None
    images: Images | None = None
    tool_calls: Annotated[tuple[ToolCallBody, ...], Meta(max_length=TOOLS_MAX)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(_TextBody, frozen=True):
    """Answers a conversation."""

    messages: Annotated[tuple[MessageBody, ...], Meta(max_length=MESSAGES_MAX)] | None = None
    tools: Tools | None = None


class EmbedBody(_Body, frozen=True):
    """Gives vectors for texts."""

    input: Any = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(lt=1_048_577)] | None = None


class EmbeddingsBody(_Body, frozen=True):
    """Gives a vector for a text."""

    prompt: str | None = None


def model_is_required() -> StatusError:
    """What most endpoints say where generate says that '' is not found."""
    return StatusError(400, "model is required")


def parse_generate(raw: bytes) -> tuple[GenerateBody, GenerateRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, GenerateBody, "GenerateRequest")
    model = named_model(body.model, StatusError(404, "model '' not found"))
    if body.raw and (body.template or body.system or body.context):
        raise BadInput("raw mode does not support template, system, or context")
    request = GenerateRequest(
        model=model,
        prompt=body.prompt or "",
        suffix=body.suffix or "",
        system=body.system or None,
        template=body.template or None,
        raw=bool(body.raw),
        images=body.images or (),
        context=body.context or (),
        **_of_text(body),
    )
    return body, sized(request)


def parse_chat(raw: bytes) -> tuple[ChatBody, ChatRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, ChatBody, "ChatRequest")
    request = ChatRequest(
        model=named_model(body.model, model_is_required()),
        messages=tuple(_message(each) for each in body.messages or ()),
        tools=body.tools or (),
        **_of_text(body),
    )
    return body, sized(request)


def parse_embed(raw: bytes) -> EmbedRequest:
    """`inputs` is empty where nothing is to be embedded. Raises BadInput or StatusError."""
    body = decoded(raw, EmbedBody, "EmbedRequest")
    request = EmbedRequest(
        model=named_model(body.model, model_is_required()),
        inputs=embed_inputs(body.input),
        truncate=body.truncate is not False,
        dimensions=max(0, body.dimensions or 0),
        **_of_any(body),
    )
    return sized(request)


def parse_embeddings(raw: bytes) -> EmbedRequest:
    """`inputs` is empty where nothing is to be embedded. Raises BadInput or StatusError."""
    body = decoded(raw, EmbeddingsBody, "EmbeddingRequest")
    request = EmbedRequest(
        model=named_model(body.model, model_is_required()),
        inputs=(body.prompt,) if body.prompt else (),
        **_of_any(body),
    )
    return sized(request)


def sized(request: R) -> R:
    """The request, if it can be sent to another node. Raises BadInput."""
    try:
        length = len(msgspec.msgpack.encode(request))
    except (OverflowError, RecursionError) as error:
        raise BadInput(f"json: cannot unmarshal: {error}") from None
    if length > REQUEST_BYTES_MAX - 1024:  # what is around it
        raise BadInput(f"a request of {length:,} bytes, the limit is {REQUEST_BYTES_MAX:,}")
    return request


def embed_inputs(given: Any) -> tuple[str, ...]:
    """Of a text, or of many. Raises BadInput in Ollama's words."""
    if given is None or given == "":
        return ()
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise BadInput("invalid input type")
    if len(given) > INPUTS_MAX:
        raise BadInput(f"{len(given):,} inputs, the limit is {INPUTS_MAX:,}")
    return tuple(given)


def _of_any(body: _Body) -> dict[str, Any]:
    return {
        "options": parse_options(body.options or {}),
        "keep_alive_s": body.keep_alive_s,
    }


def _of_text(body: _TextBody) -> dict[str, Any]:
    top = body.top_logprobs or 0
    if not 0 <= top <= LOGPROBS_MAX:
        raise BadInput("top_logprobs must be between 0 and 20")
    return _of_any(body) | {
        "format": _format(body.format),
        "think": _think(body.think),
        "logprobs": bool(body.logprobs),
        "top_logprobs": top,
        "truncate": body.truncate,
        "shift": body.shift,
    }


def _message(body: MessageBody) -> ChatMessage:
    return ChatMessage(
        role=(body.role or "").lower(),
        content=body.content or "",
        thinking=body.thinking or "",
        images=body.images or (),
        tool_calls=tuple(_tool_call(each) for each in body.tool_calls or ()),
        tool_name=body.tool_name or "",
        tool_call_id=body.tool_call_id or "",
    )


def _tool_call(body: ToolCallBody) -> ToolCall:
    called = body.function
    return ToolCall(
        name=called.name,
        arguments=called.arguments or {},
        id=body.id or "",
        index=called.index or 0,
    )


def _format(given: str | dict[str, Any] | None) -> str | dict[str, Any]:
    if not given:
        return ""
    if isinstance(given, str) and given != "json":
        quoted = msgspec.json.encode(msgspec.json.encode(given[:80]).decode()).decode()
        raise BadInput(f'invalid format: {quoted}; expected "json" or a valid JSON Schema object')
    return given


_EFFORTS = ("high", "medium", "low", "max")


def _think(given: bool | str | None) -> bool | str | None:
    if isinstance(given, str) and given not in _EFFORTS:
        shown = msgspec.json.encode(given[:80]).decode()
        raise BadInput(
            f'invalid think value: {shown} (must be "high", "medium", "low", "max", true, or false)'
        )
    return given


# -- options -----------------------------------------------------------------------------------

_OPTION_KINDS = {
    each.encode_name: str(each.type) for each in msgspec.structs.fields(Options)
}  # fmt: skip


def parse_options(given: dict[str, Any]) -> Options:
    """Unknown ones are left out, as Ollama does. Raises BadInput."""
    kept = {
        name: _option(name, value)
        for name, value in given.items()
        if name in _OPTION_KINDS and value is not None
    }
    return Options(**kept)


def _option(name: str, value: Any) -> Any:
    kind = _OPTION_KINDS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if "bool" in kind:
        if not isinstance(value, bool):
            raise BadInput(f'option "{name}" must be of type boolean')
        return value
    if "float" in kind:
        if not is_number or not math.isfinite(value):
            raise BadInput(f'option "{name}" must be of type float32')
        return float(value)
    if "int" in kind:
        if not is_number or not -_INT64 <= value < _INT64:
            raise BadInput(f'option "{name}" must be of type integer')
        return int(value)
    if not isinstance(value, list):
        raise BadInput(f'option "{name}" must be of type array')
    if not all(isinstance(each, str) for each in value):
        raise BadInput(f'option "{name}" must be of an array of strings')
    if len(value) > STOPS_MAX:
        raise BadInput(f'option "{name}" must have at most {STOPS_MAX} elements')
    return tuple(value)


# -- keep_alive --------------------------------------------------------------------------------

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_UNITS_S["h"] = 3600.0
_DURATION_PART = re.compile(r"([0-9]*)(\.[0-9]*)?([^0-9.]*)")
_DURATION_S_MAX = 2**63 / 1e9


def keep_alive_s(given: KeepAlive) -> float:
    """Seconds as a number, or a duration as Go writes it; negative is for ever. Raises BadInput."""
    seconds = go_duration_s(given) if isinstance(given, str) else float(given)
    return FOREVER_S if seconds < 0 else min(seconds, _DURATION_S_MAX)


def go_duration_s(text: str) -> float:
    """`1h30m`, `-1.5s`, `0` in seconds, as Go's time.ParseDuration reads it. Raises BadInput in its
    words.
    """
    shown = msgspec.json.encode(text[:80]).decode()
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0.0
    if not rest:
        raise BadInput(f"time: invalid duration {shown}")
    seconds = 0.0
    while rest:
        found = _DURATION_PART.match(rest)
        whole, part, unit = found.groups() if found else ("", None, "")
        if not whole and (part or ".") == ".":
            raise BadInput(f"time: invalid duration {shown}")
        if not unit:
            raise BadInput(f"time: missing unit in duration {shown}")
        if unit not in _UNITS_S:
            named = msgspec.json.encode(unit[:80]).decode()
            raise BadInput(f"time: unknown unit {named} in duration {shown}")
        seconds += float(f"{whole or 0}{part or ''}") * _UNITS_S[unit]
        rest = rest[len(whole) + len(part or "") + len(unit) :]
    if seconds > _DURATION_S_MAX:
        raise BadInput(f"time: invalid duration {shown}")
    return -seconds if text[0] == "-" else seconds

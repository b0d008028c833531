"""Bodies of OpenAI's endpoints as Ollama takes them, and the requests they become.

Not taken, as Ollama does not: tool_choice, logit_bias, user, n, best_of, echo, inputs as tokens,
previous_response_id. They are left out, not refused.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ollamamax_p2p.api.answering import named_model
from ollamamax_p2p.api.ollama_framing import StatusError, decoded
from ollamamax_p2p.api.ollama_requests import (
    Role,
    Small,
    Tools,
    embed_inputs,
    model_is_required,
    parse_options,
    sized,
)
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.inference.core.requests import (
    IMAGES_MAX,
    LOGPROBS_MAX,
    MESSAGES_MAX,
    TOOLS_MAX,
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    ToolCall,
)

IMAGE_KINDS = ("jpeg", "jpg", "png", "webp")

EFFORTS: Mapping[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "max": "max",
    "xhigh": "max",
    "ultra": "max",
}


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A schema with a name that nobody needs."""

    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """text, json_object or json_schema."""

    type: str | None = None
    json_schema: JsonSchema | None = None


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """How hard to think."""

    effort: str | None = None
    summary: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments are JSON in a text."""

    name: str = ""
    arguments: str | None = None


class CompletionToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of an earlier answer."""

    id: str | None = None
    index: Small | None = None
    function: CalledFunction = CalledFunction()


class CompletionMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message; its content is a text, or a list of parts."""

    role: Role | None = None
    content: Any = None
    reasoning: str | None = None
    tool_calls: Annotated[tuple[CompletionToolCall, ...], Meta(max_length=TOOLS_MAX)] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class _SampledBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionBody(_SampledBody, frozen=True):
    """Answers a conversation."""

    messages: Annotated[tuple[CompletionMessage, ...], Meta(max_length=MESSAGES_MAX)] | None = None
    max_completion_tokens: int | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: Small | None = None


class CompletionBody(_SampledBody, frozen=True):
    """Continues a prompt."""

    prompt: str | None = None
    suffix: str | None = None
    logprobs: Small | None = None


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """Gives vectors for texts."""

    model: str | None = None
    input: Any = None
    dimensions: Annotated[int, Meta(lt=1_048_577)] | None = None
    encoding_format: str | None = None


def parse_chat_completion(raw: bytes) -> tuple[ChatCompletionBody, ChatRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, ChatCompletionBody, "ChatCompletionRequest")
    if not body.messages:
        raise BadInput("[] is too short - 'messages'")
    effort = body.reasoning_effort or (body.reasoning and body.reasoning.effort)
    limit = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    request = ChatRequest(
        model=named_model(body.model, model_is_required()),
        messages=tuple(_messages(body.messages)),
        tools=body.tools or (),
        options=_options(body, limit),
        format=_format(body.response_format),
        think=None if not effort else thinking(effort),
        logprobs=bool(body.logprobs),
        top_logprobs=_top_logprobs(body.top_logprobs or 0),
    )
    return body, sized(request)


def parse_completion(raw: bytes) -> tuple[CompletionBody, GenerateRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, CompletionBody, "CompletionRequest")
    request = GenerateRequest(
        model=named_model(body.model, StatusError(404, "model '' not found")),
        prompt=body.prompt or "",
        suffix=body.suffix or "",
        options=_options(body, body.max_tokens),
        logprobs=body.logprobs is not None,
        top_logprobs=_top_logprobs(body.logprobs or 0),
    )
    return body, sized(request)


def parse_embedding(raw: bytes) -> tuple[EmbeddingBody, EmbedRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, EmbeddingBody, "EmbedRequest")
    kind = body.encoding_format or "float"
    if kind.lower() not in ("float", "base64"):
        raise BadInput(
            f"Invalid value for 'encoding_format' = {kind[:80]}. "
            "Supported values: ['float', 'base64']."
        )
    if body.input is None or body.input == []:
        raise BadInput("invalid input")
    request = EmbedRequest(
        model=named_model(body.model, model_is_required()),
        inputs=("",) if body.input == "" else embed_inputs(body.input),
        dimensions=max(0, body.dimensions or 0),
    )
    return body, sized(request)


def _options(body: _SampledBody, limit: int | None) -> Any:
    given = {
        "num_predict": limit,
        "seed": body.seed,
        "stop": _stops(body.stop),
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
    }
    return parse_options(given)


def _stops(given: Any) -> list[str] | None:
    """What is no text among them is left out, as Ollama does."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list):
        return [each for each in given if isinstance(each, str)] or None
    return None


def _top_logprobs(count: int) -> int:
    if not 0 <= count <= LOGPROBS_MAX:
        raise BadInput("top_logprobs must be between 0 and 20")
    return count


def _format(given: ResponseFormat | None) -> Any:
    if given is None:
        return ""
    if given.type == "json_object":
        return "json"
    if given.type == "json_schema" and given.json_schema and given.json_schema.schema:
        return given.json_schema.schema
    return ""


def thinking(effort: str) -> bool | str:
    """What `think` is for an effort of OpenAI's. Raises BadInput."""
    if effort not in EFFORTS:
        shown = msgspec.json.encode(effort[:80]).decode()
        raise BadInput(
            f'invalid reasoning value: {shown} (must be "high", "medium", "low", "max", or "none")'
        )
    return EFFORTS[effort]


def _messages(given: tuple[CompletionMessage, ...]) -> list[ChatMessage]:
    called: dict[str, str] = {}
    found = []
    for each in given:
        calls = tuple(_tool_call(call) for call in each.tool_calls or ())
        called |= {call.id: call.name for call in calls if call.id}
        role = (each.role or "").lower()
        text, images = _content(each.content, needed=each.tool_calls is None)
        call_id = each.tool_call_id or ""
        found.append(
            ChatMessage(
                role=role,
                content=text,
                thinking=each.reasoning or "",
                images=images,
                tool_calls=calls,
                tool_name=(each.name or called.get(call_id, "")) if role == "tool" else "",
                tool_call_id=call_id,
            )
        )
    return found


def _content(given: Any, *, needed: bool) -> tuple[str, tuple[bytes, ...]]:
    """Text and pictures. The parts of one message stay one message (Ollama makes one of each)."""
    if isinstance(given, str):
        return given, ()
    if not isinstance(given, list):
        if needed:
            raise BadInput(f"invalid message content type: {_go_type(given)}")
        return "", ()
    texts, images = [], []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(image(url.get("url") if isinstance(url, dict) else url))
        else:
            raise BadInput("invalid message format")
    if len(images) > IMAGES_MAX:
        raise BadInput(f"{len(images)} pictures in a message, the limit is {IMAGES_MAX}")
    return "\n".join(texts), tuple(images)


def _go_type(value: Any) -> str:
    if value is None:
        return "<nil>"
    names = {bool: "bool", dict: "map[string]interface {}"}
    return names.get(type(value), "float64")


def image(url: Any) -> bytes:
    """The picture in a data URI: nothing is fetched for a client. Raises BadInput."""
    if not isinstance(url, str):
        raise BadInput("invalid message format")
    head, separator, data = url.partition(";base64,")
    if not separator or head not in ("data:", *(f"data:image/{kind}" for kind in IMAGE_KINDS)):
        raise BadInput("invalid image input")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadInput("invalid message format") from None


def _tool_call(given: CompletionToolCall) -> ToolCall:
    return ToolCall(
        name=given.function.name,
        arguments=call_arguments(given.function.arguments),
        id=given.id or "",
        index=given.index or 0,
    )


def call_arguments(text: str | None) -> dict[str, Any]:
    """Raises BadInput."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise BadInput("invalid tool call arguments") from None

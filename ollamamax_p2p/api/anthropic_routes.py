"""Anthropic's Messages, as Ollama has it."""

import base64
import binascii
import secrets
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from ollamamax_p2p.api import go_json
from ollamamax_p2p.api.answering import (
    Asking,
    CollectedAnswer,
    StreamedAnswer,
    WholeAnswer,
    answering,
    named_model,
    tool_call_id,
)
from ollamamax_p2p.api.ollama_framing import (
    JSON,
    Header,
    decoded,
    read_parsed,
    retry_after,
    status_and_text,
    whole_response,
)
from ollamamax_p2p.api.ollama_requests import (
    Role,
    Small,
    Tools,
    model_is_required,
    parse_options,
    sized,
)
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.inference.core.requests import (
    IMAGES_MAX,
    MESSAGES_MAX,
    STOPS_MAX,
    ChatMessage,
    ChatRequest,
    Delta,
    Finish,
    ToolCall,
)

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "max"}


class MessageParam(msgspec.Struct, frozen=True, kw_only=True):
    """One message; its content is a text, or a list of blocks."""

    role: Role | None = None
    content: Any = None


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """enabled or disabled."""

    type: str | None = None


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How hard to think."""

    effort: str | None = None


class MessagesBody(msgspec.Struct, frozen=True, kw_only=True):
    """Answers a conversation."""

    model: str | None = None
    max_tokens: Small | None = None
    messages: Annotated[tuple[MessageParam, ...], Meta(max_length=MESSAGES_MAX)] | None = None
    system: Any = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Small | None = None
    stop_sequences: Annotated[tuple[str, ...], Meta(max_length=STOPS_MAX)] | None = None
    tools: Tools | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


def parse_messages(raw: bytes) -> tuple[MessagesBody, ChatRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, MessagesBody, "MessagesRequest")
    model = named_model(body.model, model_is_required())
    if not body.max_tokens or body.max_tokens < 0:
        raise BadInput("max_tokens is required and must be positive")
    if not body.messages:
        raise BadInput("messages is required")
    options = {
        "num_predict": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": list(body.stop_sequences or ()) or None,
    }
    messages = [] if not (system := _system(body.system)) else [system]
    for each in body.messages:
        messages += _messages(each)
    request = ChatRequest(
        model=model,
        messages=tuple(messages),
        tools=tuple(_tool(each) for each in body.tools or ()),
        options=parse_options(options),
        think=_think(body),
    )
    return body, sized(request)


def _think(body: MessagesBody) -> bool | str | None:
    kind = body.thinking.type if body.thinking else None
    if kind in ("enabled", "disabled"):
        return kind == "enabled"
    effort = (body.output_config.effort if body.output_config else None) or ""
    return _EFFORTS.get(effort.strip().lower())


def _system(given: Any) -> ChatMessage | None:
    text = given if isinstance(given, str) else "".join(_texts(given))
    return ChatMessage(role="system", content=text) if text else None


def _texts(blocks: Any) -> list[str]:
    if not isinstance(blocks, list):
        return []
    return [
        block["text"]
        for block in blocks
        if isinstance(block, dict)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
    ]


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    """A tool as Ollama writes it. Raises BadInput."""
    name, schema = given.get("name"), given.get("input_schema")
    if not isinstance(name, str) or not isinstance(schema, dict | None):
        raise BadInput("a tool needs a name, and a schema that is an object")
    function = {"name": name, "description": given.get("description") or ""}
    return {"type": "function", "function": function | {"parameters": schema or {}}}


def _messages(given: MessageParam) -> list[ChatMessage]:
    role = (given.role or "").lower()
    if isinstance(given.content, str):
        return [ChatMessage(role=role, content=given.content)] if given.content else []
    if not isinstance(given.content, list):
        raise BadInput("content must be a string or an array of blocks")
    texts: list[str] = []
    images: list[bytes] = []
    calls: list[ToolCall] = []
    results: list[ChatMessage] = []
    thought = ""
    for block in given.content:
        if not isinstance(block, dict):
            raise BadInput("a content block must be an object")
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(block, "text"))
        elif kind == "image":
            images.append(_image(block.get("source")))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result":
            results.append(_result(block))
        elif kind == "thinking":
            thought = _text(block, "thinking")
    if len(images) > IMAGES_MAX:
        raise BadInput(f"{len(images)} pictures in a message, the limit is {IMAGES_MAX}")
    said = ChatMessage(
        role=role,
        content="".join(texts),
        thinking=thought,
        images=tuple(images),
        tool_calls=tuple(calls),
    )
    own = [said] if said.content or images or calls or thought else []
    return [*results, *own] if role == "user" else [*own, *results]


def _text(block: dict[str, Any], field: str) -> str:
    value = block.get(field) or ""
    if not isinstance(value, str):
        raise BadInput(f"{field} must be a string")
    return value


def _image(source: Any) -> bytes:
    """Nothing is fetched for a client, so that only what is there counts. Raises BadInput."""
    if not isinstance(source, dict):
        raise BadInput("invalid image source")
    if source.get("type") != "base64" or not isinstance(source.get("data"), str):
        raise BadInput("invalid image source type: only base64 images are supported")
    try:
        return base64.b64decode(source["data"], validate=True)
    except (binascii.Error, ValueError):
        raise BadInput("invalid base64 image data") from None


def _call(block: dict[str, Any]) -> ToolCall:
    for field in ("id", "name"):
        if not isinstance(block.get(field), str) or not block[field]:
            raise BadInput(f"tool_use block missing required '{field}' field")
    given = block.get("input") or {}
    if not isinstance(given, dict):
        raise BadInput("the input of a tool_use block must be an object")
    return ToolCall(name=block["name"], arguments=given, id=block["id"])


def _result(block: dict[str, Any]) -> ChatMessage:
    content = block.get("content") or ""
    images: tuple[bytes, ...] = ()
    if isinstance(content, list):
        pictures = [
            each for each in content if isinstance(each, dict) and each.get("type") == "image"
        ]
        if len(pictures) > IMAGES_MAX:
            raise BadInput(f"{len(pictures)} pictures in a result, the limit is {IMAGES_MAX}")
        images = tuple(_image(each.get("source")) for each in pictures)
        content = "".join(_texts(content))
    if not isinstance(content, str):
        raise BadInput("the content of a tool_result block must be a string or an array of blocks")
    return ChatMessage(
        role="tool",
        content=content,
        images=images,
        tool_call_id=_text(block, "tool_use_id"),
    )


def anthropic_refusal(error: Exception) -> Response:
    """An error in place of the answer."""
    status, text = status_and_text(error)
    body = {
        "type": "error",
        "error": {"type": _ERROR_TYPES.get(status, "api_error"), "message": text},
        "request_id": _new_id("req"),
    }
    return whole_response(go_json.encode(body), JSON, status, retry_after(error))


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


class AnthropicRoutes:
    """The one endpoint."""

    def __init__(self, inference: ServedInference) -> None:
        self._inference = inference

    async def messages(self, request: Request) -> StreamedAnswer | CollectedAnswer:
        """Answer a conversation."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, parse_messages)
        shape = MessagesShape(wanted)
        return answering(self._inference, wanted, asking, shape, stream=bool(body.stream))


class MessagesShape:
    """/v1/messages: blocks of thinking, text and tool calls, one after another."""

    content_type = b"text/event-stream"

    def __init__(self, request: ChatRequest) -> None:
        self._model = request.model
        self._id = _new_id("msg")
        self._open = ""
        """The kind of the block that is begun; "" if none is."""
        self._index = 0
        self._called = False

    def begin(self) -> bytes:
        """The message as it begins."""
        message = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return _event({"type": "message_start", "message": message})

    def delta(self, part: Delta) -> bytes:
        """Events for what is thought, said and called."""
        data = b""
        if part.thinking:
            data += self._continue("thinking", {"type": "thinking", "thinking": ""})
            data += self._delta({"type": "thinking_delta", "thinking": part.thinking})
        if part.text:
            data += self._continue("text", {"type": "text", "text": ""})
            data += self._delta({"type": "text_delta", "text": part.text})
        for call in part.tool_calls:
            block = {"type": "tool_use", "id": tool_call_id(call), "name": call.name, "input": {}}
            arguments = go_json.encode(call.arguments).decode()
            data += self._close() + self._continue("tool_use", block)
            data += self._delta({"type": "input_json_delta", "partial_json": arguments})
            data += self._close()
            self._called = True
        return data

    def finish(self, part: Finish, moved: int) -> bytes:
        """Why it ends, and what it took."""
        data = self._close()
        event: dict[str, Any] = {
            "type": "message_delta",
            "delta": {"stop_reason": _stop_reason(part, called=self._called)},
            "usage": _usage(part),
        }
        if moved:
            event["omx_moved"] = moved
        return data + _event(event) + _event({"type": "message_stop"})

    def broken(self, error: Exception) -> bytes:
        """An error as an event."""
        status, text = status_and_text(error)
        kind = _ERROR_TYPES.get(status, "api_error")
        return _event({"type": "error", "error": {"type": kind, "message": text}})

    def whole(self, answer: WholeAnswer, headers: list[Header]) -> Response:
        """One object."""
        content: list[dict[str, Any]] = []
        if answer.thinking:
            content.append({"type": "thinking", "thinking": answer.thinking})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        content += [
            {
                "type": "tool_use",
                "id": tool_call_id(call),
                "name": call.name,
                "input": call.arguments,
            }
            for call in answer.tool_calls
        ]
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": _stop_reason(answer.finish, called=bool(answer.tool_calls)),
            "usage": _usage(answer.finish),
        }
        if answer.moved:
            message["omx_moved"] = answer.moved
        return whole_response(go_json.encode(message) + b"\n", "application/json", 200, headers)

    def refusal(self, error: Exception) -> Response:
        """An error in place of the answer."""
        return anthropic_refusal(error)

    def _continue(self, kind: str, block: dict[str, Any]) -> bytes:
        """Have a block of this kind open."""
        if self._open == kind:
            return b""
        data = self._close()
        self._open = kind
        return data + _event(
            {"type": "content_block_start", "index": self._index, "content_block": block}
        )

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        self._index += 1
        return _event({"type": "content_block_stop", "index": self._index - 1})


def _event(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: ".encode() + go_json.encode(event) + b"\n\n"


def _stop_reason(part: Finish, *, called: bool) -> str:
    return "tool_use" if called else _STOP_REASONS.get(part.reason, "end_turn")


def _usage(part: Finish) -> dict[str, int]:
    return {
        "input_tokens": part.usage.prompt_tokens,
        "output_tokens": part.usage.completion_tokens,
    }

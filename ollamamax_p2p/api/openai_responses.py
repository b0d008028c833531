"""OpenAI's Responses: its body, its whole answer, and its events.

Ollama writes its events from Go maps, so that their keys are in alphabetical order; the whole
answer comes from a struct.
"""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.responses import Response

from ollamamax_p2p.api import go_json
from ollamamax_p2p.api.answering import WholeAnswer, named_model, tool_call_id
from ollamamax_p2p.api.ollama_framing import Header, decoded, status_and_text, whole_response
from ollamamax_p2p.api.ollama_requests import (
    Role,
    Tools,
    model_is_required,
    parse_options,
    sized,
)
from ollamamax_p2p.api.openai_requests import Reasoning, call_arguments, image, thinking
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.inference.core.requests import (
    IMAGES_MAX,
    MESSAGES_MAX,
    ChatMessage,
    ChatRequest,
    Delta,
    Finish,
    ToolCall,
    Usage,
)


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a function call, its output, or reasoning: told apart by `type`."""

    type: str | None = None
    role: Role | None = None
    content: Any = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Any = None
    encrypted_content: str | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """text, json_object or json_schema."""

    type: str | None = None
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the text shall be."""

    format: TextFormat | None = None


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    """Answers a conversation, in the form of Responses."""

    model: str | None = None
    input: str | Annotated[tuple[InputItem, ...], Meta(max_length=MESSAGES_MAX)] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextSettings | None = None
    truncation: str | None = None
    tools: Tools | None = None
    stream: bool | None = None
    background: bool | None = None


def parse_responses(raw: bytes) -> tuple[ResponsesBody, ChatRequest]:
    """Raises BadInput or StatusError."""
    body = decoded(raw, ResponsesBody, "ResponsesRequest")
    messages = _messages(body)
    if not messages:
        raise BadInput("[] is too short - 'input'")
    given = {
        "num_predict": body.max_output_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": body.top_p,
    }
    effort = body.reasoning and body.reasoning.effort
    format = body.text.format if body.text else None
    request = ChatRequest(
        model=named_model(body.model, model_is_required()),
        messages=tuple(messages),
        tools=tuple(_tool(each) for each in body.tools or ()),
        options=parse_options(given),
        think=thinking(effort) if effort else None,
        format=_format(format),
    )
    return body, sized(request)


def _format(given: TextFormat | None) -> Any:
    if given is None:
        return ""
    if given.type == "json_object":
        return "json"
    return given.schema if given.type == "json_schema" and given.schema else ""


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    """Responses writes a function's fields beside its type, everybody else below `function`."""
    if given.get("type") != "function" or "function" in given:
        return given
    fields = {name: given[name] for name in ("name", "description", "parameters") if name in given}
    return {"type": "function", "function": fields}


def _messages(body: ResponsesBody) -> list[ChatMessage]:
    found = []
    if body.instructions:
        found.append(ChatMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        if body.input:
            found.append(ChatMessage(role="user", content=body.input))
        return found
    thought = ""
    for index, item in enumerate(body.input or ()):
        kind = item.type or ("message" if item.role else "")
        if kind == "reasoning":
            thought = item.encrypted_content or ""
        elif kind == "message":
            text, images = _content(item.content, f"input[{index}].content")
            role = (item.role or "").lower()
            kept = thought if role == "assistant" else ""
            found.append(ChatMessage(role=role, content=text, images=images, thinking=kept))
            thought = "" if kept else thought
        elif kind == "function_call":
            call = ToolCall(
                name=item.name or "",
                arguments=call_arguments(item.arguments),
                id=item.call_id or "",
            )
            _add_call(found, call, thought)
            thought = ""
        elif kind == "function_call_output":
            text, images = _content(item.output, f"input[{index}].output")
            found.append(
                ChatMessage(
                    role="tool", content=text, images=images, tool_call_id=item.call_id or ""
                )
            )
        elif not kind:
            raise BadInput(f"input[{index}]: input item missing required 'type' field")
        else:
            shown = msgspec.json.encode(kind[:80]).decode()
            raise BadInput(f"input[{index}]: unknown input item type: {shown}")
    if thought:
        found.append(ChatMessage(role="assistant", thinking=thought))
    return found


def _add_call(found: list[ChatMessage], call: ToolCall, thought: str) -> None:
    """To the assistant's message if that came last; calls of one turn belong together."""
    last = found[-1] if found else None
    if last is not None and last.role == "assistant":
        found[-1] = msgspec.structs.replace(
            last, tool_calls=(*last.tool_calls, call), thinking=thought or last.thinking
        )
    else:
        found.append(ChatMessage(role="assistant", tool_calls=(call,), thinking=thought))


def _content(given: Any, where: str) -> tuple[str, tuple[bytes, ...]]:
    if given is None:
        return "", ()
    if isinstance(given, str):
        return given, ()
    if not isinstance(given, list):
        raise BadInput(f"{where} must be a string or array")
    texts, images = [], []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "input_image":
            if part.get("image_url"):
                images.append(image(part["image_url"]))
        elif kind == "input_file":
            raise BadInput("file inputs are not currently supported")
        else:
            raise BadInput(f"{where}: unknown content type: {str(kind)[:80]}")
    if len(images) > IMAGES_MAX:
        raise BadInput(f"{where}: {len(images)} pictures, the limit is {IMAGES_MAX}")
    return "".join(texts), tuple(images)


class ResponsesShape:
    """/v1/responses. Text that comes after a tool call is not told, as in Ollama."""

    content_type = b"text/event-stream"

    def __init__(self, body: ResponsesBody, *, refused: Callable[[Exception], Response]) -> None:
        """refused: how OpenAI's envelope tells an error."""
        self.refusal = refused
        self._body = body
        self._id = f"resp_{secrets.randbelow(999_999)}"
        self._message_id = f"msg_{secrets.randbelow(999_999)}"
        self._created = int(datetime.now(UTC).timestamp())
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._thoughts: list[str] = []
        self._thinks = False
        self._texts: list[str] = []
        self._speaks = False
        self._calls = 0

    # -- a stream ------------------------------------------------------------------------------

    def begin(self) -> bytes:
        """The response as it will be, twice."""
        return self._event(
            "response.created", response=self._object("in_progress", [], None)
        ) + self._event("response.in_progress", response=self._object("in_progress", [], None))

    def delta(self, part: Delta) -> bytes:
        """Events for what is thought, called and said."""
        data = b""
        if part.thinking:
            data += self._think(part.thinking)
        for call in part.tool_calls:
            data += self._end_thinking() + self._end_message() + self._call(call)
        if part.text and not self._calls:
            data += self._end_thinking() + self._say(part.text)
        return data

    def finish(self, part: Finish, moved: int) -> bytes:
        """What is open is closed, then the whole response comes once more."""
        data = self._end_thinking()
        if not self._calls and not self._speaks:
            data += self._begin_message()
        data += self._end_message()
        cut = part.reason == "length"
        response = self._object(
            "incomplete" if cut else "completed", self._output, _usage(part.usage)
        )
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["completed_at"] = int(datetime.now(UTC).timestamp())
        if moved:
            response["omx_moved"] = moved
        kind = "response.incomplete" if cut else "response.completed"
        return data + self._event(kind, response=response)

    def broken(self, error: Exception) -> bytes:
        """The response failed."""
        response = self._object("failed", self._output, None)
        response["error"] = {"code": "server_error", "message": status_and_text(error)[1]}
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **facts: Any) -> bytes:
        facts |= {"type": kind, "sequence_number": self._sequence}
        self._sequence += 1
        return f"event: {kind}\ndata: ".encode() + go_json.encode(facts, sort_keys=True) + b"\n\n"

    def _think(self, text: str) -> bytes:
        data = b""
        if not self._thinks:
            self._thinks = True
            item = {"id": f"rs_{self._id}", "type": "reasoning", "summary": []}
            data = self._event(
                "response.output_item.added", output_index=len(self._output), item=item
            )
        self._thoughts.append(text)
        return data + self._event(
            "response.reasoning_summary_text.delta",
            item_id=f"rs_{self._id}",
            output_index=len(self._output),
            summary_index=0,
            delta=text,
        )

    def _end_thinking(self) -> bytes:
        if not self._thinks:
            return b""
        self._thinks = False
        text, index = "".join(self._thoughts), len(self._output)
        item = _reasoning_item(self._id, text)
        self._output.append(item)
        return self._event(
            "response.reasoning_summary_text.done",
            item_id=item["id"],
            output_index=index,
            summary_index=0,
            text=text,
        ) + self._event("response.output_item.done", output_index=index, item=item)

    def _call(self, call: ToolCall) -> bytes:
        index = len(self._output)
        item = _call_item(self._id, self._calls, call)
        self._calls += 1
        self._output.append(item)
        begun = item | {"status": "in_progress", "arguments": ""}
        text = item["arguments"]
        where = {"item_id": item["id"], "output_index": index}
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event("response.function_call_arguments.delta", **where, delta=text)
            + self._event("response.function_call_arguments.done", **where, arguments=text)
            + self._event("response.output_item.done", output_index=index, item=item)
        )

    def _say(self, text: str) -> bytes:
        data = b"" if self._speaks else self._begin_message()
        self._texts.append(text)
        return data + self._event(
            "response.output_text.delta", **self._text_place(), delta=text, logprobs=[]
        )

    def _text_place(self) -> dict[str, Any]:
        return {
            "item_id": self._message_id,
            "output_index": len(self._output),
            "content_index": 0,
        }

    def _begin_message(self) -> bytes:
        self._speaks = True
        item = _message_item(self._message_id, "in_progress", [])
        return self._event(
            "response.output_item.added", output_index=len(self._output), item=item
        ) + self._event("response.content_part.added", **self._text_place(), part=_text_part(""))

    def _end_message(self) -> bytes:
        if not self._speaks:
            return b""
        self._speaks = False
        text = "".join(self._texts)
        part = _text_part(text)
        item = _message_item(self._message_id, "completed", [part])
        data = (
            self._event("response.output_text.done", **self._text_place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._text_place(), part=part)
            + self._event("response.output_item.done", output_index=len(self._output), item=item)
        )
        self._output.append(item)
        return data

    # -- all at once ---------------------------------------------------------------------------

    def whole(self, answer: WholeAnswer, headers: list[Header]) -> Response:
        """One object."""
        output = [_reasoning_item(self._id, answer.thinking)] if answer.thinking else []
        if answer.text or not answer.tool_calls:
            output.append(_message_item(self._message_id, "completed", [_text_part(answer.text)]))
        output += [
            _call_item(self._id, index, call) for index, call in enumerate(answer.tool_calls)
        ]
        cut = answer.finish.reason == "length"
        status = "incomplete" if cut else "completed"
        response = self._object(status, output, _usage(answer.usage))
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["completed_at"] = int(datetime.now(UTC).timestamp())
        if answer.moved:
            response["omx_moved"] = answer.moved
        return whole_response(go_json.encode(response) + b"\n", "application/json", 200, headers)

    def _object(self, status: str, output: list[dict[str, Any]], usage: Any) -> dict[str, Any]:
        body = self._body
        text: Any = body.text.format if body.text else None
        reasoning = body.reasoning
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "incomplete_details": None,
            "model": body.model,
            "previous_response_id": None,
            "instructions": body.instructions or None,
            "output": output,
            "error": None,
            "tools": body.tools or (),
            "tool_choice": "auto",
            "truncation": body.truncation or "disabled",
            "parallel_tool_calls": True,
            "text": {"format": _told(text) or {"type": "text"}},
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": 0,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "reasoning": _told(reasoning) or None,
            "usage": usage,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "store": False,
            "background": bool(body.background),
            "service_tier": "default",
            "metadata": {},
            "safety_identifier": None,
            "prompt_cache_key": None,
        }


def _told(given: msgspec.Struct | None) -> dict[str, Any]:
    """What a client set, given back."""
    if given is None:
        return {}
    return {name: value for name, value in msgspec.structs.asdict(given).items() if value}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def _reasoning_item(response_id: str, text: str) -> dict[str, Any]:
    return {
        "id": f"rs_{response_id}",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text}],
        "encrypted_content": text,  # not encrypted: it only has to come back
    }


def _call_item(response_id: str, index: int, call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{response_id}_{index}",
        "type": "function_call",
        "status": "completed",
        "call_id": tool_call_id(call),
        "name": call.name,
        "arguments": go_json.encode(call.arguments).decode(),
    }


def _message_item(item_id: str, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": item_id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": parts,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

"""Requests and streamed answers of OpenAI's chat completions, as llama.cpp, vLLM, SGLang and LM
Studio speak them.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ollamamax_p2p.inference.core.completion_pieces import (
    Timings,
    TokenProbability,
    TopProbability,
    as_logprob,
)
from ollamamax_p2p.inference.core.requests import (
    TOOLS_MAX,
    ChatMessage,
    Delta,
    Logprob,
    Options,
    TextRequest,
    ToolCall,
)

ARGUMENTS_CHARS_MAX = 4 * 1024 * 1024
"""Of all tool calls of an answer together."""

_PICTURES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp"), (b"GIF8", "gif"))


def openai_messages(messages: Iterable[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the chat endpoint takes them."""
    return [_message(each) for each in messages]


def _message(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        text = [{"type": "text", "text": message.content}] if message.content else []
        fields["content"] = text + [
            {"type": "image_url", "image_url": {"url": _data_url(image)}}
            for image in message.images
        ]
    if message.thinking:
        fields["reasoning_content"] = message.thinking
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or f"call_{call.index}",
                "function": {
                    "name": call.name,
                    "arguments": msgspec.json.encode(call.arguments).decode(),
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        fields["tool_call_id"] = message.tool_call_id or message.tool_name
        if message.tool_name:
            fields["name"] = message.tool_name
    return fields


def _data_url(image: bytes) -> str:
    kind = next((kind for magic, kind in _PICTURES if image.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def openai_options(options: Options) -> dict[str, Any]:
    """Options that OpenAI has, by its names; those that are None are left out.

    options: num_predict below 0 is no limit.
    """
    limit = options.num_predict
    fields = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "max_tokens": None if limit is None or limit < 0 else limit,
        "stop": list(options.stop) if options.stop else None,
        # Not OpenAI's, but vLLM, SGLang, llama-server and LM Studio all take them.
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repeat_penalty,
    }
    return {name: value for name, value in fields.items() if value is not None}


def response_format(request: TextRequest) -> dict[str, Any]:
    """The `response_format` field, if the request wants JSON."""
    if request.format == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(request.format, dict):
        schema = {"name": "answer", "schema": request.format, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {}


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _ToolDelta(msgspec.Struct, frozen=True):
    index: Annotated[int, Meta(ge=0, lt=TOOLS_MAX)] = 0
    id: str | None = None
    function: _Function = _Function()


class _ChoiceDelta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[_ToolDelta, ...] | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    """Of a chat completion (`content`), or of a text completion (the others)."""

    content: tuple[TokenProbability, ...] | None = None
    tokens: tuple[str, ...] | None = None
    token_logprobs: tuple[float | None, ...] | None = None
    top_logprobs: tuple[dict[str, float | None] | None, ...] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _ChoiceDelta = _ChoiceDelta()
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    completion_tokens: Annotated[int, Meta(ge=0, lt=2**53)] = 0


class AnswerChunk(msgspec.Struct, frozen=True):
    """One event of a streamed chat or text completion, as far as it is used."""

    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    timings: Timings | None = None
    error: Any = None


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class AnswerChunks:
    """Turns chunks into deltas; tool calls come whole, at the end."""

    reason: str = ""
    """Why it ended, once it has: stop, length."""
    usage: _Usage | None = None
    timings: Timings = field(default_factory=Timings)
    delta_count: int = 0
    """Deltas with text, thinking or logprobs: about as many as tokens."""
    _calls: dict[int, _Call] = field(default_factory=dict)
    _chars: int = 0

    def feed(self, chunk: AnswerChunk) -> Delta | None:
        """A delta, if the chunk brings one. Raises ValueError for tool calls that are too long."""
        self.usage = chunk.usage or self.usage
        self.timings = chunk.timings or self.timings
        if not chunk.choices:
            return None
        choice = chunk.choices[0]
        if choice.finish_reason:
            self.reason = "length" if choice.finish_reason == "length" else "stop"
        for part in choice.delta.tool_calls or ():
            self._note(part)
        delta = Delta(
            text=choice.delta.content or choice.text or "",
            thinking=choice.delta.reasoning_content or choice.delta.reasoning or "",
            logprobs=_logprobs(choice.logprobs),
        )
        if not (delta.text or delta.thinking or delta.logprobs):
            return None
        self.delta_count += 1
        return delta

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Every call, in order. Raises ValueError where arguments are no JSON object."""
        return tuple(
            ToolCall(
                name=call.name,
                arguments=_object("".join(call.arguments)),
                id=call.id,
                index=place,
            )
            for place, (_, call) in enumerate(sorted(self._calls.items()))
        )

    def _note(self, part: _ToolDelta) -> None:
        call = self._calls.setdefault(part.index, _Call())
        call.id = part.id or call.id
        call.name += part.function.name or ""
        call.arguments.append(part.function.arguments or "")
        self._chars += len(part.function.arguments or "") + len(part.function.name or "")
        if self._chars > ARGUMENTS_CHARS_MAX:
            raise ValueError("its tool calls are too long")


def _logprobs(given: _Logprobs | None) -> tuple[Logprob, ...]:
    if given is None:
        return ()
    if given.content is not None:
        return tuple(map(as_logprob, given.content))
    tops = given.top_logprobs or ()
    return tuple(
        as_logprob(
            TokenProbability(
                token,
                logprob,
                tuple(token.encode()),
                tuple(
                    TopProbability(other, likely, tuple(other.encode()))
                    for other, likely in (
                        (tops[place] if place < len(tops) else None) or {}
                    ).items()
                ),
            )
        )
        for place, (token, logprob) in enumerate(
            zip(given.tokens or (), given.token_logprobs or (), strict=False)
        )
    )


def _object(text: str) -> dict[str, Any]:
    try:
        read = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"its tool call has no JSON for arguments: {error}") from None
    if not isinstance(read, dict):
        raise ValueError("its tool call's arguments are no JSON object")
    return read

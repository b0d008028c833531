"""Requests and answers of Ollama's HTTP API, from the client's side."""

import base64
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ollamamax_p2p.inference.core.completion_pieces import TokenProbability, as_logprob
from ollamamax_p2p.inference.core.requests import (
    INPUTS_MAX,
    TOKENS_MAX,
    TOOLS_MAX,
    ChatMessage,
    ChatRequest,
    Count,
    Delta,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Options,
    TextRequest,
    ToolCall,
    Usage,
)


def request_body(request: TextRequest | EmbedRequest) -> dict[str, Any]:
    """A request as Ollama takes it; what is not said is left out, so that its defaults hold."""
    body: dict[str, Any] = {"model": request.model}
    if options := options_body(request.options):
        body["options"] = options
    if request.keep_alive_s is not None:
        body["keep_alive"] = request.keep_alive_s
    if isinstance(request, EmbedRequest):
        body |= {"input": list(request.inputs), "truncate": request.truncate}
        return body | ({"dimensions": request.dimensions} if request.dimensions else {})
    for name in ("think", "truncate", "shift"):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if request.format:
        body["format"] = request.format
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    body["stream"] = True
    return body | (_chat(request) if isinstance(request, ChatRequest) else _generate(request))


def options_body(options: Options) -> dict[str, Any]:
    """Those that are said."""
    told = msgspec.structs.asdict(options)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in told.items()
        if value is not None
    }


def _chat(request: ChatRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_message(each) for each in request.messages]}
    return body | ({"tools": list(request.tools)} if request.tools else {})


def _generate(request: GenerateRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": request.prompt}
    for name in ("suffix", "raw"):
        if value := getattr(request, name):
            body[name] = value
    for name in ("system", "template"):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if request.images:
        body["images"] = [base64.b64encode(image).decode() for image in request.images]
    if request.context:
        body["context"] = list(request.context)
    return body


def _message(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("thinking", "tool_name", "tool_call_id"):
        if value := getattr(message, name):
            fields[name] = value
    if message.images:
        fields["images"] = [base64.b64encode(image).decode() for image in message.images]
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "function": {"index": call.index, "name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return fields


class _Function(msgspec.Struct, frozen=True):
    name: str = ""
    arguments: dict[str, Any] | None = None
    index: int = 0


class _Call(msgspec.Struct, frozen=True):
    function: _Function = _Function()
    id: str = ""


class _Message(msgspec.Struct, frozen=True):
    content: str = ""
    thinking: str = ""
    tool_calls: Annotated[tuple[_Call, ...], Meta(max_length=TOOLS_MAX)] | None = None


class Line(msgspec.Struct, frozen=True):
    """One line of a streamed answer, as far as it is used."""

    message: _Message | None = None
    response: str = ""
    thinking: str = ""
    tool_calls: Annotated[tuple[_Call, ...], Meta(max_length=TOOLS_MAX)] | None = None
    logprobs: tuple[TokenProbability, ...] | None = None
    done: bool = False
    done_reason: str = ""
    context: Annotated[tuple[int, ...], Meta(max_length=TOKENS_MAX)] | None = None
    total_duration: Count = 0
    load_duration: Count = 0
    prompt_eval_count: Count = 0
    prompt_eval_duration: Count = 0
    eval_count: Count = 0
    eval_duration: Count = 0
    error: str = ""

    def delta(self) -> Delta | None:
        """What the line brings for the client, if anything."""
        message = self.message or _Message(self.response, self.thinking, self.tool_calls)
        delta = Delta(
            text=message.content,
            thinking=message.thinking,
            tool_calls=tuple(
                ToolCall(
                    name=call.function.name,
                    arguments=call.function.arguments or {},
                    id=call.id,
                    index=call.function.index,
                )
                for call in message.tool_calls or ()
            ),
            logprobs=tuple(map(as_logprob, self.logprobs or ())),
        )
        return delta if delta != Delta() else None

    def finish(self, *, earlier_tokens: int, prompt_tokens_less: int) -> Finish:
        """The end. earlier_tokens: of the part that came before a Resume; prompt_tokens_less: by
        how much the prompt was longer for it."""
        return Finish(
            reason=self.done_reason[:32] or "stop",
            usage=Usage(
                prompt_tokens=max(0, self.prompt_eval_count - prompt_tokens_less),
                completion_tokens=self.eval_count + earlier_tokens,
                load_ns=self.load_duration,
                prompt_ns=self.prompt_eval_duration,
                completion_ns=self.eval_duration,
                total_ns=self.total_duration,
            ),
            context=self.context or (),
        )


class _Details(msgspec.Struct, frozen=True):
    format: str = ""
    family: str = ""
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: Count = 0
    embedding_length: Count = 0


class Listed(msgspec.Struct, frozen=True):
    """A model of /api/tags or /api/ps."""

    name: str
    digest: str = ""
    size: Count = 0
    size_vram: Count = 0
    modified_at: str = ""
    expires_at: str = ""
    context_length: Count = 0
    details: _Details = _Details()
    capabilities: tuple[str, ...] | None = None
    remote_host: str = ""


class Models(msgspec.Struct, frozen=True):
    """The answer of /api/tags and /api/ps."""

    models: Annotated[tuple[Listed, ...], Meta(max_length=100_000)] | None = None


class Shown(msgspec.Struct, frozen=True):
    """The answer of /api/show, as far as it is used."""

    capabilities: tuple[str, ...] | None = None
    template: str = ""
    model_info: Mapping[str, Any] | None = None


class Vectors(msgspec.Struct, frozen=True):
    """The answer of /api/embed."""

    embeddings: Annotated[tuple[tuple[float, ...], ...], Meta(max_length=INPUTS_MAX)]
    prompt_eval_count: Count = 0
    load_duration: Count = 0
    total_duration: Count = 0


def guessed_capabilities(shown: Shown) -> tuple[str, ...]:
    """What a model can, where an Ollama is too old to say so (before 0.6.4): from its template."""
    info = shown.model_info or {}
    embeds = any(key.endswith(".pooling_type") for key in info)
    found = ["embedding" if embeds else "completion"]
    found += ["tools"] if ".Tools" in shown.template else []
    found += ["insert"] if ".Suffix" in shown.template else []
    return tuple(found)

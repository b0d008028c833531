"""OpenAI's endpoints, as Ollama has them.

A stream is server-sent events, one `data: {json}` each, and ends with `data: [DONE]`. An error that
Ollama's own endpoint finds is JSON with a newline after it (Go's Encoder writes one), one that is
found in the body here is not.
"""

import base64
import secrets
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollamamax_p2p.api import go_json
from ollamamax_p2p.api import openai_requests as bodies
from ollamamax_p2p.api.answering import (
    Asking,
    CollectedAnswer,
    StreamedAnswer,
    WholeAnswer,
    answering,
    tool_call_id,
)
from ollamamax_p2p.api.ollama_framing import (
    JSON,
    Header,
    read_parsed,
    retry_after,
    status_and_text,
    whole_response,
)
from ollamamax_p2p.api.ollama_generation_routes import worded_for_embed, written_vectors
from ollamamax_p2p.api.openai_responses import ResponsesShape, parse_responses
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import BadName, ModelNotFound
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.inference.core.requests import (
    Delta,
    Finish,
    Logprob,
    TextRequest,
    ToolCall,
    Usage,
)

FINGERPRINT = "fp_ollama"
EVENT_STREAM = b"text/event-stream"
ENCODED_JSON = "application/json"
DONE = b"data: [DONE]\n\n"

_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


class ErrorFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: None = None
    code: None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's errors."""

    error: ErrorFacts


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments are JSON in a text."""

    name: str
    arguments: str


class ToolCallEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model wants called."""

    id: str
    index: int
    type: str = "function"
    function: CalledFunction


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tokens of a choice."""

    content: tuple[Logprob, ...]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A whole message."""

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCallEntry, ...] = ()


class MessageDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bit of one; the last has nothing."""

    role: str = ""
    content: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallEntry, ...] = ()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The one answer."""

    index: int
    message: Message
    finish_reason: str | None
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A bit of the one answer."""

    index: int
    delta: MessageDelta
    finish_reason: str | None
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The one continuation, or a bit of it."""

    text: str
    index: int
    finish_reason: str | None
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: tuple[Choice, ...]
    usage: TokenUsage
    omx_moved: int | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a streamed answer."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: tuple[ChunkChoice, ...]
    usage: TokenUsage | msgspec.UnsetType = msgspec.UNSET
    omx_moved: int | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole continuation."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: tuple[TextChoice, ...]
    usage: TokenUsage
    omx_moved: int | msgspec.UnsetType = msgspec.UNSET


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a streamed continuation; its fields have another order than a chat's."""

    id: str
    object: str = "text_completion"
    created: int
    choices: tuple[TextChoice, ...]
    model: str
    system_fingerprint: str = FINGERPRINT
    usage: TokenUsage | msgspec.UnsetType = msgspec.UNSET
    omx_moved: int | msgspec.UnsetType = msgspec.UNSET


class EmbeddingEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One vector."""

    object: str = "embedding"
    embedding: tuple[float, ...] | str
    index: int


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What embedding took."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """All vectors."""

    object: str = "list"
    data: tuple[EmbeddingEntry, ...]
    model: str
    usage: EmbeddingUsage


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be asked."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models; null where there is none, as Go writes a nil slice."""

    object: str = "list"
    data: tuple[ModelEntry, ...] | None


def now_s() -> int:
    """Unix seconds."""
    return int(datetime.now(UTC).timestamp())


def envelope(error: Exception) -> tuple[int, ErrorEnvelope]:
    """Status and body for an error."""
    status, text = status_and_text(error)
    kind = _ERROR_TYPES.get(status, "api_error")
    return status, ErrorEnvelope(error=ErrorFacts(message=text, type=kind))


def openai_refusal(error: Exception) -> Response:
    """An error that is found in the body."""
    status, body = envelope(error)
    return whole_response(go_json.encode(body), JSON, status, retry_after(error))


def inner_refusal(error: Exception) -> Response:
    """An error that Ollama's own endpoint would have found."""
    status, body = envelope(error)
    return whole_response(go_json.encode(body) + b"\n", ENCODED_JSON, status, retry_after(error))


def _encoded(value: Any, headers: Sequence[Header] = ()) -> Response:
    return whole_response(go_json.encode(value) + b"\n", ENCODED_JSON, 200, headers)


class OpenAIRoutes:
    """Every endpoint reads a body, asks the swarm, and answers as Ollama's OpenAI layer does."""

    def __init__(self, inference: ServedInference) -> None:
        self._inference = inference

    async def chat_completions(self, request: Request) -> StreamedAnswer | CollectedAnswer:
        """Answer a conversation."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, bodies.parse_chat_completion)
        shape = ChatCompletionShape(wanted, wants_usage=body.wants_usage)
        return answering(self._inference, wanted, asking, shape, stream=bool(body.stream))

    async def completions(self, request: Request) -> StreamedAnswer | CollectedAnswer:
        """Continue a prompt."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, bodies.parse_completion)
        shape = CompletionShape(wanted, wants_usage=body.wants_usage)
        return answering(self._inference, wanted, asking, shape, stream=bool(body.stream))

    async def responses(self, request: Request) -> StreamedAnswer | CollectedAnswer:
        """Answer in the form of OpenAI's Responses."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, parse_responses)
        shape = ResponsesShape(body, refused=inner_refusal)
        return answering(self._inference, wanted, asking, shape, stream=bool(body.stream))

    async def embeddings(self, request: Request) -> Response:
        """Give a vector for each text."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, bodies.parse_embedding)
        try:
            found, server = await self._inference.embed(wanted, asking.call)
        except Exception as error:  # noqa: BLE001 - the border
            return inner_refusal(worded_for_embed(error))
        in_base64 = (body.encoding_format or "").lower() == "base64"
        vectors = found.vectors if in_base64 else await written_vectors(found.vectors)
        answer = EmbeddingList(
            data=tuple(
                EmbeddingEntry(embedding=_in_base64(each) if in_base64 else each, index=index)
                for index, each in enumerate(vectors)
            ),
            model=wanted.model,
            usage=EmbeddingUsage(
                prompt_tokens=found.prompt_tokens, total_tokens=found.prompt_tokens
            ),
        )
        return _encoded(answer, asking.headers(server))

    async def models(self, request: Request) -> Response:
        """What anybody in the swarm can run."""
        found = [_entry(each.model) for each in await self._inference.swarm_models()]
        return _encoded(ModelList(data=tuple(found) or None))

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["model"]
        for each in await self._inference.swarm_models():
            if _same_name(each.model.name, name):
                return _encoded(_entry(each.model, name))
        return inner_refusal(ModelNotFound(name))


def _same_name(known: str, asked: str) -> bool:
    try:
        return parse_model_name(known) == parse_model_name(asked)
    except BadName:
        return known == asked


def _entry(model: ServableModel, name: str = "") -> ModelEntry:
    try:
        owner = parse_model_name(model.name).namespace
    except BadName:  # an engine's own name
        owner = "library"
    return ModelEntry(id=name or model.name, created=int(model.modified_at), owned_by=owner)


def _in_base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


# -- shapes ------------------------------------------------------------------------------------


class _CompletionShape:
    """What chat completions and completions share."""

    content_type = EVENT_STREAM
    prefix = ""
    """Of the id."""

    def __init__(self, request: TextRequest, *, wants_usage: bool) -> None:
        self._model = request.model
        self._wants_usage = wants_usage
        self._id = f"{self.prefix}-{secrets.randbelow(999)}"
        self._created = now_s()

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def broken(self, error: Exception) -> bytes:
        """An error as an event, which OpenAI's clients raise; then the stream ends without [DONE].

        Ollama sends an empty delta here, and its clients take the answer for whole.
        """
        return _event(envelope(error)[1])

    def refusal(self, error: Exception) -> Response:
        """As from Ollama's own endpoint."""
        return inner_refusal(error)


class ChatCompletionShape(_CompletionShape):
    """/v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, request: TextRequest, *, wants_usage: bool) -> None:
        super().__init__(request, wants_usage=wants_usage)
        self._began = False
        self._called = False

    def delta(self, part: Delta) -> bytes:
        """An event; the first says who speaks."""
        delta = MessageDelta(
            role="" if self._began else "assistant",
            content=part.text,
            reasoning=part.thinking,
            tool_calls=tool_call_entries(part.tool_calls),
        )
        self._began = True
        self._called = self._called or bool(part.tool_calls)
        choice = ChunkChoice(
            index=0, delta=delta, finish_reason=None, logprobs=_logprobs(part.logprobs)
        )
        return _event(self._chunk((choice,)), floats=bool(part.logprobs))

    def finish(self, part: Finish, moved: int) -> bytes:
        """The reason in an event of its own, what it took in another, and the end."""
        empty = MessageDelta(role="" if self._began else "assistant")
        reason = "tool_calls" if self._called else part.reason
        data = _event(
            self._chunk((ChunkChoice(index=0, delta=empty, finish_reason=reason),), moved)
        )
        if self._wants_usage:
            data += _event(self._chunk((), usage=_usage(part.usage)))
        return data + DONE

    def _chunk(
        self,
        choices: tuple[ChunkChoice, ...],
        moved: int = 0,
        usage: TokenUsage | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            omx_moved=moved or msgspec.UNSET,
        )

    def whole(self, answer: WholeAnswer, headers: list[Header]) -> Response:
        """One object."""
        message = Message(
            role="assistant",
            content=answer.text,
            reasoning=answer.thinking,
            tool_calls=tool_call_entries(answer.tool_calls),
        )
        reason = "tool_calls" if answer.tool_calls else answer.finish.reason
        completion = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=(
                Choice(
                    index=0,
                    message=message,
                    finish_reason=reason or None,
                    logprobs=_logprobs(answer.logprobs),
                ),
            ),
            usage=_usage(answer.usage),
            omx_moved=answer.moved or msgspec.UNSET,
        )
        return _encoded(completion, headers)


class CompletionShape(_CompletionShape):
    """/v1/completions."""

    prefix = "cmpl"

    def delta(self, part: Delta) -> bytes:
        """An event."""
        choice = TextChoice(
            text=part.text, index=0, finish_reason=None, logprobs=_logprobs(part.logprobs)
        )
        return _event(self._chunk((choice,)), floats=bool(part.logprobs))

    def finish(self, part: Finish, moved: int) -> bytes:
        """The reason, what it took, and the end."""
        choice = TextChoice(text="", index=0, finish_reason=part.reason)
        data = _event(self._chunk((choice,), moved))
        if self._wants_usage:
            data += _event(self._chunk((), usage=_usage(part.usage)))
        return data + DONE

    def _chunk(
        self,
        choices: tuple[TextChoice, ...],
        moved: int = 0,
        usage: TokenUsage | msgspec.UnsetType = msgspec.UNSET,
    ) -> CompletionChunk:
        if self._wants_usage and usage is msgspec.UNSET:
            usage = _usage(Usage())  # Ollama tells zeros in every event here, but not in a chat
        return CompletionChunk(
            id=self._id,
            created=self._created,
            choices=choices,
            model=self._model,
            usage=usage,
            omx_moved=moved or msgspec.UNSET,
        )

    def whole(self, answer: WholeAnswer, headers: list[Header]) -> Response:
        """One object."""
        choice = TextChoice(
            text=answer.text,
            index=0,
            finish_reason=answer.finish.reason or None,
            logprobs=_logprobs(answer.logprobs),
        )
        completion = Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=(choice,),
            usage=_usage(answer.usage),
            omx_moved=answer.moved or msgspec.UNSET,
        )
        return _encoded(completion, headers)


def _event(value: Any, *, floats: bool = False) -> bytes:
    return b"data: " + go_json.encode(value, floats=floats) + b"\n\n"


def _usage(usage: Usage) -> TokenUsage:
    return TokenUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _logprobs(found: Sequence[Logprob]) -> Logprobs | msgspec.UnsetType:
    return Logprobs(content=tuple(found)) if found else msgspec.UNSET


def tool_call_entries(calls: Sequence[ToolCall]) -> tuple[ToolCallEntry, ...]:
    """Tool calls as OpenAI writes them."""
    return tuple(
        ToolCallEntry(
            id=tool_call_id(call),
            index=call.index,
            function=CalledFunction(
                name=call.name, arguments=go_json.encode(call.arguments).decode()
            ),
        )
        for call in calls
    )

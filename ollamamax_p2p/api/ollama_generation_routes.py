"""Ollama's endpoints that run models: generate, chat, embed, embeddings, ps."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response

from ollamamax_p2p.api import go_json
from ollamamax_p2p.api import ollama_requests as bodies
from ollamamax_p2p.api.answering import (
    Asking,
    CollectedAnswer,
    StreamedAnswer,
    WholeAnswer,
    answering,
    tool_call_id,
)
from ollamamax_p2p.api.ollama_framing import (
    NDJSON,
    STREAM_ERROR_JSON,
    Header,
    StatusError,
    answer_error,
    json_response,
    read_parsed,
    status_and_text,
)
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadName,
    ModelNotFound,
    first_named,
)
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.inference.core.requests import (
    Delta,
    Embeddings,
    EmbedRequest,
    Finish,
    Logprob,
    TextRequest,
    ToolCall,
)
from ollamamax_p2p.router import RunningModel, Server

THREAD_NUMBERS = 4_096
"""Vectors with more numbers are written in a thread: each takes some 2 µs."""

FAR_AHEAD_S = 2**63 / 1e9
"""What Ollama adds to now for a model that stays: Go's longest duration, some 292 years."""


class CalledFunctionLine(msgspec.Struct, frozen=True, kw_only=True):
    """In the order of Ollama's struct, as all of these."""

    index: int
    name: str
    arguments: dict[str, Any]


class ToolCallLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call in an answer."""

    id: str = ""
    function: CalledFunctionLine


class TopLogprobLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()


class LogprobLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token that came."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top_logprobs: tuple[TopLogprobLine, ...] = ()


class MessageLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The assistant's message, or a bit of it."""

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCallLine, ...] = ()


class GenerateLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of /api/generate."""

    model: str
    created_at: str
    response: str
    thinking: str = ""
    done: bool
    done_reason: str = ""
    context: tuple[int, ...] = ()
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    tool_calls: tuple[ToolCallLine, ...] = ()
    logprobs: tuple[LogprobLine, ...] = ()
    omx_moved: int = 0
    """Ours: how often the answer went over to another back end."""


class ChatLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of /api/chat."""

    model: str
    created_at: str
    message: MessageLine
    done: bool
    done_reason: str = ""
    logprobs: tuple[LogprobLine, ...] = ()
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    omx_moved: int = 0


class EmbedAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of /api/embed."""

    model: str
    embeddings: tuple[tuple[float, ...], ...]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class EmbeddingsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /api/embeddings."""

    embedding: tuple[float, ...]


class DetailsLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model is, in short."""

    parent_model: str
    format: str
    family: str
    families: tuple[str, ...] | None
    parameter_size: str
    quantization_level: str
    context_length: int = 0
    embedding_length: int = 0


class RunningLine(msgspec.Struct, frozen=True, kw_only=True):
    """A model in memory."""

    name: str
    model: str
    size: int
    digest: str
    """Without `sha256:`."""
    details: DetailsLine
    expires_at: str
    size_vram: int
    context_length: int
    omx_node: str
    """Ours: whose memory."""
    omx_backend: str


class RunningAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /api/ps."""

    models: list[RunningLine]


def now_text(later_s: float = 0.0) -> str:
    """Now as Go writes a time in UTC: RFC 3339, as many digits as needed."""
    now = datetime.now(UTC)
    if later_s:
        now = datetime.fromtimestamp(now.timestamp() + later_s, UTC)
    return time_text(now)


def time_text(moment: datetime) -> str:
    """A moment as Go writes it."""
    text = moment.isoformat().removesuffix("+00:00")
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}Z"


class OllamaGenerationRoutes:
    """Every endpoint reads a body, asks the swarm, and answers as Ollama does."""

    def __init__(self, inference: ServedInference) -> None:
        self._inference = inference

    async def generate(self, request: Request) -> Response | StreamedAnswer | CollectedAnswer:
        """Continue a prompt. An empty one loads the model, or unloads it with `keep_alive` 0."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, bodies.parse_generate)
        shape = GenerateShape(wanted, streams=body.streams)
        if not wanted.prompt:
            return await self._only_load(wanted, asking, shape, unload=body.unloads)
        return answering(self._inference, wanted, asking, shape, stream=body.streams)

    async def chat(self, request: Request) -> Response | StreamedAnswer | CollectedAnswer:
        """Answer a conversation. An empty one loads the model; with `keep_alive` 0, unloads it."""
        asking = Asking(request.headers)
        body, wanted = await read_parsed(request, bodies.parse_chat)
        shape = ChatShape(wanted, streams=body.streams)
        if not wanted.messages:
            return await self._only_load(wanted, asking, shape, unload=body.unloads)
        return answering(self._inference, wanted, asking, shape, stream=body.streams)

    async def _only_load(
        self, wanted: TextRequest, asking: Asking, shape: "OllamaShape", *, unload: bool
    ) -> Response:
        try:
            done, server = await load_or_unload(self._inference, wanted, asking, unload=unload)
        except Exception as error:  # noqa: BLE001 - the border
            return shape.refusal(error)
        headers = asking.headers(server) if server else []
        return json_response(shape.last(done), headers=headers)

    async def embed(self, request: Request) -> Response:
        """Give a vector of length 1 for each text."""
        asking = Asking(request.headers)
        wanted = await read_parsed(request, bodies.parse_embed)
        if not wanted.inputs:
            return await self._load_for_embedding(
                wanted, asking, EmbedAnswer(model=wanted.model, embeddings=())
            )
        try:
            found, server = await self._inference.embed(wanted, asking.call)
        except Exception as error:  # noqa: BLE001 - the border
            return embed_refusal(error)
        answer = await embed_answer(wanted, found)
        return json_response(answer, headers=asking.headers(server))

    async def embeddings(self, request: Request) -> Response:
        """Give the vector of one text; the older endpoint."""
        asking = Asking(request.headers)
        wanted = await read_parsed(request, bodies.parse_embeddings)
        if not wanted.inputs:
            return await self._load_for_embedding(wanted, asking, EmbeddingsAnswer(embedding=()))
        try:
            found, server = await self._inference.embed(wanted, asking.call)
        except Exception as error:  # noqa: BLE001 - the border
            return embed_refusal(error)
        vectors = await written_vectors(found.vectors)
        answer = EmbeddingsAnswer(embedding=vectors[0])
        return json_response(answer, headers=asking.headers(server))

    async def _load_for_embedding(
        self, wanted: EmbedRequest, asking: Asking, answer: EmbedAnswer | EmbeddingsAnswer
    ) -> Response:
        try:
            server = await self._inference.load(
                wanted.model, asking.call, keep_alive_s=wanted.keep_alive_s, options=wanted.options
            )
        except Exception as error:  # noqa: BLE001 - the border
            return embed_refusal(error)
        return json_response(answer, headers=asking.headers(server))

    async def ps(self, request: Request) -> Response:
        """What is in memory on any node, the one that stays longest first."""
        running = await self._inference.running_models()
        known = {each.model.name: each.model for each in await self._inference.swarm_models()}
        lines = [_running(each, known.get(each.model.name)) for each in running]
        return json_response(RunningAnswer(models=lines))


async def load_or_unload(
    inference: ServedInference, wanted: TextRequest, asking: Asking, *, unload: bool
) -> tuple[Finish, Server | None]:
    """What a request does that asks for nothing, and where."""
    if unload:
        await inference.unload(wanted.model)
        return Finish(reason="unload"), None
    server = await inference.load(
        wanted.model, asking.call, keep_alive_s=wanted.keep_alive_s, options=wanted.options
    )
    return Finish(reason="load"), server


def embed_refusal(error: Exception) -> Response:
    """An error of embed or embeddings."""
    return answer_error(worded_for_embed(error))


def worded_for_embed(error: Exception) -> Exception:
    """The error, in the words that embedding has of its own."""
    named = first_named(error)
    if isinstance(named, ModelNotFound):
        return StatusError(404, f'model "{named.name}" not found, try pulling it first')
    return error


async def embed_answer(wanted: EmbedRequest, found: Embeddings) -> EmbedAnswer:
    """What /api/embed answers."""
    return EmbedAnswer(
        model=wanted.model,
        embeddings=await written_vectors(found.vectors),
        total_duration=found.total_ns,
        load_duration=found.load_ns,
        prompt_eval_count=found.prompt_tokens,
    )


async def written_vectors(vectors: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """In float32, as Go has them."""
    if sum(map(len, vectors)) > THREAD_NUMBERS:
        return await trio.to_thread.run_sync(_written_vectors, vectors)
    return _written_vectors(vectors)


def _written_vectors(vectors: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(go_json.float32, vector)) for vector in vectors)


def _running(running: RunningModel, known: ServableModel | None) -> RunningLine:
    model, server = running.model, running.server
    if model.expires_at is None:
        expires_at = now_text(FAR_AHEAD_S)
    else:
        expires_at = time_text(datetime.fromtimestamp(model.expires_at, UTC))
    return RunningLine(
        name=model.name,
        model=model.name,
        size=model.size,
        digest=model.digest.removeprefix("sha256:"),
        details=details_of(known or ServableModel(name=model.name)),
        expires_at=expires_at,
        size_vram=model.size_vram,
        context_length=model.context_length,
        omx_node=server.node,
        omx_backend=server.backend,
    )


def details_of(model: ServableModel) -> DetailsLine:
    """What a model is, in short."""
    return DetailsLine(
        parent_model="",
        format=model.format,
        family=model.family,
        families=(model.family,) if model.family else None,
        parameter_size=model.parameter_size,
        quantization_level=model.quantization,
        context_length=model.context_length,
        embedding_length=model.embedding_length,
    )


# -- shapes ------------------------------------------------------------------------------------


class OllamaShape:
    """Lines of NDJSON; a whole answer is one such object."""

    content_type = NDJSON.encode()

    def __init__(self, request: TextRequest, *, streams: bool = True) -> None:
        self._model = request.model
        self._streams = streams

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def line(self, part: Delta) -> msgspec.Struct:
        """A part as a value."""
        raise NotImplementedError

    def last(self, part: Finish, whole: WholeAnswer | None = None) -> msgspec.Struct:
        """The end as a value; with all that came before where it was not streamed."""
        raise NotImplementedError

    def delta(self, part: Delta) -> bytes:
        """A line."""
        floats = bool(part.logprobs or part.tool_calls)
        return go_json.encode(self.line(part), floats=floats) + b"\n"

    def finish(self, part: Finish, moved: int) -> bytes:
        """The last line."""
        last = self.last(part, WholeAnswer(moved=moved))
        return go_json.encode(last, floats=False) + b"\n"

    def broken(self, error: Exception) -> bytes:
        """An error as the last line."""
        return go_json.encode({"error": status_and_text(error)[1]}) + b"\n"

    def whole(self, answer: WholeAnswer, headers: list[Header]) -> Response:
        """One object."""
        return json_response(self.last(answer.finish, answer), headers=headers)

    def refusal(self, error: Exception) -> Response:
        """An engine's own fault is what Ollama finds on the stream only; the rest, before."""
        response = answer_error(self.worded(error))
        if self._streams and isinstance(first_named(error), BackendFailed | BackendUnavailable):
            response.headers["content-type"] = STREAM_ERROR_JSON
        return response

    def worded(self, error: Exception) -> Exception:
        """The error, in this endpoint's own words where it has some."""
        return error


class GenerateShape(OllamaShape):
    """/api/generate."""

    def line(self, part: Delta) -> GenerateLine:
        """A part as a value."""
        return GenerateLine(
            model=self._model,
            created_at=now_text(),
            response=part.text,
            thinking=part.thinking,
            done=False,
            tool_calls=_tool_calls(part.tool_calls) if part.tool_calls else (),
            logprobs=_logprobs(part.logprobs) if part.logprobs else (),
        )

    def last(self, part: Finish, whole: WholeAnswer | None = None) -> GenerateLine:
        """The end as a value."""
        whole = whole or WholeAnswer()
        usage = part.usage
        return GenerateLine(
            model=self._model,
            created_at=now_text(),
            response=whole.text,
            thinking=whole.thinking,
            done=True,
            done_reason=part.reason,
            context=part.context,
            total_duration=usage.total_ns,
            load_duration=usage.load_ns,
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=usage.prompt_ns,
            eval_count=usage.completion_tokens,
            eval_duration=usage.completion_ns,
            tool_calls=_tool_calls(whole.tool_calls),
            logprobs=_logprobs(whole.logprobs),
            omx_moved=whole.moved,
        )

    def worded(self, error: Exception) -> Exception:
        """A name that cannot be one is not found either."""
        if isinstance(first_named(error), BadName):
            return StatusError(404, f"model '{self._model}' not found")
        return error


class ChatShape(OllamaShape):
    """/api/chat."""

    def line(self, part: Delta) -> ChatLine:
        """A part as a value."""
        return ChatLine(
            model=self._model,
            created_at=now_text(),
            message=MessageLine(
                role="assistant",
                content=part.text,
                thinking=part.thinking,
                tool_calls=_tool_calls(part.tool_calls) if part.tool_calls else (),
            ),
            done=False,
            logprobs=_logprobs(part.logprobs) if part.logprobs else (),
        )

    def last(self, part: Finish, whole: WholeAnswer | None = None) -> ChatLine:
        """The end as a value."""
        whole = whole or WholeAnswer()
        usage = part.usage
        return ChatLine(
            model=self._model,
            created_at=now_text(),
            message=MessageLine(
                role="assistant",
                content=whole.text,
                thinking=whole.thinking,
                tool_calls=_tool_calls(whole.tool_calls),
            ),
            done=True,
            done_reason=part.reason,
            logprobs=_logprobs(whole.logprobs),
            total_duration=usage.total_ns,
            load_duration=usage.load_ns,
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=usage.prompt_ns,
            eval_count=usage.completion_tokens,
            eval_duration=usage.completion_ns,
            omx_moved=whole.moved,
        )

    def worded(self, error: Exception) -> Exception:
        """What is no name is as good as none."""
        return bodies.model_is_required() if isinstance(first_named(error), BadName) else error


def _tool_calls(calls: Sequence[ToolCall]) -> tuple[ToolCallLine, ...]:
    return tuple(
        ToolCallLine(
            id=tool_call_id(call),
            function=CalledFunctionLine(index=call.index, name=call.name, arguments=call.arguments),
        )
        for call in calls
    )


def _logprobs(logprobs: Sequence[Logprob]) -> tuple[LogprobLine, ...]:
    return tuple(
        LogprobLine(
            token=each.token,
            logprob=each.logprob,
            bytes=each.bytes,
            top_logprobs=tuple(
                TopLogprobLine(token=top.token, logprob=top.logprob, bytes=top.bytes)
                for top in each.top_logprobs
            ),
        )
        for each in logprobs
    )

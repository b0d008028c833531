"""OpenAIBackend: a server that speaks OpenAI's HTTP: vLLM, SGLang, llama-server, LM Studio.

What such a server cannot be asked: which models are in memory, and to load or unload one; so all
that it lists counts as loaded, and `load` only asks whether it is there. Templates and contexts of
one's own are refused; options that OpenAI lacks are left out, except those that all four take.

An answer that broke off goes on where the prompt is known: a raw one on any of them, a chat on
llama-server, which renders it for us. Elsewhere a chat cannot: their templates may trim the text so
far, and the seam would lose a character.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import trio
from msgspec import Meta

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    CannotResume,
    ContextExceeded,
    ModelNotFound,
    OmxError,
)
from ollamamax_p2p.inference.backend import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.lines import event_data
from ollamamax_p2p.inference.core.openai_chat import (
    AnswerChunk,
    AnswerChunks,
    openai_messages,
    openai_options,
    response_format,
)
from ollamamax_p2p.inference.core.requests import (
    INPUTS_MAX,
    ChatMessage,
    ChatRequest,
    Count,
    Delta,
    Embeddings,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Options,
    Part,
    Resume,
    TextRequest,
    Usage,
)
from ollamamax_p2p.inference.core.vectors import shortened
from ollamamax_p2p.inference.http_client import (
    HttpClient,
    Reply,
    decode_json,
    host_and_port,
    open_http_client,
)
from ollamamax_p2p.inference.settings import InferenceSettings, OpenAIServer

ASK_TIMEOUT_S = 10.0
ERROR_BYTES_MAX = 64 * 1024
CAPABILITIES = ("completion", "tools", "embedding")
"""Of a model whose server does not say: what it cannot, it refuses itself."""
LLAMA_SERVER = "llamacpp"
"""What llama-server gives as the owner of its models."""

T = TypeVar("T")


class _Listed(msgspec.Struct, frozen=True):
    id: Annotated[str, Meta(max_length=400)]
    owned_by: str | None = None
    created: float | None = None
    max_model_len: Count | None = None


class _Models(msgspec.Struct, frozen=True):
    data: Annotated[tuple[_Listed, ...], Meta(max_length=100_000)] | None = None


class _Vector(msgspec.Struct, frozen=True):
    embedding: tuple[float, ...]
    index: Annotated[int, Meta(ge=0, lt=INPUTS_MAX)] = 0


class _EmbedUsage(msgspec.Struct, frozen=True):
    prompt_tokens: Count = 0


class _Vectors(msgspec.Struct, frozen=True):
    data: Annotated[tuple[_Vector, ...], Meta(max_length=INPUTS_MAX)]
    usage: _EmbedUsage | None = None


class OpenAIBackend:
    """Made by `open_openai`."""

    def __init__(
        self, http: HttpClient, root: HttpClient, server: OpenAIServer, settings: InferenceSettings
    ) -> None:
        """root: the same server without the version in its path."""
        self._http, self._root, self._server, self._settings = http, root, server, settings
        self._owners: dict[str, str] = {}
        """Of the models that it listed last."""
        self._busy: dict[str, int] = {}

    @property
    def name(self) -> str:
        """See Backend."""
        return _name(self._server)

    @property
    def slots(self) -> int:
        """See Backend."""
        return self._server.slots

    async def models(self) -> tuple[ServableModel, ...]:
        """See Backend."""
        reply = await self._http.ask("GET", "/models", timeout_s=ASK_TIMEOUT_S)
        listed = self._converted(self._told(reply, ""), _Models).data or ()
        self._owners = {model.id: model.owned_by or "" for model in listed}
        return tuple(
            ServableModel(
                name=model.id,
                modified_at=model.created or 0.0,
                capabilities=CAPABILITIES,
                can_resume=model.owned_by == LLAMA_SERVER,
                context_length=model.max_model_len or 0,
            )
            for model in listed
        )

    async def loaded(self) -> tuple[LoadedModel, ...]:
        """See Backend: whatever it lists. `busy` counts our own requests."""
        return tuple(
            LoadedModel(
                name=model.name,
                context_length=model.context_length,
                slots=self.slots,
                busy=self._busy.get(model.name, 0),
            )
            for model in await self.models()
        )

    async def check(self) -> None:
        """See Backend."""
        await self.models()

    async def load(
        self, model: str, *, keep_alive_s: float | None = None, options: Options | None = None
    ) -> None:
        """See Backend: it only asks whether the model is there."""
        await self._id_of(model)

    async def unload(self, model: str) -> None:
        """See Backend: such a server keeps its models."""
        await self._id_of(model)

    @asynccontextmanager
    async def answer(self, request: TextRequest) -> AsyncIterator[AsyncIterator[Part]]:
        """See Backend."""
        model = await self._id_of(request.model)
        self._busy[model] = self._busy.get(model, 0) + 1
        try:
            async with aclosing(self._parts(request, model)) as parts:
                yield parts
        finally:
            self._busy[model] -= 1
            if not self._busy[model]:
                del self._busy[model]

    async def _parts(self, request: TextRequest, model: str) -> AsyncGenerator[Part, None]:
        path, body = await self._asked(request, model)
        earlier = request.resume.completion_tokens if request.resume else 0
        began = trio.current_time()
        if body.get("max_tokens") == 0:
            yield Finish(reason="length", usage=Usage(completion_tokens=earlier))
            return
        first: float | None = None
        answer = AnswerChunks()
        stream = self._http.stream(
            "POST", path, body, begin_timeout_s=self._settings.load_timeout_s
        )
        try:
            async with stream as reply:
                if reply.status != 200:
                    raise await self._error(reply.status, reply.lines, request.model)
                async for line in reply.lines:
                    data = event_data(line)
                    if data == b"[DONE]":
                        break
                    if data is None:
                        continue
                    chunk = self._read(data, AnswerChunk)
                    if chunk.error:
                        raise self._failure(500, _message_of(chunk.error), request.model)
                    delta = answer.feed(chunk)
                    if delta is not None:
                        first = first or trio.current_time()
                        yield delta
            calls = answer.tool_calls()
        except ValueError as error:
            raise BackendFailed(self.name, str(error)) from None
        if not answer.reason:
            raise BackendUnavailable(self.name, "the server ended in the midst of an answer")
        if calls:
            yield Delta(tool_calls=calls)
        now = trio.current_time()
        first = first or now
        usage = answer.usage
        yield Finish(
            reason=answer.reason,
            usage=Usage(
                prompt_tokens=max(0, usage.prompt_tokens - earlier) if usage else 0,
                completion_tokens=earlier
                + (usage.completion_tokens if usage else answer.delta_count),
                prompt_ns=int((first - began) * 1e9),
                completion_ns=int((now - first) * 1e9),
                total_ns=int((now - began) * 1e9),
            ),
        )

    async def _asked(self, request: TextRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Path and body of what the server is asked."""
        resume = request.resume or Resume()
        body: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **openai_options(request.options),
            **response_format(request),
        }
        if "max_tokens" in body:
            body["max_tokens"] = max(0, body["max_tokens"] - resume.completion_tokens)
        if isinstance(request, GenerateRequest) and (request.template or request.context):
            raise BadRequest(f"back end {self.name} takes neither `template` nor `context`")
        if resume != Resume():
            prompt = await self._prompt_to_resume(request, model, resume)
            return "/completions", body | {"prompt": prompt + resume.text} | _completion(request)
        if isinstance(request, GenerateRequest) and (request.raw or request.suffix):
            suffix = {"suffix": request.suffix} if request.suffix else {}
            return "/completions", body | {"prompt": request.prompt} | suffix | _completion(request)
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if isinstance(request, ChatRequest) and request.tools:
            body["tools"] = list(request.tools)
        body |= _thinking(request)
        return "/chat/completions", body | {"messages": openai_messages(_messages(request))}

    async def _prompt_to_resume(self, request: TextRequest, model: str, resume: Resume) -> str:
        if request.format or (isinstance(request, ChatRequest) and request.tools):
            raise CannotResume("tools and JSON cannot be gone on with from their midst")
        if resume.thinking or (isinstance(request, GenerateRequest) and request.suffix):
            raise CannotResume("thinking, or text for a gap, cannot be gone on with here")
        if isinstance(request, GenerateRequest) and request.raw:
            return request.prompt
        if self._owners.get(model) != LLAMA_SERVER:
            raise CannotResume(f"back end {self.name} cannot go on with a chat")
        body = {"messages": openai_messages(_messages(request))} | _thinking(request)
        reply = await self._root.ask("POST", "/apply-template", body, timeout_s=ASK_TIMEOUT_S)
        prompt = self._told(reply, model).get("prompt")
        if not isinstance(prompt, str):
            raise CannotResume(f"back end {self.name} does not tell its prompts")
        return prompt

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """See Backend."""
        model = await self._id_of(request.model)
        began = trio.current_time()
        reply = await self._http.ask(
            "POST",
            "/embeddings",
            {"model": model, "input": list(request.inputs)},
            timeout_s=self._settings.load_timeout_s,
        )
        told = self._converted(self._told(reply, request.model), _Vectors)
        if sorted(row.index for row in told.data) != list(range(len(request.inputs))):
            raise BackendFailed(self.name, "it gave other vectors than were asked for")
        rows = sorted(told.data, key=lambda row: row.index)
        return Embeddings(
            vectors=tuple(shortened(row.embedding, request.dimensions) for row in rows),
            prompt_tokens=told.usage.prompt_tokens if told.usage else 0,
            total_ns=int((trio.current_time() - began) * 1e9),
        )

    # -- what it tells -------------------------------------------------------------------------

    async def _id_of(self, model: str) -> str:
        """The model as the server calls it; llama-server would answer for any name."""
        if (found := _known(model, self._owners)) is None:
            await self.models()
            found = _known(model, self._owners)
        if found is None:
            raise ModelNotFound(model)
        return found

    def _told(self, reply: Reply, model: str) -> dict[str, Any]:
        try:
            read = reply.json()
        except ValueError:
            read = None
        if reply.status != 200:
            raise self._failure(reply.status, _error_text(read, reply.body), model)
        if not isinstance(read, dict):
            raise BackendFailed(self.name, "its answer is no JSON object")
        return read

    async def _error(self, status: int, lines: AsyncIterator[bytes], model: str) -> OmxError:
        body = bytearray()
        async for line in lines:
            body += line
            if len(body) > ERROR_BYTES_MAX:
                break
        try:
            read = decode_json(bytes(body))
        except ValueError:
            read = None
        return self._failure(status, _error_text(read, bytes(body)), model)

    def _failure(self, status: int, text: str, model: str) -> OmxError:
        """The server's error as ours."""
        if self._server.key:
            text = text.replace(self._server.key, "***")  # some repeat it
        if status == 404:
            return ModelNotFound(model)
        if status in (401, 403):
            return BackendUnavailable(self.name, "it refuses our key; check its `key` setting")
        if status in (400, 413, 422):
            long = "context length" in text or "context size" in text
            return ContextExceeded() if long else BadRequest(text)
        if status in (429, 503):
            return BackendUnavailable(self.name, text)
        return BackendFailed(self.name, f"{text} (HTTP {status})")

    def _read(self, data: bytes, kind: type[T]) -> T:
        try:
            return self._converted(decode_json(data), kind)
        except ValueError as error:
            self._unreadable(error)

    def _converted(self, read: object, kind: type[T]) -> T:
        try:
            return msgspec.convert(read, kind)
        except msgspec.ValidationError as error:
            self._unreadable(error)

    def _unreadable(self, error: Exception) -> NoReturn:
        raise BackendFailed(self.name, f"cannot read its answer: {error}") from None


@asynccontextmanager
async def open_openai(
    server: OpenAIServer, settings: InferenceSettings
) -> AsyncIterator[OpenAIBackend]:
    """A server for as long as the block is open; it need not run yet. Raises BadConfig."""
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    name, url = _name(server), server.url.rstrip("/")
    stall = settings.stall_timeout_s
    async with (
        open_http_client(name, url, headers=headers, stall_timeout_s=stall) as http,
        open_http_client(
            name, url.removesuffix("/v1"), headers=headers, stall_timeout_s=stall
        ) as root,
    ):
        yield OpenAIBackend(http, root, server, settings)


def _name(server: OpenAIServer) -> str:
    return server.name or host_and_port(server.url)


def _known(model: str, owners: dict[str, str]) -> str | None:
    plain = model.removesuffix(":latest")
    return next((name for name in (model, plain) if name in owners), None)


def _messages(request: TextRequest) -> list[ChatMessage]:
    if isinstance(request, ChatRequest):
        return list(request.messages)
    system = [ChatMessage(role="system", content=request.system)] if request.system else []
    return [*system, ChatMessage(role="user", content=request.prompt, images=request.images)]


def _completion(request: TextRequest) -> dict[str, Any]:
    """How a text completion asks for log-probabilities: by a number."""
    return {"logprobs": request.top_logprobs} if request.logprobs else {}


def _thinking(request: TextRequest) -> dict[str, Any]:
    if request.think is None:
        return {}
    fields: dict[str, Any] = {
        "chat_template_kwargs": {"enable_thinking": request.think is not False}
    }
    if isinstance(request.think, str):
        fields["reasoning_effort"] = request.think
    return fields


def _error_text(read: object, body: bytes) -> str:
    if isinstance(read, dict) and "error" in read:
        return _message_of(read["error"])
    if isinstance(read, dict) and isinstance(read.get("message"), str):
        return str(read["message"])[:500]
    return body[:200].decode(errors="replace") or "an empty answer"


def _message_of(error: object) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:500]

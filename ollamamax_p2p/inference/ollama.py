"""OllamaBackend: an Ollama server, on this machine or another; its models are not copied.

Requests go through with their fields as they are. An answer that broke off goes on as a raw prompt:
the server is asked what it would give the model (`_debug_render_only`), and the text so far follows
that. An Ollama that does not know this question (before 0.11.8 or so) would answer instead of
telling, so it is asked for one token at most, and then it cannot go on with a chat; a raw prompt
needs no question.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    CannotResume,
    ContextExceeded,
    ModelNotFound,
    NotSupported,
    OmxError,
)
from ollamamax_p2p.inference.backend import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.ollama_messages import (
    Line,
    Listed,
    Models,
    Shown,
    Vectors,
    guessed_capabilities,
    request_body,
)
from ollamamax_p2p.inference.core.requests import (
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
    open_http_client,
)
from ollamamax_p2p.inference.settings import InferenceSettings

NAME = "ollama"
DEFAULT_URL = "http://127.0.0.1:11434"
ASK_TIMEOUT_S = 10.0
"""For lists and the like, which cost an Ollama nothing."""
OWN_SERVER = "omx"
"""What our own nodes call themselves, also where they answer as an Ollama."""
RENDERS_FROM = (0, 11, 8)
FOREVER_S = 50 * 365 * 86_400.0
"""An Ollama tells "for ever" as a moment some centuries away."""

T = TypeVar("T")


class OllamaBackend:
    """Made by `open_ollama`."""

    def __init__(self, http: HttpClient, settings: InferenceSettings, *, maybe: bool) -> None:
        self._http, self._settings, self._maybe = http, settings, maybe
        self._busy: dict[str, int] = {}
        self._shown: dict[str, tuple[str, ...]] = {}
        """Capabilities by digest, where the list does not tell them."""
        self._renders: bool | None = None

    @property
    def name(self) -> str:
        """See Backend."""
        return NAME

    @property
    def slots(self) -> int:
        """See Backend."""
        return self._settings.ollama_slots

    async def models(self) -> tuple[ServableModel, ...]:
        """See Backend."""
        listed = await self._list("/api/tags")
        renders = bool(listed) and await self._can_render()
        return tuple(
            [await self._servable(model, renders) for model in listed if not model.remote_host]
        )

    async def loaded(self) -> tuple[LoadedModel, ...]:
        """See Backend. `busy` counts our own requests: an Ollama does not tell anybody's."""
        return tuple(
            LoadedModel(
                name=model.name[:400],
                digest=_digest(model.digest),
                size=model.size,
                size_vram=model.size_vram,
                context_length=model.context_length or model.details.context_length,
                expires_at=_expiry(model.expires_at),
                slots=self.slots,
                busy=self._busy.get(model.name, 0),
            )
            for model in await self._list("/api/ps")
        )

    async def check(self) -> None:
        """See Backend."""
        reply = await self._http.ask("GET", "/", timeout_s=ASK_TIMEOUT_S)
        if reply.server == OWN_SERVER:
            # A node of ours there would ask the swarm, and so us, for what we ask it for.
            raise BackendUnavailable(NAME, "what answers there is a node like this one")
        if reply.status != 200 or not reply.body.startswith(b"Ollama"):
            raise BackendUnavailable(NAME, "what answers there is no Ollama")

    @asynccontextmanager
    async def answer(self, request: TextRequest) -> AsyncIterator[AsyncIterator[Part]]:
        """See Backend."""
        name = _full(request.model)
        self._busy[name] = self._busy.get(name, 0) + 1
        try:
            async with aclosing(self._parts(request)) as parts:
                yield parts
        finally:
            self._busy[name] -= 1
            if not self._busy[name]:
                del self._busy[name]

    async def _parts(self, request: TextRequest) -> AsyncGenerator[Part, None]:
        resume = request.resume
        if resume is not None and resume != Resume():
            request = await self._continuation(request, resume)
            if request.options.num_predict == 0:
                # An Ollama takes 0 for no limit.
                usage = Usage(completion_tokens=resume.completion_tokens)
                yield Finish(reason="length", usage=usage)
                return
        path = "/api/generate" if isinstance(request, GenerateRequest) else "/api/chat"
        earlier = resume.completion_tokens if resume else 0
        # A model may have to be loaded before the head of the answer comes.
        stream = self._http.stream(
            "POST", path, request_body(request), begin_timeout_s=self._settings.load_timeout_s
        )
        async with stream as reply:
            if reply.status != 200:
                raise await self._error(reply.status, reply.lines, request.model)
            async for raw in reply.lines:
                line = _read(raw, Line)
                if line.error:
                    raise _failure(500, line.error, request.model)
                delta = line.delta()
                if delta is not None:
                    yield delta
                if line.done:
                    yield line.finish(earlier_tokens=earlier, prompt_tokens_less=earlier)
                    return
        raise BackendUnavailable(NAME, "the server ended in the midst of an answer")

    async def _continuation(self, request: TextRequest, resume: Resume) -> GenerateRequest:
        """The raw prompt that goes on from the text so far. Raises CannotResume."""
        if request.format or (not isinstance(request, GenerateRequest) and request.tools):
            raise CannotResume("tools and JSON cannot be gone on with from their midst")
        if resume.thinking:
            raise CannotResume("an Ollama cannot go on with thinking")
        if isinstance(request, GenerateRequest) and (request.suffix or request.context):
            raise CannotResume("text for a gap, or after a context, cannot be gone on with")
        raw = isinstance(request, GenerateRequest) and request.raw
        assert not raw or isinstance(request, GenerateRequest)
        prompt = request.prompt if raw else await self._rendered(request)  # type: ignore[union-attr]
        limit = request.options.num_predict
        if limit is not None and limit > 0:
            limit = max(0, limit - resume.completion_tokens)
        return GenerateRequest(
            model=request.model,
            prompt=prompt + resume.text,
            raw=True,
            options=msgspec.structs.replace(request.options, num_predict=limit),
            keep_alive_s=request.keep_alive_s,
            truncate=request.truncate,
            shift=request.shift,
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
        )

    async def _rendered(self, request: TextRequest) -> str:
        plain = msgspec.structs.replace(request, resume=None)
        body = request_body(plain) | {"_debug_render_only": True, "stream": False}
        body["options"] = body.get("options", {}) | {"num_predict": 1}
        path = "/api/generate" if isinstance(request, GenerateRequest) else "/api/chat"
        reply = await self._http.ask("POST", path, body, timeout_s=self._settings.load_timeout_s)
        told = self._told(reply, request.model).get("_debug_info")
        rendered = told.get("rendered_template") if isinstance(told, dict) else None
        self._renders = isinstance(rendered, str)
        if not isinstance(rendered, str):
            raise CannotResume("this Ollama does not tell its prompts (0.11.8 and later do)")
        return rendered

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """See Backend."""
        reply = await self._http.ask(
            "POST", "/api/embed", request_body(request), timeout_s=self._settings.load_timeout_s
        )
        told = _converted(self._told(reply, request.model), Vectors)
        if len(told.embeddings) != len(request.inputs):
            raise BackendFailed(NAME, "it gave another number of vectors than there are texts")
        return Embeddings(
            vectors=tuple(shortened(vector, request.dimensions) for vector in told.embeddings),
            prompt_tokens=told.prompt_eval_count,
            load_ns=told.load_duration,
            total_ns=told.total_duration,
        )

    async def load(
        self, model: str, *, keep_alive_s: float | None = None, options: Options | None = None
    ) -> None:
        """See Backend."""
        request = GenerateRequest(
            model=model, keep_alive_s=keep_alive_s, options=options or Options()
        )
        body = request_body(request) | {"stream": False}
        reply = await self._http.ask(
            "POST", "/api/generate", body, timeout_s=self._settings.load_timeout_s
        )
        self._told(reply, model)

    async def unload(self, model: str) -> None:
        """See Backend."""
        await self.load(model, keep_alive_s=0.0)

    # -- what it tells -------------------------------------------------------------------------

    async def _list(self, path: str) -> tuple[Listed, ...]:
        if self._maybe:
            try:
                await self.check()
            except (BackendUnavailable, BackendFailed):
                return ()
        reply = await self._http.ask("GET", path, timeout_s=ASK_TIMEOUT_S)
        return _converted(self._told(reply, ""), Models).models or ()

    async def _servable(self, model: Listed, renders: bool) -> ServableModel:
        capabilities = model.capabilities
        if capabilities is None:
            capabilities = await self._capabilities(model)
        return ServableModel(
            name=model.name[:400],
            digest=_digest(model.digest),
            size=model.size,
            modified_at=_unix(model.modified_at) or 0.0,
            capabilities=tuple(each[:64] for each in capabilities[:16]),
            can_resume=renders and "completion" in capabilities,
            context_length=model.details.context_length,
            embedding_length=model.details.embedding_length,
            format=model.details.format[:32],
            family=model.details.family[:64],
            parameter_size=model.details.parameter_size[:32],
            quantization=model.details.quantization_level[:32],
        )

    async def _capabilities(self, model: Listed) -> tuple[str, ...]:
        if model.digest not in self._shown:
            body = {"model": model.name}
            reply = await self._http.ask("POST", "/api/show", body, timeout_s=ASK_TIMEOUT_S)
            if reply.status != 200:
                return ("completion",)  # removed meanwhile, or damaged
            shown = _converted(self._told(reply, model.name), Shown)
            if len(self._shown) >= 10_000:
                self._shown.clear()
            self._shown[model.digest] = shown.capabilities or guessed_capabilities(shown)
        return self._shown[model.digest]

    async def _can_render(self) -> bool:
        """Whether it is new enough to tell its prompts; a build of one's own calls itself 0.0.0."""
        if self._renders is None:
            reply = await self._http.ask("GET", "/api/version", timeout_s=ASK_TIMEOUT_S)
            version = self._told(reply, "").get("version")
            numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version if isinstance(version, str) else "")
            self._renders = (
                numbers is not None and tuple(map(int, numbers.groups())) >= RENDERS_FROM
            )
        return self._renders

    def _told(self, reply: Reply, model: str) -> dict[str, Any]:
        try:
            read = reply.json()
        except ValueError:
            read = None
        if reply.status != 200:
            raise _failure(reply.status, _error_text(read, reply.body), model)
        if not isinstance(read, dict):
            raise BackendFailed(NAME, "its answer is no JSON object")
        return read

    async def _error(self, status: int, lines: AsyncIterator[bytes], model: str) -> OmxError:
        first = b""
        async for line in lines:
            first = line
            break
        try:
            read = decode_json(first)
        except ValueError:
            read = None
        return _failure(status, _error_text(read, first), model)


@asynccontextmanager
async def open_ollama(
    settings: InferenceSettings, url: str, *, maybe: bool = False
) -> AsyncIterator[OllamaBackend]:
    """An Ollama server for as long as the block is open; it need not run yet.

    maybe: nobody said that there is one; it has no models while there is none.
    Raises BadConfig.
    """
    async with open_http_client(NAME, url, stall_timeout_s=settings.stall_timeout_s) as http:
        yield OllamaBackend(http, settings, maybe=maybe)


def _read(raw: bytes, kind: type[T]) -> T:
    try:
        return _converted(decode_json(raw), kind)
    except ValueError as error:
        raise BackendFailed(NAME, f"cannot read its answer: {error}") from None


def _converted(read: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(read, kind)
    except msgspec.ValidationError as error:
        raise BackendFailed(NAME, f"cannot read its answer: {error}") from None


def _error_text(read: object, body: bytes) -> str:
    if isinstance(read, dict) and isinstance(read.get("error"), str):
        return str(read["error"])[:500]
    return body[:200].decode(errors="replace") or "an empty answer"


def _failure(status: int, text: str, model: str) -> OmxError:
    """Ollama's error as ours."""
    able = re.search(r"does not support (\w+)", text)
    if able:
        return NotSupported(model, able[1])
    if "exceeds the context length" in text:
        return ContextExceeded()
    if status == 404:
        return ModelNotFound(model)
    if status == 400:
        return BadRequest(text)
    if status in (429, 503):
        return BackendUnavailable(NAME, text)
    return BackendFailed(NAME, f"{text} (HTTP {status})")


def _full(model: str) -> str:
    """With the tag, as an Ollama lists it."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def _digest(told: str) -> str:
    return f"sha256:{told}" if re.fullmatch(r"[0-9a-f]{64}", told) else ""


def _unix(told: str) -> float | None:
    """A moment as Go writes it, with up to nine digits of a second; None if it is none."""
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", told)).timestamp()
    except (ValueError, OverflowError):
        return None


def _expiry(told: str) -> float | None:
    moment = _unix(told)
    far = moment is not None and moment > datetime.now().timestamp() + FOREVER_S  # noqa: DTZ005
    return None if far else moment

"""EmbeddedBackend: llama.cpp, in processes of its own, over the models of this node's store.

A prompt is rendered with the chat template inside the GGUF file (Jinja, by llama.cpp). A model's
TEMPLATE layer, which is written in Go's template language, is not run: Ollama derived those of its
library from the same Jinja, and what it adds (a special order of tools, say) is lost. A request
that brings a Go template of its own is refused. SYSTEM, MESSAGE and PARAMETER layers are honoured.

Two ways through llama.cpp's server:
- An answer without tools and pictures: rendered, tokenized, and given to /completion as token ids.
  Each delta carries its ids, and an answer that began elsewhere goes on from exactly those.
- Tools, pictures, and thinking that is not marked <think>…</think>: /v1/chat/completions, whose
  parser knows each model's format. It cannot go on from the midst.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from ollamamax_p2p.content import DiskStore
from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    CannotResume,
    ContextExceeded,
    NotSupported,
    OmxError,
)
from ollamamax_p2p.inference.backend import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.completion_pieces import (
    CompletionChunk,
    CompletionPieces,
    Piece,
    Timings,
)
from ollamamax_p2p.inference.core.engine_messages import EngineStart
from ollamamax_p2p.inference.core.lines import event_data
from ollamamax_p2p.inference.core.memory import needed_bytes
from ollamamax_p2p.inference.core.openai_chat import (
    AnswerChunk,
    AnswerChunks,
    openai_messages,
    response_format,
)
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    Embeddings,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Logprob,
    Options,
    Part,
    Resume,
    TextRequest,
    Usage,
)
from ollamamax_p2p.inference.core.sampling import merged, sampling_fields, tokens_left
from ollamamax_p2p.inference.core.thinking import OPENS, ThinkingSplitter
from ollamamax_p2p.inference.core.vectors import shortened
from ollamamax_p2p.inference.engine_pool import EngineKey, EnginePool, open_engine_pool
from ollamamax_p2p.inference.engine_process import EngineProcess
from ollamamax_p2p.inference.http_client import Reply, decode_json
from ollamamax_p2p.inference.settings import InferenceSettings
from ollamamax_p2p.inference.stored_models import EngineModel, StoredModels

log = logging.getLogger(__name__)

NAME = "embedded"
SMALL_TIMEOUT_S = 60.0
"""For a template or a tokenization: they wait behind a batch of somebody's prompt."""
MEMORY_SHARE = 0.75
"""Of this machine's memory, where the settings do not say: the system and the node need some."""
CONTEXT_STEP = 256
"""llama.cpp makes every slot's context a multiple of it."""

NO_JSON = "~"
SCHEMAS_KEPT = 256
"""As many as a client is likely to use; a hostile one only makes us try again."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What the engine is given to go on from."""

    tokens: list[int]
    """All of it."""
    resumed: int
    """How many of them, at the end, are of the answer already."""
    text_end: str
    """How the rendered text ends; it may open the thinking."""


class EmbeddedBackend:
    """Made by `open_embedded`."""

    def __init__(self, models: StoredModels, settings: InferenceSettings, pool: EnginePool) -> None:
        self._models, self._settings, self._pool = models, settings, pool

    @property
    def name(self) -> str:
        """See Backend."""
        return NAME

    @property
    def slots(self) -> int:
        """See Backend."""
        return self._settings.slots

    @property
    def memory_budget(self) -> int:
        """Bytes for all models together."""
        return self._pool.budget

    async def models(self) -> tuple[ServableModel, ...]:
        """See Backend."""
        return tuple(model.about for model in await self._models.all())

    async def loaded(self) -> tuple[LoadedModel, ...]:
        """See Backend."""
        now, unix_now = trio.current_time(), _unix_now()
        return tuple(
            LoadedModel(
                name=engine.name,
                digest=engine.key.digest,
                size=engine.size,
                context_length=engine.start.context,
                expires_at=None
                if engine.keep_alive_s < 0
                else unix_now + (engine.expires_at or now + engine.keep_alive_s) - now,
                slots=engine.start.slots,
                busy=engine.turns.borrowed_tokens,
                loading=engine.loading,
            )
            for engine in self._pool.engines
        )

    async def check(self) -> None:
        """Processes are started when they are needed: there is nothing to ask."""

    @asynccontextmanager
    async def answer(self, request: TextRequest) -> AsyncIterator[AsyncIterator[Part]]:
        """See Backend."""
        model = await self._models.named(request.model)
        _check_able(request, model)
        options = merged(request.options, model.parameters)
        if _only_loads(request):
            async with aclosing(self._load_only(request, model, options)) as parts:
                yield parts
            return
        began = trio.current_time()
        async with self._engine(model, options, request.keep_alive_s) as (engine, slots):
            load_ns = _ns(trio.current_time() - began)
            async with slots:
                answering = _Answering(engine, model, request, options, began, load_ns)
                async with aclosing(self._noting(answering.parts(), model)) as parts:
                    yield parts

    async def _noting(
        self, parts: AsyncGenerator[Part, None], model: EngineModel
    ) -> AsyncGenerator[Part, None]:
        async with aclosing(parts):
            async for part in parts:
                yield part
        self._pool.succeeded(EngineKey(model.about.digest, embeds=False))

    async def _load_only(
        self, request: TextRequest, model: EngineModel, options: Options
    ) -> AsyncGenerator[Part, None]:
        began = trio.current_time()
        if request.keep_alive_s == 0:
            self._pool.unload(model.about.digest)
            yield Finish(reason="unload")
            return
        async with self._engine(model, options, request.keep_alive_s):
            took = _ns(trio.current_time() - began)
        yield Finish(reason="load", usage=Usage(load_ns=took, total_ns=took))

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """See Backend. Any model gives vectors, as in Ollama; one that is made for text gives the
        vector of the last token.
        """
        model = await self._models.named(request.model)
        options = merged(request.options, model.parameters)
        began = trio.current_time()
        async with self._engine(model, options, request.keep_alive_s, embeds=True) as (
            engine,
            slots,
        ):
            load_ns = _ns(trio.current_time() - began)
            async with slots:
                inputs = [
                    await _input_tokens(
                        engine, text, request.truncate, self._context(model, options)
                    )
                    for text in request.inputs
                ]
                vectors = await self._vectors(engine, inputs, request.dimensions)
        self._pool.succeeded(EngineKey(model.about.digest, embeds=True))
        return Embeddings(
            vectors=vectors,
            prompt_tokens=sum(map(len, inputs)),
            load_ns=load_ns,
            total_ns=_ns(trio.current_time() - began),
        )

    async def _vectors(
        self, engine: EngineProcess, inputs: list[list[int]], dimensions: int
    ) -> tuple[tuple[float, ...], ...]:
        if not inputs:
            return ()
        reply = await engine.http.ask(
            "POST",
            "/v1/embeddings",
            {"input": inputs},
            timeout_s=self._settings.load_timeout_s,
        )
        told = _told(reply, "")
        try:
            rows = sorted(told["data"], key=lambda row: row["index"])
            vectors = msgspec.convert([row["embedding"] for row in rows], list[list[float]])
        except (KeyError, TypeError, msgspec.ValidationError):
            raise BackendFailed(NAME, "it gave no vectors") from None
        if len(vectors) != len(inputs):
            raise BackendFailed(NAME, "it gave another number of vectors than there are texts")
        return tuple(shortened(vector, dimensions) for vector in vectors)

    async def load(
        self, model: str, *, keep_alive_s: float | None = None, options: Options | None = None
    ) -> None:
        """See Backend."""
        found = await self._models.named(model)
        embeds = "completion" not in found.about.capabilities
        chosen = merged(options or Options(), found.parameters)
        async with self._engine(found, chosen, keep_alive_s, embeds=embeds):
            pass

    async def unload(self, model: str) -> None:
        """See Backend."""
        found = await self._models.named(model)
        self._pool.unload(found.about.digest)

    @asynccontextmanager
    async def _engine(
        self,
        model: EngineModel,
        options: Options,
        keep_alive_s: float | None,
        *,
        embeds: bool = False,
    ) -> AsyncIterator[tuple[EngineProcess, trio.CapacityLimiter]]:
        start = EngineStart(
            model=str(model.weights),
            projector=str(model.projector or ""),
            adapters=tuple(map(str, model.adapters)),
            socket="",
            embeds=embeds,
            pooling="last" if embeds and "completion" in model.about.capabilities else "",
            context=self._context(model, options),
            slots=self._settings.slots,
            batch=options.num_batch or self._settings.batch_tokens,
            threads=options.num_thread or self._settings.threads,
            gpu_layers=-1 if options.num_gpu is None else options.num_gpu,
            main_gpu=options.main_gpu or 0,
            use_mmap=options.use_mmap is not False,
        )
        needed = needed_bytes(
            model.header,
            model.file_bytes,
            context=start.context,
            slots=start.slots,
            batch=start.context if embeds else start.batch,
        )
        key = EngineKey(model.about.digest, embeds)
        async with self._pool.use(key, model.about.name, start, needed, keep_alive_s) as (
            engine,
            process,
        ):
            yield process, engine.turns

    def _context(self, model: EngineModel, options: Options) -> int:
        wanted = max(1, options.num_ctx or self._settings.context_length)
        wanted = min(wanted, model.context_length or wanted)
        return -(-wanted // CONTEXT_STEP) * CONTEXT_STEP


class _Answering:
    """One request on one engine."""

    def __init__(
        self,
        engine: EngineProcess,
        model: EngineModel,
        request: TextRequest,
        options: Options,
        began: float,
        load_ns: int,
    ) -> None:
        self._engine, self._model = engine, model
        self._request, self._options = request, options
        self._began, self._load_ns = began, load_ns
        self._resume = request.resume or Resume()

    async def parts(self) -> AsyncGenerator[Part, None]:
        chosen = self._infilled() if _is_infill(self._request) else None
        if chosen is None:
            chosen = self._parsed() if self._needs_parser() else self._completed()
        async with aclosing(chosen):
            async for part in chosen:
                yield part

    def _needs_parser(self) -> bool:
        request = self._request
        if isinstance(request, GenerateRequest):
            return bool(request.images) or (self._thinks() and not self._model.thinks_in_marks)
        return (
            bool(request.tools)
            or any(message.images for message in request.messages)
            or (self._thinks() and not self._model.thinks_in_marks)
        )

    def _thinks(self) -> bool:
        able = "thinking" in self._model.about.capabilities
        raw = isinstance(self._request, GenerateRequest) and self._request.raw
        return able and not raw and self._request.think is not False

    # -- by token ids --------------------------------------------------------------------------

    async def _completed(self) -> AsyncGenerator[Part, None]:
        request = self._request
        if self._resume != Resume() and request.format:
            raise CannotResume("JSON cannot be gone on with from its midst")
        if isinstance(request.format, dict):
            await self._check_schema(request.format)
        context = await self._context_of_slot()
        prompt = await self._prompt(context)
        left = tokens_left(self._options, self._resume.completion_tokens, context)
        if request.shift is False:
            left = min(left, context - len(prompt.tokens))
        if left <= 0:
            yield self._finish(prompt, [], CompletionChunk(stop_type="limit"))
            return
        splitter = self._splitter(prompt)
        body = sampling_fields(self._options) | {
            "prompt": prompt.tokens,
            "n_predict": left,
            "stream": True,
            "return_tokens": True,
            # Events while the prompt is read: writing them shows the engine that nobody listens.
            "return_progress": True,
            "cache_prompt": True,
            **_grammar(request),
        }
        if request.logprobs:
            body["n_probs"] = max(1, request.top_logprobs)
        pieces, tokens = CompletionPieces(), list[int]()
        held = _Held()
        last: CompletionChunk | None = None
        async with aclosing(self._events("/completion", body, CompletionChunk)) as chunks:
            async for chunk in chunks:
                if chunk.error:
                    raise _engine_error(chunk.error, request.model)
                piece = pieces.feed(chunk)
                if piece is not None:
                    ids = piece.tokens() or piece.tokens(await self._tokenized(piece.text))
                    tokens += ids or piece.known
                    delta = held.delta(piece, ids, splitter)
                    if delta is not None:
                        yield delta
                if chunk.stop:
                    last = chunk
        if last is None:
            raise BackendUnavailable(NAME, "the engine ended in the midst of an answer")
        if splitter is not None:
            rest = held.rest(*splitter.end())
            if rest is not None:
                yield rest
        yield self._finish(prompt, tokens, last)

    async def _check_schema(self, schema: dict[str, Any]) -> None:
        """Raises BadRequest for one that llama.cpp cannot keep an answer to: it only logs that, and
        answers freely. So it is tried once, with a character pressed on it that no JSON begins
        with.
        """
        tried, key = self._engine.schemas, msgspec.json.encode(schema)
        if key not in tried:
            (token, *_) = await self._tokens(NO_JSON, special=False)
            probe = {
                "prompt": [token],
                "n_predict": 1,
                "temperature": 0.0,
                "logit_bias": [[token, 1_000.0]],
                "return_tokens": True,
                "json_schema": schema,
            }
            told = await self._ask("/completion", probe)
            if len(tried) >= SCHEMAS_KEPT:
                tried.clear()
            tried[key] = told.get("tokens") != [token]
        if not tried[key]:
            raise BadRequest("invalid JSON schema in format")

    def _splitter(self, prompt: _Prompt) -> ThinkingSplitter | None:
        """None if everything that comes is answer."""
        if not self._thinks() or self._resume.text:
            return None
        begun = bool(self._resume.thinking)
        inside = begun or prompt.text_end.rstrip().endswith(OPENS)
        return ThinkingSplitter(inside=inside, begun=begun)

    async def _prompt(self, context: int) -> _Prompt:
        request, resume = self._request, self._resume
        earlier = list(request.context) if isinstance(request, GenerateRequest) else []
        if isinstance(request, GenerateRequest) and request.raw:
            text = request.prompt
            tokens = earlier + await self._tokens(text, special=not earlier)
        else:
            text, tokens = await self._rendered_to_fit(context - len(earlier))
            tokens = earlier + tokens
        done = await self._resumed_tokens(text, resume)
        if len(tokens) + len(done) >= context:
            if done:
                raise CannotResume("the answer has left the context that it began with")
            tokens = self._cut(tokens, context)
        return _Prompt(tokens + done, len(done), text[-64:])

    async def _rendered_to_fit(self, context: int) -> tuple[str, list[int]]:
        """The prompt and its tokens. Of a conversation that is too long, the oldest messages are
        left out, as few as do; the system's and the last one stay, as in Ollama.
        """
        messages = self._messages()
        text, tokens = await self._rendered(messages)
        if len(tokens) < context or self._request.truncate is False:
            return text, tokens
        system = [message for message in messages[:-1] if message.role == "system"]
        others = [message for message in messages[:-1] if message.role != "system"]
        low, high = 1, len(others)  # how many are left out; fewer than low do not fit
        while low < high:
            middle = (low + high) // 2
            _, tried = await self._rendered([*system, *others[middle:], messages[-1]])
            low, high = (low, middle) if len(tried) < context else (middle + 1, high)
        return await self._rendered([*system, *others[low:], messages[-1]])

    def _cut(self, tokens: list[int], context: int) -> list[int]:
        """A prompt that is too long without its middle: Ollama keeps `num_keep` and the end."""
        if self._request.truncate is False:
            raise ContextExceeded
        keep = min(max(0, self._options.num_keep or 0), context // 2)
        # Half of what may go stays free for the answer.
        tail = (context - keep) // 2
        return tokens[:keep] + tokens[len(tokens) - tail :]

    def _messages(self) -> list[ChatMessage]:
        request, model = self._request, self._model
        if isinstance(request, ChatRequest):
            messages = [*model.messages, *request.messages]
            has_system = request.messages[0].role == "system"
            system = "" if has_system else model.system
        else:
            messages = [
                *model.messages,
                ChatMessage(role="user", content=request.prompt, images=request.images),
            ]
            system = model.system if request.system is None else request.system
        return [ChatMessage(role="system", content=system), *messages] if system else messages

    async def _rendered(self, messages: list[ChatMessage]) -> tuple[str, list[int]]:
        body = {"messages": openai_messages(messages)} | self._template_fields()
        told = await self._ask("/apply-template", body)
        text = told.get("prompt")
        if not isinstance(text, str):
            raise BackendFailed(NAME, "it rendered no prompt")
        return text, await self._tokens(text, special=True)

    def _template_fields(self) -> dict[str, Any]:
        think = self._request.think
        if "thinking" not in self._model.about.capabilities or think is None:
            return {}
        fields: dict[str, Any] = {"enable_thinking": think is not False}
        if isinstance(think, str):
            fields["reasoning_effort"] = think
        return {"chat_template_kwargs": fields}

    async def _resumed_tokens(self, rendered: str, resume: Resume) -> list[int]:
        """The tokens of the answer so far: as they were told if they are that text, else anew."""
        if resume.thinking and not (resume.tokens and self._model.thinks_in_marks):
            raise CannotResume("its thinking cannot be gone on with without its tokens")
        if resume.tokens:
            if resume.thinking or await self._text_of(resume.tokens) == resume.text:
                return list(resume.tokens)
            log.info("tokens that came with an answer are not its text; it is tokenized again")
        if not resume.text:
            return []
        whole = await self._tokens(rendered + resume.text, special=True)
        return whole[len(await self._tokens(rendered, special=True)) :]

    # -- by llama.cpp's parser -----------------------------------------------------------------

    async def _parsed(self) -> AsyncGenerator[Part, None]:
        request = self._request
        if self._resume != Resume():
            raise CannotResume("an answer with tools, pictures or this way of thinking")
        sampling = sampling_fields(self._options)
        context = await self._context_of_slot()
        body: dict[str, Any] = sampling | {
            "messages": openai_messages(self._messages()),
            "max_tokens": tokens_left(self._options, 0, context),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            "cache_prompt": True,
            **self._template_fields(),
            **response_format(request),
        }
        if isinstance(request, ChatRequest) and request.tools:
            body["tools"] = list(request.tools)
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        answer = AnswerChunks()
        try:
            async with aclosing(self._events("/v1/chat/completions", body, AnswerChunk)) as chunks:
                async for chunk in chunks:
                    if chunk.error:
                        raise _engine_error(chunk.error, request.model)
                    delta = answer.feed(chunk)
                    if delta is not None:
                        yield delta
            calls = answer.tool_calls()
        except ValueError as error:
            raise BackendFailed(NAME, str(error)) from None
        if not answer.reason:
            raise BackendUnavailable(NAME, "the engine ended in the midst of an answer")
        if calls:
            yield Delta(tool_calls=calls)
        usage = answer.usage
        yield Finish(
            reason=answer.reason,
            usage=self._usage(
                usage.prompt_tokens if usage else 0,
                usage.completion_tokens if usage else 0,
                answer.timings,
            ),
        )

    async def _infilled(self) -> AsyncGenerator[Part, None]:
        request = self._request
        assert isinstance(request, GenerateRequest)
        if self._resume != Resume():
            raise CannotResume("text for a gap cannot be gone on with")
        body = sampling_fields(self._options) | {
            "input_prefix": request.prompt,
            "input_suffix": request.suffix,
            "n_predict": tokens_left(self._options, 0, await self._context_of_slot()),
            "stream": True,
            "return_tokens": True,
        }
        pieces, last = CompletionPieces(), None
        async with aclosing(self._events("/infill", body, CompletionChunk)) as chunks:
            async for chunk in chunks:
                if chunk.error:
                    raise _engine_error(chunk.error, request.model)
                piece = pieces.feed(chunk)
                if piece is not None:
                    yield Delta(text=piece.text, tokens=piece.tokens(), logprobs=piece.logprobs)
                last = chunk if chunk.stop else last
        if last is None:
            raise BackendUnavailable(NAME, "the engine ended in the midst of an answer")
        yield Finish(
            reason=_reason(last),
            usage=self._usage(last.tokens_evaluated, last.tokens_predicted, last.timings),
        )

    # -- the engine ----------------------------------------------------------------------------

    async def _events(
        self, path: str, body: dict[str, Any], kind: type[T]
    ) -> AsyncGenerator[T, None]:
        http = self._engine.http
        stream = http.stream("POST", path, body, begin_timeout_s=http.stall_timeout_s)
        async with stream as reply:
            if reply.status != 200:
                raise _engine_error(await _error_in(reply.lines), self._request.model)
            async for line in reply.lines:
                data = event_data(line)
                if data is None or data == b"[DONE]":
                    continue
                try:
                    yield msgspec.convert(decode_json(data), kind)
                except (ValueError, msgspec.ValidationError) as error:
                    raise BackendFailed(NAME, f"cannot read its answer: {error}") from None

    async def _context_of_slot(self) -> int:
        told = _told(await self._engine.http.ask("GET", "/props", timeout_s=SMALL_TIMEOUT_S), "")
        context = told.get("default_generation_settings", {}).get("n_ctx")
        if not isinstance(context, int) or context <= 0:
            raise BackendFailed(NAME, "it does not tell its context")
        return context

    async def _tokens(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a prompt. special: with those that every prompt of the model begins with."""
        return await _tokenize(self._engine, text, special=special)

    async def _tokenized(self, text: str) -> tuple[int, ...]:
        """The usual tokens of a piece of an answer."""
        return tuple(await _tokenize(self._engine, text, special=False))

    async def _text_of(self, tokens: tuple[int, ...]) -> str:
        try:
            told = await self._ask("/detokenize", {"tokens": list(tokens)})
        except OmxError:
            return ""  # ids that this model does not have
        return str(told.get("content", ""))

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = await self._engine.http.ask("POST", path, body, timeout_s=SMALL_TIMEOUT_S)
        return _told(reply, self._request.model)

    def _finish(self, prompt: _Prompt, tokens: list[int], last: CompletionChunk) -> Finish:
        raw = isinstance(self._request, GenerateRequest) and not self._request.raw
        return Finish(
            reason=_reason(last),
            usage=self._usage(
                len(prompt.tokens) - prompt.resumed,
                self._resume.completion_tokens + last.tokens_predicted,
                last.timings,
            ),
            context=tuple(prompt.tokens + tokens) if raw else (),
        )

    def _usage(self, prompt: int, completion: int, timings: Timings) -> Usage:
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            load_ns=self._load_ns,
            prompt_ns=max(0, int(timings.prompt_ms * 1e6)),
            completion_ns=max(0, int(timings.predicted_ms * 1e6)),
            total_ns=_ns(trio.current_time() - self._began),
        )


class _Held:
    """What is given out only once all of its text is: a delta's tokens are exactly its text."""

    def __init__(self) -> None:
        self._tokens: tuple[int, ...] = ()
        self._all_known = True
        self._thinking = self._text = ""
        self._logprobs: tuple[Logprob, ...] = ()

    def delta(
        self, piece: Piece, ids: tuple[int, ...], splitter: ThinkingSplitter | None
    ) -> Delta | None:
        """None while the splitter holds a part of the text back."""
        if splitter is None:
            return Delta(text=piece.text, tokens=ids, logprobs=piece.logprobs)
        thinking, text = splitter.feed(piece.text)
        self._thinking += thinking
        self._text += text
        self._all_known = self._all_known and bool(ids)
        self._tokens += ids
        self._logprobs += piece.logprobs
        return None if splitter.holds else self.rest("", "")

    def rest(self, thinking: str, text: str) -> Delta | None:
        """What is held, and some more; None if there is nothing to give."""
        thinking, text = self._thinking + thinking, self._text + text
        if not (thinking or text):
            return None
        tokens = self._tokens if self._all_known else ()
        delta = Delta(text=text, thinking=thinking, tokens=tokens, logprobs=self._logprobs)
        self._tokens, self._all_known, self._logprobs = (), True, ()
        self._thinking = self._text = ""
        return delta


@asynccontextmanager
async def open_embedded(
    store: DiskStore, settings: InferenceSettings
) -> AsyncIterator[EmbeddedBackend]:
    """Run models of a store for as long as the block is open; its end ends every process."""
    budget = settings.memory_bytes or int(MEMORY_SHARE * _machine_bytes())
    folder = await trio.to_thread.run_sync(lambda: Path(tempfile.mkdtemp(prefix="omx-engine-")))
    try:
        async with open_engine_pool(NAME, folder, settings, budget) as pool:
            yield EmbeddedBackend(StoredModels(store), settings, pool)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_able(request: TextRequest, model: EngineModel) -> None:
    """Raises NotSupported, BadRequest."""
    able, name = model.about.capabilities, request.model
    chat = isinstance(request, ChatRequest)
    if "completion" not in able:
        raise NotSupported(name, "chat" if chat else "generate")
    if isinstance(request, ChatRequest) and request.tools and "tools" not in able:
        raise NotSupported(name, "tools")
    if request.think and "thinking" not in able:
        raise NotSupported(name, "thinking")
    if _has_images(request) and (model.projector is None or "vision" not in able):
        raise NotSupported(name, "vision")
    if isinstance(request, GenerateRequest) and request.template:
        raise BadRequest(
            "the embedded engine uses the chat template inside the model and cannot run another, "
            "written in Go's template language; leave `template` out, or use `raw`"
        )


def _has_images(request: TextRequest) -> bool:
    if isinstance(request, GenerateRequest):
        return bool(request.images)
    return any(message.images for message in request.messages)


def _is_infill(request: TextRequest) -> bool:
    return isinstance(request, GenerateRequest) and bool(request.suffix)


def _only_loads(request: TextRequest) -> bool:
    if isinstance(request, ChatRequest):
        return not request.messages
    return not (request.prompt or request.suffix or request.images)


def _grammar(request: TextRequest) -> dict[str, Any]:
    if request.format == "json":
        return {"json_schema": {"type": "object"}}
    return {"json_schema": request.format} if request.format else {}


def _reason(last: CompletionChunk) -> str:
    return "length" if last.stop_type == "limit" else "stop"


async def _tokenize(engine: EngineProcess, text: str, *, special: bool) -> list[int]:
    body = {"content": text, "add_special": special, "parse_special": True}
    reply = await engine.http.ask("POST", "/tokenize", body, timeout_s=SMALL_TIMEOUT_S)
    try:
        return msgspec.convert(_told(reply, "").get("tokens"), list[int])
    except msgspec.ValidationError:
        raise BackendFailed(NAME, "it tokenized to no tokens") from None


async def _input_tokens(
    engine: EngineProcess, text: str, truncate: bool, context: int
) -> list[int]:
    """A text for a vector. Raises ContextExceeded."""
    tokens = await _tokenize(engine, text, special=True)
    if len(tokens) >= context:  # llama.cpp wants one to spare
        if not truncate:
            raise ContextExceeded
        tokens = tokens[: context - 1]
    return tokens or [0]


async def _error_in(lines: AsyncIterator[bytes]) -> object:
    """The body of an answer that is an error."""
    body = bytearray()
    async for line in lines:
        body += line
        if len(body) > 1024 * 1024:
            break
    try:
        read = decode_json(bytes(body))
    except ValueError:
        return bytes(body[:200]).decode(errors="replace")
    return read.get("error", read) if isinstance(read, dict) else read


def _told(reply: Reply, model: str) -> dict[str, Any]:
    try:
        read = reply.json()
    except ValueError as error:
        raise BackendFailed(NAME, f"cannot read its answer: {error}") from None
    if not isinstance(read, dict):
        raise BackendFailed(NAME, "its answer is no JSON object")
    if reply.status != 200:
        raise _engine_error(read.get("error", read), model)
    return read


def _engine_error(told: object, model: str) -> OmxError:
    """llama.cpp's error as ours."""
    fields = told if isinstance(told, dict) else {}
    message = str(fields.get("message", told))[:500]
    kind = fields.get("type")
    if kind == "exceed_context_size_error":
        return ContextExceeded()
    if kind == "not_supported_error" and "nfill" in message:
        return NotSupported(model, "insert")
    if kind in ("invalid_request_error", "not_supported_error"):
        return BadRequest(message)
    if kind == "unavailable_error":
        return BackendUnavailable(NAME, message)
    return BackendFailed(NAME, message)


def _ns(seconds: float) -> int:
    return max(0, int(seconds * 1e9))


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _unix_now() -> float:
    return datetime.now(UTC).timestamp()

"""ScriptedBackend: a back end in RAM for tests of what is above: routers, APIs, whole swarms.

Its models are real in the one sense that matters above them: what comes next depends on the whole
text so far and on nothing else, so that an answer which moves midway must equal the undisturbed
one, character for character. A word is drawn by the hash of prompt and text so far; about one in
eight is not ASCII. Time is trio's, and faults are what the test sets.
"""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    ContextExceeded,
    ModelNotFound,
    NotSupported,
)
from ollamamax_p2p.inference import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import (
    ChatRequest,
    Delta,
    Embeddings,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Options,
    Part,
    TextRequest,
    Usage,
)

_WORDS = ("the", "swarm", "<peer>", "größer", "&", "chunk", "snow☃", "hello", "model", "Ω", "\n")
_LENGTH_MAX = 40
"""Words of an answer that no num_predict ends."""


@dataclass(slots=True, kw_only=True)
class Script:
    """How the back end behaves from now on. Times in seconds."""

    load_s: float = 0.5
    first_token_s: float = 0.05
    token_s: float = 0.01
    fail_before: int = 0
    """So many requests fail with BackendFailed before their first part."""
    fail_at: list[int] = field(default_factory=list)
    """Each takes one request, which fails with BackendUnavailable after so many words."""
    hangs: bool = False
    """Answers nothing at all, for ever."""
    gone: bool = False
    """Everything raises BackendUnavailable."""


class ScriptedBackend:
    """Made by the test; needs no opening."""

    def __init__(
        self,
        models: Sequence[ServableModel],
        *,
        name: str = "scripted",
        slots: int = 1,
        script: Script | None = None,
    ) -> None:
        self.name = name
        self.slots = slots
        self.script = script or Script()
        self.answered = 0
        """Answers that came to their Finish."""
        self.cancelled = 0
        """Answers that were left before."""
        self.seen: list[TextRequest | EmbedRequest] = []
        self._models = {model.name: model for model in models}
        self._loaded: dict[str, LoadedModel] = {}
        self._turns = trio.CapacityLimiter(slots)

    async def models(self) -> tuple[ServableModel, ...]:
        """What the test gave it."""
        self._check_there()
        return tuple(self._models.values())

    async def loaded(self) -> tuple[LoadedModel, ...]:
        """What was used since `unload`."""
        self._check_there()
        busy = self._turns.borrowed_tokens
        return tuple(
            LoadedModel(
                name=each.name,
                digest=each.digest,
                size=each.size,
                context_length=each.context_length,
                slots=self.slots,
                busy=busy,
                loading=each.loading,
            )
            for each in self._loaded.values()
        )

    @asynccontextmanager
    async def answer(self, request: TextRequest) -> AsyncIterator[AsyncIterator[Part]]:
        """A word at a time."""
        self.seen.append(request)
        model = self._model(request.model)
        needed = "chat" if isinstance(request, ChatRequest) else "generate"
        if "completion" not in model.capabilities:
            raise NotSupported(request.model, needed)
        if isinstance(request, ChatRequest) and request.tools and "tools" not in model.capabilities:
            raise NotSupported(request.model, "tools")
        async with self._turns:
            await self.load(request.model)
            if self.script.fail_before:
                self.script.fail_before -= 1
                raise BackendFailed(self.name, "it was told to")
            ended = [False]
            parts = self._parts(request, ended)
            try:
                yield parts
            finally:
                await parts.aclose()
                if ended[0]:
                    self.answered += 1
                else:
                    self.cancelled += 1

    async def _parts(self, request: TextRequest, ended: list[bool]) -> AsyncGenerator[Part, None]:
        script = self.script
        prompt = _rendered(request)
        resume = request.resume
        text, done = (resume.text, resume.completion_tokens) if resume else ("", 0)
        limit = request.options.num_predict
        breaks_at = script.fail_at.pop(0) if script.fail_at else -1
        started = trio.current_time()
        await trio.sleep(script.first_token_s)
        given = 0
        while (limit is None or limit < 0 or done < limit) and not _is_over(prompt, done):
            if given == breaks_at:
                raise BackendUnavailable(self.name, "it was told to end midway")
            if given:
                await trio.sleep(script.token_s)
            self._check_there()
            word = _next_word(prompt, text)
            text, done, given = text + word, done + 1, given + 1
            yield Delta(text=word)
        now = trio.current_time()
        ended[0] = True
        yield Finish(
            reason="stop" if _is_over(prompt, done) else "length",
            usage=Usage(
                prompt_tokens=len(prompt.split()),
                completion_tokens=done,
                prompt_ns=int(script.first_token_s * 1e9),
                completion_ns=int((now - started) * 1e9),
                total_ns=int((now - started) * 1e9),
            ),
        )

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """A direction in 8 dimensions for each text, by its hash."""
        self.seen.append(request)
        model = self._model(request.model)
        if "embedding" not in model.capabilities:
            raise NotSupported(request.model, "embed")
        await self.load(request.model)
        count = sum(len(text.split()) for text in request.inputs)
        if not request.truncate and any(
            len(text.split()) > model.context_length for text in request.inputs
        ):
            raise ContextExceeded
        dimensions = request.dimensions or 8
        return Embeddings(
            vectors=tuple(_direction(text)[:dimensions] for text in request.inputs),
            prompt_tokens=count,
        )

    async def load(
        self, model: str, *, keep_alive_s: float | None = None, options: Options | None = None
    ) -> None:
        """Takes `load_s` the first time."""
        found = self._model(model)
        if self.script.hangs:
            await trio.sleep_forever()
        if found.name in self._loaded and not self._loaded[found.name].loading:
            return
        entry = LoadedModel(
            name=found.name,
            digest=found.digest,
            size=found.size,
            context_length=found.context_length,
            slots=self.slots,
            loading=True,
        )
        self._loaded[found.name] = entry
        try:
            await trio.sleep(self.script.load_s)
        except BaseException:
            self._loaded.pop(found.name, None)
            raise
        self._loaded[found.name] = LoadedModel(
            name=found.name,
            digest=found.digest,
            size=found.size,
            context_length=found.context_length,
            slots=self.slots,
        )

    async def unload(self, model: str) -> None:
        """At once."""
        self._loaded.pop(self._model(model).name, None)

    async def check(self) -> None:
        """As the script says."""
        self._check_there()
        if self.script.hangs:
            await trio.sleep_forever()

    def _check_there(self) -> None:
        if self.script.gone:
            raise BackendUnavailable(self.name, "it was told to be gone")

    def _model(self, name: str) -> ServableModel:
        self._check_there()
        found = self._models.get(name) or self._models.get(f"{name}:latest")
        if found is None:
            raise ModelNotFound(name)
        return found


def whole_answer(request: TextRequest) -> str:
    """What an undisturbed ScriptedBackend says to this."""
    prompt, text, done = _rendered(request), "", 0
    limit = request.options.num_predict
    while (limit is None or limit < 0 or done < limit) and not _is_over(prompt, done):
        text, done = text + _next_word(prompt, text), done + 1
    return text


def _rendered(request: TextRequest) -> str:
    if isinstance(request, GenerateRequest):
        return request.prompt
    return "\n".join(f"{message.role}: {message.content}" for message in request.messages)


def _next_word(prompt: str, text: str) -> str:
    drawn = hashlib.sha256(f"{prompt}\0{text}".encode()).digest()
    return f"{_WORDS[drawn[0] % len(_WORDS)]} "


def _is_over(prompt: str, done: int) -> bool:
    drawn = hashlib.sha256(prompt.encode()).digest()
    return done >= 5 + drawn[1] % (_LENGTH_MAX - 5)


def _direction(text: str) -> tuple[float, ...]:
    drawn = hashlib.sha256(text.encode()).digest()
    raw = [byte - 127.5 for byte in drawn[:8]]
    length = sum(value * value for value in raw) ** 0.5
    return tuple(value / length for value in raw)

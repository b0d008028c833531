"""What every Backend does. An implementation joins by a factory in `IMPLEMENTATIONS`.

The real ones answer with SmolLM2-135M, greedily and in few tokens; the same prompt gives the same
text each time.
"""

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from ollamamax_p2p.errors import CannotResume, ModelNotFound
from ollamamax_p2p.inference import Backend, ServableModel
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Options,
    Resume,
    TextRequest,
)
from ollamamax_p2p.inference.embedded import open_embedded
from ollamamax_p2p.inference.ollama import open_ollama
from ollamamax_p2p.inference.openai_compatible import open_openai
from ollamamax_p2p.inference.settings import OpenAIServer
from ollamamax_p2p.testing import ScriptedBackend
from ollamamax_p2p.testing.determinism import run_on_virtual_clock
from tests.inference.counterparts import llama_server, ollama_server
from tests.inference.real_model import MODEL, SETTINGS, open_store

BUDGET_S = 120
"""For one test; a busy machine may take its time."""

QUESTION = "Name three colours."


@dataclass(kw_only=True)
class Case:
    """An implementation under test."""

    backend: Backend
    model: str
    idle: Callable[[], Awaitable[bool]]
    """Whether the engine itself says that it works on nothing."""
    embedding_model: str = ""
    """"": it gives no vectors."""
    resumes_chat: bool = True
    threads: int | None = None

    def options(self, **fields: Any) -> Options:
        return Options(temperature=0.0, seed=1, num_thread=self.threads, **fields)

    def chat(self, *, tokens: int = 12, text: str = QUESTION, **fields: Any) -> ChatRequest:
        stop = fields.pop("stop", None)
        return ChatRequest(
            model=fields.pop("model", self.model),
            messages=(ChatMessage(role="user", content=text),),
            options=self.options(num_predict=tokens, stop=stop),
            **fields,
        )


@asynccontextmanager
async def scripted(_folder: Path) -> AsyncIterator[Case]:
    backend = ScriptedBackend(
        [
            ServableModel(name="tiny:latest", capabilities=("completion",), can_resume=True),
            ServableModel(name="vectors:latest", capabilities=("embedding",), context_length=8),
        ],
        slots=2,
    )

    async def idle() -> bool:
        return not any(model.busy for model in await backend.loaded())

    yield Case(
        backend=backend,
        model="tiny",
        idle=idle,
        embedding_model="vectors",
    )


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[Case]:
    async with open_store(folder) as store, open_embedded(store, SETTINGS) as backend:

        async def idle() -> bool:
            for engine in backend._pool.engines:
                if engine.process is not None:
                    reply = await engine.process.http.ask("GET", "/slots", timeout_s=30)
                    if any(slot["is_processing"] for slot in reply.json()):
                        return False
            return True

        yield Case(backend=backend, model=MODEL, idle=idle, embedding_model=MODEL)


@asynccontextmanager
async def ollama(_folder: Path, url: str) -> AsyncIterator[Case]:
    async with open_ollama(replace(SETTINGS, ollama_slots=2), url) as backend:

        async def idle() -> bool:
            return not any(model.busy for model in await backend.loaded())

        yield Case(
            backend=backend,
            model=MODEL,
            idle=idle,
            embedding_model=MODEL,
            resumes_chat=False,
            # More than one waits for the others of its kind, which a busy machine lets sleep.
            threads=1,
        )


@asynccontextmanager
async def openai(_folder: Path, url: str) -> AsyncIterator[Case]:
    async with open_openai(OpenAIServer(url=url, key=KEY), SETTINGS) as backend:

        async def idle() -> bool:
            reply = await backend._root.ask("GET", "/slots", timeout_s=30)
            return not any(slot["is_processing"] for slot in reply.json())

        yield Case(backend=backend, model=MODEL, idle=idle)


KEY = "a-key-that-is-not-shown"
SCRIPTED = pytest.param(
    (scripted,), id="scripted", marks=pytest.mark.trio(run=run_on_virtual_clock)
)
EMBEDDED = pytest.param((embedded,), id="embedded", marks=pytest.mark.network)
OLLAMA = pytest.param(
    (ollama, "ollama_url"), id="ollama", marks=[pytest.mark.network, pytest.mark.counterpart]
)
OPENAI = pytest.param((openai, "openai_url"), id="openai", marks=pytest.mark.network)
IMPLEMENTATIONS = [SCRIPTED, EMBEDDED, OLLAMA, OPENAI]


@pytest.fixture(scope="module")
def ollama_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ollama_server(tmp_path_factory.mktemp("ollama")) as url:
        yield url


@pytest.fixture(scope="module")
def openai_url() -> Iterator[str]:
    with llama_server(key=KEY) as url:
        yield url


@pytest.fixture(params=IMPLEMENTATIONS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Opens the implementation, with a bound on the test's time."""

    implementation, *server = request.param
    urls = [request.getfixturevalue(each) for each in server]

    @asynccontextmanager
    async def opening() -> AsyncIterator[Case]:
        with trio.fail_after(BUDGET_S):
            async with implementation(tmp_path, *urls) as case:
                yield case

    return opening


def only(*implementations: Any) -> pytest.MarkDecorator:
    """A test of what not all of them can."""
    return pytest.mark.parametrize("opened", implementations, indirect=True)


async def whole(backend: Backend, request: TextRequest) -> tuple[list[Delta], Finish]:
    """Every delta, and the finish, which is the last part."""
    deltas: list[Delta] = []
    async with backend.answer(request) as parts:
        async for part in parts:
            if isinstance(part, Finish):
                assert [rest async for rest in parts] == []
                return deltas, part
            deltas.append(part)
    raise AssertionError("an answer without a Finish")


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - another process, which tells nothing
        await trio.sleep(0.01)


async def test_deltas_then_one_finish(opened):
    async with opened() as case:
        deltas, finish = await whole(case.backend, case.chat(tokens=4))
        assert text_of(deltas)
        assert finish.reason == "length"
        assert finish.usage.completion_tokens == 4
        assert finish.usage.prompt_tokens > 0
        assert finish.usage.total_ns > 0


async def test_greedy_answers_repeat(opened):
    async with opened() as case:
        one, _ = await whole(case.backend, case.chat())
        two, _ = await whole(case.backend, case.chat())
        assert text_of(one) == text_of(two)


async def test_leaving_an_answer_stops_the_engine(opened):
    async with opened() as case:
        async with case.backend.answer(
            case.chat(tokens=400, text="Tell me a long story.")
        ) as parts:
            async for _ in parts:
                break
        await until(case.idle)
        # And it answers again.
        _, finish = await whole(case.backend, case.chat(tokens=2))
        assert finish.reason == "length"


async def test_cancelling_an_answer_stops_the_engine(opened):
    async with opened() as case:
        await case.backend.load(case.model, options=case.options())
        with trio.move_on_after(0.2):
            await whole(case.backend, case.chat(tokens=400, text="Tell me a long story."))
        await until(case.idle)


@only(SCRIPTED, EMBEDDED, OPENAI)
async def test_an_answer_goes_on_where_it_broke_off(opened):
    async with opened() as case:
        request = case.chat(tokens=10)
        deltas, undisturbed = await whole(case.backend, request)
        for cut in range(0, len(deltas) + 1, 3):
            so_far = deltas[:cut]
            known = all(delta.tokens for delta in so_far)
            resume = Resume(
                text=text_of(so_far),
                tokens=tuple(t for delta in so_far for t in delta.tokens) if known else (),
                completion_tokens=cut,
            )
            rest, finish = await whole(case.backend, case.chat(tokens=10, resume=resume))
            assert text_of(so_far) + text_of(rest) == text_of(deltas)
            assert finish.reason == undisturbed.reason
            assert finish.usage.completion_tokens == undisturbed.usage.completion_tokens
            assert finish.usage.prompt_tokens == undisturbed.usage.prompt_tokens


@only(EMBEDDED, OLLAMA, OPENAI)
async def test_what_cannot_be_gone_on_with_is_refused_before_any_part(opened):
    async with opened() as case:
        request = case.chat(format="json", resume=Resume(text='{"a":', completion_tokens=3))
        with pytest.raises(CannotResume):
            await whole(case.backend, request)


async def test_an_unknown_model_is_not_found(opened):
    async with opened() as case:
        with pytest.raises(ModelNotFound):
            await whole(case.backend, case.chat(model="nobody-has-this"))
        with pytest.raises(ModelNotFound):
            await case.backend.embed(EmbedRequest(model="nobody-has-this", inputs=("a",)))


@only(EMBEDDED, OLLAMA, OPENAI)
async def test_a_stop_sequence_ends_the_answer_before_itself(opened):
    async with opened() as case:
        deltas, _ = await whole(case.backend, case.chat(tokens=12))
        text = text_of(deltas)
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        stopped, finish = await whole(case.backend, case.chat(tokens=12, stop=(stop,)))
        assert text_of(stopped) == text[: text.index(stop)]
        assert finish.reason == "stop"


@only(EMBEDDED, OLLAMA, OPENAI)
async def test_a_schema_is_kept_to(opened):
    async with opened() as case:
        schema = {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        }
        deltas, _ = await whole(case.backend, case.chat(tokens=40, format=schema))
        assert json.loads(text_of(deltas))["colour"] in ("red", "blue")


@only(EMBEDDED, OLLAMA, OPENAI)
async def test_json_is_json(opened):
    async with opened() as case:
        request = case.chat(tokens=16, text='Reply with {"ok": true}', format="json")
        deltas, finish = await whole(case.backend, request)
        if finish.reason == "stop":
            assert isinstance(json.loads(text_of(deltas)), dict)
        else:
            assert text_of(deltas).lstrip().startswith("{")


@only(SCRIPTED, EMBEDDED, OLLAMA)
async def test_vectors_have_length_one(opened):
    async with opened() as case:
        request = EmbedRequest(
            model=case.embedding_model, inputs=("red", "a blue sky"), options=case.options()
        )
        given = await case.backend.embed(request)
        again = await case.backend.embed(request)
        assert len(given.vectors) == 2
        assert given.vectors[0] != given.vectors[1]
        assert given.prompt_tokens > 0
        for vector, same in zip(given.vectors, again.vectors, strict=True):
            assert math.isclose(sum(value * value for value in vector), 1.0, rel_tol=1e-3)
            assert vector == pytest.approx(same, abs=1e-3)


@only(SCRIPTED, EMBEDDED, OLLAMA)
async def test_a_model_is_loaded_and_unloaded(opened):
    async with opened() as case:
        await case.backend.load(case.model, options=case.options())
        (loaded,) = await case.backend.loaded()
        assert loaded.name.startswith(case.model)
        assert not loaded.loading
        await case.backend.unload(case.model)

        async def out() -> bool:
            return await case.backend.loaded() == ()

        await until(out)


async def test_models_tell_what_they_can(opened):
    async with opened() as case:
        models = {model.name: model for model in await case.backend.models()}
        (found,) = (m for name, m in models.items() if name in (case.model, f"{case.model}:latest"))
        assert "completion" in found.capabilities
        assert found.can_resume == case.resumes_chat
        await case.backend.check()


async def test_several_answers_at_once(opened):
    async with opened() as case:
        texts: dict[int, str] = {}

        async def ask(number: int) -> None:
            deltas, finish = await whole(case.backend, case.chat(tokens=3))
            texts[number] = text_of(deltas)
            assert finish.usage.completion_tokens == 3

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, number)
        assert len(texts) == 3
        assert all(texts.values())
        await until(case.idle)


async def test_a_raw_prompt_is_continued(opened):
    async with opened() as case:
        request = GenerateRequest(
            model=case.model,
            prompt="One, two, three,",
            raw=True,
            options=case.options(num_predict=4),
        )
        deltas, finish = await whole(case.backend, request)
        assert text_of(deltas)
        assert finish.usage.completion_tokens == 4

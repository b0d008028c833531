"""The embedded engine with the real SmolLM2: what only it does, and what may befall it."""

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import trio

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    CannotResume,
    ContextExceeded,
    NotSupported,
)
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Options,
    Resume,
    ToolCall,
)
from ollamamax_p2p.inference.embedded import open_embedded
from tests.content.model_files import check_one_line
from tests.inference.processes import children, is_there, open_files
from tests.inference.real_model import (
    GARBAGE,
    MODEL,
    SETTINGS,
    THINKING_TEMPLATE,
    TOOLS_TEMPLATE,
    TUNED,
    add_garbage,
    add_templated,
    open_store,
)

pytestmark = pytest.mark.network

GREEDY = Options(num_predict=8, temperature=0.0)
LONG = Options(num_predict=400, temperature=0.0)


@asynccontextmanager
async def opened(folder: Path, **settings):
    with trio.fail_after(120):
        async with (
            open_store(folder) as store,
            open_embedded(store, replace(SETTINGS, **settings)) as backend,
        ):
            yield backend


def raw(prompt: str, *, options: Options = GREEDY, **fields) -> GenerateRequest:
    return GenerateRequest(model=MODEL, prompt=prompt, raw=True, options=options, **fields)


def chat(text: str, *, model: str = MODEL, options: Options = GREEDY, **fields) -> ChatRequest:
    messages = (ChatMessage(role="user", content=text),)
    return ChatRequest(model=model, messages=messages, options=options, **fields)


async def whole(backend, request):
    async with backend.answer(request) as parts:
        *deltas, finish = [part async for part in parts]
    return deltas, finish


def text_of(deltas) -> str:
    return "".join(delta.text for delta in deltas)


def engine_pid(backend) -> int:
    (engine,) = backend._pool.engines
    return engine.process.pid


async def test_every_delta_carries_the_tokens_of_its_text_also_within_a_character(tmp_path):
    async with opened(tmp_path) as backend:
        prompt = "Repeat: 雪雪雪雪雪雪雪雪雪雪"
        options = replace_options(num_predict=14)
        deltas, finish = await whole(backend, raw(prompt, options=options))
        assert "雪" in text_of(deltas)
        assert all(delta.tokens for delta in deltas)
        assert any(len(delta.tokens) > 1 for delta in deltas)
        for cut in range(len(deltas) + 1):
            resume = Resume(
                text=text_of(deltas[:cut]),
                tokens=tuple(token for delta in deltas[:cut] for token in delta.tokens),
                completion_tokens=sum(len(delta.tokens) for delta in deltas[:cut]),
            )
            rest, end = await whole(backend, raw(prompt, options=options, resume=resume))
            assert text_of(deltas[:cut]) + text_of(rest) == text_of(deltas)
            assert end.usage.completion_tokens == finish.usage.completion_tokens


async def test_an_answer_is_gone_on_with_as_it_was_begun_however_much_there_is_to_read(tmp_path):
    # Found by killing nodes: reading 64 tokens and more at once rounds otherwise than writing them.
    options = replace_options(num_predict=40)
    question = chat("1 + 1 = 2, 2 + 2 = 4, 3 + 3 =", options=options)
    async with opened(tmp_path, slots=1) as backend:
        deltas, finish = await whole(backend, question)
        for cut in range(20, len(deltas), 6):
            # The engine has nothing of it in its cache, as where it never was.
            await whole(backend, raw("Elsewhere", options=replace_options(num_predict=1)))
            resume = Resume(
                text=text_of(deltas[:cut]),
                tokens=tuple(token for delta in deltas[:cut] for token in delta.tokens),
                completion_tokens=sum(len(delta.tokens) for delta in deltas[:cut]),
            )
            rest, end = await whole(backend, msgspec.structs.replace(question, resume=resume))
            assert text_of(deltas[:cut] + rest) == text_of(deltas)
            assert end.usage.completion_tokens == finish.usage.completion_tokens


def replace_options(**fields) -> Options:
    return Options(temperature=0.0, **fields)


async def test_tokens_of_another_model_are_not_trusted(tmp_path):
    async with opened(tmp_path) as backend:
        deltas, _ = await whole(backend, chat("Name three colours."))
        for tokens in ((1, 2, 3), (10**6,)):
            resume = Resume(text=text_of(deltas[:3]), tokens=tokens, completion_tokens=3)
            rest, _ = await whole(backend, chat("Name three colours.", resume=resume))
            assert text_of(deltas[:3]) + text_of(rest) == text_of(deltas)


async def test_an_answer_whose_tokens_are_used_up_ends(tmp_path):
    async with opened(tmp_path) as backend:
        resume = Resume(text="Red", completion_tokens=8)
        deltas, finish = await whole(backend, chat("A colour?", resume=resume))
        assert deltas == []
        assert finish.reason == "length"
        assert finish.usage.completion_tokens == 8


async def test_logprobs_come_with_their_tokens(tmp_path):
    async with opened(tmp_path) as backend:
        deltas, _ = await whole(backend, chat("Hello", logprobs=True, top_logprobs=2))
        given = [each for delta in deltas for each in delta.logprobs]
        assert "".join(each.token for each in given) == text_of(deltas)
        for each in given:
            assert each.logprob <= 0
            assert bytes(each.bytes) == each.token.encode()
            assert len(each.top_logprobs) == 2
            assert each.top_logprobs[0].logprob >= each.top_logprobs[1].logprob


async def test_the_models_own_layers_count(tmp_path):
    async with opened(tmp_path) as backend:
        plain, _ = await whole(backend, chat("What is snow?", options=GREEDY))
        tuned, finish = await whole(
            backend, chat("What is snow?", model=TUNED, options=Options(num_predict=8))
        )
        # Its temperature is 0 too, so the other words are the other system prompt's.
        assert text_of(tuned) != text_of(plain)
        again, _ = await whole(
            backend, chat("What is snow?", model=TUNED, options=Options(num_predict=8))
        )
        assert text_of(again) == text_of(tuned)
        _, finish = await whole(backend, chat("Why?", model=TUNED, options=Options()))
        assert finish.usage.completion_tokens <= 3


async def test_what_a_model_cannot_is_refused(tmp_path):
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    async with opened(tmp_path) as backend:
        picture = (ChatMessage(role="user", content="?", images=(b"\x89PNG",)),)
        for request, what in (
            (chat("?", tools=(tool,)), "tools"),
            (chat("?", think=True), "thinking"),
            (ChatRequest(model=MODEL, messages=picture), "vision"),
            (raw("def f(", suffix="return x"), "insert"),
        ):
            with pytest.raises(NotSupported, match=what):
                await whole(backend, request)
        with pytest.raises(BadRequest, match="template"):
            await whole(backend, GenerateRequest(model=MODEL, prompt="?", template="{{ .Prompt }}"))
        for schema in ({"type": "no such type"}, {"type": "string", "pattern": "("}):
            with pytest.raises(BadRequest, match="schema"):
                await whole(backend, chat("?", format=schema))


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


async def test_tool_calls_come_as_the_engine_reads_them(tmp_path):
    def asked(city: str) -> list[ChatMessage]:
        call = ToolCall(name="weather", arguments={"city": city}, id="c1")
        return [
            ChatMessage(role="user", content=f"Weather in {city}?"),
            ChatMessage(role="assistant", tool_calls=(call,)),
            ChatMessage(role="tool", content="rain", tool_call_id="c1"),
        ]

    # Such a small model calls what it has seen called.
    messages = [*asked("Rome"), *asked("Paris"), asked("Rome")[0]]
    request = ChatRequest(
        model="tools",
        messages=tuple(messages),
        tools=(WEATHER,),
        options=replace_options(num_predict=60),
    )
    async with opened(tmp_path) as backend:
        await add_templated(backend._models._store, "tools", TOOLS_TEMPLATE, tmp_path)
        deltas, finish = await whole(backend, request)
        (call,) = [call for delta in deltas for call in delta.tool_calls]
        assert call.name == "weather"
        assert call.arguments["city"] in ("Paris", "Rome")
        assert finish.usage.completion_tokens > 0
        with pytest.raises(CannotResume):
            await whole(backend, msgspec.structs.replace(request, resume=Resume(text="a")))


async def test_thinking_is_told_apart_and_gone_on_with(tmp_path):
    async with opened(tmp_path) as backend:
        await add_templated(backend._models._store, "thinker", THINKING_TEMPLATE, tmp_path)
        request = chat("Why is snow white?", model="thinker")
        deltas, finish = await whole(backend, request)
        thinking = "".join(delta.thinking for delta in deltas)
        assert thinking
        assert text_of(deltas) == ""
        for cut in range(1, len(deltas) + 1):
            so_far = deltas[:cut]
            assert so_far[-1].tokens
            resume = Resume(
                thinking="".join(delta.thinking for delta in so_far),
                tokens=tuple(token for delta in so_far for token in delta.tokens),
                completion_tokens=sum(len(delta.tokens) for delta in so_far),
            )
            rest, end = await whole(
                backend, chat("Why is snow white?", model="thinker", resume=resume)
            )
            assert resume.thinking + "".join(delta.thinking for delta in rest) == thinking
            assert end.usage.completion_tokens == finish.usage.completion_tokens
        no_tokens = Resume(thinking="Snow", completion_tokens=1)
        with pytest.raises(CannotResume):
            await whole(backend, chat("Why is snow white?", model="thinker", resume=no_tokens))
        plain, _ = await whole(backend, chat("Why is snow white?", model="thinker", think=False))
        assert text_of(plain)


async def test_a_prompt_that_is_too_long_is_cut_unless_that_is_forbidden(tmp_path):
    words = " ".join(f"word{number}" for number in range(150))
    async with opened(tmp_path) as backend:
        options = replace_options(num_predict=2, num_ctx=256)
        with pytest.raises(ContextExceeded):
            await whole(backend, raw(words, options=options, truncate=False))
        _, finish = await whole(backend, raw(words, options=options))
        assert finish.usage.prompt_tokens < 256
        told = [ChatMessage(role="user", content=f"Fact {n} is {n}.") for n in range(40)]
        request = ChatRequest(model=MODEL, messages=tuple(told), options=options)
        _, finish = await whole(backend, request)
        assert 100 < finish.usage.prompt_tokens < 256
        with pytest.raises(ContextExceeded):
            await whole(
                backend,
                ChatRequest(model=MODEL, messages=tuple(told), options=options, truncate=False),
            )
        with pytest.raises(ContextExceeded):
            await backend.embed(
                EmbedRequest(model=MODEL, inputs=(words,), truncate=False, options=options)
            )
        assert (
            await backend.embed(
                EmbedRequest(model=MODEL, inputs=("snow", ""), dimensions=7, options=options)
            )
        ).vectors[0][7:] == ()


async def test_an_answer_that_may_not_shift_ends_with_the_context(tmp_path):
    async with opened(tmp_path) as backend:
        options = replace_options(num_ctx=256, num_predict=-1)
        _, finish = await whole(backend, raw(" a" * 236, options=options, shift=False))
        assert finish.reason in ("length", "stop")
        assert finish.usage.prompt_tokens + finish.usage.completion_tokens <= 256


async def test_a_context_is_gone_on_from(tmp_path):
    async with opened(tmp_path) as backend:
        first = GenerateRequest(model=MODEL, prompt="My name is Ada.", options=GREEDY)
        _, finish = await whole(backend, first)
        assert len(finish.context) > finish.usage.prompt_tokens
        then = GenerateRequest(
            model=MODEL, prompt="My name?", options=GREEDY, context=finish.context
        )
        _, later = await whole(backend, then)
        assert later.context[: len(finish.context)] == finish.context


async def test_an_empty_prompt_loads_and_unloads(tmp_path):
    async with opened(tmp_path) as backend:
        _, finish = await whole(backend, GenerateRequest(model=MODEL))
        assert finish.reason == "load"
        (loaded,) = await backend.loaded()
        assert loaded.size > 98_000_000
        assert loaded.slots == 2
        _, finish = await whole(backend, ChatRequest(model=MODEL, messages=(), keep_alive_s=0.0))
        assert finish.reason == "unload"
        await until_empty(backend)


async def until_empty(backend) -> None:
    while await backend.loaded():  # noqa: ASYNC110 - its process ends when it ends
        await trio.sleep(0.01)


async def test_keep_alive_begins_when_nobody_uses_the_model(tmp_path):
    async with opened(tmp_path, keep_alive_s=-1.0) as backend:
        await whole(backend, chat("Hi"))
        (loaded,) = await backend.loaded()
        assert loaded.expires_at is None
        async with backend.answer(chat("Hi", options=LONG, keep_alive_s=0.0)) as parts:
            await anext(parts)
            (loaded,) = await backend.loaded()
            assert loaded.busy == 1
        await until_empty(backend)


async def test_other_load_options_load_the_model_anew(tmp_path):
    async with opened(tmp_path) as backend:
        await whole(backend, chat("Hi"))
        before = engine_pid(backend)
        await whole(backend, chat("Hi"))
        assert engine_pid(backend) == before
        await whole(backend, chat("Hi", options=replace_options(num_predict=2, num_ctx=256)))
        assert engine_pid(backend) != before
        assert (await backend.loaded())[0].context_length == 256


async def test_an_idle_model_makes_room_for_another_and_a_busy_one_does_not(tmp_path):
    async with opened(tmp_path, memory_bytes=300_000_000) as backend:
        async with backend.answer(chat("Tell me a story.", options=LONG)) as parts:
            await anext(parts)
            with trio.move_on_after(0.5) as waiting:
                await backend.load(TUNED)
            assert waiting.cancelled_caught
            assert [model.name for model in await backend.loaded()] == [MODEL]
        await backend.load(TUNED)
        assert [model.name for model in await backend.loaded()] == [TUNED]


async def test_a_model_beyond_the_budget_is_refused_in_one_line(tmp_path):
    async with opened(tmp_path, memory_bytes=150_000_000) as backend:
        with pytest.raises(BackendUnavailable, match=r"needs [\d,]+ MiB") as caught:
            await backend.load(MODEL)
        check_one_line(caught.value)
        assert children() == []


async def test_a_file_that_is_no_model_is_named_in_one_line(tmp_path):
    with trio.fail_after(60):
        async with open_store(tmp_path) as store, open_embedded(store, SETTINGS) as backend:
            await add_garbage(store)
            for _ in range(3):
                with pytest.raises(BackendFailed, match="magic") as caught:
                    await whole(backend, chat("Hi", model=GARBAGE))
                check_one_line(caught.value)
            await whole(backend, chat("Hi"))


async def test_an_engine_that_is_killed_fails_its_answers_and_is_started_again(tmp_path):
    async with opened(tmp_path) as backend:
        async with backend.answer(chat("Tell me a story.", options=LONG)) as parts:
            await anext(parts)
            os.kill(engine_pid(backend), signal.SIGKILL)
            with pytest.raises(BackendUnavailable) as caught:
                [part async for part in parts]
        check_one_line(caught.value)
        deltas, _ = await whole(backend, chat("Hi"))
        assert deltas


async def test_an_engine_that_keeps_dying_is_started_ever_later(tmp_path):
    async with opened(tmp_path) as backend:
        for _ in range(2):
            await backend.load(MODEL)
            os.kill(engine_pid(backend), signal.SIGKILL)
            await until_empty(backend)
        with pytest.raises(BackendUnavailable, match="ended by itself"):
            await backend.load(MODEL)


async def test_nothing_is_left_when_the_back_end_is_closed(tmp_path):
    files = open_files()
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with opened(tmp_path) as backend:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(whole, backend, chat("Hi"))
            await trio.sleep(0.3)
            nursery.cancel_scope.cancel()
        await backend.embed(EmbedRequest(model=MODEL, inputs=("a",)))
        assert len(children()) == 2
    assert children() == []
    assert open_files() == files
    assert trio.lowlevel.current_statistics().tasks_living == tasks


NODE = """
import sys, trio
from pathlib import Path
from tests.inference.real_model import MODEL, SETTINGS, open_store
from ollamamax_p2p.inference.embedded import open_embedded

async def main():
    async with open_store(Path(sys.argv[1])) as store, open_embedded(store, SETTINGS) as backend:
        if sys.argv[2] == "loaded":
            await backend.load(MODEL)
            print(backend._pool.engines[0].process.pid, flush=True)
            await trio.sleep_forever()
        print("loading", flush=True)
        await backend.load(MODEL)

trio.run(main)
"""


@pytest.mark.parametrize("moment", ["loaded", "loading"])
async def test_no_engine_outlives_a_node_that_is_killed(tmp_path, moment):
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", NODE, str(tmp_path), moment], stdout=subprocess.PIPE
    )
    try:
        with trio.fail_after(60):
            assert (await process.stdout.receive_some()).strip()
            while not (engines := children(process.pid)):  # noqa: ASYNC110 - it tells nothing
                await trio.sleep(0.01)
            process.kill()
            await process.wait()
            while any(map(is_there, engines)):  # noqa: ASYNC110 - they are nobody's children now
                await trio.sleep(0.01)
    finally:
        process.kill()
        await process.stdout.aclose()

"""PyPI's ollama and openai and npm's ollama drive every method they have against a real node with
a real model and a real registry behind it. One node for all tests here.

Shapes and errors byte for byte are tests/api's; here is that it all works together.
"""

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
import trio

from ollamamax_p2p import LocalClient
from tests.content.model_files import real_model
from tests.inference.real_model import TOOLS_TEMPLATE, templated
from tests.network.counterparts import docker_registry
from tests.network.processes import up
from tests.network.test_js_libp2p import HERE as JS

pytestmark = [pytest.mark.network, pytest.mark.counterpart]

MODEL = "smollm2:135m"
TOOLS = "tools:latest"
"""The same weights with a chat template that knows tools."""
BRIEF = {"temperature": 0, "num_predict": 6}
HELLO = [{"role": "user", "content": "Say hello."}]
COLOUR = {"type": "string", "enum": ["red", "blue"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Place:
    """Where it all is."""

    url: str
    registry: str

    @property
    def ollama(self) -> ollama.Client:
        return ollama.Client(self.url)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)


@asynccontextmanager
async def open_place(folder: Path) -> AsyncIterator[Place]:
    environment = {
        "OMX_ORIGIN_ENABLED": "1",
        "OMX_INFERENCE_THREADS": "1",
        "OMX_INFERENCE_OLLAMA_URL": "",
        "OMX_INFERENCE_CONTEXT_LENGTH": "512",
    }
    (folder / "tools.gguf").write_bytes(templated(TOOLS_TEMPLATE))
    async with docker_registry(folder) as registry:
        environment["OMX_ORIGIN_ALLOW_PRIVATE"] = registry
        async with up(folder / "data", **environment) as said:
            node = LocalClient.find(folder / "data")
            await node.import_model(real_model(), MODEL)
            await node.import_model(folder / "tools.gguf", TOOLS)
            yield Place(f"http://{said['status']['api_address']}", registry)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'ollamamax-p2p[engine]'")
    real_model()
    with held_open(open_place(tmp_path_factory.mktemp("place"))) as opened:
        yield opened


@contextmanager
def held_open(block: AbstractAsyncContextManager[Any]) -> Iterator[Any]:
    """An async block, open on a trio of its own in a thread: pytest-trio has one loop per test."""
    opened: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def hold() -> None:
        enough = trio.Event()
        async with block as value:
            opened.put((value, trio.lowlevel.current_trio_token(), enough))
            await enough.wait()

    def run() -> None:
        try:
            trio.run(hold)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for the block
            opened.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    came = opened.get()
    if isinstance(came, BaseException):
        thread.join()
        raise came
    value, token, enough = came
    try:
        yield value
    finally:
        trio.from_thread.run_sync(enough.set, trio_token=token)
        thread.join()
    if not opened.empty():
        raise opened.get()


def seen_calls(city_twice: tuple[str, str] = ("Rome", "Paris")) -> list[dict[str, Any]]:
    """So small a model calls what it has seen called."""
    messages: list[dict[str, Any]] = []
    for city in city_twice:
        call = {"function": {"name": "weather", "arguments": {"city": city}}}
        messages += [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
        ]
    return [*messages, {"role": "user", "content": "Weather in Rome?"}]


# -- PyPI's ollama -------------------------------------------------------------------------------


def test_ollama_answers_whole_and_in_parts(place: Place) -> None:
    client = place.ollama
    whole = client.chat(MODEL, HELLO, options=BRIEF)
    parts = list(client.chat(MODEL, HELLO, options=BRIEF, stream=True))
    assert whole.message.content
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert (parts[-1].done, parts[-1].done_reason) == (True, whole.done_reason)
    assert parts[-1].eval_count == whole.eval_count > 0
    assert whole.prompt_eval_count > 0
    assert whole.total_duration > whole.eval_duration > 0
    one = client.generate(MODEL, "Once upon", raw=True, options=BRIEF)
    several = list(client.generate(MODEL, "Once upon", raw=True, options=BRIEF, stream=True))
    assert "".join(part.response for part in several) == one.response != ""
    assert one.done_reason == "length"
    assert one.eval_count == 6
    more = client.generate(MODEL, "", context=one.context, options=BRIEF)
    assert more.done


def test_ollama_constrains_counts_and_calls(place: Place) -> None:
    client = place.ollama
    told = client.generate(
        MODEL, "Name a colour.", format=COLOUR, options={"temperature": 0, "num_predict": 40}
    )
    assert json.loads(told.response) in COLOUR["enum"]
    likely = client.chat(MODEL, HELLO, options=BRIEF, logprobs=True, top_logprobs=2)
    assert "".join(each.token for each in likely.logprobs) == likely.message.content
    assert all(len(each.top_logprobs) == 2 for each in likely.logprobs)
    assert all(each.logprob <= 0 for each in likely.logprobs)
    called = client.chat(
        TOOLS, seen_calls(), tools=[WEATHER], options={"temperature": 0, "num_predict": 60}
    )
    (call,) = called.message.tool_calls
    assert call.function.name == "weather"
    assert call.function.arguments["city"] in ("Paris", "Rome")


def test_ollama_embeds_and_shows_what_is_there_and_runs(place: Place) -> None:
    client = place.ollama
    vectors = client.embed(MODEL, ["one", "two"]).embeddings
    assert [len(vector) for vector in vectors] == [576, 576]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-3)
    assert len(client.embed(MODEL, "one", dimensions=8).embeddings[0]) == 8
    assert list(client.embeddings(MODEL, "one").embedding) == pytest.approx(vectors[0], abs=1e-3)
    assert {each.model for each in client.list().models} >= {MODEL, TOOLS}
    client.generate(MODEL, keep_alive=60)
    (running,) = [each for each in client.ps().models if each.model == MODEL][:1]
    assert running.size > 50_000_000
    assert running.context_length == 512
    client.generate(MODEL, keep_alive=0)
    shown = client.show(MODEL)
    assert shown.details.family == "llama"
    assert shown.modelinfo["llama.embedding_length"] == 576
    assert "completion" in shown.capabilities


def test_ollama_makes_copies_pushes_pulls_and_deletes(place: Place) -> None:
    client, name = place.ollama, f"{place.registry}/lab/mine:1"
    digest = client.create_blob(real_model())
    made = list(client.create("mine", files={"m.gguf": digest}, system="Be brief.", stream=True))
    assert made[-1].status == "success"
    client.copy("mine", name)
    pushed = [each.status for each in client.push(name, insecure=True, stream=True)]
    assert (pushed[0], pushed[-1]) == ("retrieving manifest", "success")
    client.delete(name)
    client.delete("mine")
    assert not {name, "mine:latest"} & {each.model for each in client.list().models}
    pulled = list(client.pull(name, insecure=True, stream=True))
    assert pulled[-1].status == "success"
    assert client.show(name).model_dump()["modelfile"].count("SYSTEM Be brief.") == 1
    assert client.chat(name, HELLO, options=BRIEF).message.content
    client.delete(name)


def test_ollama_is_told_what_went_wrong(place: Place) -> None:
    client = place.ollama
    refused: list[tuple[Any, int, str]] = [
        (lambda: client.chat("none", HELLO), 404, "model 'none' not found"),
        (lambda: list(client.chat("none", HELLO, stream=True)), 404, "model 'none' not found"),
        (lambda: client.embed("none", "x"), 404, "model"),
        (lambda: client.show("none"), 404, "model 'none' not found"),
        (lambda: client.delete("none"), 404, "model 'none' not found"),
        (lambda: client.copy("none", "other"), 404, 'model "none" not found'),
        (lambda: client.chat(MODEL, HELLO, tools=[WEATHER]), 400, "does not support tools"),
        (lambda: client.chat(MODEL, HELLO, think=True), 400, "does not support thinking"),
        (lambda: client.create("x", from_="no such model"), 400, "invalid"),
        (lambda: client.pull(f"{place.registry}/lab/none:1", insecure=True), 500, "file does not"),
        (lambda: client.systemone(MODEL, "x", {}), 404, "404 page not found"),
    ]
    for work, status, words in refused:
        with pytest.raises(ollama.ResponseError, match=words) as caught:
            work()
        assert caught.value.status_code == status


# -- PyPI's openai -------------------------------------------------------------------------------


def test_openai_chats_completes_embeds_lists_and_responds(place: Place) -> None:
    client = place.openai
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    likely = whole.choices[0].logprobs.content
    assert "".join(each.token for each in likely) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("length", "stop")
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR}}
    formed = client.chat.completions.create(**asked | {"max_tokens": 40}, response_format=form)
    assert json.loads(formed.choices[0].message.content) in COLOUR["enum"]
    done = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=6, temperature=0)
    assert done.choices[0].text
    assert done.usage.completion_tokens == 6
    plain = client.embeddings.create(model=MODEL, input=["one"], encoding_format="float")
    packed = client.embeddings.create(model=MODEL, input=["one"])
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    assert {each.id for each in client.models.list()} >= {MODEL, TOOLS}
    assert client.models.retrieve(MODEL).id == MODEL
    answered = client.responses.create(
        model=MODEL, input="Say hello.", max_output_tokens=6, temperature=0
    )
    assert answered.output_text == whole.choices[0].message.content
    events = list(
        client.responses.create(
            model=MODEL, input="Say hello.", max_output_tokens=6, temperature=0, stream=True
        )
    )
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answered.output_text
    assert events[-1].type == f"response.{answered.status}"
    assert events[-1].response.usage == answered.usage


def test_openai_calls_tools_and_is_told_what_went_wrong(place: Place) -> None:
    client = place.openai
    messages: list[Any] = []
    for number, message in enumerate(seen_calls()):
        if "tool_calls" in message:
            function = message["tool_calls"][0]["function"]
            arguments = json.dumps(function["arguments"])
            call = {"id": f"c{number}", "type": "function"}
            call["function"] = {"name": function["name"], "arguments": arguments}
            message = message | {"tool_calls": [call]}
        if message["role"] == "tool":
            message = message | {"tool_call_id": f"c{number - 1}"}
        messages.append(message)
    called = client.chat.completions.create(
        model=TOOLS, messages=messages, tools=[WEATHER], temperature=0, max_tokens=60
    )
    assert called.choices[0].finish_reason == "tool_calls"
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with pytest.raises(openai.NotFoundError, match="model 'none' not found"):
        client.chat.completions.create(model="none", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.models.retrieve("none")
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])


# -- npm's ollama --------------------------------------------------------------------------------


def test_npms_ollama_drives_every_method(place: Place) -> None:
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node.js: apt install nodejs")
    if not (JS / "node_modules" / "ollama").is_dir():
        pytest.skip(f"needs npm's ollama: run `npm ci` in {JS}")
    script = Path(__file__).parent / "js" / "ask_ollama.mjs"
    if script.parent != JS:  # modules are looked for beside the script
        script = Path(shutil.copy(script, JS))
    digest = place.ollama.create_blob(real_model())
    ran = subprocess.run(
        [program, str(script), place.url, MODEL, TOOLS, place.registry, digest],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-2_000:]
    said = json.loads(ran.stdout.splitlines()[-1])  # the client prints, too
    whole = said["chat"]["message"]["content"]
    assert whole == place.ollama.chat(MODEL, HELLO, options=BRIEF).message.content
    assert "".join(part["message"]["content"] for part in said["chatParts"]) == whole
    assert "".join(each["token"] for each in said["logprobs"]) == whole
    assert json.loads(said["json"]) in COLOUR["enum"]
    assert (
        "".join(part["response"] for part in said["generateParts"]) == said["generate"]["response"]
    )
    assert said["tools"][0]["function"]["name"] == "weather"
    assert (said["embed"], said["embeddings"]) == ([576, 576], 576)
    assert MODEL in said["ps"]
    assert said["show"]["details"]["format"] == "gguf"
    assert (said["create"][-1], said["createFromFile"]) == ("success", "success")
    name = f"{place.registry}/lab/js:1"
    assert (said["push"][-1], said["pull"][-1]) == ("success", "success")
    assert name not in said["without"]
    assert name in said["with"]
    assert said["pulledSystem"] == "Be brief."
    assert "abort" in said["aborted"]
    errors = said["errors"]
    missing = {"status": 404, "message": "model 'none' not found"}
    assert [errors[each] for each in ("chat", "chatStream", "show", "delete")] == [missing] * 4
    assert errors["copy"] == {"status": 404, "message": 'model "none" not found'}
    assert errors["pull"]["message"].startswith("pull model manifest")
    assert (errors["tools"]["status"], errors["systemone"]["status"]) == (400, 404)

"""PyPI's ollama, openai and anthropic clients against a served node, over real sockets on loopback.

They are synchronous, in a thread; the node runs on trio as it does anywhere.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
import trio
from trio_websocket import open_websocket_url

from ollamamax_p2p.api import ApiServer, ApiSettings, open_api
from ollamamax_p2p.errors import CannotResume, QueueFull
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    Finish,
    GenerateRequest,
    ToolCall,
)
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.api.ram_inference import RamInference, scripted
from tests.api.ram_node import PEER, RamNode

pytestmark = pytest.mark.network

HELLO = [{"role": "user", "content": "hello"}]
SAID = whole_answer(
    ChatRequest(model="tiny", messages=(ChatMessage(role="user", content="hello"),))
)
CONTINUED = whole_answer(GenerateRequest(model="tiny", prompt="once"))
CALL = [
    Delta(tool_calls=(ToolCall(name="add", arguments={"a": 1, "b": 2}),)),
    Finish(reason="stop"),
]
BROKEN = [Delta(text="a"), CannotResume("its node died")]


class Serving:
    """A node that answers, and what its clients ask through."""

    def __init__(self, server: ApiServer, inference: RamInference) -> None:
        self.server = server
        self.inference = inference
        self.url = f"http://{server.address}"

    async def ask(self, work: Callable[[], Any]) -> Any:
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(work)

    @property
    def ollama(self) -> ollama.Client:
        return ollama.Client(self.url)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    @property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key="unused", max_retries=0)


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    inference = RamInference()
    settings = ApiSettings(listen="127.0.0.1:0")
    async with open_api(
        RamNode(), settings, data_dir=tmp_path, peer_id=PEER, inference=inference
    ) as server:
        yield Serving(server, inference)


# -- ollama ------------------------------------------------------------------------------------


async def test_ollamas_client_chats_and_generates(serving):
    client = serving.ollama
    whole = await serving.ask(lambda: client.chat("tiny", HELLO))
    assert whole.message.content == SAID
    streamed = await serving.ask(lambda: list(client.chat("tiny", HELLO, stream=True)))
    assert "".join(part.message.content for part in streamed) == SAID
    assert streamed[-1].done_reason == "stop"
    assert streamed[-1].eval_count == len(streamed) - 1
    one = await serving.ask(lambda: client.generate("tiny", "once", options={"num_predict": 2}))
    assert CONTINUED.startswith(one.response)
    assert one.done_reason == "length"
    parts = await serving.ask(lambda: list(client.generate("tiny", "once", stream=True)))
    assert "".join(part.response for part in parts) == CONTINUED


async def test_ollamas_client_embeds_and_lists_what_runs(serving):
    client = serving.ollama
    many = await serving.ask(lambda: client.embed("tiny", ["a", "b"]))
    assert len(many.embeddings) == 2
    old = await serving.ask(lambda: client.embeddings("tiny", "a"))
    assert list(old.embedding) == list(many.embeddings[0])
    running = await serving.ask(client.ps)
    assert [model.model for model in running.models] == ["tiny:latest"]
    assert running.models[0].expires_at.year > 2200
    await serving.ask(lambda: client.generate("tiny", keep_alive=0))
    assert not (await serving.ask(client.ps)).models


async def test_ollamas_client_gets_tool_calls_and_thoughts(serving):
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one
            b: other
        """
        return a + b

    serving.inference.parts = [Delta(thinking="hm"), *CALL]
    answer = await serving.ask(
        lambda: serving.ollama.chat("tiny", HELLO, tools=[add], think=True, format="json")
    )
    assert answer.message.thinking == "hm"
    assert answer.message.tool_calls[0].function.arguments == {"a": 1, "b": 2}
    seen = serving.inference.seen[-1]
    assert seen.tools[0]["function"]["name"] == "add"
    assert (seen.think, seen.format) == (True, "json")


async def test_ollamas_client_raises_what_went_wrong(serving):
    client = serving.ollama
    with pytest.raises(ollama.ResponseError, match="model 'none' not found") as missing:
        await serving.ask(lambda: client.chat("none", HELLO))
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does not support chat"):
        await serving.ask(lambda: client.chat("vectors", HELLO))
    serving.inference.parts = BROKEN
    with pytest.raises(ollama.ResponseError, match="its node died"):
        await serving.ask(lambda: list(client.chat("tiny", HELLO, stream=True)))
    serving.inference.error = QueueFull(1, 2)
    with pytest.raises(ollama.ResponseError, match="maximum pending requests") as busy:
        await serving.ask(lambda: client.generate("tiny", "x"))
    assert busy.value.status_code == 503


# -- openai ------------------------------------------------------------------------------------


async def test_openais_client_chats_and_completes(serving):
    client = serving.openai
    chat = client.chat.completions
    whole = await serving.ask(lambda: chat.create(model="tiny", messages=HELLO))
    assert whole.choices[0].message.content == SAID
    streamed = await serving.ask(
        lambda: list(
            chat.create(
                model="tiny",
                messages=HELLO,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    )
    said = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
    assert "".join(said) == SAID
    assert streamed[-1].usage.completion_tokens == whole.usage.completion_tokens
    done = await serving.ask(lambda: client.completions.create(model="tiny", prompt="once"))
    assert done.choices[0].text == CONTINUED


async def test_openais_client_gets_tool_calls(serving):
    serving.inference.parts = CALL
    chat = serving.openai.chat.completions
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    whole = await serving.ask(lambda: chat.create(model="tiny", messages=HELLO, tools=tools))
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"a":1,"b":2}'


async def test_openais_client_embeds_and_lists(serving):
    client = serving.openai
    plain = await serving.ask(
        lambda: client.embeddings.create(model="tiny", input="a", encoding_format="float")
    )
    packed = await serving.ask(lambda: client.embeddings.create(model="tiny", input="a"))
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    models = await serving.ask(lambda: list(client.models.list()))
    assert {model.id for model in models} == {"tiny:latest", "vectors:latest"}
    assert (await serving.ask(lambda: client.models.retrieve("tiny"))).owned_by == "library"


async def test_openais_client_uses_responses(serving):
    responses = serving.openai.responses
    whole = await serving.ask(lambda: responses.create(model="tiny", input="hello"))
    assert whole.output_text == SAID

    def stream():
        with responses.stream(model="tiny", input="hello") as events:
            for _ in events:
                pass
            return events.get_final_response()

    assert (await serving.ask(stream)).output_text == SAID


async def test_openais_client_raises_what_went_wrong(serving):
    chat = serving.openai.chat.completions
    with pytest.raises(openai.NotFoundError, match="model 'none' not found"):
        await serving.ask(lambda: chat.create(model="none", messages=HELLO))
    with pytest.raises(openai.BadRequestError, match="too short"):
        await serving.ask(lambda: chat.create(model="tiny", messages=[]))
    serving.inference.parts = BROKEN
    with pytest.raises(openai.APIError, match="its node died"):
        await serving.ask(lambda: list(chat.create(model="tiny", messages=HELLO, stream=True)))


# -- anthropic ---------------------------------------------------------------------------------


async def test_anthropics_client_asks_and_streams(serving):
    messages = serving.anthropic.messages
    whole = await serving.ask(lambda: messages.create(model="tiny", max_tokens=100, messages=HELLO))
    assert whole.content[0].text == SAID

    def stream():
        with messages.stream(model="tiny", max_tokens=100, messages=HELLO) as events:
            return events.get_final_message()

    final = await serving.ask(stream)
    assert (final.content[0].text, final.stop_reason) == (SAID, "end_turn")
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_anthropics_client_gets_tool_calls_and_errors(serving):
    messages = serving.anthropic.messages
    with pytest.raises(anthropic.NotFoundError, match="model 'none' not found"):
        await serving.ask(lambda: messages.create(model="none", max_tokens=9, messages=HELLO))
    serving.inference.parts = CALL

    def stream():
        with messages.stream(model="tiny", max_tokens=9, messages=HELLO) as events:
            return events.get_final_message()

    final = await serving.ask(stream)
    assert (final.stop_reason, final.content[0].input) == ("tool_use", {"a": 1, "b": 2})


# -- sockets that go ---------------------------------------------------------------------------


async def test_a_connection_that_is_cut_stops_the_engine(serving):
    serving.inference.backends = (scripted(token_s=30.0),)
    host, _, port = serving.server.address.rpartition(":")
    body = b'{"model":"tiny","prompt":"hello"}'
    head = f"POST /api/generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with trio.fail_after(30):
        stream = await trio.open_tcp_stream(host, int(port))
        await stream.send_all(head.encode() + body)
        received = b""
        while b'"done":false' not in received:
            received += await stream.receive_some()
        left = serving.inference.left
        await stream.aclose()
        await left.wait()
    assert serving.inference.backends[0].cancelled == 1


async def test_a_websocket_answers_over_a_real_connection(serving):
    url = f"ws://{serving.server.address}/api/ws"
    with trio.fail_after(30):
        async with open_websocket_url(url) as socket:
            await socket.send_message('{"id":"1","type":"generate","model":"tiny","prompt":"once"}')
            frames = []
            while '"done"' not in (frames[-1] if frames else "").partition("line")[0]:
                frames.append(await socket.get_message())
    assert len(frames) > 3

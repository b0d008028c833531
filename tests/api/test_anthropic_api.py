"""Anthropic's Messages."""

import base64

import pytest

from ollamamax_p2p.errors import CannotResume, QueueFull
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    Finish,
    Options,
    ToolCall,
    Usage,
)
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.api.asgi import open_asgi
from tests.api.ram_inference import RamInference

BODY = {
    "model": "tiny",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hello"}],
}
SAID = whole_answer(
    ChatRequest(model="tiny", messages=(ChatMessage(role="user", content="hello"),))
)


async def test_a_message_is_streamed_as_anthropic_does(autojump_clock):
    async with open_asgi() as client:
        events = (await client.post("/v1/messages", BODY | {"stream": True})).events()
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    texts = [data["delta"]["text"] for name, data in events if name == "content_block_delta"]
    assert "".join(texts) == SAID
    assert events[-2][1]["delta"] == {"stop_reason": "end_turn"}
    assert events[-2][1]["usage"]["output_tokens"] == len(texts)
    assert all(data["type"] == name for name, data in events)


async def test_a_message_is_answered_whole(autojump_clock):
    async with open_asgi() as client:
        answer = (await client.post("/v1/messages", BODY | {"max_tokens": 2})).json()
    assert answer["id"].startswith("msg_")
    assert answer["stop_reason"] == "max_tokens"
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert SAID.startswith(answer["content"][0]["text"])


async def test_thoughts_and_tool_calls_are_blocks(autojump_clock):
    call = ToolCall(name="f", arguments={"a": 1}, id="call_1")
    parts = [
        Delta(thinking="h"),
        Delta(thinking="m"),
        Delta(text="so"),
        Delta(tool_calls=(call, ToolCall(name="g", arguments={}, id="call_2"))),
        Finish(reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2)),
    ]
    async with open_asgi(RamInference(parts=parts)) as client:
        events = (await client.post("/v1/messages", BODY | {"stream": True})).events()
        whole = (await client.post("/v1/messages", BODY)).json()
    starts = [data for name, data in events if name == "content_block_start"]
    stops = [data["index"] for name, data in events if name == "content_block_stop"]
    assert [start["content_block"]["type"] for start in starts] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ]
    assert [start["index"] for start in starts] == stops == [0, 1, 2, 3]
    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    assert {"type": "input_json_delta", "partial_json": '{"a":1}'} in deltas
    assert events[-2][1]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert whole["content"][2] == {
        "type": "tool_use",
        "id": "call_1",
        "name": "f",
        "input": {"a": 1},
    }


async def test_every_field_reaches_the_engine(autojump_clock):
    picture = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"p").decode()}
    body = {
        "model": "tiny",
        "max_tokens": 7,
        "system": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image", "source": picture},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "42"},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop_sequences": ["x"],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "ignored"},
    }
    async with open_asgi() as client:
        assert (await client.post("/v1/messages", body)).status == 200
        seen = client.inference.seen[0]
    assert seen == ChatRequest(
        model="tiny",
        messages=(
            ChatMessage(role="system", content="be short"),
            ChatMessage(role="user", content="look", images=(b"p",)),
            ChatMessage(
                role="assistant",
                thinking="hm",
                tool_calls=(ToolCall(name="f", arguments={"a": 1}, id="t1"),),
            ),
            ChatMessage(role="tool", content="42", tool_call_id="t1"),
            ChatMessage(role="user", content="and?"),
        ),
        options=Options(num_predict=7, temperature=0.5, top_p=0.9, top_k=3, stop=("x",)),
        tools=(
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
            },
        ),
        think=True,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is required and must be positive"),
        ({"model": None}, "model is required"),
        ({"messages": []}, "messages is required"),
        ({"messages": [{"role": "user", "content": 7}]}, "content must be a string"),
        ({"messages": [{"content": [{"type": "image"}]}]}, "invalid image source"),
        ({"messages": [{"content": [{"type": "tool_use"}]}]}, "tool_use block missing required"),
        ({"tools": [{}]}, "a tool needs a name"),
    ],
)
async def test_a_bad_body_gets_anthropics_envelope(autojump_clock, change, message):
    async with open_asgi() as client:
        reply = await client.post("/v1/messages", BODY | change)
    found = reply.json()
    assert (reply.status, found["type"]) == (400, "error")
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["message"].startswith(message)
    assert found["request_id"].startswith("req_")


async def test_a_full_queue_is_an_overload(autojump_clock):
    async with open_asgi(RamInference(error=QueueFull(1, 2))) as client:
        reply = await client.post("/v1/messages", BODY)
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    assert reply.json()["error"]["type"] == "overloaded_error"


async def test_an_answer_that_breaks_off_ends_with_an_error_event(autojump_clock):
    parts = [Delta(text="a"), CannotResume("its node died")]
    async with open_asgi(RamInference(parts=parts)) as client:
        name, data = (await client.post("/v1/messages", BODY | {"stream": True})).events()[-1]
    assert name == "error"
    assert data["error"]["type"] == "api_error"
    assert "its node died" in data["error"]["message"]

"""OpenAI's chat completions, completions, embeddings, models and responses."""

import base64
import struct

import pytest

from ollamamax_p2p.errors import BackendFailed, CannotResume
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    Finish,
    GenerateRequest,
    Logprob,
    Options,
    ToolCall,
    Usage,
)
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.api.asgi import open_asgi
from tests.api.ram_inference import RamInference, scripted

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SAID = whole_answer(
    ChatRequest(model="tiny", messages=(ChatMessage(role="user", content="hello"),))
)
CALL = ToolCall(name="f", arguments={"x": 1.0, "y": "<"}, id="call_abcdefgh")
CALLS = [
    Delta(thinking="hm"),
    Delta(text="so"),
    Delta(tool_calls=(CALL,)),
    Finish(reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=4)),
]
PIXEL = base64.b64encode(b"png").decode()


async def test_a_chat_is_streamed_as_openai_does(autojump_clock):
    async with open_asgi() as client:
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        reply = await client.post("/v1/chat/completions", body)
    assert reply.headers["content-type"] == "text/event-stream"
    events = [data for _, data in reply.events()]
    assert events[-1] == "[DONE]"
    *chunks, last, usage = events[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta["content"] for delta in deltas) == SAID
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(chunks)
    assert len({(event["id"], event["created"]) for event in events[:-1]}) == 1


async def test_a_chat_is_answered_whole(autojump_clock):
    async with open_asgi() as client:
        reply = await client.post("/v1/chat/completions", CHAT | {"max_tokens": 2})
    assert reply.headers["content-type"] == "application/json"
    answer = reply.json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert SAID.startswith(answer["choices"][0]["message"]["content"])
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 2


async def test_tool_calls_end_with_their_reason(autojump_clock):
    async with open_asgi(RamInference(parts=CALLS)) as client:
        reply = await client.post("/v1/chat/completions", CHAT | {"stream": True})
        whole = (await client.post("/v1/chat/completions", CHAT)).json()["choices"][0]
    chunks = [data["choices"][0] for _, data in reply.events()[:-1]]
    assert chunks[0]["delta"]["reasoning"] == "hm"
    expected = {
        "id": "call_abcdefgh",
        "index": 0,
        "type": "function",
        "function": {"name": "f", "arguments": r'{"x":1,"y":"\u003c"}'},
    }
    assert chunks[2]["delta"] == {"content": "", "tool_calls": [expected]}
    assert chunks[-1]["finish_reason"] == "tool_calls"
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"] == {
        "role": "assistant",
        "content": "so",
        "reasoning": "hm",
        "tool_calls": [expected],
    }


async def test_every_field_of_a_chat_reaches_the_engine(autojump_clock):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    body = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "be short"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
                ],
            },
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ],
        "max_tokens": 5,
        "seed": 7,
        "stop": "end",
        "temperature": 0,
        "frequency_penalty": 0.5,
        "presence_penalty": 1,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "reasoning_effort": "xhigh",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "logprobs": True,
        "top_logprobs": 3,
        "tool_choice": "auto",
        "user": "ignored",
    }
    async with open_asgi() as client:
        await client.post("/v1/chat/completions", body)
        seen = client.inference.seen[0]
    assert seen == ChatRequest(
        model="tiny",
        messages=(
            ChatMessage(role="system", content="be short"),
            ChatMessage(role="user", content="look", images=(b"png",)),
            ChatMessage(
                role="assistant",
                thinking="hm",
                tool_calls=(ToolCall(name="f", arguments={"a": 1}, id="c1"),),
            ),
            ChatMessage(role="tool", content="42", tool_name="f", tool_call_id="c1"),
        ),
        options=Options(
            num_predict=5,
            seed=7,
            stop=("end",),
            temperature=0.0,
            top_p=1.0,
            frequency_penalty=0.5,
            presence_penalty=1.0,
        ),
        format={"type": "object"},
        think="max",
        tools=({"type": "function", "function": {"name": "f"}},),
        logprobs=True,
        top_logprobs=3,
    )


async def test_a_prompt_is_continued(autojump_clock):
    request = GenerateRequest(model="tiny", prompt="once")
    body = {"model": "tiny", "prompt": "once", "stop": ["a", "b"]}
    async with open_asgi() as client:
        whole = (await client.post("/v1/completions", body)).json()
        reply = await client.post("/v1/completions", body | {"stream": True})
        seen = client.inference.seen[0]
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"] == whole_answer(request)
    *chunks, done = [data for _, data in reply.events()]
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole_answer(request)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert seen.options.stop == ("a", "b")


async def test_logprobs_are_in_the_choice(autojump_clock):
    parts = [
        Delta(text="a", logprobs=(Logprob(token="a", logprob=-0.25, bytes=(97,)),)),
        Finish(reason="stop"),
    ]
    expected = {"content": [{"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": []}]}
    async with open_asgi(RamInference(parts=parts)) as client:
        for body in (CHAT | {"logprobs": True}, {"model": "tiny", "prompt": "x", "logprobs": 1}):
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            whole = (await client.post(path, body)).json()["choices"][0]
            assert whole["logprobs"] == expected
            reply = await client.post(path, body | {"stream": True})
            assert reply.events()[0][1]["choices"][0]["logprobs"] == expected


async def test_vectors_come_as_numbers_or_in_base64(autojump_clock):
    body = {"model": "tiny", "input": ["a", "b"]}
    async with open_asgi() as client:
        plain = (await client.post("/v1/embeddings", body)).json()
        packed = await client.post("/v1/embeddings", body | {"encoding_format": "base64"})
    data = base64.b64decode(packed.json()["data"][1]["embedding"])
    assert [entry["index"] for entry in plain["data"]] == [0, 1]
    assert struct.unpack("<8f", data) == pytest.approx(plain["data"][1]["embedding"])
    assert plain["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


async def test_models_are_listed_and_found(autojump_clock):
    async with open_asgi() as client:
        listed = (await client.ask("GET", "/v1/models")).json()
        one = await client.ask("GET", "/v1/models/tiny")
        none = await client.ask("GET", "/v1/models/other/none")
    expected = {
        "id": "tiny:latest",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "library",
    }
    assert listed["data"][0] == expected
    assert one.json() == expected | {"id": "tiny"}
    assert none.status == 404
    assert none.json()["error"]["type"] == "not_found_error"


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "[] is too short - 'messages'"),
        ({"model": ""}, "model is required"),
        ({"messages": [{"role": "user"}]}, "invalid message content type: <nil>"),
        ({"messages": [{"role": "user", "content": 7}]}, "invalid message content type: float64"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "invalid message format"),
        (
            {"messages": [{"content": [{"type": "image_url", "image_url": "http://x/a.png"}]}]},
            "invalid image input",
        ),
        ({"reasoning_effort": "much"}, 'invalid reasoning value: "much" (must be "high", '),
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        (
            {"messages": [{"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "invalid tool call arguments",
        ),
        ({"stream": "yes"}, "json: cannot unmarshal string into Go struct field "),
    ],
)
async def test_a_bad_body_gets_openais_envelope(autojump_clock, change, message):
    async with open_asgi() as client:
        reply = await client.post("/v1/chat/completions", CHAT | change)
    error = reply.json()["error"]
    assert (reply.status, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith(message)
    assert (error["param"], error["code"]) == (None, None)


async def test_an_answer_that_breaks_off_is_an_error_and_not_an_end(autojump_clock):
    parts = [Delta(text="a"), CannotResume("its node died")]
    async with open_asgi(RamInference(parts=parts)) as client:
        reply = await client.post("/v1/chat/completions", CHAT | {"stream": True})
        whole = await client.post("/v1/chat/completions", CHAT)
    last = reply.events()[-1][1]
    assert last["error"]["type"] == "api_error"
    assert "its node died" in last["error"]["message"]
    assert reply.ended
    assert (whole.status, whole.json()["error"]["type"]) == (500, "api_error")


async def test_an_engine_that_fails_at_once_gets_a_status(autojump_clock):
    async with open_asgi(RamInference(error=BackendFailed("e", "no"))) as client:
        reply = await client.post("/v1/chat/completions", CHAT | {"stream": True})
    assert (reply.status, reply.headers["content-type"]) == (500, "application/json")


async def test_an_answer_that_moved_says_so(autojump_clock):
    async def ask(stream):
        inference = RamInference((scripted("a", fail_at=[1]), scripted("b")))
        async with open_asgi(inference) as client:
            return await client.post("/v1/chat/completions", CHAT | {"stream": stream})

    assert (await ask(True)).events()[-2][1]["omx_moved"] == 1
    whole = (await ask(False)).json()
    assert (whole["omx_moved"], whole["choices"][0]["message"]["content"]) == (1, SAID)


# -- responses -----------------------------------------------------------------------------------


async def test_a_response_is_streamed_as_openai_does(autojump_clock):
    async with open_asgi() as client:
        body = {"model": "tiny", "input": "hello", "stream": True}
        events = (await client.post("/v1/responses", body)).events()
    names = [name for name, _ in events]
    texts = [data["delta"] for name, data in events if name == "response.output_text.delta"]
    assert "".join(texts) == SAID
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(data["type"] == name for name, data in events)
    assert all(list(data) == sorted(data) for _, data in events), "as Go writes a map"
    whole = events[-1][1]["response"]
    assert whole["output"][0]["content"][0]["text"] == SAID
    assert whole["usage"]["output_tokens"] == len(texts)


async def test_thoughts_and_calls_are_items_of_a_response(autojump_clock):
    async with open_asgi(RamInference(parts=CALLS)) as client:
        body = {"model": "tiny", "input": "hello"}
        events = (await client.post("/v1/responses", body | {"stream": True})).events()
        whole = (await client.post("/v1/responses", body)).json()
    done = [data for name, data in events if name == "response.output_item.done"]
    kinds = ["reasoning", "message", "function_call"]
    assert [data["item"]["type"] for data in done] == kinds
    assert [data["output_index"] for data in done] == [0, 1, 2]
    assert [item["type"] for item in events[-1][1]["response"]["output"]] == kinds
    assert [item["type"] for item in whole["output"]] == kinds
    assert whole["output"][2]["arguments"] == r'{"x":1,"y":"\u003c"}'
    assert whole["output"][2]["call_id"] == "call_abcdefgh"


async def test_the_items_of_a_responses_input_become_messages(autojump_clock):
    body = {
        "model": "tiny",
        "instructions": "be short",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "encrypted_content": "hm"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "42"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "reasoning": {"effort": "none"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "max_output_tokens": 9,
    }
    async with open_asgi() as client:
        reply = await client.post("/v1/responses", body)
        seen = client.inference.seen[0]
    assert reply.status == 200
    assert seen.messages == (
        ChatMessage(role="system", content="be short"),
        ChatMessage(role="user", content="a"),
        ChatMessage(
            role="assistant",
            thinking="hm",
            tool_calls=(ToolCall(name="f", arguments={}, id="c"),),
        ),
        ChatMessage(role="tool", content="42", tool_call_id="c"),
    )
    assert seen.tools[0]["function"] == {"name": "f", "parameters": {"type": "object"}}
    assert (seen.think, seen.format, seen.options.num_predict) == (False, {"type": "object"}, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{}], "input[0]: input item missing required 'type' field"),
        ([{"type": "x"}], 'input[0]: unknown input item type: "x"'),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "file inputs are not"),
        (7, "json: cannot unmarshal number"),
        ([], "[] is too short"),
    ],
)
async def test_a_bad_input_is_refused(autojump_clock, given, message):
    async with open_asgi() as client:
        reply = await client.post("/v1/responses", {"model": "tiny", "input": given})
    assert reply.status == 400
    assert reply.json()["error"]["message"].startswith(message)


async def test_a_response_that_breaks_off_failed(autojump_clock):
    parts = [Delta(text="a"), CannotResume("its node died")]
    async with open_asgi(RamInference(parts=parts)) as client:
        body = {"model": "tiny", "input": "x", "stream": True}
        name, data = (await client.post("/v1/responses", body)).events()[-1]
    assert (name, data["response"]["status"]) == ("response.failed", "failed")
    assert "its node died" in data["response"]["error"]["message"]

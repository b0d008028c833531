"""Ollama's generate, chat, embed, embeddings, ps: what clients see of a swarm's answers."""

import json

import pytest
import trio

from ollamamax_p2p.errors import (
    BackendFailed,
    CannotResume,
    DeadlineExceeded,
    NoCandidate,
    QueueFull,
)
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    Finish,
    GenerateRequest,
    Logprob,
    Options,
    ToolCall,
    TopLogprob,
    Usage,
)
from ollamamax_p2p.router import QueuePlace
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.api.asgi import Reply, open_asgi
from tests.api.ram_inference import RamInference, scripted

PROMPT = GenerateRequest(model="tiny", prompt="why is the sky blue?")
SAID = whole_answer(PROMPT)


async def test_a_prompt_is_answered_line_by_line(autojump_clock):
    async with open_asgi(RamInference((scripted(token_s=0.01),))) as client:
        reply = await client.post("/api/generate", {"model": "tiny", "prompt": PROMPT.prompt})
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-ndjson")
    lines = reply.lines()
    # Each line is sent as soon as it is there; the end is there at once with the last word.
    assert len(reply.flushes) == len(lines) - 1 > 3
    assert "".join(line["response"] for line in lines) == SAID
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == "stop"
    assert lines[-1]["eval_count"] == len(lines) - 1
    assert reply.headers["omx-node"] == "ram"
    assert reply.headers["omx-backend"] == "scripted"
    assert reply.headers["omx-queued-ms"] == "0"
    assert "omx_moved" not in lines[-1]


async def test_without_streaming_the_same_comes_as_one_object(autojump_clock):
    async with open_asgi() as client:
        reply = await client.post(
            "/api/generate", {"model": "tiny", "prompt": PROMPT.prompt, "stream": False}
        )
    assert reply.headers["content-type"] == "application/json; charset=utf-8"
    assert reply.json()["response"] == SAID
    assert reply.json()["done"] is True


async def test_a_conversation_is_answered(autojump_clock):
    request = ChatRequest(model="tiny", messages=(ChatMessage(role="user", content="hello"),))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    async with open_asgi() as client:
        streamed = (await client.post("/api/chat", body)).lines()
        whole = (await client.post("/api/chat", body | {"stream": False})).json()
    said = "".join(line["message"]["content"] for line in streamed)
    assert said == whole["message"]["content"] == whole_answer(request)
    assert {line["message"]["role"] for line in streamed} == {"assistant"}


async def test_every_field_reaches_the_engine(autojump_clock):
    body = {
        "model": "tiny",
        "prompt": "p",
        "suffix": "s",
        "system": "sys",
        "template": "{{ .Prompt }}",
        "context": [1, 2],
        "format": {"type": "object", "properties": {}},
        "keep_alive": "1h30m",
        "images": ["aGk="],
        "options": {"num_ctx": 512.0, "temperature": 1, "stop": ["a"], "use_mmap": True, "no": 1},
        "think": "low",
        "truncate": False,
        "shift": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    async with open_asgi() as client:
        await client.post("/api/generate", body)
        seen = client.inference.seen[0]
    assert seen == GenerateRequest(
        model="tiny",
        prompt="p",
        suffix="s",
        system="sys",
        template="{{ .Prompt }}",
        context=(1, 2),
        format={"type": "object", "properties": {}},
        keep_alive_s=5400.0,
        images=(b"hi",),
        options=Options(num_ctx=512, temperature=1.0, stop=("a",), use_mmap=True),
        think="low",
        truncate=False,
        shift=True,
        logprobs=True,
        top_logprobs=20,
    )


async def test_null_is_as_good_as_absent(autojump_clock):
    fields = ("prompt", "suffix", "system", "template", "context", "format", "keep_alive")
    more = ("images", "options", "think", "truncate", "shift", "logprobs", "stream", "raw")
    body = {"model": "tiny"} | dict.fromkeys((*fields, *more))
    async with open_asgi() as client:
        reply = await client.post("/api/generate", body)
        assert reply.json()["done_reason"] == "load"
        message = {"role": "user", "content": None, "images": None, "tool_calls": None}
        body = {"model": "tiny", "messages": [message], "tools": None}
        assert (await client.post("/api/chat", body)).status == 200


@pytest.mark.parametrize(
    ("path", "body"), [("/api/generate", {"prompt": ""}), ("/api/chat", {"messages": []})]
)
async def test_a_request_for_nothing_loads_and_unloads(autojump_clock, path, body):
    async with open_asgi() as client:
        loaded = await client.post(path, body | {"model": "tiny", "keep_alive": 60})
        assert loaded.json()["done_reason"] == "load"
        assert loaded.headers["omx-node"] == "ram"
        assert client.inference.loads == [("tiny", 60.0, Options())]
        ps = (await client.ask("GET", "/api/ps")).json()["models"]
        assert [model["name"] for model in ps] == ["tiny:latest"]
        gone = await client.post(path, body | {"model": "tiny", "keep_alive": 0})
        assert gone.json()["done_reason"] == "unload"
        assert (await client.ask("GET", "/api/ps")).json() == {"models": []}


async def test_ps_tells_what_ollama_tells_and_where(autojump_clock):
    inference = RamInference((scripted("a"), scripted("b")))
    for backend in inference.backends:
        await backend.load("tiny")
    async with open_asgi(inference) as client:
        reply = await client.ask("GET", "/api/ps")
    first, second = reply.json()["models"]
    assert list(first) == [
        "name",
        "model",
        "size",
        "digest",
        "details",
        "expires_at",
        "size_vram",
        "context_length",
        "omx_node",
        "omx_backend",
    ]
    assert first["digest"] == "ab" * 32
    assert first["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "135M",
        "quantization_level": "Q8_0",
        "context_length": 2048,
        "embedding_length": 8,
    }
    assert int(first["expires_at"][:4]) > 2200, "it stays for ever"
    assert (first["omx_backend"], second["omx_backend"]) == ("a", "b")


async def test_vectors_are_given_for_one_text_and_for_many(autojump_clock):
    async with open_asgi() as client:
        one = (await client.post("/api/embed", {"model": "tiny", "input": "a b"})).json()
        two = (await client.post("/api/embed", {"model": "tiny", "input": ["a b", "c"]})).json()
        old = (await client.post("/api/embeddings", {"model": "tiny", "prompt": "a b"})).json()
        cut = {"model": "tiny", "input": "a b", "dimensions": 3}
        short = (await client.post("/api/embed", cut)).json()
        none = (await client.post("/api/embed", {"model": "tiny", "input": []})).json()
    assert one["embeddings"] == [old["embedding"]] == two["embeddings"][:1]
    assert (len(two["embeddings"]), len(old["embedding"])) == (2, 8)
    assert short["embeddings"][0] == one["embeddings"][0][:3]
    assert (one["prompt_eval_count"], none["embeddings"]) == (2, [])


async def test_thoughts_tool_calls_and_logprobs_are_told(autojump_clock):
    parts = [
        Delta(thinking="hm"),
        Delta(text="<b>", logprobs=(_logprob("<b>", -0.5), _logprob("x", -1.0))),
        Delta(tool_calls=(ToolCall(name="f", arguments={"b": 1.0, "a": None}, index=0),)),
        Finish(reason="stop", usage=Usage(prompt_tokens=3), context=(1, 2)),
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "logprobs": True}
    async with open_asgi(RamInference(parts=parts)) as client:
        lines = (await client.post("/api/chat", body)).lines()
        whole = (await client.post("/api/chat", body | {"stream": False})).json()
        text = (await client.post("/api/generate", {"model": "tiny", "prompt": "?"})).lines()
    assert lines[0]["message"]["thinking"] == "hm"
    assert lines[1]["logprobs"][0] == {
        "token": "<b>",
        "logprob": -0.5,
        "bytes": [60, 98, 62],
        "top_logprobs": [{"token": "y", "logprob": -2, "bytes": [121]}],
    }
    call = lines[2]["message"]["tool_calls"][0]
    assert call["function"] == {"index": 0, "name": "f", "arguments": {"b": 1, "a": None}}
    assert call["id"].startswith("call_")
    assert len(call["id"]) == len("call_") + 8
    assert whole["message"]["thinking"] == "hm"
    assert whole["message"]["content"] == "<b>"
    assert len(whole["logprobs"]) == 2
    assert text[-1]["context"] == [1, 2]


def _logprob(token: str, logprob: float) -> Logprob:
    other = TopLogprob(token="y", logprob=-2.0, bytes=(121,))
    return Logprob(token=token, logprob=logprob, bytes=tuple(token.encode()), top_logprobs=(other,))


# -- the swarm's own -------------------------------------------------------------------------


async def test_an_answer_that_moved_says_so_and_nothing_is_lost(autojump_clock):
    inference = RamInference((scripted("a", fail_at=[2]), scripted("b")))
    async with open_asgi(inference) as client:
        body = {"model": "tiny", "prompt": PROMPT.prompt}
        lines = (await client.post("/api/generate", body)).lines()
        inference.backends[0].script.fail_at.append(2)
        whole = await client.post("/api/generate", body | {"stream": False})
    assert "".join(line["response"] for line in lines) == SAID
    assert lines[-1]["omx_moved"] == 1
    assert list(lines[-1])[-1] == "omx_moved", "after everything that Ollama has"
    assert whole.json()["response"] == SAID
    assert (whole.json()["omx_moved"], whole.headers["omx-moved"]) == (1, "1")
    assert whole.headers["omx-backend"] == "b"


async def test_headers_say_who_asks_and_how(autojump_clock):
    headers = {
        "omx-user": "ada",
        "omx-priority": "high",
        "omx-session": "s-1",
        "omx-strategy": "least-outstanding",
        "omx-deadline-ms": "1500",
    }
    async with open_asgi() as client:
        await client.post("/api/generate", {"model": "tiny", "prompt": "x"}, headers=headers)
        call = client.inference.calls[0]
    assert (call.user, call.priority, call.session) == ("ada", 2, "s-1")
    assert (call.strategy, call.deadline_s) == ("least-outstanding", 1.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("omx-user", ""),
        ("omx-user", "x" * 257),
        ("omx-user", "a\x01b"),
        ("omx-priority", "urgent"),
        ("omx-strategy", "../x"),
        ("omx-deadline-ms", "soon"),
        ("omx-deadline-ms", "0"),
        ("omx-deadline-ms", "-1"),
        ("omx-deadline-ms", "9" * 40),
    ],
)
@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions", "/v1/messages"])
async def test_a_bad_header_is_refused_in_one_line(autojump_clock, path, name, value):
    async with open_asgi() as client:
        reply = await client.post(path, {"model": "tiny"}, headers={name: value})
    assert reply.status == 400
    assert name in reply.body.decode()
    assert not client.inference.calls


async def test_the_place_in_the_queue_and_the_wait_are_told(autojump_clock):
    places = (QueuePlace(position=3, eta_s=2.0), QueuePlace(position=1, eta_s=0.5))
    async with open_asgi(RamInference(places=places, queued_s=1.25)) as client:
        reply = await client.post("/api/generate", {"model": "tiny", "prompt": "x"})
    assert reply.headers["omx-queue-position"] == "3"
    assert reply.headers["omx-queued-ms"] == "1250"


async def test_a_nodes_name_cannot_break_a_header(autojump_clock):
    async with open_asgi(RamInference(node_name="böse\r\nset-cookie: x")) as client:
        reply = await client.post("/api/generate", {"model": "tiny", "prompt": "x"})
    assert reply.headers["omx-node"] == "b?se??set-cookie:?x"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (NoCandidate("tiny", "draining"), 503, "nobody can answer for 'tiny' now: draining"),
        (DeadlineExceeded("the answer", 2), 504, "the answer did not finish within 2 s"),
        (BackendFailed("e", "broken"), 500, "back end e failed: broken"),
        (CannotResume("x"), 500, "the answer broke off: x; ask again"),
    ],
)
async def test_what_only_a_swarm_has_is_told_too(autojump_clock, error, status, text):
    async with open_asgi(RamInference(error=error)) as client:
        for path, body in (
            ("/api/generate", {"prompt": "x"}),
            ("/api/generate", {}),
            ("/api/embed", {"input": "x"}),
        ):
            reply = await client.post(path, {"model": "tiny"} | body)
            assert (reply.status, reply.json()) == (status, {"error": text})


async def test_a_full_queue_says_when_to_come_again(autojump_clock):
    async with open_asgi(RamInference(error=QueueFull(512, 7.4))) as client:
        reply = await client.post("/api/generate", {"model": "tiny", "prompt": "x"})
        openai = await client.post(
            "/v1/completions", {"model": "tiny", "prompt": "x", "stream": True}
        )
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")
    assert reply.headers["omx-queue-position"] == "513"
    assert (openai.status, openai.headers["retry-after"]) == (503, "7")


# -- clients that go, read slowly, or send much -------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_stops_the_engine_within_100_ms(autojump_clock, stream):
    inference = RamInference((scripted(token_s=0.05),))
    async with open_asgi(inference) as client, trio.open_nursery() as nursery:
        gone = trio.Event()
        body = {"model": "tiny", "prompt": PROMPT.prompt, "stream": stream}

        async def ask() -> None:
            await client.post("/api/generate", body, gone=gone)

        nursery.start_soon(ask)
        await trio.sleep(0.12)
        gone.set()
        await trio.sleep(0.1)
        assert inference.backends[0].cancelled == 1
        assert inference.backends[0].answered == 0


async def test_a_client_that_goes_while_it_waits_for_the_first_part_is_noticed(autojump_clock):
    inference = RamInference((scripted(first_token_s=60.0),))
    async with open_asgi(inference) as client, trio.open_nursery() as nursery:
        gone = trio.Event()

        async def ask() -> None:
            body = {"model": "tiny", "prompt": "x"}
            await client.post("/api/generate", body, gone=gone)

        nursery.start_soon(ask)
        await trio.sleep(1)
        gone.set()
        await trio.sleep(0.1)
        assert inference.backends[0].cancelled == 1


async def test_a_slow_reader_holds_its_own_answer_only(autojump_clock):
    inference = RamInference(parts=[*[Delta(text="x" * 10_000)] * 100, Finish(reason="stop")])
    async with open_asgi(inference) as client, trio.open_nursery() as nursery:
        reading, slow = trio.Event(), Reply()
        body = {"model": "tiny", "prompt": PROMPT.prompt}

        async def ask_slowly() -> None:
            await client.post("/api/generate", body, reading=reading, reply=slow)

        nursery.start_soon(ask_slowly)
        await trio.sleep(1)
        assert 0 < inference.said < 20, "its engine waits too"
        held = inference.said
        assert (await client.post("/api/generate", body)).lines()[-1]["done"]
        assert inference.said == held + 101
        assert not slow.flushes
        reading.set()
        await trio.sleep(1)
        assert slow.lines()[-1]["done"]
        assert inference.said == 202


async def test_a_client_that_takes_nothing_and_goes_lets_the_engine_go(autojump_clock):
    inference = RamInference((scripted(token_s=0.01),))
    async with open_asgi(inference) as client, trio.open_nursery() as nursery:
        reading, gone = trio.Event(), trio.Event()

        async def ask() -> None:
            body = {"model": "tiny", "prompt": PROMPT.prompt}
            with trio.CancelScope(shield=True):  # as the HTTP server's writes are
                await client.post("/api/generate", body, reading=reading, gone=gone)

        nursery.start_soon(ask)
        await trio.sleep(0.1)
        gone.set()
        await trio.sleep(0.1)
        assert inference.backends[0].cancelled == 1
        reading.set()


async def test_a_hundred_thousand_messages_are_answered(autojump_clock):
    messages = [{"role": "user", "content": str(number)} for number in range(100_000)]
    async with open_asgi() as client:
        reply = await client.post("/api/chat", {"model": "tiny", "messages": messages})
        assert reply.lines()[-1]["done"]
        assert len(client.inference.seen[0].messages) == 100_000
        more = await client.post("/api/chat", {"model": "tiny", "messages": [*messages, {}]})
    assert more.status == 400
    assert "100000" in more.json()["error"]


async def test_a_ten_megabyte_prompt_is_answered(autojump_clock):
    async with open_asgi() as client:
        body = {"model": "tiny", "prompt": "x" * 10_000_000}
        assert (await client.post("/api/generate", body)).lines()[-1]["done"]


async def test_a_body_beyond_the_limit_is_refused_unread(autojump_clock):
    async with open_asgi() as client:
        headers = {"content-length": str(50 * 1024 * 1024)}
        for path in ("/api/generate", "/v1/completions", "/v1/messages"):
            reply = await client.post(path, b"", headers=headers)
            assert reply.status == 413
            assert "request body too large" in reply.body.decode()


@pytest.mark.parametrize(
    "deep",
    [
        b'{"model":"tiny","prompt":"x","format":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"model":"tiny","options":{"stop":' + b"[" * 100_000,
        b"[" * 100_000,
    ],
)
async def test_deep_json_is_refused(autojump_clock, deep):
    async with open_asgi() as client:
        reply = await client.post("/api/generate", deep)
    assert reply.status == 400
    assert json.loads(reply.body)["error"]

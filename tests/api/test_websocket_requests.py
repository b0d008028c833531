"""Many requests on one WebSocket."""

import json

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamamax_p2p.api.websocket_requests import CREDITS, CREDITS_MAX, REQUESTS_MAX
from ollamamax_p2p.errors import CannotResume, ModelNotFound, QueueFull
from ollamamax_p2p.inference.core.requests import Delta, Finish, GenerateRequest
from ollamamax_p2p.observability import Event
from ollamamax_p2p.router import QueuePlace
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.api.asgi import open_asgi
from tests.api.ram_inference import RamInference, scripted

ASK = {"id": "1", "type": "generate", "model": "tiny", "prompt": "hello"}
SAID = whole_answer(GenerateRequest(model="tiny", prompt="hello"))


async def test_a_prompt_is_answered_delta_by_delta(autojump_clock):
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say(ASK)
        start, *deltas, done = await socket.until_done("1")
    assert start == {
        "id": "1",
        "type": "start",
        "node": "ram",
        "backend": "scripted",
        "queued_ms": 0,
    }
    assert "".join(frame["line"]["response"] for frame in deltas) == SAID
    assert {frame["type"] for frame in deltas} == {"delta"}
    assert done["line"]["done_reason"] == "stop"


async def test_chat_embed_load_and_unload_are_answered_too(autojump_clock):
    messages = [{"role": "user", "content": "hello"}]
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say({"id": "c", "type": "chat", "model": "tiny", "messages": messages})
        chat = await socket.until_done("c")
        await socket.say({"id": "e", "type": "embed", "model": "tiny", "input": ["a", "b"]})
        (embed,) = await socket.until_done("e")
        await socket.say({"id": "l", "type": "chat", "model": "tiny"})
        (load,) = await socket.until_done("l")
        await socket.say({"id": "u", "type": "generate", "model": "tiny", "keep_alive": 0})
        (unload,) = await socket.until_done("u")
        await socket.say({"id": "n", "type": "embed", "model": "tiny"})
        (nothing,) = await socket.until_done("n")
    assert chat[1]["line"]["message"]["role"] == "assistant"
    assert len(embed["line"]["embeddings"]) == 2
    assert load["line"]["done_reason"] == "load"
    assert unload["line"]["done_reason"] == "unload"
    assert nothing["line"]["embeddings"] == []


async def test_answers_of_one_connection_come_side_by_side(autojump_clock):
    inference = RamInference((scripted(token_s=0.01),))
    async with open_asgi(inference) as client, client.websocket() as socket:
        await socket.say(*(ASK | {"id": name} for name in "abc"))
        order, done = [], 0
        while done < 3:
            frame = await socket.next()
            order.append(frame["id"])
            done += frame["type"] == "done"
    assert order != sorted(order), "none waits for another"


async def test_what_a_call_says_of_itself_reaches_the_router(autojump_clock):
    said = {"user": "ada", "priority": "low", "session": "s", "deadline_ms": 250}
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say(ASK | {"omx": said})
        await socket.until_done("1")
        call = client.inference.calls[0]
        await socket.say(ASK | {"omx": {"priority": "urgent"}})
        (error,) = await socket.until_done("1")
    assert (call.user, call.priority, call.session, call.deadline_s) == ("ada", 0, "s", 0.25)
    assert error["status"] == 400
    assert "omx-priority" in error["error"]


async def test_the_place_in_the_queue_is_told_while_it_waits(autojump_clock):
    class Queueing(RamInference):
        def answer(self, request, call):
            return self._queued(request, call)

        def _queued(self, request, call):
            from contextlib import asynccontextmanager

            @asynccontextmanager
            async def queued():
                for position in (3, 2, 1):
                    call.on_queue(QueuePlace(position=position, eta_s=position * 0.5))
                    await trio.sleep(0.5)
                async with RamInference.answer(self, request, call) as answer:
                    yield answer

            return queued()

    async with open_asgi(Queueing()) as client, client.websocket() as socket:
        await socket.say(ASK)
        frames = await socket.until_done("1")
    assert [(frame["position"], frame["eta_s"]) for frame in frames[:3]] == [
        (3, 1.5),
        (2, 1),
        (1, 0.5),
    ]
    assert [frame["type"] for frame in frames[:4]] == ["queue", "queue", "queue", "start"]


async def test_a_cancel_frame_stops_the_engine(autojump_clock):
    inference = RamInference((scripted(token_s=0.05),))
    async with open_asgi(inference) as client, client.websocket() as socket:
        await socket.say(ASK, ASK | {"id": "2"})
        while (await socket.next())["type"] != "delta":
            pass
        await socket.say({"id": "1", "type": "cancel"})
        with trio.fail_after(0.1):
            while (frame := await socket.next())["type"] != "error":
                pass
        assert frame == {"id": "1", "type": "error", "status": 499, "error": "request canceled"}
        assert inference.backends[0].cancelled == 1
        await socket.until_done("2")
        await socket.say(ASK)
        assert (await socket.until_done("1"))[-1]["type"] == "done", "its id is free again"


async def test_a_request_sends_no_more_than_it_has_credits_for(autojump_clock):
    inference = RamInference(parts=[*[Delta(text="x")] * 10, Finish(reason="stop")])
    async with open_asgi(inference) as client, client.websocket() as socket:
        await socket.say(ASK | {"credits": 2})
        frames = [await socket.next() for _ in range(3)]
        assert [frame["type"] for frame in frames] == ["start", "delta", "delta"]
        with trio.move_on_after(30) as waited:
            await socket.next()
        assert waited.cancelled_caught
        await socket.say(ASK | {"id": "other"})
        await socket.until_done("other")
        await socket.say({"id": "1", "type": "credit", "credits": 7})
        for _ in range(7):
            assert (await socket.next())["type"] == "delta"
        await socket.say({"id": "1", "type": "credit", "credits": 10**9})
        assert len(await socket.until_done("1")) == 2


async def test_credits_have_a_limit(autojump_clock):
    parts = [*[Delta(text="x")] * (CREDITS_MAX + 10), Finish(reason="stop")]
    async with open_asgi(RamInference(parts=parts)) as client, client.websocket() as socket:
        await socket.say(ASK | {"credits": 2**31})
        for _ in range(CREDITS_MAX + 1):
            await socket.next()
        with trio.move_on_after(30) as waited:
            await socket.next()
        assert waited.cancelled_caught
    assert CREDITS < CREDITS_MAX


async def test_a_client_that_goes_stops_everything_it_asked_for(autojump_clock):
    inference = RamInference((scripted(token_s=0.05),))
    async with open_asgi(inference) as client:
        async with client.websocket() as socket:
            await socket.say(ASK, ASK | {"id": "2"})
            for _ in range(4):
                await socket.next()
        assert inference.backends[0].cancelled == 2


async def test_errors_are_told_with_their_status(autojump_clock):
    async with open_asgi() as client, client.websocket() as socket:
        for frame, status, text in (
            (ASK | {"model": "none"}, 404, "model 'none' not found"),
            (ASK | {"type": "embed", "model": "none", "input": "x"}, 404, "try pulling it first"),
            (ASK | {"prompt": 7}, 400, "json: cannot unmarshal number"),
            (ASK | {"type": "embed", "model": "vectors", "input": 7}, 400, "invalid input type"),
            (ASK | {"type": "chat", "model": ""}, 400, "model is required"),
            (ASK | {"type": "dance"}, 400, "a frame of type 'dance'"),
        ):
            await socket.say(frame)
            (error,) = await socket.until_done("1")
            assert (error["type"], error["status"]) == ("error", status)
            assert text in error["error"]


async def test_a_full_queue_says_when_to_come_again(autojump_clock):
    inference = RamInference(error=QueueFull(5, 2.5))
    async with open_asgi(inference) as client, client.websocket() as socket:
        await socket.say(ASK)
        (error,) = await socket.until_done("1")
    assert (error["status"], error["retry_after_s"]) == (503, 2.5)


async def test_an_answer_that_breaks_off_ends_with_an_error(autojump_clock):
    parts = [Delta(text="a"), CannotResume("its node died")]
    async with open_asgi(RamInference(parts=parts)) as client, client.websocket() as socket:
        await socket.say(ASK)
        frames = await socket.until_done("1")
    assert [frame["type"] for frame in frames] == ["start", "delta", "error"]


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "{",
        "[]",
        "7",
        '{"id":"1"}',
        '{"type":"chat"}',
        '{"id":"","type":"chat"}',
        '{"id":7,"type":"chat"}',
        json.dumps({"id": "x" * 65, "type": "chat"}),
        "[" * 60_000,  # a longer one is read in a thread, meanwhile the virtual clock jumps
    ],
)
async def test_a_malformed_frame_is_answered_and_the_connection_goes_on(autojump_clock, frame):
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say(frame)
        error = await socket.next()
        assert (error["id"], error["type"], error["status"]) == ("", "error", 400)
        await socket.say(ASK)
        assert (await socket.until_done("1"))[-1]["type"] == "done"


async def test_an_id_in_use_and_too_many_requests_are_refused(autojump_clock):
    inference = RamInference((scripted(first_token_s=60),))
    async with open_asgi(inference) as client, client.websocket() as socket:
        await socket.say(ASK, ASK)
        error = await socket.next()
        assert (error["id"], error["status"]) == ("", 400)
        assert "in use" in error["error"]
        await socket.say(*(ASK | {"id": f"n{number}"} for number in range(REQUESTS_MAX)))
        error = await socket.next()
        assert (error["id"], error["status"]) == (f"n{REQUESTS_MAX - 1}", 503)


async def test_frames_for_unknown_requests_are_nothing(autojump_clock):
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say({"id": "x", "type": "cancel"}, {"id": "x", "type": "credit", "credits": 1})
        await socket.say(ASK)
        assert (await socket.next())["id"] == "1"


async def test_a_pull_tells_its_progress(autojump_clock):
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say({"id": "p", "type": "pull", "model": "tiny"})
        *states, done = await socket.until_done("p")
        assert states[-1]["line"]["completed"] == 100
        assert done["line"]["status"] == "success"

        async def fails(name, tell):
            raise ModelNotFound(name)

        client.node.script = fails
        await socket.say({"id": "p", "type": "pull", "model": "tiny"})
        assert (await socket.until_done("p"))[-1]["status"] == 404


async def test_a_cancelled_pull_stops(autojump_clock):
    async with open_asgi() as client, client.websocket() as socket:

        async def endless(name, tell):
            await trio.sleep_forever()

        client.node.script = endless
        await socket.say({"id": "p", "type": "pull", "model": "tiny"})
        await trio.sleep(1)
        await socket.say({"id": "p", "type": "cancel"})
        await socket.until_done("p")
        await trio.sleep(1)
        assert client.node.pulls_cancelled == 1


async def test_what_happens_in_the_swarm_is_told(autojump_clock):
    async with open_asgi() as client, client.websocket() as socket:
        await socket.say({"id": "e", "type": "events", "credits": 1})
        assert (await socket.next()) == {"id": "e", "type": "start"}
        for number in range(2):
            event = Event(kind="peer.connected", at="2026-11-25T00:00:00Z", facts={"n": number})
            client.node.events.report(event)
        first = await socket.next()
        assert first["line"]["facts"] == {"n": 0}
        await socket.say({"id": "e", "type": "credit", "credits": 1})
        assert (await socket.next())["line"]["facts"] == {"n": 1}
        await socket.say({"id": "e", "type": "cancel"})
        assert (await socket.until_done("e"))[-1]["status"] == 499


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
_FRAME = st.fixed_dictionaries(
    {"type": st.sampled_from(["chat", "generate", "embed", "cancel", "credit", "pull"])},
    optional={
        "id": _ANY | st.just("1"),
        "model": _ANY | st.just("tiny"),
        "messages": _ANY,
        "prompt": _ANY,
        "input": _ANY,
        "omx": _ANY,
        "credits": _ANY,
        "options": _ANY,
    },
)


@given(frames=st.lists(_FRAME, max_size=8))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_frame_ends_the_connection_or_is_a_fault_of_ours(frames, caplog):
    async def story():
        async with open_asgi() as client, client.websocket() as socket:
            await socket.say(*frames)
            await socket.say(ASK | {"id": "last"})
            for frame in await socket.until_done("last"):
                assert frame.get("status") != 500, frame

    trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0))
    assert not caplog.records

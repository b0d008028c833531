"""Whole nodes over real libp2p on loopback that answer one another's questions."""

from contextlib import AsyncExitStack, aclosing

import pytest
import trio

from ollamamax_p2p import Call, ChatMessage, ChatRequest, Node, Options
from ollamamax_p2p.errors import (
    ModelNotFound,
    NoCandidate,
    PeerNotFound,
    PeerUnreachable,
    SwarmChanging,
)
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.router.core.messages import Terms
from ollamamax_p2p.testing import Script, ScriptedBackend, whole_answer
from tests.node.nodes import model_file, node_at, until

pytestmark = pytest.mark.network

MODEL = ServableModel(name="tiny:latest", capabilities=("completion",), can_resume=True)
QUESTION = "what is a swarm?"


def scripted(**script: float) -> ScriptedBackend:
    return ScriptedBackend((MODEL,), script=Script(load_s=0.01, first_token_s=0.01, **script))


def expected(text: str = QUESTION, **options: int) -> str:
    said = (ChatMessage(role="user", content=text),)
    return whole_answer(ChatRequest(model="tiny", messages=said, options=Options(**options)))


async def asked(node: Node, text: str = QUESTION, **options: int) -> str:
    answer = node.chat("tiny", text, options=Options(**options))
    return "".join([delta.text async for delta in answer])


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(90):
        yield


async def test_a_node_answers_with_another_nodes_engine_and_sees_all_there_is(tmp_path):
    engine = scripted(token_s=0.001)
    async with (
        node_at(tmp_path / "a", name="a", backends=[engine]) as a,
        node_at(tmp_path / "b", name="b") as b,
    ):
        assert await asked(a) == expected()  # its own engine, before there is anybody else
        await b.join([(await a.invite()).ticket])
        assert await asked(b) == expected()
        with pytest.raises(ModelNotFound):
            async for _ in b.chat("nothing", QUESTION):
                pass
        (found,) = await b.inference.swarm_models()
        assert (found.model.name, [each.node for each in found.holders]) == ("tiny:latest", ["a"])
        await until(lambda: engine.answered == 2)
        assert {each.node for each in await b.inference.nodes()} == {"a", "b"}
        # What a model of another node is made of.
        await a.import_model(model_file(tmp_path / "m.safetensors"), "other")
        with pytest.raises(ModelNotFound):
            await b.show_model("other")  # no engine of a has it, so nobody told of it


async def test_a_client_that_leaves_stops_the_engine_of_the_other_node(tmp_path):
    engine = scripted(token_s=60)
    async with (
        node_at(tmp_path / "a", backends=[engine]) as a,
        node_at(tmp_path / "b") as b,
    ):
        await b.join([(await a.invite()).ticket])
        async with aclosing(b.chat("tiny", QUESTION)) as deltas:
            async for _ in deltas:
                break
        await until(lambda: engine.cancelled == 1)


async def test_an_answer_goes_on_when_its_node_leaves_the_swarm(tmp_path):
    engines = [scripted(token_s=0.05) for _ in range(2)]
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(node_at(tmp_path / "a", name="a"))
        holders = {
            name: await stack.enter_async_context(
                node_at(tmp_path / name, name=name, backends=[engine])
            )
            for name, engine in zip("bc", engines, strict=True)
        }
        ticket = (await a.invite(uses=2)).ticket
        for node in holders.values():
            await node.join([ticket])
        await until(lambda: len(a._now.connections.peers()) == 2)
        assert await asked(a) == expected()
        words: list[str] = []
        request = ChatRequest(model="tiny", messages=(ChatMessage(role="user", content="go on"),))
        async with a.inference.answer(request, Call()) as answer:
            async for part in answer:
                words.append(getattr(part, "text", ""))
                if len(words) == 2:
                    await holders[answer.server.node].leave()
            assert len({server.node for server in answer.servers}) == 2
        assert "".join(words) == expected("go on")


async def test_an_answer_that_is_under_way_when_its_own_node_moves_is_told_so(tmp_path):
    async with (
        node_at(tmp_path / "a") as a,
        node_at(tmp_path / "b", backends=[scripted(token_s=60)]) as b,
    ):
        ticket = (await a.invite()).ticket
        failures: list[Exception] = []

        async def ask_and_see(task_status: trio.TaskStatus[None]) -> None:
            try:
                async for _ in b.chat("tiny", QUESTION):
                    task_status.started()
            except SwarmChanging as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            await nursery.start(ask_and_see)
            await b.join([ticket])
        assert len(failures) == 1


async def test_a_drained_node_is_left_alone_also_after_it_moved(tmp_path):
    async with (
        node_at(tmp_path / "a", name="a") as a,
        node_at(tmp_path / "b", name="b", backends=[scripted(token_s=0.001)]) as b,
    ):
        await b.inference.drain("b", True)
        await b.join([(await a.invite()).ticket])
        await until(lambda: a._now.connections.peers())
        with pytest.raises(PeerNotFound):
            await a.inference.drain("nobody", True)
        with pytest.raises(NoCandidate, match="drained"):
            await asked(a)
        await a.inference.drain("b", False)
        (_, seen) = await b.inference.nodes()
        assert not seen.draining
        with trio.fail_after(20):
            while True:
                try:
                    assert await asked(a) == expected()
                    return
                except NoCandidate:
                    await trio.sleep(0.1)


async def test_in_an_open_swarm_strangers_neither_use_an_engine_nor_are_asked(tmp_path):
    async with (
        node_at(tmp_path / "a", name="a", open_swarm=True, backends=[scripted()]) as a,
        node_at(tmp_path / "m", name="m", open_swarm=True) as member,
        node_at(tmp_path / "s", name="s", open_swarm=True) as stranger,
    ):
        await member.join([(await a.invite()).ticket])
        await stranger.join([str(a.addresses[0])])
        assert await asked(member) == expected()
        with pytest.raises(ModelNotFound):
            await asked(stranger)
        # Nor if it asks without being told that there is anything.
        router, taken = stranger._now.router, []

        async def take(event: object) -> None:
            taken.append(event)

        request = ChatRequest(model="tiny", messages=(ChatMessage(role="user", content=QUESTION),))
        with pytest.raises(PeerUnreachable, match="its own log tells why"):
            await router._forwarding.run(a.peer_id, request, Terms(), take)
        assert taken == []

"""Requests through small swarms: who answers, what happens when they fail, what is left over."""

import contextlib

import pytest
import trio
from routers import MODEL, answered, ask, routers, scripted

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    CannotResume,
    DeadlineExceeded,
    ModelNotFound,
    NoCandidate,
    NotSupported,
    OmxError,
    QueueFull,
)
from ollamamax_p2p.inference.core.requests import EmbedRequest, Options
from ollamamax_p2p.router import Call
from ollamamax_p2p.router.settings import RouterSettings
from ollamamax_p2p.testing import whole_answer


async def test_a_node_without_the_model_is_answered_by_one_that_has_it(autojump_clock):
    async with routers([[], [scripted()]]) as swarm:
        asking, holding = swarm.nodes
        text, finish, servers = await answered(asking)
        assert text == whole_answer(ask())
        assert finish.usage.completion_tokens == len(text.split(" ")) - 1
        assert [server.peer_id for server in servers] == [holding.peer]
        assert (servers[0].node, servers[0].backend) == ("node1", "scripted")


async def test_a_node_that_has_just_come_waits_to_be_told_what_there_is(autojump_clock):
    async with routers([[], [scripted()]], settled=False) as swarm:
        text, _, _ = await answered(swarm.nodes[0])
        assert text == whole_answer(ask())


async def test_a_model_that_nobody_has_is_not_found(autojump_clock):
    async with routers([[], [scripted()]]) as swarm:
        with pytest.raises(ModelNotFound, match="'nothing'"):
            async with swarm.nodes[0].router.answer(
                ask().__class__(model="nothing", messages=ask().messages), Call()
            ):
                pass


async def test_what_a_model_cannot_do_is_said(autojump_clock):
    async with routers(
        [[], [scripted(models=(MODEL.__class__(name="e:latest", capabilities=("embedding",)),))]]
    ) as swarm:
        with pytest.raises(NotSupported, match="does not support chat"):
            async with swarm.nodes[0].router.answer(
                ask().__class__(model="e", messages=ask().messages), Call()
            ):
                pass


async def test_a_failure_before_the_first_part_is_retried_unseen(autojump_clock):
    bad, good = scripted(fail_before=100), scripted()
    async with routers([[], [bad], [good]]) as swarm:
        for number in range(10):
            text, _, servers = await answered(swarm.nodes[0], ask(f"{number}"))
            assert text == whole_answer(ask(f"{number}"))
            assert len(servers) == 1
    assert good.answered == 10


@pytest.mark.parametrize("at", [2, 3, 4])
async def test_an_answer_goes_on_elsewhere_without_a_seam(autojump_clock, at):
    """Whoever answers first breaks off after so many words."""
    one, two = scripted(fail_at=[at]), scripted(fail_at=[])
    async with routers([[], [one], [two]]) as swarm:
        one.script.fail_at = [at]
        two.script.fail_at = [at]
        text, finish, servers = await answered(swarm.nodes[0])
        assert text == whole_answer(ask())
        usage = finish.usage
        assert usage.completion_tokens == text.count(" ")
        # A word takes 10 ms, whoever says it.
        assert usage.total_ns > usage.completion_ns >= (text.count(" ") - 3) * 10_000_000
        assert len(servers) >= 2


async def test_the_node_that_answers_is_killed_midway_and_the_client_does_not_notice(
    autojump_clock,
):
    async with routers([[], [scripted()], [scripted()]]) as swarm:
        asking = swarm.nodes[0]
        words = []
        async with asking.router.answer(ask("a long story"), Call()) as answer:
            async for part in answer:
                words.append(getattr(part, "text", ""))
                if len(words) == 3:
                    by_peer = {node.peer: node for node in swarm.nodes}
                    swarm.network.kill(by_peer[answer.server.peer_id].host)
            assert len(answer.servers) == 2
        assert "".join(words) == whole_answer(ask("a long story"))


async def test_a_frozen_node_is_left_within_seconds(autojump_clock):
    async with routers([[], [scripted()], [scripted()]]) as swarm:
        began = trio.current_time()
        words = []
        async with swarm.nodes[0].router.answer(ask("freeze"), Call()) as answer:
            async for part in answer:
                words.append(getattr(part, "text", ""))
                if len(words) == 2:
                    by_peer = {node.peer: node for node in swarm.nodes}
                    swarm.network.freeze(by_peer[answer.server.peer_id].host)
        assert "".join(words) == whole_answer(ask("freeze"))
        assert trio.current_time() - began < 8


async def test_json_and_tools_are_not_gone_on_with(autojump_clock):
    one, two = scripted(fail_at=[2] * 9), scripted(fail_at=[2] * 9)
    async with routers([[], [one], [two]]) as swarm:
        for more in ({"format": "json"}, {"tools": ({"type": "function"},)}):
            with pytest.raises(CannotResume, match="cannot go on elsewhere"):
                await answered(swarm.nodes[0], ask(**more))


async def test_nobody_left_to_go_on_is_told_honestly(autojump_clock):
    async with routers([[], [scripted(fail_at=[2] * 99)]]) as swarm:
        with pytest.raises(CannotResume):
            await answered(swarm.nodes[0])


async def test_a_client_that_leaves_stops_the_engine_at_once(autojump_clock):
    backend = scripted(token_s=5)
    async with routers([[], [backend]]) as swarm:
        async with swarm.nodes[0].router.answer(ask(), Call()) as answer:
            async for _ in answer:
                break
        await trio.sleep(0.1)
        assert backend.cancelled == 1
        assert swarm.nodes[1].router.running == 0
        text, _, _ = await answered(swarm.nodes[0], ask("next"))
        assert text == whole_answer(ask("next"))


async def test_requests_beyond_the_slots_wait_and_are_told_where_they_stand(autojump_clock):
    settings = RouterSettings(ahead_per_slot=0.0, hedge=False)
    places, done = [], []

    async def one(swarm, number: int) -> None:
        call = Call(user=f"u{number}", on_queue=lambda place: places.append((number, place)))
        text, _, _ = await answered(swarm.nodes[0], ask(f"{number}"), call)
        assert text == whole_answer(ask(f"{number}"))
        done.append(number)

    async with routers([[], [scripted()]], settings=settings) as swarm:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(one, swarm, number)
        assert sorted(done) == list(range(6))
        assert max(place.position for _, place in places) == 5
        assert swarm.nodes[0].router.waiting == 0


async def test_a_full_queue_says_when_to_come_back(autojump_clock):
    settings = RouterSettings(ahead_per_slot=0.0, queue_max=8, queue_per_user_max=2, hedge=False)
    refused = []

    async def one(swarm) -> None:
        try:
            await answered(swarm.nodes[0])
        except QueueFull as error:
            refused.append(error)

    async with (
        routers([[], [scripted(token_s=10)]], settings=settings) as swarm,
        trio.open_nursery() as nursery,
    ):
        for _ in range(6):
            nursery.start_soon(one, swarm)
        await trio.sleep(1)
        assert len(refused) == 3
        assert all(error.retry_after_s > 0 for error in refused)
        nursery.cancel_scope.cancel()


async def test_a_deadline_that_cannot_be_met_ends_the_waiting(autojump_clock):
    settings = RouterSettings(ahead_per_slot=0.0, hedge=False)
    async with routers([[], [scripted(token_s=60)]], settings=settings) as swarm:
        blocking = swarm.nodes[0].router.answer(ask(), Call())
        async with blocking as answer:
            async for _ in answer:
                break
            began = trio.current_time()
            with pytest.raises(DeadlineExceeded):
                await answered(swarm.nodes[0], ask("late"), Call(deadline_s=3))
            assert trio.current_time() - began <= 3.5


async def test_a_back_end_that_hangs_is_left_for_another(autojump_clock):
    settings = RouterSettings(first_part_timeout_s=5.0, load_timeout_s=10.0)
    hanging, good = scripted(), scripted()
    async with routers([[], [hanging], [good]], settings=settings) as swarm:
        hanging.script.hangs = True
        for number in range(5):
            text, _, _ = await answered(swarm.nodes[0], ask(f"{number}"))
            assert text == whole_answer(ask(f"{number}"))
    assert good.answered == 5


async def test_the_slow_one_of_two_is_hedged_and_the_loser_cancelled(autojump_clock):
    settings = RouterSettings(hedge_ratio=1.0, strategy_chat="round_robin")
    one, two = scripted(load_s=0), scripted(load_s=0)
    async with routers([[], [one], [two]], settings=settings) as swarm:
        await one.load("tiny")
        await two.load("tiny")
        await trio.sleep(3)
        for number in range(40):
            await answered(swarm.nodes[0], ask(f"{number}"))
        one.script.first_token_s = 20.0
        began = trio.current_time()
        for number in range(4):
            text, _, _ = await answered(swarm.nodes[0], ask(f"slow{number}"))
            assert text == whole_answer(ask(f"slow{number}"))
        assert trio.current_time() - began < 15
        await trio.sleep(1)
        assert one.cancelled >= 1
        assert one.answered + two.answered == 44


async def test_embeddings_come_from_another_node_too(autojump_clock):
    async with routers([[], [scripted()]]) as swarm:
        request = EmbedRequest(model="tiny", inputs=("a", "b"))
        vectors, server = await swarm.nodes[0].router.embed(request, Call())
        assert len(vectors.vectors) == 2
        assert server.peer_id == swarm.nodes[1].peer


async def test_loading_and_unloading_reach_the_other_node(autojump_clock):
    backend = scripted()
    async with routers([[], [backend]]) as swarm:
        router = swarm.nodes[0].router
        server = await router.load("tiny", Call())
        assert server.peer_id == swarm.nodes[1].peer
        await trio.sleep(3)
        assert [each.model.name for each in await router.running_models()] == ["tiny:latest"]
        await router.unload("tiny")
        assert await backend.loaded() == ()
        with pytest.raises(ModelNotFound):
            await router.unload("nothing")


async def test_models_of_all_nodes_are_listed_once_with_their_holders(autojump_clock):
    async with routers([[scripted()], [scripted()], []]) as swarm:
        for node in swarm.nodes:
            (model,) = await node.router.swarm_models()
            assert model.model.name == "tiny:latest"
            assert {each.node for each in model.holders} == {"node0", "node1"}


async def test_showing_asks_a_node_that_has_it(autojump_clock):
    async with routers([[], [scripted()]]) as swarm:
        assert await swarm.nodes[0].router.show("tiny", verbose=False) == b"tiny of node1"
        with pytest.raises(ModelNotFound):
            await swarm.nodes[0].router.show("nothing", verbose=False)


async def test_a_drained_node_finishes_what_it_has_and_gets_nothing_new(autojump_clock):
    one, two = scripted(), scripted()
    async with routers([[], [one], [two]]) as swarm:
        await swarm.nodes[1].router.drain("node1", True)
        for number in range(6):
            await answered(swarm.nodes[0], ask(f"{number}"))
        assert (one.answered, two.answered) == (0, 6)
        await swarm.nodes[0].router.drain("node2", True)
        await trio.sleep(3)
        with pytest.raises(NoCandidate, match="drained"):
            await answered(swarm.nodes[0])
        await swarm.nodes[0].router.drain(swarm.nodes[1].peer, False)
        await trio.sleep(3)
        await answered(swarm.nodes[0])
        assert one.answered == 1


async def test_a_strategy_by_name_and_one_that_is_none(autojump_clock):
    async with routers([[], [scripted()]]) as swarm:
        await answered(swarm.nodes[0], call=Call(strategy="round_robin"))
        with pytest.raises(OmxError, match="there is no strategy"):
            await answered(swarm.nodes[0], call=Call(strategy="luck"))


async def test_a_hundred_clients_that_come_and_go_leave_nothing_behind(autojump_clock):
    backends = [scripted(slots=2), scripted(slots=2, fail_before=7)]

    async def one(swarm, number: int) -> None:
        with trio.move_on_after(number % 7 / 2):
            with contextlib.suppress(BackendFailed, BackendUnavailable):
                await answered(swarm.nodes[0], ask(f"{number}"))

    async with routers([[], *[[each] for each in backends]]) as swarm:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, swarm, number)
                await trio.sleep(0.05)
        await trio.sleep(2)
        router = swarm.nodes[0].router
        assert router.waiting == 0
        assert router._chooser._calls == {}
        assert router._chooser._attempts == {}
        assert [node.router.running for node in swarm.nodes] == [0, 0, 0]
        assert all(not line.calls for line in router._forwarding._lines.values())
        text, _, _ = await answered(swarm.nodes[0], ask("after", options=Options(num_predict=4)))
        assert text.count(" ") == 4

"""Back ends that hang, fail, break off, talk nonsense or for ever, or lie, behind a whole router:
clients are answered by others, the bad one is left alone, and nothing is left behind.
"""

import gc
from collections import Counter
from contextlib import AsyncExitStack

import pytest
import trio

from ollamamax_p2p.inference import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import ChatMessage, ChatRequest, Delta
from ollamamax_p2p.router import Call
from ollamamax_p2p.router.settings import RouterSettings
from ollamamax_p2p.testing import ScriptedBackend
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.inference.processes import children, open_files
from tests.inference.test_hostile_servers import (
    DEEP,
    GOOD,
    answer,
    chunked,
    hangs,
    never_ends,
    openai,
    resets,
    says,
    server,
    then_hangs,
)
from tests.router.routers import MODEL, answered, ask, routers, scripted

SETTINGS = RouterSettings(hedge=False, first_part_timeout_s=2.0, load_timeout_s=2.0)


@pytest.mark.parametrize(
    "trouble",
    [{"gone": True}, {"hangs": True}, {"fail_before": 10**9}, {"fail_at": [1] * 10_000}],
    ids=lambda trouble: next(iter(trouble)),
)
async def test_a_bad_back_end_is_left_alone_and_used_again_once_it_is_well(autojump_clock, trouble):
    bad, good = scripted(), scripted()
    # Round robin goes on sending to whoever is allowed: what keeps it away is the breaker alone.
    settings = RouterSettings(
        hedge=False,
        strategy_chat="round_robin",
        first_part_timeout_s=2.0,
        load_timeout_s=2.0,
        breaker_backoff_max_s=8.0,
        gossip_interval_s=2.0,
    )
    async with routers([[], [bad], [good]], settings=settings) as swarm:
        await bad.load("tiny")
        await good.load("tiny")
        await trio.sleep(3)
        for name, value in trouble.items():
            setattr(bad.script, name, value)
        for number in range(50):
            text, _, _ = await answered(swarm.nodes[0], ask(f"{number}"))
            assert text == whole_answer(ask(f"{number}"))
            await trio.sleep(0.1)
        # The three that opened it and a handful of probes, not every other request.
        assert len(bad.seen) <= 10
        assert bad.answered == 0
        bad.script.gone = bad.script.hangs = False
        bad.script.fail_before, bad.script.fail_at = 0, []
        await trio.sleep(10)
        for number in range(10):
            await answered(swarm.nodes[0], ask(f"well{number}"))
        assert bad.answered >= 4
        router = swarm.nodes[0].router
        assert router._chooser._attempts == {}
        assert router._chooser._calls == {}


class Boaster(ScriptedBackend):
    """Says that it could work on a thousand at once and has nothing to do; does one, slowly."""

    async def loaded(self) -> tuple[LoadedModel, ...]:
        found = await super().loaded()
        return tuple(
            LoadedModel(
                name=each.name,
                digest=each.digest,
                size=each.size,
                context_length=each.context_length,
                slots=1_000,
                busy=0,
            )
            for each in found
        )


async def test_who_lies_about_its_load_does_not_get_what_it_cannot_do(autojump_clock):
    boaster = Boaster((MODEL,), slots=1)
    boaster.script.token_s = 1.0
    good = [scripted(slots=2), scripted(slots=2)]
    async with routers([[], [boaster], [good[0]], [good[1]]]) as swarm:
        for backend in (boaster, *good):
            await backend.load("tiny")
        await trio.sleep(3)
        waits: list[float] = []

        async def one(number: int) -> None:
            began = trio.current_time()
            text, _, _ = await answered(swarm.nodes[0], ask(f"{number}"))
            assert text == whole_answer(ask(f"{number}"))
            waits.append(trio.current_time() - began)

        # What it is sent before it is known takes half a minute each; it learns no second time.
        for number in range(10):
            await one(number)
        before = boaster.answered
        async with trio.open_nursery() as nursery:
            for number in range(120):
                nursery.start_soon(one, 100 + number)
                await trio.sleep(0.1)
        assert boaster.answered - before <= 120 * 0.1
        assert sorted(waits[10:])[108] < 5


# -- real servers --------------------------------------------------------------------------------

GOOD_MODEL = ServableModel(name="m", digest="", capabilities=("completion",), context_length=2048)
M = ChatRequest(model="m", messages=(ChatMessage(role="user", content="Hi"),))

BAD_SERVERS = [
    pytest.param(hangs, id="hangs"),
    pytest.param(says(answer(b"oh no", "500 Oh No")), id="500"),
    pytest.param(resets, id="resets"),
    pytest.param(says(b"\x00\x01garbage" * 50), id="garbage"),
    pytest.param(says(answer(DEEP)), id="deep"),
    pytest.param(never_ends(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536), id="no line ends"),
    pytest.param(then_hangs(b"HTTP/1.1 200 OK\r\n\r\n"), id="a head and nothing more"),
    pytest.param(says(chunked(b"data: {\n\n")), id="no JSON"),
]


@pytest.mark.network
@pytest.mark.parametrize("behave", BAD_SERVERS)
async def test_a_real_server_that_misbehaves_is_left_alone_and_leaves_nothing(behave):
    asked = Counter[str]()

    async def counted(stream: trio.SocketStream) -> None:
        asked["bad"] += 1
        await behave(stream)

    good = ScriptedBackend((GOOD_MODEL,), name="good", slots=4)
    good.script.load_s = good.script.token_s = 0.0
    settings = RouterSettings(hedge=False, strategy_chat="round_robin")
    with trio.fail_after(30):
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(server(counted))
            bad = await stack.enter_async_context(openai(url))
            swarm = await stack.enter_async_context(
                routers([[bad, good]], settings=settings, settled=False)
            )
            await swarm.nodes[0].router.look()
            await answered(swarm.nodes[0], M)
            gc.collect()
            before = (open_files(), trio.lowlevel.current_statistics().tasks_living)
            for _ in range(30):
                _, _, servers = await answered(swarm.nodes[0], M)
                assert servers[-1].backend == "good"
            await trio.testing.wait_all_tasks_blocked(0.1)
            gc.collect()
            after = (open_files(), trio.lowlevel.current_statistics().tasks_living)
            # The breaker opened at the third failure; a probe or two came after it.
            assert 3 <= asked["bad"] <= 8
            # At most a connection that was begun meanwhile, and what serves it.
            assert after[0] <= before[0] + 2
            assert after[1] <= before[1] + 2
            assert children() == []


@pytest.mark.network
async def test_a_real_server_that_talks_for_ever_is_left_when_its_client_leaves():
    left = trio.Event()

    async def talks(stream: trio.SocketStream) -> None:
        try:
            await never_ends(b"HTTP/1.1 200 OK\r\n\r\n", GOOD)(stream)
        finally:
            left.set()

    with trio.fail_after(30):
        async with (
            server(talks) as url,
            openai(url) as bad,
            routers([[bad]], settings=SETTINGS, settled=False) as swarm,
        ):
            router = swarm.nodes[0].router
            await router.look()
            count = 0
            async with router.answer(M, Call()) as parts:
                async for part in parts:
                    assert isinstance(part, Delta)
                    count += 1
                    if count == 1_000:
                        break
            await left.wait()
            assert router.running == 0
            assert router._chooser._attempts == {}

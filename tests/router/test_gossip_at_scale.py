"""Dozens of routers in one process: what gossip costs, how fast news travels, who is forgotten."""

import random
from collections import Counter

import msgspec
import pytest
import trio

from ollamamax_p2p.router.gossip import Gossip
from ollamamax_p2p.router.settings import RouterSettings
from tests.router.routers import MODEL, RouterSwarm, routers, scripted

SETTINGS = RouterSettings(gossip_interval_s=1.0, heartbeat_s=5.0, stale_s=12.0, dead_s=15.0)
NEW = msgspec.structs.replace(MODEL, name="new:latest", digest="sha256:" + "b" * 64)


@pytest.fixture
def told(monkeypatch) -> Counter[str]:
    """Messages that the routers said to one another, counted."""
    counts = Counter[str]()
    say_all = Gossip._say_all

    def counted(self, peer, messages) -> None:
        counts["messages"] += len(messages)
        say_all(self, peer, messages)

    monkeypatch.setattr(Gossip, "_say_all", counted)
    return counts


async def passed(condition, within_s: float) -> float:
    """How long it took until it is so, in virtual seconds."""
    began = trio.current_time()
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - nothing tells of all nodes' tables at once
            await trio.sleep(0.25)
    return trio.current_time() - began


def everybody_knows(swarm: RouterSwarm, model: str, count: int) -> bool:
    return all(len(node.router._table.holders(model)) == count for node in swarm.nodes)


def swarm_of(count: int):
    # As many links as a node of a large swarm has, not one to everybody.
    return routers([[scripted()] for _ in range(count)], settings=SETTINGS, settled=False, links=4)


async def messages_per_node_and_round(count: int, told: Counter[str]) -> float:
    async with swarm_of(count) as swarm:
        await passed(lambda: everybody_knows(swarm, "tiny", count), 60)
        await trio.sleep(5)
        told.clear()
        await trio.sleep(10)
        return told["messages"] / count / 10


@pytest.mark.parametrize("count", [10, 30])
async def test_a_node_tells_a_few_however_many_there_are(autojump_clock, told, count):
    # As many as it tells at a time; now and then a digest goes to one more, and is answered.
    most = SETTINGS.gossip_fanout + 2
    assert 1 <= await messages_per_node_and_round(count, told) <= most


async def test_a_new_model_is_known_to_all_within_seconds_and_who_leaves_is_forgotten(
    autojump_clock,
):
    count = 30
    async with swarm_of(count) as swarm:
        await passed(lambda: everybody_knows(swarm, "tiny", count), 60)
        holder = swarm.nodes[random.Random(1).randrange(count)]
        holder.backend._models[NEW.name] = NEW
        took_s = await passed(lambda: everybody_knows(swarm, "new", 1), 30)
        assert took_s <= 10
        swarm.network.kill(holder.host)
        others = [node for node in swarm.nodes if node is not holder]
        swarm.nodes = others
        took_s = await passed(
            lambda: all(len(node.router._nodes()) == count - 1 for node in others), 120
        )
        assert took_s <= SETTINGS.dead_s + 15
        assert everybody_knows(swarm, "new", 0)

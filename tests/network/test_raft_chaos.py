"""Raft in real processes, over py-libp2p and a bad network, while clients note all they see.

Each test breaks something round after round and then asks whether what the clients saw can have
come from one copy (`testing.linearizability`). CI runs few rounds; TESTS_CHAOS_ROUNDS=15 runs half
an hour of them, with pauses of up to 30 s.
"""

import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from ollamamax_p2p.consensus.core.messages import ConfChangeType
from tests.network.chaos import ChaosCluster, Refused, Unknown, injected, open_chaos_cluster
from tests.network.forking import Forker
from tests.network.processes import fill, small_disk

pytestmark = pytest.mark.network

ROUNDS = int(os.environ.get("TESTS_CHAOS_ROUNDS", "0"))
"""Of each test; 0: as few as CI has time for."""

PAUSES_S = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0) if ROUNDS else (0.1, 0.5, 1.5)
"""How long a process is stopped: less than an election timeout, about as long, and longer."""

MiB = 1024 * 1024


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@asynccontextmanager
async def under_load(
    forker: Forker, folder: Path, rng: random.Random, **settings
) -> AsyncIterator[ChaosCluster]:
    """A cluster whose clients ask all the time, and whose history is judged at the end."""
    async with open_chaos_cluster(forker, folder, rng, **settings) as cluster:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.run_clients)
            await cluster.operations(20)
            yield cluster
            await cluster.finish()
        print(f"{len(cluster.history)} operations, {cluster.tried} tried")  # noqa: T201


async def someone(cluster: ChaosCluster) -> int:
    """The leader half of the time, since that is who hurts; never waits for one."""
    leader = await cluster.who_leads() or min(cluster.members)
    others = sorted(cluster.members - {leader})
    return cluster.rng.choice([leader, cluster.rng.choice(others)])


async def test_killed_members_come_back_and_nobody_sees_it(forker, folder, rng) -> None:
    async with under_load(forker, folder, rng) as cluster:
        for _ in range(ROUNDS or 5):
            victim = await someone(cluster)
            await cluster.kill(victim)
            await cluster.operations(rng.randrange(5, 40))
            await cluster.start(victim)
            if rng.random() < 0.7:  # or go on before it has caught up
                await cluster.all_serve()
        await cluster.all_serve()
        for raft_id in (1, 2, 3):  # and at last all at once
            await cluster.kill(raft_id)
        await cluster.start(1, 2, 3)
        await cluster.operations(10)


# -- pauses --------------------------------------------------------------------------------------


async def test_a_frozen_leader_answers_nothing_stale_when_it_thaws(forker, folder, rng) -> None:
    """Its patient clients ask on while it is frozen; what they get, they get as it thaws."""
    async with under_load(forker, folder, rng) as cluster:
        for _ in range(ROUNDS or 8):
            leader = await cluster.leader()
            cluster.pause(leader)
            await trio.sleep(rng.choice(PAUSES_S))  # how long is what is tried here
            cluster.resume(leader)
            await cluster.operations(rng.randrange(5, 25))
        # And once for as long as it takes the others to have another leader, and to do much.
        leader = await cluster.leader()
        cluster.pause(leader)
        await cluster.leader(besides=leader)
        await cluster.operations(40)
        cluster.resume(leader)
        await cluster.operations(20)


# -- the network ---------------------------------------------------------------------------------


async def isolated(cluster: ChaosCluster) -> None:
    """Nothing reaches one, and nothing of it anybody."""
    for link in cluster.links_of(await someone(cluster)):
        link.hold()


async def deaf(cluster: ChaosCluster) -> None:
    cluster.deafen(await someone(cluster), deaf=True)


async def mute(cluster: ChaosCluster) -> None:
    cluster.deafen(await someone(cluster), deaf=False)


async def one_link_held(cluster: ChaosCluster) -> None:
    """The third is a bridge between two that do not hear each other."""
    cluster.rng.choice(list(cluster.links.values())).hold()


async def everything_held(cluster: ChaosCluster) -> None:
    for link in cluster.links.values():
        link.hold()
    await cluster.operations(15, tried=True)


async def reset(cluster: ChaosCluster) -> None:
    for link in cluster.links_of(await someone(cluster)):
        link.refuses = True
        link.cut()


async def reset_for_a_moment(cluster: ChaosCluster) -> None:
    for link in cluster.links.values():
        link.cut()


async def half_open(cluster: ChaosCluster) -> None:
    """Ended at one end only, which dials again; the other end believes in the old one."""
    for link in cluster.links_of(await someone(cluster)):
        link.half_open(dialler_knows=cluster.rng.random() < 0.5)


async def slow(cluster: ChaosCluster) -> None:
    for link in cluster.links.values():
        for way in (link.forward, link.backward):
            way.latency_s, way.jitter_s = cluster.rng.choice([(0.01, 0.05), (0.15, 0.1)])
            way.part_bytes = cluster.rng.choice([100, 1400, 65536])


async def slow_to_close(cluster: ChaosCluster) -> None:
    """Whoever is killed is noticed late."""
    for link in cluster.links.values():
        link.forward.close_delay_s = link.backward.close_delay_s = 3.0
    victim = await someone(cluster)
    await cluster.kill(victim)
    await cluster.operations(10, tried=True)
    await cluster.start(victim)


TROUBLES = [
    isolated,
    deaf,
    mute,
    one_link_held,
    everything_held,
    reset,
    reset_for_a_moment,
    half_open,
    slow,
    slow_to_close,
]


async def test_a_bad_network_costs_time_and_nothing_else(forker, folder, rng) -> None:
    troubles = [each for _ in range(ROUNDS or 1) for each in rng.sample(TROUBLES, len(TROUBLES))]
    async with under_load(forker, folder, rng) as cluster:
        for trouble in troubles:
            await trouble(cluster)
            await cluster.operations(rng.randrange(5, 30), tried=trouble is everything_held)
            cluster.heal()
            if rng.random() < 0.7:
                await cluster.all_serve()


async def test_a_member_that_hears_nobody_raises_no_term(forker, folder, rng) -> None:
    """Pre-vote: so it disturbs nobody when it is back."""
    async with under_load(forker, folder, rng) as cluster:
        for _ in range(ROUNDS or 1):
            lonely = cluster.rng.choice(sorted(cluster.members - {await cluster.leader()}))
            for link in cluster.links_of(lonely):
                link.hold()
            await cluster.until(lonely, lambda status: status["role"] == "pre_candidate")
            term = (await cluster.nodes[lonely].ask("status"))["term"]
            await cluster.operations(40)
            status = await cluster.nodes[lonely].ask("status")
            assert (status["term"], status["leader"]) == (term, 0)
            cluster.heal()
            await cluster.all_serve()


# -- disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["leader", "follower", "all"])
async def test_a_full_disk_is_survived_and_left_behind(forker, folder, rng, whose) -> None:
    with (
        small_disk(folder / "disk1", 5 * MiB) as one,
        small_disk(folder / "disk2", 5 * MiB) as two,
        small_disk(folder / "disk3", 5 * MiB) as three,
    ):
        folders = {1: one / "node", 2: two / "node", 3: three / "node"}
        async with under_load(forker, folder, rng, folders=folders) as cluster:
            cluster.value_bytes = 2000
            for _ in range(ROUNDS or 1):
                leader = await cluster.leader()
                follower = rng.choice(sorted(cluster.members - {leader}))
                full = {"leader": [leader], "follower": [follower], "all": [1, 2, 3]}[whose]
                ballast = [fill(folders[each].parent) for each in full]
                for each in full:
                    await cluster.until(each, lambda status: status["disk_is_full"])
                    if whose == "all":  # nobody can write now, and everybody can be asked
                        break
                if whose == "leader":
                    await cluster.leader(besides=leader)
                    assert (await cluster.nodes[leader].ask("status"))["role"] != "leader"
                await cluster.operations(20, tried=whose == "all")
                for each in ballast:
                    each.unlink()
                for each in full:
                    await cluster.until(each, lambda status: not status["disk_is_full"])
                await cluster.all_serve()
            cluster.value_bytes = 0


async def test_a_failed_fsync_ends_the_process_and_loses_nothing(forker, folder, rng) -> None:
    async with under_load(forker, folder, rng) as cluster:
        for _ in range(ROUNDS or 3):
            victim = await someone(cluster)
            child = cluster.nodes[victim].child
            failing = f"fdatasync:error=EIO:when={rng.randint(1, 50 if ROUNDS else 8)}"
            with injected(child.pid, failing, folder / "strace"):
                assert await cluster.wait_ended(victim) == 1
            assert "LogSyncFailed" in child.lines()[-1]["failed"]
            await cluster.start(victim)
            await cluster.all_serve()


async def test_a_leader_whose_disk_stalls_hands_over(forker, folder, rng) -> None:
    """Its heartbeats go on, so only it itself can know that it should not lead."""
    async with under_load(forker, folder, rng, disk_stall_s=1.0) as cluster:
        for _ in range(ROUNDS or 1):
            leader = await cluster.leader()
            before = (await cluster.nodes[leader].ask("status"))["disk_stalls"]
            stalling = "fdatasync:delay_enter=4000000"
            with injected(cluster.nodes[leader].child.pid, stalling, folder / "strace"):
                await cluster.leader(besides=leader)
                await cluster.until(leader, lambda status: status["role"] != "leader")
                await cluster.operations(20)
            await cluster.all_serve()
            after = (await cluster.nodes[leader].ask("status"))["disk_stalls"]
            assert after > before


# -- members -------------------------------------------------------------------------------------


async def test_members_come_and_go_while_the_network_breaks(forker, folder, rng) -> None:
    async with under_load(forker, folder, rng) as cluster:
        for new in range(4, 4 + (ROUNDS or 2)):
            old = await someone(cluster)
            voters = set(cluster.members)
            cluster.add(new)
            cluster.members.discard(new)  # no client asks it yet
            await cluster.start(new)
            trouble = rng.choice([isolated, one_link_held, half_open, reset_for_a_moment, slow])
            await trouble(cluster)
            learner = (ConfChangeType.ADD_LEARNER_NODE, new)
            await cluster.change([learner], voters=voters, learners={new})
            cluster.heal()
            await cluster.all_serve(new)
            cluster.members.add(new)
            await rng.choice([isolated, deaf, mute, reset])(cluster)
            await cluster.operations(10)
            joint = [(ConfChangeType.ADD_NODE, new), (ConfChangeType.REMOVE_NODE, old)]
            cluster.members.discard(old)
            await cluster.change(joint, voters={*voters, new} - {old}, learners=set())
            cluster.heal()
            if rng.random() < 0.5:  # a removed one that goes on disturbs nobody
                await cluster.operations(20)
            await cluster.kill(old)
            cluster.forget(old)
            await cluster.all_serve()


# -- everything ----------------------------------------------------------------------------------


async def killed(cluster: ChaosCluster) -> None:
    victim = await someone(cluster)
    await cluster.kill(victim)
    await cluster.operations(10, tried=True)
    await cluster.start(victim)


async def frozen(cluster: ChaosCluster) -> None:
    victim = await someone(cluster)
    cluster.pause(victim)
    await trio.sleep(cluster.rng.choice(PAUSES_S))
    cluster.resume(victim)


async def handed_over(cluster: ChaosCluster) -> None:
    leader = await cluster.who_leads() or min(cluster.members)
    other = cluster.rng.choice(sorted(cluster.members - {leader}))
    with suppress(Refused, Unknown):
        await cluster.nodes[leader].ask("transfer", raft_id=other)


async def test_everything_at_once_over_five_members(forker, folder, rng) -> None:
    """Faults that overlap: none is over when the next begins, but a minority is hit at a time."""
    everything = [*TROUBLES, killed, frozen, handed_over, killed, frozen]
    async with under_load(forker, folder, rng, count=5) as cluster:
        for _ in range(4 * ROUNDS or 2):
            for trouble in rng.sample(everything, 2):
                await trouble(cluster)
                await cluster.operations(rng.randrange(2, 15), tried=True)
            cluster.heal()
            if rng.random() < 0.5:
                await cluster.operations(10)

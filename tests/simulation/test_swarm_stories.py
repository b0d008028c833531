"""What becomes of a pull when a swarm misbehaves, told as stories. Times are virtual."""

import pytest
import trio

from ollamamax_p2p.errors import NoSources, NotAdmitted, OmxError, PeerUnreachable
from ollamamax_p2p.host import LinkConditions
from ollamamax_p2p.testing import (
    Lie,
    NodeDied,
    SimulatedModel,
    SimulatedNode,
    SwarmSettings,
    open_simulated_swarm,
    small_steps,
)
from ollamamax_p2p.transfer import PullProgress
from ollamamax_p2p.wire import protocol_ids

MiB = 1024 * 1024
MB = 1_000_000

SLOW = small_steps(SwarmSettings(upload_bytes_s=1 * MB, download_bytes_s=4 * MB))
"""A model of 8 MiB takes 8 s from one source: time for something to happen in the middle."""


async def hold_all(model: SimulatedModel, *nodes: SimulatedNode) -> None:
    for node in nodes:
        await node.hold(model)
    await trio.sleep(2)  # for the others to hear of it


class Pull:
    """A pull in the background, and how far it is."""

    def __init__(self, node: SimulatedNode, model: SimulatedModel) -> None:
        self.node = node
        self.model = model
        self.report = None
        self.error: Exception | None = None
        self.completed = 0
        self.notes: list[str] = []
        self._over = trio.Event()

    async def run(self) -> None:
        try:
            self.report = await self.node.pull(self.model, on_progress=self._on_progress)
        except (OmxError, NodeDied) as error:
            self.error = error
        self._over.set()

    def _on_progress(self, progress: PullProgress) -> None:
        if progress.total > MiB:
            self.completed = progress.completed
        if progress.note:
            self.notes.append(progress.note)

    async def reached(self, share: float) -> None:
        """Wait until so much is there."""
        with trio.fail_after(600):
            while self.completed < share * self.model.size:  # noqa: ASYNC110 - virtual time
                await trio.sleep(0.05)

    async def over(self) -> "Pull":
        with trio.fail_after(1200):
            await self._over.wait()
        return self


def begin_pull(nursery: trio.Nursery, node: SimulatedNode, model: SimulatedModel) -> Pull:
    pull = Pull(node, model)
    nursery.start_soon(pull.run)
    return pull


def kinds(node: SimulatedNode) -> list[str]:
    return [event.kind for event in node.events]


async def test_a_node_pulls_a_model_that_another_holds(seed):
    async with open_simulated_swarm(2, seed=seed) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        await hold_all(model, swarm.nodes[0])
        report = await swarm.nodes[1].pull(model)
        assert await swarm.nodes[1].holds(model)
        assert report.bytes_fetched == report.bytes_total == model.size
        assert report.bytes_refetched == 0


async def test_a_pull_goes_on_when_one_of_two_sources_vanishes_in_the_middle(seed):
    async with open_simulated_swarm(3, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        stays, vanishes, me = swarm.nodes
        await hold_all(model, stays, vanishes)
        async with trio.open_nursery() as nursery:
            pull = begin_pull(nursery, me, model)
            await pull.reached(0.3)
            await vanishes.kill()
            await pull.over()
        assert pull.error is None
        assert await me.holds(model)


async def test_a_pull_resumes_when_its_only_source_comes_back(seed):
    async with open_simulated_swarm(2, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        source, me = swarm.nodes
        await hold_all(model, source)
        async with trio.open_nursery() as nursery:
            pull = begin_pull(nursery, me, model)
            await pull.reached(0.5)
            await swarm.restart(source, 15)
            await pull.over()
        assert pull.error is None
        assert await me.holds(model)
        assert pull.report.bytes_refetched <= SLOW.transfer.in_flight_bytes_max


async def test_a_puller_that_is_killed_resumes_with_what_it_had(seed):
    async with open_simulated_swarm(2, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        source, me = swarm.nodes
        await hold_all(model, source)
        async with trio.open_nursery() as nursery:
            pull = begin_pull(nursery, me, model)
            await pull.reached(0.5)
            await me.kill()
            await pull.over()
        assert isinstance(pull.error, NodeDied)
        kept = await me.bytes_kept(model)
        assert kept >= 0.5 * model.size - 1000
        await me.revive()
        await swarm.settle()
        report = await me.pull(model)
        assert report.bytes_fetched == model.size - kept
        assert await me.holds(model)


async def test_a_source_that_freezes_loses_its_requests_to_another(seed):
    async with open_simulated_swarm(3, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        honest, frozen, me = swarm.nodes
        await hold_all(model, honest, frozen)
        async with trio.open_nursery() as nursery:
            pull = begin_pull(nursery, me, model)
            await pull.reached(0.2)
            swarm.trouble()
            swarm.network.freeze(frozen.host)
            await pull.over()
        assert pull.error is None
        # 8 s from one source, and the heartbeat's 7 s until the frozen one is given up.
        assert pull.report.seconds < 20


async def test_a_pull_outlives_a_flapping_source(seed):
    async with open_simulated_swarm(2, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        source, me = swarm.nodes
        await hold_all(model, source)
        async with trio.open_nursery() as nursery:
            pull = begin_pull(nursery, me, model)
            await pull.reached(0.1)
            await swarm.flap(source, 20)
            await pull.over()
        assert pull.error is None
        assert await me.holds(model)


async def test_a_pull_across_a_partition_ends_when_it_heals(seed):
    async with open_simulated_swarm(6, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        await hold_all(model, swarm.nodes[0])
        async with trio.open_nursery() as nursery:
            pulls = [begin_pull(nursery, node, model) for node in swarm.nodes[1:]]
            await pulls[-1].reached(0.2)
            await swarm.cut_off(swarm.nodes[3:], 40)
            for pull in pulls:
                await pull.over()
        assert [pull.error for pull in pulls] == [None] * 5
        for node in swarm.nodes:
            assert await node.holds(model)


NOT_PROVED = (Lie.NOTHING, Lie.PARTIAL_MAP, Lie.CHOKE, Lie.OTHER_SIZE)
"""Lies that need not cost the liar its place: nobody goes by its map, or it may be slow, misled, or
right.
"""


@pytest.mark.parametrize("lie", Lie)
async def test_a_liar_does_not_stop_a_pull_that_has_an_honest_source(seed, lie):
    async with open_simulated_swarm(3, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        honest, liar, me = swarm.nodes
        await hold_all(model, honest, liar)
        swarm.trouble()
        liar.lie(lie)
        report = await me.pull(model)
        assert await me.holds(model)
        asked = liar.liar.lies > 0
        assert asked or lie is Lie.WRONG_MAP, "chance decides between two maps"
        if asked and lie not in NOT_PROVED:
            assert report.banned == (liar.host.peer_id,)
            assert "peer.banned" in kinds(me)
        assert honest.host.peer_id not in report.banned


@pytest.mark.parametrize("lie", Lie)
async def test_liars_in_the_majority_do_not_stop_a_pull_either(seed, lie):
    async with open_simulated_swarm(5, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        honest, *liars, me = swarm.nodes
        await hold_all(model, honest, *liars)
        for liar in liars:  # whose wrong maps are all the same: a conspiracy
            swarm.trouble()
            liar.lie(lie)
        report = await me.pull(model)
        assert await me.holds(model)
        assert honest.host.peer_id not in report.banned
        assert set(report.banned) <= {liar.host.peer_id for liar in liars}
        if lie not in NOT_PROVED:
            assert report.banned


@pytest.mark.parametrize("lie", Lie)
async def test_with_only_liars_left_a_pull_ends_with_a_clear_error_and_resumes(seed, lie):
    """The honest are the majority at first, so that what is kept is right."""
    async with open_simulated_swarm(4, seed=seed, settings=SLOW) as swarm:
        model = swarm.make_model(bytes_total=8 * MiB)
        honest, other, liar, me = swarm.nodes
        await hold_all(model, honest, other, liar)
        swarm.trouble()
        liar.lie(lie)
        async with trio.open_nursery() as nursery:
            pull = begin_pull(nursery, me, model)
            await pull.reached(0.4)
            await honest.kill()
            await other.kill()
            await pull.over()
        assert isinstance(pull.error, NoSources)
        assert not await me.holds(model)
        kept = await me.bytes_kept(model)
        assert kept > 0, "what was verified is kept"
        await honest.revive()
        await trio.sleep(70)  # for the backoff, and for announcements
        report = await me.pull(model)
        assert await me.holds(model)
        assert report.bytes_fetched == model.size - kept


async def test_eight_nodes_that_pull_from_one_seed_feed_each_other(seed):
    async with open_simulated_swarm(9, seed=seed) as swarm:
        model = swarm.make_model(bytes_total=32 * MiB)
        source, *others = swarm.nodes
        await hold_all(model, source)
        before = source.host.bytes_sent
        async with trio.open_nursery() as nursery:
            pulls = [begin_pull(nursery, node, model) for node in others]
            for pull in pulls:
                await pull.over()
        assert [pull.error for pull in pulls] == [None] * 8
        for node in others:
            assert await node.holds(model)
        assert source.host.bytes_sent - before < 2.5 * model.size


async def test_a_hundred_nodes_pull_one_model(seed):
    settings = SwarmSettings(link=LinkConditions(tick_s=0.002))
    async with open_simulated_swarm(101, seed=seed, settings=settings) as swarm:
        model = swarm.make_model(bytes_total=6 * MiB)
        source, *others = swarm.nodes
        await hold_all(model, source)
        before = source.host.bytes_sent
        async with trio.open_nursery() as nursery:
            pulls = [begin_pull(nursery, node, model) for node in others]
            for pull in pulls:
                await pull.over()
        assert [pull.error for pull in pulls] == [None] * 100
        # From the one source alone: a hundred times its size, 50 s.
        assert source.host.bytes_sent - before < 10 * model.size
        assert max(pull.report.seconds for pull in pulls) < 10


async def test_a_stranger_without_the_swarms_key_gets_no_connection(seed):
    async with open_simulated_swarm(2, seed=seed) as swarm:
        stranger = swarm.network.add_host("stranger", swarm_key=b"another swarm's key".ljust(32))
        with pytest.raises(PeerUnreachable, match="handshake"):
            await stranger.connect(swarm.nodes[0].host.addresses)


async def test_a_stranger_with_the_key_but_no_membership_gets_nothing(seed):
    async with open_simulated_swarm(2, seed=seed) as swarm:
        model = swarm.make_model(bytes_total=2 * MiB)
        await hold_all(model, swarm.nodes[0])
        node = swarm.nodes[0].host
        stranger = swarm.network.add_host("stranger", swarm_key=node.swarm_key)
        await stranger.connect(node.addresses)
        for protocol in (protocol_ids.TRANSFER, protocol_ids.MODELS, protocol_ids.PROVIDERS):
            with pytest.raises(NotAdmitted):
                await stranger.open_stream(node.peer_id, protocol)
        await trio.sleep(30)
        assert stranger.connections() == (), "it proved nothing, so it was shown the door"


async def test_a_newcomer_is_served_by_those_that_have_just_finished(seed):
    async with open_simulated_swarm(3, seed=seed) as swarm:
        model = swarm.make_model(bytes_total=4 * MiB)
        source, second, third = swarm.nodes
        await hold_all(model, source)
        await second.pull(model)
        await source.kill()
        (newcomer,) = await swarm.add_nodes(1)
        await swarm.settle()
        report = await newcomer.pull(model)
        assert await newcomer.holds(model)
        assert {share.name for share in report.sources} == {second.host.peer_id}
        assert not await third.holds(model)

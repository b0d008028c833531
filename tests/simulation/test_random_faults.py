"""A swarm in which things go wrong at random: nothing is ever lost, corrupted or stuck.

Each seed draws its own schedule. The invariants are checked every virtual second by the swarm.
"""

import contextlib
import random

import pytest
import trio

from ollamamax_p2p.errors import ModelNotFound, NetworkTrouble, OmxError
from ollamamax_p2p.testing import (
    FaultSchedule,
    Lie,
    NodeDied,
    SimulatedModel,
    SimulatedNode,
    SwarmSettings,
    open_simulated_swarm,
    small_steps,
)

MiB = 1024 * 1024
MB = 1_000_000

NODES = 7
HOLDERS = 2
TROUBLE_S = 40.0
"""About as long as the pulls would take with nothing wrong: 6 MiB over links of 1 MB/s."""

SETTINGS = small_steps(SwarmSettings(upload_bytes_s=1 * MB, download_bytes_s=2 * MB))


async def pull_again_and_again(node: SimulatedNode, model: SimulatedModel) -> None:
    """As a person would: try, and when it fails with an error that may pass, try again later."""
    while not await node.holds(model):
        # ModelNotFound passes too: whoever is cut off reaches nobody who knows the name.
        with contextlib.suppress(NodeDied, NetworkTrouble, ModelNotFound):
            await node.pull(model)
        await trio.sleep(5)


@pytest.mark.seeds(20)
async def test_whatever_goes_wrong_every_pull_ends_well_once_it_is_over(seed, rng):
    await live_through(FaultSchedule.draw(rng, NODES, TROUBLE_S), NODES, seed)


@pytest.mark.seeds(1)
async def test_a_larger_swarm_lives_through_it_too(seed, rng):
    await live_through(FaultSchedule.draw(rng, 24, TROUBLE_S), 24, seed)


async def live_through(schedule: FaultSchedule, count: int, seed: int) -> None:
    """Everybody pulls from the first, while all that happens; and gets it, unless it is gone."""
    print(schedule)  # noqa: T201 - pytest shows it when the test fails
    async with open_simulated_swarm(count, seed=seed, settings=SETTINGS) as swarm:
        model = swarm.make_model(bytes_total=6 * MiB)
        holders = {*range(HOLDERS), *schedule.liar_nodes}
        for number in sorted(holders):
            await swarm.nodes[number].hold(model)
        pullers = [node for node in swarm.nodes if node.number not in holders]
        survivors = [node for node in pullers if node.number not in schedule.vanishing_nodes]
        async with trio.open_nursery() as pulling:
            for node in pullers:
                pulling.start_soon(pull_again_and_again, node, model)
            await swarm.play(schedule)
            with trio.fail_after(900):
                for node in survivors:
                    while not await node.holds(model):  # noqa: ASYNC110 - virtual time
                        await trio.sleep(1)
            pulling.cancel_scope.cancel()
        assert all(
            pull.error is None or isinstance(pull.error, OmxError)
            for pull in swarm.invariants.pulls
        )
        assert swarm.invariants.checks >= int(schedule.over_at_s)


def test_a_schedule_is_the_same_for_the_same_seed_and_keeps_its_promises():
    drawn = [FaultSchedule.draw(random.Random(seed), 9, 60, spare=2) for seed in range(300)]
    assert drawn == [FaultSchedule.draw(random.Random(seed), 9, 60, spare=2) for seed in range(300)]
    assert len(set(drawn)) > 290
    for schedule in drawn:
        assert not schedule.liar_nodes & {0, 1}
        assert not schedule.vanishing_nodes & {0, 1}
        assert all(0 <= fault.at_s <= 60 for fault in schedule.faults)
        assert list(schedule.faults) == sorted(schedule.faults, key=lambda fault: fault.at_s)
    seen = {fault.kind for schedule in drawn for fault in schedule.faults}
    assert len(seen) == 5
    assert len({lie for schedule in drawn for _, lie in schedule.liars}) == len(Lie)

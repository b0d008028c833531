"""A seed repeats a whole swarm's run, event for event, also in another process."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
import trio

from ollamamax_p2p.errors import ModelNotFound, NetworkTrouble
from ollamamax_p2p.testing import (
    FaultSchedule,
    NodeDied,
    SimulatedModel,
    SimulatedNode,
    SwarmSettings,
    open_simulated_swarm,
    run_simulation,
    small_steps,
)

MiB = 1024 * 1024


def trace_of_a_run(seed: int) -> str:
    """A digest of all that happened to every connection and pull of a swarm with faults."""
    lines: list[str] = []
    schedule = FaultSchedule.draw(random.Random(seed), 6, 15)
    settings = small_steps(SwarmSettings(upload_bytes_s=1_000_000))

    async def pull(node: SimulatedNode, model: SimulatedModel) -> None:
        try:
            report = await node.pull(model)
            lines.append(f"{trio.current_time()} {report}")
        except (NodeDied, NetworkTrouble, ModelNotFound) as error:
            lines.append(f"{trio.current_time()} {node} {error}")

    async def main() -> None:
        async with open_simulated_swarm(
            6, seed=seed, settings=settings, trace=lines.append
        ) as swarm:
            model = swarm.make_model(bytes_total=4 * MiB)
            for number in (0, *schedule.liar_nodes):
                await swarm.nodes[number].hold(model)
            async with trio.open_nursery() as nursery:
                for node in swarm.nodes:
                    nursery.start_soon(pull, node, model)
                await swarm.play(schedule)

    run_simulation(main, seed=seed)
    assert len(lines) > 100
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_same_seed_gives_the_same_run_of_a_whole_swarm():
    assert trace_of_a_run(1) == trace_of_a_run(1) != trace_of_a_run(2)


@pytest.mark.parametrize("seed", [1, 4], ids=["one", "four"])
def test_another_process_repeats_the_run(seed):
    """Whatever order its Python gives to sets of strings."""
    program = f"import test_repeatable as t; print(t.trace_of_a_run({seed}))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(seen) == 1

"""How long a client waits when whoever answers it is killed midway. Bar: p99 at most 3 s.

    python benchmarks/bench_failover.py [--json] [--kills N] [--clients N] [--seed N]

Four nodes in processes on this machine, three with the real SmolLM2-135M, one thread each. Whoever
answers is killed (SIGKILL) after a drawn number of parts, and started again on the same cores while
another goes on: it has to load the model and read all that was said. Every answer is compared with
the undisturbed one; one that differs fails the run. Also: how long engines outlive their node, at
most 2 s. Needs the demo's model (`make demo` fetches it): PYTHONPATH=.demo/model.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.content.model_files import real_model
from tests.network.dying_nodes import Round, open_dying_swarm, report

BAR_PAUSE_S = 3.0
BAR_ENGINES_S = 2.0


async def killed(kills: int, clients: int, seed: int, *, show: bool) -> list[Round]:
    with tempfile.TemporaryDirectory(prefix="omx-bench-") as folder:
        rng = random.Random(seed)
        async with open_dying_swarm(Path(folder), real_model(), rng=rng) as swarm:
            for number in range(kills):
                await swarm.ready()
                done = await swarm.round(clients=clients)
                if show:
                    moment = f"{done.victim} after {done.after_parts} parts"
                    print(f"{number:4} {moment:<24} pause {done.pause_s:.2f} s", *done.wrong)
        return swarm.rounds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=1, help="that ask at once")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    show = not given.json
    if show:
        machine = f"{platform.platform(terse=True)}, {os.cpu_count()} cores"
        print(f"{machine}, Python {platform.python_version()}")
    rounds = trio.run(lambda: killed(given.kills, given.clients, given.seed, show=show))
    measured = report(rounds)
    if given.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        print(json.dumps({"what": "failover", **measured, **machine}))
    else:
        print(json.dumps(measured, indent=2))
    missed = [
        text
        for failed, text in (
            (measured["wrong"], "answers differ from the undisturbed ones"),
            (measured["pause_s"]["p99"] > BAR_PAUSE_S, f"p99 pause above {BAR_PAUSE_S:g} s"),
            (
                measured["engines_gone_s"]["max"] > BAR_ENGINES_S,
                f"an engine outlived its node by more than {BAR_ENGINES_S:g} s",
            ),
        )
        if failed
    ]
    if missed:
        sys.exit("; ".join(missed))


if __name__ == "__main__":
    main()

"""Runs of simulated Raft clusters: one, many, again, and as short as a failure can be made.

    python -m ollamamax_p2p.testing.raft_runs --seeds 17                   # again
    python -m ollamamax_p2p.testing.raft_runs --seeds 17 --shrink --trace  # what does it take?
    python -m ollamamax_p2p.testing.raft_runs --seeds 0-9999 --steps 20000 --done soak.txt

With --done each seed that passed is noted in a file, and left out next time: so a soak can be
stopped and gone on with.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from ollamamax_p2p.testing.linearizability import LeaseModel, ValueModel, Verdict, check
from ollamamax_p2p.testing.raft_invariants import RaftInvariantBroken
from ollamamax_p2p.testing.raft_plan import Do, Plan, draw_plan
from ollamamax_p2p.testing.simulated_cluster import SimulatedCluster

STEPS = 3_000

_SHRINK_RUNS_MAX = 400
"""A run takes up to a second; whoever shrinks waits for some minutes at most."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a run ended."""

    plan: Plan
    digest: str
    """Of its trace."""
    steps: int
    elections: int
    committed: int
    answered: int
    kind: str = ""
    """What went wrong: `invariant 7`, or the name of what was raised; "" if nothing did."""
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return bool(self.kind)

    def __str__(self) -> str:
        if not self.failed:
            return f"seed {self.plan.seed}: {self.steps} steps, {self.committed} entries, passed"
        return (
            f"seed {self.plan.seed}, {self.plan.voters} voters, step {self.steps}: {self.problem}\n"
            f"replay: {replay_command(self.plan)}"
        )


def replay_command(plan: Plan) -> str:
    """What runs a plan, as it was drawn, again."""
    return (
        f"python -m ollamamax_p2p.testing.raft_runs --seeds {plan.seed} --steps {plan.steps} "
        "--shrink --trace"
    )


def run_plan(plan: Plan, trace: Callable[[str], None] | None = None) -> Report:
    """Run it, and check what its clients saw. Never raises for what it finds.

    trace: is given a line for each step.
    """
    kind = problem = ""
    cluster = SimulatedCluster(plan, trace=trace)
    try:
        cluster.run()
        problem = _not_linearizable(cluster)
        kind = "linearizability" if problem else ""
    except RaftInvariantBroken as error:
        kind, problem = f"invariant {error.number}", str(error)
    except Exception as error:  # noqa: BLE001 - whatever the product raises here is what is sought
        kind, problem = type(error).__name__, f"{type(error).__name__}: {error}"
    return Report(
        plan,
        cluster.digest,
        cluster.step,
        cluster.invariants.elections,
        cluster.invariants.last_committed,
        len(cluster.history),
        kind,
        problem,
    )


def _not_linearizable(cluster: SimulatedCluster) -> str:
    leases = [each for each in cluster.history if str(each.key).startswith("lease ")]
    values = [each for each in cluster.history if not str(each.key).startswith("lease ")]
    for finding in (*check(values, ValueModel()), *check(leases, LeaseModel())):
        if finding.verdict is Verdict.NOT_LINEARIZABLE:
            return str(finding)
    return ""


def run_seed(seed: int, steps: int = STEPS) -> Report:
    """The run of a seed. Its plan is left out of the report but for what names it."""
    report = run_plan(draw_plan(seed, steps))
    return replace(report, plan=replace(report.plan, actions=()))


def _run_seed(job: tuple[int, int]) -> Report:
    return run_seed(*job)


def run_seeds(seeds: Iterable[int], steps: int = STEPS, workers: int = 2) -> Iterator[Report]:
    """Of many seeds, in their order, in processes of their own; each depends on its seed only."""
    jobs = [(seed, steps) for seed in seeds]
    if workers == 1 or len(jobs) < 2:
        yield from map(_run_seed, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_run_seed, jobs)


# -- shrinking ---------------------------------------------------------------------------------


def shrink(report: Report, runs_max: int = _SHRINK_RUNS_MAX) -> Report:
    """A shorter plan that fails in the same way: fewer steps, fewer actions (Zeller's delta
    debugging, 1999), and no trouble of the network that is not needed.
    """
    runs = 0

    def fails(plan: Plan) -> Report | None:
        nonlocal runs
        if runs >= runs_max:
            return None
        runs += 1
        found = run_plan(plan)
        return found if found.kind == report.kind else None

    best = report
    if report.steps < report.plan.steps:
        best = fails(replace(report.plan, steps=report.steps + 1)) or best
    faults = [each for each in best.plan.actions if each.do is not Do.ASK]
    best = fails(replace(best.plan, actions=tuple(faults))) or best
    for calmer in ({"loss": 0.0}, {"replay": 0.0}, {"reorders": False}, {"delay_tail": 0.0}):
        best = fails(replace(best.plan, **calmer)) or best
    parts = 2
    while len(best.plan.actions) > 1 and runs < runs_max:
        smaller = _without_a_part(best.plan, parts, fails)
        if smaller is not None:
            best, parts = smaller, max(parts - 1, 2)
        elif parts >= len(best.plan.actions):
            break
        else:
            parts = min(2 * parts, len(best.plan.actions))
    if not best.failed or best.steps < best.plan.steps:
        best = fails(replace(best.plan, steps=best.steps + 1)) or best
    return best


def _without_a_part(
    plan: Plan, parts: int, fails: Callable[[Plan], Report | None]
) -> Report | None:
    """The run without one part of the actions, if it fails as well."""
    actions = plan.actions
    for part in range(parts):
        low, high = len(actions) * part // parts, len(actions) * (part + 1) // parts
        found = fails(replace(plan, actions=(*actions[:low], *actions[high:])))
        if found is not None:
            return found
    return None


# -- from a command line -----------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """See the head. Returns 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m ollamamax_p2p.testing.raft_runs")
    parser.add_argument("--seeds", required=True, help="one, or the first and last: 0-9999")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--done", type=Path, help="a file that remembers which seeds passed")
    parser.add_argument("--shrink", action="store_true", help="make what fails short")
    parser.add_argument("--trace", action="store_true", help="tell what fails step by step")
    options = parser.parse_args(arguments)
    first, _, last = options.seeds.partition("-")
    try:
        seeds = range(int(first), int(last or first) + 1)
    except ValueError:
        parser.error(f"{options.seeds!r} is no seed and no range of seeds")
    done = _already_done(options.done, options.steps)
    failures = 0
    for report in run_seeds(
        [seed for seed in seeds if seed not in done], options.steps, options.workers
    ):
        failures += report.failed
        _tell(report)
        if report.failed:
            _explain(report, wants_short=options.shrink, wants_trace=options.trace)
        elif options.done is not None:
            with options.done.open("a") as file:
                file.write(f"{report.plan.seed} {options.steps}\n")
    return 1 if failures else 0


def _already_done(path: Path | None, steps: int) -> set[int]:
    if path is None or not path.exists():
        return set()
    lines = (line.split() for line in path.read_text().splitlines())
    return {int(line[0]) for line in lines if len(line) == 2 and line[1] == str(steps)}


def _explain(report: Report, *, wants_short: bool, wants_trace: bool) -> None:
    plan = draw_plan(report.plan.seed, report.plan.steps)
    if wants_short:
        shortest = shrink(replace(report, plan=plan))
        plan = shortest.plan
        _tell(f"with {len(plan.actions)} actions it fails at step {shortest.steps}:")
        _tell(plan)
        for action in plan.actions:
            _tell(f"  {action}")
    if wants_trace:
        run_plan(plan, _tell)


def _tell(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Whole Raft replicas under faults drawn from seeds: `testing/raft_plan.py` says which,
`testing/raft_invariants.py` what must hold after every step.
"""

import os
import subprocess
import sys

import pytest

from ollamamax_p2p.testing.raft_plan import Do, draw_plan
from ollamamax_p2p.testing.raft_runs import STEPS, main, run_plan, run_seeds, shrink
from tests.simulation.raft_mutants import MUTANTS

SEEDS = 200
SEEDS_AT_ONCE = 50
"""In one test: enough to keep two processes busy, few enough that a failure comes soon."""


def pytest_generate_tests(metafunc):
    if "seeds" not in metafunc.fixturenames:
        return
    one = metafunc.config.getoption("--omx-seed")
    count = metafunc.config.getoption("--omx-seeds") or SEEDS
    chunks = [
        range(first, min(first + SEEDS_AT_ONCE, count)) for first in range(0, count, SEEDS_AT_ONCE)
    ]
    if one is not None:
        chunks = [range(one, one + 1)]
    ids = [f"seeds{chunk.start}-{chunk.stop - 1}" for chunk in chunks]
    metafunc.parametrize("seeds", chunks, ids=ids)


def test_whole_replicas_keep_every_invariant_whatever_goes_wrong(seeds):
    failed = [str(report) for report in run_seeds(seeds) if report.failed]
    assert not failed, "\n".join(failed)


def test_the_plans_hold_every_fault_and_every_size():
    plans = [draw_plan(seed) for seed in range(SEEDS)]
    assert {plan.voters for plan in plans} == {3, 5, 7}
    for do in Do:
        assert sum(any(each.do is do for each in plan.actions) for plan in plans) >= 10, do
    assert max(plan.loss for plan in plans) > 0.2
    rates = [rate for plan in plans for rate in plan.drift]
    assert min(rates) < 0.6
    assert max(rates) > 1.7


def test_the_runs_are_not_idle():
    reports = [run_plan(draw_plan(seed)) for seed in range(6)]
    assert sum(report.elections for report in reports) > 3 * len(reports)
    assert sum(report.committed for report in reports) > 30 * len(reports)
    assert sum(report.answered for report in reports) > 20 * len(reports)


def traced(seed):
    lines = []
    report = run_plan(draw_plan(seed), lines.append)
    return lines, report


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_same_seed_twice_gives_the_same_trace_byte_for_byte(seed):
    lines, report = traced(seed)
    again, again_report = traced(seed)
    assert lines == again
    assert report == again_report
    assert len(lines) >= STEPS
    assert traced(seed + 3)[1].digest != report.digest


def test_a_trace_does_not_depend_on_the_order_of_hashes():
    script = (
        "from ollamamax_p2p.testing.raft_runs import run_seed\n"
        "print([run_seed(seed, 1500).digest for seed in (0, 1)])\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    "name",
    ["a command is carried out again", "a change before the new leader has committed"],
)
def test_a_failing_plan_shrinks_to_the_few_actions_that_it_takes(name):
    mutant = next(each for each in MUTANTS if each.name == name)
    with mutant.alive():
        report = next(
            each
            for seed in range(mutant.found_by, SEEDS)
            if (each := run_plan(draw_plan(seed))).failed
        )
        shortest = shrink(report, runs_max=150)
        assert shortest.kind == report.kind
        # Measured: 11 of 593 and 13 of 737; no single one of them can be left out.
        assert len(shortest.plan.actions) <= len(report.plan.actions) // 20
        assert run_plan(shortest.plan) == shortest
    assert not run_plan(shortest.plan).failed


def test_a_seed_that_fails_says_how_to_run_it_again_and_what_it_takes(capsys):
    mutant = next(each for each in MUTANTS if each.name == "the window of appends is not bounded")
    with mutant.alive():
        code = main(["--seeds", "0", "--steps", "600", "--shrink", "--workers", "1"])
    told = capsys.readouterr().out
    assert code == 1
    assert "replay: python -m ollamamax_p2p.testing.raft_runs --seeds 0 --steps 600" in told
    assert "actions it fails at step" in told


def test_a_soak_goes_on_where_it_was_stopped(tmp_path, capsys):
    done = tmp_path / "done.txt"
    arguments = ["--steps", "200", "--workers", "1", "--done", str(done)]
    assert main(["--seeds", "0-1", *arguments]) == 0
    assert main(["--seeds", "0-3", *arguments]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == [f"seed {seed}" for seed in range(4)]
    assert len(done.read_text().splitlines()) == 4

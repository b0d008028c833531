"""The simulation finds every mistake that is put into the product, in the seeds that CI runs."""

import pytest

from ollamamax_p2p.testing.raft_runs import run_seed
from tests.simulation.raft_mutants import MUTANTS
from tests.simulation.test_raft_simulation import SEEDS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_does_not_live(mutant):
    """The seed that is known to find it is tried first; if what it draws has changed, all are."""
    with mutant.alive():
        for seed in dict.fromkeys([mutant.found_by, *range(SEEDS)]):
            report = run_seed(seed)
            if report.failed:
                break
        else:
            pytest.fail(f"{mutant.name!r} lives through {SEEDS} seeds")
    print(f"{mutant.name}: killed by seed {seed} at step {report.steps}: {report.problem}")  # noqa: T201
    assert not run_seed(seed).failed, "the seed fails without the mutant too"


def test_there_are_as_many_as_the_catalogue_asks_for():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 14

"""Seeded dice for every test, and how a failing seed is run again. tests/README.md tells more."""

import os
import random
from collections.abc import Iterator

import pytest

from ollamamax_p2p.testing.determinism import deterministic


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ollamamax_p2p")
    group.addoption(
        "--omx-seed", type=int, metavar="N", help="run every seeded test with this seed only"
    )
    group.addoption(
        "--omx-seeds",
        type=int,
        metavar="COUNT",
        help="run tests marked with seeds(...) with the seeds 0 to COUNT - 1",
    )
    group.addoption(
        "--raft-transcripts",
        default="",
        metavar="DIR",
        help="run every text transcript of etcd's raft below this folder (tests/consensus)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "seeds(count): run once for each of this many seeds; --omx-seeds changes it"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("seeds")
    if marker is None or "seed" not in metafunc.fixturenames:
        return
    one = metafunc.config.getoption("--omx-seed")
    count = metafunc.config.getoption("--omx-seeds") or marker.args[0]
    seeds = range(count) if one is None else [one]
    metafunc.parametrize("seed", seeds, ids=[f"seed{seed}" for seed in seeds], indirect=True)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of all dice in this test."""
    if hasattr(request, "param"):
        return int(request.param)
    return int(request.config.getoption("--omx-seed") or 0)


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Seeded dice. A test that fails with them prints the command that repeats it."""
    return random.Random(seed)


@pytest.fixture
def repeatable(seed: int) -> Iterator[None]:
    """trio schedules by the seed too, and threads run in place: for simulations."""
    with deterministic(seed):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if (
        report.skipped
        and os.environ.get("TESTS_NO_SKIPS")
        and not hasattr(report, "wasxfail")
        and "could not be built here: " not in str(report.longrepr)  # .ci/run said so, loudly
    ):
        # CI installs every counterpart, so there a skip is a test that nobody runs.
        report.outcome = "failed"
        report.longrepr = f"skipped, which TESTS_NO_SKIPS forbids: {report.longrepr}"
    number = getattr(item, "funcargs", {}).get("seed")
    if report.failed and number is not None:
        report.sections.append(
            (
                f"seed {number}",
                f"replay: PYTHONHASHSEED=0 python -m pytest '{item.nodeid}' --omx-seed {number}",
            )
        )
    return report

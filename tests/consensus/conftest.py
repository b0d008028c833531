"""The transcripts that the conformance tests run."""

import os
from pathlib import Path

import pytest

from tests.consensus import older_scripts

OURS = Path(__file__).parents[1] / "vectors" / "raft"


def scripts_below(folder: Path) -> list[Path]:
    """Every script of a folder, known by how a script looks."""
    return sorted(
        path
        for path in folder.rglob("*.txt")
        if "\n----\n" in path.read_text(encoding="utf-8", errors="replace")
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each script: those of our own always, others where they are."""
    if "raft_script" in metafunc.fixturenames:
        given = metafunc.config.getoption("--raft-transcripts") or os.environ.get(
            "TESTS_RAFT_TRANSCRIPTS", ""
        )
        theirs = scripts_below(Path(given)) if given else []
        if given and not theirs:
            raise pytest.UsageError(f"--raft-transcripts {given}: no script is there")
        parametrize(metafunc, "raft_script", [*scripts_below(OURS), *theirs])
    if "older_script" in metafunc.fixturenames:
        parametrize(metafunc, "older_script", scripts_below(older_scripts.FOLDER))


def parametrize(metafunc: pytest.Metafunc, name: str, scripts: list[Path]) -> None:
    if scripts:
        metafunc.parametrize(name, scripts, ids=lambda path: f"{path.parent.name}/{path.stem}")
        return
    reason = "needs etcd's raft 3.4, which golang-etcd-server-dev brings"
    metafunc.parametrize(name, [pytest.param(Path(), marks=pytest.mark.skip(reason=reason))])

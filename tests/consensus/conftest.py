"""The folder of transcripts that the conformance tests run."""

import os
from pathlib import Path

import pytest

DEBIAN = Path("/usr/share/gocode/src/go.etcd.io/etcd/raft")
"""Where the package golang-etcd-server-dev has an older set."""


def scripts_below(folder: Path) -> list[Path]:
    """Every script of a folder, known by how a script looks."""
    return sorted(
        path
        for path in folder.rglob("*.txt")
        if "\n----\n" in path.read_text(encoding="utf-8", errors="replace")
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each script."""
    if "raft_script" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("--raft-transcripts") or os.environ.get(
        "TESTS_RAFT_TRANSCRIPTS", ""
    )
    scripts = scripts_below(Path(given)) if given else []
    if given and not scripts:
        raise pytest.UsageError(f"--raft-transcripts {given}: no script is there")
    if scripts:
        metafunc.parametrize(
            "raft_script", scripts, ids=lambda path: f"{path.parent.name}/{path.stem}"
        )
        return
    reason = "needs transcripts of etcd's raft: give their folder with --raft-transcripts"
    metafunc.parametrize(
        "raft_script", [pytest.param(Path(), marks=pytest.mark.skip(reason=reason))]
    )

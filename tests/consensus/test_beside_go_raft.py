"""The same schedules on our core and on etcd's raft, in Go: the same leaders, terms and commits.

The Go side is 3.4, which Debian's golang-etcd-server-dev brings; `go_raft/driver.go` drives it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.consensus import older_scripts
from tests.consensus.schedules import Player, schedule

SCHEDULES = 1_000


@pytest.fixture(scope="module")
def go_raft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, built."""
    if not older_scripts.FOLDER.is_dir():
        pytest.skip("needs etcd's raft 3.4, which golang-etcd-server-dev brings")
    if not shutil.which("go"):
        pytest.skip("needs go")
    workspace = tmp_path_factory.mktemp("go")
    package = workspace / "src" / "driver"
    package.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "go_raft" / "driver.go", package)
    # Debian lays packages out for GOPATH, from before there were modules.
    packaged = older_scripts.FOLDER.parents[3]
    settings = {"GO111MODULE": "off", "GOFLAGS": "", "GOPATH": f"{workspace}:{packaged}"}
    subprocess.run(
        ["go", "build", "-o", workspace / "driver", "."],
        cwd=package,
        env={**os.environ, **settings},
        check=True,
    )
    return workspace / "driver"


@pytest.mark.counterpart
def test_a_thousand_schedules_come_to_the_same(go_raft: Path) -> None:
    schedules = [schedule(seed) for seed in range(SCHEDULES)]
    commands = "".join(f"{line}\n" for lines in schedules for line in lines)
    played = subprocess.run([go_raft], input=commands, capture_output=True, text=True, check=True)
    theirs = map(json.loads, played.stdout.splitlines())
    commits = 0
    for seed, lines in enumerate(schedules):
        for step, ours in enumerate(Player().play(lines)):
            assert ours == next(theirs), f"schedule {seed}, shown for the {step + 1}th time"
        commits += max(len(node["applied"]) for node in ours.values())
    assert next(theirs, None) is None
    # So that it is no comparison of clusters in which nothing happens.
    assert commits > 15 * SCHEDULES

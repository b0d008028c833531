"""`omx cluster recover` and `omx cluster wal check`, on folders of nodes that do not run."""

import fcntl
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollamamax_p2p.cluster import cluster_folder, found_place
from ollamamax_p2p.consensus import ConsensusSettings, open_file_log
from ollamamax_p2p.consensus.core.messages import Entry, EntryType, HardState
from ollamamax_p2p.identity import Membership, Ticket
from omx_cli.main import run
from tests.cli.running_omx import command, environment
from tests.cluster.whole_clusters import KEY, STARTS_AT, SWARM_ID, Machine, open_machines, until


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    for name in [*os.environ]:
        if name.startswith(("OMX_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder of a node in a swarm."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    Membership.join(folder / "swarm", Ticket(SWARM_ID, (), bytes(16), STARTS_AT, KEY))
    return folder


@pytest.fixture
def log_folder(data: Path) -> Iterator[Path]:
    """Of a log with three entries, of which two are known to be agreed on."""
    place = cluster_folder(data, SWARM_ID)
    found_place(place)
    log = open_file_log(place / "log", ConsensusSettings(segment_bytes=4096))
    entries = [Entry(2, index, EntryType.NORMAL, b"x" * 50) for index in (1, 2, 3)]
    log.append(entries, HardState(term=5, vote=1, commit=2))
    yield place / "log"
    log.close()


def segment(folder: Path) -> Path:
    (found,) = folder.glob("*.wal")
    return found


def test_a_whole_log_is_ok_also_while_it_is_in_use(data, log_folder, capsys):
    assert run(["cluster", "wal", "check", "--data-dir", str(data)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok: a node runs on it\n")
    assert "3, of term 2" in said
    assert "up to 2 at least" in said


def test_a_torn_end_is_ok_and_told(log_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(log_folder, copy)
    torn = bytearray(segment(copy).read_bytes())
    used = len(bytes(torn).rstrip(b"\0"))
    torn[used - 20 : used] = bytes(20)
    segment(copy).write_bytes(torn)
    assert run(["cluster", "wal", "check", "--log", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "a crash left" in said
    assert "the next start drops them" in said


def test_damage_is_told_with_its_place_and_exit_code_4(log_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    log = open_copy(log_folder, copy)
    log.close()  # which vouches for what was written
    damaged = bytearray(segment(copy).read_bytes())
    damaged[damaged.index(b"x" * 50)] ^= 1
    segment(copy).write_bytes(damaged)
    assert run(["cluster", "wal", "check", "--log", str(copy)]) == 4
    said = capsys.readouterr().out
    assert said.startswith("damaged: ")
    assert segment(copy).name in said
    assert "docs/runbooks/damaged-wal.md" in said

    assert run(["cluster", "wal", "check", "--log", str(copy), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["damage"][0]["offset"] > 0


def open_copy(folder: Path, copy: Path):
    shutil.copytree(folder, copy)
    return open_file_log(copy, ConsensusSettings(segment_bytes=4096))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["wal", "check", "--log", "nowhere"], 3, "there is no log"),
        (["wal", "check"], 3, "no node has been in a swarm"),
        (["recover"], 2, "--unsafe-discard-other-voters"),
        (["recover", "--unsafe-discard-other-voters"], 2, "--yes"),
        (["recover", "--unsafe-discard-other-voters", "--yes"], 3, "no node has been in a swarm"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, code, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["cluster", *arguments, "--data-dir", str(tmp_path / "none")]) == code
    said = capsys.readouterr().err
    assert text in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_a_node_that_is_no_member_has_nothing_to_recover(data, capsys):
    line = ["cluster", "recover", "--unsafe-discard-other-voters", "--yes", "--data-dir", str(data)]
    assert run(line) == 3
    assert "member of no cluster" in capsys.readouterr().err


def test_a_node_that_runs_is_not_recovered(data, log_folder, capsys):
    with (data / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = ["cluster", "recover", "--unsafe-discard-other-voters", "--yes"]
        assert run([*line, "--data-dir", str(data)]) == 4
    assert "a node already runs on" in capsys.readouterr().err


def becomes(machine: Machine, data: Path) -> Path:
    """Put a machine's part in its cluster where `omx` looks for it."""
    place = cluster_folder(data, SWARM_ID)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(machine.folder, place)
    return place


@pytest.mark.usefixtures("repeatable")
async def test_recovering_tells_what_may_be_lost_and_does_it(
    autojump_clock, data, tmp_path, capsys
):
    async with open_machines(tmp_path / "machines", voters=3, learners=1) as machines:
        one, two, three, learner = machines.all
        for machine in machines.all:
            await machine.stop()
        place = becomes(three, data)
        line = ["cluster", "recover", "--unsafe-discard-other-voters", "--data-dir", str(data)]

        refused = ask_on_a_terminal(line, "n", data)
        assert refused.returncode == 130
        assert b"Expelled: m1" in refused.stderr
        assert b"nothing was changed" in refused.stderr

        assert run([*line, "--yes"]) == 0
        said = capsys.readouterr()
        assert "only voter now" in said.out
        for text in (
            f"m3 ({three.peer}) becomes the only voter",
            f"Expelled: m1 ({one.peer})",
            f"Expelled: m2 ({two.peer})",
            f"Stays a member: m4 ({learner.peer})",
            "omx leave --force",
        ):
            assert text in said.err
        assert run([*line, "--yes"]) == 2
        assert "only voter already" in capsys.readouterr().err

        shutil.rmtree(three.folder)
        shutil.copytree(place, three.folder)
        await three.start()
        await until(lambda: three.up.leads)


@pytest.mark.usefixtures("repeatable")
async def test_recovering_tells_programs_in_json(autojump_clock, data, tmp_path, capsys):
    async with open_machines(tmp_path / "machines", voters=3) as machines:
        for machine in machines.all:
            await machine.stop()
        becomes(machines[0], data)
        line = ["cluster", "recover", "--unsafe-discard-other-voters", "--data-dir", str(data)]
        assert run([*line, "--json"]) == 2  # nobody can be asked
        capsys.readouterr()
        assert run([*line, "--json", "--yes"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["raft_id"] == 1
        assert {each["name"] for each in plan["expelled"]} == {"m2", "m3"}
        assert plan["new_index"] > plan["last_index"]


def ask_on_a_terminal(line: list[str], answer: str, data: Path) -> subprocess.CompletedProcess:
    """Run omx with a terminal as its input, on which somebody answers."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        return subprocess.run(
            command(*line), stdin=theirs, capture_output=True, env=environment(data), timeout=60
        )
    finally:
        os.close(ours)
        os.close(theirs)

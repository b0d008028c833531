"""Real processes on loopback: killed at random moments, eight at once."""

import hashlib
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ollamamax_p2p import NodeConfig
from tests.network.forking import Child, Forker

pytestmark = pytest.mark.network

MiB = 1024 * 1024
NAME = "test/random:latest"
KILLS = 100
PULLERS = 8


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as forker:
        yield forker


def make_model(path: Path, size: int, seed: int) -> int:
    """A safetensors file of random bytes; how many blobs of which size follows from it."""
    rng = random.Random(seed)
    data = rng.randbytes(size)
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path.stat().st_size


def wait_for(child: Child, key: str, deadline_s: float = 60.0) -> dict[str, Any]:
    """The first line that the child says with this key. Polls: the other side is a process."""
    for _ in range(int(deadline_s * 100)):
        for line in child.lines():
            assert "failed" not in line, line
            if key in line:
                return line
        time.sleep(0.01)
    raise AssertionError(f"nothing about {key} in {deadline_s:g} s: {child.lines()[-3:]}")


def assert_nothing_wrong_is_visible(models: Path) -> None:
    for blob in (models / "blobs").glob("*"):
        with blob.open("rb") as file:
            assert blob.name == f"sha256-{hashlib.file_digest(file, 'sha256').hexdigest()}"


def completed(lines: list[dict[str, Any]], digest: str) -> int:
    """Verified bytes of a blob, as last told."""
    return max((line["completed"] for line in lines if line.get("digest") == digest), default=0)


def test_a_hundred_kills_at_random_moments_lose_nothing_that_was_written(
    forker: Forker, tmp_path: Path
) -> None:
    rng = random.Random(20261122)
    model = tmp_path / "model.safetensors"
    make_model(model, 48 * MiB, seed=1)
    seed = forker.fork(
        "seed", tmp_path / "seed.said", folder=str(tmp_path / "seed"), model=str(model),
        name=NAME, uses=200,
    )  # fmt: skip
    ticket = wait_for(seed, "ticket")["ticket"]
    folder = tmp_path / "puller"
    kills = finished = halfway = 0
    told_before: dict[str, int] = {}
    run = 0
    while kills < KILLS:
        run += 1
        said = tmp_path / f"pull{run}.said"
        child = forker.fork("pull", said, folder=str(folder), ticket=ticket, name=NAME)
        wait_for(child, "total")
        # The one sleep here that is meant: the moment of the kill is what varies. Most of a pull
        # of this size is over in a second; some die before the first chunk.
        time.sleep(rng.uniform(0.0, 0.8))
        if any("pulled" in line for line in child.lines()):
            assert forker.wait(child) == 0
            assert_resumed(child, told_before)
            finished += 1
            shutil.rmtree(folder / "models")
            told_before = {}
            continue
        child.kill()
        assert forker.wait(child) in (-9, 0)
        kills += 1
        assert_nothing_wrong_is_visible(folder / "models")
        assert_resumed(child, told_before)
        told_before = {
            line["digest"]: completed(child.lines(), line["digest"])
            for line in child.lines()
            if line.get("digest")
        }
        halfway += any(0 < before < model.stat().st_size - MiB for before in told_before.values())
    assert halfway >= KILLS // 4  # else the kills came too early or too late to mean anything
    final = forker.fork(
        "pull", tmp_path / "final.said", folder=str(folder), ticket=ticket, name=NAME
    )
    wait_for(final, "pulled")
    assert forker.wait(final) == 0
    assert_nothing_wrong_is_visible(folder / "models")
    uploaded = max(line["uploaded"] for line in seed.lines() if "uploaded" in line)
    in_flight = NodeConfig().transfer.requests_in_flight_bytes
    assert uploaded <= (finished + 1) * model.stat().st_size + kills * in_flight


def assert_resumed(child: Child, told_before: dict[str, int]) -> None:
    """What was told as verified before a kill is there again at the next start."""
    for digest, before in told_before.items():
        first = next((ln["completed"] for ln in child.lines() if ln.get("digest") == digest), None)
        assert first is None or first >= before, f"{before - first} verified bytes were lost"


def test_eight_processes_pull_from_one_seed_which_uploads_little(
    forker: Forker, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    size = make_model(model, 98 * MiB, seed=2)
    seed = forker.fork(
        "seed", tmp_path / "seed.said", folder=str(tmp_path / "seed"), model=str(model),
        name=NAME, uses=PULLERS,
    )  # fmt: skip
    ticket = wait_for(seed, "ticket")["ticket"]
    pullers = [
        forker.fork(
            "pull", tmp_path / f"{i}.said", folder=str(tmp_path / f"p{i}"), ticket=ticket,
            name=NAME, stay=True,
        )
        for i in range(PULLERS)
    ]  # fmt: skip
    for puller in pullers:
        report = wait_for(puller, "pulled", deadline_s=240)
        assert report["fetched"] >= size
    for i in range(PULLERS):
        assert_nothing_wrong_is_visible(tmp_path / f"p{i}" / "models")
        assert any((tmp_path / f"p{i}" / "models" / "manifests").rglob("latest"))
    uploaded = max(line["uploaded"] for line in seed.lines() if "uploaded" in line)
    assert uploaded < 2.5 * size

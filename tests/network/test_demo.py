"""`omx demo`, as `make demo` runs it: three processes, one killed halfway, all stores verified."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

PROJECT = Path(__file__).parents[2]
MiB = 1024 * 1024


def gguf(tensor_bytes: int, rng: random.Random) -> bytes:
    """A GGUF of one tensor of random bytes, so that it needs no download."""

    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    metadata = text(b"general.architecture") + (8).to_bytes(4, "little") + text(b"llama")
    tensor = text(b"w") + (1).to_bytes(4, "little") + tensor_bytes.to_bytes(8, "little")
    tensor += (24).to_bytes(4, "little") + (0).to_bytes(8, "little")  # type I8, at offset 0
    counts = (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + counts + metadata + tensor
    return header + bytes(-len(header) % 32) + rng.randbytes(tensor_bytes)


def demo_model(tmp_path: Path, rng: random.Random) -> Path:
    """The real model where `make demo` has fetched it, else one of the same size."""
    for found in (PROJECT / ".demo" / "model").rglob("*.gguf"):
        return found
    path = tmp_path / "random.gguf"
    path.write_bytes(gguf(96 * MiB, rng))
    return path


def test_three_nodes_share_a_model_and_a_killed_one_resumes(
    tmp_path: Path, rng: random.Random
) -> None:
    model = demo_model(tmp_path, rng)
    command = [sys.executable, "-m", "omx_cli", "demo", "--json", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    bob, carol = said["nodes"]
    assert said["verified_blobs"][0] >= 2
    assert len(set(said["verified_blobs"])) == 1
    assert bob["fetched_bytes"] >= model.stat().st_size
    assert carol["resumed_bytes"] > model.stat().st_size * 0.4
    # What had been verified before the kill was there again: nothing of it was fetched twice.
    assert carol["refetched_bytes"] <= 16 * MiB


@pytest.mark.parametrize("place", [".", "x" * 300])
def test_a_folder_without_a_model_is_named(tmp_path: Path, place: str) -> None:
    command = [sys.executable, "-m", "omx_cli", "demo", "--model", str(tmp_path / place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert len(done.stderr.splitlines()) == 1

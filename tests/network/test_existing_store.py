"""A model store that Ollama filled is served where it is: nothing copied, nothing changed."""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.network.processes import read_only
from tests.node.nodes import MiB, node_at, until_peers

pytestmark = pytest.mark.network

MEDIA = "application/vnd.ollama.image."


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(90):
        yield


class OllamasStore:
    """A tree as Ollama lays it, written by other code than ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        rng = random.Random(20261122)
        weights = self.blob(rng.randbytes(3 * MiB))
        adapter = self.blob(rng.randbytes(MiB))
        template = self.blob(b"{{ .Prompt }}")
        licence = self.blob(b"Do as you like.\n")
        base = [("model", weights), ("template", template), ("license", licence)]
        self.manifest("registry.ollama.ai/library/shared/7b", base)
        self.manifest("registry.ollama.ai/library/shared/7B-Q4_K_M", base[:2])  # upper case
        self.manifest("registry.ollama.ai/someone/tuned/latest", [*base, ("adapter", adapter)])
        self.manifest("hf.co/Who/Repo-GGUF/Q8_0", [("model", adapter)])
        # What else lies in such folders: an interrupted pull of Ollama's, notes, a mark of macOS.
        (self.blobs / f"sha256-{'ab' * 32}-partial").write_bytes(bytes(1000))
        (self.blobs / f"sha256-{'ab' * 32}-partial-0").write_text("{}")
        (folder / "README.txt").write_text("mine, not a model")
        (folder / "manifests" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        for number, path in enumerate(sorted([folder, *folder.rglob("*")], reverse=True)):
            os.utime(path, ns=(1_700_000_000_000_000_000, 1_600_000_000_123_456_789 + number))

    def blob(self, data: bytes) -> dict:
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / f"sha256-{digest}").write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def manifest(self, path: str, layers: list[tuple[str, dict]]) -> None:
        config = self.blob(json.dumps({"model_format": "gguf", "path": path}).encode())
        file = self.folder / "manifests" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                **config,
            },
            "layers": [{"mediaType": MEDIA + kind, **layer} for kind, layer in layers],
        }
        file.write_text(json.dumps(manifest))

    def state(self) -> dict[str, tuple]:
        """Everything that could show that somebody touched it."""
        return {
            str(path.relative_to(self.folder)): _state(path)
            for path in [self.folder, *self.folder.rglob("*")]
        }


def _state(path: Path) -> tuple:
    about = path.lstat()
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    facts = (about.st_ino, about.st_mode, about.st_nlink, about.st_size, about.st_mtime_ns)
    return (*facts, about.st_ctime_ns, digest)


@contextmanager
def as_it_is(source: Path, folder: Path) -> Iterator[Path]:
    yield source


NAMES = ("shared:7b", "shared:7b-q4_k_m", "someone/tuned", "hf.co/Who/Repo-GGUF:q8_0")


@pytest.mark.parametrize(
    "mounted",
    [as_it_is, pytest.param(read_only, marks=pytest.mark.counterpart)],
    ids=["writable", "read-only"],
)
async def test_an_ollama_store_is_served_in_place_without_a_byte_changed(tmp_path, mounted):
    store = OllamasStore(tmp_path / "ollama")
    before = store.state()
    with mounted(store.folder, tmp_path / "mounted") as models:
        seed_flags = {"content.models": str(models)}
        async with (
            node_at(tmp_path / "seed", **seed_flags) as seed,
            node_at(tmp_path / "puller") as puller,
        ):
            assert (await seed.status()).store.writable == (mounted is as_it_is)
            assert len(await seed.models()) == 4
            await puller.join([(await seed.invite()).ticket])
            await until_peers(seed, puller)
            for name in NAMES:
                report = await puller.pull(name)
                assert {share.name for share in report.sources} <= {seed.peer_id}
            for name in NAMES:
                await seed.show(name)
        # A second time, with the chunk maps that were kept: still nothing of it in the store.
        async with node_at(tmp_path / "seed", **seed_flags):
            pass
    assert store.state() == before
    kept = [path for path in (tmp_path / "seed" / "data").rglob("*") if path.is_file()]
    # The Raft log is made in its full length from the start.
    besides_log = [path for path in kept if path.parent.name != "log"]
    assert sum(path.stat().st_size for path in besides_log) < 500_000, "no blob is kept twice"
    assert_same_models(store.folder, tmp_path / "puller" / "models")


def assert_same_models(theirs: Path, ours: Path) -> None:
    """Every manifest byte for byte, and every blob that one of them names."""
    named = []
    for path in (theirs / "manifests").rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            named.append(path.read_bytes())
    pulled = [path.read_bytes() for path in (ours / "manifests").rglob("*") if path.is_file()]
    assert sorted(pulled) == sorted(named)
    whole = {path.name for path in (theirs / "blobs").iterdir() if "-partial" not in path.name}
    assert {path.name for path in (ours / "blobs").iterdir()} == whole
    for name in whole:
        assert (ours / "blobs" / name).read_bytes() == (theirs / "blobs" / name).read_bytes()

"""What the store on disk adds to the contract: layout, crashes, full and foreign disks."""

import errno
import fcntl
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio.testing

from ollamamax_p2p.content import ContentSettings, durable_files, open_disk_store
from ollamamax_p2p.content.core.chunk_map import MiB
from ollamamax_p2p.content.core.digest import digest_of, file_name
from ollamamax_p2p.content.core.manifest import CONFIG_TYPE, MODEL_TYPE, Layer, build_manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import (
    AccessRefused,
    BadModelFile,
    BadName,
    BlobNotFound,
    DataDirInUse,
    LocalTrouble,
    StoreDamaged,
    StoreFull,
    StoreReadOnly,
)

SETTINGS = ContentSettings(reserve_bytes=0)
BLOB = random.Random(7).randbytes(2 * MiB + 77)
DIGEST = digest_of(BLOB)
NAME = parse_model_name("tiny:1b")


@pytest.fixture
async def store(tmp_path):
    async with open_disk_store(tmp_path / "models", tmp_path / "side", SETTINGS) as store:
        yield store


def ollamas_store(folder: Path) -> Path:
    """A store as Ollama leaves it, with one model, an odd file and a pull of Ollama's own."""
    blobs, name = folder / "blobs", folder / "manifests/registry.ollama.ai/library/tiny"
    blobs.mkdir(parents=True)
    name.mkdir(parents=True)
    config = b'{"model_format":"gguf"}\n'
    for data in (BLOB, config):
        (blobs / file_name(digest_of(data))).write_bytes(data)
    (blobs / f"sha256-{'0' * 64}-partial").write_bytes(b"half")
    (blobs / f"sha256-{'0' * 64}-partial-0").write_bytes(b"{}")
    manifest = build_manifest(
        Layer(CONFIG_TYPE, digest_of(config), len(config)),
        [Layer(MODEL_TYPE, DIGEST, len(BLOB))],
    )
    (name / "1b").write_bytes(manifest.raw)
    (name / ".DS_Store").write_bytes(b"junk")
    return folder


def picture(folder: Path) -> dict[str, tuple]:
    """Every file and folder with its mode, times and content."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


# -- layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
async def test_an_existing_store_is_served_in_place_and_left_as_it_is(tmp_path, read_only):
    models = ollamas_store(tmp_path / "models")
    before = picture(models)
    async with open_disk_store(models, tmp_path / "side", SETTINGS, read_only=read_only) as store:
        assert store.writable is not read_only
        (model,) = await store.models()
        manifest = await store.manifest(parse_model_name("TINY:1B"))
        assert model.manifest_digest == manifest.digest
        for digest, size in manifest.blobs():
            async with await store.open(digest) as reader:
                data = await reader.read_at(0, size)
            assert digest_of(data) == digest
            assert (await store.chunk_map(digest)).size == size
        assert len(await store.blobs()) == 2
        assert await store.partials() == []
        assert await store.free_bytes() >= 0
    assert picture(models) == before
    assert len(list((tmp_path / "side" / "chunk-maps").iterdir())) == 2


async def test_what_is_written_lies_where_ollama_looks_for_it(store, tmp_path):
    assert not (tmp_path / "models").exists()
    config = await store.put(b"{}")
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB)
        assert not (tmp_path / "models/blobs" / file_name(DIGEST)).exists()
        await partial.commit()
    manifest = build_manifest(Layer(CONFIG_TYPE, config, 2), [Layer(MODEL_TYPE, DIGEST, len(BLOB))])
    await store.put_manifest(NAME, manifest)
    models = tmp_path / "models"
    files = {str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()}
    assert files == {
        f"blobs/{file_name(config)}",
        f"blobs/{file_name(DIGEST)}",
        "manifests/registry.ollama.ai/library/tiny/1b",
    }
    for path in files:
        assert (models / path).stat().st_mode & 0o777 == 0o644
    assert (models / "blobs").stat().st_mode & 0o777 == 0o755
    assert (models / "manifests/registry.ollama.ai/library/tiny/1b").read_bytes() == manifest.raw


@pytest.fixture
def strict_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
async def test_ollama_can_read_what_we_make_whatever_the_umask(store, tmp_path):
    config = Layer(CONFIG_TYPE, await store.put(b"{}"), 2)
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB)
        await partial.commit()
    await store.put_manifest(NAME, build_manifest(config, [Layer(MODEL_TYPE, DIGEST, len(BLOB))]))
    made = [tmp_path / "models", *(tmp_path / "models").rglob("*")]
    assert len([path for path in made if path.is_file()]) == 3
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    for folder in ("side", "side/partials", "side/chunk-maps"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("strict_umask")
async def test_a_group_that_a_folder_hands_down_stays(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    models.chmod(0o2775)
    async with open_disk_store(models, tmp_path / "side", SETTINGS) as store:
        await store.put(b"x")
    assert (models / "blobs").stat().st_mode & 0o7777 == 0o2755


async def test_a_model_is_forgotten_for_good_before_its_blobs_go(store, tmp_path, monkeypatch):
    """A power cut in between must not bring back a name without its blobs."""
    config = Layer(CONFIG_TYPE, await store.put(b"{}"), 2)
    await store.put(BLOB)
    manifest = build_manifest(config, [Layer(MODEL_TYPE, DIGEST, len(BLOB))])
    await store.put_manifest(NAME, manifest)
    await store.put_manifest(parse_model_name("tiny:2b"), build_manifest(config, []))
    folder = tmp_path / "models/manifests/registry.ollama.ai/library/tiny"
    happened = []
    unlink, sync_folder = Path.unlink, durable_files.sync_folder

    def noted_unlink(path: Path, **options: bool) -> None:
        unlink(path, **options)
        happened.append(("gone", path))

    def noted_sync(path: Path) -> None:
        sync_folder(path)
        happened.append(("durable", path))

    monkeypatch.setattr(Path, "unlink", noted_unlink)
    monkeypatch.setattr("ollamamax_p2p.content.disk_store.sync_folder", noted_sync)
    assert await store.remove_manifest(NAME) == [DIGEST]
    in_order = [("gone", folder / "1b"), ("durable", folder), ("gone", store.blob_path(DIGEST))]
    assert [happened.index(each) for each in in_order] == sorted(map(happened.index, in_order))


async def test_manifests_that_cannot_be_listed_keep_every_blob(store, tmp_path, monkeypatch):
    ollamas_store(tmp_path / "models")
    hidden = tmp_path / "models/manifests-v2/host"
    hidden.mkdir(parents=True)
    await store.put(b"needed by nobody who can be read")
    listdir = os.listdir

    def refuse(folder: Path) -> list[str]:
        if folder == hidden:
            raise PermissionError(errno.EACCES, "no", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(AccessRefused, match="manifests-v2/host"):
        await store.remove_unused([digest_of(b"needed by nobody who can be read")])
    assert await store.has(digest_of(b"needed by nobody who can be read"))


async def test_removing_the_last_tag_removes_the_empty_folders(store, tmp_path):
    config = Layer(CONFIG_TYPE, await store.put(b"{}"), 2)
    for name in (NAME, parse_model_name("tiny:2b")):
        await store.put_manifest(name, build_manifest(config, []))
    await store.remove_manifest(NAME)
    assert (tmp_path / "models/manifests/registry.ollama.ai/library/tiny/2b").is_file()
    await store.remove_manifest(parse_model_name("tiny:2b"))
    assert list((tmp_path / "models/manifests").iterdir()) == []


async def test_a_fetched_blob_has_its_chunk_map_at_once(store, tmp_path):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB)
        await partial.commit()
    kept = tmp_path / "side/chunk-maps" / file_name(DIGEST)
    before = kept.stat().st_mtime_ns
    assert (await store.chunk_map(DIGEST)).size == len(BLOB)
    assert kept.stat().st_mtime_ns == before
    await store.remove_unused([DIGEST])
    assert not kept.exists()


async def test_a_blob_edited_in_place_is_not_served(store):
    await store.put(BLOB)
    await store.chunk_map(DIGEST)
    path = store.blob_path(DIGEST)
    path.write_bytes(b"bad" + BLOB[3:])
    os.utime(path, ns=(0, 0))
    with pytest.raises(StoreDamaged, match="delete this file and pull the model again") as caught:
        await store.chunk_map(DIGEST)
    assert caught.value.path == str(path)
    path.unlink()  # as it says; another model may need the blob, so that `omx rm` would keep it
    assert not await store.has(DIGEST)


async def test_a_damaged_chunk_map_is_built_again(store, tmp_path):
    await store.put(BLOB)
    built = await store.chunk_map(DIGEST)
    (tmp_path / "side/chunk-maps" / file_name(DIGEST)).write_bytes(b"damaged")
    assert await store.chunk_map(DIGEST) == built


async def test_a_map_that_cannot_be_kept_is_built_all_the_same(store, tmp_path, caplog):
    await store.put(BLOB)
    (tmp_path / "side/chunk-maps").write_text("a file where the folder should be")
    assert (await store.chunk_map(DIGEST)).size == len(BLOB)
    assert "cannot keep the chunk map" in caplog.text


async def test_a_blob_that_became_shorter_is_damaged(store):
    await store.put(BLOB)
    async with await store.open(DIGEST) as reader:
        os.truncate(store.blob_path(DIGEST), 10)
        with pytest.raises(StoreDamaged, match="too early"):
            await reader.read_at(0, 100)
    with pytest.raises(ValueError, match="closed"):
        await reader.read_at(0, 1)


async def test_a_folder_under_a_blobs_name_is_no_blob(store, tmp_path):
    (tmp_path / "models/blobs" / file_name(DIGEST)).mkdir(parents=True)
    assert not await store.has(DIGEST)
    for call in (store.open, store.size_of):
        with pytest.raises(BlobNotFound):
            await call(DIGEST)


# -- manifests that are not as they should be --------------------------------------------------


async def test_a_damaged_manifest_is_left_out_of_the_list_and_named(store, tmp_path, caplog):
    models = ollamas_store(tmp_path / "models")
    bad = models / "manifests/registry.ollama.ai/library/tiny/bad"
    bad.write_bytes(b"{")
    assert [model.name for model in await store.models()] == [NAME]
    assert str(bad) in caplog.text
    with pytest.raises(StoreDamaged, match="remove the model"):
        await store.manifest(parse_model_name("tiny:bad"))
    assert await store.remove_manifest(parse_model_name("tiny:bad")) == []
    assert not bad.exists()


async def test_blobs_that_only_an_unreadable_manifest_mentions_are_spared(store, tmp_path):
    models = ollamas_store(tmp_path / "models")
    other = models / "manifests-v2/registry.ollama.ai/library/new/latest"
    other.parent.mkdir(parents=True)
    other.write_text('{"manifests":[{"digest":"' + file_name(DIGEST) + '"}]}')
    removed = await store.remove_manifest(NAME)
    assert DIGEST not in removed
    assert await store.has(DIGEST)
    assert len(removed) == 1


async def test_a_host_too_long_for_a_folder_is_refused(store):
    name = ModelName("h" * 300, "n", "m", "t")
    with pytest.raises(BadName, match="too long"):
        await store.manifest(name)


async def test_an_unreadable_manifest_says_so(store, tmp_path, monkeypatch):
    ollamas_store(tmp_path / "models")

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr("ollamamax_p2p.content.disk_store._read_bounded", refuse)
    with pytest.raises(AccessRefused):
        await store.manifest(NAME)
    assert await store.models() == []
    # What it needs is unknown, so nothing may go.
    with pytest.raises(AccessRefused):
        await store.remove_unused([DIGEST])
    assert await store.has(DIGEST)


# -- import ------------------------------------------------------------------------------------


async def test_a_hard_link_is_made_on_demand_only(store, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)
    assert await store.import_file(path) == DIGEST
    assert path.stat().st_nlink == 1
    await store.remove_unused([DIGEST])
    assert await store.import_file(path, link=True) == DIGEST
    assert store.blob_path(DIGEST).samefile(path)
    assert path.stat().st_nlink == 2


async def test_a_file_on_another_disk_is_copied_even_if_a_link_is_wanted(store, other_disk):
    path = other_disk / "model.bin"
    path.write_bytes(BLOB)
    assert await store.import_file(path, link=True) == DIGEST
    assert store.blob_path(DIGEST).read_bytes() == BLOB


async def test_a_file_that_changes_while_it_is_imported_is_refused(store, tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)
    real = durable_files.sync

    def edit_then_sync(descriptor: int) -> None:
        with path.open("r+b") as file:
            file.write(b"edit")
        os.utime(path, ns=(5, 5))
        real(descriptor)

    monkeypatch.setattr("ollamamax_p2p.content.disk_store.sync", edit_then_sync)
    with pytest.raises(BadModelFile, match="changed while it was imported"):
        await store.import_file(path)
    assert await store.blobs() == []


async def test_a_file_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)
    async with open_disk_store(
        tmp_path / "models", tmp_path / "side", ContentSettings(reserve_bytes=2**60)
    ) as store:
        with pytest.raises(StoreFull):
            await store.import_file(path)


async def test_importing_what_is_there_already_copies_nothing(store, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)
    await store.import_file(path)
    before = store.blob_path(DIGEST).stat()
    await store.import_file(path)
    assert store.blob_path(DIGEST).stat().st_ino == before.st_ino


# -- two owners, foreign disks, full disks -----------------------------------------------------


async def test_a_second_process_is_kept_off_an_unfinished_blob(store, tmp_path):
    async with await store.partial(DIGEST, len(BLOB)):
        pass
    path = tmp_path / "side/partials" / file_name(DIGEST)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataDirInUse):
            await store.partial(DIGEST, len(BLOB))
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, len(BLOB))]


@pytest.fixture
def other_disk():
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        pytest.skip("needs a second file system: /dev/shm")
    folder = shared / f"omx-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


async def test_unfinished_blobs_live_beside_the_store_if_the_data_folder_is_elsewhere(
    tmp_path, other_disk
):
    models = tmp_path / "models"
    async with open_disk_store(models, other_disk / "side", SETTINGS) as store:
        async with await store.partial(DIGEST, len(BLOB)) as partial:
            await partial.write(0, BLOB)
            assert (models / ".omx" / file_name(DIGEST)).is_file()
            assert await store.partials() == [DIGEST]
            await partial.commit()
        assert await store.has(DIGEST)
        assert await store.models() == []
    assert list((models / ".omx").iterdir()) == []


async def test_what_a_killed_process_left_half_written_is_swept(tmp_path):
    folder = tmp_path / "side/partials"
    folder.mkdir(parents=True)
    (folder / "new-0123456789abcdef").write_bytes(b"half a blob")
    async with open_disk_store(tmp_path / "models", tmp_path / "side", SETTINGS) as store:
        await store.put(b"x")
    assert list(folder.iterdir()) == []


NOW = datetime(2001, 1, 1, tzinfo=UTC)
LIFETIME_S = SETTINGS.partial_lifetime_s


def opened(folder: Path, **options: bool):
    return open_disk_store(folder / "models", folder / "side", SETTINGS, now=lambda: NOW, **options)


async def unfinished(folder: Path, data: bytes, age_s: float) -> Path:
    """An unfinished blob that nobody has had for so long; where it is."""
    async with opened(folder) as store, await store.partial(digest_of(data), MiB) as partial:
        await partial.write(0, data)
    at = NOW.timestamp() - age_s
    os.utime(record_of(folder / "side", digest_of(data)), (at, at))
    return partial.path


async def test_an_unfinished_blob_that_was_given_up_is_removed(tmp_path):
    kept = await unfinished(tmp_path, b"kept", LIFETIME_S - 1)
    given_up = await unfinished(tmp_path, b"given up", LIFETIME_S + 1)
    bare = given_up.with_name(file_name(digest_of(b"without a record")))
    bare.write_bytes(b"half")
    os.utime(bare, (0, 0))
    lone = record_of(tmp_path / "side", digest_of(b"only a record"))
    lone.write_bytes(b"x")
    os.utime(lone, (0, 0))
    async with opened(tmp_path) as store:
        assert await store.partials() == [digest_of(b"kept")]
    assert sorted(path.name for path in kept.parent.iterdir()) == [
        kept.name,
        f"{kept.name}.record",
    ]


async def test_going_on_with_a_blob_keeps_it_for_as_long_again(tmp_path):
    path = await unfinished(tmp_path, b"kept", LIFETIME_S - 1)
    record = record_of(tmp_path / "side", digest_of(b"kept"))
    before = record.stat().st_mtime
    async with opened(tmp_path) as store, await store.partial(digest_of(b"kept"), MiB):
        pass
    assert record.stat().st_mtime > before
    assert path.exists()


async def test_an_old_unfinished_blob_that_another_process_writes_is_left_alone(tmp_path):
    path = await unfinished(tmp_path, b"theirs", LIFETIME_S + 1)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with opened(tmp_path):
            pass
    assert path.exists()
    assert record_of(tmp_path / "side", digest_of(b"theirs")).exists()


async def test_a_store_that_may_only_be_read_removes_no_unfinished_blob(tmp_path):
    path = await unfinished(tmp_path, b"old", LIFETIME_S + 1)
    async with opened(tmp_path, read_only=True):
        pass
    assert path.exists()


async def test_opening_a_store_removes_no_whole_blob(tmp_path):
    async with opened(tmp_path) as store:
        digest = await store.put(b"named by nobody")
        os.utime(store.blob_path(digest), (0, 0))
    async with opened(tmp_path) as store:
        assert await store.has(digest)


async def test_leftovers_are_swept_wherever_files_are_made(tmp_path):
    left = [
        tmp_path / folder / name
        for folder, name in (
            ("side/partials", "new-0123456789abcdef"),
            ("side/partials", "new-0123456789abcdef-link"),
            ("side/chunk-maps", "new-0123456789abcdef"),
            ("models/.omx", "new-0123456789abcdef"),
            ("models", ".new-0123456789abcdef"),
        )
    ]
    theirs = tmp_path / "models/new-model.gguf"
    for path in (*left, theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    async with opened(tmp_path):
        pass
    assert not [path for path in left if path.exists()]
    assert theirs.exists()


async def test_what_was_given_up_but_cannot_be_removed_does_not_stop_the_store(tmp_path, caplog):
    (tmp_path / "side").mkdir()
    (tmp_path / "side/partials").write_text("a file where the folder should be")
    async with opened(tmp_path) as store:
        assert await store.blobs() == []
    assert "cannot remove what was given up" in caplog.text


@pytest.fixture
def no_more_files():
    """A switch: from then on this process can open nothing."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def switch() -> None:
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))

    yield switch
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_a_node_that_ran_out_of_files_says_so_whatever_it_is_asked(
    store, tmp_path, no_more_files
):
    models = ollamas_store(tmp_path / "models")
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    await store.put(b"y")
    manifest = await store.manifest(NAME)
    calls = [
        (store.open, DIGEST),
        (store.chunk_map, DIGEST),
        (store.manifest, NAME),
        (store.blobs,),
        (store.put, b"new"),
        (store.import_file, path),
        (store.partial, digest_of(b"other"), 5),
        (store.put_manifest, parse_model_name("tiny:new"), manifest),
        (store.remove_manifest, NAME),
    ]
    no_more_files()
    for call, *arguments in calls:
        with pytest.raises(LocalTrouble, match=r"too many open files.*ulimit -n"):
            await call(*arguments)
    assert await store.has(DIGEST)
    assert (models / "manifests/registry.ollama.ai/library/tiny/1b").is_file()


async def test_what_the_system_has_no_name_for_still_names_the_path(store, monkeypatch):
    await store.put(BLOB)
    path = str(store.blob_path(DIGEST))

    def refuse(*args: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(LocalTrouble) as caught:
        await store.size_of(DIGEST)
    assert path in str(caught.value)
    assert os.strerror(errno.ESTALE) in str(caught.value)


async def test_a_store_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    async with open_disk_store(tmp_path / "file/models", tmp_path / "side", SETTINGS) as store:
        with pytest.raises((StoreDamaged, StoreReadOnly)):
            await store.put(b"x")


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreReadOnly),
        (errno.EACCES, AccessRefused),
        (errno.EIO, StoreDamaged),
        (errno.ENOTDIR, StoreDamaged),
        (errno.EMFILE, LocalTrouble),
        (errno.ENODEV, LocalTrouble),
    ],
)
async def test_what_the_system_refuses_comes_out_as_an_error_of_ours(
    store, monkeypatch, number, error
):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB[:MiB])
        with monkeypatch.context() as patch:

            def refuse(*args: object) -> None:
                raise OSError(number, os.strerror(number))

            patch.setattr("ollamamax_p2p.content.partial_blob.write_all", refuse)
            with pytest.raises(error):
                await partial.write(MiB, BLOB[MiB : 2 * MiB])
        assert partial.missing() == [(MiB, len(BLOB))]
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(MiB, len(BLOB))]


@contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of so many megabytes, where one can be mounted."""
    folder.mkdir()
    size = f"size={megabytes}m"
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


async def write_in_chunks(partial, data: bytes, start: int) -> None:
    for at in range(start, len(data), MiB):
        await partial.write(at, data[at : at + MiB])


@pytest.mark.counterpart
async def test_a_disk_that_fills_up_halfway_loses_nothing(tmp_path):
    data = random.Random(3).randbytes(12 * MiB)
    digest = digest_of(data)
    with small_disk(tmp_path / "disk", 16) as disk:
        async with open_disk_store(disk / "models", disk / "side", SETTINGS) as store:
            async with await store.partial(digest, len(data)) as partial:
                await partial.write(0, data[: 4 * MiB])
                ballast = disk / "ballast"
                free = shutil.disk_usage(disk).free
                ballast.write_bytes(bytes(free - 2 * MiB))
                with pytest.raises(StoreFull, match="run the same command again"):
                    await write_in_chunks(partial, data, start=4 * MiB)
                held = partial.missing()[0][0]
                assert held >= 4 * MiB
                assert await partial.read_at(0, held) == data[:held]
            assert not await store.has(digest)
            with pytest.raises(StoreFull):
                await store.partial(digest_of(b""), 8 * MiB)
            ballast.unlink()
            async with await store.partial(digest, len(data)) as partial:
                assert partial.missing() == [(held, len(data))]
                await partial.write(held, data[held:])
                await partial.commit()
            assert await store.has(digest)


# -- crashes -----------------------------------------------------------------------------------

CHUNK = 64 * 1024
CHILD = """
import sys, random, trio
from pathlib import Path
from ollamamax_p2p.content import ContentSettings, open_disk_store
from ollamamax_p2p.content.core.digest import digest_of

folder, chunk, interval = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = random.Random(11).randbytes(200 * chunk)

async def main():
    settings = ContentSettings(reserve_bytes=0, record_interval_bytes=interval)
    async with open_disk_store(folder / "models", folder / "side", settings) as store:
        async with await store.partial(digest_of(data), len(data)) as partial:
            missing = [at for start, end in partial.missing() for at in range(start, end, chunk)]
            random.Random().shuffle(missing)
            for at in missing:
                print(at, flush=True)
                await partial.write(at, data[at : at + chunk])
                print("done", flush=True)
            await partial.commit()
    print("all", flush=True)

trio.run(main)
"""


@pytest.mark.network
async def test_a_process_killed_at_any_moment_loses_only_what_was_in_flight(tmp_path):
    """Twenty kills of one fetch, each resumed by the next process."""
    data = random.Random(11).randbytes(200 * CHUNK)
    digest, dice = digest_of(data), random.Random(5)
    held: set[int] = set()
    for kill in range(20):
        written, in_flight = run_and_kill(tmp_path, lines=dice.randrange(0, 18) + 1)
        assert not (tmp_path / "models/blobs" / file_name(digest)).exists()
        assert not written & held, "a chunk that was there was fetched again"
        async with (
            open_disk_store(tmp_path / "models", tmp_path / "side", SETTINGS) as store,
            await store.partial(digest, len(data)) as partial,
        ):
            gaps = partial.missing()
            missing = {at for start, end in gaps for at in range(start, end, CHUNK)}
            now = set(range(0, len(data), CHUNK)) - missing
            assert held | written <= now, f"kill {kill} lost what had been written"
            assert len(in_flight) <= 1
            assert now - held - written <= in_flight
            for at in now:
                assert await partial.read_at(at, CHUNK) == data[at : at + CHUNK]
            held = now
    assert 0 < len(held) < 200
    written, _ = run_and_kill(tmp_path, lines=10_000)
    assert (tmp_path / "models/blobs" / file_name(digest)).read_bytes() == data


def run_and_kill(folder: Path, lines: int) -> tuple[set[int], set[int]]:
    """Let a process fetch until it has said so many lines, and kill it there.

    Returns the chunks it had written, and the one it was writing.
    """
    arguments = [sys.executable, "-c", CHILD, str(folder), str(CHUNK), str(4 * CHUNK)]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    said = []
    assert child.stdout is not None
    with child:
        for line in child.stdout:
            said.append(line.strip())
            if len(said) == lines:
                break
        child.send_signal(signal.SIGKILL)
        # What it still said between the line that we read and its end counts as well.
        said += [line.strip() for line in child.stdout]
    begun = [int(line) for line in said if line.isdigit()]
    done = said.count("done")
    return set(begun[:done]), set(begun[done:])


@pytest.mark.parametrize("seed", range(25))
async def test_a_power_cut_takes_only_what_was_not_yet_on_the_disk(tmp_path, seed):
    """The disk as a power cut may leave it: what was synced is there; of everything since, any
    page may be old, and the record may end anywhere after its last mark.
    """
    dice = random.Random(seed)
    data = dice.randbytes(40 * CHUNK)
    digest = digest_of(data)
    offsets = dice.sample(range(0, len(data), CHUNK), 30)
    image = tmp_path / "image"
    async with (
        open_disk_store(tmp_path / "models", tmp_path / "side", SETTINGS) as store,
        await store.partial(digest, len(data)) as partial,
    ):
        for at in offsets[:15]:
            await partial.write(at, data[at : at + CHUNK])
        await partial.flush()
        synced_record = record_of(tmp_path / "side", digest).stat().st_size
        for at in offsets[15:]:
            await partial.write(at, data[at : at + CHUNK])
        shutil.copytree(tmp_path / "side", image / "side")
    with (image / "side/partials" / file_name(digest)).open("r+b") as file:
        for at in offsets[15:]:
            for page in range(at, at + CHUNK, 4096):
                if dice.random() < 0.1:
                    file.seek(page)
                    file.write(bytes(4096))
    record = record_of(image / "side", digest)
    if dice.random() < 0.5:
        whole = record.read_bytes()
        kept = dice.randrange(synced_record, len(whole) + 1)
        record.write_bytes(whole[:kept] + dice.randbytes(dice.randrange(40)))
    async with open_disk_store(image / "models", image / "side", SETTINGS) as store:
        async with await store.partial(digest, len(data)) as partial:
            held = {
                at
                for at in range(0, len(data), CHUNK)
                if not any(start < at + CHUNK and at < end for start, end in partial.missing())
            }
            assert set(offsets[:15]) <= held <= set(offsets)
            for at in held:
                assert await partial.read_at(at, CHUNK) == data[at : at + CHUNK]
            for start, end in partial.missing():
                await partial.write(start, data[start:end])
            await partial.commit()
        assert await store.has(digest)


def record_of(side: Path, digest: str) -> Path:
    return side / "partials" / f"{file_name(digest)}.record"


async def test_an_old_record_without_its_bytes_is_not_believed(store, tmp_path):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB[:MiB])
    (tmp_path / "side/partials" / file_name(DIGEST)).unlink()
    for _ in range(2):
        async with await store.partial(DIGEST, len(BLOB)) as partial:
            assert partial.missing() == [(0, len(BLOB))]


async def test_a_record_that_no_longer_fits_on_the_disk_notes_nothing(store, monkeypatch):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB[:MiB])
        with monkeypatch.context() as patch:

            def half(descriptor: int, data: bytes, offset: int) -> None:
                if len(data) < 100:
                    os.pwrite(descriptor, data[:5], offset)
                    raise OSError(errno.ENOSPC, "full")
                os.pwrite(descriptor, data, offset)

            patch.setattr("ollamamax_p2p.content.partial_blob.write_all", half)
            with pytest.raises(StoreFull):
                await partial.write(MiB, BLOB[MiB : 2 * MiB])
        await partial.write(2 * MiB, BLOB[2 * MiB :])
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(MiB, 2 * MiB)]


async def test_a_lost_record_begins_anew(store, tmp_path):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB[:MiB])
    record_of(tmp_path / "side", DIGEST).write_bytes(b"nonsense")
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, len(BLOB))]


async def test_writers_are_kept_out_while_the_whole_is_checked(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB)
        # Hashing waits for a thread, for as long as others have them all.
        others = [object() for _ in range(SETTINGS.hash_threads)]
        for other in others:
            await store._hash_limiter.acquire_on_behalf_of(other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial.commit)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ValueError, match="checked as a whole"):
                await partial.write(0, b"late")
            with pytest.raises(ValueError, match="checked as a whole"):
                await partial.commit()
            for other in others:
                store._hash_limiter.release_on_behalf_of(other)
    async with await store.open(DIGEST) as reader:
        assert await reader.read_at(0, 4) == BLOB[:4]


async def test_a_late_duplicate_finishes_before_the_whole_is_checked(store):
    """In the endgame the same chunk comes from two peers; one of them is still being written."""
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial.write, 0, BLOB[:MiB])
            await trio.testing.wait_all_tasks_blocked()
            await partial.commit()
    assert store.blob_path(DIGEST).read_bytes() == BLOB


async def test_files_are_closed_only_when_nobody_uses_them(store):
    await store.put(BLOB)
    async with trio.open_nursery() as nursery:
        partial = await store.partial(digest_of(b"other"), MiB)
        reader = await store.open(DIGEST)
        for _ in range(20):
            nursery.start_soon(partial.write, 0, BLOB[:MiB])
            nursery.start_soon(reader.read_at, 0, MiB)
        await trio.testing.wait_all_tasks_blocked()
        await reader.__aexit__()
        partial.abandon()
    async with await store.partial(digest_of(b"other"), MiB) as partial:
        assert partial.missing() == []


async def test_an_import_of_a_file_that_shrinks_is_refused(store, tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)

    def shrink(source: int, target: int) -> bool:
        os.truncate(path, 100)
        return False

    monkeypatch.setattr("ollamamax_p2p.content.disk_store.share_blocks", shrink)
    with pytest.raises(BadModelFile, match="became shorter"):
        await store.import_file(path)
    assert await store.blobs() == []


async def test_a_file_system_that_shares_blocks_is_taken_at_its_word(store, tmp_path, monkeypatch):
    """The clone is hashed, not the file: that may be edited already."""
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)

    def clone(source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, len(BLOB), 0), 0)
        return True

    monkeypatch.setattr("ollamamax_p2p.content.disk_store.share_blocks", clone)
    assert await store.import_file(path) == DIGEST


async def test_closing_the_store_lets_go_of_unfinished_blobs(tmp_path):
    for _ in range(2):
        async with open_disk_store(tmp_path / "models", tmp_path / "side", SETTINGS) as store:
            partial = await store.partial(DIGEST, len(BLOB))
            await partial.write(0, BLOB[:CHUNK])
        with pytest.raises(ValueError, match="closed"):
            await partial.write(0, b"x")

"""What every BlobStore keeps to: the one on disk, and the one in memory that stands in for it."""

import hashlib
import os
import shutil
from datetime import timedelta
from itertools import accumulate

import pytest
import trio

from ollamamax_p2p.content import ContentSettings, RamStore, open_disk_store
from ollamamax_p2p.content.core.chunk_map import ChunkMap, MiB
from ollamamax_p2p.content.core.chunking import cut
from ollamamax_p2p.content.core.digest import digest_of, parse_digest
from ollamamax_p2p.content.core.manifest import (
    CONFIG_TYPE,
    MODEL_TYPE,
    TEMPLATE_TYPE,
    Layer,
    Manifest,
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import (
    AccessRefused,
    BadModelFile,
    BlobNotFound,
    DigestMismatch,
    ModelNotFound,
    StoreFull,
    StoreReadOnly,
)

BLOB = os.urandom(3 * MiB + 5)
DIGEST = digest_of(BLOB)
NAME = parse_model_name("Tiny")


@pytest.fixture(params=["disk", "ram"])
async def store(request, tmp_path):
    if request.param == "ram":
        yield RamStore()
        return
    async with open_disk_store(
        tmp_path / "models", tmp_path / "side", ContentSettings(reserve_bytes=0)
    ) as store:
        yield store


@pytest.fixture(params=["disk", "ram"])
async def locked_store(request, tmp_path):
    """A store with one model in it that may only be read."""
    if request.param == "ram":
        store = RamStore()
        await store.put_manifest(NAME, await model_of(store))
        store._writable = False
        yield store
        return
    settings = ContentSettings(reserve_bytes=0)
    async with open_disk_store(tmp_path / "models", tmp_path / "side", settings) as store:
        await store.put_manifest(NAME, await model_of(store))
    async with open_disk_store(
        tmp_path / "models", tmp_path / "side", settings, read_only=True
    ) as store:
        yield store


async def model_of(store, *blobs: bytes, config: bytes = b"{}\n") -> Manifest:
    layers = [Layer(MODEL_TYPE, await store.put(blob), len(blob)) for blob in blobs or (b"model",)]
    return build_manifest(Layer(CONFIG_TYPE, await store.put(config), len(config)), layers)


def map_of(blob: bytes, chunk: int = MiB) -> ChunkMap:
    """Even chunks of a size of one's own; `true_map_of` has the cut that everybody makes."""
    return mapped(blob, [len(blob[at : at + chunk]) for at in range(0, len(blob), chunk)])


def true_map_of(blob: bytes) -> ChunkMap:
    return mapped(blob, cut(len(blob)))


def mapped(blob: bytes, lengths: list[int]) -> ChunkMap:
    ends = list(accumulate(lengths))
    parts = [blob[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return ChunkMap(
        digest_of(blob),
        tuple(map(len, parts)),
        tuple(hashlib.sha256(part).digest() for part in parts),
    )


# -- whole blobs -------------------------------------------------------------------------------


async def test_a_blob_that_was_put_is_read_back(store):
    assert not await store.has(DIGEST)
    assert await store.put(BLOB) == DIGEST
    assert await store.put(BLOB) == DIGEST
    assert await store.has(DIGEST)
    assert await store.size_of(DIGEST) == len(BLOB)
    assert await store.blobs() == [DIGEST]
    async with await store.open(DIGEST) as reader:
        assert reader.size == len(BLOB)
        assert await reader.read_at(0, len(BLOB)) == BLOB
        assert await reader.read_at(MiB - 1, 7) == BLOB[MiB - 1 : MiB + 6]
        assert await reader.read_at(len(BLOB), 0) == b""


async def test_an_empty_blob_is_a_blob(store):
    digest = await store.put(b"")
    assert await store.size_of(digest) == 0
    assert (await store.chunk_map(digest)).chunk_count == 0
    async with await store.open(digest) as reader:
        assert await reader.read_at(0, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, len(BLOB) + 1), (len(BLOB) + 1, 0)])
async def test_reading_outside_of_a_blob_is_refused(store, offset, length):
    await store.put(BLOB)
    async with await store.open(DIGEST) as reader:
        with pytest.raises(ValueError, match="outside"):
            await reader.read_at(offset, length)


async def test_a_blob_that_is_not_there_is_not_found(store):
    for call in (store.size_of, store.open, store.chunk_map):
        with pytest.raises(BlobNotFound) as caught:
            await call(DIGEST)
        assert caught.value.digest == DIGEST


async def test_a_reader_outlives_the_removal_of_its_blob(store):
    await store.put(BLOB)
    async with await store.open(DIGEST) as reader:
        assert await store.remove_unused([DIGEST]) == [DIGEST]
        assert not await store.has(DIGEST)
        assert await reader.read_at(0, 10) == BLOB[:10]


async def test_an_imported_file_becomes_a_blob_and_stays_as_it_is(store, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)
    path.chmod(0o600)
    before = path.stat()
    for link in (False, True):
        assert await store.import_file(path, link=link) == DIGEST
    async with await store.open(DIGEST) as reader:
        assert await reader.read_at(0, len(BLOB)) == BLOB
    after = path.stat()
    assert path.read_bytes() == BLOB
    assert (before.st_mtime_ns, before.st_mode) == (after.st_mtime_ns, after.st_mode)


async def test_editing_an_imported_file_in_place_does_not_change_the_blob(store, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(BLOB)
    digest = await store.import_file(path)
    with path.open("r+b") as file:
        file.write(b"edited")
    async with await store.open(digest) as reader:
        assert await reader.read_at(0, 6) == BLOB[:6]


async def test_a_file_that_cannot_be_imported_is_named(store, tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises((BadModelFile, AccessRefused), match=str(path)):
            await store.import_file(path)
    assert await store.blobs() == []


# -- unfinished blobs --------------------------------------------------------------------------


async def test_a_blob_written_in_any_order_becomes_visible_when_committed(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, len(BLOB))]
        await partial.write(2 * MiB, BLOB[2 * MiB :])
        await partial.write(0, memoryview(BLOB)[:MiB])
        assert partial.missing() == [(MiB, 2 * MiB)]
        assert not await store.has(DIGEST)
        assert await store.partials() == [DIGEST]
        await partial.write(MiB, BLOB[MiB : 2 * MiB])
        assert partial.missing() == []
        await partial.commit()
    assert await store.has(DIGEST)
    assert await store.partials() == []
    async with await store.open(DIGEST) as reader:
        assert await reader.read_at(0, len(BLOB)) == BLOB


async def test_an_unfinished_blob_is_gone_on_with(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.use_map(map_of(BLOB))
        await partial.write(MiB, BLOB[MiB : 2 * MiB])
    assert await store.partials() == [DIGEST]
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, MiB), (2 * MiB, len(BLOB))]
        assert partial.map_digest == map_of(BLOB).digest
        assert await partial.read_at(MiB, MiB) == BLOB[MiB : 2 * MiB]


async def test_an_unfinished_blob_that_turns_out_to_have_another_size_begins_anew(store):
    async with await store.partial(DIGEST, len(BLOB) - 1) as partial:
        await partial.write(0, BLOB[:MiB])
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, len(BLOB))]
        await partial.write(0, BLOB)
        await partial.commit()
    assert await store.has(DIGEST)


async def test_a_blob_is_written_by_one_at_a_time(store):
    async with await store.partial(DIGEST, len(BLOB)):
        with pytest.raises(ValueError, match="already"):
            await store.partial(DIGEST, len(BLOB))
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, len(BLOB))]


async def test_many_sources_write_one_blob_at_once(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        async with trio.open_nursery() as nursery:
            for at in range(0, len(BLOB), 100_000):
                nursery.start_soon(partial.write, at, BLOB[at : at + 100_000])
        await partial.commit()
    assert await store.has(DIGEST)


@pytest.mark.parametrize("offset", [-1, len(BLOB) - 1])
async def test_writing_outside_of_a_blob_is_refused(store, offset):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        with pytest.raises(ValueError, match="outside"):
            await partial.write(offset, b"xx")
        assert partial.missing() == [(0, len(BLOB))]


async def test_only_what_was_written_can_be_read_back(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB[:100])
        for offset, length in ((0, 101), (100, 1), (-1, 1), (0, len(BLOB) + 1)):
            with pytest.raises(ValueError, match="not been written"):
                await partial.read_at(offset, length)


async def test_a_blob_with_gaps_is_not_committed(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(1, BLOB[1:])
        with pytest.raises(ValueError, match="complete"):
            await partial.commit()


async def test_wrong_bytes_never_get_the_blobs_name(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, bytes(len(BLOB)))
        with pytest.raises(DigestMismatch) as caught:
            await partial.commit()
        assert caught.value.expected == DIGEST
        assert not await store.has(DIGEST)
        # The bytes stay, so that what an honest map confirms of them is kept.
        await partial.write(0, BLOB[:MiB])
        await partial.use_map(map_of(BLOB))
        assert partial.missing() == [(MiB, len(BLOB))]
        await partial.write(MiB, BLOB[MiB:])
        await partial.commit()
    assert await store.has(DIGEST)


async def test_another_map_keeps_what_it_confirms(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        lie = map_of(BLOB, 2 * MiB)
        await partial.use_map(lie)
        await partial.write(0, BLOB[:MiB] + bytes(MiB))
        await partial.use_map(lie)
        assert partial.missing() == [(2 * MiB, len(BLOB))]
        await partial.use_map(map_of(BLOB))
        assert partial.missing() == [(MiB, len(BLOB))]
        assert partial.map_digest == map_of(BLOB).digest
        await partial.use_map(None)
        assert partial.map_digest is None
        assert partial.missing() == [(MiB, len(BLOB))]


async def test_a_map_of_something_else_is_refused(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        with pytest.raises(ValueError, match="is not one of"):
            await partial.use_map(map_of(BLOB[:-1]))


async def test_a_discarded_blob_leaves_nothing(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.write(0, BLOB)
        await partial.discard()
        with pytest.raises(ValueError, match="closed"):
            await partial.write(0, BLOB)
    assert await store.partials() == []
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert partial.missing() == [(0, len(BLOB))]


async def test_a_closed_unfinished_blob_takes_nothing_more(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        await partial.flush()
    for call in (partial.flush, partial.discard):
        with pytest.raises(ValueError, match="closed"):
            await call()


async def test_an_empty_blob_is_complete_from_the_start(store):
    digest = digest_of(b"")
    async with await store.partial(digest, 0) as partial:
        await partial.write(0, b"")
        assert partial.missing() == []
        await partial.commit()
    assert await store.has(digest)


async def test_a_cancelled_writer_leaves_a_consistent_blob(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        with trio.CancelScope() as scope:
            scope.cancel()
            await partial.write(0, BLOB[:MiB])
        for start, end in partial.missing():
            await partial.write(start, BLOB[start:end])
        await partial.commit()
    assert await store.has(DIGEST)


# -- chunk maps --------------------------------------------------------------------------------


async def test_a_chunk_map_describes_its_blob_and_is_built_once(store):
    await store.put(BLOB)
    built = await store.chunk_map(DIGEST)
    assert built == true_map_of(BLOB)
    assert (built.blob, built.size) == (DIGEST, len(BLOB))
    assert await store.chunk_map(DIGEST) == built


async def test_a_chunk_map_asked_for_by_many_is_the_same_for_all(store):
    await store.put(BLOB)
    maps = []

    async def ask() -> None:
        maps.append(await store.chunk_map(DIGEST))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert maps == [true_map_of(BLOB)] * 5


# -- manifests ---------------------------------------------------------------------------------


async def test_a_model_is_found_by_its_name_in_any_case(store):
    manifest = await model_of(store)
    await store.put_manifest(NAME, manifest)
    assert await store.manifest(NAME) == manifest
    assert await store.manifest(parse_model_name("TINY:Latest")) == manifest
    (stored,) = await store.models()
    assert (stored.name, stored.manifest_digest, stored.size) == (NAME, manifest.digest, 8)
    assert stored.modified_at.utcoffset() == timedelta(0)


async def test_a_name_in_another_case_renames_nothing(store):
    await store.put_manifest(NAME, await model_of(store))
    newer = await model_of(store, b"newer")
    await store.put_manifest(parse_model_name("tiny"), newer)
    assert [model.name for model in await store.models()] == [NAME]
    assert await store.manifest(NAME) == newer


async def test_a_model_whose_blob_is_missing_is_not_named(store):
    manifest = build_manifest(Layer(CONFIG_TYPE, DIGEST, 1), [])
    with pytest.raises(BlobNotFound):
        await store.put_manifest(NAME, manifest)
    assert await store.models() == []


async def test_an_unknown_model_is_not_found(store):
    for call in (store.manifest, store.remove_manifest):
        with pytest.raises(ModelNotFound) as caught:
            await call(parse_model_name("absent"))
        assert caught.value.name == "absent:latest"


async def test_removing_a_model_spares_what_others_need(store):
    shared, alone = b"shared", b"alone"
    one, two = parse_model_name("one"), parse_model_name("x/two:1b")
    await store.put_manifest(one, await model_of(store, shared, alone))
    await store.put_manifest(two, await model_of(store, shared))
    assert await store.remove_manifest(parse_model_name("ONE")) == [digest_of(alone)]
    assert await store.has(digest_of(shared))
    with pytest.raises(ModelNotFound):
        await store.manifest(one)
    gone = await store.remove_manifest(two)
    assert sorted(gone) == sorted([digest_of(shared), digest_of(b"{}\n")])
    assert await store.blobs() == []
    assert await store.models() == []


async def test_unused_blobs_are_removed_on_demand_only(store):
    await store.put_manifest(NAME, await model_of(store, b"model"))
    await store.put(BLOB)
    absent = parse_digest("sha256:" + "0" * 64)
    candidates = [DIGEST, digest_of(b"model"), absent, DIGEST]
    assert await store.remove_unused(candidates) == [DIGEST]
    assert await store.has(digest_of(b"model"))


async def test_the_newest_model_is_listed_first(store):
    names = [parse_model_name(text) for text in ("b", "a", "c")]
    for name in names:
        await store.put_manifest(name, await model_of(store, str(name).encode()))
    listed = await store.models()
    times = [model.modified_at for model in listed]
    assert times == sorted(times, reverse=True)
    assert {model.name for model in listed} == set(names)


async def test_a_template_layer_is_a_blob_like_any_other(store):
    text = b"{{ .Prompt }}"
    layer = Layer(TEMPLATE_TYPE, await store.put(text), len(text))
    config = Layer(CONFIG_TYPE, await store.put(b"{}"), 2)
    manifest = build_manifest(config, [layer, layer])
    await store.put_manifest(NAME, manifest)
    assert manifest.size == len(text) + 2


# -- read-only, full ---------------------------------------------------------------------------


async def test_a_store_that_may_only_be_read_serves_and_refuses_to_write(locked_store, tmp_path):
    store = locked_store
    assert not store.writable
    path = tmp_path / "file"
    path.write_bytes(b"x")
    manifest = await store.manifest(NAME)
    assert await store.has(manifest.layers[0].digest)
    await store.chunk_map(manifest.layers[0].digest)
    refused = [
        (store.put, b"x"),
        (store.import_file, path),
        (store.partial, DIGEST, 1),
        (store.put_manifest, NAME, manifest),
        (store.remove_manifest, NAME),
        (store.remove_unused, []),
    ]
    for call, *arguments in refused:
        with pytest.raises(StoreReadOnly):
            await call(*arguments)
    assert await store.models() != []


@pytest.fixture(params=["disk", "ram"])
async def full_store(request, tmp_path):
    """A store with a megabyte of room, more or less."""
    if request.param == "ram":
        yield RamStore(capacity_bytes=MiB)
        return
    disk = os.statvfs(tmp_path)
    reserve = disk.f_bavail * disk.f_frsize - 64 * MiB
    async with open_disk_store(
        tmp_path / "models", tmp_path / "side", ContentSettings(reserve_bytes=reserve)
    ) as store:
        yield store


async def test_a_blob_that_does_not_fit_is_refused_before_it_begins(full_store):
    size = 2**40
    assert await full_store.free_bytes() < size
    with pytest.raises(StoreFull) as caught:
        await full_store.partial(DIGEST, size)
    assert caught.value.needed == size
    assert caught.value.free < size
    with pytest.raises(StoreFull):
        await full_store.partial(DIGEST, size)


async def test_unfinished_blobs_that_are_open_count_as_taken(tmp_path):
    store = RamStore(capacity_bytes=10 * MiB)
    async with await store.partial(DIGEST, 9 * MiB):
        assert await store.free_bytes() == MiB
        with pytest.raises(StoreFull):
            await store.partial(digest_of(b""), 2 * MiB)


async def test_room_promised_to_one_pull_is_not_given_to_another(tmp_path):
    disk = os.statvfs(tmp_path)
    reserve = disk.f_bavail * disk.f_frsize - 2**30
    settings = ContentSettings(reserve_bytes=reserve)
    async with (
        open_disk_store(tmp_path / "models", tmp_path / "side", settings) as store,
        await store.partial(DIGEST, 2**29),
    ):
        assert await store.free_bytes() < 2**29 + 2**28
        with pytest.raises(StoreFull):
            await store.partial(digest_of(b""), 2**30)


async def arriving(*parts: bytes):
    for part in parts:
        await trio.lowlevel.checkpoint()
        yield part


@pytest.mark.parametrize("size", [None, len(BLOB)])
async def test_a_blob_is_received_in_parts_of_any_size(store, size):
    parts = BLOB[:1], BLOB[1:70_000], b"", BLOB[70_000:]
    await store.receive(DIGEST, arriving(*parts), size=size)
    async with await store.open(DIGEST) as reader:
        assert await reader.read_at(0, reader.size) == BLOB
    await store.receive(DIGEST, arriving(BLOB))  # once more does no harm
    assert await store.blobs() == [DIGEST]


async def test_a_blob_that_is_not_what_it_says_leaves_nothing(store):
    with pytest.raises(DigestMismatch) as caught:
        await store.receive(DIGEST, arriving(BLOB, b"more"))
    assert caught.value.actual == digest_of(BLOB + b"more")
    assert (await store.blobs(), await store.partials()) == ([], [])


async def test_a_blob_that_breaks_off_leaves_nothing(store, tmp_path):
    async def broken():
        yield BLOB
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await store.receive(DIGEST, broken())
    with trio.CancelScope() as scope:

        async def cancelled():
            yield BLOB
            scope.cancel()
            await trio.lowlevel.checkpoint()

        await store.receive(DIGEST, cancelled())
    assert scope.cancelled_caught
    assert await store.blobs() == []
    assert [path for path in tmp_path.rglob("new-*")] == []


async def test_a_blob_too_large_to_receive_is_refused_before_it_begins(store):
    asked = []

    async def never():
        asked.append(True)
        yield b""

    with pytest.raises(StoreFull):
        await store.receive(DIGEST, never(), size=2**60)
    assert not asked


async def test_a_blob_that_does_not_say_its_size_stops_where_the_room_ends(tmp_path):
    ram = RamStore(capacity_bytes=len(BLOB) - 1)
    with pytest.raises(StoreFull):
        await ram.receive(DIGEST, arriving(BLOB[:9], BLOB[9:]))
    free = shutil.disk_usage(tmp_path).free
    nearly_all = ContentSettings(reserve_bytes=free + 2**30)
    async with open_disk_store(tmp_path / "models", tmp_path / "side", nearly_all) as disk:
        with pytest.raises(StoreFull):
            await disk.receive(DIGEST, arriving(BLOB))
        assert await disk.blobs() == []


async def test_a_store_that_may_only_be_read_receives_nothing(locked_store):
    with pytest.raises(StoreReadOnly):
        await locked_store.receive(DIGEST, arriving(BLOB))

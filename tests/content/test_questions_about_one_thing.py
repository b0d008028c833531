"""What a store says of one unfinished blob and of one manifest, in both kinds of store."""

from datetime import UTC, datetime, timedelta

import pytest

from ollamamax_p2p.content import ContentSettings, RamStore, open_disk_store
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.manifest import CONFIG_TYPE, Layer, build_manifest
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.content.disk_store import _date
from ollamamax_p2p.errors import ModelNotFound

MiB = 1024 * 1024
BLOB = bytes(range(256)) * 16 * 1024
DIGEST = digest_of(BLOB)
NAME = parse_model_name("some:model")


@pytest.fixture(params=["disk", "ram"])
async def store(request, tmp_path):
    if request.param == "ram":
        yield RamStore(capacity_bytes=64 * MiB)
        return
    settings = ContentSettings(reserve_bytes=0)
    async with open_disk_store(tmp_path / "models", tmp_path / "side", settings) as store:
        yield store


async def test_nothing_begun_is_not_nothing_missing(store):
    assert await store.missing_bytes(DIGEST) is None


async def test_the_rest_of_an_unfinished_blob_takes_no_more_room_than_it_misses(store):
    async with await store.partial(DIGEST, len(BLOB)) as partial:
        assert await store.missing_bytes(DIGEST) == 0
        await partial.write(0, BLOB[:MiB])
    missing = await store.missing_bytes(DIGEST)
    if isinstance(store, RamStore):
        assert missing == 0
    else:
        assert len(BLOB) - MiB - 64 * 1024 <= missing <= len(BLOB) - MiB


async def test_a_begun_blob_without_bytes_misses_all(tmp_path):
    settings = ContentSettings(reserve_bytes=0)
    async with open_disk_store(tmp_path / "models", tmp_path / "side", settings) as store:
        async with await store.partial(DIGEST, len(BLOB)):
            pass
        assert await store.missing_bytes(DIGEST) == len(BLOB)


async def test_when_a_manifest_was_written(store):
    with pytest.raises(ModelNotFound):
        await store.modified_at(NAME)
    config = Layer(CONFIG_TYPE, await store.put(b"{}"), 2)
    await store.put_manifest(NAME, build_manifest(config, []))
    [stored] = await store.models()
    assert await store.modified_at(parse_model_name("SOME:Model")) == stored.modified_at
    assert abs(stored.modified_at - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_time_that_no_calendar_has_is_a_date_all_the_same():
    for written in (2.0**45, -(2.0**45), 2.0**80):
        assert _date(written) == datetime.fromtimestamp(0, UTC)

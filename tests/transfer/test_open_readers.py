"""Blobs that are open for uploads: shared, few, and closed when nobody reads them."""

import os

import pytest
import trio
import trio.testing

from ollamamax_p2p.content import ContentSettings, open_disk_store
from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.errors import BlobNotFound, LocalTrouble
from ollamamax_p2p.host import MessageStream
from ollamamax_p2p.transfer.core.messages import (
    Choke,
    ChunkPart,
    Have,
    NotHeld,
    Open,
    Unchoke,
    Want,
    fetcher_codec,
    source_codec,
)
from ollamamax_p2p.transfer.open_readers import IDLE_S, OpenReaders
from ollamamax_p2p.transfer.serve import STREAMS_PER_PEER_MAX
from ollamamax_p2p.wire import protocol_ids
from tests.transfer.swarm import open_swarm

BLOBS = [b"blob %d" % number for number in range(40)]


class CountedReader:
    """A blob of which it is known when it is closed; `gate` holds its readers up."""

    def __init__(self, store: "CountedStore", data: bytes) -> None:
        self._store, self._data = store, data
        self.size = len(data)

    async def read_at(self, offset: int, length: int) -> bytes:
        await self._store.gate.wait()
        if self._store.trouble is not None:
            raise self._store.trouble
        return self._data[offset : offset + length]

    async def __aenter__(self) -> "CountedReader":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._store.open_now -= 1


class CountedStore:
    """Only what is read from."""

    def __init__(self) -> None:
        self.blobs = {digest_of(blob): blob for blob in BLOBS}
        self.open_now = self.open_most = self.opened = 0
        self.gate = trio.Event()
        self.gate.set()
        self.trouble: Exception | None = None

    async def open(self, digest):
        await trio.lowlevel.checkpoint()
        if digest not in self.blobs:
            raise BlobNotFound(digest)
        self.opened += 1
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        return CountedReader(self, self.blobs[digest])


async def test_readers_of_one_blob_share_it():
    store = CountedStore()
    readers = OpenReaders(store)
    got = []

    async def read(offset: int) -> None:
        got.append(await readers.read_at(digest_of(BLOBS[7]), offset, 1))

    async with trio.open_nursery() as nursery:
        for offset in range(6):
            nursery.start_soon(read, offset)
    assert sorted(got) == sorted([b"b", b"l", b"o", b"b", b" ", b"7"])
    assert store.opened == 1
    await readers.aclose()
    assert store.open_now == 0


async def test_however_many_blobs_are_read_at_once_few_are_open():
    store = CountedStore()
    readers = OpenReaders(store, readers_max=4)
    store.gate = trio.Event()
    got = {}

    async def read(blob: bytes) -> None:
        got[blob] = await readers.read_at(digest_of(blob), 0, len(blob))

    async with trio.open_nursery() as nursery:
        for blob in BLOBS:
            nursery.start_soon(read, blob)
        await trio.testing.wait_all_tasks_blocked()
        assert store.open_now == 4
        store.gate.set()
    assert got == {blob: blob for blob in BLOBS}
    assert store.open_most == 4


async def test_what_nobody_reads_any_more_is_closed(autojump_clock):
    store = CountedStore()
    readers = OpenReaders(store)
    await readers.read_at(digest_of(BLOBS[0]), 0, 1)
    await trio.sleep(IDLE_S - 1)
    await readers.read_at(digest_of(BLOBS[1]), 0, 1)
    await trio.sleep(1)
    await readers.close_idle(trio.current_time())
    assert store.open_now == 1
    await trio.sleep(IDLE_S)
    await readers.close_idle(trio.current_time())
    assert store.open_now == 0


async def test_a_blob_that_is_being_read_is_not_closed():
    store = CountedStore()
    readers = OpenReaders(store)
    store.gate = trio.Event()
    got = []

    async def read() -> None:
        got.append(await readers.read_at(digest_of(BLOBS[0]), 0, 4))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await readers.aclose()
        assert store.open_now == 1
        store.gate.set()
    assert got == [b"blob"]


async def test_a_blob_that_could_not_be_read_is_opened_anew():
    store = CountedStore()
    readers = OpenReaders(store)
    store.trouble = LocalTrouble("the file became shorter")
    with pytest.raises(LocalTrouble):
        await readers.read_at(digest_of(BLOBS[0]), 0, 4)
    assert store.open_now == 0
    store.trouble = None
    assert await readers.read_at(digest_of(BLOBS[0]), 0, 4) == b"blob"
    assert store.opened == 2


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="needs /proc, to see which files are open"
)
async def test_one_member_with_many_streams_takes_few_descriptors(tmp_path, seed):
    def descriptors() -> int:
        store = str(tmp_path)
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.readlink(link).startswith(store) for link in links)

    settings = ContentSettings(reserve_bytes=0)
    async with (
        open_disk_store(tmp_path / "models", tmp_path / "side", settings) as store,
        open_swarm(seed) as swarm,
    ):
        holder = await swarm.start(await swarm.add_host(), holding=BLOBS, store=store)
        fetcher = await swarm.add_host()
        streams = []
        with trio.fail_after(60):
            for blob in BLOBS[:STREAMS_PER_PEER_MAX]:
                stream = await fetcher.open_stream(holder.id, protocol_ids.TRANSFER)
                talk = MessageStream(stream, sends=fetcher_codec, receives=source_codec)
                await talk.send(Open(blob=0, digest=raw_hash(digest_of(blob))))
                # Whoever is served already is told so before the blob is looked up.
                assert {type(await talk.receive()) for _ in range(2)} == {Have, Unchoke}
                await talk.send(Want(blob=0, chunk=0))
                assert (await _until(talk, ChunkPart)).data == blob
                streams.append(talk)
            assert 1 <= descriptors() <= 16
            for talk in streams:
                await talk.aclose()
            while descriptors():  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)


async def test_a_disk_in_trouble_costs_the_blob_and_nothing_else(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=BLOBS[:2])
        fetcher = await swarm.add_host()
        stream = await fetcher.open_stream(holder.id, protocol_ids.TRANSFER)
        talk = MessageStream(stream, sends=fetcher_codec, receives=source_codec)
        await talk.send(Open(blob=0, digest=raw_hash(digest_of(BLOBS[0]))))
        assert isinstance(await talk.receive(), Have)
        assert isinstance(await talk.receive(), Unchoke)
        opened = holder.store.open

        async def broken(digest):
            raise OSError(24, "Too many open files")

        holder.store.open = broken
        await talk.send(Want(blob=0, chunk=0))
        assert await talk.receive() == NotHeld(blob=0)
        assert isinstance(await talk.receive(), Choke)
        holder.store.open = opened
        await talk.send(Open(blob=1, digest=raw_hash(digest_of(BLOBS[1]))))
        await _until(talk, Unchoke)
        await talk.send(Want(blob=1, chunk=0))
        assert (await _until(talk, ChunkPart)).data == BLOBS[1]


async def _until(talk, kind):
    while not isinstance(message := await talk.receive(), kind):
        pass
    return message

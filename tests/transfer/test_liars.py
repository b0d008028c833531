"""Peers that lie, and what it costs: their own place, and some bytes of ours."""

import logging

import pytest
import trio

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import NoSources
from ollamamax_p2p.transfer.core.messages import (
    ChunkPart,
    GetMap,
    Have,
    HaveMore,
    MapPage,
    NotHeld,
    Open,
    Unchoke,
    Want,
)
from tests.transfer.ram_origin import RamOrigin
from tests.transfer.swarm import MiB, model_of, open_swarm, some_bytes

pytestmark = pytest.mark.usefixtures("repeatable")

DATA = some_bytes(12 * MiB)
DIGEST = digest_of(DATA)


def map_of(data, blob):
    """The map that an honest holder of these bytes makes, for a blob of any name."""
    import hashlib

    honest = [data[at : at + MiB] for at in range(0, len(data), MiB)]
    return ChunkMap(
        blob,
        tuple(len(chunk) for chunk in honest),
        tuple(hashlib.sha256(chunk).digest() for chunk in honest),
    )


class Liar:
    """Speaks the protocol as an honest complete holder does; subclasses bend one thing."""

    def __init__(self, chunk_map, data=DATA):
        self.chunk_map = chunk_map
        self.data = data

    async def __call__(self, stream):
        while (message := await stream.receive()) is not None:
            match message:
                case Open():
                    await self.have(stream, message)
                case GetMap():
                    await self.send_map(stream, message)
                case Want():
                    await self.send_chunk(stream, message)

    async def have(self, stream, message):
        await stream.send(self.offer(message))
        await stream.send(Unchoke())

    def offer(self, message, **changes):
        fields = {
            "blob": message.blob,
            "size": self.chunk_map.size,
            "chunk_count": self.chunk_map.chunk_count,
            "map_digest": raw_hash(self.chunk_map.digest),
            "complete": True,
            "chunks": b"",
        }
        return Have(**(fields | changes))

    async def send_map(self, stream, message):
        await stream.send(
            MapPage(
                blob=message.blob,
                first=message.first,
                lengths=list(self.chunk_map.lengths[message.first :]),
                hashes=list(self.chunk_map.hashes[message.first :]),
            )
        )

    async def send_chunk(self, stream, message):
        at = self.chunk_map.offsets[message.chunk]
        data = self.bytes_of(message.chunk, self.data[at : at + MiB])
        await stream.send(ChunkPart(blob=message.blob, chunk=message.chunk, offset=0, data=data))

    def bytes_of(self, chunk, data):
        return data


class SendsWrongChunks(Liar):
    def bytes_of(self, chunk, data):
        return bytes(len(data))


class SendsTenTimes(Liar):
    async def send_chunk(self, stream, message):
        for _ in range(10):
            await super().send_chunk(stream, message)


class SendsUnasked(Liar):
    async def have(self, stream, message):
        await super().have(stream, message)
        for chunk in range(self.chunk_map.chunk_count):
            await self.send_chunk(stream, Want(blob=message.blob, chunk=chunk))


class SendsDrops(Liar):
    def bytes_of(self, chunk, data):
        return data[:10]


class SendsNothing(Liar):
    async def send_chunk(self, stream, message):
        pass


class SendsBeyondTheChunk(Liar):
    def bytes_of(self, chunk, data):
        return data[: MiB // 2] + data[: MiB // 2 + 4]


class SendsAnotherMap(Liar):
    async def send_map(self, stream, message):
        other = map_of(bytes(self.chunk_map.size), DIGEST)
        await stream.send(
            MapPage(blob=0, first=0, lengths=list(other.lengths), hashes=list(other.hashes))
        )


class SendsShortPages(Liar):
    async def send_map(self, stream, message):
        await stream.send(MapPage(blob=0, first=message.first, lengths=[1], hashes=[bytes(32)]))


class SendsNoMap(Liar):
    async def send_map(self, stream, message):
        pass


class SendsMapsUnasked(Liar):
    async def have(self, stream, message):
        await super().have(stream, message)
        await super().send_map(stream, GetMap(blob=message.blob, first=0))
        await super().send_map(stream, GetMap(blob=message.blob, first=0))


class GivesAnotherSize(Liar):
    def offer(self, message, **changes):
        return super().offer(message, size=self.chunk_map.size + 1)


class HasMoreThanThereIs(Liar):
    async def have(self, stream, message):
        await stream.send(self.offer(message, complete=False, chunks=bytes(2)))
        await stream.send(HaveMore(blob=message.blob, chunks=[999]))


class TellsTooManyBits(Liar):
    def offer(self, message, **changes):
        return super().offer(message, complete=False, chunks=b"\xff" * 9)


class SpeaksOfAnotherBlob(Liar):
    async def have(self, stream, message):
        await stream.send(NotHeld(blob=message.blob + 1))


class TellsTwice(Liar):
    async def have(self, stream, message):
        await super().have(stream, message)
        await super().have(stream, message)


BANNED = [
    SendsWrongChunks,
    SendsTenTimes,
    SendsUnasked,
    SendsDrops,
    SendsBeyondTheChunk,
    SendsAnotherMap,
    SendsShortPages,
    SendsMapsUnasked,
    GivesAnotherSize,
    HasMoreThanThereIs,
    TellsTooManyBits,
    SpeaksOfAnotherBlob,
    TellsTwice,
]


@pytest.mark.parametrize("lie", BANNED)
async def test_a_liar_is_named_and_banned_and_the_others_do_the_work(
    autojump_clock, seed, caplog, lie
):
    async with open_swarm(seed) as swarm:
        honest = await swarm.add(holding=[DATA], upload_bytes_s=4 * MiB)
        liar = await swarm.add_evil(
            lie(await honest.store.chunk_map(DIGEST)), claims=[DIGEST], upload_bytes_s=4 * MiB
        )
        me = await swarm.add()
        async with me.feed.subscribe() as events:
            with caplog.at_level(logging.WARNING), trio.fail_after(120):
                tally = await me.transfer.fetch(DIGEST, len(DATA))
            assert liar.peer_id in me.transfer.bans
            assert list(tally.banned) == [liar.peer_id]
            event = await events.__anext__()
        assert (event.kind, event.facts["peer"]) == ("peer.banned", liar.peer_id)
        assert liar.peer_id in caplog.text
        assert tally.refetched <= 4 * MiB
        reader = await me.store.open(DIGEST)
        assert await reader.read_at(0, len(DATA)) == DATA


async def test_a_banned_peer_is_not_asked_for_the_next_blob(autojump_clock, seed):
    other = some_bytes(2 * MiB, seed=2)
    asked = []
    async with open_swarm(seed) as swarm:
        honest = await swarm.add(holding=[DATA, other], upload_bytes_s=4 * MiB)
        lie = SendsWrongChunks(await honest.store.chunk_map(DIGEST))

        async def behave(stream):
            asked.append(stream.peer)
            await lie(stream)

        await swarm.add_evil(behave, claims=[DIGEST, digest_of(other)])
        me = await swarm.add()
        with trio.fail_after(120):
            await me.transfer.fetch(DIGEST, len(DATA))
            await me.transfer.fetch(digest_of(other), len(other))
        assert len(asked) == 1


class NeverAnswers(Liar):
    async def have(self, stream, message):
        pass


async def test_peers_that_never_answer_end_the_fetch_by_name_after_all(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await swarm.add_evil(NeverAnswers(map_of(DATA, DIGEST)), claims=[DIGEST])
        me = await swarm.add()
        with trio.fail_after(700), pytest.raises(NoSources):
            await me.transfer.fetch(DIGEST, len(DATA))


async def test_a_holder_that_has_to_build_its_map_first_is_waited_for(autojump_clock, seed):
    class Slow(Liar):
        async def have(self, stream, message):
            await trio.sleep(150)
            await super().have(stream, message)

    async with open_swarm(seed) as swarm:
        await swarm.add_evil(Slow(map_of(DATA, DIGEST)), claims=[DIGEST])
        me = await swarm.add()
        with trio.fail_after(300):
            await me.transfer.fetch(DIGEST, len(DATA))


@pytest.mark.parametrize("lie", [SendsNothing, SendsNoMap])
async def test_a_source_that_promises_and_sends_nothing_is_left_alone(
    autojump_clock, seed, caplog, lie
):
    async with open_swarm(seed) as swarm:
        honest = await swarm.add(holding=[DATA], upload_bytes_s=MiB / 8)
        liar = await swarm.add_evil(lie(await honest.store.chunk_map(DIGEST)), claims=[DIGEST])
        me = await swarm.add()
        with caplog.at_level(logging.WARNING), trio.fail_after(400):
            await me.transfer.fetch(DIGEST, len(DATA))
        assert me.transfer.bans.reasons() == {}
        if lie is SendsNothing:
            assert f"source {liar.peer_id}" in caplog.text


async def test_a_map_that_does_not_match_its_blob_costs_its_voucher_the_place(
    autojump_clock, seed, caplog
):
    """Alone with the liar at first, so that its map is believed; then an honest holder comes."""
    lies = some_bytes(len(DATA), seed=9)
    mixed = DATA[: 4 * MiB] + lies[4 * MiB :]
    async with trio.open_nursery() as nursery, open_swarm(seed) as swarm:
        liar = await swarm.add_evil(Liar(map_of(mixed, DIGEST), mixed), claims=[DIGEST])
        me = await swarm.add()
        done = me.start_fetch(nursery, DATA)
        await trio.sleep(3)
        assert me.transfer.bans.reasons()[liar.peer_id].startswith("its chunk map")
        assert not await me.store.has(DIGEST)
        honest = await swarm.add(holding=[DATA])
        with trio.fail_after(120):
            await done.wait()
        # What the liar had sent right is kept: the honest map verifies it too.
        assert honest.transfer.bytes_served == len(DATA) - 4 * MiB
        reader = await me.store.open(DIGEST)
        assert await reader.read_at(0, len(DATA)) == DATA


async def test_a_map_that_is_too_long_for_its_blob_is_no_map(autojump_clock, seed):
    class TooLong(Liar):
        def offer(self, message, **changes):
            return super().offer(message, size=len(DATA))

    longer = DATA + DATA[:MiB]
    async with open_swarm(seed) as swarm:
        liars = [
            await swarm.add_evil(TooLong(map_of(longer, DIGEST), longer), claims=[DIGEST])
            for _ in range(2)
        ]
        await swarm.add(holding=[DATA])
        me = await swarm.add()
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert set(tally.banned) == {liar.peer_id for liar in liars}
        assert tally.fetched == len(DATA)


async def test_after_a_lying_map_the_origin_begins_anew(autojump_clock, seed):
    config, lies = b"{}", some_bytes(len(DATA), seed=9)
    origin = RamOrigin(DATA, config)
    manifest = model_of(DATA, config=config)
    origin.manifests[parse_model_name("some:model").key] = manifest
    async with open_swarm(seed) as swarm:
        liar = await swarm.add_evil(Liar(map_of(lies, DIGEST), lies), claims=[DIGEST])
        me = await swarm.add(origin=origin)
        with trio.fail_after(120):
            report = await me.transfer.pull("some:model")
        assert report.banned == (liar.peer_id,)
        assert {share.kind: share.bytes for share in report.sources}["origin"] == manifest.size
        reader = await me.store.open(DIGEST)
        assert await reader.read_at(0, len(DATA)) == DATA


async def test_with_two_maps_the_majority_is_believed(autojump_clock, seed):
    lies = some_bytes(len(DATA), seed=9)
    async with open_swarm(seed) as swarm:
        liar = await swarm.add_evil(Liar(map_of(lies, DIGEST), lies), claims=[DIGEST])
        for _ in range(2):
            await swarm.add(holding=[DATA])
        me = await swarm.add()
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert tally.refetched == 0
        assert ("peer", liar.peer_id) not in tally.by_source


async def test_an_outvoted_truth_wins_in_the_end(autojump_clock, seed):
    """Two liars agree on a map, one honest holder knows better: both liars are banned."""
    lies = some_bytes(len(DATA), seed=9)
    async with open_swarm(seed) as swarm:
        liars = [
            await swarm.add_evil(Liar(map_of(lies, DIGEST), lies), claims=[DIGEST])
            for _ in range(2)
        ]
        await swarm.add(holding=[DATA])
        me = await swarm.add()
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert set(tally.banned) == {liar.peer_id for liar in liars}
        assert tally.fetched == 2 * len(DATA)


async def test_with_liars_only_the_fetch_ends_by_name_and_nothing_becomes_visible(
    autojump_clock, seed
):
    lies = some_bytes(len(DATA), seed=9)
    async with open_swarm(seed) as swarm:
        await swarm.add_evil(Liar(map_of(lies, DIGEST), lies), claims=[DIGEST])
        me = await swarm.add()
        with trio.fail_after(400), pytest.raises(NoSources, match="1 lying peer banned"):
            await me.transfer.fetch(DIGEST, len(DATA))
        assert not await me.store.has(DIGEST)
        await swarm.add(holding=[DATA])
        with trio.fail_after(120):
            await me.transfer.fetch(DIGEST, len(DATA))

"""Peers that lie, and what it costs: their own place, and some bytes of ours."""

import logging

import pytest
import trio

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import NoSources, OriginUnavailable
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
from ollamamax_p2p.transfer.core.peer_session import encode_bits
from tests.transfer.ram_origin import DeadOrigin, RamOrigin
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


class CutsTooFinely(Liar):
    def offer(self, message, **changes):
        return super().offer(message, chunk_count=1000, complete=False, chunks=bytes(125))


class TellsBitsOfAWhole(Liar):
    def offer(self, message, **changes):
        return super().offer(message, chunks=bytes(2))


class Vouches(Liar):
    """For one map after another."""

    async def have(self, stream, message):
        for number in range(20_000):
            await stream.send(self.offer(message, map_digest=number.to_bytes(32, "big")))
            await stream.send(NotHeld(blob=message.blob))


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
    SendsMapsUnasked,
    CutsTooFinely,
    TellsBitsOfAWhole,
    Vouches,
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


@pytest.mark.parametrize("lie", [SendsAnotherMap, SendsShortPages])
async def test_a_liar_that_sends_another_map_than_it_told_is_banned(autojump_clock, seed, lie):
    """Alone at first, so that the map is asked of it."""
    async with trio.open_nursery() as nursery, open_swarm(seed) as swarm:
        liar = await swarm.add_evil(lie(map_of(DATA, DIGEST)), claims=[DIGEST])
        me = await swarm.add()
        done = me.start_fetch(nursery, DATA)
        await trio.sleep(3)
        assert list(me.transfer.bans.reasons()) == [liar.peer_id]
        await swarm.add(holding=[DATA])
        with trio.fail_after(120):
            await done.wait()


async def test_a_manifest_that_gives_a_wrong_size_costs_no_holder_its_place(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        for _ in range(3):
            await swarm.add(holding=[DATA])
        me = await swarm.add()
        for wrong in (len(DATA) + 1, len(DATA) - 1):
            told = f"hold it with {len(DATA)} bytes, where the manifest says {wrong}"
            with trio.fail_after(400), pytest.raises(NoSources, match=told):
                await me.transfer.fetch(DIGEST, wrong)
        assert me.transfer.bans.reasons() == {}
        with trio.fail_after(120):
            await me.transfer.fetch(DIGEST, len(DATA))


async def test_a_peer_that_gives_another_size_is_left_alone(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await swarm.add_evil(GivesAnotherSize(map_of(DATA, DIGEST)), claims=[DIGEST])
        honest = await swarm.add(holding=[DATA])
        me = await swarm.add()
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert list(tally.by_source) == [("peer", honest.id)]
        assert me.transfer.bans.reasons() == {}


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


async def test_a_holder_that_builds_its_map_is_waited_for_though_the_origin_is_dead(
    autojump_clock, seed
):
    """A LAN without internet, and a large blob that nobody has asked its holder for before."""

    class Slow(Liar):
        async def have(self, stream, message):
            await trio.sleep(30)  # the origin is asked after three seconds, and fails at once
            await super().have(stream, message)

    origin = DeadOrigin()
    origin.manifests[parse_model_name("some:model").key] = model_of(DATA)
    async with open_swarm(seed) as swarm:
        await swarm.add_evil(Slow(map_of(DATA, DIGEST)), claims=[DIGEST])
        await swarm.add(holding=[b"{}"])
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            report = await me.transfer.pull("some:model")
        assert origin.ranges > 0
        assert {share.kind for share in report.sources} == {"peer"}


async def test_a_dead_origin_and_a_banned_holder_are_both_named(autojump_clock, seed):
    class Spoilt(Liar):
        def bytes_of(self, chunk, data):
            return data if chunk < 6 else bytes(len(data))

    origin = DeadOrigin()
    origin.manifests[parse_model_name("some:model").key] = model_of(DATA)
    async with open_swarm(seed) as swarm:
        liar = await swarm.add_evil(Spoilt(map_of(DATA, DIGEST)), claims=[DIGEST])
        await swarm.add(holding=[b"{}"])
        me = await swarm.add(origin=origin)
        with trio.fail_after(120), pytest.raises(OriginUnavailable) as raised:
            await me.transfer.pull("some:model")
        assert liar.peer_id in me.transfer.bans
        told = str(raised.value)
        assert "cannot look up origin.test" in told
        assert "no peer could give the rest; 1 lying peer banned" in told
        assert "what is here is kept, the same pull resumes it" in told


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


# -- maps that nobody vouches for, or by which nothing comes -----------------------------------


class HasNewMapEachTime(Liar):
    """Serves all of it, and as a partial holder vouches for none of it."""

    def __init__(self):
        self.conversations = 0

    async def __call__(self, stream):
        self.conversations += 1
        lies = some_bytes(len(DATA), seed=1000 + self.conversations)
        await Partial(map_of(lies, DIGEST), lies)(stream)


class OnlyOfThisBlob(Liar):
    async def have(self, stream, message):
        if message.digest == raw_hash(DIGEST):
            await super().have(stream, message)
        else:
            await stream.send(NotHeld(blob=message.blob))


class Partial(OnlyOfThisBlob):
    def offer(self, message, **changes):
        count = self.chunk_map.chunk_count
        return super().offer(message, complete=False, chunks=encode_bits(range(count), count))


class Chokes(OnlyOfThisBlob):
    async def have(self, stream, message):
        if message.digest != raw_hash(DIGEST):
            await super().have(stream, message)
        else:
            await stream.send(self.offer(message))


class ChokesEmpty(Chokes):
    def offer(self, message, **changes):
        count = self.chunk_map.chunk_count
        return super().offer(message, complete=False, chunks=encode_bits([], count))


class ServesOneChunk(OnlyOfThisBlob):
    """The first four are right, and one of them is all that it sends."""

    sent = False

    async def send_chunk(self, stream, message):
        if message.chunk < 4 and not self.sent:
            self.sent = True
            await super().send_chunk(stream, message)


LIES = some_bytes(len(DATA), seed=9)


def origin_of(data):
    origin = RamOrigin(data, b"{}")
    origin.manifests[parse_model_name("some:model").key] = model_of(data, config=b"{}")
    return origin


async def has_it(node):
    reader = await node.store.open(DIGEST)
    return await reader.read_at(0, len(DATA)) == DATA


@pytest.mark.parametrize("with_origin", [False, True])
async def test_a_partial_holder_with_a_new_wrong_map_each_time_is_banned(
    autojump_clock, seed, with_origin
):
    liar = HasNewMapEachTime()
    async with open_swarm(seed) as swarm:
        evil = await swarm.add_evil(liar, claims=[DIGEST])
        me = await swarm.add(origin=origin_of(DATA) if with_origin else None)
        with trio.fail_after(120):
            if with_origin:
                report = await me.transfer.pull("some:model")
                assert report.banned == (evil.peer_id,)
                assert await has_it(me)
            else:
                with pytest.raises(NoSources, match="1 lying peer banned"):
                    await me.transfer.fetch(DIGEST, len(DATA))
        assert liar.conversations <= 3  # one of them about the model's config


async def test_a_partial_holder_that_was_lied_to_itself_is_not_banned(autojump_clock, seed):
    """One wrong map that nobody vouches for can come of an honest one."""
    async with trio.open_nursery() as nursery, open_swarm(seed) as swarm:
        await swarm.add_evil(Partial(map_of(LIES, DIGEST), LIES), claims=[DIGEST])
        me = await swarm.add()
        done = me.start_fetch(nursery, DATA)
        await trio.sleep(3)
        await swarm.add(holding=[DATA])
        with trio.fail_after(120):
            await done.wait()
        assert me.transfer.bans.reasons() == {}
        assert await has_it(me)


async def test_many_partial_holders_with_a_wrong_map_each_cost_a_bounded_number_of_blobs(
    autojump_clock, seed
):
    async with open_swarm(seed) as swarm:
        for number in range(12):
            lies = some_bytes(len(DATA), seed=100 + number)
            await swarm.add_evil(Partial(map_of(lies, DIGEST), lies), claims=[DIGEST])
        me = await swarm.add()
        with trio.fail_after(120), pytest.raises(NoSources, match="8 chunk maps"):
            await me.transfer.fetch(DIGEST, len(DATA))
        assert not await me.store.has(DIGEST)
        await swarm.add(holding=[DATA])
        with_origin = await swarm.add(origin=origin_of(DATA))
        with trio.fail_after(120):
            report = await with_origin.transfer.pull("some:model")
        assert report.bytes_fetched <= 9 * len(DATA) + 2
        assert await has_it(with_origin)


@pytest.mark.parametrize("lie", [Chokes, ChokesEmpty])
async def test_a_silent_liar_with_a_wrong_map_does_not_turn_the_origin_down(
    autojump_clock, seed, lie
):
    origin = origin_of(DATA)
    async with open_swarm(seed) as swarm:
        evil = await swarm.add_evil(lie(map_of(LIES, DIGEST), LIES), claims=[DIGEST])
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            report = await me.transfer.pull("some:model")
        assert report.banned == ((evil.peer_id,) if lie is Chokes else ())  # if it vouched
        assert origin.bytes_sent < 1.5 * len(DATA)
        assert await has_it(me)


async def test_a_liar_that_serves_a_little_first_does_not_turn_the_origin_down(
    autojump_clock, seed
):
    mixed = DATA[: 4 * MiB] + LIES[4 * MiB :]
    async with open_swarm(seed) as swarm:
        evil = await swarm.add_evil(ServesOneChunk(map_of(mixed, DIGEST), mixed), claims=[DIGEST])
        me = await swarm.add(origin=origin_of(DATA))
        with trio.fail_after(300):
            report = await me.transfer.pull("some:model")
        assert report.banned == (evil.peer_id,)
        assert await has_it(me)


async def test_an_origin_that_contradicts_an_honest_map_loses(autojump_clock, seed):
    """It lies from the first byte on, before the honest holder has a slot for us."""
    origin = origin_of(DATA)
    origin.blobs[DIGEST] = LIES

    class Late(OnlyOfThisBlob):
        async def have(self, stream, message):
            if message.digest == raw_hash(DIGEST):
                await stream.send(self.offer(message))
                await trio.sleep(2)
                await stream.send(Unchoke())
            else:
                await super().have(stream, message)

    async with open_swarm(seed) as swarm:
        await swarm.add_evil(Late(map_of(DATA, DIGEST)), claims=[DIGEST])
        me = await swarm.add(origin=origin)
        with trio.fail_after(120):
            report = await me.transfer.pull("some:model")
        assert report.banned == ()
        assert await has_it(me)


@pytest.mark.parametrize("lie", [Chokes, SendsNothing])
async def test_silent_liars_in_the_majority_do_not_keep_an_honest_holder_unused(
    autojump_clock, seed, lie
):
    async with open_swarm(seed) as swarm:
        liars = [
            await swarm.add_evil(lie(map_of(LIES, DIGEST), LIES), claims=[DIGEST]) for _ in range(2)
        ]
        honest = await swarm.add(holding=[DATA])
        me = await swarm.add()
        with trio.fail_after(60):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert tally.by_source == {("peer", honest.id): len(DATA)}
        assert set(tally.banned) == {liar.peer_id for liar in liars}, "the blob proves it"


async def test_a_liar_does_not_undo_what_honest_peers_have_sent(autojump_clock, seed):
    """The honest holder goes when half is here; the liar's map would throw it all away."""
    async with trio.open_nursery() as nursery, open_swarm(seed) as swarm:
        honest = await swarm.add(holding=[DATA], upload_bytes_s=MiB)
        me = await swarm.add()

        async def fetch():
            with pytest.raises(NoSources):
                await me.transfer.fetch(DIGEST, len(DATA))

        nursery.start_soon(fetch)
        await trio.sleep(7)
        await swarm.add_evil(Liar(map_of(LIES, DIGEST), LIES), claims=[DIGEST])
        swarm.network.kill(honest.host)
        await trio.sleep(200)
        swarm.network.revive(honest.host)
        for _ in range(2):
            await swarm.add(holding=[DATA])
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert tally.fetched <= len(DATA) - 5 * MiB
        assert await has_it(me)


async def test_a_slow_honest_majority_is_not_left_for_a_liar_that_would_serve(autojump_clock, seed):
    """A chunk takes longer than a stall's timeout, but its parts keep coming."""
    async with open_swarm(seed) as swarm:
        liar = await swarm.add_evil(Liar(map_of(LIES, DIGEST), LIES), claims=[DIGEST])
        for _ in range(2):
            await swarm.add(holding=[DATA], upload_bytes_s=MiB / 40)
        me = await swarm.add()
        with trio.fail_after(1200):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert ("peer", liar.peer_id) not in tally.by_source
        assert tally.banned == {}


class ChangesItsMind(Liar):
    """Tells and takes back the same map, for ever."""

    conversations = 0

    async def have(self, stream, message):
        self.conversations += 1
        while True:
            await stream.send(self.offer(message))
            await stream.send(NotHeld(blob=message.blob))


async def test_a_peer_that_changes_its_mind_for_ever_is_left_alone(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        liar = ChangesItsMind(map_of(LIES, DIGEST))
        await swarm.add_evil(liar, claims=[DIGEST])
        await swarm.add(holding=[DATA], upload_bytes_s=MiB / 8)
        me = await swarm.add()
        with trio.fail_after(400):
            await me.transfer.fetch(DIGEST, len(DATA))
        assert liar.conversations == 5
        assert me.transfer.bans.reasons() == {}


async def test_a_partial_holder_may_tell_a_few_maps_only(autojump_clock, seed):
    class TellsMany(Liar):
        async def have(self, stream, message):
            for number in range(20):
                raw = number.to_bytes(32, "big")
                bits = encode_bits([], self.chunk_map.chunk_count)
                await stream.send(self.offer(message, map_digest=raw, complete=False, chunks=bits))
                await stream.send(NotHeld(blob=message.blob))

    async with open_swarm(seed) as swarm:
        liar = await swarm.add_evil(TellsMany(map_of(LIES, DIGEST)), claims=[DIGEST])
        await swarm.add(holding=[DATA])
        me = await swarm.add()
        async with trio.open_nursery() as nursery:
            done = me.start_fetch(nursery, DATA)
            with trio.fail_after(120):
                await done.wait()
        assert liar.peer_id not in me.transfer.bans

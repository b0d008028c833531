"""The serving side's rules: what may be asked, in what order it is answered, whose turn it is."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.errors import PeerMisbehaved
from ollamamax_p2p.transfer.core.chunk_selection import UnaskedChunks
from ollamamax_p2p.transfer.core.map_votes import MAPS_PER_PEER_MAX, REJECTED_MAX, MapVotes
from ollamamax_p2p.transfer.core.messages import (
    OPEN_BLOBS_MAX,
    PART_BYTES,
    PART_BYTES_MIN,
    Cancel,
    Choke,
    Close,
    GetMap,
    Have,
    HaveMore,
    NotHeld,
    Open,
    Unchoke,
    Want,
)
from ollamamax_p2p.transfer.core.peer_session import (
    MAP_REQUESTS_MAX,
    PART_BYTES_FIRST,
    WANTS_MAX,
    Holding,
    LookUp,
    PeerSession,
    Send,
    SendMap,
    SendPart,
    decode_bits,
    encode_bits,
)
from ollamamax_p2p.transfer.core.upload_slots import UploadSlots

MiB = 1024 * 1024
BLOB = digest_of(b"blob")
MAP = ChunkMap(BLOB, (MiB, MiB, 100), (hashlib.sha256(b"").digest(),) * 3)


def opened(chunks=None, *, served=True):
    session = PeerSession()
    session.received(Open(blob=7, digest=raw_hash(BLOB)))
    assert session.next_step() == LookUp(7, BLOB)
    session.found(7, Holding(MAP, chunks))
    assert isinstance(session.next_step().message, Have)
    if served:
        session.serve(True)
        assert session.next_step() == Send(Unchoke())
    return session


def steps(session):
    taken = []
    while (step := session.next_step()) is not None:
        taken.append(step)
    return taken


def test_a_wanted_chunk_is_sent_in_parts_from_start_to_end():
    session = opened()
    session.received(Want(blob=7, chunk=1))
    session.received(Want(blob=7, chunk=2))
    parts = steps(session)
    assert all(isinstance(part, SendPart) for part in parts)
    assert [(p.chunk, p.offset) for p in parts][-1] == (2, 0)
    assert sum(p.length for p in parts if p.chunk == 1) == MiB
    assert parts[0].length == PART_BYTES_FIRST
    assert parts[-1].length == 100


def test_parts_grow_while_they_leave_quickly_and_shrink_while_they_do_not():
    session = opened()
    lengths = []
    for seconds in (0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 0.5):
        session.received(Want(blob=7, chunk=0))
        lengths.append(session.next_step().length)
        session.part_sent(seconds=seconds)
        session.received(Cancel(blob=7, chunk=0))
    assert max(lengths) == PART_BYTES
    assert lengths[-1] == PART_BYTES_MIN
    assert session.next_step() is None


def test_a_want_is_forgotten_by_a_choke_and_a_begun_chunk_is_not():
    session = opened()
    session.received(Want(blob=7, chunk=0))
    session.received(Want(blob=7, chunk=1))
    assert session.next_step().offset == 0
    session.serve(False)
    session.received(Want(blob=7, chunk=2))
    rest = steps(session)
    assert {step.chunk for step in rest[:-1]} == {0}
    assert rest[-1] == Send(Choke())
    session.received(Want(blob=7, chunk=1))  # crossed the choke
    assert steps(session) == []


def test_chunks_that_come_later_are_told():
    session = opened({0})
    session.gained(BLOB, 2)
    session.gained(digest_of(b"another"), 1)
    assert steps(session) == [Send(HaveMore(blob=7, chunks=[2]))]
    session.received(Want(blob=7, chunk=2))
    assert session.next_step().chunk == 2


def test_who_asked_in_vain_is_told_when_the_blob_comes():
    session = PeerSession()
    session.received(Open(blob=7, digest=raw_hash(BLOB)))
    session.available(BLOB, MAP, {1})  # not looked up yet: the look-up will find it
    assert session.next_step() == LookUp(7, BLOB)
    session.found(7, None)
    assert session.next_step() == Send(NotHeld(blob=7))
    assert not session.interested
    session.available(digest_of(b"another"), MAP, {1})
    assert session.next_step() is None
    session.available(BLOB, MAP, {1})
    have = session.next_step().message
    assert (have.complete, decode_bits(have.chunks, 3)) == (False, [1])
    assert session.interested
    assert session.digests() == {BLOB}


def test_a_blob_that_is_lost_is_told_and_its_wants_are_gone():
    session = opened({0, 1})
    session.received(Want(blob=7, chunk=0))
    session.received(Want(blob=7, chunk=1))
    session.received(GetMap(blob=7, first=0))
    assert isinstance(session.next_step(), SendMap)
    session.next_step()
    session.received(GetMap(blob=7, first=0))
    session.lost(BLOB)
    session.lost(BLOB)
    session.received(Want(blob=7, chunk=1))
    session.received(GetMap(blob=7, first=0))
    assert steps(session) == [Send(NotHeld(blob=7))]


def test_a_closed_blob_is_forgotten_and_its_number_may_be_used_again():
    session = opened()
    session.received(Want(blob=7, chunk=0))
    session.next_step()
    session.received(Open(blob=8, digest=raw_hash(BLOB)))
    session.received(Close(blob=7))
    session.received(Close(blob=8))
    session.found(7, None)
    session.received(Open(blob=7, digest=raw_hash(BLOB)))
    assert steps(session) == [LookUp(7, BLOB)]


def test_a_chunk_taken_back_is_not_sent():
    session = opened()
    session.received(Want(blob=7, chunk=0))
    session.received(Want(blob=7, chunk=1))
    session.received(Cancel(blob=7, chunk=1))
    assert {step.chunk for step in steps(session)} == {0}


@pytest.mark.parametrize(
    "messages",
    [
        [Open(blob=7, digest=bytes(32))],
        [Open(blob=100 + n, digest=bytes(32)) for n in range(OPEN_BLOBS_MAX)],
        [Want(blob=9, chunk=0)],
        [Want(blob=7, chunk=3)],
        [Want(blob=7, chunk=1)],
        [Cancel(blob=9, chunk=0)],
        [Close(blob=9)],
        [GetMap(blob=9, first=0)],
        [GetMap(blob=7, first=3)],
        [GetMap(blob=7, first=0)] * (MAP_REQUESTS_MAX + 1),
    ],
    ids=lambda messages: f"{len(messages)} {type(messages[0]).__name__} {messages[0]}",
)
def test_what_breaks_the_protocol_is_refused(messages):
    session = opened({0})
    *allowed, last = messages
    for message in allowed:
        session.received(message)
    with pytest.raises(PeerMisbehaved):
        session.received(last)


def test_wants_are_bounded():
    count = WANTS_MAX + 1
    session = PeerSession()
    session.received(Open(blob=0, digest=raw_hash(BLOB)))
    session.next_step()
    session.found(0, Holding(ChunkMap(BLOB, (1,) * count, (bytes(32),) * count), None))
    session.serve(True)
    session.next_step()
    session.next_step()
    for chunk in range(WANTS_MAX):
        session.received(Want(blob=0, chunk=chunk))
    with pytest.raises(PeerMisbehaved):
        session.received(Want(blob=0, chunk=WANTS_MAX))


@given(st.integers(0, 200), st.randoms())
def test_bits_say_what_they_were_told(count, dice):
    chunks = sorted(c for c in range(count) if dice.random() < 0.5)
    assert decode_bits(encode_bits(chunks, count), count) == chunks


@given(st.binary(max_size=40), st.integers(0, 300))
def test_any_bits_are_chunks_or_misbehaviour(bits, count):
    try:
        chunks = decode_bits(bits, count)
    except PeerMisbehaved:
        return
    assert all(chunk < count for chunk in chunks)


@pytest.mark.parametrize(("bits", "problem"), [(b"\x01", "chunk 7 of 3"), (b"", "0 bytes of bits")])
def test_bits_for_chunks_that_are_none_are_misbehaviour(bits, problem):
    with pytest.raises(PeerMisbehaved, match=problem):
        decode_bits(bits, 3)


# -- turns -------------------------------------------------------------------------------------


def test_a_free_slot_is_given_at_once_and_given_back():
    slots = UploadSlots[str](slots=1, rotation_s=10)
    slots.wants("a")
    slots.wants("b")
    assert slots.turn(now=0) == ([], ["a"])
    assert slots.is_served("a")
    slots.wants("a")
    slots.leaves("a")
    assert slots.turn(now=1) == ([], ["b"])


def test_nobody_is_choked_for_nobody():
    slots = UploadSlots[str](slots=2, rotation_s=10)
    for name in "ab":
        slots.wants(name)
    slots.turn(now=0)
    assert slots.turn(now=100) == ([], [])
    slots.wants("c")
    assert slots.turn(now=101) == (["a"], ["c"])


@given(peers=st.integers(1, 30), slots=st.integers(1, 8), seconds=st.integers(300, 900))
@settings(deadline=None)
def test_slots_are_shared_evenly(peers, slots, seconds):
    shared = UploadSlots[int](slots=slots, rotation_s=10)
    for peer in range(peers):
        shared.wants(peer)
    served = dict.fromkeys(range(peers), 0)
    for now in range(seconds):
        shared.turn(now=now)
        holders = [peer for peer in range(peers) if shared.is_served(peer)]
        assert len(holders) == min(slots, peers)
        for peer in holders:
            served[peer] += 1
    assert max(served.values()) - min(served.values()) <= 20


# -- maps --------------------------------------------------------------------------------------


def test_the_map_that_most_complete_holders_vouch_for_is_tried_first():
    one, two = digest_of(b"1"), digest_of(b"2")
    votes = MapVotes(random.Random(0))
    assert votes.best() is None
    for peer in "abc":
        votes.claims(peer, one, complete=False)
    assert votes.best() == one
    assert not votes.disputed
    votes.claims("d", two, complete=True)
    assert votes.best() == two
    assert votes.disputed
    votes.leaves("d")
    assert votes.best() == one


def test_no_number_of_holders_outvotes_the_map_that_was_agreed_unless_it_is_wrong():
    agreed, other = digest_of(b"1"), digest_of(b"2")
    votes = MapVotes(random.Random(0))
    votes.agreed = agreed
    for peer in "abc":
        votes.claims(peer, other, complete=True)
    assert votes.best() == other  # nobody serves under the agreed one
    votes.claims("d", agreed, complete=False)
    assert votes.best() == agreed
    votes.reject(agreed)
    assert votes.best() == other


def test_a_rejected_map_is_not_tried_again_and_its_vouchers_are_named():
    one, two = sorted([digest_of(b"1"), digest_of(b"2")])
    votes = MapVotes(random.Random(0))
    votes.claims("a", one, complete=True)
    votes.claims("b", two, complete=True)
    votes.claims("victim", two, complete=False)
    votes.leaves("b")
    votes.claims("c", two, complete=True)
    assert votes.best() == two
    assert votes.reject(two) == ["b", "c"]
    assert votes.is_rejected(two)
    assert votes.best() == one
    assert votes.reject(digest_of(b"3")) == []


def test_a_map_has_served_once_a_chunk_was_right_by_it():
    votes = MapVotes(random.Random(0))
    votes.claims("a", digest_of(b"1"), complete=True)
    assert not votes.has_served(digest_of(b"1"))
    votes.supplied("a", digest_of(b"1"))
    assert votes.has_served(digest_of(b"1"))


def test_a_peer_that_vouches_for_a_second_map_misbehaves():
    votes = MapVotes(random.Random(0))
    votes.claims("a", digest_of(b"1"), complete=False)
    votes.claims("a", digest_of(b"2"), complete=True)
    votes.claims("a", digest_of(b"2"), complete=True)
    with pytest.raises(PeerMisbehaved, match="two chunk maps"):
        votes.claims("a", digest_of(b"3"), complete=True)


def test_of_maps_without_a_voucher_the_second_wrong_one_blames_its_suppliers():
    votes = MapVotes(random.Random(0))
    one, two, vouched = digest_of(b"1"), digest_of(b"2"), digest_of(b"3")
    for digest in (one, vouched, two):
        votes.supplied("a", digest)
    votes.claims("b", vouched, complete=True)
    assert votes.reject(one) == []
    assert votes.reject(one) == []
    assert votes.reject(vouched) == ["b"]
    assert votes.reject(two) == ["a"]


def test_a_peer_may_tell_a_few_maps_and_a_fetch_believe_a_few_wrong_ones():
    votes = MapVotes(random.Random(0))
    maps = [digest_of(bytes([number])) for number in range(REJECTED_MAX + 1)]
    told = [votes.claims("a", digest, complete=False) for digest in maps]
    assert told == [True] * MAPS_PER_PEER_MAX + [False] * (len(maps) - MAPS_PER_PEER_MAX)
    for number, digest in enumerate(maps):
        votes.claims(f"b{number}", digest, complete=True)
    for digest in maps[:-1]:
        assert not votes.exhausted
        votes.reject(digest)
    assert votes.exhausted
    assert votes.best() is None


def test_a_map_by_which_nothing_came_and_one_put_aside_wait_behind_the_others():
    votes = MapVotes(random.Random(0))
    one, two = digest_of(b"1"), digest_of(b"2")
    votes.claims("a", one, complete=True)
    votes.claims("b", one, complete=True)
    votes.claims("c", two, complete=False)
    votes.doubt(one)
    assert votes.best() == two
    assert votes.best({one}) == one
    votes.set_aside(two)
    assert votes.best() == one
    assert votes.restore()
    assert not votes.restore()
    assert votes.best() == two


def test_a_liar_cannot_win_a_tie_by_the_digest_it_chooses():
    one, two = digest_of(b"1"), digest_of(b"2")
    winners = set()
    for seed in range(20):
        votes = MapVotes(random.Random(seed))
        votes.claims("a", one, complete=True)
        votes.claims("b", two, complete=True)
        winners.add(votes.best())
    assert winners == {one, two}
    votes.here = one
    assert votes.best() == one
    votes.here = two
    assert votes.best() == two


# -- selection ---------------------------------------------------------------------------------


def test_among_equally_rare_chunks_chance_decides():
    picked = set()
    for seed in range(40):
        unasked = UnaskedChunks(range(10), rng=random.Random(seed))
        picked.add(unasked.rarest(lambda _: True))
    assert len(picked) > 5


@given(data=st.data())
def test_the_rarest_is_the_rarest(data):
    count = data.draw(st.integers(1, 40))
    dice = random.Random(data.draw(st.integers()))
    unasked = UnaskedChunks(range(count), rng=dice)
    holders = dict.fromkeys(range(count), 0)
    for _ in range(data.draw(st.integers(0, 100))):
        chunk = dice.randrange(count)
        match dice.randrange(3):
            case 0:
                unasked.seen(chunk, +1)
                holders[chunk] += 1
            case 1 if holders[chunk]:
                unasked.seen(chunk, -1)
                holders[chunk] -= 1
            case _ if chunk in unasked:
                unasked.remove(chunk)
            case _:
                unasked.add(chunk)
    has = {chunk for chunk in range(count) if dice.random() < 0.5}
    fitting = {chunk for chunk in unasked if chunk in has}
    rarest, any_one = unasked.rarest(has.__contains__), unasked.any(has.__contains__)
    if fitting:
        assert holders[rarest] == min(holders[chunk] for chunk in fitting)
        assert any_one in fitting
    else:
        assert rarest is any_one is None

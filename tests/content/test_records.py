"""Which bytes are there, and the record that says so after a crash."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.partial_record import (
    Claim,
    Record,
    decode_record,
    encode_head,
    encode_map,
    encode_sync,
    encode_write,
)
from ollamamax_p2p.content.core.ranges import Ranges
from ollamamax_p2p.errors import MalformedMessage

BLOB, MAP = digest_of(b"blob"), digest_of(b"map")

steps = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 60)), max_size=30)


@settings(max_examples=1_000, deadline=None)
@given(steps)
def test_ranges_hold_what_a_set_of_bytes_would(steps):
    ranges, model = Ranges(), set()
    for adding, start, end in steps:
        (ranges.add if adding else ranges.remove)(start, end)
        (model.update if adding else model.difference_update)(range(start, end))
        pairs = list(ranges)
        assert {byte for a, b in pairs for byte in range(a, b)} == model
        assert all(a < b for a, b in pairs)
        assert all(one[1] < two[0] for one, two in pairwise(pairs))
        assert ranges.total == len(model)
        assert ranges.covers(start, end) == (set(range(start, end)) <= model)
        gaps = {byte for a, b in ranges.gaps(50) for byte in range(a, b)}
        assert gaps == set(range(50)) - model


def test_what_is_taken_out_of_a_range_leaves_the_rest():
    ranges = Ranges([(0, 10), (20, 30)])
    ranges.add(5, 5)
    ranges.remove(7, 7)
    ranges.remove(12, 18)
    assert ranges == Ranges([(0, 10), (20, 30)])
    ranges.remove(4, 6)
    assert list(ranges) == [(0, 4), (6, 10), (20, 30)]
    ranges.remove(5, 25)
    assert (list(ranges), ranges.total) == ([(0, 4), (25, 30)], 9)
    assert ranges.gaps(40) == [(4, 25), (30, 40)]
    assert ranges.covers(3, 3)
    assert ranges.covers(26, 30)
    assert not ranges.covers(3, 26)


def test_ranges_that_meet_become_one():
    ranges = Ranges([(0, 5), (10, 15), (5, 10)])
    assert list(ranges) == [(0, 15)]
    assert ranges == Ranges([(0, 15)])
    assert ranges != Ranges()
    assert repr(ranges) == "Ranges([(0, 15)])"


def test_a_record_is_read_back():
    data = (
        encode_head(BLOB, 100)
        + encode_map(MAP)
        + encode_write(0, 10, 7)
        + encode_sync(1)
        + encode_write(50, 60, 8)
    )
    claims = (Claim(0, 10, 7, synced=True), Claim(50, 60, 8, synced=False))
    assert decode_record(data) == Record(BLOB, 100, MAP, claims)
    assert decode_record(data + encode_map(None)).map_digest is None


def test_a_mark_does_not_vouch_for_what_comes_after_it():
    data = encode_head(BLOB, 100) + encode_sync(5) + encode_write(0, 10, 7)
    assert [claim.synced for claim in decode_record(data).claims] == [False]


def test_an_entry_beyond_the_blob_ends_the_record():
    data = encode_head(BLOB, 100) + encode_write(0, 10, 1) + encode_write(95, 105, 1)
    assert len(decode_record(data).claims) == 1


@pytest.mark.parametrize("data", [b"", b"omx-partial-1\n", encode_head(BLOB, 5)[:-1], bytes(200)])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(MalformedMessage):
        decode_record(data)


WHOLE = (
    encode_head(BLOB, 100)
    + encode_write(0, 10, 7)
    + encode_sync(1)
    + b"".join(encode_write(at, at + 5, at) for at in range(20, 90, 5))
)


@settings(max_examples=10_000, deadline=None)
@given(st.integers(0, len(WHOLE)), st.binary(max_size=30))
def test_a_record_that_a_crash_cut_short_claims_nothing_new(length, noise):
    full = set(decode_record(WHOLE).claims)
    try:
        record = decode_record(WHOLE[:length] + noise)
    except MalformedMessage:
        return
    claimed = {(claim.start, claim.end, claim.crc) for claim in record.claims}
    assert claimed <= {(claim.start, claim.end, claim.crc) for claim in full}
    assert {claim for claim in record.claims if claim.synced} <= {Claim(0, 10, 7, synced=True)}

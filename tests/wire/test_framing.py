"""Frames, however the bytes arrive and whoever sent them."""

import itertools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import FrameTooLarge
from ollamamax_p2p.wire import HEADER_BYTES, FrameDecoder, encode_frame

LIMIT = 64


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in parts, cut at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=10_000, deadline=None)
@given(
    st.lists(st.binary(max_size=LIMIT), max_size=6),
    st.lists(st.integers(0, 10_000), max_size=6),
)
def test_frames_come_back_whole_however_they_are_cut(payloads, places):
    data = b"".join(encode_frame(payload, max_bytes=LIMIT) for payload in payloads)
    decoder = FrameDecoder(max_bytes=LIMIT)
    received = [frame for part in cut(data, places) for frame in decoder.feed(part)]
    assert received == payloads
    assert not decoder.midway


@settings(max_examples=10_000, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=6))
def test_any_bytes_are_frames_or_too_large(parts):
    """And what comes out, written again, is what went in."""
    decoder = FrameDecoder(max_bytes=LIMIT)
    whole = b""
    try:
        for part in parts:
            for frame in decoder.feed(part):
                assert len(frame) <= LIMIT
                whole += encode_frame(frame, max_bytes=LIMIT)
    except FrameTooLarge:
        length = b"".join(parts)[len(whole) : len(whole) + HEADER_BYTES]
        assert int.from_bytes(length, "big") > LIMIT
    else:
        rest = b"".join(parts)[len(whole) :]
        assert b"".join(parts).startswith(whole)
        assert decoder.midway == bool(rest)


def test_a_length_over_the_limit_is_refused_before_its_bytes_arrive():
    decoder = FrameDecoder(max_bytes=LIMIT)
    with pytest.raises(FrameTooLarge, match="65 bytes, the limit is 64"):
        list(decoder.feed((LIMIT + 1).to_bytes(HEADER_BYTES, "big")))


def test_whole_frames_before_one_that_is_too_large_are_given():
    decoder = FrameDecoder(max_bytes=LIMIT)
    frames = decoder.feed(encode_frame(b"good", max_bytes=LIMIT) + b"\xff\xff\xff\xff")
    assert next(frames) == b"good"
    with pytest.raises(FrameTooLarge):
        next(frames)


def test_a_claimed_length_takes_no_memory():
    tracemalloc.start()
    try:
        decoder = FrameDecoder(max_bytes=2**31)
        assert list(decoder.feed((2**31).to_bytes(HEADER_BYTES, "big"))) == []
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_an_own_frame_over_the_limit_is_our_own_fault():
    assert encode_frame(bytes(LIMIT), max_bytes=LIMIT)[HEADER_BYTES:] == bytes(LIMIT)
    with pytest.raises(ValueError, match="over the limit of 64"):
        encode_frame(bytes(LIMIT + 1), max_bytes=LIMIT)


def test_the_end_in_the_middle_of_a_frame_can_be_told_from_a_good_end():
    decoder = FrameDecoder(max_bytes=LIMIT)
    assert not decoder.midway
    list(decoder.feed(b"\0\0"))
    assert decoder.midway
    list(decoder.feed(b"\0\1"))
    assert decoder.midway
    assert list(decoder.feed(b"x")) == [b"x"]
    assert not decoder.midway

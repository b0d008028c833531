import hashlib
import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.chunk_map import (
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    CHUNK_COUNT_MAX,
    ChunkMap,
    MiB,
    decode_chunk_map,
)
from ollamamax_p2p.content.core.chunking import chunk_bytes_for, cut, tensor_bounds
from ollamamax_p2p.content.core.digest import (
    digest_of,
    digest_of_hash,
    file_name,
    parse_digest,
    raw_hash,
    short,
)
from ollamamax_p2p.errors import BadDigest, MalformedMessage
from tests.content.model_files import gguf_file, reader, safetensors_file

GB = 10**9


def chunks_of(data: bytes) -> list[bytes]:
    lengths = cut(len(data), tensor_bounds(reader(data), len(data)))
    ends = list(accumulate(lengths))
    return [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def hashes_of(data: bytes) -> set[bytes]:
    return {hashlib.sha256(chunk).digest() for chunk in chunks_of(data)}


def some_tensors(seed: int = 1) -> dict[str, bytes]:
    """Large and small ones, as in a model: 12 MB."""
    dice = random.Random(seed)
    sizes = [3 * MiB + 17] + [64, 700_000, 2 * MiB, 64, 300_000] * 3 + [5]
    return {f"blk.{i}.weight": dice.randbytes(size) for i, size in enumerate(sizes)}


# -- digests -----------------------------------------------------------------------------------


def test_a_digest_is_one_spelling_of_many():
    digest = digest_of(b"x")
    assert parse_digest(digest) == digest
    assert parse_digest(digest.upper().replace("SHA256", "sha256")) == digest
    assert parse_digest(file_name(digest)) == digest
    assert digest_of_hash(raw_hash(digest)) == digest
    assert short(digest) == digest[7:19]


@pytest.mark.parametrize(
    "text",
    ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "md5:" + "0" * 64,
     "sha256:" + "0" * 64 + "\n", "../sha256:" + "0" * 64, "sha256:" + "g" * 64],
)  # fmt: skip
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(BadDigest):
        parse_digest(text)


def test_a_hash_has_32_bytes():
    with pytest.raises(BadDigest):
        digest_of_hash(b"short")


# -- the cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "mib"),
    [
        (0, 1),
        (1, 1),
        (640 * MiB, 1),
        (640 * MiB + 1, 2),
        (1 * GB, 2),
        (10 * GB, 16),
        (400 * GB, 16),
    ],
)
def test_the_chunk_size_grows_with_the_blob(size, mib):
    assert chunk_bytes_for(size) == mib * MiB


def test_a_blob_of_ten_gigabytes_has_about_640_chunks():
    assert 560 <= len(cut(10 * GB)) <= 720


def test_a_blob_without_tensors_is_cut_evenly():
    assert cut(0) == []
    assert cut(5) == [5]
    assert cut(2 * MiB) == [MiB, MiB]
    assert cut(2 * MiB + MiB // 2) == [MiB, MiB, MiB // 2]


def test_a_short_end_is_evened_out():
    assert cut(2 * MiB + 5) == [MiB, MiB // 2 + 3, MiB // 2 + 2]


def test_small_tensors_share_a_chunk_and_large_ones_have_their_own():
    header, small, large = 1000, 300_000, 3 * MiB
    bounds = [header, header + small, header + 2 * small, header + 2 * small + large]
    size = bounds[-1] + small
    assert cut(size, bounds) == [header, 2 * small, MiB, MiB, MiB, small]


bounds_lists = st.lists(st.integers(-5, 40 * MiB), max_size=60).map(
    lambda found: sorted(set(found))
)


@settings(deadline=None)
@given(st.integers(0, 40 * MiB), bounds_lists)
def test_chunks_cover_the_blob_and_keep_their_limits(size, bounds):
    lengths = cut(size, bounds)
    assert sum(lengths) == size
    assert all(1 <= length <= CHUNK_BYTES_MAX for length in lengths)
    assert cut(size, bounds) == lengths
    # Two neighbours of packed small tensors would have been one chunk if they fitted.
    # At worst a chunk of 1 MiB brings a remainder and a small neighbour that do not fit together.
    assert len(lengths) <= 3 * size // CHUNK_BYTES_MIN + 3


@settings(deadline=None)
@given(st.integers(10**6, 10**11))
def test_a_plain_blob_has_no_small_chunks(size):
    lengths = cut(size)
    assert sum(lengths) == size
    assert min(lengths) >= min(size, chunk_bytes_for(size) // 2)


@pytest.mark.parametrize("write", [gguf_file, safetensors_file])
def test_a_longer_header_changes_the_headers_chunk_only(write):
    tensors = some_tensors()
    before = hashes_of(write(tensors))
    after = hashes_of(write(tensors, {"note": "x" * 5000}))
    assert len(after - before) == 1
    assert len(before & after) >= 12


@pytest.mark.parametrize("write", [gguf_file, safetensors_file])
def test_an_edited_tensor_changes_its_own_chunks_only(write):
    tensors = some_tensors()
    before = hashes_of(write(tensors))
    for name in ("blk.0.weight", "blk.1.weight", "blk.16.weight"):
        content = tensors[name]
        edited = tensors | {name: b"edit" + content[4:]}
        assert len(hashes_of(write(edited)) - before) == 1


@pytest.mark.parametrize("write", [gguf_file, safetensors_file])
def test_a_large_tensor_that_grows_leaves_the_others_chunks(write):
    tensors = some_tensors()
    before = hashes_of(write(tensors))
    first = "blk.0.weight"
    after = hashes_of(write(tensors | {first: tensors[first] + bytes(MiB)}))
    header, new_chunk, last_two = 1, 1, 2
    assert len(after - before) <= header + new_chunk + last_two


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16,
        gguf_file(some_tensors())[:-1],
        b"\x08\0\0\0\0\0\0\0{notjson",
        b"\xff\xff\xff\xff\xff\xff\xff\xff{",
        b"plain bytes that are nothing at all",
    ],
)
def test_what_only_looks_like_a_model_is_cut_evenly(data):
    assert tensor_bounds(reader(data), len(data)) == ()
    assert sum(map(len, chunks_of(data))) == len(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 400), st.sampled_from([gguf_file, safetensors_file]))
def test_a_damaged_model_is_still_cut_and_always_alike(noise, at, write):
    data = write({"a": b"1" * 100, "b": b"2" * 100})
    damaged = data[:at] + noise + data[at + len(noise) :]
    assert b"".join(chunks_of(damaged)) == damaged
    assert chunks_of(damaged) == chunks_of(damaged)


# -- maps --------------------------------------------------------------------------------------


def a_map(*parts: bytes) -> ChunkMap:
    return ChunkMap(
        digest_of(b"".join(parts)),
        tuple(map(len, parts)),
        tuple(hashlib.sha256(part).digest() for part in parts),
    )


def test_a_map_is_read_back_as_it_was_written():
    chunk_map = a_map(b"one", b"three")
    assert decode_chunk_map(chunk_map.encode()) == chunk_map
    assert chunk_map.digest == digest_of(chunk_map.encode())
    assert (chunk_map.chunk_count, chunk_map.size, chunk_map.offsets) == (2, 8, (0, 3))
    assert a_map().offsets == ()


def test_a_map_tells_right_bytes_from_wrong_ones():
    chunk_map = a_map(b"one", b"three")
    assert chunk_map.matches(1, b"three")
    assert chunk_map.matches(1, memoryview(b"three"))
    assert not chunk_map.matches(1, b"threE")
    assert not chunk_map.matches(1, b"thre")


def test_a_map_fits_its_own_blob_only():
    chunk_map = a_map(b"one")
    chunk_map.check_fits(digest_of(b"one"), 3)
    for blob, size in ((digest_of(b"one"), 4), (digest_of(b"two"), 3)):
        with pytest.raises(ValueError, match="not one of"):
            chunk_map.check_fits(blob, size)


@pytest.mark.parametrize(
    ("lengths", "hashes", "problem"),
    [
        ((1,), (), "one hash per length"),
        ((0,), (bytes(32),), "must have 1 to"),
        ((CHUNK_BYTES_MAX + 1,), (bytes(32),), "must have 1 to"),
        ((1,), (bytes(31),), "32 bytes"),
        ((1,) * (CHUNK_COUNT_MAX + 1), (b"",) * (CHUNK_COUNT_MAX + 1), "at most"),
    ],
)
def test_a_map_that_cannot_be_is_refused(lengths, hashes, problem):
    with pytest.raises(MalformedMessage, match=problem):
        ChunkMap(digest_of(b""), lengths, hashes)


@settings(max_examples=10_000, deadline=None)
@given(
    st.binary(max_size=200)
    | st.binary(max_size=200).map(lambda rest: b"omx-chunk-map-1\n" + rest)
    | st.builds(lambda cut_at: a_map(b"one", b"two").encode()[:cut_at], st.integers(0, 130))
)
def test_whatever_is_given_a_map_is_read_or_refused(data):
    try:
        chunk_map = decode_chunk_map(data)
    except MalformedMessage:
        return
    assert chunk_map.encode() == data

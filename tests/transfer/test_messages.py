"""What arrives on a transfer stream is a message or MalformedMessage, whatever it is."""

from itertools import accumulate

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.chunking import cut
from ollamamax_p2p.errors import MalformedMessage
from ollamamax_p2p.transfer.core.messages import (
    HAVE_MORE_CHUNKS_MAX,
    MAP_PAGE_CHUNKS,
    PART_BYTES,
    Cancel,
    Choke,
    ChunkPart,
    Close,
    GetMap,
    Have,
    HaveMore,
    MapPage,
    NotHeld,
    Open,
    Unchoke,
    Want,
    chunk_count_fits,
    fetcher_codec,
    source_codec,
)

MiB = 1024 * 1024

FROM_FETCHER = [
    Open(blob=0, digest=bytes(32)),
    GetMap(blob=0, first=0),
    Want(blob=1, chunk=2),
    Cancel(blob=1, chunk=2),
    Close(blob=2**32 - 1),
]
FROM_SOURCE = [
    Have(blob=0, size=5, chunk_count=1, map_digest=bytes(32), complete=False, chunks=b"\x80"),
    HaveMore(blob=0, chunks=[0] * HAVE_MORE_CHUNKS_MAX),
    NotHeld(blob=0),
    MapPage(
        blob=0, first=0, lengths=[2**24] * MAP_PAGE_CHUNKS, hashes=[bytes(32)] * MAP_PAGE_CHUNKS
    ),
    ChunkPart(blob=2**32 - 1, chunk=999_999, offset=2**24 - 1, data=bytes(PART_BYTES)),
    Choke(),
    Unchoke(),
]


@pytest.mark.parametrize("message", FROM_FETCHER, ids=lambda m: type(m).__name__)
def test_what_a_fetcher_says_arrives_as_it_was(message):
    assert fetcher_codec.decode(fetcher_codec.encode(message)) == message


@pytest.mark.parametrize("message", FROM_SOURCE, ids=lambda m: type(m).__name__)
def test_what_a_source_says_arrives_as_it_was(message):
    assert source_codec.decode(source_codec.encode(message)) == message


@pytest.mark.parametrize(
    "fields",
    [
        {"is": "want", "blob": -1, "chunk": 0},
        {"is": "want", "blob": 0, "chunk": 1_000_000},
        {"is": "want", "blob": 0, "chunk": 1.5},
        {"is": "open", "blob": 0, "digest": bytes(31)},
        {"is": "part", "blob": 0, "chunk": 0, "offset": 0, "data": b"x"},
        {"blob": 0},
    ],
    ids=str,
)
def test_a_value_out_of_its_bounds_is_refused(fields):
    with pytest.raises(MalformedMessage):
        fetcher_codec.decode(msgpack.packb(fields))


names = st.sampled_from(
    ["open", "have", "have_more", "not_held", "get_map", "map_page", "want", "cancel", "part"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary(max_size=40)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)
fields = st.dictionaries(
    st.sampled_from(
        ["blob", "digest", "chunk", "chunks", "first", "lengths", "hashes", "offset", "data",
         "size", "chunk_count", "map_digest", "complete"]
    ),
    values,
)  # fmt: skip


@settings(max_examples=10_000, deadline=None)
@given(
    st.binary(max_size=200) | st.builds(lambda n, f: msgpack.packb({"is": n} | f), names, fields)
)
def test_any_bytes_are_a_message_or_malformed(data):
    for codec in (fetcher_codec, source_codec):
        try:
            message = codec.decode(data)
        except MalformedMessage:
            continue
        assert codec.decode(codec.encode(message)) == message


@given(st.integers(0, 64 * MiB), st.lists(st.integers(1, 3 * MiB), max_size=60))
def test_every_cut_of_a_blob_has_a_count_that_fits_its_size(header, tensors):
    bounds = list(accumulate([header, *tensors]))
    lengths = cut(bounds[-1], bounds[:-1])
    assert chunk_count_fits(len(lengths), bounds[-1])


def test_the_finest_cut_fits_and_a_finer_one_does_not():
    """Tensors of one byte between those that are halved."""
    tensors = [1, MiB + 1] * 50
    size = sum(tensors)
    lengths = cut(size, list(accumulate(tensors))[:-1])
    assert len(lengths) > 2 * size / MiB + 2
    assert chunk_count_fits(len(lengths), size)
    assert not chunk_count_fits(len(lengths) + 5, size)
    assert not chunk_count_fits(1_000_000, 1_000_000)
    assert not chunk_count_fits(0, 1)
    assert not chunk_count_fits(1, 0)

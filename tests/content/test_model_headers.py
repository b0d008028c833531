import json
import os
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core import gguf, safetensors
from ollamamax_p2p.content.core.gguf import Skipped, read_gguf_header
from ollamamax_p2p.content.core.header_reading import Cursor
from ollamamax_p2p.content.core.safetensors import read_safetensors_header
from ollamamax_p2p.errors import BadModelFile
from tests.content.model_files import (
    check_one_line,
    gguf_file,
    gguf_string,
    gguf_value,
    reader,
    real_model,
    safetensors_file,
)

TENSORS = {"token_embd.weight": b"a" * 100, "output.weight": b"b" * 40}


def read(data: bytes):
    return read_gguf_header(reader(data), len(data))


def head(tensor_count: int = 0, key_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count)


def entry(key: str | bytes, type_number: int, value: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", type_number) + value


def tensor(dims=(8,), type_number=24, offset=0, name="t") -> bytes:
    body = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_number, offset)
    return gguf_string(name) + body


@pytest.mark.parametrize("version", [2, 3])
def test_a_gguf_header_is_read(version):
    metadata = {
        "llama.context_length": 8192,
        "general.languages": ["en", "de"],
        "tokenizer.ggml.token_type": [1, 2, 3],
        "x.flag": True,
        "x.epsilon": 0.5,
        "x.large": 2**40,
        "x.none": [],
    }
    data = gguf_file(TENSORS, metadata, version=version)
    header = read(data)
    assert header.version == version
    assert header.architecture == "llama"
    assert header.file_type == "Q4_K_M"
    assert header.parameter_count == 140
    assert header.of_architecture("context_length") == 8192
    assert header.metadata["general.languages"] == ("en", "de")
    assert header.metadata["tokenizer.ggml.token_type"] == (1, 2, 3)
    assert [header.metadata[f"x.{key}"] for key in ("flag", "epsilon", "large", "none")] == [
        True, 0.5, 2**40, ()]  # fmt: skip
    first, second = header.tensors
    assert (first.name, first.dims, first.size, first.type_name) == (
        "token_embd.weight",
        (100,),
        100,
        "I8",
    )
    assert data[header.data_offset + second.offset :][: second.size] == b"b" * 40
    assert header.data_offset % header.alignment == 0


def test_a_file_may_say_its_alignment():
    header = read(gguf_file(TENSORS, {"general.alignment": 64}, alignment=64))
    assert header.alignment == 64
    assert [tensor.offset for tensor in header.tensors] == [0, 128]


def test_a_file_that_does_not_say_what_it_is_is_unknown():
    header = read(head())
    assert (header.architecture, header.file_type) == ("unknown", "unknown")
    odd = read(head(0, 1) + entry("general.file_type", 4, struct.pack("<I", 999)))
    assert odd.file_type == "unknown"


def test_long_arrays_and_strings_are_known_by_their_length():
    many = ["token"] * 2000
    numbers = list(range(1, 2001))
    data = gguf_file({}, {"tokens": many, "scores": numbers, "long": "x" * (2 * 1024 * 1024)})
    header = read(data)
    assert header.metadata["tokens"] == Skipped("array", 2000)
    assert header.metadata["scores"] == Skipped("array", 2000)
    assert header.metadata["long"] == Skipped("string", 2 * 1024 * 1024)


def test_what_is_kept_of_many_values_is_bounded():
    strings = {f"key{i}": "x" * 900_000 for i in range(30)}
    data = gguf_file({}, strings)
    header = read(data)
    kept = [value for value in header.metadata.values() if isinstance(value, str)]
    assert sum(map(len, kept)) <= gguf.KEPT_BYTES_MAX
    assert Skipped("string", 900_000) in header.metadata.values()


def test_a_quantized_tensor_has_the_size_of_its_blocks():
    data = head(1) + tensor((256, 3), 12)
    data += bytes(-len(data) % 32) + bytes(3 * 144)
    assert read(data).tensors[0].size == 3 * 144


def test_a_tensor_of_a_type_from_the_future_is_taken_by_its_offset():
    data = head(1) + tensor((8,), 77)
    data += bytes(-len(data) % 32) + bytes(8)
    (found,) = read(data).tensors
    assert (found.size, found.type_name) == (None, "77")


def test_a_tensor_may_be_a_single_number():
    data = head(1) + tensor((), 24)
    data += bytes(-len(data) % 32) + b"1"
    assert read(data).tensors[0].size == 1


U64 = struct.Struct("<Q").pack


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the file ends"),
        (b"GGU", "the file ends"),
        (b"NOPE" + bytes(20), "does not begin with GGUF"),
        (head(version=1), "version 1 is not known"),
        (head(version=0), "version 0 is not known"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"FUGG" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (head(2**63), "do not fit"),
        (head(0, 2**63), "do not fit"),
        (head(gguf.TENSOR_COUNT_MAX + 1) + bytes(24 * (gguf.TENSOR_COUNT_MAX + 1)), "too many"),
        (head(0, 1) + U64(2**40) + bytes(30), "a key of"),
        (head(0, 1) + entry(b"\xff", 4, bytes(9)), "no UTF-8"),
        (head(0, 1) + entry("k", 99, bytes(9)), "a value of type 99"),
        (head(0, 1) + entry("k", 8, U64(2**62)), "bytes of a string do not fit"),
        (head(0, 1) + entry("k", 9, struct.pack("<IQ", 9, 1)), "an array of type 9"),
        (head(0, 1) + entry("k", 9, struct.pack("<IQ", 8, 2**60)), "strings do not fit"),
        (head(0, 1) + entry("k", 9, struct.pack("<IQ", 10, 2**61)), "array items do not fit"),
        (
            head(0, 1) + entry("k", 9, struct.pack("<IQ", 8, 2000)) + b"\xff" * 16_000,
            "the file ends",
        ),
        (head(0, 2) + 2 * entry("k", 4, bytes(4)), "twice"),
        (head(0, 1) + entry("general.alignment", 4, bytes(4)), "an alignment of 0"),
        (head(0, 1) + entry("general.alignment", 8, gguf_string("x")), "an alignment of 'x'"),
        (head(1) + gguf_string("t") + struct.pack("<I", 2**31) + bytes(40), "dimensions"),
        (head(1) + tensor((2**40, 2**40)), "weights"),
        (head(1) + tensor((33,), 2), "no whole number of Q4_0"),
        (head(1) + tensor(offset=7) + bytes(99), "multiple of 32"),
        (head(1) + tensor((1000,)) + bytes(99), "cut short"),
    ],
)
def test_a_bad_gguf_header_is_refused_with_its_place(data, problem):
    with pytest.raises(BadModelFile, match=problem) as caught:
        read(data)
    assert "byte" in caught.value.where


def test_a_header_that_never_ends_is_given_up():
    with pytest.raises(BadModelFile, match="header is longer"):
        Cursor(reader(bytes(100)), 100, "x", limit=50).skip(51)


def test_skipping_goes_on_at_the_right_place():
    data = bytes(range(256)) * 8192
    cursor = Cursor(reader(data), len(data), "x", limit=len(data))
    assert cursor.take(2) == b"\0\1"
    cursor.skip(3)
    assert cursor.take(1) == b"\5"
    cursor.skip(2**20 + 10)
    assert cursor.take(1) == data[2**20 + 16 :][:1]


mutations = st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=12)), max_size=4)
GOOD = gguf_file(TENSORS, {"a": "text", "b": [1, 2, 3], "c": ["x", "y"], "d": 1.5})


@settings(max_examples=10_000, deadline=None)
@given(
    st.binary(max_size=300).map(lambda rest: b"GGUF\3\0\0\0" + rest)
    | st.builds(
        lambda changes, end: _mutated(GOOD, changes)[:end], mutations, st.integers(0, len(GOOD))
    )
)
def test_whatever_is_given_a_gguf_header_is_read_or_refused(data):
    try:
        header = read(data)
    except BadModelFile as error:
        check_one_line(error)
        return
    assert header.data_offset <= len(data) + header.alignment
    assert all(t.offset + (t.size or 0) <= len(data) for t in header.tensors)


def _mutated(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    for at, noise in changes:
        at %= len(data)
        data = data[:at] + noise + data[at + len(noise) :]
    return data


def test_a_hostile_header_costs_little_memory():
    # A million claims in a file of 60 bytes, and 100,000 strings that are really there.
    claims = head(2**20, 2**20)
    tokens = head(0, 1) + entry(
        "t", 9, struct.pack("<IQ", 8, 100_000) + gguf_string("tok") * 100_000
    )
    tracemalloc.start()
    with pytest.raises(BadModelFile):
        read(claims)
    read_gguf_header(lambda at, length: tokens[at : at + length], len(tokens))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024


# -- safetensors -------------------------------------------------------------------------------


def read_safe(data: bytes):
    return read_safetensors_header(reader(data), len(data))


def test_a_safetensors_header_is_read():
    data = safetensors_file(TENSORS, {"format": "pt"})
    header = read_safe(data)
    assert header.metadata == {"format": "pt"}
    assert header.parameter_count == 140
    first, second = header.tensors
    assert (first.name, first.dtype, first.shape) == ("token_embd.weight", "I8", (100,))
    assert data[header.data_offset + second.start :][:40] == b"b" * 40


def with_header(value, body: bytes = b"", length: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def one(start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the file ends"),
        (with_header({}, length=2**63), "do not fit"),
        (with_header(b"[]"), "not a safetensors header"),
        (with_header(b"\xff\xff"), "not a safetensors header"),
        (with_header(b'{"a":' * 5000), "not a safetensors header"),
        (with_header({"a": {"dtype": "F32"}}), "not a safetensors header"),
        (with_header({"a": one(-4, 0)}), "not a safetensors header"),
        (with_header({"__metadata__": 5}), "not a safetensors header"),
        (with_header({"a": one(0, 4), "b": one(3, 8)}, bytes(8)), "overlaps"),
        (with_header({"a": one(4, 0)}, bytes(8)), "overlaps"),
        (with_header({"a": one(0, 9)}, bytes(8)), "cut short"),
    ],
)
def test_a_bad_safetensors_header_is_refused(data, problem):
    with pytest.raises(BadModelFile, match=problem):
        read_safe(data)


def test_too_many_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(safetensors, "TENSOR_COUNT_MAX", 1)
    with pytest.raises(BadModelFile, match="too many"):
        read_safe(safetensors_file(TENSORS))


GOOD_SAFE = safetensors_file(TENSORS, {"format": "pt"})


@settings(max_examples=10_000, deadline=None)
@given(
    st.binary(max_size=100)
    | st.builds(
        lambda changes, end: _mutated(GOOD_SAFE, changes)[:end],
        mutations,
        st.integers(0, len(GOOD_SAFE)),
    )
)
def test_whatever_is_given_a_safetensors_header_is_read_or_refused(data):
    try:
        header = read_safe(data)
    except BadModelFile as error:
        check_one_line(error)
        return
    assert header.data_offset <= len(data)
    assert all(t.end <= len(data) for t in header.tensors)


# -- a real one --------------------------------------------------------------------------------


@pytest.mark.counterpart
def test_a_real_models_header_is_read():
    path = real_model()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = read_gguf_header(lambda at, n: os.pread(file.fileno(), n, at), size)
    assert header.architecture == "llama"
    assert header.parameter_count == 134_515_008
    assert header.file_type == "Q4_1"
    assert len(header.tensors) == 272
    last = max(header.tensors, key=lambda tensor: tensor.offset)
    assert header.data_offset + last.offset + last.size <= size


def test_values_are_written_as_the_test_helper_says():
    assert gguf_value("x") == struct.pack("<IQ", 8, 1) + b"x"

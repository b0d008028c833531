"""GGUF headers: what a model file says about itself and where its tensors lie.

Little-endian files of versions 2 and 3. Every count and length is checked against the bytes that
the file really has before anything is allocated; long arrays (a tokenizer's vocabulary) are passed
over, so that a header of many megabytes costs little memory.
Source: the GGUF specification in ggml's documentation, docs/gguf.md.
"""

import struct
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from ollamamax_p2p.content.core.header_reading import Cursor, ReadAt

MAGIC = b"GGUF"
_MAGIC_BIG_ENDIAN = b"FUGG"

HEADER_BYTES_MAX = 256 * 1024 * 1024
"""Vocabularies of 260,000 entries and their merges take some 30 MB."""
KEY_COUNT_MAX = 65_536
TENSOR_COUNT_MAX = 65_536
"""Large mixtures of experts have some 2,000."""
NAME_BYTES_MAX = 1_024
"""Tensor names have 64 at most; keys may have 65,535 by the specification, and have some 40."""
DIMENSION_COUNT_MAX = 8
"""The specification has four; some tools write one more."""
ARRAY_KEPT_MAX = 1_024
"""Longer arrays are known by their length only, unless a caller wants more."""
STRING_KEPT_BYTES_MAX = 1024 * 1024
"""Chat templates have up to some 50 KB."""
KEPT_BYTES_MAX = 16 * 1024 * 1024
"""All values together, unless a caller wants more; what is beyond is passed over."""
_ELEMENTS_MAX = 2**50

_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Type number -> name, weights in a block, bytes of a block."""

_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
"""`general.file_type` -> what people call the quantization."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A value that is known by its length only."""

    what: str
    """`array` or `string`."""
    length: int


Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | tuple[Scalar | Skipped, ...] | Skipped


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a GGUF file."""

    name: str
    dims: tuple[int, ...]
    type_number: int
    offset: int
    """From the start of the tensor data."""
    size: int | None
    """Bytes; None for a type that this version does not know."""

    @property
    def type_name(self) -> str:
        """`Q4_K`; a number for a type that this version does not know."""
        known = _BLOCKS.get(self.type_number)
        return known[0] if known else str(self.type_number)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A header as read."""

    version: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_offset: int
    """Where the tensor data begin in the file."""

    @property
    def architecture(self) -> str:
        """`llama`, `qwen2`; `unknown` if it is not said."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else "unknown"

    @property
    def parameter_count(self) -> int:
        """Weights in all tensors."""
        return sum(prod(tensor.dims) for tensor in self.tensors)

    @property
    def file_type(self) -> str:
        """`Q4_K_M`; `unknown` if it is not said or not known."""
        value = self.metadata.get("general.file_type")
        return _FILE_TYPES.get(value, "unknown") if isinstance(value, int) else "unknown"

    def of_architecture(self, key: str) -> Value | None:
        """The value of `<architecture>.<key>`, such as `context_length`."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_gguf_header(
    read_at: ReadAt,
    size: int,
    where: str = "GGUF file",
    *,
    array_kept_max: int = ARRAY_KEPT_MAX,
    kept_bytes_max: int = KEPT_BYTES_MAX,
) -> GgufHeader:
    """Read the header of a file of `size` bytes.

    where: names the file in errors. array_kept_max: longer arrays are known by their length only.
    kept_bytes_max: for all values together; what is beyond is passed over.
    Raises BadModelFile, with the byte at which it goes wrong; a file whose tensors reach beyond its
    end is one.
    """
    cursor = Cursor(read_at, size, where, HEADER_BYTES_MAX)
    version = _read_version(cursor)
    tensor_count = cursor.expect(_count(cursor, 8), 24, "tensors")
    key_count = cursor.expect(_count(cursor, 8), 13, "metadata entries")
    if tensor_count > TENSOR_COUNT_MAX or key_count > KEY_COUNT_MAX:
        raise cursor.bad(f"{tensor_count} tensors and {key_count} metadata entries are too many")
    metadata = _read_metadata(cursor, key_count, array_kept_max, kept_bytes_max)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment % 8:
        raise cursor.bad(f"an alignment of {alignment!r}")
    tensors = tuple(_read_tensor(cursor) for _ in range(tensor_count))
    data_offset = cursor.at + -cursor.at % alignment
    _check_extents(cursor, tensors, alignment, max(size - data_offset, 0))
    return GgufHeader(version, metadata, tensors, alignment, data_offset)


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4)
    version = _count(cursor, 4)
    if magic == _MAGIC_BIG_ENDIAN or (magic == MAGIC and version and version & 0xFFFF == 0):
        raise cursor.bad("a big-endian GGUF file; convert it to little-endian")
    if magic != MAGIC:
        raise cursor.bad("it does not begin with GGUF")
    if version not in (2, 3):
        raise cursor.bad(f"GGUF version {version} is not known; 2 and 3 are")
    return version


def _read_metadata(cursor: Cursor, key_count: int, array_max: int, keep: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = _name(cursor, "key")
        type_number = _count(cursor, 4)
        if key in metadata:
            raise cursor.bad(f"the key {key[:80]!r} twice")
        value = metadata[key] = _read_value(cursor, type_number, keep, array_max)
        keep -= min(_kept_bytes(value), keep)
    return metadata


def _kept_bytes(value: "Value | Skipped") -> int:
    """What a value costs us, roughly; a number in a tuple is a reference of 8 bytes at least."""
    if isinstance(value, str):
        return len(value)
    return sum(8 + _kept_bytes(item) for item in value) if isinstance(value, tuple) else 0


def _read_value(cursor: Cursor, type_number: int, keep: int, array_max: int) -> Value:
    if type_number == _ARRAY:
        return _read_array(cursor, keep, array_max)
    if type_number == _STRING:
        return _string(cursor, keep)
    return _scalar(cursor, type_number)


def _read_array(cursor: Cursor, keep: int, array_max: int) -> Value:
    item_type = _count(cursor, 4)
    length = _count(cursor, 8)
    if item_type == _STRING:
        cursor.expect(length, 8, "strings")
        if length <= array_max and length * 8 <= keep:
            return tuple(_string(cursor, keep // length) for _ in range(length))
        for _ in range(length):
            cursor.skip(_count(cursor, 8))
        return Skipped("array", length)
    layout = _SCALARS.get(item_type)
    if layout is None:
        raise cursor.bad(f"an array of type {item_type}")
    cursor.expect(length, layout.size, "array items")
    if length <= array_max and length * 8 <= keep:
        return tuple(_scalar(cursor, item_type) for _ in range(length))
    cursor.skip(length * layout.size)
    return Skipped("array", length)


def _string(cursor: Cursor, keep: int) -> str | Skipped:
    length = cursor.expect(_count(cursor, 8), 1, "bytes of a string")
    if length > min(STRING_KEPT_BYTES_MAX, keep):
        cursor.skip(length)
        return Skipped("string", length)
    # Some tokenizers hold bytes that are no UTF-8; the header is still worth reading.
    return cursor.take(length).decode(errors="replace")


def _name(cursor: Cursor, what: str) -> str:
    length = _count(cursor, 8)
    if length > NAME_BYTES_MAX:
        raise cursor.bad(f"a {what} of {length} bytes")
    try:
        return cursor.take(length).decode()
    except UnicodeDecodeError as error:
        raise cursor.bad(f"a {what} that is no UTF-8") from error


def _scalar(cursor: Cursor, type_number: int) -> Scalar:
    layout = _SCALARS.get(type_number)
    if layout is None:
        raise cursor.bad(f"a value of type {type_number}")
    value: Scalar = layout.unpack(cursor.take(layout.size))[0]
    return value


def _count(cursor: Cursor, width: int) -> int:
    """An unsigned number of so many bytes."""
    return int.from_bytes(cursor.take(width), "little")


def _read_tensor(cursor: Cursor) -> Tensor:
    name = _name(cursor, "tensor name")
    dimension_count = _count(cursor, 4)
    if dimension_count > DIMENSION_COUNT_MAX:
        raise cursor.bad(f"a tensor of {dimension_count} dimensions")
    dims = tuple(_count(cursor, 8) for _ in range(dimension_count))
    if prod(dims) > _ELEMENTS_MAX:
        raise cursor.bad(f"a tensor of {dims} weights")
    type_number = _count(cursor, 4)
    offset = _count(cursor, 8)
    return Tensor(name, dims, type_number, offset, _tensor_bytes(dims, type_number, cursor))


def _tensor_bytes(dims: tuple[int, ...], type_number: int, cursor: Cursor) -> int | None:
    known = _BLOCKS.get(type_number)
    if known is None:
        return None
    _, weights, block_bytes = known
    if (dims[0] if dims else 1) % weights:
        raise cursor.bad(f"a row of {dims[0]} weights is no whole number of {known[0]} blocks")
    return prod(dims) // weights * block_bytes


def _check_extents(
    cursor: Cursor, tensors: tuple[Tensor, ...], alignment: int, data_bytes: int
) -> None:
    for tensor in tensors:
        if tensor.offset % alignment:
            raise cursor.bad(
                f"tensor {tensor.name[:80]!r} does not begin at a multiple of {alignment}"
            )
        end = tensor.offset + (tensor.size or 0)
        if end > data_bytes:
            raise cursor.bad(
                f"tensor {tensor.name[:80]!r} ends {end:,} bytes into the data, the file has "
                f"{data_bytes:,}; it is cut short, download it again"
            )

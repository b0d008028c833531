"""safetensors headers: 8 bytes of length, JSON, then the tensors' bytes.

Source: the format's description in the safetensors project's README.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated

import msgspec

from ollamamax_p2p.content.core.header_reading import Cursor, ReadAt

HEADER_BYTES_MAX = 100_000_000
"""The format's own limit."""
TENSOR_COUNT_MAX = 262_144

_Size = Annotated[int, msgspec.Meta(ge=0, lt=2**50)]


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor; start and end count from the start of the tensor data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A header as read."""

    metadata: dict[str, str]
    tensors: tuple[SafeTensor, ...]
    """In the order of their bytes."""
    data_offset: int
    """Where the tensor data begin in the file."""

    @property
    def parameter_count(self) -> int:
        """Weights in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


class _Entry(msgspec.Struct):
    dtype: Annotated[str, msgspec.Meta(max_length=64)]
    shape: Annotated[list[_Size], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]


_raw_entries = msgspec.json.Decoder(dict[str, msgspec.Raw])
_metadata = msgspec.json.Decoder(dict[str, str])
_entry = msgspec.json.Decoder(_Entry)


def read_safetensors_header(
    read_at: ReadAt, size: int, where: str = "safetensors file"
) -> SafetensorsHeader:
    """Read the header of a file of `size` bytes.

    where: names the file in errors. Raises BadModelFile: cut short, not JSON, tensors that overlap
    or reach beyond the end.
    """
    cursor = Cursor(read_at, size, where, HEADER_BYTES_MAX + 8)
    header_bytes = cursor.expect(int.from_bytes(cursor.take(8), "little"), 1, "bytes of header")
    text = cursor.take(header_bytes)
    try:
        raw = _raw_entries.decode(text)
        about = raw.pop("__metadata__", None)
        metadata = _metadata.decode(about) if about is not None else {}
        entries = {name: _entry.decode(value) for name, value in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise cursor.bad(f"not a safetensors header: {error}") from error
    if len(entries) > TENSOR_COUNT_MAX:
        raise cursor.bad(f"{len(entries)} tensors are too many")
    tensors = sorted(
        (
            SafeTensor(name, entry.dtype, tuple(entry.shape), *entry.data_offsets)
            for name, entry in entries.items()
        ),
        key=lambda tensor: (tensor.start, tensor.end, tensor.name),
    )
    _check_extents(cursor, tensors, size - cursor.at)
    return SafetensorsHeader(metadata, tuple(tensors), cursor.at)


def _check_extents(cursor: Cursor, tensors: list[SafeTensor], data_bytes: int) -> None:
    reached = 0
    for tensor in tensors:
        if tensor.start < reached or tensor.end < tensor.start:
            raise cursor.bad(f"tensor {tensor.name[:80]!r} overlaps the one before it")
        reached = tensor.end
    if reached > data_bytes:
        raise cursor.bad(
            f"the tensors have {reached:,} bytes, the file has {data_bytes:,} for them; "
            "it is cut short, download it again"
        )

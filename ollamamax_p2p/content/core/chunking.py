"""Cut a blob into chunks: where its tensors begin if it has any, else at even distances.

The cut is a function of the blob's bytes alone, so every honest holder arrives at the same chunk
map. In a GGUF or safetensors file the header and every large tensor are cut from their own start,
and small neighbouring tensors share a chunk. So an edited tensor changes its own chunks, and a
longer header moves the tensors' chunks without changing one of them: a node that holds the old
version needs only what is new.

What decides the cut is part of the protocol: the numbers here, and what the two header readers
accept. Changing either needs a new magic in `chunk_map`.
"""

from collections.abc import Sequence
from itertools import pairwise

from ollamamax_p2p.content.core import gguf, safetensors
from ollamamax_p2p.content.core.chunk_map import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from ollamamax_p2p.content.core.header_reading import ReadAt
from ollamamax_p2p.errors import BadModelFile

CHUNK_COUNT_WANTED = 640
"""Enough that ten receivers finish within a few percent of the lower bound (design 4.5), few enough
that a map stays small: 23 KB.
"""


def chunk_bytes_for(size: int) -> int:
    """The chunk size for so many bytes: a power of two, 1 to 16 MiB, about 640 chunks at 10 GB."""
    wanted = -(-size // CHUNK_COUNT_WANTED)
    return min(max(CHUNK_BYTES_MIN, 1 << max(wanted - 1, 0).bit_length()), CHUNK_BYTES_MAX)


def cut(size: int, bounds: Sequence[int] = ()) -> list[int]:
    """The lengths of the chunks of a blob; they add up to size, each 1 to CHUNK_BYTES_MAX.

    size: of the whole blob; 0 gives [].
    bounds: where tensors begin, rising; the first one ends the header. Those outside (0, size) are
    left out. The header does not count towards the chunk size, so that a longer one keeps it.
    """
    inside = [bound for bound in bounds if 0 < bound < size]
    chunk_bytes = chunk_bytes_for(size - inside[0] if inside else size)
    edges = [0, *inside, size]
    parts = [end - start for start, end in pairwise(edges)]
    lengths = _cut_part(parts[0], chunk_bytes)
    packed = 0
    for part in parts[1:]:
        if packed and packed + part > chunk_bytes:
            lengths.append(packed)
            packed = 0
        if part > chunk_bytes:
            lengths += _cut_part(part, chunk_bytes)
        else:
            packed += part
    return [*lengths, packed] if packed else lengths


def _cut_part(length: int, chunk_bytes: int) -> list[int]:
    """Whole chunks from the start; a short end is evened out with the chunk before it, because a
    chunk of a few bytes costs a round trip like any other.
    """
    whole, rest = divmod(length, chunk_bytes)
    if rest == 0 or whole == 0 or 2 * rest >= chunk_bytes:
        return [chunk_bytes] * whole + ([rest] if rest else [])
    last = chunk_bytes + rest
    return [*[chunk_bytes] * (whole - 1), last - last // 2, last // 2]


def tensor_bounds(read_at: ReadAt, size: int) -> tuple[int, ...]:
    """Where the tensors of a GGUF or safetensors blob begin, rising and distinct; () for anything
    else, and for one of those whose header cannot be read.
    """
    try:
        start = read_at(0, min(size, 9))
        if start.startswith(gguf.MAGIC):
            header = gguf.read_gguf_header(read_at, size)
            offsets = [header.data_offset + tensor.offset for tensor in header.tensors]
        elif start[8:] == b"{":
            layout = safetensors.read_safetensors_header(read_at, size)
            offsets = [layout.data_offset + tensor.start for tensor in layout.tensors]
        else:
            return ()
    except BadModelFile:
        return ()
    return tuple(sorted(set(offsets)))

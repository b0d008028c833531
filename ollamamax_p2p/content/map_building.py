"""Build a blob's chunk map, and with it make sure that the blob is what its name says.

Hashing runs in worker threads (sha256 releases the GIL), in steps short enough that a cancelled
caller does not wait for a whole blob.
"""

import hashlib
from collections.abc import Iterator, Sequence

import trio

from ollamamax_p2p.content.core.chunk_map import ChunkMap, MiB
from ollamamax_p2p.content.core.chunking import cut, tensor_bounds
from ollamamax_p2p.content.core.digest import Digest, digest_of, digest_of_hash
from ollamamax_p2p.content.core.header_reading import ReadAt
from ollamamax_p2p.errors import DigestMismatch

_STEP_BYTES = 64 * MiB
"""What one call into a thread hashes: some 50 ms."""

_READ_BYTES = 4 * MiB


async def build_chunk_map(
    digest: Digest, size: int, read_at: ReadAt, limiter: trio.CapacityLimiter
) -> ChunkMap:
    """Cut and hash a blob. read_at is called from several threads at once.

    Raises DigestMismatch if the bytes are not what the digest says: such a blob must not be served.
    """
    bounds = await trio.to_thread.run_sync(tensor_bounds, read_at, size, limiter=limiter)
    lengths = cut(size, bounds)
    hashes: list[bytes] = [b""] * len(lengths)
    steps = iter(list(_steps(lengths)))

    async def hash_steps() -> None:
        for first, offset, several in steps:
            done = await trio.to_thread.run_sync(
                _hash_chunks, read_at, offset, several, limiter=limiter
            )
            hashes[first : first + len(done)] = done

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_check_digest, digest, size, read_at, limiter)
            for _ in range(max(1, int(limiter.total_tokens) - 1)):
                nursery.start_soon(hash_steps)
    except ExceptionGroup as group:
        # That several tasks do this is nobody's business: the first error is the caller's.
        raise _first(group) from None
    return ChunkMap(digest, tuple(lengths), tuple(hashes))


def chunk_map_of(data: bytes) -> ChunkMap:
    """The same for bytes in memory, at once and in this thread."""

    def read_at(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    lengths = cut(len(data), tensor_bounds(read_at, len(data)))
    return ChunkMap(digest_of(data), tuple(lengths), tuple(_hash_chunks(read_at, 0, lengths)))


async def _check_digest(
    digest: Digest, size: int, read_at: ReadAt, limiter: trio.CapacityLimiter
) -> None:
    whole = hashlib.sha256()

    def take(start: int, end: int) -> None:
        for offset in range(start, end, _READ_BYTES):
            whole.update(read_at(offset, min(_READ_BYTES, end - offset)))

    for start in range(0, size, _STEP_BYTES):
        end = min(size, start + _STEP_BYTES)
        await trio.to_thread.run_sync(take, start, end, limiter=limiter)
    actual = digest_of_hash(whole.digest())
    if actual != digest:
        raise DigestMismatch(digest, actual)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _steps(lengths: Sequence[int]) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(index of the first chunk, its offset, lengths), each about `_STEP_BYTES` long."""
    first = offset = held = 0
    for index, length in enumerate(lengths):
        held += length
        if held >= _STEP_BYTES or index == len(lengths) - 1:
            yield first, offset, lengths[first : index + 1]
            first, offset, held = index + 1, offset + held, 0


def _hash_chunks(read_at: ReadAt, offset: int, lengths: Sequence[int]) -> list[bytes]:
    hashes = []
    for length in lengths:
        hashes.append(hashlib.sha256(read_at(offset, length)).digest())
        offset += length
    return hashes

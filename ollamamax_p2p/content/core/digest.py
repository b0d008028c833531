"""Digests: the validated type by which blobs are named, and the only place that makes one."""

import hashlib
import re
from typing import NewType

from ollamamax_p2p.errors import BadDigest

Digest = NewType("Digest", str)
"""`sha256:<64 lower-case hex>`. Made by `parse_digest`, `digest_of` and `digest_of_hash` only."""

_PATTERN = re.compile(r"\Asha256[:-]([0-9a-fA-F]{64})\Z")


def parse_digest(text: str) -> Digest:
    """Check a digest that came from outside; `sha256-…` and upper case are taken too, as Ollama
    takes them.

    Raises BadDigest.
    """
    match = _PATTERN.match(text)
    if match is None:
        raise BadDigest(text)
    return Digest("sha256:" + match[1].lower())


def digest_of(data: bytes | memoryview) -> Digest:
    """The digest of bytes in memory."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_of_hash(raw: bytes) -> Digest:
    """The digest whose 32 raw bytes these are."""
    if len(raw) != 32:
        raise BadDigest(raw.hex())
    return Digest("sha256:" + raw.hex())


def raw_hash(digest: Digest) -> bytes:
    """The 32 raw bytes of a digest."""
    return bytes.fromhex(digest[7:])


def file_name(digest: Digest) -> str:
    """How Ollama names the blob's file: `sha256-<hex>`."""
    return "sha256-" + digest[7:]


def short(digest: Digest) -> str:
    """The twelve hex digits that people are shown."""
    return digest[7:19]

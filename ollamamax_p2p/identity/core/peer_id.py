"""Peer ids: the validated type, and how one follows from a public key."""

from typing import NewType

import base58

from ollamamax_p2p.errors import BadPeerId

PeerId = NewType("PeerId", str)
"""An Ed25519 peer id in base58, `12D3KooW…`. Made by `parse_peer_id` and `peer_id_of` only."""

_IDENTITY_ED25519 = bytes.fromhex("002408011220")
# Identity multihash (0x00) of 36 bytes (0x24): a protobuf of key type Ed25519 (08 01) and 32 bytes
# of key (12 20).

_TEXT_LENGTH = (
    52  # what base58 makes of those 38 bytes; checked first, because decoding is quadratic
)


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a raw 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_IDENTITY_ED25519 + public_key).decode())


def parse_peer_id(text: str) -> PeerId:
    """Check a peer id that came from outside. Raises BadPeerId."""
    if len(text) != _TEXT_LENGTH or not text.isascii():
        raise BadPeerId(text)
    try:
        raw = base58.b58decode(text)
    except ValueError:
        raise BadPeerId(text) from None
    if len(raw) != 38 or not raw.startswith(_IDENTITY_ED25519):
        raise BadPeerId(text)
    return PeerId(text)


def public_key_of(peer: PeerId) -> bytes:
    """The raw 32-byte Ed25519 public key inside a peer id."""
    return base58.b58decode(peer)[len(_IDENTITY_ED25519) :]

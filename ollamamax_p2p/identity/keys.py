"""The node key: who this node is, for as long as its file lives."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ollamamax_p2p.errors import StoreDamaged
from ollamamax_p2p.identity.core.peer_id import PeerId, peer_id_of
from ollamamax_p2p.identity.secret_files import read_secret, write_secret

SEED_BYTES = 32

_HEAD = b"omx-node-key-1\n"
# The file is this line and the seed in hex, so that whoever finds it knows what it is.


@dataclass(frozen=True, slots=True)
class NodeKey:
    """An Ed25519 key pair. Made by `load_or_create_key` and `key_from_seed`."""

    seed: bytes
    """The 32 secret bytes that all else follows from."""
    public: bytes
    """The raw 32-byte public key."""
    peer_id: PeerId

    def __repr__(self) -> str:
        """Without the seed, so that it reaches no log and no traceback."""
        return f"NodeKey({self.peer_id}, seed=…)"


def load_or_create_key(
    path: Path, *, token_bytes: Callable[[int], bytes] = secrets.token_bytes
) -> NodeKey:
    """The key in the file; a new one, saved before it is returned, if there is no file.

    Raises KeyExposed, AccessRefused, StoreFull, or StoreDamaged if the file holds no node key: a
    damaged key is never replaced, because that would silently make this another node.
    """
    data = read_secret(path)
    if data is not None:
        return key_from_seed(_parsed(path, data))
    seed = token_bytes(SEED_BYTES)
    write_secret(path, _HEAD + seed.hex().encode() + b"\n")
    return key_from_seed(seed)


def key_from_seed(seed: bytes) -> NodeKey:
    """The key pair of 32 secret bytes; simulations draw them from a seeded generator."""
    # Imported here: `omx --help` makes no keys and cryptography takes 30 ms.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return NodeKey(seed, public, peer_id_of(public))


def _parsed(path: Path, data: bytes) -> bytes:
    try:
        seed = bytes.fromhex(data.removeprefix(_HEAD).decode("ascii"))
    except ValueError:
        seed = b""
    if not data.startswith(_HEAD) or len(seed) != SEED_BYTES:
        # `from None` and no excerpt: what is left of a damaged key is still secret.
        raise StoreDamaged(
            str(path),
            "not a node key; restore it from a backup, or remove it to become a new node "
            "(which must join again)",
        ) from None
    return seed

"""Peers remembered across restarts: `remembered_peers.json` in the data folder.

Outside text like any other: bounded and checked when it is read. A file that cannot be used is set
aside, and the node starts without it.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.discovery.core.provider_messages import Addresses, addresses_of_one_peer
from ollamamax_p2p.identity import Address

FILE_NAME = "remembered_peers.json"

FILE_BYTES_MAX = 8 * 1024 * 1024
"""A thousand peers with eight addresses of the greatest length are 4 MB."""

FORGOTTEN_AFTER_S = 30 * 24 * 3_600.0
"""A peer not seen for a month is not worth a dial at every start."""

_log = logging.getLogger(__name__)


class RememberedPeer(msgspec.Struct, frozen=True):
    """One peer that was a connected member."""

    addresses: Addresses
    seen_at: float
    """Unix seconds."""


class _File(msgspec.Struct, frozen=True):
    version: Annotated[int, Meta(ge=1, le=1)]
    swarm: str
    peers: Annotated[list[RememberedPeer], Meta(max_length=4_096)]


def load_remembered(
    data_dir: Path, swarm: str, *, peers_max: int, now: float
) -> list[tuple[Address, ...]]:
    """Each peer's addresses, the one seen last first; blocks.

    swarm: peers of another swarm than this are not used.
    now: Unix seconds.
    """
    path = data_dir / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ValueError(f"longer than {FILE_BYTES_MAX:,} bytes")
        content = msgspec.json.decode(data, type=_File)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        _set_aside(path, error)
        return []
    if content.swarm != swarm:
        return []
    recent = [peer for peer in content.peers if peer.seen_at > now - FORGOTTEN_AFTER_S]
    usable = (addresses_of_one_peer(peer.addresses) for peer in recent[:peers_max])
    return [addresses for addresses in usable if addresses]


def save_remembered(data_dir: Path, swarm: str, peers: Sequence[RememberedPeer]) -> None:
    """Write them, the best first, atomically; blocks. Raises OSError."""
    content = msgspec.json.encode(_File(1, swarm, list(peers)))
    path = data_dir / FILE_NAME
    fresh = data_dir / (FILE_NAME + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def has_remembered_peers(data_dir: Path, swarm: str) -> bool:
    """Whether members of this swarm were ever met, however long ago; blocks."""
    return bool(load_remembered(data_dir, swarm, peers_max=1, now=0.0))


def forget_remembered_peers(data_dir: Path) -> None:
    """Remove the file, if there is one; blocks. For a node that leaves its swarm."""
    (data_dir / FILE_NAME).unlink(missing_ok=True)


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(path.name + ".damaged")
    try:
        path.replace(aside)
        _log.warning("%s cannot be used (%s); set aside as %s", path, error, aside.name)
    except OSError as trouble:
        _log.warning("%s cannot be used (%s) nor set aside (%s)", path, error, trouble)

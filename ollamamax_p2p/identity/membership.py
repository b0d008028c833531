"""Membership: which swarm this node is in, and the keys to it.

A private swarm has a **swarm key**, libp2p's pre-shared key: without it nobody finishes a
handshake. It is in every ticket. That alone makes nobody a member: who is one is agreed by the
cluster (`cluster.membership`), by peer id, which the transport proves. An open swarm has no key and
admits everybody.

The record is one file of mode 0600, replaced as a whole. Tickets are made here and honoured by the
cluster, which keeps only a hash of their secret.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.errors import BadConfig, StoreDamaged
from ollamamax_p2p.identity.core.addresses import Address
from ollamamax_p2p.identity.secret_files import read_secret, remove_secret, write_secret
from ollamamax_p2p.identity.tickets import (
    EXPIRES_AT_MAX,
    SECRET_BYTES,
    SWARM_ID_BYTES,
    SWARM_KEY_BYTES,
    Ticket,
)

USES_MAX = 256
"""Of one ticket; the cluster has the same bound."""

LIFETIME_S_MAX = 366 * 24 * 3600
"""A year: an invitation older than that is a password somebody forgot."""

TokenBytes = Callable[[int], bytes]


class _Saved(msgspec.Struct, frozen=True):
    """The file, as JSON with bytes in base64."""

    version: Annotated[int, Meta(ge=1, le=1)]
    swarm_id: Annotated[bytes, Meta(min_length=SWARM_ID_BYTES, max_length=SWARM_ID_BYTES)]
    swarm_key: Annotated[bytes, Meta(min_length=SWARM_KEY_BYTES, max_length=SWARM_KEY_BYTES)] | None

    def __repr__(self) -> str:
        return f"_Saved({self.swarm_id.hex()})"


class Membership:
    """This node's place in its swarm. Made by `create`, `load`, `join` and `join_open`.

    Methods that change it write its file and wait for the disk (milliseconds): call them in a
    thread.
    """

    def __init__(self, path: Path | None, saved: _Saved) -> None:
        """path: None keeps it in memory only, for simulations (then no method waits for a disk)."""
        self._path = path
        self._saved = saved

    @classmethod
    def create(
        cls,
        path: Path | None,
        *,
        open_swarm: bool = False,
        token_bytes: TokenBytes = secrets.token_bytes,
    ) -> "Membership":
        """Found a swarm with this node as its first member; saved when this returns.

        Raises BadConfig if the file says that the node is in a swarm already.
        """
        swarm_id = token_bytes(SWARM_ID_BYTES)
        swarm_key = None if open_swarm else token_bytes(SWARM_KEY_BYTES)
        return cls._made(path, _Saved(1, swarm_id, swarm_key))

    @classmethod
    def load(cls, path: Path) -> "Membership | None":
        """What the file says; None if there is none: this node is in no swarm.

        Raises KeyExposed, AccessRefused or StoreDamaged.
        """
        data = read_secret(path)
        if data is None:
            return None
        try:
            return cls(path, msgspec.json.decode(data, type=_Saved))
        except (ValueError, RecursionError):
            # Without the decoder's own words: they may quote the file.
            raise StoreDamaged(
                str(path),
                "not the record of a swarm; restore it from a backup, or remove it and join again",
            ) from None

    @classmethod
    def join(cls, path: Path | None, ticket: Ticket) -> "Membership":
        """Be in the swarm of a ticket that was redeemed; saved when this returns. Raises BadConfig
        like create.
        """
        return cls._made(path, _Saved(1, ticket.swarm_id, ticket.swarm_key))

    @classmethod
    def join_open(cls, path: Path | None, swarm_id: bytes) -> "Membership":
        """Be in an open swarm, whose id is all there is to know. Raises BadConfig like create."""
        return cls._made(path, _Saved(1, swarm_id, None))

    @classmethod
    def _made(cls, path: Path | None, saved: _Saved) -> "Membership":
        if path is not None and read_secret(path) is not None:
            raise BadConfig(
                str(path), "this node is in a swarm already; leave it first, `omx leave`"
            )
        membership = cls(path, saved)
        membership._save(saved)
        return membership

    def __repr__(self) -> str:
        """Without any key."""
        return f"Membership(swarm_id={self.swarm_id.hex()}, open={self.is_open})"

    @property
    def swarm_id(self) -> bytes:
        """16 bytes, public."""
        return self._saved.swarm_id

    @property
    def swarm_key(self) -> bytes | None:
        """libp2p's 32-byte pre-shared key; None for an open swarm."""
        return self._saved.swarm_key

    @property
    def is_open(self) -> bool:
        """True if everybody is admitted."""
        return self._saved.swarm_key is None

    def mdns_fingerprint(self) -> str:
        """16 hex digits by which members find each other on a local network; tells nobody more."""
        return hashlib.sha256(b"omx mdns 1\0" + self._saved.swarm_id).hexdigest()[:16]

    def new_ticket(
        self,
        addresses: Sequence[Address],
        *,
        uses: int,
        lifetime_s: int,
        now: float,
        token_bytes: TokenBytes = secrets.token_bytes,
    ) -> Ticket:
        """A ticket that nobody honours yet: the cluster must be told of it
        (`Cluster.issue_ticket`).

        addresses: where its holder can ask, best first, 1 to 16. uses: 1 to 256 peers. now: Unix
        seconds. Raises BadConfig if uses or lifetime is out of range.
        """
        _check_range("uses", uses, USES_MAX)
        _check_range("expires", lifetime_s, LIFETIME_S_MAX)
        expires_at = min(int(now) + lifetime_s, EXPIRES_AT_MAX)
        secret = token_bytes(SECRET_BYTES)
        return Ticket(self.swarm_id, tuple(addresses), secret, expires_at, self.swarm_key)

    def kept_at(self, path: Path) -> "Membership":
        """The same, in a file from now on; saved when this returns. Raises BadConfig if there is
        one already, else as `replaced_by`.
        """
        return self._made(path, self._saved)

    def replaced_by(self, other: "Membership") -> "Membership":
        """Be in another swarm from now on: its record, made in memory, takes the place of this one
        in one step. Raises AccessRefused, StoreFull or StoreDamaged; then nothing has changed.
        """
        replacement = Membership(self._path, other._saved)
        replacement._save(other._saved)
        return replacement

    def with_swarm_key(self, swarm_key: bytes) -> "Membership":
        """The same swarm behind another key; saved when this returns. Raises as `replaced_by`."""
        return self.replaced_by(Membership(None, _Saved(1, self.swarm_id, swarm_key)))

    def leave(self) -> None:
        """Delete the record: this node is in no swarm from now on, its keys are gone."""
        if self._path is not None:
            remove_secret(self._path)

    def _save(self, saved: _Saved) -> None:
        """Disk first: what a ticket gave must not be forgotten by a power cut."""
        if self._path is not None:
            write_secret(self._path, msgspec.json.encode(saved))
        self._saved = saved


def iso_time(unix_s: int) -> str:
    """`2026-11-22T21:35:00Z`."""
    moment = datetime.fromtimestamp(min(max(unix_s, 0), EXPIRES_AT_MAX), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _check_range(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise BadConfig(name, f"{value} is out of range, expected 1 to {most:,}")

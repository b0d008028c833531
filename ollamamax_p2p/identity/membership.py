"""Membership: what makes this node one of its swarm, and how it makes others so.

A swarm has a public random id and two secrets. The **swarm key** is libp2p's pre-shared key:
without it no handshake succeeds (an open swarm has none). The **member key** proves membership
behind it: a node's **credential** is HMAC-SHA256 of the swarm's id and the node's peer id under the
member key. Peers show each other their credentials when they connect (`host.connections`); the
transport proves the peer id, so a credential is worth nothing to anybody else.

A ticket carries the swarm key and a one-time secret of which its issuer keeps only a hash.
Redeeming it with the issuer gives the member key. So every member can admit members and none can be
expelled alone: that is what a shared key means. Membership that is agreed with Raft, where a member
can be revoked, comes later and replaces the member key; tickets and the join protocol stay.

In an open swarm everybody is admitted; its member key follows from its id, so that the same code
runs.

**Time.** The issuer's wall clock alone decides about expiry, and a ticket remembers the latest time
that was seen while it existed: a clock that is set back doesn't give it its time again. A clock
that reads earlier than the ticket was issued (a machine that woke without its clock) refuses it
too. A clock that jumps ahead and back expires the tickets of that moment and harms none issued
later.
"""

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.errors import (
    BadConfig,
    StoreDamaged,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.identity.core.addresses import Address
from ollamamax_p2p.identity.core.peer_id import PeerId
from ollamamax_p2p.identity.secret_files import read_secret, remove_secret, write_secret
from ollamamax_p2p.identity.tickets import (
    EXPIRES_AT_MAX,
    SECRET_BYTES,
    SWARM_ID_BYTES,
    SWARM_KEY_BYTES,
    Ticket,
)

MEMBER_KEY_BYTES = 32
CREDENTIAL_BYTES = 32

TICKETS_MAX = 256
"""Tickets kept at once, dead ones included: by them we say "expired" instead of "unknown"."""

USES_MAX = 256
"""Of one ticket: each use keeps a peer id of 52 bytes."""

LIFETIME_S_MAX = 366 * 24 * 3600
"""A year: an invitation older than that is a password somebody forgot."""

CLOCK_SLACK_S = 60
"""A clock may be set back by this much after a ticket was issued: NTP mends a drift."""

TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Grant:
    """What redeeming a ticket gives."""

    swarm_id: bytes
    member_key: bytes

    def __repr__(self) -> str:
        """Without the member key, so that it reaches no log and no traceback."""
        return f"Grant(swarm_id={self.swarm_id.hex()}, member_key=…)"


class _Issued(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """A ticket as its issuer remembers it."""

    secret_hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    issued_at: int
    expires_at: int
    uses: Annotated[int, Meta(ge=1, le=USES_MAX)]
    latest: int
    """The greatest time seen while it existed."""
    redeemed_by: Annotated[tuple[str, ...], Meta(max_length=USES_MAX)] = ()

    def seen_at(self, now: int) -> "_Issued":
        return msgspec.structs.replace(self, latest=max(self.latest, now))

    def is_over(self, now: int) -> bool:
        return self.latest >= self.expires_at or now < self.issued_at - CLOCK_SLACK_S

    @property
    def is_dead(self) -> bool:
        return self.latest >= self.expires_at or len(self.redeemed_by) >= self.uses


class _Saved(msgspec.Struct, frozen=True):
    """The file, as JSON with bytes in base64."""

    version: Annotated[int, Meta(ge=1, le=1)]
    swarm_id: Annotated[bytes, Meta(min_length=SWARM_ID_BYTES, max_length=SWARM_ID_BYTES)]
    swarm_key: Annotated[bytes, Meta(min_length=SWARM_KEY_BYTES, max_length=SWARM_KEY_BYTES)] | None
    member_key: Annotated[bytes, Meta(min_length=MEMBER_KEY_BYTES, max_length=MEMBER_KEY_BYTES)]
    tickets: Annotated[tuple[_Issued, ...], Meta(max_length=TICKETS_MAX)] = ()
    founder: bool = False

    def __repr__(self) -> str:
        return f"_Saved({self.swarm_id.hex()})"


class Membership:
    """This node's place in its swarm. Made by `create`, `load`, `join` and `join_open`.

    Methods that change it write its file and wait for the disk (milliseconds): call them in a
    thread. They may be called from several at once.
    """

    def __init__(self, path: Path | None, saved: _Saved) -> None:
        """path: None keeps it in memory only, for simulations (then no method waits for a disk)."""
        self._path = path
        self._saved = saved
        self._changing = threading.Lock()

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
        if open_swarm:
            return cls._made(path, _Saved(1, swarm_id, None, open_member_key(swarm_id)))
        swarm_key = token_bytes(SWARM_KEY_BYTES)
        member_key = token_bytes(MEMBER_KEY_BYTES)
        return cls._made(path, _Saved(1, swarm_id, swarm_key, member_key, founder=True))

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
    def join(cls, path: Path | None, ticket: Ticket, grant: Grant) -> "Membership":
        """Become what a redeemed ticket makes us; saved when this returns. Raises BadConfig like
        create.
        """
        if ticket.swarm_id != grant.swarm_id:
            raise ValueError("the grant is of another swarm than the ticket")
        return cls._made(path, _Saved(1, grant.swarm_id, ticket.swarm_key, grant.member_key))

    @classmethod
    def join_open(cls, path: Path | None, swarm_id: bytes) -> "Membership":
        """Be in an open swarm, whose id is all there is to know. Raises BadConfig like create."""
        return cls._made(path, _Saved(1, swarm_id, None, open_member_key(swarm_id)))

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

    @property
    def is_founder(self) -> bool:
        """True if this node began the swarm; False also for records of earlier versions."""
        return self._saved.founder

    @property
    def has_admitted(self) -> bool:
        """True if a ticket of this node has been redeemed: somebody else is in the swarm."""
        return any(ticket.redeemed_by for ticket in self._saved.tickets)

    @property
    def in_memory(self) -> bool:
        """True if no method waits for a disk."""
        return self._path is None

    def grant(self) -> Grant:
        """What makes another node a member; secret."""
        return Grant(self._saved.swarm_id, self._saved.member_key)

    def credential(self, peer: PeerId) -> bytes:
        """The 32 bytes that prove this peer a member, to members."""
        message = b"omx credential 1\0" + self._saved.swarm_id + peer.encode()
        return hmac.digest(self._saved.member_key, message, "sha256")

    def is_credential(self, peer: PeerId, credential: bytes) -> bool:
        """Whether it proves this peer a member. Takes the same time whatever is wrong with it."""
        return hmac.compare_digest(self.credential(peer), credential)

    def mdns_fingerprint(self) -> str:
        """16 hex digits by which members find each other on a local network; tells nobody more."""
        return hashlib.sha256(b"omx mdns 1\0" + self._saved.swarm_id).hexdigest()[:16]

    def issue(
        self,
        addresses: Sequence[Address],
        *,
        uses: int,
        lifetime_s: int,
        now: float,
        token_bytes: TokenBytes = secrets.token_bytes,
    ) -> Ticket:
        """A new ticket that this node will honour; remembered on disk when this returns.

        addresses: where this node can be dialled, best first, 1 to 16. uses: 1 to 256 peers. now:
        Unix seconds. Raises BadConfig if uses or lifetime is out of range, or if 256 tickets are
        alive.
        """
        _check_range("uses", uses, USES_MAX)
        _check_range("expires", lifetime_s, LIFETIME_S_MAX)
        at = int(now)
        secret = token_bytes(SECRET_BYTES)
        expires_at = min(at + lifetime_s, EXPIRES_AT_MAX)
        issued = _Issued(_hash(secret), at, expires_at, uses, at)
        with self._changing:
            kept = _with_room(tuple(ticket.seen_at(at) for ticket in self._saved.tickets))
            self._save(msgspec.structs.replace(self._saved, tickets=(*kept, issued)))
        return Ticket(
            self._saved.swarm_id, tuple(addresses), secret, expires_at, self._saved.swarm_key
        )

    def new_ticket(
        self,
        addresses: Sequence[Address],
        *,
        uses: int,
        lifetime_s: int,
        now: float,
        token_bytes: TokenBytes = secrets.token_bytes,
    ) -> Ticket:
        """A ticket that nobody honours yet: whoever agrees on members must be told of it. Raises
        BadConfig as `issue`.
        """
        _check_range("uses", uses, USES_MAX)
        _check_range("expires", lifetime_s, LIFETIME_S_MAX)
        expires_at = min(int(now) + lifetime_s, EXPIRES_AT_MAX)
        secret = token_bytes(SECRET_BYTES)
        return Ticket(self.swarm_id, tuple(addresses), secret, expires_at, self.swarm_key)

    def redeem(self, secret: bytes, peer: PeerId, *, now: float) -> Grant:
        """Make the peer a member, if the secret is that of a live ticket of ours.

        The same peer may redeem it again (its answer may have been lost) at no further use. On disk
        before it returns. Raises TicketUnknown, TicketExpired or TicketUsedUp.
        """
        wanted = _hash(secret)
        at = int(now)
        with self._changing:
            tickets = tuple(ticket.seen_at(at) for ticket in self._saved.tickets)
            ticket = next((each for each in tickets if each.secret_hash == wanted), None)
            if ticket is None:
                raise TicketUnknown
            if ticket.is_over(at):
                self._remember_expiry(tickets)
                raise TicketExpired(iso_time(ticket.expires_at))
            if peer not in ticket.redeemed_by:
                if len(ticket.redeemed_by) >= ticket.uses:
                    raise TicketUsedUp(ticket.uses)
                used = msgspec.structs.replace(ticket, redeemed_by=(*ticket.redeemed_by, peer))
                changed = tuple(used if each is ticket else each for each in tickets)
                self._save(msgspec.structs.replace(self._saved, tickets=changed))
            return self.grant()

    def _remember_expiry(self, tickets: tuple[_Issued, ...]) -> None:
        """Save that time passed, once per ticket: a restart with the clock set back changes
        nothing.
        """
        if any(
            new.is_dead and not old.is_dead
            for new, old in zip(tickets, self._saved.tickets, strict=True)
        ):
            self._save(msgspec.structs.replace(self._saved, tickets=tickets))

    def withdraw(self) -> int:
        """Forget every ticket: none can be redeemed any more. Returns how many were alive."""
        with self._changing:
            alive = sum(not ticket.is_dead for ticket in self._saved.tickets)
            self._save(msgspec.structs.replace(self._saved, tickets=()))
        return alive

    def replaced_by(self, other: "Membership") -> "Membership":
        """Be in another swarm from now on: its record, made in memory, takes the place of this one
        in one step. Raises AccessRefused, StoreFull or StoreDamaged; then nothing has changed.
        """
        replacement = Membership(self._path, other._saved)
        replacement._save(other._saved)
        return replacement

    def leave(self) -> None:
        """Delete the record: this node is in no swarm from now on, its keys are gone."""
        if self._path is not None:
            remove_secret(self._path)

    def _save(self, saved: _Saved) -> None:
        """Disk first: what is granted must not be forgotten by a power cut."""
        if self._path is not None:
            write_secret(self._path, msgspec.json.encode(saved))
        self._saved = saved


def open_member_key(swarm_id: bytes) -> bytes:
    """The member key of an open swarm: anybody can make it, so it proves nothing."""
    return hashlib.sha256(b"omx open member key 1\0" + swarm_id).digest()


def iso_time(unix_s: int) -> str:
    """`2026-11-22T21:35:00Z`."""
    moment = datetime.fromtimestamp(min(max(unix_s, 0), EXPIRES_AT_MAX), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _hash(secret: bytes) -> bytes:
    # No salt and no slow hash: the secret is 128 random bits, not a password.
    return hashlib.sha256(secret).digest()


def _with_room(tickets: tuple[_Issued, ...]) -> tuple[_Issued, ...]:
    """Drop dead tickets, oldest first, until one more may be kept."""
    excess = len(tickets) - TICKETS_MAX + 1
    dead = [ticket for ticket in tickets if ticket.is_dead][: max(excess, 0)]
    if len(dead) < excess:
        raise BadConfig(
            "tickets", f"{TICKETS_MAX} tickets are waiting to be used; withdraw them first"
        )
    return tuple(ticket for ticket in tickets if ticket not in dead)


def _check_range(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise BadConfig(name, f"{value} is out of range, expected 1 to {most:,}")

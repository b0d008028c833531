"""The rules: what each command does to the tables, and when it is refused.

Each checks everything before it changes anything, so a refused command leaves no trace; but the
clock, which moves on with every time that is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import replace

from ollamamax_p2p.cluster.core.agreed_settings import SETTINGS
from ollamamax_p2p.cluster.core.commands import (
    ANY,
    LIFETIME_S_MAX,
    VOTES,
    AcquireLease,
    AdmitMember,
    Done,
    ExpireLeases,
    ForgetChunkMap,
    ForgetOldSwarmKey,
    FoundCluster,
    Holds,
    IssueTicket,
    Pin,
    RedeemTicket,
    Refused,
    ReleaseLease,
    RemoveMember,
    RemoveTag,
    RenewLease,
    Result,
    RotateSwarmKey,
    SetChunkMap,
    SetClock,
    SetCopies,
    SetSetting,
    SetTag,
    Unpin,
    UpdateMember,
    WithdrawTickets,
    decode_command,
    refused,
)
from ollamamax_p2p.cluster.core.rows import (
    HOLDINGS_PER_MEMBER,
    LIMITS,
    AgreedSetting,
    ChunkMapOf,
    Clock,
    Copies,
    Holding,
    HoldingCount,
    IssuedTicket,
    Lease,
    Member,
    Pinned,
    Row,
    Swarm,
    Tables,
    Tag,
    has_room,
)
from ollamamax_p2p.consensus.core.messages import ConfState
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import BadName, BadPeerId
from ollamamax_p2p.identity.core.peer_id import parse_peer_id

FOUNDER_RAFT_ID = 1
"""The founder votes before there is any entry, so it can't have an entry's index."""

CLOCK_SLACK_S = 300
"""A proposer's clock may be behind the greatest seen by this when it issues a ticket. NTP keeps
machines within a second; this leaves room for those without."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the log a command stands."""

    index: int
    conf_state: ConfState
    """In force before it."""


def carry_out(data: bytes, place: Place, tables: Tables) -> Result:
    """Decode one command, decide, and change the tables if it is accepted. Never raises for what
    it is given.
    """
    command = decode_command(data)
    if isinstance(command, Refused):
        return command
    return _RULES[type(command)](command, place, tables)


def clock(tables: Tables) -> int:
    """The greatest time that any command has carried."""
    row = tables.get(Clock, "")
    return row.now if row else 0


def _seen(tables: Tables, now: int) -> int:
    """Let the clock move on; gives it."""
    before = clock(tables)
    if now > before:
        tables.put("", Clock(now))
    return max(before, now)


def _full(kind: type[Row], what: str) -> Refused:
    return refused("full", f"there are {LIMITS[kind]:,} {what}, the most there may be")


# -- members -----------------------------------------------------------------------------------


def _found(command: FoundCluster, place: Place, tables: Tables) -> Result:
    if tables.get(Swarm, "") is not None:
        return refused("founded", "the cluster has been founded already; join it")
    if not _is_peer(command.peer):
        return _no_peer()
    swarm = Swarm(swarm_id=command.swarm_id, swarm_key=command.swarm_key)
    tables.put("", swarm)
    return _admitted(command, FOUNDER_RAFT_ID, place, tables)


def _admit(command: AdmitMember, place: Place, tables: Tables) -> Result:
    known = tables.get(Member, command.peer)
    if known is not None:
        return Done(known.raft_id)
    problem = _no_room_for_member(command.peer, tables)
    return problem or _admitted(command, place.index, place, tables)


def _no_room_for_member(peer: str, tables: Tables) -> Refused | None:
    if tables.get(Swarm, "") is None:
        # Also what keeps index 1 from being given to anybody but the founder.
        return refused("not_founded", "the cluster has not been founded yet")
    if not _is_peer(peer):
        return _no_peer()
    return None if has_room(tables, Member, peer) else _full(Member, "members")


def _admitted(
    command: FoundCluster | AdmitMember | RedeemTicket, raft_id: int, place: Place, tables: Tables
) -> Done:
    ticket = command.secret_hash.hex() if isinstance(command, RedeemTicket) else ""
    member = Member(
        raft_id=raft_id,
        peer=command.peer,
        name=command.name,
        region=command.region,
        may_vote=command.may_vote,
        joined_index=place.index,
        addresses=command.addresses,
        ticket=ticket,
    )
    tables.put(command.peer, member)
    return Done(raft_id)


def _remove(command: RemoveMember, place: Place, tables: Tables) -> Result:
    member = tables.get(Member, command.peer)
    if member is None:
        return Done()
    voters = {*place.conf_state.voters, *place.conf_state.voters_outgoing}
    if member.raft_id in voters:
        return refused("votes", "it votes; demote it first, `omx cluster demote`")
    tables.delete(Member, command.peer)
    tables.delete(HoldingCount, command.peer)
    for kind in (Holding, Pinned):
        for key, _ in tables.items(kind, f"{command.peer}/"):
            tables.delete(kind, key)
    return Done(member.raft_id)


def _update(command: UpdateMember, place: Place, tables: Tables) -> Result:
    member = tables.get(Member, command.peer)
    if member is None:
        return _no_member()
    wanted = {
        field: value
        for field in ("name", "region", "may_vote", "role", "addresses")
        if (value := getattr(command, field)) is not None
    }
    tables.put(command.peer, replace(member, **wanted))
    return Done(member.raft_id)


def _is_peer(text: str) -> bool:
    try:
        return bool(parse_peer_id(text))
    except BadPeerId:
        return False


def _no_peer() -> Refused:
    return refused("peer", "not the id of an Ed25519 peer")


def _no_member() -> Refused:
    return refused("no_member", "no member has that peer id; see `omx cluster members`")


# -- tickets -----------------------------------------------------------------------------------


def _issue(command: IssueTicket, place: Place, tables: Tables) -> Result:
    now = _seen(tables, command.issued_at)
    if command.issued_at < now - CLOCK_SLACK_S:
        behind = now - command.issued_at
        return refused(
            "clock_behind",
            f"this node's clock is {behind:,} s behind the latest that the cluster saw; set it, "
            "or mend the cluster's, `omx cluster set-clock`",
        )
    lifetime = command.expires_at - command.issued_at
    if not 1 <= lifetime <= LIFETIME_S_MAX:
        return refused("lifetime", f"a ticket lives 1 to {LIFETIME_S_MAX:,} s, not {lifetime:,}")
    key = command.secret_hash.hex()
    known = tables.get(IssuedTicket, key)
    if known is not None:
        return _issued_again(command, known)
    if not has_room(tables, IssuedTicket, key) and not _drop_dead_ticket(tables, now):
        return _full(IssuedTicket, "tickets that are waiting to be used; withdraw them first")
    ticket = IssuedTicket(command.uses, command.issued_at, command.expires_at, place.index)
    tables.put(key, ticket)
    return Done()


def _issued_again(command: IssueTicket, known: IssuedTicket) -> Result:
    asked = (command.uses, command.issued_at, command.expires_at)
    if asked == (known.uses, known.issued_at, known.expires_at):
        return Done()
    return refused("exists", "a ticket with this secret exists, with other terms")


def _drop_dead_ticket(tables: Tables, now: int) -> bool:
    """Make room: forget the oldest one that nobody can redeem."""
    dead = [(row.index, key) for key, row in tables.items(IssuedTicket) if row.is_dead(now)]
    if not dead:
        return False
    tables.delete(IssuedTicket, min(dead)[1])
    return True


def _redeem(command: RedeemTicket, place: Place, tables: Tables) -> Result:
    now = _seen(tables, command.now)
    key = command.secret_hash.hex()
    ticket = tables.get(IssuedTicket, key)
    if ticket is None:
        return Refused("ticket_unknown", "unknown", "the ticket is not known")
    known = tables.get(Member, command.peer)
    if known is not None:
        # Its answer was lost, or its disk, or it comes for the swarm's new key: nothing is granted,
        # so nothing is spent.
        if known.raft_id in {*place.conf_state.voters, *place.conf_state.voters_outgoing}:
            return Done(known.raft_id, VOTES)
        tables.put(command.peer, replace(known, raft_id=place.index))
        return Done(place.index)
    if now >= ticket.expires_at:
        moment = datetime.fromtimestamp(ticket.expires_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return Refused("ticket_expired", "expired", "the ticket has expired", actual=moment)
    if ticket.used >= ticket.uses:
        return Refused("ticket_used_up", "used_up", "the ticket is used up", uses=ticket.uses)
    problem = _no_room_for_member(command.peer, tables)
    if problem is not None:
        return problem
    tables.put(key, replace(ticket, used=ticket.used + 1))
    return _admitted(command, place.index, place, tables)


def _withdraw(command: WithdrawTickets, place: Place, tables: Tables) -> Result:
    wanted = None if command.secret_hash is None else command.secret_hash.hex()
    now = clock(tables)
    alive = 0
    for key, ticket in tables.items(IssuedTicket, wanted or ""):
        tables.delete(IssuedTicket, key)
        alive += not ticket.is_dead(now)
    return Done(alive)


def _set_clock(command: SetClock, place: Place, tables: Tables) -> Result:
    before = clock(tables)
    for key, _ in tables.items(IssuedTicket):
        tables.delete(IssuedTicket, key)
    tables.put("", Clock(command.now))
    for key, lease in tables.items(Lease):
        # Each keeps what it had left: nobody loses a lease, nor holds one until the wrong year.
        left = max(lease.expires_at - before, 0)
        tables.put(key, replace(lease, expires_at=command.now + left))
    return Done(command.now)


def _rotate(command: RotateSwarmKey, place: Place, tables: Tables) -> Result:
    swarm = tables.get(Swarm, "")
    if swarm is None or swarm.swarm_key is None:
        return refused("open", "the swarm is open: it has no key to rotate")
    if command.generation != swarm.key_generation:
        return _other_generation(swarm)
    rotated = replace(
        swarm,
        key_generation=swarm.key_generation + 1,
        swarm_key=command.key,
        swarm_key_before=swarm.swarm_key,
    )
    tables.put("", rotated)
    return Done(rotated.key_generation)


def _forget_key(command: ForgetOldSwarmKey, place: Place, tables: Tables) -> Result:
    swarm = tables.get(Swarm, "")
    if swarm is None or command.generation != swarm.key_generation:
        return _other_generation(swarm)
    tables.put("", replace(swarm, swarm_key_before=None))
    return Done(swarm.key_generation)


def _other_generation(swarm: Swarm | None) -> Refused:
    present = swarm.key_generation if swarm else 0
    return refused("generation", f"the swarm key is of generation {present} now", str(present))


# -- the catalogue -----------------------------------------------------------------------------


def _parsed(text: str) -> ModelName | None:
    """A model name; its key is how the tables know it. None if it is none."""
    try:
        return parse_model_name(text)
    except BadName:
        return None


def _name_key(text: str) -> str | None:
    name = _parsed(text)
    return name.key if name else None


def _no_name() -> Refused:
    return refused("name", "not a model name; expected host/namespace/model:tag")


def _set_tag(command: SetTag, place: Place, tables: Tables) -> Result:
    name = _parsed(command.name)
    if name is None:
        return _no_name()
    key = name.key
    known = tables.get(Tag, key)
    if known is not None and known.manifest == command.manifest:
        return Done(known.index, known.manifest)
    if command.expected != ANY and command.expected != (known.manifest if known else None):
        return _tag_differs(known)
    if not has_room(tables, Tag, key):
        return _full(Tag, "tags")
    tables.put(key, Tag(name.full(), command.manifest, place.index))
    return Done(place.index, command.manifest)


def _remove_tag(command: RemoveTag, place: Place, tables: Tables) -> Result:
    key = _name_key(command.name)
    if key is None:
        return _no_name()
    known = tables.get(Tag, key)
    if known is not None and command.expected not in (ANY, known.manifest):
        return _tag_differs(known)
    tables.delete(Tag, key)
    return Done(text=known.manifest if known else "")


def _tag_differs(known: Tag | None) -> Refused:
    present = known.manifest if known else ""
    return refused("tag_differs", f"the tag means {present or 'nothing'} now", present)


def _set_map(command: SetChunkMap, place: Place, tables: Tables) -> Result:
    known = tables.get(ChunkMapOf, command.blob)
    if known is None and not has_room(tables, ChunkMapOf, command.blob):
        return _full(ChunkMapOf, "chunk maps")
    wanted = ChunkMapOf(command.chunk_map, command.size)
    if known is not None and known != wanted:
        message = f"another map was agreed, of {known.size:,} bytes"
        return refused("map_differs", message, known.chunk_map)
    if known is None:
        tables.put(command.blob, wanted)
    return Done(text=command.chunk_map)


def _forget_map(command: ForgetChunkMap, place: Place, tables: Tables) -> Result:
    known = tables.get(ChunkMapOf, command.blob)
    if known is not None and known.chunk_map != command.chunk_map:
        return refused("map_differs", "another map was agreed", known.chunk_map)
    tables.delete(ChunkMapOf, command.blob)
    return Done()


def _holds(command: Holds, place: Place, tables: Tables) -> Result:
    if tables.get(Member, command.peer) is None:
        return _no_member()
    prefix = f"{command.peer}/"
    # What is named in both is held no longer; dict.fromkeys: once each, in their order.
    added = [blob for blob in dict.fromkeys(command.added) if blob not in command.dropped]
    new = [blob for blob in added if tables.get(Holding, prefix + blob) is None]
    gone = [
        blob
        for blob in dict.fromkeys(command.dropped)
        if tables.get(Holding, prefix + blob) is not None
    ]
    row = tables.get(HoldingCount, command.peer)
    before = row.count if row else 0
    count = before + len(new) - len(gone)
    if count > HOLDINGS_PER_MEMBER:
        return refused("full", f"a member may announce {HOLDINGS_PER_MEMBER:,} blobs at most")
    if tables.count(Holding) + count - before > LIMITS[Holding]:
        return _full(Holding, "announced blobs")
    for blob in gone:
        tables.delete(Holding, prefix + blob)
    for blob in new:
        tables.put(prefix + blob, Holding())
    _put_count(command.peer, count, tables)
    return Done(count)


def _put_count(peer: str, count: int, tables: Tables) -> None:
    if count:
        tables.put(peer, HoldingCount(count))
    else:
        tables.delete(HoldingCount, peer)


# -- wishes ------------------------------------------------------------------------------------


def _set_copies(command: SetCopies, place: Place, tables: Tables) -> Result:
    key = _name_key(command.name)
    if key is None:
        return _no_name()
    if command.copies is None:
        tables.delete(Copies, key)
        return Done()
    if not has_room(tables, Copies, key):
        return _full(Copies, "wishes for copies")
    tables.put(key, Copies(command.copies))
    return Done(command.copies)


def _pin(command: Pin, place: Place, tables: Tables) -> Result:
    name = _name_key(command.name)
    if name is None:
        return _no_name()
    if tables.get(Member, command.peer) is None:
        return _no_member()
    key = f"{command.peer}/{name}"
    if not has_room(tables, Pinned, key):
        return _full(Pinned, "pins")
    tables.put(key, Pinned())
    return Done()


def _unpin(command: Unpin, place: Place, tables: Tables) -> Result:
    name = _name_key(command.name)
    if name is None:
        return _no_name()
    tables.delete(Pinned, f"{command.peer}/{name}")
    return Done()


# -- leases ------------------------------------------------------------------------------------


def _acquire(command: AcquireLease, place: Place, tables: Tables) -> Result:
    now = _seen(tables, command.now)
    known = tables.get(Lease, command.key)
    if known is not None and known.holder != command.holder and now < known.expires_at:
        return refused("lease_held", f"{known.holder} holds it", known.holder)
    if not has_room(tables, Lease, command.key):
        return _full(Lease, "leases")
    tables.put(command.key, Lease(command.key, command.holder, place.index, now + command.ttl_s))
    return Done(place.index)


def _renew(command: RenewLease, place: Place, tables: Tables) -> Result:
    now = _seen(tables, command.now)
    known = tables.get(Lease, command.key)
    if known is None or known.token != command.token or now >= known.expires_at:
        return _lease_lost(known)
    # Not sooner than it was: a renewal must never take time away.
    until = max(known.expires_at, now + command.ttl_s)
    tables.put(command.key, replace(known, expires_at=until))
    return Done(known.token)


def _release(command: ReleaseLease, place: Place, tables: Tables) -> Result:
    known = tables.get(Lease, command.key)
    if known is None or known.token != command.token:
        return _lease_lost(known)
    tables.delete(Lease, command.key)
    return Done(known.token)


def _lease_lost(known: Lease | None) -> Refused:
    holder = known.holder if known else ""
    return refused("lease_lost", "the lease ran out or is another's; acquire it anew", holder)


def _expire(command: ExpireLeases, place: Place, tables: Tables) -> Result:
    now = _seen(tables, command.now)
    over = [key for key, lease in tables.items(Lease) if now >= lease.expires_at]
    for key in over:
        tables.delete(Lease, key)
    return Done(len(over))


def _set(command: SetSetting, place: Place, tables: Tables) -> Result:
    setting = SETTINGS.get(command.key)
    if setting is None:
        return refused("setting", f"no such setting; there are {', '.join(sorted(SETTINGS))}")
    problem = setting.problem(command.value)
    if problem:
        return refused("setting", f"{command.key}: {problem}")
    tables.put(command.key, AgreedSetting(command.value))
    return Done()


_RULES: dict[type, Callable[[Any, Place, Tables], Result]] = {
    FoundCluster: _found,
    AdmitMember: _admit,
    RemoveMember: _remove,
    UpdateMember: _update,
    IssueTicket: _issue,
    RedeemTicket: _redeem,
    WithdrawTickets: _withdraw,
    SetClock: _set_clock,
    RotateSwarmKey: _rotate,
    ForgetOldSwarmKey: _forget_key,
    SetTag: _set_tag,
    RemoveTag: _remove_tag,
    SetChunkMap: _set_map,
    ForgetChunkMap: _forget_map,
    Holds: _holds,
    SetCopies: _set_copies,
    Pin: _pin,
    Unpin: _unpin,
    AcquireLease: _acquire,
    RenewLease: _renew,
    ReleaseLease: _release,
    ExpireLeases: _expire,
    SetSetting: _set,
}

"""Commands: how the agreed state is changed, and what each answers.

A command is a committed entry's data: an envelope with a version and one of the structs below.
Everything follows from the command, its index and the state before it, so every replica answers
alike. What cannot be decoded, breaks a bound or comes in an unknown version is refused by result.

**Versions.** All replicas must take the same commands. So fields are never added to these structs
and no struct is added under version 1: whatever is new goes into an envelope of version 2, which
every replica refuses, also the newer ones, until a cluster has agreed to raise its version. The
same holds for bounds, limits and rules: whatever changes an answer needs another version.

**Time.** Commands that depend on time carry their proposer's wall clock as `now`, Unix seconds. The
state keeps the greatest that it saw, so setting a clock back gives nothing back.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from ollamamax_p2p import errors
from ollamamax_p2p.errors import BadInput, MalformedMessage, OmxError, TicketExpired, TicketUsedUp
from ollamamax_p2p.wire import Codec, Message

VERSION = 1

COMMAND_BYTES_MAX = 256 * 1024
"""The longest is Holds with 2,048 digests of 73 bytes: 150 KB. Raft takes 512 KiB."""

HOLDS_BATCH_MAX = 1_024
"""Digests added, and as many dropped, in one command: more take several."""

PEER_ADDRESSES_MAX = 8
"""Remembered of each member: loopback and relays apart, few machines have more."""

USES_MAX = 256
"""Of one ticket; `identity.membership` has the same."""

LIFETIME_S_MAX = 366 * 24 * 3600
"""A year: an invitation older than that is a password somebody forgot."""

TIME_MAX = 253_402_300_799
"""The end of the year 9999: the last second that ISO 8601 can name."""

COPIES_MAX = 64
"""More copies of one model than that is "on every node", for which there is pinning."""

LEASE_S_MAX = 3_600
"""A holder that says nothing for an hour is gone."""

VOTES = "votes"
"""As the text of a RedeemTicket's Done: the peer is a voter already."""

ANY = "*"
"""As `expected`: whatever the tag means now."""

_WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\Z"
_DIGEST = r"^sha256:[0-9a-f]{64}\Z"
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
# One line: names end up in tables, logs and terminals.

Peer = Annotated[
    str, Meta(min_length=52, max_length=52, pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]*\Z")
]
DigestText = Annotated[str, Meta(min_length=71, max_length=71, pattern=_DIGEST)]
ExpectedDigest = Annotated[str, Meta(max_length=71, pattern=r"^(\*|sha256:[0-9a-f]{64})\Z")]
"""A digest, or ANY."""
NodeName = Annotated[str, Meta(min_length=1, max_length=64, pattern=_PRINTABLE)]
Region = Annotated[str, Meta(max_length=64, pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?\Z")]
"""A label such as `eu-west.rack-7`; empty: none."""
ModelText = Annotated[str, Meta(min_length=1, max_length=700, pattern=_PRINTABLE)]
"""A model name in full; the rules check it further."""
Time = Annotated[int, Meta(ge=0, le=TIME_MAX)]
Addresses = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=512, pattern=_PRINTABLE)], ...],
    Meta(max_length=PEER_ADDRESSES_MAX),
]
"""Multiaddrs to try; hints, checked where they are dialled."""
SwarmKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
SecretHash = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""SHA-256 of a ticket's one-time secret."""
LeaseKey = Annotated[str, Meta(min_length=1, max_length=256, pattern=_PRINTABLE)]
Holder = Annotated[str, Meta(min_length=1, max_length=128, pattern=_PRINTABLE)]
"""Who holds a lease: unique to one life of one worker, e.g. peer id and start time."""
Token = Annotated[int, Meta(ge=1, le=2**63 - 1)]
LeaseSeconds = Annotated[int, Meta(ge=1, le=LEASE_S_MAX)]
SettingKey = Annotated[str, Meta(min_length=1, max_length=64, pattern=_WORD)]
SettingValue = bool | Annotated[int, Meta(ge=-(2**53), le=2**53)]
RoleWish = Literal["auto", "voter", "learner"]
"""What the operator wants of a member; auto: as autopilot thinks best."""


class Command(Message, forbid_unknown_fields=True, frozen=True):
    """What every command derives from. Unknown fields are refused: an older replica would ignore
    what a newer one acts on.
    """


# -- members and tickets -----------------------------------------------------------------------


class FoundCluster(Command, tag="found", frozen=True):
    """The first member, whose Raft id is 1; refused once there is one."""

    swarm_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    swarm_key: SwarmKey | None
    """libp2p's pre-shared key; None for an open swarm."""
    peer: Peer
    name: NodeName
    region: Region = ""
    may_vote: bool = False
    """False keeps a device that sleeps from ever becoming a voter, unless it is told to be one."""
    addresses: Addresses = ()

    def __repr__(self) -> str:
        """Without the key."""
        return f"FoundCluster({self.swarm_id.hex()}, {self.peer})"


class AdmitMember(Command, tag="admit", frozen=True):
    """Make a peer a member: Done(number=its Raft id). One that is a member already stays it, with
    what is known of it.
    """

    peer: Peer
    name: NodeName
    region: Region = ""
    may_vote: bool = False
    addresses: Addresses = ()


class RemoveMember(Command, tag="remove", frozen=True):
    """Expel a peer, with what it holds and is pinned to it. Refused while it votes: the gate would
    close before the others can do without its vote. Demote it first.
    """

    peer: Peer


class UpdateMember(Command, tag="update", frozen=True):
    """Change what is given, leave what is None."""

    peer: Peer
    name: NodeName | None = None
    region: Region | None = None
    may_vote: bool | None = None
    role: RoleWish | None = None
    addresses: Addresses | None = None


class IssueTicket(Command, tag="issue", frozen=True):
    """Honour a ticket from now on. The same once more changes nothing."""

    secret_hash: SecretHash
    uses: Annotated[int, Meta(ge=1, le=USES_MAX)]
    expires_at: Time
    issued_at: Time
    """The proposer's `now`."""


class RedeemTicket(Command, tag="redeem", frozen=True):
    """Become a member by a ticket: Done(number=Raft id). Whoever is a member already takes no use:
    a voter keeps its Raft id, Done(text=VOTES); a learner gets a new one, because it may have lost
    its log, and what the leader knows of the old one would be wrong.

    Refused as ticket_unknown, ticket_expired or ticket_used_up.
    """

    secret_hash: SecretHash
    peer: Peer
    now: Time
    name: NodeName
    region: Region = ""
    may_vote: bool = False
    addresses: Addresses = ()


class WithdrawTickets(Command, tag="withdraw", frozen=True):
    """Forget one ticket, or all: Done(number=how many there were)."""

    secret_hash: SecretHash | None = None


class SetClock(Command, tag="clock", frozen=True):
    """Mend a clock that a node with a wrong one drove ahead. Forgets all tickets, so that none gets
    its time again.
    """

    now: Time


class RotateSwarmKey(Command, tag="rotate", frozen=True):
    """A new pre-shared key; the one before stays known, so that nodes that were away get in.

    generation: the one in force, so that two rotations at once are one. Done(number=the new one).
    """

    generation: Annotated[int, Meta(ge=1, le=2**31)]
    key: SwarmKey

    def __repr__(self) -> str:
        """Without the key."""
        return f"RotateSwarmKey(generation={self.generation})"


class ForgetOldSwarmKey(Command, tag="forget_key", frozen=True):
    """The key before the present one opens nothing any more. generation: the one in force."""

    generation: Annotated[int, Meta(ge=1, le=2**31)]


# -- the catalogue -----------------------------------------------------------------------------


class SetTag(Command, tag="set_tag", frozen=True):
    """Say what a name means, if it means `expected` now. Done(text=the digest agreed), also if it
    means that already; else Refused(reason="tag_differs", actual=what it means).
    """

    name: ModelText
    manifest: DigestText
    expected: ExpectedDigest | None = None
    """None: nothing yet; ANY: whatever it is."""


class RemoveTag(Command, tag="remove_tag", frozen=True):
    """A name means nothing any more. Wishes about it stay."""

    name: ModelText
    expected: ExpectedDigest = ANY


class SetChunkMap(Command, tag="set_map", frozen=True):
    """Say by which chunk map a blob is verified. The first one wins."""

    blob: DigestText
    chunk_map: DigestText
    size: Annotated[int, Meta(ge=0, le=2**50)]
    """Of the blob, in bytes."""


class ForgetChunkMap(Command, tag="forget_map", frozen=True):
    """Take back a chunk map that was found to be wrong."""

    blob: DigestText
    chunk_map: DigestText


class Holds(Command, tag="holds", frozen=True):
    """A member came to hold blobs, or no longer does. A hint where to ask, never a promise."""

    peer: Peer
    added: Annotated[tuple[DigestText, ...], Meta(max_length=HOLDS_BATCH_MAX)] = ()
    dropped: Annotated[tuple[DigestText, ...], Meta(max_length=HOLDS_BATCH_MAX)] = ()


# -- wishes, leases, settings ------------------------------------------------------------------


class SetCopies(Command, tag="copies", frozen=True):
    """On how many nodes a model should be; None: as many as the cluster's default says."""

    name: ModelText
    copies: Annotated[int, Meta(ge=0, le=COPIES_MAX)] | None


class Pin(Command, tag="pin", frozen=True):
    """A model should be on this member."""

    name: ModelText
    peer: Peer


class Unpin(Command, tag="unpin", frozen=True):
    """Take a Pin back."""

    name: ModelText
    peer: Peer


class AcquireLease(Command, tag="acquire", frozen=True):
    """Done(number=fencing token), greater than all before it; the resource refuses smaller ones.

    Refused(reason="lease_held", actual=holder) while another holds it. The holder itself gets a new
    token: whatever an earlier life of it still does is fenced off.
    """

    key: LeaseKey
    holder: Holder
    ttl_s: LeaseSeconds
    now: Time


class RenewLease(Command, tag="renew", frozen=True):
    """Refused(reason="lease_lost") if it ran out, also if nobody took it since."""

    key: LeaseKey
    token: Token
    ttl_s: LeaseSeconds
    now: Time


class ReleaseLease(Command, tag="release", frozen=True):
    """Give it back before its time."""

    key: LeaseKey
    token: Token


class ExpireLeases(Command, tag="expire", frozen=True):
    """End those whose time is over: Done(number=how many). The leader proposes it; nothing else
    ends a lease that nobody wants, and no node's own timer ever does.
    """

    now: Time


class SetSetting(Command, tag="set", frozen=True):
    """Change one of `agreed_settings.SETTINGS`."""

    key: SettingKey
    value: SettingValue


AnyCommand: TypeAlias = (
    FoundCluster
    | AdmitMember
    | RemoveMember
    | UpdateMember
    | IssueTicket
    | RedeemTicket
    | WithdrawTickets
    | SetClock
    | RotateSwarmKey
    | ForgetOldSwarmKey
    | SetTag
    | RemoveTag
    | SetChunkMap
    | ForgetChunkMap
    | Holds
    | SetCopies
    | Pin
    | Unpin
    | AcquireLease
    | RenewLease
    | ReleaseLease
    | ExpireLeases
    | SetSetting
)

_commands: Codec[AnyCommand] = Codec(AnyCommand, max_bytes=COMMAND_BYTES_MAX)


def encode_command(command: AnyCommand) -> bytes:
    """As a proposal's data. Raises BadInput if a field breaks its bound: propose nothing."""
    try:
        data = _commands.encode(command)
        _commands.decode(data)
    except (MalformedMessage, ValueError, OverflowError) as error:
        raise BadInput(f"{type(command).__name__}: {error}") from error
    return bytes([VERSION]) + data


def decode_command(data: bytes) -> "AnyCommand | Refused":
    """What to carry out, or why every replica refuses it."""
    if data[:1] != bytes([VERSION]):
        return refused("version", f"the cluster has agreed on commands of version {VERSION}")
    try:
        return _commands.decode(data[1:])
    except MalformedMessage:
        # Not the decoder's words: they may differ between versions of it, results must not.
        return refused("malformed", "not a command of this version, or a field is out of bounds")


# -- results -----------------------------------------------------------------------------------


class Done(msgspec.Struct, frozen=True, tag="done", tag_field="is", omit_defaults=True):
    """It is so now."""

    number: int = 0
    text: str = ""


class Refused(msgspec.Struct, frozen=True, tag="refused", tag_field="is", omit_defaults=True):
    """The rules say no, and nothing changed."""

    code: str
    """`errors.code` of the class that a caller should raise."""
    reason: str
    """A stable word, for programs."""
    message: str
    actual: str = ""
    """What stands in the way: the digest that was agreed, a lease's holder."""
    uses: int = 0
    """Of a ticket that was used up."""

    def error(self) -> OmxError:
        """As an error to raise."""
        match self.code:
            case "ticket_expired":
                return TicketExpired(self.actual)
            case "ticket_used_up":
                return TicketUsedUp(self.uses)
            case "ticket_unknown":
                return errors.TicketUnknown()
            case _:
                return errors.restored(self.code, self.message)


Result: TypeAlias = Done | Refused

_results = msgspec.msgpack.Decoder(Result)


def refused(reason: str, message: str, actual: str = "") -> Refused:
    """Refused as bad input."""
    return Refused("bad_input", reason, message, actual)


def encode_result(result: Result) -> bytes:
    """As `StateMachine.apply` answers it."""
    return msgspec.msgpack.encode(result)


def decode_result(data: bytes) -> Result:
    """Raises MalformedMessage."""
    try:
        return _results.decode(data)  # type: ignore[no-any-return]  # the union's type is lost
    except ValueError as error:
        raise MalformedMessage("", f"not a result: {error}") from error

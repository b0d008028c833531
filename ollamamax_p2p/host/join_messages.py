"""The join protocol's messages (`/omx/join/1`): membership first, then signs of life.

The dialler opens the stream and speaks first, with Hello or Redeem; docs/protocols/join.md tells
the whole conversation.
"""

from datetime import datetime
from typing import Annotated

from msgspec import Meta

from ollamamax_p2p.errors import (
    BadTicket,
    NotAdmitted,
    OmxError,
    PeerUnreachable,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.host.member_gate import ROSTER_MAX
from ollamamax_p2p.identity import PeerId, iso_time
from ollamamax_p2p.wire import Codec, Message

AGENT_CHARS_MAX = 128
OWN_ADDRESSES_MAX = 16
TOLD_ADDRESSES_MAX = 64
"""Of other members, in one Welcome or Granted: enough to find the rest of a large swarm from."""

MESSAGE_BYTES_MAX = 64 * 1024
"""80 addresses of 512 characters and what else is there."""

AddressText = Annotated[str, Meta(max_length=512)]
OwnAddresses = Annotated[list[AddressText], Meta(max_length=OWN_ADDRESSES_MAX)]
ToldAddresses = Annotated[list[AddressText], Meta(max_length=TOLD_ADDRESSES_MAX)]
Agent = Annotated[str, Meta(max_length=AGENT_CHARS_MAX)]
SwarmId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Nonce = Annotated[int, Meta(ge=0, lt=2**53)]

RosterLine = tuple[
    Annotated[str, Meta(min_length=52, max_length=52)], Annotated[int, Meta(ge=1, le=2**62)]
]


class Hello(Message, tag="hello", frozen=True):
    """Dialler: I am a member of this swarm; are you?"""

    swarm_id: Annotated[bytes, Meta(max_length=16)]
    """Empty: whichever open swarm you are in."""
    agent: Agent
    addresses: OwnAddresses


class Redeem(Message, tag="redeem", frozen=True):
    """Dialler: I have a ticket of yours."""

    swarm_id: SwarmId
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    name: Annotated[str, Meta(max_length=64)] = ""
    """What the newcomer calls itself."""

    def __repr__(self) -> str:
        """Without the secret, which must not reach a log."""
        return f"Redeem(swarm_id={self.swarm_id.hex()}, secret=…)"


class Welcome(Message, tag="welcome", frozen=True):
    """Answerer, to Hello: you are, and so am I; here are others."""

    swarm_id: SwarmId
    agent: Agent
    addresses: OwnAddresses
    peers: ToldAddresses


class Granted(Message, tag="granted", frozen=True):
    """Answerer, to Redeem: you are a member; say Hello on a new stream once this is saved."""

    swarm_id: SwarmId
    peers: ToldAddresses
    raft_id: Annotated[int, Meta(ge=1, le=2**62)]
    """The newcomer's own."""
    roster: Annotated[tuple[RosterLine, ...], Meta(max_length=ROSTER_MAX)]
    """Members and their Raft ids."""
    votes: bool = False
    """The newcomer is one of the voters: it has been here before."""


class Refused(Message, tag="refused", frozen=True):
    """Either: no. The end of the conversation."""

    reason: Annotated[str, Meta(max_length=40)]
    """A code of `refusal_of`; an unknown one is shown as it is."""
    expires_at: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    """With ticket_expired: Unix seconds."""
    uses: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    """With ticket_used_up: how often it could be redeemed."""


class Ping(Message, tag="ping", frozen=True):
    """Either: are you there? The dialler's first one also says that it took the Welcome."""

    nonce: Nonce


class Pong(Message, tag="pong", frozen=True):
    """The answer to the Ping of the same nonce."""

    nonce: Nonce


class Goodbye(Message, tag="goodbye", frozen=True):
    """Either: I end this on purpose. The last message."""

    leaving: bool
    """True: I leave the swarm, forget me; False: I stop, and may be back."""


FromDialler = Hello | Redeem | Refused | Ping | Pong | Goodbye
FromAnswerer = Welcome | Granted | Refused | Ping | Pong | Goodbye

dialler_codec: Codec[FromDialler] = Codec(FromDialler, max_bytes=MESSAGE_BYTES_MAX)
answerer_codec: Codec[FromAnswerer] = Codec(FromAnswerer, max_bytes=MESSAGE_BYTES_MAX)

NOT_A_MEMBER = "not_a_member"
OTHER_SWARM = "other_swarm"
FULL = "full"
BUSY = "busy"
TROUBLE = "trouble"
NO_QUORUM = "no_quorum"

_PROBLEMS: dict[str, tuple[type[NotAdmitted] | type[PeerUnreachable], str]] = {
    NOT_A_MEMBER: (NotAdmitted, "this node has not proved that it is a member"),
    OTHER_SWARM: (NotAdmitted, "it belongs to another swarm"),
    FULL: (PeerUnreachable, "it has as many connections as it takes"),
    BUSY: (PeerUnreachable, "it has refused too many tickets lately; try again in a minute"),
    NO_QUORUM: (
        PeerUnreachable,
        "its cluster cannot agree on a new member now; see `omx cluster status` there",
    ),
    TROUBLE: (PeerUnreachable, "it cannot save that the ticket was used; see the log there"),
}


def refusal_of(error: BadTicket) -> Refused:
    """How a ticket's refusal travels."""
    match error:
        case TicketExpired():
            moment = datetime.fromisoformat(error.expired_at)
            return Refused(reason="ticket_expired", expires_at=int(moment.timestamp()))
        case TicketUsedUp():
            return Refused(reason="ticket_used_up", uses=error.uses)
        case _:
            return Refused(reason="ticket_unknown")


def error_of(refused: Refused, peer: PeerId) -> OmxError:
    """What a peer's refusal is to the one who asked."""
    match refused.reason:
        case "ticket_expired":
            return TicketExpired(iso_time(refused.expires_at))
        case "ticket_used_up":
            return TicketUsedUp(refused.uses)
        case "ticket_unknown":
            return TicketUnknown()
    kind, problem = _PROBLEMS.get(refused.reason, (NotAdmitted, f"reason {refused.reason!a}"))
    return kind(peer, problem)

"""What a member asks of the leader and the log has no place for (`/omx/cluster/1`)."""

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from ollamamax_p2p.wire import Codec, Message

REPLICA_LINES_MAX = 10_000
"""As many members as there may be; each takes 30 bytes."""

RaftId = Annotated[int, Meta(ge=1, le=2**62)]


class TransferLeader(Message, tag="transfer_leader", frozen=True):
    """To the leader: let this member lead."""

    raft_id: RaftId


class Transferred(Message, tag="transferred", frozen=True):
    """Somebody else leads now."""


class LookAtReplicas(Message, tag="look_at_replicas", frozen=True):
    """To the leader: how far are the others?"""


class ReplicaLine(msgspec.Struct, array_like=True, frozen=True):
    """What a leader knows of one replica."""

    raft_id: RaftId
    lag: Annotated[int, Meta(ge=0, le=2**62)]
    state: Annotated[str, Meta(max_length=16)]
    last_contact_s: Annotated[float, Meta(ge=0, le=1e9)] | None


class Replicas(Message, tag="replicas", frozen=True):
    """So far, as the leader knows."""

    lines: Annotated[tuple[ReplicaLine, ...], Meta(max_length=REPLICA_LINES_MAX)]


AnyRequest: TypeAlias = TransferLeader | LookAtReplicas
AnyAnswer: TypeAlias = Transferred | Replicas

requests_codec: Codec[AnyRequest] = Codec(AnyRequest, max_bytes=1024)
answers_codec: Codec[AnyAnswer] = Codec(AnyAnswer, max_bytes=512 * 1024)

"""What a node did, as events that etcd's TLA+ specification of Raft can be checked against.

One event is one line of JSON. Names, fields and the moments they are written at are those of etcd's
state trace, so that its trace validation takes ours.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from ollamamax_p2p.consensus.core.messages import (
    ConfChangeType,
    ConfChangeV2,
    Message,
    MessageType,
)
from ollamamax_p2p.consensus.core.names import MESSAGE_NAMES

_MESSAGE_EVENTS = {
    MessageType.APP: "AppendEntriesRequest",
    MessageType.HEARTBEAT: "AppendEntriesRequest",
    MessageType.SNAP: "AppendEntriesRequest",
    MessageType.APP_RESP: "AppendEntriesResponse",
    MessageType.HEARTBEAT_RESP: "AppendEntriesResponse",
    MessageType.VOTE: "RequestVoteRequest",
    MessageType.VOTE_RESP: "RequestVoteResponse",
}
# A snapshot counts as an append of everything before it, which is how the specification sees it.

EVENT_NAMES = frozenset(
    {
        "InitState",
        "BecomeCandidate",
        "BecomeFollower",
        "BecomeLeader",
        "Commit",
        "Replicate",
        "ChangeConf",
        "ApplyConfChange",
        "Ready",
        "SendSnapshot",  # Named by the specification, never written: see _MESSAGE_EVENTS.
        "ReceiveSnapshot",
        *(did + event for did in ("Send", "Receive") for event in _MESSAGE_EVENTS.values()),
    }
)

_ACTIONS = {
    ConfChangeType.ADD_NODE: "AddNewServer",
    ConfChangeType.REMOVE_NODE: "RemoveServer",
    ConfChangeType.ADD_LEARNER_NODE: "AddLearner",
}


class TraceState(msgspec.Struct, frozen=True):
    """The hard state at the event."""

    term: int
    vote: str
    commit: int


class TraceMessage(msgspec.Struct, frozen=True, rename="camel"):
    """A message that was sent or received."""

    type: str
    term: int
    from_: str = msgspec.field(name="from")
    to: str
    entries: int
    log_term: int
    index: int
    commit: int
    vote: str
    reject: bool
    reject_hint: int


class TraceEvent(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One event. Ids are decimal text, as the specification wants them."""

    name: str
    """One of EVENT_NAMES."""
    nid: str
    state: TraceState
    role: str
    log: int
    """The last index."""
    conf: tuple[tuple[str, ...], tuple[str, ...]]
    """Voters, incoming and outgoing."""
    msg: TraceMessage | None = None
    prop: dict[str, Any] = msgspec.field(default_factory=dict)


TraceSink = Callable[[TraceEvent], None]


def to_ndjson(event: TraceEvent) -> bytes:
    """One line, with its end."""
    return msgspec.json.encode(event) + b"\n"


def message_event(did: str, message: Message) -> str | None:
    """The event's name for a message that a node did `Send` or `Receive`; None: not traced."""
    event = _MESSAGE_EVENTS.get(message.type)
    return did + event if event else None


def trace_message(message: Message) -> TraceMessage:
    """A message as it is traced."""
    entries, index, log_term = len(message.entries), message.index, message.log_term
    if message.snapshot is not None:
        entries, index, log_term = message.snapshot.metadata.index, 0, 0
    return TraceMessage(
        type=MESSAGE_NAMES[message.type],
        term=message.term,
        from_=str(message.from_),
        to=str(message.to),
        entries=entries,
        log_term=log_term,
        index=index,
        commit=message.commit,
        vote=str(message.vote),
        reject=message.reject,
        reject_hint=message.reject_hint,
    )


def trace_changes(change: ConfChangeV2) -> dict[str, Any]:
    """`prop` of a ChangeConf; empty if nothing in it concerns the specification."""
    changes = [
        {"nid": str(each.node_id), "action": _ACTIONS[each.type]}
        for each in change.changes
        if each.type in _ACTIONS
    ]
    return {"cc": {"changes": changes}} if changes else {}

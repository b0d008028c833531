"""What Raft says and remembers: entries, states, messages. Names are those of
etcd's raft, which are the field's.

Raft ids are positive integers (64 bits); 0 is nobody. An id names one life of one node: it is never
used again after its removal. Peer ids are mapped to them above.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import msgspec

NOBODY = 0
"""No node: no leader known, no vote given."""

LOCAL_APPEND_THREAD = 2**64 - 1
"""Where a STORAGE_APPEND goes: this node's own log writer."""

LOCAL_APPLY_THREAD = 2**64 - 2
"""Where a STORAGE_APPLY goes: this node's own state machine."""


class EntryType(IntEnum):
    """What an entry's data is."""

    NORMAL = 0
    CONF_CHANGE = 1
    CONF_CHANGE_V2 = 2


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of the log."""

    term: int
    index: int
    """1 for the first entry ever."""
    type: EntryType = EntryType.NORMAL
    data: bytes = b""
    """A leader's first entry of its term has none."""


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """What must be durable before any message that depends on it leaves."""

    term: int = 0
    vote: int = NOBODY
    commit: int = 0


class StateRole(IntEnum):
    """What a node does now."""

    FOLLOWER = 0
    CANDIDATE = 1
    LEADER = 2
    PRE_CANDIDATE = 3


class SoftState(msgspec.Struct, frozen=True):
    """What need not be remembered."""

    leader: int = NOBODY
    role: StateRole = StateRole.FOLLOWER


class ConfState(msgspec.Struct, frozen=True, array_like=True):
    """A configuration as it is written to snapshots; each tuple ascending.

    `voters_outgoing` is not empty while a joint configuration is in force.
    """

    voters: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    voters_outgoing: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()
    """Voters of the outgoing half that become learners when the joint configuration is left."""
    auto_leave: bool = False


class SnapshotMetadata(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot stands for: everything up to and with `index`. Index 0: no snapshot."""

    index: int = 0
    term: int = 0
    conf_state: ConfState = ConfState()


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot in a message.

    `data` is whatever the storage gave, opaque here: our storages give a short handle, and the
    bytes of the state travel on a stream of their own.
    """

    metadata: SnapshotMetadata = SnapshotMetadata()
    data: bytes = b""


class MessageType(IntEnum):
    """What a message is. The numbers are on the wire; they are etcd's."""

    HUP = 0
    BEAT = 1
    PROP = 2
    APP = 3
    APP_RESP = 4
    VOTE = 5
    VOTE_RESP = 6
    SNAP = 7
    HEARTBEAT = 8
    HEARTBEAT_RESP = 9
    UNREACHABLE = 10
    SNAP_STATUS = 11
    CHECK_QUORUM = 12
    TRANSFER_LEADER = 13
    TIMEOUT_NOW = 14
    READ_INDEX = 15
    READ_INDEX_RESP = 16
    PRE_VOTE = 17
    PRE_VOTE_RESP = 18
    STORAGE_APPEND = 19
    STORAGE_APPEND_RESP = 20
    STORAGE_APPLY = 21
    STORAGE_APPLY_RESP = 22
    FORGET_LEADER = 23


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message between nodes, or between a node and its own storage."""

    type: MessageType
    to: int = NOBODY
    from_: int = msgspec.field(default=NOBODY, name="from")
    term: int = 0
    log_term: int = 0
    index: int = 0
    entries: tuple[Entry, ...] = ()
    commit: int = 0
    vote: int = NOBODY
    """Of a STORAGE_APPEND: with term and commit, the HardState to make durable (all 0: none)."""
    snapshot: Snapshot | None = None
    reject: bool = False
    reject_hint: int = 0
    context: bytes = b""
    responses: tuple["Message", ...] = ()
    """Of a STORAGE_APPEND or STORAGE_APPLY: what to send once it is done, some of it to itself."""


class ReadState(msgspec.Struct, frozen=True):
    """The answer to one `read_index`: the read may be served once `index` is applied."""

    index: int
    request_ctx: bytes


class ConfChangeType(IntEnum):
    """What one change does to one node."""

    ADD_NODE = 0
    """Make it a voter."""
    REMOVE_NODE = 1
    UPDATE_NODE = 2
    """Nothing; it carries context."""
    ADD_LEARNER_NODE = 3
    """Make it a learner, also if it was a voter."""


class ConfChangeTransition(IntEnum):
    """How a change of several nodes is carried out."""

    AUTO = 0
    """The simple protocol if one voter changes, else joint, left by itself."""
    JOINT_IMPLICIT = 1
    """Joint, left by itself."""
    JOINT_EXPLICIT = 2
    """Joint, left by proposing an empty ConfChangeV2."""


class ConfChangeSingle(msgspec.Struct, frozen=True, array_like=True):
    """One node's part of a change."""

    type: ConfChangeType
    node_id: int


class ConfChange(msgspec.Struct, frozen=True, array_like=True):
    """A change of one node, the old form (EntryType.CONF_CHANGE)."""

    type: ConfChangeType
    node_id: int
    context: bytes = b""


class ConfChangeV2(msgspec.Struct, frozen=True, array_like=True):
    """A change of any number of nodes (EntryType.CONF_CHANGE_V2). Without changes: leave the joint
    configuration.
    """

    transition: ConfChangeTransition = ConfChangeTransition.AUTO
    changes: tuple[ConfChangeSingle, ...] = ()
    context: bytes = b""


NO_LIMIT = 2**63
"""Of bytes."""


ENTRY_OVERHEAD_BYTES_MAX = 5 + 3 * 10
"""The most that `entry_size` adds to an entry's data: three numbers of at most ten bytes."""


def entry_size(entry: Entry) -> int:
    """How many bytes an entry counts for where bytes are limited: what etcd's encoding of it takes,
    so that limits mean the same in both.
    """
    return _header_size(entry) + _data_size(len(entry.data))


def _header_size(entry: Entry) -> int:
    return 4 + _varint_size(entry.term) + _varint_size(entry.index)


def _data_size(length: int) -> int:
    return 1 + (length.bit_length() + 6) // 7 + length if length else 0


def _varint_size(number: int) -> int:
    return (number.bit_length() + 6) // 7 or 1


def limited(entries: list[Entry], max_bytes: int) -> list[Entry]:
    """As many from the front as fit, at least one if there is one."""
    if payload_size(entries) + len(entries) * ENTRY_OVERHEAD_BYTES_MAX <= max_bytes:
        return entries
    total = 0
    for count, entry in enumerate(entries):
        total += entry_size(entry)
        if total > max_bytes and count:
            return entries[:count]
    return entries


def total_size(entries: Sequence[Entry]) -> int:
    """Bytes of all of them, a piece of a log."""
    if not entries:
        return 0
    data = sum([_data_size(len(entry.data)) for entry in entries])
    header = _header_size(entries[0])
    if header == _header_size(entries[-1]):
        # Terms and indexes only grow along a log, so those between take as many bytes.
        return data + len(entries) * header
    return data + sum(map(_header_size, entries))


def payload_size(entries: Iterable[Entry]) -> int:
    """Bytes of their data alone."""
    return sum([len(entry.data) for entry in entries])

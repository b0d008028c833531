"""Raft's messages as bytes, sans-IO. docs/protocols/raft-streams.md is the specification.

A stream begins with a hello each way, which agrees on a version. After that each frame is a batch:
a MessagePack array of messages, each a map whose keys are the fields of `Message`, those with their
default left out. A message is encoded once, when it is queued; a frame is the array's header and
the messages behind each other.

Decoding trusts nothing. What is not such a batch raises MalformedMessage, and its stream ends.
What is one, but holds a message that no replica sends another (a local type, a field that its type
does not have, entries with gaps), is given without that message: Raft loses messages anyway, and
its core need not ask about each whether a peer may have invented it.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPLY_THREAD,
    ConfState,
    Entry,
    Message,
    MessageType,
    Snapshot,
)
from ollamamax_p2p.errors import MalformedMessage

KiB = 1024
MiB = 1024 * 1024

VERSION_MIN = 1
VERSION_MAX = 1
"""What this library speaks. A new message type or field needs no new version: who does not know it
leaves it out. A new type of entry does, because a log can't leave entries out.
"""

FRAME_BYTES_MAX = 4 * MiB
"""The longest frame that is accepted: what one peer can make us hold."""

FRAME_BYTES_FULL = 256 * KiB
"""A frame that has reached this takes no further message, so that a heartbeat waits for no more
than this and the message it came behind. It is yamux's window in py-libp2p 0.8.1.
"""

HELLO_BYTES_MAX = 4 * KiB

MESSAGES_MAX = 8192
"""In one frame, whose shortest useful message takes 30 bytes."""

ENTRIES_MAX = 256 * KiB
"""In one message; an entry takes five bytes at least, so half the frames could hold more."""

NUMBER_MAX = 2**63 - 1
"""Of terms and indexes: what SQLite and most languages count to. One more per nanosecond lasts 292
years.
"""

_Name = Annotated[str, Meta(max_length=32)]
_Version = Annotated[int, Meta(ge=1, le=65535)]
_Number = Annotated[int, Meta(ge=0, le=NUMBER_MAX)]


class Hello(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first frame each way."""

    lowest: _Version
    highest: _Version
    """The versions that it speaks, all between them too."""
    features: Annotated[tuple[_Name, ...], Meta(max_length=64)] = ()
    """What it can beyond its version; names that are not known mean nothing. None are used yet."""


OUR_HELLO = Hello(lowest=VERSION_MIN, highest=VERSION_MAX)


class _Received(msgspec.Struct, frozen=True, kw_only=True):
    """`Message` as it may arrive. Ids are compared with known ones and need no bounds."""

    type: _Number
    to: int = 0
    from_: int = msgspec.field(default=0, name="from")
    term: _Number = 0
    log_term: _Number = 0
    index: _Number = 0
    entries: Annotated[tuple[Entry, ...], Meta(max_length=ENTRIES_MAX)] = ()
    commit: _Number = 0
    vote: int = 0
    snapshot: Snapshot | None = None
    reject: bool = False
    reject_hint: _Number = 0
    context: bytes = b""
    responses: msgspec.Raw = msgspec.Raw()


class _OnlyType(msgspec.Struct, frozen=True):
    type: _Number


# msgspec's lists grow as their elements are read, so a hostile length costs nothing beyond the
# bytes that came with it; a struct and what it declares is all that is built, unknown fields are
# skipped, and nesting ends in a RecursionError. tests/consensus/test_raft_frames.py checks all of
# it. So these frames do without the two steps of `wire.Codec`, which cost 2.5 times as much: 0.19
# instead of 0.07 us for an entry of 256 bytes.
_batches = msgspec.msgpack.Decoder(Annotated[list[_Received], Meta(max_length=MESSAGES_MAX)])
_unread_batches = msgspec.msgpack.Decoder(
    Annotated[list[msgspec.Raw], Meta(max_length=MESSAGES_MAX)]
)
_types = msgspec.msgpack.Decoder(_OnlyType)
_singles = msgspec.msgpack.Decoder(_Received)
_hellos = msgspec.msgpack.Decoder(Hello)
_encoder = msgspec.msgpack.Encoder()

_NOT_OURS = (ValueError, RecursionError)
# msgspec's own errors are ValueErrors, UnicodeDecodeError too.

_BETWEEN_NODES = frozenset(
    {
        MessageType.PROP,
        MessageType.APP,
        MessageType.APP_RESP,
        MessageType.VOTE,
        MessageType.VOTE_RESP,
        MessageType.SNAP,
        MessageType.HEARTBEAT,
        MessageType.HEARTBEAT_RESP,
        MessageType.TRANSFER_LEADER,
        MessageType.TIMEOUT_NOW,
        MessageType.READ_INDEX,
        MessageType.READ_INDEX_RESP,
        MessageType.PRE_VOTE,
        MessageType.PRE_VOTE_RESP,
    }
)
_WITHOUT_TERM = frozenset({MessageType.PROP, MessageType.READ_INDEX})
# Forwarded to the leader of whatever term. To the core any other message without term is local.

_WITH_ONE_ENTRY = frozenset({MessageType.READ_INDEX, MessageType.READ_INDEX_RESP})
_WITH_ENTRIES = frozenset({MessageType.APP, MessageType.PROP}) | _WITH_ONE_ENTRY
_BULKY = frozenset({MessageType.APP, MessageType.PROP, MessageType.SNAP})


def encode_hello(hello: Hello = OUR_HELLO) -> bytes:
    """A hello's payload."""
    return _encoder.encode(hello)


def decode_hello(payload: bytes) -> Hello:
    """Raises MalformedMessage."""
    if len(payload) > HELLO_BYTES_MAX:
        raise MalformedMessage("", f"a hello of {len(payload)} bytes")
    try:
        hello = _hellos.decode(payload)
    except _NOT_OURS as error:
        raise MalformedMessage("", f"not a hello: {error}") from None
    if hello.lowest > hello.highest:
        raise MalformedMessage("", f"a hello of versions {hello.lowest} to {hello.highest}")
    return hello


def common_version(ours: Hello, theirs: Hello) -> int | None:
    """The newest version that both speak."""
    version = min(ours.highest, theirs.highest)
    return version if version >= max(ours.lowest, theirs.lowest) else None


def is_bulky(message: Message) -> bool:
    """Whether it may be long, so that others go before it. Those that are keep their order."""
    return message.type in _BULKY


def is_between_nodes(message: Message) -> bool:
    """Whether its type travels at all; the others stay in their node."""
    return message.type in _BETWEEN_NODES


def encode_message(message: Message) -> bytes:
    """One message, for `batch`."""
    return _encoder.encode(message)


def batch(messages: Sequence[bytes]) -> bytes:
    """A frame's payload: messages that are encoded already, MESSAGES_MAX of them at most."""
    count = len(messages)
    header = bytes([0x90 | count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return b"".join((header, *messages))


class Batch(msgspec.Struct, frozen=True):
    """What came in one frame."""

    messages: list[Message]
    unknown: int
    """Messages of types that this version does not know: a newer peer's."""
    refused: int
    """Messages that no replica sends another."""
    problem: str
    """What was wrong with the first of those; "" if there are none."""


def decode_batch(payload: bytes) -> Batch:
    """Raises MalformedMessage. Who sent it is checked by `is_from`."""
    received, unknown = _read(payload)
    messages: list[Message] = []
    problems: list[str] = []
    for each in received:
        problem = _problem(each)
        if problem:
            problems.append(problem)
        else:
            messages.append(_as_message(each))
    return Batch(messages, unknown, len(problems), problems[0] if problems else "")


def is_from(message: Message, sender: int) -> bool:
    """Whether the authenticated sender may say this in its own name.

    Raft's core writes the transferee into `from` of a TRANSFER_LEADER that a follower forwards to
    the leader; any member may ask for a transfer to any other.
    """
    return message.from_ == sender or message.type is MessageType.TRANSFER_LEADER


def _read(payload: bytes) -> tuple[Iterable[_Received], int]:
    """The messages of known types, and how many others there are."""
    try:
        received = _batches.decode(payload)
        if all(each.type in _KNOWN for each in received):
            return received, 0
    except _NOT_OURS:
        pass  # a type that is not known may have fields of other shapes
    try:
        raw = _unread_batches.decode(payload)
        known = [each for each in raw if _types.decode(each).type in _KNOWN]
        return [_singles.decode(each) for each in known], len(raw) - len(known)
    except _NOT_OURS as error:
        raise MalformedMessage("", f"not a batch of Raft messages: {error}") from None


_KNOWN = frozenset(int(each) for each in MessageType)


def _as_message(received: _Received) -> Message:
    return Message(
        type=MessageType(received.type),
        to=received.to,
        from_=received.from_,
        term=received.term,
        log_term=received.log_term,
        index=received.index,
        entries=received.entries,
        commit=received.commit,
        snapshot=received.snapshot,
        reject=received.reject,
        reject_hint=received.reject_hint,
        context=received.context,
    )


# -- what no replica sends another -------------------------------------------------------------


def _problem(received: _Received) -> str:
    """Why the core must not see it; "" if it may."""
    kind = MessageType(received.type)
    if kind not in _BETWEEN_NODES:
        return f"a {kind.name}, which stays within a node"
    if bytes(received.responses) or received.vote:
        return f"a {kind.name} with what belongs to a node's own storage"
    if (received.term == 0) != (kind in _WITHOUT_TERM):
        return f"a {kind.name} of term {received.term}"
    if (received.snapshot is not None) != (kind is MessageType.SNAP):
        return f"a {kind.name} {'without' if kind is MessageType.SNAP else 'with'} a snapshot"
    if received.snapshot is not None and not _is_whole(received.snapshot, received.term):
        return "a SNAP whose metadata cannot be"
    return _problem_of_entries(kind, received)


def _problem_of_entries(kind: MessageType, received: _Received) -> str:
    count = len(received.entries)
    if kind is MessageType.APP:
        return "" if _follows(received) else "an APP whose entries do not follow each other"
    if count and kind not in _WITH_ENTRIES:
        return f"a {kind.name} with entries"
    if (kind in _WITH_ONE_ENTRY and count != 1) or (kind is MessageType.PROP and not count):
        return f"a {kind.name} with {count} entries"
    if any(entry.term or entry.index for entry in received.entries):
        return f"a {kind.name} with an entry that has a place in the log"
    return ""


def _follows(received: _Received) -> bool:
    """Whether the entries are a piece of a log that a leader of that term can have."""
    index, term = received.index, received.log_term
    for entry in received.entries:
        index += 1
        if entry.index != index or entry.term < term:
            return False
        term = entry.term
    return term <= received.term and index <= NUMBER_MAX


def _is_whole(snapshot: Snapshot, term: int) -> bool:
    metadata = snapshot.metadata
    return (
        0 < metadata.index <= NUMBER_MAX
        and 0 < metadata.term <= term
        and is_configuration(metadata.conf_state)
    )


def is_configuration(conf_state: ConfState) -> bool:
    """Whether it has a voter, and each id can be a node's."""
    halves: Any = (
        conf_state.voters,
        conf_state.learners,
        conf_state.voters_outgoing,
        conf_state.learners_next,
    )
    ids = [each for half in halves for each in half]
    return bool(conf_state.voters) and all(0 < each < LOCAL_APPLY_THREAD for each in ids)

"""Raft's wire format: what one side writes the other reads, and nothing else passes."""

import os
import random
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.consensus.core import raft_frames
from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    Entry,
    EntryType,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.core.raft_frames import (
    ENTRIES_MAX,
    FRAME_BYTES_MAX,
    MESSAGES_MAX,
    NUMBER_MAX,
    Hello,
    batch,
    common_version,
    decode_batch,
    decode_hello,
    encode_hello,
    encode_message,
    is_between_nodes,
    is_bulky,
    is_configuration,
    is_from,
)
from ollamamax_p2p.errors import MalformedMessage

FUZZED_FRAMES = int(os.environ.get("TESTS_FUZZED_FRAMES", "20000"))
"""A soak sets 1,000,000."""

VOTERS = ConfState(voters=(1, 2, 3))
SNAPSHOT = Snapshot(metadata=SnapshotMetadata(index=9, term=2, conf_state=VOTERS), data=b"handle")


def app(count: int = 2, **changes) -> Message:
    entries = tuple(Entry(term=3, index=8 + i, data=b"x" * i) for i in range(count))
    fields = {"to": 1, "from_": 2, "term": 3, "log_term": 2, "index": 7, "entries": entries}
    return Message(type=MessageType.APP, **{**fields, **changes})


def of(kind: MessageType, **fields) -> Message:
    return Message(type=kind, to=1, from_=2, **{"term": 3, **fields})


def frame(*messages: object) -> bytes:
    return batch([msgspec.msgpack.encode(each) for each in messages])


GOOD = [
    app(),
    app(0),
    of(MessageType.PROP, term=0, entries=(Entry(0, 0, EntryType.CONF_CHANGE_V2, b"change"),)),
    of(MessageType.APP_RESP, index=9, reject=True, reject_hint=4, log_term=1),
    of(MessageType.VOTE, index=9, log_term=2, context=b"transfer"),
    of(MessageType.VOTE_RESP, reject=True),
    of(MessageType.PRE_VOTE, index=9, log_term=2),
    of(MessageType.PRE_VOTE_RESP),
    of(MessageType.SNAP, snapshot=SNAPSHOT),
    of(MessageType.HEARTBEAT, commit=9, context=b"read 7"),
    of(MessageType.HEARTBEAT_RESP, context=b"read 7"),
    of(MessageType.TRANSFER_LEADER),
    of(MessageType.TIMEOUT_NOW),
    of(MessageType.READ_INDEX, term=0, entries=(Entry(0, 0, data=b"read 8"),)),
    of(MessageType.READ_INDEX_RESP, index=4, entries=(Entry(0, 0, data=b"read 8"),)),
]


def test_every_message_between_nodes_arrives_as_it_was_sent() -> None:
    found = decode_batch(batch([encode_message(each) for each in GOOD]))
    assert found.messages == GOOD
    assert (found.unknown, found.refused, found.problem) == (0, 0, "")
    assert {each.type for each in GOOD} == {
        kind for kind in MessageType if is_between_nodes(Message(type=kind))
    }


@pytest.mark.parametrize("count", [0, 1, 15, 16, 300, MESSAGES_MAX])
def test_a_batch_of_any_size_is_read_back(count: int) -> None:
    heartbeat = encode_message(of(MessageType.HEARTBEAT))
    assert len(decode_batch(batch([heartbeat] * count)).messages) == count


numbers = st.integers(min_value=1, max_value=NUMBER_MAX)


@given(
    kind=st.sampled_from([MessageType.HEARTBEAT, MessageType.APP_RESP, MessageType.VOTE]),
    fields=st.fixed_dictionaries(
        {
            **dict.fromkeys(("to", "from_"), st.integers(0, 2**64 - 1)),
            **dict.fromkeys(("term", "log_term", "index", "commit", "reject_hint"), numbers),
            "reject": st.booleans(),
            "context": st.binary(max_size=40),
        }
    ),
)
def test_any_numbers_survive_the_way(kind, fields) -> None:
    message = Message(type=kind, **fields)
    assert decode_batch(frame(message)).messages == [message]


def test_no_field_of_a_message_is_forgotten() -> None:
    received = {each.encode_name for each in msgspec.structs.fields(raft_frames._Received)}
    assert received == {each.encode_name for each in msgspec.structs.fields(Message)}


SMUGGLED = {
    "a local type": of(MessageType.HUP),
    "forget leader": of(MessageType.FORGET_LEADER),
    "a storage answer": of(MessageType.STORAGE_APPEND_RESP),
    "nested responses": of(MessageType.APP_RESP, responses=(of(MessageType.HUP),)),
    "a hard state": of(MessageType.APP_RESP, vote=2),
    "no term": of(MessageType.HEARTBEAT, term=0),
    "a proposal with a term": of(MessageType.PROP, entries=(Entry(0, 0),)),
    "an empty proposal": of(MessageType.PROP, term=0),
    "a proposal with a place": of(MessageType.PROP, term=0, entries=(Entry(1, 1),)),
    "a read without context": of(MessageType.READ_INDEX, term=0),
    "a read with two": of(MessageType.READ_INDEX, term=0, entries=(Entry(0, 0),) * 2),
    "a vote with entries": of(MessageType.VOTE, entries=(Entry(1, 1),)),
    "a snapshot without one": of(MessageType.SNAP),
    "a heartbeat with one": of(MessageType.HEARTBEAT, snapshot=SNAPSHOT),
    "a snapshot of nothing": of(MessageType.SNAP, snapshot=Snapshot()),
    "a snapshot without voters": of(
        MessageType.SNAP, snapshot=Snapshot(metadata=SnapshotMetadata(index=9, term=2))
    ),
    "a snapshot of the future": of(MessageType.SNAP, term=1, snapshot=SNAPSHOT),
    "a gap": app(entries=(Entry(3, 8), Entry(3, 10))),
    "a gap before": app(entries=(Entry(3, 9),)),
    "terms that fall": app(entries=(Entry(3, 8), Entry(2, 9))),
    "an entry of the future": app(entries=(Entry(4, 8),)),
    "a log of the future": app(0, log_term=4),
    "an index too far": app(index=NUMBER_MAX, entries=(Entry(3, NUMBER_MAX + 1),)),
}


@pytest.mark.parametrize("message", SMUGGLED.values(), ids=SMUGGLED.keys())
def test_what_no_replica_sends_another_is_left_out(message: Message) -> None:
    heartbeat = of(MessageType.HEARTBEAT)
    found = decode_batch(frame(heartbeat, message, message))
    assert found.messages == [heartbeat]
    assert found.refused == 2
    assert found.problem


def test_a_newer_peers_message_is_left_out_and_its_fields_are_ignored() -> None:
    newer = {"type": 40, "to": "a string where we have a number", "entries": {"a": 1}}
    extended = {**msgspec.to_builtins(of(MessageType.HEARTBEAT)), "priority": [1, {"a": b""}]}
    found = decode_batch(frame(extended, newer, {"type": 24}))
    assert found.messages == [of(MessageType.HEARTBEAT)]
    assert (found.unknown, found.refused) == (2, 0)
    assert decode_batch(frame({"type": 24})).unknown == 1


MALFORMED = {
    "nothing": b"",
    "no array": b"\x80",
    "not MessagePack": b"\xc1",
    "more behind it": frame(of(MessageType.VOTE)) + b"\x00",
    "cut": frame(app())[:-1],
    "no type": b"\x91\x80",
    "a type below 0": frame({"type": -1}),
    "a term below 0": frame({"type": 8, "term": -1}),
    "a term beyond 63 bits": frame({"type": 8, "term": 2**63}),
    "text for a number": frame({"type": 8, "term": "3"}),
    "an unknown entry type": frame({"type": 3, "term": 3, "entries": [[3, 1, 9, b""]]}),
    "too many messages": b"\xdd\xff\xff\xff\xff",
    "too many entries": b"\x91\x82\xa4type\x03\xa7entries\xdd\xff\xff\xff\xff",
    "an entry that claims much": b"\x91\x82\xa4type\x03\xa7entries\x91\xdd\xff\xff\xff\xff\x01",
    "bytes that claim much": b"\x91\x82\xa4type\x08\xa7context\xc6\xff\xff\xff\xff\x01",
    "text that claims much": b"\x91\x82\xa4type\x08\xdb\xff\xff\xff\xffa",
    "a map that claims much": b"\x91\xdf\xff\xff\xff\xff\xa4type\x08",
    "much of an unknown field": b"\x91\x82\xa4type\x08\xa1x\xdd\xff\xff\xff\xff\x01",
    "deep": b"\x91\x82\xa4type\x08\xa1x" + b"\x91" * 100_000,
    "deep responses": b"\x91\x82\xa4type\x08\xa9responses" + b"\x91" * 100_000,
    "deep voters": b"\x91\x82\xa4type\x07\xa8snapshot" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_batch_is_refused_at_no_more_than_its_own_size(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            decode_batch(payload)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 4 * len(payload)
    finally:
        tracemalloc.stop()


def test_a_frame_full_of_the_smallest_entries_stays_small() -> None:
    entries = b"\xce" + ENTRIES_MAX.to_bytes(4, "big")
    payload = b"\x91\x82\xa4type\x03\xa7entries\xdd" + entries[1:] + b"\x92\x01\x01" * ENTRIES_MAX
    assert len(payload) < FRAME_BYTES_MAX
    tracemalloc.start()
    try:
        assert decode_batch(payload).refused == 1
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_twenty_thousand_hostile_frames_are_read_or_refused(rng: random.Random) -> None:
    good = [frame(each) for each in GOOD] + [frame(*GOOD)]
    tracemalloc.start()
    try:
        for _ in range(FUZZED_FRAMES):
            try:
                found = decode_batch(mutated(rng, rng.choice(good)))
            except MalformedMessage:
                continue
            assert all(is_between_nodes(each) and not each.responses for each in found.messages)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()


def mutated(rng: random.Random, payload: bytes) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    data = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = rng.choice(
                    (b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xcf" + b"\xff" * 8)
                )
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case _:
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    for decode in (decode_batch, decode_hello):
        try:
            decode(payload)
        except MalformedMessage:
            continue


# -- hello -------------------------------------------------------------------------------------


def test_a_hello_with_unknown_fields_and_features_is_understood() -> None:
    newer = {"lowest": 1, "highest": 7, "features": ["compression"], "region": "moon"}
    hello = decode_hello(msgspec.msgpack.encode(newer))
    assert (hello.lowest, hello.highest, hello.features) == (1, 7, ("compression",))
    assert decode_hello(encode_hello()) == raft_frames.OUR_HELLO


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80",
        encode_hello(Hello(lowest=3, highest=2)),
        msgspec.msgpack.encode({"lowest": 0, "highest": 1}),
        msgspec.msgpack.encode({"lowest": 1, "highest": 1, "features": ["x" * 33]}),
        msgspec.msgpack.encode({"lowest": 1, "highest": 1, "x": "y" * 5000}),
        b"\x83\xa6lowest\x01\xa7highest\x01\xa1x" + b"\x91" * 4000,
    ],
)
def test_a_hello_that_cannot_be_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_hello(payload)


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [((1, 1), (1, 1), 1), ((1, 2), (1, 1), 1), ((2, 3), (1, 2), 2), ((3, 4), (1, 2), None)],
)
def test_the_newest_common_version_is_spoken(ours, theirs, common) -> None:
    one, other = (Hello(lowest=low, highest=high) for low, high in (ours, theirs))
    assert common_version(one, other) == common_version(other, one) == common


# -- small questions ---------------------------------------------------------------------------


def test_only_who_sends_a_transfer_may_name_another() -> None:
    assert is_from(of(MessageType.HEARTBEAT), 2)
    assert not is_from(of(MessageType.HEARTBEAT), 3)
    assert is_from(of(MessageType.TRANSFER_LEADER), 3)


def test_what_carries_entries_or_a_snapshot_is_bulky() -> None:
    bulky = {kind for kind in MessageType if is_bulky(Message(type=kind))}
    assert bulky == {MessageType.APP, MessageType.PROP, MessageType.SNAP}


def test_a_configuration_names_nodes() -> None:
    assert is_configuration(VOTERS)
    assert not is_configuration(ConfState())
    assert not is_configuration(ConfState(voters=(0,)))
    assert not is_configuration(ConfState(voters=(1,), learners=(2**64 - 1,)))

"""Frames of a member that is hostile, and of strangers, all the way into a node that runs.

Raft trusts its members: one of them can always claim to lead. What it must not be able to do is to
break the node, to fill its memory, or to move a number so far that no honest member can follow.
"""

import gc
import random
import tracemalloc
from contextlib import suppress

import pytest
import trio

from ollamamax_p2p.consensus.core.drive import Drive, merged_writes
from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    payload_size,
)
from ollamamax_p2p.consensus.core.raft_frames import (
    FRAME_BYTES_MAX,
    NUMBER_MAX,
    batch,
    decode_batch,
    encode_hello,
    encode_message,
    is_from,
)
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.replica import bootstrap_log
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.stream_transport import open_stream_transport
from ollamamax_p2p.errors import MalformedMessage, PeerGone
from ollamamax_p2p.host import open_simulated_network
from ollamamax_p2p.wire import encode_frame, protocol_ids
from tests.consensus.test_raft_frames import FUZZED_FRAMES, mutated

T = MessageType
VICTIM, HOSTILE, HONEST = 1, 2, 3
EXTREMES = (0, 1, 2, 5, 7, 2**31, 2**33, 2**53, NUMBER_MAX - 1, NUMBER_MAX)


class Victim:
    """A member by hand: its log in RAM, its messages thrown away."""

    def __init__(self, *, leads: bool) -> None:
        self.log = RamLog()
        bootstrap_log(self.log, [VICTIM, HOSTILE, HONEST])
        self.applied = 0
        self.drive = Drive(
            VICTIM,
            self.log,
            applied=0,
            conf_state=ConfState(),
            settings=ConsensusSettings(max_uncommitted_bytes=100_000),
            rng=random.Random(1),
        )
        self.work()
        if leads:
            self.lead()
        else:
            self.hear(Message(type=T.HEARTBEAT, to=VICTIM, from_=HONEST, term=2, commit=3))

    def hear(self, message: Message) -> None:
        self.drive.step(message)
        self.work()

    def work(self) -> None:
        """Do what is to be done, as the replica does; snapshots can't be fetched."""
        for _ in range(50):
            work = self.drive.take_work()
            if not (work.appends or work.applies or work.fetches):
                return
            for write in merged_writes(work.appends, HardState()):
                self.log.append(write.entries, write.hard_state)
                for message in write.messages:
                    self.drive.appended(message)
            for each in work.applies:
                assert [command.index for command in each.commands] == list(
                    range(self.applied + 1, self.applied + 1 + len(each.commands))
                )
                self.applied += len(each.commands)
                self.drive.applied(each, [b""] * len(each.commands))
            for message in work.fetches:
                self.drive.snapshot_failed(message)
        raise AssertionError("it never comes to rest")

    def lead(self) -> None:
        """With the honest one's vote and acknowledgement alone, as always."""
        self.drive.campaign()
        self.work()
        for kind in (T.PRE_VOTE_RESP, T.VOTE_RESP):
            term = self.drive.term + (kind is T.PRE_VOTE_RESP)
            self.hear(Message(type=kind, to=VICTIM, from_=HONEST, term=term))
        assert self.drive.leads
        self.acknowledge()

    def acknowledge(self) -> None:
        last = self.log.last_index()
        answer = Message(type=T.APP_RESP, to=VICTIM, from_=HONEST, term=self.drive.term, index=last)
        self.hear(answer)
        assert self.drive.committed_index == last


def valid_message(rng: random.Random, drive: Drive) -> Message:
    """What passes the checks of one message: near what is so here, or with extreme numbers."""

    def number(truth: int, *, lowest: int = 0) -> int:
        near = truth + rng.randint(-3, 3)
        return max(lowest, rng.choice(EXTREMES) if rng.random() < 0.1 else near)

    kind = rng.choice(_PEER_TYPES)
    last = drive.raw_node.raft.log.last_index()
    term, index = number(drive.term, lowest=1), min(number(last), NUMBER_MAX - 9)
    log_term = min(term, number(drive.term))
    entries: tuple[Entry, ...] = ()
    if kind is T.APP:
        terms = sorted(rng.randint(log_term, min(term, log_term + 3)) for _ in range(3))
        many = enumerate(terms[: rng.randrange(4)])
        entries = tuple(Entry(each, index + 1 + i, data=bytes(20)) for i, each in many)
    elif kind is T.PROP:
        entry_type = rng.choice(list(EntryType))
        entries = (Entry(0, 0, entry_type, rng.randbytes(rng.randrange(60))),)
    elif kind in (T.READ_INDEX, T.READ_INDEX_RESP):
        entries = (Entry(0, 0, data=rng.randbytes(8)),)
    at = SnapshotMetadata(max(1, index), max(1, log_term), ConfState((1, 2, 3)))
    return Message(
        type=kind,
        to=VICTIM,
        from_=HOSTILE if rng.random() < 0.95 else rng.choice([0, VICTIM, HONEST, 9, NUMBER_MAX]),
        term=0 if kind in (T.PROP, T.READ_INDEX) else term,
        log_term=log_term,
        index=index,
        entries=entries,
        commit=number(drive.committed_index),
        reject=rng.random() < 0.3,
        reject_hint=number(last),
        context=rng.choice([b"", b"CampaignTransfer", rng.randbytes(16)]),
        snapshot=Snapshot(at) if kind is T.SNAP else None,
    )


_PEER_TYPES = (
    *(T.PROP, T.APP, T.APP, T.APP_RESP, T.VOTE, T.VOTE_RESP, T.PRE_VOTE, T.PRE_VOTE_RESP),
    *(T.SNAP, T.HEARTBEAT, T.HEARTBEAT, T.HEARTBEAT_RESP, T.TRANSFER_LEADER, T.TIMEOUT_NOW),
    *(T.READ_INDEX, T.READ_INDEX_RESP),
)


def hostile_frame(rng: random.Random, drive: Drive) -> bytes:
    messages = [encode_message(valid_message(rng, drive)) for _ in range(rng.choice([1, 1, 3]))]
    frame = batch(messages)
    return mutated(rng, frame) if rng.random() < 0.3 else frame


@pytest.mark.parametrize("leads", [True, False], ids=["a leader", "a follower"])
def test_hostile_frames_break_nothing_they_are_stepped_into(rng: random.Random, leads) -> None:
    victim = Victim(leads=leads)
    drive, log = victim.drive, victim.log
    sent_bytes = 0
    stepped = refused = 0
    tracemalloc.start()
    try:
        for turn in range(FUZZED_FRAMES // 2):
            frame = hostile_frame(rng, drive)
            sent_bytes += len(frame)
            try:
                found = decode_batch(frame)
            except MalformedMessage:
                refused += 1
                continue
            for message in found.messages:
                # As the transport does it.
                if message.to == VICTIM and is_from(message, HOSTILE):
                    committed, applied = drive.committed_index, drive.applied_index
                    victim.hear(message)
                    stepped += 1
                    assert committed <= drive.committed_index <= log.last_index()
                    assert applied <= drive.applied_index <= drive.committed_index
            if turn % 200 == 0:
                drive.tick()
                victim.work()
        gc.collect()
        entries = log.entries(1, log.last_index() + 1, 1 << 40)
        assert payload_size(entries) <= sent_bytes
        held = tracemalloc.get_traced_memory()[0]
        assert held < 8 * 1024 * 1024 + 600 * len(entries)
    finally:
        tracemalloc.stop()
    assert stepped > FUZZED_FRAMES // 8
    assert refused > FUZZED_FRAMES // 50
    # No number went where nobody can follow: an honest majority goes on from here.
    assert drive.term < NUMBER_MAX // 2
    if not drive.leads:
        while drive.leader:  # nobody is heard any more
            drive.tick()
            victim.work()
        victim.lead()
    request = drive.propose(b"still here")
    victim.work()
    victim.acknowledge()
    assert request in [outcome.request for outcome in drive.take_outcomes()]


@pytest.mark.parametrize("sender", ["a member", "a stranger"])
async def test_hostile_frames_arrive_by_stream_and_the_next_stream_is_served(
    autojump_clock, rng: random.Random, sender
) -> None:
    """All the way from the wire: of a stranger nothing arrives; of a member only what is checked,
    and one malformed frame costs it its stream.
    """
    victim = Victim(leads=False)
    term, last = victim.drive.term, victim.log.last_index()
    delivered: list[Message] = []

    def deliver(messages: list[Message]) -> None:
        delivered.extend(messages[-1:])
        for message in messages:
            victim.hear(message)

    async with open_simulated_network(rng=rng) as network:
        here, there, honest = [network.add_host(name) for name in ("here", "there", "honest")]
        ids = {here.peer_id: VICTIM, honest.peer_id: HONEST}
        if sender == "a member":
            ids[there.peer_id] = HOSTILE
        for other in (there, honest):
            await other.connect(here.addresses)
            here.admit(other.peer_id)
            other.admit(here.peer_id)
        async with open_stream_transport(
            here,
            peer_of=lambda raft_id: next((p for p, each in ids.items() if each == raft_id), None),
            id_of=ids.get,
            deliver=deliver,
            report_unreachable=lambda _: None,
            settings=ConsensusSettings(),
        ) as transport:
            sent = 0
            while sent < FUZZED_FRAMES // 10:
                stream = await opened(there, here)
                with suppress(PeerGone):
                    for _ in range(50):
                        await stream.send_all(framed(hostile_frame(rng, victim.drive)))
                        sent += 1
                await stream.aclose()
            await trio.sleep(1)  # what is on its way arrives
            if sender == "a stranger":
                assert delivered == []
                assert (victim.drive.term, victim.log.last_index()) == (term, last)
                assert all(each.raft_id != HOSTILE for each in transport.statistics())
            else:
                assert len(delivered) > 100
            stream = await opened(honest, here)
            heartbeat = Message(
                type=T.HEARTBEAT, to=VICTIM, from_=HONEST, term=victim.drive.term + 1
            )
            await stream.send_all(framed(batch([encode_message(heartbeat)])))
            with trio.fail_after(60):
                while heartbeat not in delivered[-1:]:  # noqa: ASYNC110 - nothing tells when
                    await trio.sleep(0.01)
            assert victim.drive.leader == HONEST


async def opened(there, here):
    """A stream to the transport, past our hello."""
    stream = await there.open_stream(here.peer_id, protocol_ids.RAFT)
    with suppress(PeerGone):
        await stream.send_all(framed(encode_hello()))
    return stream


def framed(payload: bytes) -> bytes:
    return encode_frame(payload, max_bytes=FRAME_BYTES_MAX)

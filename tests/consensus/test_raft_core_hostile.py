"""What a member sends that no correct node would: refused by name, and nothing breaks."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.consensus.core.config_change import ConfChangeRefused, conf_change_entry
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    ConfChange,
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    StateRole,
)
from ollamamax_p2p.consensus.core.step_errors import (
    LocalMessageRefused,
    MalformedStep,
    StepRefused,
    UnknownPeerRefused,
)
from ollamamax_p2p.errors import ProposalDropped
from tests.consensus.raft_core_cluster import Cluster

T = MessageType
LOCAL = [
    T.HUP,
    T.BEAT,
    T.UNREACHABLE,
    T.SNAP_STATUS,
    T.CHECK_QUORUM,
    T.STORAGE_APPEND,
    T.STORAGE_APPEND_RESP,
    T.STORAGE_APPLY,
    T.STORAGE_APPLY_RESP,
    T.FORGET_LEADER,
]


def snapshot(index: int = 50, term: int = 2, **state: object) -> Snapshot:
    return Snapshot(SnapshotMetadata(index, term, ConfState(**state)))  # type: ignore[arg-type]


def change_of(node: int) -> Entry:
    return Entry(0, 0, *conf_change_entry(ConfChange(ConfChangeType.ADD_NODE, node)))


MALFORMED = {
    "a negative term": Message(type=T.VOTE, from_=1, term=-1),
    "a term without bounds": Message(type=T.VOTE, from_=1, term=2**63),
    "a log term without bounds": Message(type=T.VOTE, from_=1, term=2, log_term=2**63),
    "an index without bounds": Message(type=T.VOTE, from_=1, term=2, index=2**63),
    "a negative commit": Message(type=T.HEARTBEAT, from_=1, term=2, commit=-1),
    "a hint without bounds": Message(type=T.APP_RESP, from_=1, term=2, reject_hint=2**64),
    "a vote without a term": Message(type=T.VOTE, from_=1),
    "an append without a term": Message(type=T.APP, from_=1),
    "a heartbeat that commits too much": Message(type=T.HEARTBEAT, from_=1, term=2, commit=99),
    "a gap": Message(type=T.APP, from_=1, term=2, index=1, log_term=1, entries=(Entry(2, 3),)),
    "terms that fall": Message(
        type=T.APP, from_=1, term=2, index=1, log_term=1, entries=(Entry(2, 2), Entry(1, 3))
    ),
    "an entry before its predecessor's term": Message(
        type=T.APP, from_=1, term=2, index=1, log_term=1, entries=(Entry(0, 2),)
    ),
    "an entry of a later term": Message(
        type=T.APP, from_=1, term=2, index=1, log_term=1, entries=(Entry(3, 2),)
    ),
    "an entry at the end of all indexes": Message(
        type=T.APP, from_=1, term=2, index=2**63 - 1, log_term=1, entries=(Entry(2, 2**63),)
    ),
    "a proposal with a term": Message(type=T.PROP, from_=1, term=2, entries=(Entry(0, 0),)),
    "a proposal of nothing": Message(type=T.PROP, from_=1),
    "a change that cannot be read": Message(
        type=T.PROP, from_=1, entries=(Entry(0, 0, EntryType.CONF_CHANGE, b"?"),)
    ),
    "a change of our own storage": Message(
        type=T.PROP, from_=1, entries=(change_of(LOCAL_APPLY_THREAD),)
    ),
    "a change of a negative node": Message(type=T.PROP, from_=1, entries=(change_of(-1),)),
    "a read without a context": Message(type=T.READ_INDEX, from_=1),
    "a read with a term": Message(type=T.READ_INDEX, from_=1, term=2, entries=(Entry(0, 0),)),
    "a read's answer without a context": Message(type=T.READ_INDEX_RESP, from_=1, term=2),
    "no snapshot": Message(type=T.SNAP, from_=1, term=2),
    "a snapshot of nothing": Message(type=T.SNAP, from_=1, term=2, snapshot=Snapshot()),
    "a snapshot of a later term": Message(
        type=T.SNAP, from_=1, term=2, snapshot=snapshot(term=3, voters=(1, 2))
    ),
    "a snapshot with node 0": Message(
        type=T.SNAP, from_=1, term=2, snapshot=snapshot(voters=(0, 2))
    ),
    "a snapshot without voters": Message(
        type=T.SNAP, from_=1, term=2, snapshot=snapshot(learners=(2,))
    ),
    "a snapshot with a node that votes and learns": Message(
        type=T.SNAP, from_=1, term=2, snapshot=snapshot(voters=(1, 2), learners=(2,))
    ),
    "a snapshot that leaves what it is not in": Message(
        type=T.SNAP, from_=1, term=2, snapshot=snapshot(voters=(1, 2), auto_leave=True)
    ),
    "a snapshot with a node twice": Message(
        type=T.SNAP, from_=1, term=2, snapshot=snapshot(voters=(1, 2, 2))
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_no_correct_node_sends_is_refused_by_name(what: str) -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    victim = cluster[2]
    before = victim.raw.raft.log.last_entry_id(), str(victim.raw.raft.tracker.config)
    with pytest.raises(MalformedStep, match="raft: node 1 sent "):
        victim.raw.step(MALFORMED[what])
    assert before == (victim.raw.raft.log.last_entry_id(), str(victim.raw.raft.tracker.config))
    cluster[1].raw.propose(b"x")
    cluster.tick(2)
    assert victim.commands() == [b"x"]


def test_an_acknowledgement_of_more_than_there_is_is_refused() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(1)
    for node in (2, 3):
        with pytest.raises(MalformedStep, match="more than there is"):
            leader.raw.step(Message(type=T.APP_RESP, from_=node, term=leader.term, index=10**6))
    leader.raw.propose(b"x")
    assert leader.raw.raft.log.committed == 2


@pytest.mark.parametrize("kind", LOCAL)
def test_nobody_else_may_say_what_a_node_says_to_itself(kind: MessageType) -> None:
    cluster = Cluster(3)
    with pytest.raises(LocalMessageRefused, match="cannot step raft local message"):
        cluster[1].raw.step(Message(type=kind, from_=2, term=1))


def test_an_answer_of_a_stranger_is_refused() -> None:
    cluster = Cluster(3)
    with pytest.raises(UnknownPeerRefused, match="cannot step as peer not found"):
        cluster[1].raw.step(Message(type=T.VOTE_RESP, from_=9, term=1))


@pytest.mark.parametrize(
    ("peer", "from_"), [(2, 3), (1, 1), (LOCAL_APPEND_THREAD, LOCAL_APPEND_THREAD), (2, 0)]
)
def test_nobody_speaks_for_others(peer: int, from_: int) -> None:
    cluster = Cluster(3)
    message = Message(type=T.STORAGE_APPEND_RESP, from_=from_, term=1, index=1)
    with pytest.raises(MalformedStep, match="in the name of node"):
        cluster[1].raw.step_from(peer, message)


def test_a_peer_speaks_for_itself() -> None:
    cluster = Cluster(3)
    cluster[1].raw.step_from(2, Message(type=T.HEARTBEAT, from_=2, term=5))
    assert cluster[1].raw.raft.leader == 2


def test_a_snapshot_that_is_not_for_us_is_ignored() -> None:
    cluster = Cluster(3)
    state = {"voters": (1, 3), "voters_outgoing": (3,), "learners": (4,), "auto_leave": True}
    cluster[2].raw.step(Message(type=T.SNAP, from_=1, term=2, snapshot=snapshot(**state)))
    assert "not in the ConfState voters:1 voters:3 learners:4 voters_outgoing:3" in cluster[2].said
    assert cluster[2].raw.raft.log.last_index() == 1


def test_a_change_that_does_not_fit_is_refused_when_it_is_applied_and_changes_nothing() -> None:
    cluster = Cluster(1)
    leader = cluster.elect(1)
    before = str(leader.raw.raft.tracker.config)
    for change in (
        ConfChange(ConfChangeType.REMOVE_NODE, 1),
        ConfChange(ConfChangeType.ADD_NODE, LOCAL_APPEND_THREAD),
        ConfChangeV2(),
        ConfChangeV2(changes=(ConfChangeSingle(ConfChangeType.ADD_LEARNER_NODE, -3),)),
    ):
        with pytest.raises(ConfChangeRefused):
            leader.raw.apply_conf_change(change)
    assert str(leader.raw.raft.tracker.config) == before
    assert leader.raw.propose(b"x") is None


numbers = st.one_of(st.integers(0, 12), st.integers(-(2**64), 2**64))
nodes = st.one_of(st.integers(0, 5), st.just(LOCAL_APPEND_THREAD), st.integers(0, 2**64))
kinds = st.sampled_from(EntryType)
entries = st.lists(
    st.builds(Entry, numbers, numbers, kinds, st.binary(max_size=12)), max_size=3
).map(tuple)
states = st.builds(
    ConfState,
    *[st.lists(nodes, max_size=3).map(tuple)] * 4,
    st.booleans(),
)
snapshots = st.builds(Snapshot, st.builds(SnapshotMetadata, numbers, numbers, states))
anything = st.builds(
    Message,
    type=st.sampled_from(MessageType),
    to=st.just(1),
    from_=nodes,
    term=numbers,
    log_term=numbers,
    index=numbers,
    entries=entries,
    commit=numbers,
    vote=nodes,
    snapshot=st.none() | snapshots,
    reject=st.booleans(),
    reject_hint=numbers,
    context=st.sampled_from([b"", b"CampaignTransfer", b"x" * 16]),
)


FROM_PEERS = [
    *(T.APP, T.APP, T.APP_RESP, T.HEARTBEAT, T.HEARTBEAT_RESP, T.VOTE, T.VOTE_RESP, T.SNAP),
    *(T.PRE_VOTE, T.PRE_VOTE_RESP, T.TIMEOUT_NOW, T.TRANSFER_LEADER),
]


@st.composite
def plausible(draw: st.DrawFn) -> Message:
    """What passes the checks more often."""
    term, index = draw(st.integers(1, 6)), draw(st.integers(0, 8))
    log_term = draw(st.integers(0, term))
    run = tuple(
        Entry(draw(st.integers(log_term, term)), index + 1 + place)
        for place in range(draw(st.integers(0, 3)))
    )
    kind = draw(st.sampled_from(FROM_PEERS))
    return Message(
        type=kind,
        from_=draw(st.integers(1, 4)),
        term=term,
        log_term=log_term,
        index=index,
        entries=run if kind is T.APP else (),
        commit=draw(st.integers(0, 8)),
        reject=draw(st.booleans()),
        reject_hint=draw(st.integers(0, 9)),
        snapshot=Snapshot(SnapshotMetadata(index, log_term, ConfState((1, 2, 3)))),
    )


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([StateRole.FOLLOWER, StateRole.CANDIDATE, StateRole.LEADER]),
    st.lists(st.one_of(anything, plausible()), max_size=12),
    st.booleans(),
)
def test_no_message_from_a_peer_breaks_a_node(
    role: StateRole, messages: list[Message], guarded: bool
) -> None:
    cluster = Cluster(3, check_quorum=guarded, pre_vote=guarded)
    victim = cluster[1]
    if role is StateRole.LEADER:
        cluster.elect(1)
    elif role is StateRole.CANDIDATE:
        cluster.cut(1)
        victim.raw.campaign()
        cluster.settle()
    cluster.cut(1)
    for message in messages:
        with contextlib.suppress(StepRefused, ProposalDropped):
            victim.raw.step_from(message.from_, message)
        committed = victim.raw.raft.log.committed
        cluster.settle()
        assert victim.raw.raft.log.committed >= committed
        assert victim.raw.raft.log.applied <= victim.raw.raft.log.committed

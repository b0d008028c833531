"""The sentences of the Raft paper, section by section, each held against the core.

Source: Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm (Extended
Version)", 2014. Every log here begins behind a snapshot of index 1 and term 1, which stands for the
paper's first entry. Where this core does otherwise on purpose, the test says so.
"""

import random
from collections.abc import Iterable, Sequence

import pytest

from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    StateRole,
)
from ollamamax_p2p.consensus.core.progress import StateType
from ollamamax_p2p.consensus.core.sessions import SessionTable
from tests.consensus.raft_core_cluster import ELECTION_TICKS, Cluster, Member

LEADER, CANDIDATE, FOLLOWER = StateRole.LEADER, StateRole.CANDIDATE, StateRole.FOLLOWER

FIGURE_7_LEADER = (1, 1, 1, 4, 4, 5, 5, 6, 6, 6)
FIGURE_7_FOLLOWERS = {
    "a": (1, 1, 1, 4, 4, 5, 5, 6, 6),
    "b": (1, 1, 1, 4),
    "c": (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6),
    "d": (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7),
    "e": (1, 1, 1, 4, 4, 4, 4),
    "f": (1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3),
}


def entries(terms: Sequence[int], after: int = 1) -> list[Entry]:
    """Entries of these terms, whose data tells them apart."""
    return [
        Entry(term, index, EntryType.NORMAL, f"{index} of term {term}".encode())
        for index, term in enumerate(terms, after + 1)
    ]


def member(
    terms: Sequence[int] = (1,),
    *,
    term: int = 0,
    vote: int = 0,
    commit: int = 1,
    voters: int = 3,
    **settings: object,
) -> Member:
    """Node 1 of so many voters. terms: of its log, from index 1 on; term: 0, the last of them."""
    state = ConfState(voters=tuple(range(1, voters + 1)))
    made = Member(1, state, **{"async_storage_writes": False, **settings})
    made.log.append(entries(terms[1:]), HardState(term or terms[-1], vote, commit))
    made.restart()
    return made


def outgoing(node: Member) -> list[Message]:
    """What it has to say to others, once all it has to write is written."""
    sent: list[Message] = []
    while node.raw.has_ready():
        ready = node.raw.ready()
        if ready.snapshot:
            node.log.install_snapshot(ready.snapshot)
        node.log.append(ready.entries, ready.hard_state)
        node.apply(ready.committed_entries)
        sent += ready.messages
        node.raw.advance()
    return sent


def of_kind(messages: Iterable[Message], kind: MessageType) -> list[Message]:
    return [message for message in messages if message.type is kind]


def hear(node: Member, kind: MessageType, from_: int, term: int, **fields: object) -> list[Message]:
    """Give it a message; its answers."""
    node.raw.step(Message(type=kind, to=1, from_=from_, term=term, **fields))  # type: ignore[arg-type]
    return outgoing(node)


def in_role(role: StateRole, **settings: object) -> Member:
    """Node 1 of three, one term on if it is no follower."""
    node = member(**settings)  # type: ignore[arg-type]
    if role is not FOLLOWER:
        node.raw.campaign()
        outgoing(node)
    if role is LEADER:
        hear(node, MessageType.VOTE_RESP, 2, node.term)
    assert node.role is role
    return node


def terms_of(node: Member) -> tuple[int, ...]:
    """Of its durable log, from index 1 on."""
    first, last = node.log.first_index(), node.log.last_index()
    return tuple(node.log.term(index) for index in range(first - 1, last + 1))


# -- 5.1 Raft basics


def test_servers_begin_as_followers() -> None:
    assert member().role is FOLLOWER


@pytest.mark.parametrize("role", [FOLLOWER, CANDIDATE, LEADER])
def test_whoever_sees_a_larger_term_adopts_it_and_follows(role: StateRole) -> None:
    node = in_role(role)
    hear(node, MessageType.APP, 2, 7, log_term=1, index=1)
    assert (node.role, node.term, node.raw.raft.leader) == (FOLLOWER, 7, 2)


@pytest.mark.parametrize("role", [FOLLOWER, CANDIDATE, LEADER])
def test_a_request_of_a_stale_term_changes_nothing(role: StateRole) -> None:
    node = in_role(role, terms=(1, 3))
    before = node.raw.raft.hard_state(), terms_of(node), node.role
    for kind in (MessageType.APP, MessageType.VOTE):
        answers = hear(node, kind, 2, 1, log_term=1, index=1)
        # No answer says so: whoever sent it learns of the larger term from the next request.
        assert not answers
    assert (node.raw.raft.hard_state(), terms_of(node), node.role) == before


# -- 5.2 Leader election


def test_a_leader_sends_heartbeats_to_all_in_every_interval() -> None:
    node = in_role(LEADER)
    for _ in range(3):
        node.raw.tick()
        beats = of_kind(outgoing(node), MessageType.HEARTBEAT)
        assert [each.to for each in beats] == [2, 3]


@pytest.mark.parametrize("role", [FOLLOWER, CANDIDATE])
def test_without_a_word_of_a_leader_an_election_begins(role: StateRole) -> None:
    node = in_role(role)
    before = node.term
    for _ in range(2 * ELECTION_TICKS):
        node.raw.tick()
    requests = of_kind(outgoing(node), MessageType.VOTE)
    assert node.role is CANDIDATE
    assert node.term == before + 1
    assert node.raw.raft.vote == 1
    assert [each.to for each in requests] == [2, 3]


def test_a_follower_that_hears_of_its_leader_begins_none() -> None:
    node = member()
    for _ in range(5 * ELECTION_TICKS):
        node.raw.tick()
        hear(node, MessageType.HEARTBEAT, 2, 1)
    assert (node.role, node.term) == (FOLLOWER, 1)


@pytest.mark.parametrize(
    ("size", "granted", "refused", "role"),
    [
        (1, 0, 0, LEADER),
        (3, 0, 0, CANDIDATE),
        (3, 1, 0, LEADER),
        (3, 1, 1, LEADER),
        (3, 0, 1, CANDIDATE),
        (3, 0, 2, FOLLOWER),
        (5, 1, 2, CANDIDATE),
        (5, 2, 0, LEADER),
        (5, 2, 2, LEADER),
        (5, 0, 3, FOLLOWER),
        (4, 1, 0, CANDIDATE),
        (4, 1, 2, FOLLOWER),
    ],
)
def test_a_candidate_wins_with_the_votes_of_a_majority(
    size: int, granted: int, refused: int, role: StateRole
) -> None:
    node = member(voters=size)
    node.raw.campaign()
    outgoing(node)
    for voter in range(2, 2 + refused):
        hear(node, MessageType.VOTE_RESP, voter, 2, reject=True)
    for voter in range(2 + refused, 2 + refused + granted):
        hear(node, MessageType.VOTE_RESP, voter, 2)
    assert (node.role, node.term) == (role, 2)


@pytest.mark.parametrize("vote", [0, 1, 2, 3])
@pytest.mark.parametrize("candidate", [2, 3])
def test_each_server_votes_for_one_candidate_at_most_in_a_term(vote: int, candidate: int) -> None:
    node = member(term=5, vote=vote)
    (answer,) = hear(node, MessageType.VOTE, candidate, 5, log_term=1, index=1)
    assert answer.reject is (vote not in (0, candidate))
    assert node.raw.raft.vote == (vote or candidate)


def test_first_come_first_served() -> None:
    node = member()
    (first,) = hear(node, MessageType.VOTE, 2, 2, log_term=1, index=1)
    (second,) = hear(node, MessageType.VOTE, 3, 2, log_term=1, index=1)
    (again,) = hear(node, MessageType.VOTE, 2, 2, log_term=1, index=1)
    assert (first.reject, second.reject, again.reject) == (False, True, False)


@pytest.mark.parametrize(("ahead", "role"), [(0, FOLLOWER), (1, FOLLOWER), (-1, CANDIDATE)])
def test_a_candidate_yields_to_a_leader_whose_term_is_not_smaller(
    ahead: int, role: StateRole
) -> None:
    node = in_role(CANDIDATE)
    hear(node, MessageType.APP, 2, node.term + ahead, log_term=1, index=1)
    assert node.role is role
    assert node.term == 2 + max(ahead, 0)


def test_a_split_vote_ends_by_another_election() -> None:
    node = in_role(CANDIDATE, voters=4)
    hear(node, MessageType.VOTE_RESP, 2, 2)
    for _ in range(2 * ELECTION_TICKS):
        node.raw.tick()
    assert (node.role, node.term) == (CANDIDATE, 3)


def test_election_timeouts_are_drawn_from_a_fixed_interval() -> None:
    node = member(rng=random.Random(1))
    drawn = set()
    for term in range(2, 400):
        hear(node, MessageType.APP, 2, term, log_term=1, index=1)
        drawn.add(node.raw.raft.randomized_election_timeout)
    assert drawn == set(range(ELECTION_TICKS, 2 * ELECTION_TICKS))


def test_the_spread_makes_most_elections_end_with_one_candidate() -> None:
    alone = 0
    for seed in range(200):
        waits = [
            member(rng=random.Random(seed * 9 + node)).raw.raft.randomized_election_timeout
            for node in range(5)
        ]
        alone += waits.count(min(waits)) == 1
    # Five independent draws of ten: two thirds have a single smallest.
    assert alone > 110


# -- 5.3 Log replication


def test_a_command_is_appended_and_sent_to_all_others_at_once() -> None:
    cluster = Cluster(3, async_storage_writes=False)
    leader = cluster.elect(1)
    last = leader.log.last_index()
    leader.raw.propose(b"x")
    ready = leader.raw.ready()
    expected = (Entry(2, last + 1, EntryType.NORMAL, b"x"),)
    assert tuple(ready.entries) == expected
    appends = of_kind(ready.messages, MessageType.APP)
    assert [(each.to, each.entries, each.index, each.log_term) for each in appends] == [
        (2, expected, last, 2),
        (3, expected, last, 2),
    ]


@pytest.mark.parametrize(
    ("size", "holders", "committed"),
    [
        (1, 0, True),
        (3, 0, False),
        (3, 1, True),
        (3, 2, True),
        (4, 1, False),
        (4, 2, True),
        (5, 1, False),
        (5, 2, True),
    ],
)
def test_an_entry_is_committed_once_a_majority_holds_it(
    size: int, holders: int, committed: bool
) -> None:
    node = member(voters=size)
    node.raw.campaign()
    outgoing(node)
    for voter in range(2, size + 1):
        if node.role is CANDIDATE:
            hear(node, MessageType.VOTE_RESP, voter, 2)
    node.raw.propose(b"x")
    outgoing(node)
    for voter in range(2, 2 + holders):
        hear(node, MessageType.APP_RESP, voter, 2, index=3)
    assert (node.raw.raft.log.committed == 3) is committed
    assert (node.commands() == [b"x"]) is committed


def test_followers_learn_of_the_commit_and_apply_in_the_order_of_the_log() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    for number in range(5):
        leader.raw.propose(b"%d" % number)
    cluster.settle()
    for each in cluster.members.values():
        assert each.commands() == [b"0", b"1", b"2", b"3", b"4"]
        assert [entry.index for entry in each.applied] == list(range(2, 8))


def test_a_commit_commits_all_before_it_those_of_other_leaders_too() -> None:
    node = member((1, 1, 2, 2), voters=3)
    node.raw.campaign()
    outgoing(node)
    hear(node, MessageType.VOTE_RESP, 2, 3)
    assert not node.applied
    hear(node, MessageType.APP_RESP, 2, 3, index=5)
    assert [each.term for each in node.applied] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("index", "log_term", "taken"),
    [(1, 1, True), (2, 1, True), (3, 2, True), (3, 1, False), (3, 3, False), (4, 2, False)],
)
def test_a_follower_takes_entries_only_behind_the_entry_that_the_leader_names(
    index: int, log_term: int, taken: bool
) -> None:
    node = member((1, 1, 2))
    before = terms_of(node)
    (answer,) = hear(
        node,
        MessageType.APP,
        2,
        4,
        log_term=log_term,
        index=index,
        entries=tuple(entries([4], after=index)),
    )
    assert answer.reject is not taken
    assert terms_of(node) == ((*before[:index], 4) if taken else before)


@pytest.mark.parametrize("name", FIGURE_7_FOLLOWERS)
def test_the_followers_of_figure_7_come_to_hold_the_leaders_log(name: str) -> None:
    cluster = Cluster(3)
    for number, terms in ((1, FIGURE_7_LEADER), (2, FIGURE_7_FOLLOWERS[name])):
        node = cluster[number]
        node.log.append(entries(terms[1:]), HardState(7, commit=1))
        node.restart()
    cluster.elect(1)
    cluster.settle()
    expected = (*FIGURE_7_LEADER, 8)
    assert [terms_of(cluster[number]) for number in (1, 2, 3)] == [expected] * 3
    assert cluster[2].applied == cluster[1].applied


def test_what_follows_a_conflict_goes_but_nothing_else() -> None:
    node = member((1, 1, 2, 2, 3))
    # Entries 2 and 3 are held already; 4 is another.
    news = tuple(entries([1, 2, 4], after=1))
    hear(node, MessageType.APP, 2, 4, log_term=1, index=1, entries=news)
    assert terms_of(node) == (1, 1, 2, 4)


def test_an_append_that_comes_late_or_twice_takes_nothing_away() -> None:
    node = member((1, 1, 2, 2))
    for _ in range(2):
        (answer,) = hear(
            node, MessageType.APP, 2, 2, log_term=1, index=1, entries=tuple(entries([1]))
        )
        assert (answer.reject, answer.index) == (False, 2)
    assert terms_of(node) == (1, 1, 2, 2)


def test_a_leader_goes_back_until_the_logs_agree_and_sends_from_there() -> None:
    node = member(FIGURE_7_LEADER)
    node.raw.campaign()
    outgoing(node)
    first = of_kind(hear(node, MessageType.VOTE_RESP, 2, 7), MessageType.APP)[0]
    assert (first.index, first.log_term) == (10, 6)
    # The paper allows, as an optimisation, to name a whole term: here 2, b's last index and term.
    (second,) = hear(
        node, MessageType.APP_RESP, 2, 7, index=10, reject=True, reject_hint=4, log_term=4
    )
    assert (second.index, second.log_term) == (4, 4)
    assert [each.term for each in second.entries] == [4, 5, 5, 6, 6, 6, 7]


def test_a_leader_never_overwrites_its_own_log() -> None:
    node = in_role(LEADER, terms=(1, 1))
    before = node.raw.raft.log.last_index()
    # Not even by what claims to be an append of its own term.
    hear(node, MessageType.APP, 2, 2, log_term=1, index=1, entries=tuple(entries([2])))
    assert (node.role, node.raw.raft.log.last_index()) == (LEADER, before)


def test_what_is_committed_is_durable_on_a_majority_at_least() -> None:
    cluster = Cluster(5)
    cluster.elect(1)
    cluster.cut(4, 5)
    cluster[1].raw.propose(b"x")
    cluster.settle()
    assert cluster[1].commands() == [b"x"]
    assert [each.log.last_index() for each in cluster.members.values()] == [3, 3, 3, 2, 2]


# -- 5.4 Safety


@pytest.mark.parametrize(
    ("own", "log_term", "index", "granted"),
    [
        ((1,), 1, 1, True),
        ((1,), 2, 1, True),
        ((1, 1), 1, 1, False),
        ((1, 1), 1, 2, True),
        ((1, 1), 1, 3, True),
        ((1, 1), 2, 1, True),
        ((1, 2), 1, 9, False),
        ((1, 2), 2, 1, False),
        ((1, 2, 2), 3, 1, True),
    ],
)
def test_no_vote_for_a_candidate_whose_log_is_behind(
    own: tuple[int, ...], log_term: int, index: int, granted: bool
) -> None:
    node = member(own)
    (answer,) = hear(node, MessageType.VOTE, 2, 9, log_term=log_term, index=index)
    assert answer.reject is not granted


def test_a_vote_request_tells_the_end_of_the_candidates_log() -> None:
    node = member((1, 1, 3))
    node.raw.campaign()
    requests = of_kind(outgoing(node), MessageType.VOTE)
    assert {(each.term, each.log_term, each.index) for each in requests} == {(4, 3, 3)}


def test_entries_of_earlier_terms_are_not_committed_by_counting() -> None:
    """Figure 8: in (c) the entry of term 2 is on a majority, and (d) may still overwrite it."""
    node = member((1, 2), voters=5)
    node.raw.campaign()
    outgoing(node)
    hear(node, MessageType.VOTE_RESP, 2, 3)
    hear(node, MessageType.VOTE_RESP, 3, 3)
    for voter in (2, 3):
        hear(node, MessageType.APP_RESP, voter, 3, index=2)
    assert node.raw.raft.log.committed == 1
    # (e): with an entry of its own term on a majority both are committed.
    for voter in (2, 3):
        hear(node, MessageType.APP_RESP, voter, 3, index=3)
    assert node.raw.raft.log.committed == 3


def test_a_later_leader_holds_everything_that_was_committed() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        cluster = Cluster(5)
        cluster.elect(1)
        committed: list[bytes] = []
        for turn in range(6):
            cluster.cut(*rng.sample(range(1, 6), 2))
            for node in cluster.members.values():
                node.raw.campaign()
                cluster.settle()
            for node in cluster.members.values():
                if node.role is LEADER:
                    node.raw.propose(b"%d" % turn)
            cluster.settle()
            longest = max((each.commands() for each in cluster.members.values()), key=len)
            assert longest[: len(committed)] == committed
            committed = longest
            newest = max(cluster.members.values(), key=lambda each: each.term)
            if newest.role is LEADER:
                assert newest.commands()[: len(committed)] == committed
        assert committed


# -- 5.5 Follower and candidate crashes


def test_a_follower_that_crashes_and_comes_back_gets_what_it_missed() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(3)
    leader.raw.propose(b"missed")
    cluster.settle()
    cluster[3].restart()
    cluster.heal()
    cluster.tick(2)
    assert cluster[3].commands() == [b"missed"]


def test_term_vote_and_log_survive_a_crash() -> None:
    node = in_role(LEADER)
    node.raw.propose(b"x")
    outgoing(node)
    before = node.term, node.raw.raft.vote, terms_of(node)
    node.restart()
    assert (node.term, node.raw.raft.vote, terms_of(node)) == before
    assert node.role is FOLLOWER


# -- 6 Cluster membership changes


def joint(cluster: Cluster, *changes: tuple[ConfChangeType, int]) -> None:
    """Enter a joint configuration and stay in it."""
    change = ConfChangeV2(
        ConfChangeTransition.JOINT_EXPLICIT,
        tuple(ConfChangeSingle(kind, node) for kind, node in changes),
    )
    cluster[1].raw.propose_conf_change(change)
    cluster.settle()


def replacing_two() -> Cluster:
    """1, 2, 3 are being replaced by 1, 4, 5."""
    cluster = Cluster(3, 2)
    cluster.elect(1)
    add, remove = ConfChangeType.ADD_NODE, ConfChangeType.REMOVE_NODE
    joint(cluster, (add, 4), (add, 5), (remove, 2), (remove, 3))
    assert str(cluster[1].raw.raft.tracker.config) == "voters=(1 4 5)&&(1 2 3)"
    return cluster


@pytest.mark.parametrize(
    ("silent", "agreed"),
    [((), True), ((2, 4), True), ((2, 3), False), ((4, 5), False), ((3,), True)],
)
def test_agreement_needs_majorities_of_the_old_and_the_new_servers(
    silent: tuple[int, ...], agreed: bool
) -> None:
    cluster = replacing_two()
    cluster.cut(*silent)
    cluster[1].raw.propose(b"x")
    cluster.settle()
    assert (cluster[1].commands() == [b"x"]) is agreed
    cluster[1].raw.raft.become_follower(2, 0)
    cluster[1].raw.campaign()
    cluster.settle()
    assert (cluster[1].role is LEADER) is agreed


def test_entries_go_to_the_servers_of_both_configurations_and_either_may_lead() -> None:
    cluster = replacing_two()
    cluster[1].raw.propose(b"x")
    cluster.settle()
    assert all(each.commands() == [b"x"] for each in cluster.members.values())
    for number in (2, 5):
        cluster.elect(number)


def test_only_the_new_servers_decide_once_the_joint_configuration_is_left() -> None:
    cluster = replacing_two()
    cluster[1].raw.propose_conf_change(ConfChangeV2())
    cluster.settle()
    cluster.cut(2, 3)
    cluster[1].raw.propose(b"x")
    cluster.settle()
    assert cluster[5].commands() == [b"x"]


def test_newcomers_catch_up_as_members_without_a_vote() -> None:
    cluster = Cluster(3, 1)
    cluster.elect(1)
    cluster[1].raw.propose(b"x")
    cluster.settle()
    assert cluster[4].commands() == [b"x"]
    cluster.cut(2, 3)
    cluster[1].raw.propose(b"y")
    cluster.settle()
    assert cluster[1].commands() == [b"x"], "the newcomer is not counted"


def test_a_leader_that_is_not_in_the_new_configuration_leads_until_that_is_committed() -> None:
    cluster = Cluster(3, step_down_on_removal=True)
    cluster.elect(1)
    cluster.lost = lambda message: message.to == 1 and message.from_ != 1
    remove = ConfChangeV2(changes=(ConfChangeSingle(ConfChangeType.REMOVE_NODE, 1),))
    cluster[1].raw.propose_conf_change(remove)
    cluster.settle()
    assert cluster[1].role is LEADER
    cluster.heal()
    cluster.tick(2)
    assert cluster[1].role is FOLLOWER
    cluster.elect(2)


def test_no_vote_within_the_least_election_timeout_of_hearing_from_a_leader() -> None:
    """So that servers that were removed and do not know it disrupt nobody."""
    node = member(check_quorum=True)
    for elapsed in range(ELECTION_TICKS):
        hear(node, MessageType.HEARTBEAT, 2, 1)
        for _ in range(elapsed):
            node.raw.tick()
        assert not hear(node, MessageType.VOTE, 3, 9, log_term=9, index=9)
        assert node.term == 1
    node = member(check_quorum=True)
    node.raw.raft.randomized_election_timeout = 2 * ELECTION_TICKS
    hear(node, MessageType.HEARTBEAT, 2, 1)
    node.raw.raft.randomized_election_timeout = 2 * ELECTION_TICKS
    for _ in range(ELECTION_TICKS):
        node.raw.tick()
    (answer,) = hear(node, MessageType.VOTE, 3, 9, log_term=9, index=9)
    assert not answer.reject


# -- 7 Log compaction


def snapshot(index: int, term: int) -> Snapshot:
    return Snapshot(SnapshotMetadata(index, term, ConfState(voters=(1, 2, 3))), b"state")


def test_a_leader_sends_a_snapshot_where_it_has_discarded_the_next_entry() -> None:
    node = in_role(LEADER, terms=(1, 1))
    hear(node, MessageType.APP_RESP, 2, 2, index=3)
    node.log.save_snapshot(snapshot(3, 2))
    node.log.compact(3)
    (sent,) = hear(node, MessageType.APP_RESP, 3, 2, index=2, reject=True, reject_hint=1)
    assert (sent.type, sent.to, sent.snapshot) == (MessageType.SNAP, 3, snapshot(3, 2))
    assert node.raw.status().progress[3].state is StateType.SNAPSHOT


def test_a_snapshot_that_is_news_replaces_the_whole_log() -> None:
    node = member((1, 1, 2, 2))
    (answer,) = hear(node, MessageType.SNAP, 2, 3, snapshot=snapshot(3, 3))
    assert (answer.index, terms_of(node)) == (3, (3,))


def test_a_snapshot_of_what_the_log_holds_leaves_what_follows() -> None:
    node = member((1, 1, 2, 2))
    (answer,) = hear(node, MessageType.SNAP, 2, 3, snapshot=snapshot(3, 2))
    assert (answer.index, terms_of(node)) == (3, (1, 1, 2, 2))
    assert node.raw.raft.log.committed == 3


# -- 8 Client interaction


def test_a_leader_begins_its_term_with_an_empty_entry() -> None:
    node = member()
    node.raw.campaign()
    outgoing(node)
    appends = of_kind(hear(node, MessageType.VOTE_RESP, 2, 2), MessageType.APP)
    assert {each.entries for each in appends} == {(Entry(2, 2, EntryType.NORMAL, b""),)}


def test_a_read_is_answered_after_a_majority_has_answered_heartbeats_and_not_before() -> None:
    node = in_role(LEADER)
    node.raw.read_index(b"q")
    assert not outgoing(node), "what its predecessors committed is not known yet"
    beats = of_kind(hear(node, MessageType.APP_RESP, 2, 2, index=2), MessageType.HEARTBEAT)
    assert {each.to for each in beats} == {2, 3}
    assert not node.raw.raft.read_states
    node.raw.step(
        Message(type=MessageType.HEARTBEAT_RESP, to=1, from_=3, term=2, context=beats[0].context)
    )
    (state,) = node.raw.raft.read_states
    assert (state.index, state.request_ctx) == (2, b"q")


def test_a_client_is_told_who_leads() -> None:
    node = member()
    hear(node, MessageType.HEARTBEAT, 3, 1)
    assert node.raw.basic_status().soft_state.leader == 3


def test_a_command_that_is_sent_again_is_executed_once() -> None:
    """Each carries a serial number, and its result is remembered with the latest of the client."""
    executed: list[bytes] = []

    def execute(command: bytes) -> bytes:
        executed.append(command)
        return b"%d" % len(executed)

    table = SessionTable()
    session = int.from_bytes(table.open(5), "big")
    results = [
        table.once(session, serial, index, lambda command=command: execute(command))
        for index, (serial, command) in enumerate(((1, b"a"), (2, b"b"), (1, b"a"), (2, b"b")), 6)
    ]
    assert results == [b"1", b"2", b"1", b"2"]
    assert executed == [b"a", b"b"]

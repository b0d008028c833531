"""Majorities and changes of configurations, beside a second implementation that is naive on
purpose: it tries out what ours works out.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ollamamax_p2p.consensus.core.config_change import (
    CONF_CHANGE_BYTES_MAX,
    Changer,
    ConfChangeRefused,
    TrackerConfig,
    conf_change_entry,
    decode_conf_change,
    describe_conf_change,
    restore,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfChange,
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    Entry,
    EntryType,
)
from ollamamax_p2p.consensus.core.progress import ProgressMap
from ollamamax_p2p.consensus.core.quorum import ALL, JointConfig, MajorityConfig, VoteResult

NODES = st.integers(1, 6)
HALVES = st.tuples(st.frozensets(NODES), st.frozensets(NODES))


def joint(halves: tuple[frozenset[int], frozenset[int]]) -> JointConfig:
    return JointConfig(MajorityConfig(halves[0]), MajorityConfig(halves[1]))


# -- majorities


def agreed(halves: tuple[frozenset[int], frozenset[int]], consenting: frozenset[int]) -> bool:
    """Whether more than half of each half consents."""
    return all(2 * len(half & consenting) > len(half) for half in halves if half)


@given(HALVES, st.dictionaries(NODES, st.integers(0, 9)))
def test_committed_is_the_greatest_index_that_majorities_hold(
    halves: tuple[frozenset[int], frozenset[int]], held: dict[int, int]
) -> None:
    def enough_hold(index: int) -> bool:
        return agreed(halves, frozenset(node for node in held if held[node] >= index))

    ours = joint(halves).committed_index(held.get)
    if not any(halves):
        assert ours == ALL
    else:
        # Nobody is asked for index 0.
        assert ours == max((index for index in range(1, 10) if enough_hold(index)), default=0)


def completions(voters: frozenset[int], votes: Mapping[int, bool]) -> Iterator[frozenset[int]]:
    """Who has granted in the end, in every way in which the missing votes can fall."""
    given_already = frozenset(node for node, granted in votes.items() if granted)
    missing = [node for node in voters if node not in votes]
    for answers in product((False, True), repeat=len(missing)):
        yield given_already | {node for node, yes in zip(missing, answers, strict=True) if yes}


@given(HALVES, st.dictionaries(NODES, st.booleans()))
def test_a_vote_is_decided_when_no_missing_vote_can_change_it(
    halves: tuple[frozenset[int], frozenset[int]], votes: dict[int, bool]
) -> None:
    ends = {agreed(halves, granted) for granted in completions(halves[0] | halves[1], votes)}
    expected = {
        frozenset({True}): VoteResult.WON,
        frozenset({False}): VoteResult.LOST,
        frozenset({True, False}): VoteResult.PENDING,
    }[frozenset(ends)]
    assert joint(halves).vote_result(votes) is expected


def test_two_joint_configurations_are_equal_if_both_their_halves_are() -> None:
    one, two = frozenset({1, 2}), frozenset({3})
    assert joint((one, two)) == joint((one, two))
    assert joint((one, two)) != joint((two, one))
    assert joint((one, two)) != one


# -- changes


CHANGE_TYPES = {
    "v": ConfChangeType.ADD_NODE,
    "l": ConfChangeType.ADD_LEARNER_NODE,
    "r": ConfChangeType.REMOVE_NODE,
    "u": ConfChangeType.UPDATE_NODE,
}
Changes = list[tuple[str, int]]
CHANGES = st.lists(st.tuples(st.sampled_from("vvlru"), st.integers(0, 5)), max_size=6)
STEPS = st.lists(
    st.tuples(st.sampled_from(["simple", "joint", "leave"]), CHANGES, st.booleans()), max_size=8
)
Naive = tuple[frozenset[int], frozenset[int], frozenset[int], bool]
"""Voters, outgoing voters, everybody who learns or will once the outgoing half is gone, and
whether that is left by itself."""


def naive_change(before: Naive, how: str, changes: Changes, automatic: bool) -> Naive | None:
    """What it makes of a configuration; None if it must be refused."""
    voters, outgoing, learners, _ = before
    if how == "leave":
        return (voters, frozenset(), learners, False) if outgoing else None
    if outgoing or (how == "joint" and not voters):
        return None
    new_voters, new_learners = set(voters), set(learners)
    for kind, node in changes:
        if not node or kind == "u":
            continue
        new_voters.discard(node)
        new_learners.discard(node)
        if kind != "r":
            (new_voters if kind == "v" else new_learners).add(node)
    if not new_voters or (how == "simple" and len(new_voters ^ voters) > 1):
        return None
    if how == "simple":
        return frozenset(new_voters), frozenset(), frozenset(new_learners), False
    return frozenset(new_voters), voters, frozenset(new_learners), automatic


def our_change(
    before: tuple[TrackerConfig, ProgressMap], how: str, changes: Changes, automatic: bool
) -> tuple[TrackerConfig, ProgressMap]:
    changer = Changer(*before, last_index=9, max_inflight=3)
    singles = [ConfChangeSingle(CHANGE_TYPES[kind], node) for kind, node in changes]
    match how:
        case "simple":
            return changer.simple(singles)
        case "joint":
            return changer.enter_joint(singles, auto_leave=automatic)
        case _:
            return changer.leave_joint()


@given(STEPS)
def test_changes_do_what_sets_of_names_do(steps: list[tuple[str, Changes, bool]]) -> None:
    ours: tuple[TrackerConfig, ProgressMap] = (TrackerConfig(), {})
    naive: Naive = (frozenset(), frozenset(), frozenset(), False)
    for step in [("simple", [("v", 1)], False), *steps]:
        expected = naive_change(naive, *step)
        try:
            changed = our_change(ours, *step)
        except ConfChangeRefused:
            assert expected is None
            continue
        assert expected is not None
        ours, naive = changed, expected
        config, progress = ours
        voters, outgoing, learners, automatic = naive
        assert (config.voters.incoming, config.voters.outgoing) == (voters, outgoing)
        # A voter of the outgoing half is no learner before that half is gone.
        assert config.learners == learners - outgoing
        assert config.learners_next == learners & outgoing
        assert config.auto_leave is automatic
        assert progress.keys() == voters | outgoing | learners
        assert {node for node in progress if progress[node].is_learner} == config.learners


@given(STEPS)
def test_a_snapshot_brings_every_configuration_back(steps: list[tuple[str, Changes, bool]]) -> None:
    ours: tuple[TrackerConfig, ProgressMap] = (TrackerConfig(), {})
    for step in [("simple", [("v", 1)], False), *steps]:
        with suppress(ConfChangeRefused):
            ours = our_change(ours, *step)
    config, progress = ours
    empty = Changer(TrackerConfig(), {}, last_index=9, max_inflight=3)
    again, progress_again = restore(empty, config.conf_state())
    assert again == config
    assert progress_again.keys() == progress.keys()


def test_a_change_is_bounded_when_it_is_made_and_when_it_is_read():
    long = ConfChangeV2(context=bytes(CONF_CHANGE_BYTES_MAX))
    with pytest.raises(ValueError, match="limit"):
        conf_change_entry(long)
    entry = Entry(1, 1, EntryType.CONF_CHANGE_V2, bytes(CONF_CHANGE_BYTES_MAX + 1))
    with pytest.raises(ValueError, match="bytes"):
        decode_conf_change(entry)


def test_a_change_is_logged_with_its_context():
    change = ConfChange(ConfChangeType.UPDATE_NODE, 3, b"address")
    assert describe_conf_change(change) == ('type:ConfChangeUpdateNode node_id:3 context:"address"')


@given(CHANGES, CHANGES)
def test_one_by_one_or_through_a_joint_configuration_the_end_is_the_same(
    first: Changes, changes: Changes
) -> None:
    start: tuple[TrackerConfig, ProgressMap] = (TrackerConfig(), {})
    try:
        start = our_change(start, "simple", [("v", 6)], False)
        start = our_change(our_change(start, "joint", first, False), "leave", [], False)
        slowly = start
        for change in changes:
            slowly = our_change(slowly, "simple", [change], False)
        at_once = our_change(our_change(start, "joint", changes, False), "leave", [], False)
    except ConfChangeRefused:
        assume(False)
    assert slowly[0] == at_once[0]
    assert slowly[1].keys() == at_once[1].keys()

"""Who votes: convergence, spread, and never a change that could not be agreed on."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.cluster.core.agreed_settings import AgreedSettings
from ollamamax_p2p.cluster.core.autopilot import (
    CHANGES_MAX,
    LeaderView,
    ReplicaHealth,
    next_change,
    observe,
)
from ollamamax_p2p.cluster.core.commands import RemoveMember
from ollamamax_p2p.cluster.core.rows import Member
from ollamamax_p2p.consensus.core.messages import ConfChangeType, ConfChangeV2, ConfState
from tests.cluster.agreed import peer

NOW = 10_000.0
ADD, REMOVE, LEARN = (
    ConfChangeType.ADD_NODE,
    ConfChangeType.REMOVE_NODE,
    ConfChangeType.ADD_LEARNER_NODE,
)


def member(raft_id: int, region: str = "", *, may_vote: bool = True, role: str = "auto") -> Member:
    return Member(
        raft_id=raft_id,
        peer=peer(raft_id),
        name=str(raft_id),
        region=region,
        may_vote=may_vote,
        role=role,
    )


HEALTHY = ReplicaHealth(NOW, NOW - 1_000)


def silent(seconds: float) -> ReplicaHealth:
    return ReplicaHealth(NOW - seconds)


def view(
    members: list[Member],
    voters: tuple[int, ...],
    *,
    health: dict[int, ReplicaHealth] | None = None,
    leader: int = 1,
    learners: tuple[int, ...] | None = None,
    leading_since: float = 0.0,
) -> LeaderView:
    ids = {each.raft_id: each for each in members}
    if learners is None:
        learners = tuple(sorted(set(ids) - set(voters)))
    known = {each: HEALTHY for each in {*ids, *voters, *learners} - {leader}}
    return LeaderView(
        leader=leader,
        leading_since=leading_since,
        conf_state=ConfState(voters=voters, learners=learners),
        members=ids,
        health=known | (health or {}),
    )


def after(conf: ConfState, change: ConfChangeV2) -> ConfState:
    """The configuration once the change, joint or not, is done."""
    voters, learners = set(conf.voters), set(conf.learners)
    for each in change.changes:
        voters.discard(each.node_id)
        learners.discard(each.node_id)
        if each.type == ADD:
            voters.add(each.node_id)
        elif each.type == LEARN:
            learners.add(each.node_id)
    return ConfState(voters=tuple(sorted(voters)), learners=tuple(sorted(learners)))


def moved(start: LeaderView, agreed: AgreedSettings | None = None, now: float = NOW) -> LeaderView:
    change = next_change(start, agreed or AgreedSettings(), now)
    assert isinstance(change, ConfChangeV2)
    return LeaderView(
        leader=start.leader,
        leading_since=start.leading_since,
        conf_state=after(start.conf_state, change),
        members=start.members,
        health=start.health,
    )


def plain(count: int) -> list[Member]:
    return [member(each) for each in range(1, count + 1)]


def test_one_voter_becomes_three_in_one_change_and_three_become_five():
    three = moved(view(plain(7), (1,)))
    assert three.conf_state.voters == (1, 2, 3)
    five = moved(three)
    assert five.conf_state.voters == (1, 2, 3, 4, 5)
    assert next_change(five, AgreedSettings(), NOW) is None


@pytest.mark.parametrize(("members", "voters"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5)])
def test_there_are_one_three_or_five_voters(members, voters):
    now = view(plain(members), (1,))
    while (change := next_change(now, AgreedSettings(), NOW)) is not None:
        assert isinstance(change, ConfChangeV2)
        now = moved(now)
    assert len(now.conf_state.voters) == voters


def test_a_learner_votes_after_it_was_near_for_the_stability_time():
    start = view(plain(3), (1,), health={2: ReplicaHealth(NOW, NOW - 9.9)})
    assert next_change(start, AgreedSettings(), NOW) is None
    later = view(plain(3), (1,), health={2: ReplicaHealth(NOW, NOW - 10)})
    assert moved(later).conf_state.voters == (1, 2, 3)
    behind = view(plain(3), (1,), health={2: ReplicaHealth(NOW)})
    assert next_change(behind, AgreedSettings(), NOW) is None
    quiet = view(plain(3), (1,), health={2: ReplicaHealth(NOW - 5, NOW - 99)})
    assert next_change(quiet, AgreedSettings(), NOW) is None


def test_small_devices_never_vote_unless_they_are_told_to():
    small = [member(1), member(2, may_vote=False), member(3)]
    assert next_change(view(small, (1,)), AgreedSettings(), NOW) is None
    told = [member(1), member(2, may_vote=False, role="voter"), member(3)]
    assert moved(view(told, (1,))).conf_state.voters == (1, 2, 3)


def test_who_is_demoted_by_the_operator_is_replaced_in_the_same_change():
    members = [member(1), member(2), member(3, role="learner"), member(4)]
    change = next_change(view(members, (1, 2, 3)), AgreedSettings(), NOW)
    assert isinstance(change, ConfChangeV2)
    assert {(each.type, each.node_id) for each in change.changes} == {(ADD, 4), (LEARN, 3)}


def test_a_pinned_voter_goes_before_others():
    members = [*plain(5), member(6, role="voter")]
    agreed = AgreedSettings(voters_max=3)
    assert moved(view(members, (1, 2, 3)), agreed).conf_state.voters == (1, 2, 6)


def test_surplus_voters_are_demoted():
    agreed = AgreedSettings(voters_max=1)
    assert moved(view(plain(5), (1, 2, 3, 4, 5)), agreed).conf_state.voters == (1,)
    assert moved(view(plain(2), (1, 2))).conf_state.voters == (1,)


def test_a_dead_voter_is_replaced_by_a_healthy_learner_in_one_step():
    start = view(plain(4), (1, 2, 3), health={3: silent(61)})
    change = next_change(start, AgreedSettings(), NOW)
    assert isinstance(change, ConfChangeV2)
    assert {(each.type, each.node_id) for each in change.changes} == {(ADD, 4), (LEARN, 3)}
    not_yet = view(plain(4), (1, 2, 3), health={3: silent(59)})
    assert next_change(not_yet, AgreedSettings(), NOW) is None


def test_a_dead_voter_without_a_replacement_stays_while_that_costs_nothing():
    assert (
        next_change(view(plain(3), (1, 2, 3), health={3: silent(99)}), AgreedSettings(), NOW)
        is None
    )
    # Of five with two dead, three living ones outlive one more loss and five outlive none.
    start = view(plain(5), (1, 2, 3, 4, 5), health={4: silent(99), 5: silent(99)})
    assert moved(start).conf_state.voters == (1, 2, 3)


def test_a_new_leader_takes_nobody_for_dead_whom_it_had_no_time_to_hear():
    def led_for(seconds: float) -> LeaderView:
        return LeaderView(
            leader=1,
            leading_since=NOW - seconds,
            conf_state=ConfState(voters=(1, 2, 3), learners=(4,)),
            members={each.raft_id: each for each in plain(4)},
            health={2: HEALTHY, 4: HEALTHY},
        )

    assert next_change(led_for(1), AgreedSettings(), NOW) is None
    assert moved(led_for(61)).conf_state.voters == (1, 2, 4)


def test_no_change_while_the_voters_could_not_agree():
    lost = {2: silent(30), 3: silent(30)}
    start = view(plain(5), (1, 2, 3), health=lost)
    assert next_change(start, AgreedSettings(voters_max=1), NOW) is None


def test_a_new_member_becomes_a_learner_and_a_removed_one_goes_at_once():
    start = view(plain(3), (1,), learners=(2, 9))
    change = next_change(start, AgreedSettings(), NOW)
    assert isinstance(change, ConfChangeV2)
    assert {(each.type, each.node_id) for each in change.changes} == {(REMOVE, 9), (LEARN, 3)}


def test_a_voter_that_is_no_member_any_more_goes_with_or_without_autopilot():
    for autopilot in (True, False):
        agreed = AgreedSettings(autopilot=autopilot)
        change = next_change(view(plain(3), (1, 2, 3, 9)), agreed, NOW)
        assert isinstance(change, ConfChangeV2)
        assert [(each.type, each.node_id) for each in change.changes] == [(REMOVE, 9)]


def test_without_autopilot_the_voters_stay_as_the_operator_made_them():
    assert next_change(view(plain(5), (1, 2)), AgreedSettings(autopilot=False), NOW) is None


def test_the_operator_is_obeyed_without_autopilot_too():
    agreed = AgreedSettings(autopilot=False)
    members = [*plain(2), member(3, role="learner"), member(4, role="voter"), member(5)]
    assert moved(view(members, (1, 2, 3)), agreed).conf_state.voters == (1, 2, 4)
    late = view(members, (1, 2, 3), health={4: ReplicaHealth(NOW)})
    assert moved(late, agreed).conf_state.voters == (1, 2)
    # But somebody must vote.
    alone = view([member(1, role="learner")], (1,))
    assert next_change(alone, agreed, NOW) is None


def test_a_thousand_newcomers_do_not_come_in_one_entry():
    change = next_change(view(plain(1_000), (1,), learners=()), AgreedSettings(), NOW)
    assert isinstance(change, ConfChangeV2)
    assert len(change.changes) == CHANGES_MAX


def test_nothing_is_proposed_during_a_change_or_by_who_does_not_vote():
    joint = LeaderView(1, 0, ConfState(voters=(1, 2, 3), voters_outgoing=(1,)), {1: member(1)}, {})
    assert next_change(joint, AgreedSettings(), NOW) is None
    assert next_change(view(plain(3), (2,), leader=1), AgreedSettings(), NOW) is None


def test_if_nobody_may_vote_the_leader_still_does():
    small = [member(each, may_vote=False) for each in (1, 2, 3)]
    assert next_change(view(small, (1,)), AgreedSettings(), NOW) is None
    assert moved(view(small, (1, 2, 3))).conf_state.voters == (1,)


def test_no_region_has_a_majority_if_that_can_be_avoided():
    members = [member(1, "a"), member(2, "a"), member(3, "a"), member(4, "b"), member(5, "c")]
    assert moved(view(members, (1,))).conf_state.voters == (1, 4, 5)
    # Also where the voters of today are all of one region.
    agreed = AgreedSettings(voters_max=3)
    assert moved(view(members, (1, 2, 3)), agreed).conf_state.voters == (1, 4, 5)


def test_dead_learners_are_expelled_only_when_the_cluster_said_so():
    start = view(plain(2), (1,), health={2: silent(5_000)})
    assert next_change(start, AgreedSettings(), NOW) is None
    agreed = AgreedSettings(remove_dead_after_s=4_000)
    assert next_change(start, agreed, NOW) == RemoveMember(peer=peer(2))
    assert next_change(start, AgreedSettings(remove_dead_after_s=6_000), NOW) is None
    assert next_change(view(plain(1), (1,)), agreed, NOW) is None
    wanted = view([member(1), member(2, role="voter")], (1,), health={2: silent(5_000)})
    assert next_change(wanted, agreed, NOW) is None


def test_health_follows_what_is_observed():
    agreed = AgreedSettings()
    first = observe(None, answered=False, behind=0, settings=agreed, now=100)
    assert first == ReplicaHealth(100, 100)
    kept = observe(first, answered=True, behind=256, settings=agreed, now=110)
    assert kept == ReplicaHealth(110, 100)
    late = observe(kept, answered=True, behind=257, settings=agreed, now=111)
    assert late == ReplicaHealth(111)
    near = observe(late, answered=False, behind=0, settings=agreed, now=112)
    assert near == ReplicaHealth(111, 112)
    assert observe(near, answered=False, behind=0, settings=agreed, now=115) == ReplicaHealth(111)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 12), voters=st.integers(1, 6))
def test_from_any_start_the_living_converge_to_an_odd_and_evenly_spread_set(seed, size, voters):
    dice = random.Random(seed)
    members = [member(each, dice.choice("abc")) for each in range(1, size + 1)]
    ids = [each.raft_id for each in members]
    chosen = tuple(sorted({1, *dice.sample(ids, min(voters, size))}))
    others = tuple(each for each in ids if each not in chosen and dice.random() < 0.7)
    now = view(members, chosen, learners=others)
    for _ in range(10):
        change = next_change(now, AgreedSettings(), NOW)
        if change is None:
            break
        now = moved(now)
    else:
        pytest.fail("it does not settle")
    final = now.conf_state.voters
    for leader in final:
        # Nobody is moved about because another leads.
        elsewhere = view(members, final, leader=leader, learners=now.conf_state.learners)
        assert next_change(elsewhere, AgreedSettings(), NOW) is None
    assert len(final) == min(5, size - 1 + size % 2)
    assert set(ids) == {*final, *now.conf_state.learners}
    per_region = Counter(now.members[each].region for each in final)
    spare = {now.members[each].region for each in now.conf_state.learners}
    assert all(per_region[region] + 1 >= max(per_region.values()) for region in spare)


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_change_is_ever_proposed_that_its_own_voters_could_not_agree_on(seed):
    dice = random.Random(seed)
    size = dice.randrange(1, 9)
    members = [
        member(
            each,
            dice.choice("abc"),
            may_vote=dice.random() < 0.8,
            role=dice.choice(["auto", "auto", "auto", "voter", "learner"]),
        )
        for each in range(1, size + 1)
        if each == 1 or dice.random() < 0.9
    ]
    voters = tuple(sorted({1, *dice.sample(range(1, size + 1), min(size, dice.randrange(1, 6)))}))
    health = {
        each: ReplicaHealth(
            NOW - dice.choice([0, 1, 30, 100]), dice.choice([None, NOW - 1, NOW - 200])
        )
        for each in range(2, size + 1)
    }
    agreed = AgreedSettings(
        autopilot=dice.random() < 0.9,
        voters_max=dice.choice([1, 3, 5]),
        remove_dead_after_s=dice.choice([0, 50]),
    )
    start = view(members, voters, health=health)
    change = next_change(start, agreed, NOW)
    assert change == next_change(start, agreed, NOW)
    if not isinstance(change, ConfChangeV2):
        return
    final = after(start.conf_state, change)
    if final.voters == voters:
        return
    for group in (voters, final.voters):
        answering = [each for each in group if each == 1 or NOW - health[each].last_contact <= 3]
        assert len(answering) > len(group) // 2
    if agreed.autopilot:
        assert len(final.voters) % 2 == 1
        promoted = set(final.voters) - set(voters)
        by_id = {each.raft_id: each for each in members}
        for each in promoted:
            assert by_id[each].role == "voter" or (
                by_id[each].role == "auto" and by_id[each].may_vote
            )
            assert health[each].near_since == NOW - 200

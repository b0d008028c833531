"""Autopilot: which members vote, decided anew whenever the leader asks.

Every member is at least a learner. Voters are as many as outlive the most losses: one, three or
five, never an even number, because a fourth voter outlives no more than three do and may split two
by two. They are spread over the regions as evenly as can be, so that none has a majority where that
can be avoided. A learner may vote once it has been near the leader's log for a while; a voter that
has been silent for long is replaced by one that may. From one voter to three, from three to five,
and a dead one for a living one: each is one joint change, so no even number is ever in force.

Promoting and demoting by hand is `UpdateMember(role=…)`: it is obeyed here, whether autopilot is on
or off. A voter that is to be expelled is demoted so first.

No change is made whose new voters could not agree on anything right now.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ollamamax_p2p.cluster.core.agreed_settings import AgreedSettings
from ollamamax_p2p.cluster.core.commands import RemoveMember
from ollamamax_p2p.cluster.core.rows import Member
from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
)

CHANGES_MAX = 256
"""Learners added or removed in one change: ten thousand members join in forty, not in one entry."""

RECENT_S = 3.0
"""Who was heard of within this answers now: three times the longest election timeout."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """What a leader knows of one replica. Times are the leader's monotonic seconds."""

    last_contact: float
    """When it answered last; at first, when this leader began to lead."""
    near_since: float | None = None
    """Since when it has been near the end of the log without a break; None: it is not."""


@dataclass(frozen=True, slots=True)
class LeaderView:
    """The cluster as its leader sees it."""

    leader: int
    """Its own Raft id."""
    leading_since: float
    conf_state: ConfState
    members: Mapping[int, Member]
    """By Raft id."""
    health: Mapping[int, ReplicaHealth]
    """By Raft id, without the leader's own."""


def observe(
    before: ReplicaHealth | None,
    *,
    answered: bool,
    behind: int,
    settings: AgreedSettings,
    now: float,
) -> ReplicaHealth:
    """A replica's health after one more look at it.

    before: None if this leader has not looked before; answered: since that last look; behind:
    entries between its match and the leader's last.
    """
    last_contact = now if answered or before is None else before.last_contact
    near = behind <= settings.catch_up_entries and now - last_contact <= RECENT_S
    if not near:
        return ReplicaHealth(last_contact)
    since = before.near_since if before else None
    return ReplicaHealth(last_contact, now if since is None else since)


def next_change(
    view: LeaderView, settings: AgreedSettings, now: float
) -> ConfChangeV2 | RemoveMember | None:
    """The next step towards the voters that should be, or None: nothing to do, or not now.

    Propose one at a time; ask again once it has been applied.
    """
    if view.conf_state.voters_outgoing or view.leader not in view.conf_state.voters:
        # A change is under way; or we lead no longer, and don't know it yet.
        return None
    learners = _learner_changes(view)
    if learners:
        return ConfChangeV2(changes=tuple(learners[:CHANGES_MAX]))
    present = set(view.conf_state.voters)
    choose = _wanted_voters if settings.autopilot else _told_voters
    wanted = choose(view, settings, now)
    if wanted != present:
        return _voter_change(view, wanted, now)
    return _clean_up(view, settings, now)


def _learner_changes(view: LeaderView) -> list[ConfChangeSingle]:
    """Who was removed goes, who is new comes; neither changes what a majority is."""
    conf = view.conf_state
    gone = sorted(set(conf.learners) - set(view.members))
    new = sorted(set(view.members) - set(conf.learners) - set(conf.voters))
    return [ConfChangeSingle(ConfChangeType.REMOVE_NODE, each) for each in gone] + [
        ConfChangeSingle(ConfChangeType.ADD_LEARNER_NODE, each) for each in new
    ]


def _voter_change(view: LeaderView, wanted: set[int], now: float) -> ConfChangeV2 | None:
    """From the present voters to the wanted ones in one step, if both can agree on it now."""
    present = set(view.conf_state.voters)
    if not all(_can_agree(view, voters, now) for voters in (present, wanted)):
        return None
    promoted = [
        ConfChangeSingle(ConfChangeType.ADD_NODE, each) for each in sorted(wanted - present)
    ]
    demoted = [
        ConfChangeSingle(
            ConfChangeType.ADD_LEARNER_NODE if each in view.members else ConfChangeType.REMOVE_NODE,
            each,
        )
        for each in sorted(present - wanted)
    ]
    return ConfChangeV2(changes=(*promoted, *demoted))


def _can_agree(view: LeaderView, voters: Collection[int], now: float) -> bool:
    answering = sum(_silence(view, each, now) <= RECENT_S for each in voters)
    return answering > len(voters) // 2


def _silence(view: LeaderView, raft_id: int, now: float) -> float:
    """Seconds since a replica was heard of; of the leader itself 0."""
    if raft_id == view.leader:
        return 0.0
    health = view.health.get(raft_id)
    # Not heard of at all: silent since we began to lead, not since ever.
    return now - (health.last_contact if health else view.leading_since)


def _wanted_voters(view: LeaderView, settings: AgreedSettings, now: float) -> set[int]:
    present = set(view.conf_state.voters)
    eligible = {each for each, member in view.members.items() if _may_vote(member)}
    silent = {each for each in present if _silence(view, each, now) > settings.dead_after_s}
    living = {
        each
        for each in eligible
        if (each in present and each not in silent) or _is_ready(view, each, settings, now)
    }
    if not living:
        # Somebody must vote: the one that leads, whatever it is.
        return {view.leader}
    dead = (eligible & silent) - living
    # One step up at a time; three new voters at once all have to be asked before anything commits.
    most = min(settings.voters_max, len(present) + 2)
    size = _best_size(len(living), len(dead), _odd(most))
    chosen = _spread(view, living, size)
    return chosen | _spread(view, dead, size - len(chosen))


def _told_voters(view: LeaderView, settings: AgreedSettings, now: float) -> set[int]:
    """Without autopilot: the present ones, but as the operator said of each."""
    told = {
        each
        for each, member in view.members.items()
        if member.role == "voter" and _is_ready(view, each, settings, now)
    }
    staying = {
        each
        for each in view.conf_state.voters
        if each in view.members and view.members[each].role != "learner"
    }
    return told | staying or {view.leader}


def _may_vote(member: Member) -> bool:
    return member.role == "voter" or (member.role == "auto" and member.may_vote)


def _is_ready(view: LeaderView, raft_id: int, settings: AgreedSettings, now: float) -> bool:
    """Whether a learner would vote well from its first moment."""
    health = view.health.get(raft_id)
    if health is None or health.near_since is None or now - health.last_contact > RECENT_S:
        return False
    return now - health.near_since >= settings.stability_s


def _odd(count: int) -> int:
    """The greatest odd number up to this one."""
    return count - 1 + count % 2


def _best_size(living: int, dead: int, most: int) -> int:
    """How many should vote, the living first: those that outlive the most further losses, and of
    equals the most. So a dead voter without a replacement stays a voter while it costs nothing.
    """

    def merit(size: int) -> tuple[int, int]:
        return min(living, size) - (size // 2 + 1), size

    return max(range(1, min(living + dead, most) + 1, 2), key=merit)


def _spread(view: LeaderView, candidates: Iterable[int], count: int) -> set[int]:
    """Up to count of them: pinned ones first, then always from the region with the fewest; of
    equals one that votes already, best of all the leader.
    """
    left = set(candidates)
    taken: list[int] = []
    per_region: Counter[str] = Counter()

    def rank(raft_id: int) -> tuple[bool, int, bool, bool, int]:
        member = view.members[raft_id]
        return (
            member.role != "voter",
            per_region[member.region],
            raft_id != view.leader,
            raft_id not in view.conf_state.voters,
            raft_id,
        )

    while left and len(taken) < count:
        best = min(left, key=rank)
        left.remove(best)
        taken.append(best)
        per_region[view.members[best].region] += 1
    return set(taken)


def _clean_up(view: LeaderView, settings: AgreedSettings, now: float) -> RemoveMember | None:
    """Expel a learner that has been silent for as long as the cluster agreed on."""
    if not settings.remove_dead_after_s:
        return None
    # Not whom the operator wants to vote: that one is waited for.
    learners = [each for each in view.conf_state.learners if view.members[each].role != "voter"]
    longest = max(learners, key=lambda each: _silence(view, each, now), default=0)
    if longest and _silence(view, longest, now) > settings.remove_dead_after_s:
        return RemoveMember(peer=view.members[longest].peer)
    return None

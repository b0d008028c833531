"""Changing who votes: one node at a time, or any number at once through a joint configuration.

The simple protocol changes at most one voter, so that every majority before and after shares one.
Anything larger goes through a joint configuration, in which the old voters (outgoing) and the new
ones (incoming) must both agree; it is entered by one entry and left by another. A voter that
becomes a learner stays a voter of the outgoing half and is named in `learners_next` until that half
is gone. Source: Ongaro's thesis, 4; the rules and their texts are etcd's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from ollamamax_p2p.consensus.core.messages import (
    NOBODY,
    ConfChange,
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
)
from ollamamax_p2p.consensus.core.progress import Inflights, Progress, ProgressMap
from ollamamax_p2p.consensus.core.quorum import JointConfig, MajorityConfig


class ConfChangeRefused(ValueError):
    """The change does not fit the configuration; `str()` says why in the field's words."""


@dataclass(frozen=True)
class TrackerConfig:
    """A configuration: who votes, who only learns."""

    voters: JointConfig = field(default_factory=JointConfig)
    learners: frozenset[int] = frozenset()
    learners_next: frozenset[int] = frozenset()
    """Voters of the outgoing half that become learners once it is gone."""
    auto_leave: bool = False
    """Whether the leader leaves the joint configuration by itself."""

    def __str__(self) -> str:
        words = [f"voters={self.voters}"]
        if self.learners:
            words.append(f"learners={MajorityConfig(self.learners)}")
        if self.learners_next:
            words.append(f"learners_next={MajorityConfig(self.learners_next)}")
        if self.auto_leave:
            words.append("autoleave")
        return " ".join(words)

    def conf_state(self) -> ConfState:
        """As it is written to snapshots."""
        return ConfState(
            voters=tuple(sorted(self.voters.incoming)),
            learners=tuple(sorted(self.learners)),
            voters_outgoing=tuple(sorted(self.voters.outgoing)),
            learners_next=tuple(sorted(self.learners_next)),
            auto_leave=self.auto_leave,
        )


class Changer:
    """Works out what a change makes of a configuration; changes nothing itself.

    Each method gives the new configuration and progress, or raises ConfChangeRefused.
    """

    def __init__(
        self,
        config: TrackerConfig,
        progress: ProgressMap,
        *,
        last_index: int,
        max_inflight: int,
        max_inflight_bytes: int = 0,
    ) -> None:
        """last_index: where probing of a node that is added begins."""
        self._config = config
        self._progress = progress
        self._last_index = last_index
        self._max_inflight = max_inflight
        self._max_inflight_bytes = max_inflight_bytes

    def simple(self, changes: Sequence[ConfChangeSingle]) -> tuple[TrackerConfig, ProgressMap]:
        """Carry out a change of one voter at most, and any number of learners."""
        draft = self._draft()
        if self._config.voters.is_joint:
            raise ConfChangeRefused("can't apply simple config change in joint config")
        draft.apply(changes)
        if len(self._config.voters.incoming ^ draft.incoming) > 1:
            raise ConfChangeRefused("more than one voter changed without entering joint config")
        return draft.finished()

    def enter_joint(
        self, changes: Sequence[ConfChangeSingle], *, auto_leave: bool
    ) -> tuple[TrackerConfig, ProgressMap]:
        """Make the voters of now the outgoing half, and carry out the changes on the incoming."""
        draft = self._draft()
        if self._config.voters.is_joint:
            raise ConfChangeRefused("config is already joint")
        if not self._config.voters.incoming:
            # Adding nodes to an empty configuration makes sense only from a snapshot.
            raise ConfChangeRefused("can't make a zero-voter config joint")
        draft.outgoing = set(draft.incoming)
        draft.apply(changes)
        draft.auto_leave = auto_leave
        return draft.finished()

    def leave_joint(self) -> tuple[TrackerConfig, ProgressMap]:
        """Drop the outgoing half; those in learners_next become learners."""
        draft = self._draft()
        if not self._config.voters.is_joint:
            raise ConfChangeRefused("can't leave a non-joint config")
        for node in draft.learners_next:
            draft.learners.add(node)
            draft.progress[node].is_learner = True
        draft.learners_next = set()
        for node in draft.outgoing:
            if node not in draft.incoming and node not in draft.learners:
                del draft.progress[node]
        draft.outgoing = set()
        draft.auto_leave = False
        return draft.finished()

    def _draft(self) -> "_Draft":
        _check(self._config, self._progress)
        return _Draft(
            incoming=set(self._config.voters.incoming),
            outgoing=set(self._config.voters.outgoing),
            learners=set(self._config.learners),
            learners_next=set(self._config.learners_next),
            auto_leave=self._config.auto_leave,
            progress={node: each.copied() for node, each in self._progress.items()},
            changer=self,
        )

    def _new_progress(self, *, is_learner: bool) -> Progress:
        progress = Progress(
            match=0,
            # Its log is empty or not known; the probing finds out, and a snapshot is sent rather
            # than everything from the start, if there is one.
            next=max(self._last_index, 1),
            inflights=Inflights(self._max_inflight, self._max_inflight_bytes),
            is_learner=is_learner,
        )
        # Else the next check of the quorum, which may be near, would take it for dead.
        progress.recent_active = True
        return progress


@dataclass
class _Draft:
    incoming: set[int]
    outgoing: set[int]
    learners: set[int]
    learners_next: set[int]
    auto_leave: bool
    progress: ProgressMap
    changer: Changer

    def apply(self, changes: Iterable[ConfChangeSingle]) -> None:
        for change in changes:
            if change.node_id == NOBODY:
                # An entry whose change was refused elsewhere is replaced by this.
                continue
            match change.type:
                case ConfChangeType.ADD_NODE:
                    self._make_voter(change.node_id)
                case ConfChangeType.ADD_LEARNER_NODE:
                    self._make_learner(change.node_id)
                case ConfChangeType.REMOVE_NODE:
                    self._remove(change.node_id)
                # UPDATE_NODE changes nothing here.
        if not self.incoming:
            raise ConfChangeRefused("removed all voters")

    def _make_voter(self, node: int) -> None:
        progress = self.progress.get(node)
        if progress is None:
            self.progress[node] = self.changer._new_progress(is_learner=False)
        else:
            progress.is_learner = False
        self.incoming.add(node)
        self.learners.discard(node)
        self.learners_next.discard(node)

    def _make_learner(self, node: int) -> None:
        progress = self.progress.get(node)
        if progress is None:
            self.progress[node] = self.changer._new_progress(is_learner=True)
            self.learners.add(node)
            return
        if progress.is_learner:
            return
        self._remove(node)
        self.progress[node] = progress
        if node in self.outgoing:
            # It votes in the outgoing half still, and nobody may be voter and learner at once.
            self.learners_next.add(node)
        else:
            progress.is_learner = True
            self.learners.add(node)

    def _remove(self, node: int) -> None:
        if node not in self.progress:
            return
        self.incoming.discard(node)
        self.learners.discard(node)
        self.learners_next.discard(node)
        if node not in self.outgoing:
            del self.progress[node]

    def finished(self) -> tuple[TrackerConfig, ProgressMap]:
        config = TrackerConfig(
            voters=JointConfig(MajorityConfig(self.incoming), MajorityConfig(self.outgoing)),
            learners=frozenset(self.learners),
            learners_next=frozenset(self.learners_next),
            auto_leave=self.auto_leave,
        )
        _check(config, self.progress)
        return config, self.progress


def _check(config: TrackerConfig, progress: ProgressMap) -> None:
    """What must hold of every configuration; a breach is our own fault."""
    everybody = config.voters.ids() | config.learners | config.learners_next
    assert everybody <= progress.keys(), "a node of the configuration has no progress"
    assert config.learners_next <= config.voters.outgoing, "learners_next must be outgoing voters"
    assert not any(progress[node].is_learner for node in config.learners_next)
    assert not config.learners & config.voters.ids(), "nobody is voter and learner at once"
    assert all(progress[node].is_learner for node in config.learners)
    assert config.voters.is_joint or not (config.learners_next or config.auto_leave)


def restore(changer: Changer, state: ConfState) -> tuple[TrackerConfig, ProgressMap]:
    """The configuration that a snapshot describes. The changer must be that of an empty one.

    Raises ConfChangeRefused if no sequence of changes leads there.
    """

    def singles(kind: ConfChangeType, nodes: Iterable[int]) -> list[ConfChangeSingle]:
        return [ConfChangeSingle(kind, node) for node in nodes]

    outgoing = singles(ConfChangeType.ADD_NODE, state.voters_outgoing)
    incoming = [
        *singles(ConfChangeType.REMOVE_NODE, state.voters_outgoing),
        *singles(ConfChangeType.ADD_NODE, state.voters),
        *singles(ConfChangeType.ADD_LEARNER_NODE, state.learners),
        # Voters of the outgoing half, which the change therefore puts into learners_next.
        *singles(ConfChangeType.ADD_LEARNER_NODE, state.learners_next),
    ]
    config, progress = changer._config, changer._progress
    for change in outgoing or incoming:
        # One by one: each is a change of one voter.
        config, progress = _following(changer, config, progress).simple([change])
    if not outgoing:
        return config, progress
    following = _following(changer, config, progress)
    return following.enter_joint(incoming, auto_leave=state.auto_leave)


def _following(changer: Changer, config: TrackerConfig, progress: ProgressMap) -> Changer:
    return Changer(
        config,
        progress,
        last_index=changer._last_index,
        max_inflight=changer._max_inflight,
        max_inflight_bytes=changer._max_inflight_bytes,
    )


def as_v2(change: ConfChange | ConfChangeV2) -> ConfChangeV2:
    """The change in its newer form."""
    if isinstance(change, ConfChangeV2):
        return change
    single = ConfChangeSingle(change.type, change.node_id)
    return ConfChangeV2(changes=(single,), context=change.context)


def leaves_joint(change: ConfChangeV2) -> bool:
    """Whether it is the empty change, by which a joint configuration is left."""
    return not change.changes and change.transition is ConfChangeTransition.AUTO


def joint_transition(change: ConfChangeV2) -> tuple[bool, bool]:
    """Whether the change goes through a joint configuration, and whether that is left by itself."""
    if change.transition is ConfChangeTransition.AUTO and len(change.changes) <= 1:
        return False, False
    return True, change.transition is not ConfChangeTransition.JOINT_EXPLICIT


_v1_decoder = msgspec.msgpack.Decoder(ConfChange)
_v2_decoder = msgspec.msgpack.Decoder(ConfChangeV2)

CONF_CHANGE_BYTES_MAX = 64 * 1024
"""Of an encoded change: a few thousand nodes, and context."""


def conf_change_entry(change: ConfChange | ConfChangeV2) -> tuple[EntryType, bytes]:
    """Type and data of the entry that carries the change. Raises ValueError if it is too long."""
    if change == ConfChangeV2():
        return EntryType.CONF_CHANGE_V2, b""
    data = msgspec.msgpack.encode(change)
    if len(data) > CONF_CHANGE_BYTES_MAX:
        raise ValueError(f"a change of {len(data)} bytes, the limit is {CONF_CHANGE_BYTES_MAX}")
    if isinstance(change, ConfChange):
        return EntryType.CONF_CHANGE, data
    return EntryType.CONF_CHANGE_V2, data


def decode_conf_change(entry: Entry) -> ConfChange | ConfChangeV2:
    """The change that an entry carries. Raises ValueError (msgspec's) if it carries none."""
    if len(entry.data) > CONF_CHANGE_BYTES_MAX:
        raise ValueError(f"a change of {len(entry.data)} bytes")
    if entry.type is EntryType.CONF_CHANGE:
        return _v1_decoder.decode(entry.data)
    if not entry.data:
        return ConfChangeV2()
    return _v2_decoder.decode(entry.data)


_TYPE_NAMES = {
    ConfChangeType.ADD_NODE: "ConfChangeAddNode",
    ConfChangeType.REMOVE_NODE: "ConfChangeRemoveNode",
    ConfChangeType.UPDATE_NODE: "ConfChangeUpdateNode",
    ConfChangeType.ADD_LEARNER_NODE: "ConfChangeAddLearnerNode",
}
_TRANSITION_NAMES = {
    ConfChangeTransition.AUTO: "ConfChangeTransitionAuto",
    ConfChangeTransition.JOINT_IMPLICIT: "ConfChangeTransitionJointImplicit",
    ConfChangeTransition.JOINT_EXPLICIT: "ConfChangeTransitionJointExplicit",
}


def describe_conf_change(change: ConfChange | ConfChangeV2) -> str:
    """As it is logged."""
    if isinstance(change, ConfChange):
        words = [f"type:{_TYPE_NAMES[change.type]} node_id:{change.node_id}"]
    else:
        words = [f"transition:{_TRANSITION_NAMES[change.transition]}"]
        words += [
            f"changes:{{type:{_TYPE_NAMES[each.type]} node_id:{each.node_id}}}"
            for each in change.changes
        ]
    if change.context:
        words.append(f'context:"{change.context.decode("latin-1")}"')
    return " ".join(words)

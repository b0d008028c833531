"""What happens in a simulated Raft cluster, decided before it begins: a Plan, drawn from a seed.

Swarm testing (Groce et al., ISSTA 2012): each seed enables a random subset of the faults, each with
a random intensity, because some bugs show only where another fault is absent: a leader that is cut
off all the time never has its log compacted.

A plan is data. An action happens at a step, and names nodes by a number that is taken modulo those
there are, or by what they do then (`LEADER`); so any action can be left out and the rest still
means something. That is what makes a failing plan shrink (`raft_runs.shrink`).
"""

import random
from dataclasses import dataclass, field, replace
from enum import Enum

from ollamamax_p2p.consensus import ConsensusSettings

LEADER = -1
"""In the place of a node's number: whoever leads the highest term then."""

STALE = -2
"""Whoever leads, but not the highest term: a leader that does not know yet that it is none."""

CLIENTS = 10
KEYS = 3
"""Few, so that operations meet."""


class Do(Enum):
    """What an action is. `span`: how long it lasts, in election timeouts."""

    ASK = "ask"
    """A client begins an operation, at a node, if it has none under way."""
    POWER_CUT = "power cut"
    """A node stops, and what it had not synced is lost, torn or reordered; back after `span`."""
    KILL = "kill"
    """A node's process ends; its disk forgets nothing. Back after `span`."""
    STOP = "stop"
    """A node closes its log and comes back."""
    BLACKOUT = "blackout"
    """The power of all nodes."""
    PAUSE = "pause"
    """A node's process is frozen, and goes on with what has come meanwhile."""
    CUT_BOTH = "cut both ways"
    """Nodes in `group` and the others do not reach each other."""
    CUT_IN = "cut in"
    """Nodes in `group` hear nothing from the others."""
    CUT_OUT = "cut out"
    """Nodes in `group` are not heard by the others."""
    CLOG = "clog"
    """Messages between two nodes are held, and then come all at once."""
    SLOW_DISK = "slow disk"
    """Writes of a node take `amount` times as long."""
    FULL_DISK = "full disk"
    """A node's log can't be written."""
    FULL_STORE = "full store"
    """A node's state machine can't be written."""
    DYING_DISK = "dying disk"
    """A node's next sync fails, which ends it."""
    ADD_LEARNER = "add learner"
    """A new node is started and added."""
    PROMOTE = "promote"
    """A learner becomes a voter."""
    DEMOTE = "demote"
    """A voter becomes a learner."""
    REMOVE = "remove"
    """A member goes, for ever."""
    REPLACE = "replace"
    """A new node comes and a voter goes, in one joint change."""
    RESHAPE = "reshape"
    """Two members change their parts in one joint change, left explicitly or by itself."""
    LEAVE_JOINT = "leave joint"
    TRANSFER = "transfer"
    """The leader hands over to another voter."""
    SNAPSHOT = "snapshot"
    """A node makes a snapshot and compacts its log."""


FAULTS: dict[Do, float] = {
    # How often it is enabled.
    Do.POWER_CUT: 0.6,
    Do.KILL: 0.4,
    Do.STOP: 0.2,
    Do.BLACKOUT: 0.15,
    Do.PAUSE: 0.4,
    Do.CUT_BOTH: 0.5,
    Do.CUT_IN: 0.3,
    Do.CUT_OUT: 0.3,
    Do.CLOG: 0.4,
    Do.SLOW_DISK: 0.4,
    Do.FULL_DISK: 0.35,
    Do.FULL_STORE: 0.15,
    Do.DYING_DISK: 0.15,
    Do.ADD_LEARNER: 0.4,
    Do.PROMOTE: 0.4,
    Do.DEMOTE: 0.25,
    Do.REMOVE: 0.25,
    Do.REPLACE: 0.25,
    Do.RESHAPE: 0.3,
    Do.TRANSFER: 0.4,
    Do.SNAPSHOT: 0.3,
}

MOMENTS = ("elected", "voted", "fetched", "written", "refused", "applied", "snapshot")
"""Just after these a node has the most to lose."""

_STOPS = frozenset({Do.POWER_CUT, Do.KILL, Do.STOP, Do.BLACKOUT, Do.DYING_DISK})


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that happens."""

    step: int
    do: Do
    node: int = LEADER
    other: int = 0
    """A second node, a client's number."""
    group: tuple[int, ...] = ()
    span: float = 0.0
    amount: float = 0.0
    what: str = ""
    """Of ASK: kind of operation and key. Of a power cut or kill: it waits for this event, one of
    MOMENTS, and strikes the node that it happens on; "": it happens at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that a run follows from."""

    seed: int
    steps: int
    voters: int
    settings: ConsensusSettings
    loss: float = 0.0
    """Of messages, this share is lost."""
    replay: float = 0.0
    """This share comes twice, the second time up to `replay_spread` election timeouts later."""
    replay_spread: float = 1.0
    reorders: bool = False
    """Whether a message may overtake another of its link."""
    delay_s: float = 0.005
    """Of a message, on average."""
    delay_tail: float = 0.0
    """This share takes up to an election timeout."""
    disk_s: float = 0.002
    """Of a write, on average."""
    drift: tuple[float, ...] = ()
    """How fast each node's clock runs, by number."""
    lease_reads: bool = False
    """Some reads rest on leases. Then clocks drift within what those stand and nobody restarts."""
    probes: bool = False
    """Reads are also asked where they are most likely stale: from a new leader at once, which is
    also written to, from one that was frozen before it finds what came meanwhile (etcd#20418),
    from an old one after its successor has answered."""
    told_of_loss: float = 0.3
    """Of messages that are lost, the sender hears about this share."""
    actions: tuple[Action, ...] = field(default=(), repr=False)

    @property
    def election_s(self) -> float:
        """The shortest election timeout."""
        return self.settings.election_ticks * self.settings.tick_s


def draw_plan(seed: int, steps: int = 3_000) -> Plan:
    """The plan of a seed. Three, five and seven voters take turns."""
    rng = random.Random(f"raft plan {seed}")
    lease_reads = rng.random() < 0.25
    plan = Plan(
        seed=seed,
        steps=steps,
        voters=(3, 5, 7)[seed % 3],
        settings=_settings(rng),
        loss=rng.choice([0, 0.02, 0.1, rng.uniform(0, 0.3)]),
        replay=rng.choice([0, 0.02, 0.1, rng.uniform(0, 0.3)]),
        replay_spread=rng.choice([0.2, 2, 6]),
        reorders=rng.random() < 0.5,
        delay_s=rng.choice([0.002, 0.01, 0.03]),
        delay_tail=rng.choice([0, 0, 0.02, 0.1]),
        disk_s=rng.choice([0.001, 0.005, 0.03]),
        drift=_drift(rng, within=0.04 if lease_reads else 1.0),
        lease_reads=lease_reads,
        probes=lease_reads or rng.random() < 0.7,
        told_of_loss=rng.choice([0, 0.3, 1]),
    )
    actions = _draw_asks(rng, steps, lease_reads=lease_reads) + _draw_faults(rng, plan)
    actions.sort(key=lambda action: action.step)
    return replace(plan, actions=tuple(actions))


def _settings(rng: random.Random) -> ConsensusSettings:
    election_ticks = rng.choice([5, 6, 10])
    max_message_bytes = rng.choice([150, 1_000, 64 * 1024])
    return ConsensusSettings(
        heartbeat_ticks=rng.choice([1, 1, 2]),
        election_ticks=election_ticks,
        max_message_bytes=max_message_bytes,
        max_inflight_messages=rng.choice([2, 4, 16]),
        max_inflight_bytes=max_message_bytes * rng.choice([1, 3, 100]),
        max_uncommitted_bytes=rng.choice([600, 1024 * 1024]),
        proposals_waiting_max=rng.choice([4, 64]),
        snapshot_entries=rng.choice([8, 25, 100_000]),
        trailing_entries=rng.choice([0, 4, 15]),
        segment_bytes=rng.choice([1_024, 4_096, 65_536]),
        disk_stall_s=0.05 * election_ticks * rng.choice([1, 2]),
        quorum_timeout_s=0.05 * election_ticks * rng.choice([3, 8]),
        request_timeout_s=0.05 * election_ticks * rng.choice([10, 20]),
    )


def _drift(rng: random.Random, *, within: float) -> tuple[float, ...]:
    """Between half and twice as fast, where there is any; `within`: less."""
    spread = rng.choice([0.0, 0.1, 1.0]) * within
    return tuple(2 ** rng.uniform(-spread, spread) for _ in range(16))


_ASKS = ("put",) * 5 + ("read",) * 6 + ("cas",) * 3 + ("append", "get", "acquire", "fenced", "free")


def _draw_asks(rng: random.Random, steps: int, *, lease_reads: bool) -> list[Action]:
    density = rng.choice([0.05, 0.1, 0.2])
    to_leader = rng.choice([0.2, 0.5, 0.8])
    kinds = _ASKS + ("lease read",) * 12 if lease_reads else _ASKS
    asks = []
    for step in range(steps):
        if rng.random() >= density:
            continue
        if rng.random() < to_leader:
            node = STALE if rng.random() < 0.3 else LEADER
        else:
            node = rng.randrange(64)
        what = f"{rng.choice(kinds)} {rng.randrange(KEYS)}"
        asks.append(Action(step, Do.ASK, node, rng.randrange(CLIENTS), what=what))
    return asks


def _draw_faults(rng: random.Random, plan: Plan) -> list[Action]:
    enabled = [
        do
        for do, share in FAULTS.items()
        if rng.random() < share and not (plan.lease_reads and do in _STOPS)
    ]
    if plan.lease_reads:
        # What leases are most easily broken by, and not so much else that nobody is elected.
        others = [do for do in enabled if rng.random() < 0.3]
        enabled = list(dict.fromkeys([Do.TRANSFER, Do.PAUSE, *others]))
    if not enabled:
        return []
    weights = [rng.choice([1, 3, 9]) for _ in enabled]
    gap = rng.choice([90, 150] if plan.lease_reads else [25, 60, 150])
    actions = []
    step = rng.randrange(gap)
    while step < plan.steps:
        do = rng.choices(enabled, weights)[0]
        action = _draw_fault(rng, step, do)
        if plan.lease_reads and do is Do.PAUSE:
            action = replace(action, node=LEADER, span=rng.uniform(0.3, 3))
        actions.append(action)
        if do is Do.RESHAPE:
            actions.append(Action(step + rng.randrange(gap), Do.LEAVE_JOINT))
        elif do is Do.TRANSFER and Do.PAUSE in enabled and rng.random() < 0.5:
            # The old leader sleeps through the election of the new one.
            span = rng.uniform(0.1, 0.8)
            actions.append(Action(step + rng.randrange(1, 8), Do.PAUSE, span=span))
        elif do is Do.FULL_DISK and Do.POWER_CUT in enabled and rng.random() < 0.5:
            # What the full disk has left of a write is found at the start, and still no room.
            actions[-1] = replace(action, span=rng.uniform(2, 5))
            actions.append(Action(step + 1, Do.POWER_CUT, span=0.1, what="refused"))
        step += 1 + int(rng.expovariate(1 / gap))
    return actions


def _draw_fault(rng: random.Random, step: int, do: Do) -> Action:
    return Action(
        step,
        do,
        node=LEADER if rng.random() < 0.4 else rng.randrange(64),
        other=rng.randrange(64),
        group=tuple(sorted(rng.sample(range(16), rng.randint(1, 8)))),
        span=rng.choice([0.05, 0.5, 2, 5]) * rng.uniform(0.5, 1.5),
        amount=rng.choice([3, 20, 200]),
        what=rng.choice(["", *MOMENTS]) if do in (Do.POWER_CUT, Do.KILL) else "",
    )

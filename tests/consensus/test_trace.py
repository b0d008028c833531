"""State traces of whole clusters keep the invariants of etcd's specification."""

import json
import random
from typing import Any

import pytest

from ollamamax_p2p.consensus.core.tracing import EVENT_NAMES, to_ndjson
from tests.consensus.raft_core_cluster import ELECTION_TICKS, Cluster
from tests.consensus.trace_invariants import InvariantBroken, TraceChecker, is_sorted


def traced(seed: int) -> list[dict[str, Any]]:
    """A cluster of three and a learner, in which leaders change and nodes are cut off."""
    lines: list[bytes] = []
    rng = random.Random(seed)
    cluster = Cluster(
        3, 1, trace=lambda event: lines.append(to_ndjson(event)), async_storage_writes=False
    )
    for turn in range(12):
        cluster.cut(*rng.sample(range(1, 5), rng.randrange(3)))
        cluster[rng.randint(1, 3)].raw.campaign()
        cluster.settle()
        for member in cluster.members.values():
            if member.role.name == "LEADER":
                member.raw.propose(b"%d" % turn)
        cluster.settle()
        cluster.tick(2)
    cluster.heal()
    cluster.tick(4 * ELECTION_TICKS)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("seed", range(10))
def test_the_invariants_hold_of_every_trace(seed: int) -> None:
    checker = TraceChecker()
    events = traced(seed)
    checker.follow(events)
    assert {event["name"] for event in events} <= EVENT_NAMES
    assert len({event["state"]["term"] for event in events}) > 5
    assert all(map(is_sorted, checker.logs.values()))
    assert len(set(map(tuple, checker.logs.values()))) == 1, "after the healing all are equal"


def test_the_fields_are_those_that_the_specification_reads() -> None:
    events = traced(0)
    assert all({"name", "nid", "state", "role", "log", "conf"} <= event.keys() for event in events)
    assert events[0] == {
        "name": "InitState",
        "nid": "1",
        "state": {"term": 0, "vote": "0", "commit": 1},
        "role": "StateFollower",
        "log": 1,
        "conf": [[], []],
    }
    sent = next(event for event in events if event["name"] == "SendAppendEntriesRequest")
    assert sent["msg"].keys() == {
        "type",
        "term",
        "from",
        "to",
        "entries",
        "logTerm",
        "index",
        "commit",
        "vote",
        "reject",
        "rejectHint",
    }
    assert sent["prop"] == {"match": 1, "next": 2}


def leading(node: str, term: int, log: int, commit: int = 1) -> dict[str, Any]:
    return {
        "name": "Commit",
        "nid": node,
        "state": {"term": term, "vote": node, "commit": commit},
        "role": "StateLeader",
        "log": log,
        "conf": [["1", "2", "3"], []],
    }


BEGIN = [{**leading(node, 1, 1), "name": "InitState", "role": "StateFollower"} for node in "123"]


@pytest.mark.parametrize(
    ("forged", "broken"),
    [
        ([leading("1", 2, 2), leading("2", 2, 2)], "MoreThanOneLeaderInv"),
        ([leading("1", 2, 2, commit=2)], "QuorumLogInv"),
        ([leading("1", 2, 1), {**leading("1", 2, 1, commit=2), "name": "Ready"}], "CommittedIs"),
        ([{**leading("1", 1, 2), "role": "StateFollower"}], "the trace fits its logs"),
    ],
)
def test_a_forged_trace_is_found(forged: list[dict[str, Any]], broken: str) -> None:
    with pytest.raises(InvariantBroken, match=broken):
        TraceChecker().follow([*BEGIN, *forged])


@pytest.mark.parametrize(
    ("logs", "commits", "leader", "broken"),
    [
        # Two nodes have committed different entries at one place.
        (([0, 2], [0, 3], [0, 2]), (2, 2, 1), "", "LogInv"),
        # The same term at one index, and something else before it.
        (([0, 2, 4], [0, 3, 4], [0]), (1, 1, 1), "", "LogMatchingInv"),
        # The newest log lacks what another has committed.
        (([0, 2], [0, 3], [0, 2]), (2, 1, 1), "", "MoreUpToDateCorrectInv"),
        # A follower has an entry of the leader's term that the leader has not.
        (([0], [0, 7], [0]), (1, 1, 1), "1", "ElectionSafetyInv"),
        # A leader whose log is shorter than what was committed before its term.
        (([0, 2], [0, 3, 5], [0, 2]), (1, 2, 1), "1", "LeaderCompletenessInv"),
    ],
)
def test_a_state_that_breaks_an_invariant_is_found(
    logs: tuple[list[int], ...], commits: tuple[int, ...], leader: str, broken: str
) -> None:
    checker = TraceChecker()
    for node, log, commit in zip("123", logs, commits, strict=True):
        checker.logs[node] = list(log)
        checker.last[node] = {
            **leading(node, 7, len(log), commit),
            "role": "StateLeader" if node == leader else "StateFollower",
        }
    with pytest.raises(InvariantBroken, match=broken):
        checker.check(checker.last["3"])

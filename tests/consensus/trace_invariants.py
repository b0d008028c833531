"""The invariants of etcd's TLA+ specification of Raft, over a state trace.

A trace tells how long each log is, not what is in it. That follows: a leader only appends entries
of its own term, and what a follower takes is a part of the log of the leader that sent it. What was
there at the beginning counts as an entry of term 0.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise, permutations
from typing import Any

Event = dict[str, Any]
Log = list[int]
"""The terms of its entries."""


class InvariantBroken(AssertionError):
    """Names the invariant, as the specification does."""


class TraceChecker:
    """Follows one trace of all nodes, in order."""

    def __init__(self) -> None:
        self.logs: dict[str, Log] = defaultdict(list)
        self.leader_logs: dict[int, Log] = {}
        """By term: a leader's log while it led."""
        self.last: dict[str, Event] = {}
        self.heard: dict[str, Event] = {}
        """The leader's message that a node has not answered yet."""

    def follow(self, events: Iterable[Event]) -> None:
        """Raises InvariantBroken."""
        for event in events:
            self.take(event)

    def take(self, event: Event) -> None:
        node, name, term = event["nid"], event["name"], event["state"]["term"]
        self.last[node] = event
        if name == "ReceiveAppendEntriesRequest":
            self.heard[node] = event["msg"]
        elif name == "SendAppendEntriesResponse" and event["msg"]["to"] != node:
            # A list of its own: an earlier one may be what it held when it led.
            self.logs[node] = self.received(self.heard.pop(node), term, self.logs[node])
        log = self.logs[node]
        if name == "InitState":
            log.extend([0] * (event["log"] - len(log)))
        elif event["role"] == "StateLeader":
            log.extend([term] * (event["log"] - len(log)))
            self.require("MoreThanOneLeaderInv", self.leader_logs.setdefault(term, log) is log)
        self.require("the trace fits its logs", len(log) == event["log"])
        self.check(event)

    def received(self, message: Event, term: int, log: Log) -> Log:
        """The log of a node after a leader's message."""
        if message["term"] < term or message["type"] == "MsgHeartbeat":
            return log
        theirs = self.leader_logs[message["term"]]
        before, end = message["index"], message["index"] + message["entries"]
        if log[:before] != theirs[:before]:
            return log
        agree = log[before:end] == theirs[before:end]
        return log if agree else theirs[:end]

    @staticmethod
    def require(name: str, holds: bool) -> None:
        if not holds:
            raise InvariantBroken(name)

    # -- the eight

    def check(self, event: Event) -> None:
        """All that can have changed with this event."""
        committed = {
            node: self.logs[node][: last["state"]["commit"]] for node, last in self.last.items()
        }
        if event["name"] == "Ready":
            self.require("CommittedIsDurableInv", event["state"]["commit"] <= event["log"])
        for one, other in permutations(committed, 2):
            shorter = min(len(committed[one]), len(committed[other]))
            self.require("LogInv", committed[one][:shorter] == committed[other][:shorter])
            self.check_pair(one, other, committed[other])
        self.check_quorums(event, committed[event["nid"]])

    def check_pair(self, one: str, other: str, committed: Log) -> None:
        log, theirs = self.logs[one], self.logs[other]
        for index in range(min(len(log), len(theirs)), 0, -1):
            if log[index - 1] == theirs[index - 1]:
                self.require("LogMatchingInv", log[:index] == theirs[:index])
                break
        ours, of_other = ((each[-1:], len(each)) for each in (log, theirs))
        if ours >= of_other:
            self.require("MoreUpToDateCorrectInv", log[: len(committed)] == committed)
        last = self.last[one]
        if last["role"] == "StateLeader":
            term = last["state"]["term"]
            self.require("ElectionSafetyInv", log.count(term) >= theirs.count(term))
            older = [entry for entry in committed if entry < term]
            self.require("LeaderCompletenessInv", log[: len(older)] == older)

    def check_quorums(self, event: Event, committed: Log) -> None:
        for half in filter(None, event["conf"]):
            if not self.last.keys() >= set(half):
                continue  # Not all have begun.
            lacking = [node for node in half if self.logs[node][: len(committed)] != committed]
            self.require("QuorumLogInv", 2 * len(lacking) <= len(half))


def is_sorted(log: Log) -> bool:
    """Whether terms never fall."""
    return all(before <= after for before, after in pairwise(log))

"""How many entries Raft's core takes when nothing but the core costs time.

    python benchmarks/bench_raft_core.py [--json] [--entries N] [--batch N] [--nodes N] [--sync]

Nodes in one process and thread, logs in memory, no codec: entries per second from the proposal to
being applied on all of them. The bar is 50,000 at batches of 64 on three nodes.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    ConfState,
    Message,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.core.raw_node import RaftConfig, RawNode, hard_state_of
from ollamamax_p2p.consensus.ram_log import RamLog

COMMAND = bytes(256)


class Cluster:
    """Nodes that hand each other their messages at once."""

    def __init__(self, count: int, *, asynchronous: bool) -> None:
        ids = tuple(range(1, count + 1))
        self.asynchronous = asynchronous
        self.logs = {node: self.new_log(ids) for node in ids}
        self.nodes = {
            node: RawNode(
                RaftConfig(
                    id=node,
                    storage=self.logs[node],
                    rng=random.Random(node),
                    applied=1,
                    async_storage_writes=asynchronous,
                    check_quorum=True,
                    pre_vote=True,
                )
            )
            for node in ids
        }
        self.applied = dict.fromkeys(ids, 0)
        self.messages: deque[Message] = deque()

    def new_log(self, ids: tuple[int, ...]) -> RamLog:
        log = RamLog()
        log.install_snapshot(Snapshot(SnapshotMetadata(1, 1, ConfState(voters=ids))))
        return log

    def settle(self) -> None:
        """Until nobody has anything to do."""
        busy = True
        while busy:
            busy = False
            for node, raw in self.nodes.items():
                if raw.has_ready():
                    busy = True
                    self.handle_ready(node, raw)
            while self.messages:
                busy = True
                message = self.messages.popleft()
                self.deliver(message)

    def handle_ready(self, node: int, raw: RawNode) -> None:
        ready = raw.ready()
        self.messages.extend(ready.messages)
        if self.asynchronous:
            return
        if ready.entries or ready.hard_state:
            self.logs[node].append(ready.entries, ready.hard_state)
        self.applied[node] += len(ready.committed_entries)
        raw.advance()

    def deliver(self, message: Message) -> None:
        if message.to == LOCAL_APPEND_THREAD:
            self.logs[message.from_].append(message.entries, hard_state_of(message))
            self.messages.extend(message.responses)
        elif message.to == LOCAL_APPLY_THREAD:
            self.applied[message.from_] += len(message.entries)
            self.messages.extend(message.responses)
        else:
            self.nodes[message.to].step(message)


def run(*, nodes: int, entries: int, batch: int, asynchronous: bool) -> float:
    """Entries per second."""
    cluster = Cluster(nodes, asynchronous=asynchronous)
    leader = cluster.nodes[1]
    leader.campaign()
    cluster.settle()
    before = cluster.applied[1]
    commands = [COMMAND] * batch
    begun = time.perf_counter()
    for _ in range(entries // batch):
        leader.propose_batch(commands)
        cluster.settle()
    seconds = time.perf_counter() - begun
    done = entries // batch * batch
    assert {count - before for count in cluster.applied.values()} == {done}
    return done / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=0, help="default: 1, 64 and 256")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--sync", action="store_true", help="ready and advance, no async storage")
    given = parser.parse_args()
    for batch in (given.batch,) if given.batch else (1, 64, 256):
        entries = min(given.entries, 10_000 * batch)
        rate = run(nodes=given.nodes, entries=entries, batch=batch, asynchronous=not given.sync)
        if given.json:
            figure = {
                "name": "raft_core_entries_per_s",
                "value": round(rate),
                "batch": batch,
                "nodes": given.nodes,
                "async_storage_writes": not given.sync,
                "python": platform.python_version(),
            }
            print(json.dumps(figure))
        else:
            print(f"{given.nodes} nodes, batches of {batch}: {rate:,.0f} entries/s")


if __name__ == "__main__":
    main()

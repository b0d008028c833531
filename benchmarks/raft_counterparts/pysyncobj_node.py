"""One PySyncObj node, run by `bench_raft.py` with an interpreter that has PySyncObj.

    python pysyncobj_node.py OWN OTHER OTHER [--no-batch]

Each line that comes in is a JSON object: in_flight, seconds. Answered by one line. A command that
is answered begins the next one from its callback, in PySyncObj's own thread: no other is woken.
"""

import argparse
import json
import threading
import time
from importlib.metadata import version
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, replicated

COMMAND_BYTES = 256


class KeyValue(SyncObj):
    def __init__(self, own: str, others: list[str], configuration: SyncObjConf) -> None:
        super().__init__(own, others, configuration)
        self.values: dict[str, bytes] = {}

    @replicated
    def put(self, key: str, value: bytes) -> bytes:
        self.values[key] = value
        return value


def measure(node: KeyValue, in_flight: int, seconds: float) -> dict[str, float]:
    taken: list[float] = []
    failed: list[Any] = []
    running = in_flight
    over = threading.Event()
    clock = time.perf_counter
    begun = clock()
    until = begun + seconds

    def propose(key: str) -> None:
        at = clock()

        def answered(_result: Any, error: Any) -> None:
            nonlocal running
            after = clock()
            if error:
                failed.append(error)
            else:
                taken.append(after - at)
            if after < until:
                propose(key)
                return
            running -= 1
            if not running:
                over.set()

        node.put(key, value, callback=answered)

    value = b"v" * (COMMAND_BYTES - len("key000000000"))
    for number in range(in_flight):
        propose(f"key{number:09}")
    over.wait(seconds + 60)
    elapsed = clock() - begun
    taken.sort()
    return {
        "count": len(taken),
        "failed": len(failed),
        "seconds": elapsed,
        "p50_ms": 1000 * taken[len(taken) // 2],
        "p99_ms": 1000 * taken[int(0.99 * (len(taken) - 1))],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("own")
    parser.add_argument("others", nargs="*")
    parser.add_argument("--no-batch", action="store_true")
    given = parser.parse_args()
    configuration = SyncObjConf(appendEntriesUseBatch=not given.no_batch)
    node = KeyValue(given.own, given.others, configuration)
    print(json.dumps({"version": version("pysyncobj")}), flush=True)
    while True:
        asked = json.loads(input())
        if asked.get("do") == "leads":
            print(json.dumps({"leads": bool(node._isLeader() and node.isReady())}), flush=True)
        else:
            print(json.dumps(measure(node, asked["in_flight"], asked["seconds"])), flush=True)


if __name__ == "__main__":
    main()

"""One replica in a process of its own, told what to do by `bench_raft.py`, line by line.

Each line that comes in is a JSON object with "do"; each is answered by one line. Everything heavy
is imported before the first, so that a process can stand ready.
"""

import hashlib
import json
import os
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from ollamamax_p2p.cluster.cluster_state import open_cluster_state
from ollamamax_p2p.cluster.core.commands import (
    Done,
    SetChunkMap,
    SetTag,
    decode_result,
    encode_command,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    HardState,
    Snapshot,
)
from ollamamax_p2p.consensus.core.sessions import SESSION_ENDED, Proposal, encode_proposal
from ollamamax_p2p.consensus.file_log import open_file_log
from ollamamax_p2p.consensus.replica import Command, bootstrap_log, open_replica
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.snapshot_streams import open_snapshot_streams
from ollamamax_p2p.consensus.stream_transport import open_stream_transport
from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.host import HostSettings
from ollamamax_p2p.host.libp2p_host import open_libp2p_host
from ollamamax_p2p.identity import key_from_seed, parse_address
from ollamamax_p2p.testing.key_value import KeyValue, Put, encode_request

Row = TypeVar("Row")

COMMAND_BYTES = 256
NODES_MAX = 16
ACKS_KEPT = 20_000


def key_seed(raft_id: int) -> bytes:
    return hashlib.sha256(b"benchmark node %d" % raft_id).digest()


PEERS = {number: key_from_seed(key_seed(number)).peer_id for number in range(1, NODES_MAX + 1)}
IDS = {peer: number for number, peer in PEERS.items()}


def command(key: int) -> bytes:
    """A put of COMMAND_BYTES in all, as a client sends it."""
    name = f"key{key:09}"
    empty = len(encode_request(Put(name, bytes(200))))
    value = b"v" * (COMMAND_BYTES - (empty - 200))
    data = encode_request(Put(name, value))
    assert len(data) == COMMAND_BYTES
    return data


class Node:
    """A replica, and whoever uses it."""

    def __init__(self) -> None:
        self.acks: deque[float] = deque(maxlen=ACKS_KEPT)
        self.streaming = trio.CancelScope()

    async def open(self, stack: AsyncExitStack, given: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        self.raft_id = given["id"]
        folder = Path(given["folder"])
        settings = ConsensusSettings(**given.get("settings", {}))
        self.host = await stack.enter_async_context(
            open_libp2p_host(
                key_seed(self.raft_id),
                HostSettings(listen=("/ip4/127.0.0.1/tcp/0",), relay=False),
                swarm_key=hashlib.sha256(b"benchmark").digest() if given["private"] else None,
                admit_all=True,
            )
        )
        log_begun = time.perf_counter()
        log = open_file_log(folder / "log", settings)
        log_s = time.perf_counter() - log_begun
        if given.get("voters") and not log.last_index():
            bootstrap_log(log, given["voters"])
        if given["state"] == "sqlite":
            self.state: Any = open_cluster_state(folder / "state")
        else:
            self.state = KeyValue()
        calls = trio.CapacityLimiter(1)
        replicas: list[Any] = []
        transport = await stack.enter_async_context(
            open_stream_transport(
                self.host,
                peer_of=PEERS.get,
                id_of=IDS.get,
                deliver=lambda messages: [each.deliver(messages) for each in replicas] and None,
                report_unreachable=lambda one: (
                    [each.report_unreachable(one) for each in replicas] and None
                ),
                settings=settings,
            )
        )
        snapshots = await stack.enter_async_context(
            open_snapshot_streams(
                self.host, self.state, is_member=IDS.__contains__, settings=settings, calls=calls
            )
        )
        self.replica = await stack.enter_async_context(
            open_replica(
                self.raft_id,
                log,
                self.state,
                transport,
                settings=settings,
                rng=random.Random(os.urandom(8)),
                fetch_snapshot=lambda one, metadata: snapshots.fetch(PEERS[one], metadata),
                calls=calls,
                session_ended=SESSION_ENDED.__eq__,
            )
        )
        replicas.append(self.replica)
        self.nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(self.nursery.cancel_scope.cancel)
        return {
            "addresses": [str(each) for each in self.host.addresses],
            "seconds": time.perf_counter() - begun,
            "log_seconds": log_s,
        }

    # -- what can be asked for

    async def connect(self, given: dict[str, Any]) -> dict[str, Any]:
        for each in given["to"]:
            await self.host.connect([parse_address(address) for address in each])
        return {}

    async def status(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.replica.status()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "leader": found.leader,
            "term": found.term,
            "applied": found.applied,
            "committed": found.committed,
            "last": found.last_index,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "lag": max((each.lag for each in found.members), default=0),
            "active": sum(each.is_active for each in found.members),
        }

    async def puts(self, given: dict[str, Any]) -> dict[str, Any]:
        return await self.measure(given, lambda key: self.replica.propose(command(key)))

    async def reads(self, given: dict[str, Any]) -> dict[str, Any]:
        return await self.measure(given, lambda key: self.replica.read())

    async def measure(self, given: dict[str, Any], ask: Any) -> dict[str, Any]:
        taken: list[float] = []
        clock = time.perf_counter
        begun = clock()
        until = begun + given["seconds"]

        async def one(key: int) -> None:
            now = clock()
            while now < until:
                await ask(key)
                after = clock()
                taken.append(after - now)
                now = after

        async with trio.open_nursery() as nursery:
            for key in range(given["in_flight"]):
                nursery.start_soon(one, key)
        seconds = clock() - begun
        taken.sort()
        return {
            "count": len(taken),
            "seconds": seconds,
            "p50_ms": 1000 * taken[len(taken) // 2],
            "p99_ms": 1000 * taken[int(0.99 * (len(taken) - 1))],
        }

    async def stream(self, given: dict[str, Any]) -> dict[str, Any]:
        """Begin to propose one command after the other, and to note when each is answered."""

        async def propose() -> None:
            with self.streaming:
                while True:
                    try:
                        await self.replica.propose(command(0))
                    except OmxError:
                        continue
                    # On Linux the same clock in all processes.
                    self.acks.append(time.perf_counter())
                    await trio.sleep(given["pause_s"])

        self.nursery.start_soon(propose)
        return {}

    async def gap(self, given: dict[str, Any]) -> dict[str, Any]:
        """How long none of them was answered around that time; 0 if none has been since."""
        around = given["around"]
        before = [at for at in self.acks if at <= around]
        after = [at for at in self.acks if at > around]
        if not before or not after:
            return {"gap_s": 0.0}
        # What was on its way may still be answered just after; the gap is behind it then.
        near = [before[-1], *after]
        gaps = [two - one for one, two in pairwise(near)]
        return {"gap_s": max(gaps)}

    async def cpu(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"cpu_s": time.process_time()}

    async def add(self, given: dict[str, Any]) -> dict[str, Any]:
        change = ConfChangeSingle(ConfChangeType.ADD_LEARNER_NODE, given["id"])
        await self.replica.change_members(ConfChangeV2(changes=(change,)))
        return {"at": time.perf_counter()}

    async def snapshot(self, given: dict[str, Any]) -> dict[str, Any]:
        metadata = await self.replica.make_snapshot()
        index = metadata.index if metadata else self.replica.status().snapshot_index
        reader = self.state.open_snapshot(self.state.newest_snapshot())
        size = reader.size
        reader.close()
        return {"index": index, "bytes": size}

    async def applied(self, given: dict[str, Any]) -> dict[str, Any]:
        await self.replica.wait_applied(given["index"])
        return {"at": time.perf_counter()}


def fill_log(given: dict[str, Any]) -> dict[str, Any]:
    """A log with so many entries of term 1, in batches of 64, as if its node had been there."""
    log = open_file_log(Path(given["folder"]) / "log", ConsensusSettings())
    bootstrap_log(log, given["voters"])
    first, count = log.last_index() + 1, given["entries"]
    for start in range(first, first + count, 64):
        batch = [
            Entry(1, index, data=encode_proposal(Proposal(0, 0, b"", command(index % 1000))))
            for index in range(start, min(start + 64, first + count))
        ]
        log.append(batch, HardState(1, 0, start), sync=False)
    log.append((), HardState(1, 0, log.last_index()))
    last = log.last_index()
    log.close()
    return {"last": last}


def fill_state(given: dict[str, Any]) -> dict[str, Any]:
    """A cluster's state with a large catalogue, and a log that begins behind it."""
    folder = Path(given["folder"])
    state = open_cluster_state(folder / "state")
    state.apply([Command(1, 1, b"", conf_state=ConfState(voters=(given["id"],)))])
    filled = 0
    for page in batched(catalogue(given["tags"], given["chunk_maps"]), 5_000):
        commands = [
            Command(index, 1, encode_command(each))
            for index, each in enumerate(page, state.applied_index + 1)
        ]
        filled += sum(isinstance(decode_result(each), Done) for each in state.apply(commands))
    metadata = state.make_snapshot(1)
    state.close()
    log = open_file_log(folder / "log", ConsensusSettings())
    log.install_snapshot(Snapshot(metadata), HardState(1, 0, metadata.index))
    log.close()
    return {"filled": filled}


def catalogue(tags: int, chunk_maps: int) -> Iterator[SetTag | SetChunkMap]:
    """Commands that each add a row."""
    for number in range(tags):
        name = f"{'h' * 60}.example/{'n' * 60}/{'m' * 60}:{'t' * 50}{number}"
        yield SetTag(name=name, manifest=digest(number))
    for number in range(chunk_maps):
        yield SetChunkMap(blob=digest(number), chunk_map=digest(~number), size=number)


def digest(number: int) -> str:
    return f"sha256:{hashlib.sha256(b'%d' % number).hexdigest()}"


def batched(rows: Iterable[Row], count: int) -> Iterator[list[Row]]:
    rest = iter(rows)
    while page := list(islice(rest, count)):
        yield page


async def serve() -> None:
    node = Node()
    inbound = trio.lowlevel.FdStream(os.dup(0))
    say_lock = trio.Lock()

    async def answer(given: dict[str, Any]) -> None:
        try:
            said = await getattr(node, given["do"])(given)
        except OmxError as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        async with say_lock:
            say(said)

    async with AsyncExitStack() as stack:
        rest = b""
        while data := await inbound.receive_some():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                given = json.loads(line)
                match given["do"]:
                    case "open":
                        say(await node.open(stack, given))
                    case "fill_log":
                        say(fill_log(given))
                    case "fill_state":
                        say(fill_state(given))
                    case _:
                        await answer(given)


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    say({"ready": True})
    trio.run(serve)

"""A Raft cluster of real processes, a bad network between them, and clients that note all they see.

Every pair of members has one TcpProxy, through which the one with the lower id dials the other.
Clients are tasks of the test, so that one counter orders all they do (`History`). Nothing here
decides by the clock: a fault lasts until so many operations were done or tried meanwhile.

What is drawn by chance comes from one seeded generator; how the machine schedules does not, so a
seed repeats the faults and the requests, not the run.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from ollamamax_p2p.consensus.core.messages import ConfChangeType
from ollamamax_p2p.testing.key_value import (
    Acquire,
    Append,
    CompareAndSet,
    Delete,
    Get,
    Put,
    Release,
    Request,
    Result,
    decode_result,
    encode_request,
)
from ollamamax_p2p.testing.linearizability import (
    FencedResource,
    History,
    LeaseModel,
    ValueModel,
    assert_linearizable,
    fencing_faults,
    key_of,
)
from tests.network.forking import Child, Forker
from tests.network.tcp_proxy import TcpProxy, open_tcp_proxy

BUDGET_S = 150
"""Real seconds for one fault and what follows, on a busy machine: a guard against hanging."""

SETTINGS: dict[str, Any] = {
    "quorum_timeout_s": 2.0,
    "request_timeout_s": 6.0,
    "snapshot_entries": 150,
    "trailing_entries": 40,
    "segment_bytes": 256 * 1024,
}
"""Small, so that snapshots and new segments come often; the timing is that of a cluster."""

PATIENCE_S = 1.0
"""After which a client that may turn elsewhere does so; what it asked for stays unknown."""

KEYS = ("a", "b", "c")
LEASE = "lease"


class Refused(Exception):
    """The request certainly took no effect."""


class Unknown(Exception):
    """It may have, or may yet."""


@dataclass
class ChaosNode:
    """A member, of which one process at a time runs."""

    raft_id: int
    folder: Path
    voters: tuple[int, ...]
    """That its log begins with; none for who is added later."""
    child: Child | None = None
    control: trio.SocketStream | None = None
    port: int = 0
    paused: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    """The process that ran last has ended."""
    starts: int = 0
    speaking: trio.Lock = field(default_factory=trio.Lock)
    numbers: Any = field(default_factory=lambda: itertools.count(1))
    waiting: dict[int, tuple[trio.Event, dict[str, Any]]] = field(default_factory=dict)

    @property
    def is_up(self) -> bool:
        return self.control is not None

    def last_words(self) -> str:
        """Of the process that ran last."""
        lines = self.child.lines() if self.child else []
        return f"node {self.raft_id} is down: {lines[-1]['trace'] if lines else 'killed'}"

    async def ask(self, what: str, **arguments: Any) -> Any:
        """Raises Refused or Unknown."""
        if self.control is None:
            raise Refused("it is down")
        number = next(self.numbers)
        came, answer = self.waiting[number] = (trio.Event(), {})
        line = json.dumps({"number": number, "ask": what, "with": arguments})
        try:
            async with self.speaking:
                if self.control is None:
                    raise Refused("it is down")
                await self.control.send_all(line.encode() + b"\n")
            await came.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unknown("it ended") from None
        finally:
            self.waiting.pop(number, None)
        if "error" in answer:
            raise Refused(answer["error"]) if answer["never"] else Unknown(answer["error"])
        if "result" not in answer:
            raise Unknown("it ended")
        return answer["result"]

    async def listen(self, rest: bytes) -> None:
        """Take answers until the process has ended."""
        assert self.control is not None
        try:
            async for part in self.control:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
                    if answer["number"] in self.waiting:
                        came, place = self.waiting[answer["number"]]
                        place.update(answer)
                        came.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await self.control.aclose()
        self.control = None
        for came, _ in self.waiting.values():
            came.set()
        self.ended.set()


class ChaosCluster:
    """Members, the network between them, and what clients saw. Made by `open_chaos_cluster`."""

    def __init__(
        self, forker: Forker, nursery: trio.Nursery, folder: Path, rng: random.Random, port: int
    ) -> None:
        self.rng = rng
        self.nodes: dict[int, ChaosNode] = {}
        self.links: dict[tuple[int, int], TcpProxy] = {}
        self.history = History()
        self.resource = FencedResource()
        self.settings = dict(SETTINGS)
        self.value_bytes = 0
        """That clients add to each value they write, to fill disks."""
        self.done = 0
        self.tried = 0
        self.members: set[int] = set()
        """Whom clients ask."""
        self._forker = forker
        self._nursery = nursery
        self._folder = folder
        self._port = port
        self._happened = trio.Event()
        self._came: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._clients = trio.CancelScope()
        self._clients_over = trio.Event()

    # -- processes

    def add(self, raft_id: int, voters: Iterable[int] = (), folder: Path | None = None) -> None:
        """A member that does not run yet. folder: in the place of one of its own."""
        place = folder or self._folder / f"node{raft_id}"
        self.nodes[raft_id] = ChaosNode(raft_id, place, tuple(voters))
        self.members.add(raft_id)

    def forget(self, raft_id: int) -> None:
        """One that is removed and has ended: who starts from now on never hears of it."""
        del self.nodes[raft_id]
        self.links = {pair: link for pair, link in self.links.items() if raft_id not in pair}

    async def start(self, *raft_ids: int) -> None:
        """Start processes, and let them know each other."""
        for raft_id in raft_ids:
            await self._start(self.nodes[raft_id])

    async def _start(self, node: ChaosNode) -> None:
        for other in self.nodes:
            pair = (min(node.raft_id, other), max(node.raft_id, other))
            if other != node.raft_id and pair not in self.links:
                self.links[pair] = await self._nursery.start(self._run_proxy)
        node.starts += 1
        came, found = self._came[node.raft_id] = (trio.Event(), [])
        node.ended = trio.Event()
        node.child = self._forker.fork(
            "raft",
            self._folder / f"node{node.raft_id}.{node.starts}.said",
            raft_id=node.raft_id,
            folder=str(node.folder),
            settings=self.settings,
            voters=list(node.voters),
            seed=self.rng.getrandbits(32),
            control=self._port,
        )
        with trio.fail_after(BUDGET_S):
            await came.wait()
        node.control, hello, rest = found
        node.port = hello["port"]
        self._nursery.start_soon(node.listen, rest)
        for (low, high), proxy in self.links.items():
            if high == node.raft_id:
                proxy.target = node.port
            if node.raft_id in (low, high):
                await self._introduce(low, high, proxy)

    async def _run_proxy(
        self, *, task_status: trio.TaskStatus[TcpProxy] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with open_tcp_proxy(random.Random(self.rng.getrandbits(32))) as proxy:
            task_status.started(proxy)
            await trio.sleep_forever()

    async def _introduce(self, low: int, high: int, proxy: TcpProxy) -> None:
        for raft_id, other, port in ((low, high, proxy.port), (high, low, None)):
            node = self.nodes.get(raft_id)
            if node is not None and node.is_up and not node.paused:
                await node.ask("meet", raft_id=other, port=port)

    async def _accept(self, stream: trio.SocketStream) -> None:
        """A process dials back: its hello, and then it is the node's."""
        said = b""
        while b"\n" not in said:
            part = await stream.receive_some()
            if not part:
                return
            said += part
        line, _, rest = said.partition(b"\n")
        hello = json.loads(line)
        came, found = self._came[hello["raft_id"]]
        # A duplicate, because `serve_listeners` closes the stream when this returns.
        found += [trio.SocketStream(stream.socket.dup()), hello, rest]
        came.set()

    async def kill(self, raft_id: int) -> None:
        """SIGKILL; returns when it has ended."""
        node = self.nodes[raft_id]
        assert node.child is not None
        node.child.kill()
        await self.wait_ended(raft_id)

    async def wait_ended(self, raft_id: int) -> int:
        """Its exit code, negative for a signal, once it has ended by itself or was killed."""
        node = self.nodes[raft_id]
        with trio.fail_after(BUDGET_S):
            await node.ended.wait()
        child, node.child, node.paused = node.child, None, False
        assert child is not None
        return await trio.to_thread.run_sync(self._forker.wait, child)

    def pause(self, raft_id: int) -> None:
        node = self.nodes[raft_id]
        assert node.child is not None
        node.paused = True
        os.kill(node.child.pid, signal.SIGSTOP)

    def resume(self, raft_id: int) -> None:
        node = self.nodes[raft_id]
        assert node.child is not None
        os.kill(node.child.pid, signal.SIGCONT)
        node.paused = False

    # -- the network

    def links_of(self, raft_id: int) -> list[TcpProxy]:
        return [proxy for pair, proxy in self.links.items() if raft_id in pair]

    def heal(self) -> None:
        for proxy in self.links.values():
            proxy.heal()

    def deafen(self, raft_id: int, *, deaf: bool) -> None:
        """Hold one direction only: what comes to a member (deaf), or what it says (mute)."""
        for (low, high), proxy in self.links.items():
            if raft_id in (low, high):
                to_high = raft_id == high
                (proxy.forward if to_high == deaf else proxy.backward).hold()

    # -- what happens

    def _tell(self) -> None:
        happened, self._happened = self._happened, trio.Event()
        happened.set()

    async def operations(self, count: int, *, tried: bool = False) -> None:
        """Returns when clients have had so many more answers. tried: or failed."""
        began = self.tried if tried else self.done
        with trio.fail_after(BUDGET_S):
            while (self.tried if tried else self.done) - began < count:
                await self._happened.wait()

    async def who_leads(self, *, besides: int = 0) -> int:
        """Who leads the highest term, as asked just now; 0: nobody."""
        found = [(0, 0)]
        for node in list(self.nodes.values()):
            if node.raft_id != besides and node.is_up and not node.paused:
                with suppress(Refused, Unknown):
                    status = await node.ask("status")
                    if status["role"] == "leader":
                        found.append((status["term"], node.raft_id))
        return max(found)[1]

    async def leader(self, *, besides: int = 0) -> int:
        """As `who_leads`; waits until somebody does."""
        with trio.fail_after(BUDGET_S):
            while not (leader := await self.who_leads(besides=besides)):  # noqa: ASYNC110
                await trio.sleep(0.02)
        return leader

    async def until(self, raft_id: int, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Returns when a member's status is so."""
        with trio.fail_after(BUDGET_S):
            while not condition(await self.nodes[raft_id].ask("status")):  # noqa: ASYNC110
                await trio.sleep(0.02)

    async def all_serve(self, *raft_ids: int) -> None:
        """Returns when each member has answered a linearizable read and so has caught up."""
        for raft_id in raft_ids or sorted(self.members):
            await self._serves(raft_id)

    async def _serves(self, raft_id: int) -> None:
        with trio.fail_after(BUDGET_S):
            while True:
                node = self.nodes[raft_id]
                assert node.is_up, node.last_words()
                try:
                    await node.ask("read", key="none", lease=False)
                except (Refused, Unknown):
                    await trio.sleep(0.02)
                else:
                    return

    # -- members

    async def change(self, changes: list[tuple[ConfChangeType, int]], **wanted: set[int]) -> None:
        """Ask whoever leads until the configuration is what is wanted: voters, learners."""
        asked = [[int(kind), raft_id] for kind, raft_id in changes]
        with trio.fail_after(BUDGET_S):
            while True:
                leader = self.nodes[await self.leader()]
                try:
                    status = await leader.ask("status")
                    in_force = not status["voters_outgoing"] and status["role"] == "leader"
                    if in_force and all(set(status[k]) == v for k, v in wanted.items()):
                        return
                    with trio.move_on_after(PATIENCE_S):
                        await leader.ask("change", changes=asked)
                except (Refused, Unknown):
                    await trio.sleep(0.05)

    # -- clients

    async def _ask(
        self, node: ChaosNode, request: Request, client: str, *, patient: bool
    ) -> Result:
        """Through the log, and noted. Raises Refused or Unknown."""
        name = self.history.call(request, key=key_of(request), client=client)
        with trio.CancelScope() as waiting:
            if not patient:
                waiting.deadline = trio.current_time() + PATIENCE_S
            try:
                answer = await node.ask("propose", request=encode_request(request).hex())
            except Refused:
                self.history.refused(name)
                raise
            result = decode_result(bytes.fromhex(answer))
            self.history.returned(name, result)
            return result
        raise Unknown("the client gave up")

    async def _read(self, node: ChaosNode, key: str, client: str, *, lease: bool) -> bytes | None:
        """Linearizable, from the state of a node. What is not answered is not noted."""
        name = self.history.call(Get(key), key=key, client=client)
        answered = False
        try:
            found = await node.ask("read", key=key, lease=lease)
            value = None if found is None else bytes.fromhex(found)
            self.history.returned(name, Result(True, value))
            answered = True
            return value
        finally:
            if not answered:
                self.history.refused(name)

    async def _turn(self, node: ChaosNode, client: str, number: int, *, patient: bool) -> None:
        """One thing that a client does."""
        key = self.rng.choice(KEYS)
        value = f"{client}.{number},".encode() + bytes(self.value_bytes)
        match self.rng.randrange(10):
            case 0 | 1 | 2 | 3:
                with trio.CancelScope() as waiting:
                    if not patient:
                        waiting.deadline = trio.current_time() + PATIENCE_S
                    await self._read(node, key, client, lease=self.rng.random() < 0.5)
                return
            case 4 | 5:
                request: Request = Put(key, value)
            case 6 | 7:
                expected = await self._read(node, key, client, lease=False)
                request = CompareAndSet(key, expected, value)
            case 8:
                request = Append(key, value)
            case _:
                request = self.rng.choice([Get(key), Delete(key), Append(key, value)])
        await self._ask(node, request, client, patient=patient)

    def _choose(self, *, patient: bool) -> ChaosNode | None:
        """patient: also one that is paused, and keeps its clients waiting."""
        able = [self.nodes[each] for each in sorted(self.members) if self.nodes[each].is_up]
        able = [each for each in able if patient or not each.paused]
        return self.rng.choice(able) if able else None

    async def _client(self, name: str, *, patient: bool) -> None:
        """Ask without end. patient: wait for each answer until its node ends, also of one that is
        frozen; else turn to another.
        """
        for number in itertools.count():
            node = self._choose(patient=patient)
            try:
                if node is None:
                    raise Refused("all are down")
                await self._turn(node, name, number, patient=patient)
                self.done += 1
            except Unknown:
                name = f"{name.partition('/')[0]}/{number}"  # its last may still come
            except Refused:
                await trio.sleep(0.02)
            self.tried += 1
            self._tell()

    async def _lease_client(self, name: str) -> None:
        """Take the lease, use the resource, and release it, mostly; or take it from a holder that
        seems to be gone, which may be wrong.
        """
        for number in itertools.count():
            node, holder = self._choose(patient=False), f"{name}.{number}"
            try:
                if node is None:
                    raise Refused("all are down")
                result = await self._ask(node, Acquire(LEASE, holder), holder, patient=False)
                if result.ok:
                    for _ in range(self.rng.randrange(1, 4)):
                        self.resource.write(holder, result.token)
                        await self.operations(self.rng.randrange(8), tried=True)
                if result.ok or self.rng.random() < 0.3:
                    await self._ask(node, Release(LEASE, result.token), holder, patient=False)
                    if self.rng.random() < 0.3:  # one that does not know that it is over
                        self.resource.write(holder, result.token) if result.ok else None
            except (Refused, Unknown):
                await trio.sleep(0.02)
            self.tried += 1
            self._tell()

    async def run_clients(self, *, patient: int = 2, roaming: int = 3, leases: int = 2) -> None:
        """Let them ask until `finish`."""
        try:
            with self._clients:
                async with trio.open_nursery() as nursery:
                    for number in range(patient):
                        client = f"patient{number}"
                        nursery.start_soon(lambda name=client: self._client(name, patient=True))
                    for number in range(roaming):
                        client = f"roaming{number}"
                        nursery.start_soon(lambda name=client: self._client(name, patient=False))
                    for number in range(leases):
                        nursery.start_soon(self._lease_client, f"holder{number}")
        finally:
            self._clients_over.set()

    async def finish(self) -> None:
        """All faults are over: everybody serves, agrees, and nobody has seen what cannot be."""
        self._clients.cancel()
        await self._clients_over.wait()
        await self.all_serve()
        for raft_id in sorted(self.members):
            for key in KEYS:
                await self._read(self.nodes[raft_id], key, f"last of {raft_id}", lease=False)
        await self._agree()
        operations = self.history.operations
        values = [each for each in operations if each.key != f"lease {LEASE}"]
        (self._folder / "history").write_text("\n".join(map(repr, operations)))
        assert_linearizable(values, ValueModel())
        assert_linearizable([each for each in operations if each not in values], LeaseModel())
        assert fencing_faults(self.resource.writes) == []

    async def _agree(self) -> None:
        """Everybody has applied the same, and it is the same."""
        with trio.fail_after(BUDGET_S):
            while True:
                states = [await self.nodes[each].ask("state") for each in sorted(self.members)]
                if len({index for index, _ in states}) == 1:
                    break
                await trio.sleep(0.02)
        assert len({digest for _, digest in states}) == 1, states


@asynccontextmanager
async def open_chaos_cluster(
    forker: Forker,
    folder: Path,
    rng: random.Random,
    *,
    count: int = 3,
    folders: dict[int, Path] | None = None,
    **settings: Any,
) -> AsyncIterator[ChaosCluster]:
    """Voters 1 to count, which serve, and clients, which ask."""
    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        port = listener.socket.getsockname()[1]
        cluster = ChaosCluster(forker, nursery, folder, rng, port)
        cluster.settings |= settings
        nursery.start_soon(trio.serve_listeners, cluster._accept, [listener])
        for raft_id in range(1, count + 1):
            cluster.add(raft_id, range(1, count + 1), (folders or {}).get(raft_id))
        try:
            await cluster.start(*cluster.nodes)
            await cluster.all_serve()
            yield cluster
        finally:
            for node in cluster.nodes.values():
                if node.child is not None:
                    node.child.kill()
            nursery.cancel_scope.cancel()


# -- system calls that fail ----------------------------------------------------------------------


@contextmanager
def injected(pid: int, what: str, report: Path) -> Iterator[None]:
    """Let a process's system calls fail or be slow, by strace's --inject, while the block is open.

    what: such as "fdatasync:error=EIO:when=3". Each thread of the process counts for itself.
    """
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install strace")
    call = what.partition(":")[0]
    command = ["strace", "-f", "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={what}"]
    with subprocess.Popen(
        [*command, "-o", str(report)], stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"needs the right to trace a process: {said.strip()}")
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)  # it lets go, and the process goes on

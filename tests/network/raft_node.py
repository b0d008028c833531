"""One member of a Raft cluster as a process of its own: log on disk, py-libp2p, a key-value state.

It dials the test back on loopback, says where it listens, and then answers JSON lines, each in a
task of its own. `forking.Forker` starts it; `chaos.py` is the other side.
"""

import hashlib
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from ollamamax_p2p.consensus import (
    ConsensusSettings,
    Replica,
    bootstrap_log,
    open_file_log,
    open_replica,
    open_snapshot_streams,
    open_stream_transport,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    Message,
    SnapshotMetadata,
)
from ollamamax_p2p.content.durable_files import new_file, sync, sync_folder, translated, write_all
from ollamamax_p2p.errors import NotLeader, OmxError, PeerNotFound, ProposalDropped
from ollamamax_p2p.host import Connections, HostSettings, open_connections, open_libp2p_host
from ollamamax_p2p.identity import Membership, PeerId, key_from_seed, parse_address
from ollamamax_p2p.testing.key_value import KeyValue

HOST_SETTINGS = HostSettings(
    listen=("/ip4/127.0.0.1/tcp/0",),
    # Nobody listens there: members must reach each other through the proxies only.
    announce=("/ip4/127.0.0.1/tcp/1",),
    relay=False,
    heartbeat_interval_s=0.5,
    heartbeat_timeout_s=2.0,
    dial_timeout_s=5.0,
    reconnect_delay_s_min=0.1,
    reconnect_delay_s_max=0.5,
)


def key_seed(raft_id: int) -> bytes:
    return hashlib.sha256(b"raft node %d" % raft_id).digest()


def peer_id(raft_id: int) -> PeerId:
    return key_from_seed(key_seed(raft_id)).peer_id


def membership() -> Membership:
    """The same swarm for every process."""
    return Membership.create(None, token_bytes=lambda count: hashlib.sha256(b"s").digest()[:count])


class DurableKeyValue(KeyValue):
    """A KeyValue whose snapshots are on the disk, so that it needs no log from before them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._file = folder / "state"
        saved = self._file.read_bytes() if self._file.exists() else None
        super().__init__(saved)
        if saved is not None:
            self._keep(self._at(self.applied_term), saved)

    def _at(self, term: int) -> SnapshotMetadata:
        return SnapshotMetadata(self.applied_index, term, self.conf_state)

    def make_snapshot(self, term: int) -> SnapshotMetadata:
        self._save(self.save())
        return super().make_snapshot(term)

    def install_snapshot(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> None:
        if metadata.index > self.applied_index and len(self._received) == size:
            # On the disk before it is in force; a crash in between leaves a state that is ahead of
            # the log, which then adopts it.
            self._save(bytes(self._received))
        super().install_snapshot(metadata, size, sha256)

    def _save(self, data: bytes) -> None:
        folder = self._file.parent
        with translated(self._file, "write", len(data)), new_file(folder) as (path, descriptor):
            write_all(descriptor, data, 0)
            sync(descriptor)
            path.replace(self._file)
            sync_folder(folder)


async def run(command: dict[str, Any], say: Callable[..., None]) -> None:
    """Be a member until the process is killed or something is raised."""
    raft_id, folder = command["raft_id"], Path(command["folder"])
    settings = ConsensusSettings(**command["settings"])
    rng = random.Random(command["seed"])
    state = DurableKeyValue(folder)
    log = open_file_log(folder / "log", settings)
    if command["voters"] and not log.last_index():
        bootstrap_log(log, command["voters"])
    peers = {raft_id: peer_id(raft_id)}
    replicas: list[Replica] = []
    calls = trio.CapacityLimiter(1)

    def deliver(messages: list[Message]) -> None:
        for replica in replicas:
            replica.deliver(messages)

    def unreachable(member: int) -> None:
        for replica in replicas:
            replica.report_unreachable(member)

    def raft_id_of(peer: PeerId) -> int | None:
        return next((each for each, known in peers.items() if known == peer), None)

    swarm = membership()
    async with (
        open_libp2p_host(key_seed(raft_id), HOST_SETTINGS, swarm_key=swarm.swarm_key) as host,
        open_connections(
            host,
            swarm,
            HOST_SETTINGS,
            rng=rng,
            feed=None,
            agent="raft node",
            wall_clock=lambda: datetime.now(UTC).timestamp(),
        ) as connections,
        open_stream_transport(
            host,
            peer_of=peers.get,
            id_of=raft_id_of,
            deliver=deliver,
            report_unreachable=unreachable,
            settings=settings,
        ) as transport,
        open_snapshot_streams(
            host,
            state,
            is_member=lambda peer: raft_id_of(peer) is not None,
            settings=settings,
            calls=calls,
        ) as snapshots,
    ):

        async def fetch(member: int, metadata: SnapshotMetadata) -> None:
            if member not in peers:
                raise PeerNotFound(f"replica {member}")
            await snapshots.fetch(peers[member], metadata)

        async with open_replica(
            raft_id,
            log,
            state,
            transport,
            settings=settings,
            rng=rng,
            fetch_snapshot=fetch,
            calls=calls,
        ) as replica:
            replicas.append(replica)
            node = _Node(replica, state, calls, peers, connections)
            port = int(str(host.libp2p.get_transport_addrs()[0]).split("/tcp/")[1].split("/")[0])
            control = await trio.open_tcp_stream("127.0.0.1", command["control"])
            await _answer_all(control, node, {"raft_id": raft_id, "port": port})


class _Node:
    """What the test may ask for, one method each."""

    def __init__(
        self,
        replica: Replica,
        state: DurableKeyValue,
        calls: trio.CapacityLimiter,
        peers: dict[int, PeerId],
        connections: Connections,
    ) -> None:
        self._replica = replica
        self._state = state
        self._calls = calls
        self._peers = peers
        self._connections = connections

    async def meet(self, raft_id: int, port: int | None) -> None:
        """Know a member, and dial it if a port is given."""
        self._peers[raft_id] = peer_id(raft_id)
        if port is not None:
            address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id(raft_id)}"
            self._connections.keep([parse_address(address)])

    async def propose(self, request: str) -> str:
        return (await self._replica.propose(bytes.fromhex(request))).hex()

    async def read(self, key: str, lease: bool) -> str | None:
        await (self._replica.read_lease() if lease else self._replica.read())
        found = self._state.get(key)
        return None if found is None else found.hex()

    async def change(self, changes: list[tuple[int, int]]) -> None:
        singles = tuple(ConfChangeSingle(ConfChangeType(kind), node) for kind, node in changes)
        await self._replica.change_members(ConfChangeV2(changes=singles))

    async def transfer(self, raft_id: int) -> None:
        await self._replica.transfer_leader(raft_id)

    async def status(self) -> dict[str, Any]:
        return asdict(self._replica.status())

    async def state(self) -> list[Any]:
        """What is applied, and its hash."""
        async with self._calls:
            return [self._state.applied_index, self._state.state_hash().hex()]


async def _answer_all(control: trio.SocketStream, node: _Node, hello: dict[str, Any]) -> None:
    speaking = trio.Lock()

    async def tell(**facts: Any) -> None:
        async with speaking:
            await control.send_all(json.dumps(facts).encode() + b"\n")

    async def answer(number: int, job: Awaitable[Any]) -> None:
        try:
            result = await job
        except OmxError as error:
            never = isinstance(error, ProposalDropped | NotLeader)
            await tell(number=number, error=f"{type(error).__name__}: {error}", never=never)
        else:
            await tell(number=number, result=result)

    await tell(**hello)
    async with trio.open_nursery() as nursery:
        rest = b""
        async for part in control:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                job = getattr(node, asked["ask"])(**asked["with"])
                nursery.start_soon(answer, asked["number"], job)

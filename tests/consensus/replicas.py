"""Replicas on a wire that tests can cut, in one trio run on the virtual clock."""

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    Message,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.log_storage import LogStorage
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.replica import Replica, bootstrap_log, open_replica
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import BlobNotFound, NoSources, OmxError, PeerUnreachable
from ollamamax_p2p.testing.key_value import (
    Append,
    KeyValue,
    Request,
    Result,
    decode_result,
    encode_request,
)

DELAY_S = 0.001
"""Of every message."""


class Member:
    """One node: what survives its stops, and its replica while it runs."""

    def __init__(self, raft_id: int, cluster: "Cluster", log: LogStorage | None = None) -> None:
        self.raft_id = raft_id
        self.cluster = cluster
        self.log: LogStorage = RamLog() if log is None else log
        self.state = KeyValue()
        self.replica: Replica | None = None
        self.error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self.snapshots_fetched = 0

    def send(self, messages: Iterable[Message]) -> None:
        """As a Transport."""
        for message in messages:
            self.cluster.carry(message)

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        self._scope, self._over = trio.CancelScope(), trio.Event()
        try:
            with self._scope:
                async with open_replica(
                    self.raft_id,
                    self.log,
                    self.state,
                    self,
                    settings=self.cluster.settings,
                    rng=random.Random(f"{self.cluster.seed}/{self.raft_id}"),
                    fetch_snapshot=self.fetch,
                    blocking=False,
                ) as self.replica:
                    task_status.started()
                    await trio.sleep_forever()
        except* OmxError as error:
            self.error = error
        finally:
            self.replica = None
            self._over.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._over.wait()

    async def start(self) -> None:
        await self.cluster.nursery.start(self.run)

    @property
    def up(self) -> Replica:
        assert self.replica is not None
        return self.replica

    async def fetch(self, raft_id: int, metadata: SnapshotMetadata) -> None:
        source = self.cluster.members[raft_id]
        if not self.cluster.is_open(raft_id, self.raft_id):
            raise PeerUnreachable(str(raft_id), "the wire is cut")
        try:
            reader = source.state.open_snapshot(metadata)
        except BlobNotFound:
            raise NoSources("the snapshot", "there is a newer one") from None
        writer = self.state.receive_snapshot(metadata, reader.size, reader.sha256)
        await trio.sleep(DELAY_S)
        writer.write(reader.read(writer.received, reader.size))
        self.state.install_snapshot(metadata, reader.size, reader.sha256)
        self.snapshots_fetched += 1


class Cluster:
    """Members and the wires between them."""

    def __init__(self, nursery: trio.Nursery, settings: ConsensusSettings, seed: int) -> None:
        self.nursery = nursery
        self.settings = settings
        self.seed = seed
        self.members: dict[int, Member] = {}
        self.cut: set[tuple[int, int]] = set()
        self.lose: Callable[[Message], bool] = lambda _: False
        self.carried = 0

    def is_open(self, one: int, two: int) -> bool:
        return (one, two) not in self.cut

    def isolate(self, raft_id: int) -> None:
        for other in self.members:
            self.cut |= {(raft_id, other), (other, raft_id)}

    def heal(self) -> None:
        self.cut.clear()

    def carry(self, message: Message) -> None:
        self.carried += 1
        if self.is_open(message.from_, message.to) and not self.lose(message):
            self.nursery.start_soon(self._arrive, message)

    async def _arrive(self, message: Message) -> None:
        await trio.sleep(DELAY_S)
        member = self.members.get(message.to)
        if member is not None and member.replica is not None:
            member.replica.deliver([message])

    async def add(self, raft_id: int, log: LogStorage | None = None) -> Member:
        member = self.members[raft_id] = Member(raft_id, self, log)
        await member.start()
        return member

    async def leader(self, *, without: Iterable[int] = ()) -> Member:
        """Who leads the highest term, once somebody does; leaves out those that are cut off."""
        while True:
            leading = [
                each
                for each in self.members.values()
                if each.replica is not None
                and each.replica.leads
                and each.raft_id not in without
                and each.replica.status().has_quorum
            ]
            if leading:
                return max(leading, key=lambda each: each.up.status().term)
            await trio.sleep(0.01)

    async def settled(self, *raft_ids: int) -> None:
        """Everybody (or these) has applied the same."""
        leader = await self.leader()
        index = await leader.up.read()
        for raft_id in raft_ids or self.members:
            await self.members[raft_id].up.wait_applied(index)


@asynccontextmanager
async def open_cluster(
    count: int = 3,
    *,
    settings: ConsensusSettings | None = None,
    seed: int = 1,
    logs: dict[int, LogStorage] | None = None,
) -> AsyncIterator[Cluster]:
    with trio.fail_after(200):  # virtual seconds, so that a test that hangs fails
        async with trio.open_nursery() as nursery:
            cluster = Cluster(nursery, settings or ConsensusSettings(), seed)
            for raft_id in range(1, count + 1):
                log = (logs or {}).get(raft_id) or RamLog()
                if not log.last_index():
                    bootstrap_log(log, range(1, count + 1))
                await cluster.add(raft_id, log)
            yield cluster
            nursery.cancel_scope.cancel()


async def ask(replica: Replica, request: Request) -> Result:
    return decode_result(await replica.propose(encode_request(request)))


async def append_all(replica: Replica, key: str, values: Iterable[bytes]) -> None:
    """One after the other, each until it is known to be done."""
    for value in values:
        await ask(replica, Append(key, value))


def adds(raft_id: int, kind: ConfChangeType = ConfChangeType.ADD_LEARNER_NODE) -> ConfChangeV2:
    return ConfChangeV2(changes=(ConfChangeSingle(kind, raft_id),))

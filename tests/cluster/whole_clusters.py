"""Whole clusters on a simulated network and the virtual clock: door, links, replica, agreed state.

Ask for the fixtures `autojump_clock` and `repeatable` in the test.
"""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from ollamamax_p2p.cluster import (
    AboutThisNode,
    Cluster,
    found_place,
    open_cluster,
    save_admission,
)
from ollamamax_p2p.cluster.core.commands import SetSetting
from ollamamax_p2p.consensus import ConsensusSettings
from ollamamax_p2p.host import (
    Connections,
    HostSettings,
    SimulatedHost,
    SimulatedNetwork,
    open_connections,
    open_simulated_network,
)
from ollamamax_p2p.identity import Membership, Ticket
from ollamamax_p2p.observability import EventFeed

KEY = b"k" * 32
SWARM_ID = b"i" * 16
STARTS_AT = 1_800_000_000
SETTINGS = ConsensusSettings(segment_bytes=64 * 1024)
"""Small files: some tests copy a node's folder often."""


class Machine:
    """One node: its folder and host, and while it runs, its cluster."""

    def __init__(
        self, network: SimulatedNetwork, nursery: trio.Nursery, folder: Path, *, may_vote: bool
    ) -> None:
        self.folder = folder
        self.host: SimulatedHost = network.add_host(folder.name, swarm_key=KEY)
        self.peer = self.host.peer_id
        self.may_vote = may_vote
        self.clock_ahead_s = 0
        """How wrong its wall clock is."""
        self.cluster: Cluster | None = None
        self.connections: Connections | None = None
        self._network = network
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._over = trio.Event()

    async def start(self) -> None:
        await self._nursery.start(self._run)

    async def stop(self) -> None:
        """As a power cut would look to the others."""
        self._network.kill(self.host)
        self._scope.cancel()
        await self._over.wait()
        self._network.revive(self.host)

    def wall_clock(self) -> float:
        return wall_clock() + self.clock_ahead_s

    @property
    def up(self) -> Cluster:
        assert self.cluster is not None
        return self.cluster

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        self._scope, self._over = trio.CancelScope(), trio.Event()
        about = AboutThisNode(
            peer=self.peer, name=self.host.name, region="", may_vote=self.may_vote
        )
        ticket = Ticket(SWARM_ID, self.host.addresses, bytes(16), STARTS_AT, KEY)
        feed = EventFeed()
        try:
            with self._scope:
                async with (
                    open_cluster(
                        self.folder,
                        self.host,
                        about,
                        SWARM_ID,
                        KEY,
                        SETTINGS,
                        rng=random.Random(self.host.name),
                        feed=feed,
                        wall_clock=self.wall_clock,
                    ) as cluster,
                    open_connections(
                        self.host,
                        Membership.join(None, ticket),
                        HostSettings(),
                        rng=random.Random(self.host.name),
                        feed=feed,
                        agent=self.host.name,
                        wall_clock=self.wall_clock,
                        gate=cluster,
                    ) as connections,
                    cluster.following(connections),
                ):
                    self.cluster, self.connections = cluster, connections
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self.cluster = self.connections = None
            self._over.set()


def wall_clock() -> float:
    return STARTS_AT + trio.current_time()


class Machines:
    """Those of one cluster, the first its founder."""

    def __init__(self, network: SimulatedNetwork, nursery: trio.Nursery, folder: Path) -> None:
        self.network = network
        self._nursery = nursery
        self._folder = folder
        self._tickets = 0
        self.all: list[Machine] = []

    def __getitem__(self, index: int) -> Machine:
        return self.all[index]

    async def found(self) -> Machine:
        machine = self._machine(may_vote=True)
        found_place(machine.folder)
        await machine.start()
        await machine.up.change(SetSetting(key="stability_s", value=0))
        return machine

    async def add(self, *, may_vote: bool = True) -> Machine:
        """By a ticket of the founder's, as `omx join` would."""
        machine = self._machine(may_vote=may_vote)
        await self.admit(machine, self.all[0])
        return machine

    async def admit(self, machine: Machine, at: Machine) -> None:
        """By a ticket that the other one issues."""
        self._tickets += 1
        secret = self._tickets.to_bytes(16, "big")
        await at.up.issue_ticket(secret, uses=1, expires_at=int(wall_clock()) + 3600)
        save_admission(machine.folder, await at.up.redeem(secret, machine.peer, machine.host.name))
        await machine.start()
        assert machine.connections is not None
        await machine.connections.reach(at.host.addresses)

    def _machine(self, *, may_vote: bool) -> Machine:
        folder = self._folder / f"m{len(self.all) + 1}"
        folder.mkdir(parents=True)
        machine = Machine(self.network, self._nursery, folder, may_vote=may_vote)
        self.all.append(machine)
        return machine

    async def voters(self, *voting: Machine) -> None:
        """Returns once these are the voters, and every machine that runs knows it."""
        wanted = {machine.peer for machine in voting}
        running = [machine for machine in self.all if machine.cluster is not None]
        await until(lambda: all(voters_of(machine) == wanted for machine in running))


def voters_of(machine: Machine) -> set[str | None]:
    conf = machine.up.state.conf_state
    return {machine.up.peer_of(each) for each in (*conf.voters, *conf.voters_outgoing)}


async def until(condition: Callable[[], bool], *, within_s: float = 120) -> None:
    """Wait for what nobody tells; virtual seconds."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - that is what this is for
            await trio.sleep(0.05)


async def same_state(*machines: Machine) -> None:
    """Returns once they have applied the same, to the same state."""
    await until(lambda: len({each.up.state.hash_at() for each in machines}) == 1)


@asynccontextmanager
async def open_machines(
    folder: Path, *, voters: int = 1, learners: int = 0
) -> AsyncIterator[Machines]:
    """A cluster with this many voters and, behind them, members that do not vote."""
    async with (
        open_simulated_network(rng=random.Random(1)) as network,
        trio.open_nursery() as nursery,
    ):
        machines = Machines(network, nursery, folder)
        await machines.found()
        for _ in range(voters - 1):
            await machines.add()
        for _ in range(learners):
            await machines.add(may_vote=False)
        await machines.voters(*machines.all[:voters])
        await same_state(*machines.all)
        yield machines
        nursery.cancel_scope.cancel()

"""News of load over many nodes, round by round: what it costs and how fast it is known."""

import random

import msgspec
import pytest

from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.router.core.load_table import (
    GOSSIP,
    GOSSIP_BYTES_MAX,
    BackendLoad,
    BackendModels,
    GossipMessage,
    LoadNews,
    LoadTable,
)
from ollamamax_p2p.router.settings import RouterSettings

SETTINGS = RouterSettings()


class Swarm:
    """Tables that are each other's network: what is sent in a round arrives before the next."""

    def __init__(self, count: int, *, links: int, rng: random.Random) -> None:
        self.rng = rng
        self.now = 100.0
        self.peers = [f"12D3KooW{number:044d}" for number in range(count)]
        self.tables = {
            peer: LoadTable(peer=peer, epoch=1, settings=SETTINGS) for peer in self.peers
        }
        self.linked: dict[str, set[str]] = {peer: set() for peer in self.peers}
        for number, peer in enumerate(self.peers):
            for other in [self.peers[number - 1], *rng.sample(self.peers, links // 2)]:
                if other != peer:
                    self.linked[peer].add(other)
                    self.linked[other].add(peer)
        self.down: set[str] = set()
        self.messages = self.bytes = self.largest = 0

    def tell(self, peer: str, *, queued: int = 0, models: tuple[str, ...] = ("m:1b",)) -> None:
        self.tables[peer].tell(
            node=f"node {peer[-4:]}",
            draining=False,
            memory_free=2**34,
            memory_total=2**35,
            accelerator="A",
            backends=[
                BackendLoad(
                    name="ollama", slots=4, queued=queued, loaded=(LoadedModel(name="m:1b"),)
                )
            ],
            models=[
                BackendModels(name="ollama", models=tuple(ServableModel(name=n) for n in models))
            ],
            now=self.now,
        )

    def send(self, source: str, target: str, message: GossipMessage) -> None:
        waiting = [(source, target, message)]
        while waiting:
            source, target, message = waiting.pop(0)
            data = GOSSIP.encode(message)
            self.messages += 1
            self.bytes += len(data)
            self.largest = max(self.largest, len(data))
            if target in self.down:
                continue
            for answer in self.tables[target].hear(source, GOSSIP.decode(data), now=self.now):
                waiting.append((target, source, answer))

    def round(self) -> int:
        """How many messages it took."""
        before = self.messages
        self.now += SETTINGS.gossip_interval_s
        sent = [
            (peer, target, message)
            for peer, table in self.tables.items()
            if peer not in self.down
            for target, message in table.round(
                sorted(self.linked[peer] - self.down), now=self.now, rng=self.rng
            )
        ]
        for each in sent:
            self.send(*each)
        return self.messages - before

    def who_knows(self, peer: str, queued: int) -> int:
        found = 0
        for table in self.tables.values():
            node = table.node(peer)
            found += node is not None and node.report.backends[0].queued == queued
        return found

    def meet(self) -> None:
        """All know all, as after some minutes."""
        for peer in self.peers:
            self.tell(peer)
        reports = [self.tables[peer].node(peer) for peer in self.peers]
        for table in self.tables.values():
            for node in reports:
                assert node is not None
                news = LoadNews(reports=(aged(node.report),))
                table.hear(node.report.peer, news, now=self.now)
            table._telling.clear()


def test_x(rng):
    import time

    n = 1000
    swarm = Swarm(n, links=8, rng=rng)
    t = time.time()
    from ollamamax_p2p.router.core.load_table import AgedReport

    global aged
    aged = lambda r: AgedReport(report=r)
    swarm.meet()
    print("meet", time.time() - t)
    for r in range(16):
        t = time.time()
        b = swarm.bytes
        if r == 1:
            swarm.tell(swarm.peers[7], queued=3)
        m = swarm.round()
        tab = swarm.tables[swarm.peers[5]]
        print(
            r,
            m,
            (swarm.bytes - b) / n,
            swarm.largest,
            swarm.who_knows(swarm.peers[7], 3),
            len(tab._telling),
            tab.period_s(),
            sum(x.models_at == x.wanted for x in tab._nodes.values()),
            time.time() - t,
        )

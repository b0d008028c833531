"""News of load over many nodes, round by round: what it costs and how fast it is known."""

import random
from collections import Counter

import pytest

from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.router.core.load_table import (
    DIGEST_EVERY_ROUNDS,
    GOSSIP,
    GOSSIP_BYTES_MAX,
    BackendLoad,
    BackendModels,
    GossipMessage,
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
        self.kinds: Counter[str] = Counter()
        self.largest = 0

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
            self.kinds[type(message).__name__] += 1
            if target in self.down:
                continue
            data = GOSSIP.encode(message)
            self.largest = max(self.largest, len(data))
            answers = self.tables[target].hear(source, GOSSIP.decode(data), now=self.now)
            waiting += [(target, source, answer) for answer in answers]

    def round(self) -> Counter[str]:
        """How many messages of each kind it took."""
        before = self.kinds.copy()
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
        return self.kinds - before

    def rounds_until(self, known: "Knows", *, at_most: int) -> int:
        for number in range(at_most + 1):
            if all(known(self.tables[peer]) for peer in self.peers if peer not in self.down):
                return number
            self.round()
        raise AssertionError(f"not everybody knows after {at_most} rounds")


class Knows:
    """Whether a table has a node's report with so many waiting, or its models."""

    def __init__(self, peer: str, *, queued: int | None = None, model: str = "") -> None:
        self.peer, self.queued, self.model = peer, queued, model

    def __call__(self, table: LoadTable) -> bool:
        if self.model:
            return self.peer in {holder.peer for holder in table.holders(self.model)}
        node = table.node(self.peer)
        return node is not None and node.report.backends[0].queued == self.queued


def test_a_round_of_a_thousand_nodes_costs_each_a_few_bounded_messages(rng):
    """And a change is known to all of them within ten rounds."""
    swarm = Swarm(1_000, links=8, rng=rng)
    busy = swarm.peers[:5]
    for peer in busy:
        swarm.tell(peer)
    for number in range(4):
        cost = swarm.round()
        assert cost["LoadNews"] <= 1_000 * SETTINGS.gossip_fanout
        swarm.tell(busy[number], queued=number)
    swarm.tell(busy[-1], queued=77)
    assert swarm.rounds_until(Knows(busy[-1], queued=77), at_most=10) >= 3
    # Models are told to whoever asks, once each: a question and a page for each node and list.
    assert swarm.kinds["ModelsReport"] <= 1_000 * len(busy) * 1.1
    assert swarm.largest <= GOSSIP_BYTES_MAX


def test_all_know_of_all_when_every_node_has_something_to_tell(rng):
    swarm = Swarm(60, links=6, rng=rng)
    for number, peer in enumerate(swarm.peers):
        swarm.tell(peer, queued=number)
    for number, peer in enumerate(swarm.peers):
        swarm.rounds_until(Knows(peer, queued=number), at_most=10)
        swarm.rounds_until(Knows(peer, model="m:1b"), at_most=40)
    assert all(len(table.holders("m:1b")) == 60 for table in swarm.tables.values())


def test_a_newcomer_is_told_everything_at_once(rng):
    swarm = Swarm(30, links=6, rng=rng)
    newcomer = swarm.peers[-1]
    swarm.down.add(newcomer)
    for peer in swarm.peers[:-1]:
        swarm.tell(peer)
    for _ in range(20):
        swarm.round()
    swarm.down.clear()
    friend = next(iter(sorted(swarm.linked[newcomer])))
    for page in swarm.tables[newcomer].greet(now=swarm.now):
        swarm.send(newcomer, friend, page)
    assert len(swarm.tables[newcomer].nodes(now=swarm.now)) == 30
    swarm.round()
    assert len(swarm.tables[newcomer].holders("m:1b")) == 29


def test_what_pushing_missed_comes_with_a_digest(rng):
    swarm = Swarm(8, links=4, rng=rng)
    deaf = swarm.peers[3]
    for peer in swarm.peers:
        swarm.tell(peer)
    swarm.down.add(deaf)
    swarm.round()
    swarm.tell(swarm.peers[0], queued=5)
    for _ in range(8):  # Until nobody tells it any more.
        swarm.round()
    swarm.down.clear()
    swarm.rounds_until(Knows(swarm.peers[0], queued=5), at_most=2 * DIGEST_EVERY_ROUNDS)


def test_who_is_gone_is_forgotten_by_all(rng):
    swarm = Swarm(8, links=4, rng=rng)
    for peer in swarm.peers:
        swarm.tell(peer)
    for _ in range(10):
        swarm.round()
    gone = swarm.peers[2]
    swarm.down.add(gone)
    for _ in range(int(SETTINGS.dead_s / SETTINGS.gossip_interval_s) + 5):
        for peer in swarm.peers:
            swarm.tell(peer)
        swarm.round()
    for peer in swarm.peers:
        if peer != gone:
            known = {node.report.peer for node in swarm.tables[peer].nodes(now=swarm.now)}
            assert known == set(swarm.peers) - {gone}
            assert len(swarm.tables[peer].holders("m:1b")) == 7


@pytest.mark.parametrize("count", [50, 400])
def test_reports_become_rarer_where_they_would_not_fit_into_the_messages(rng, count):
    swarm = Swarm(3, links=2, rng=rng)
    table = swarm.tables[swarm.peers[0]]
    swarm.tell(swarm.peers[0])
    one = table.node(swarm.peers[0])
    capacity = GOSSIP_BYTES_MAX / (one.bytes + 32) / SETTINGS.gossip_repeats
    table._reports_bytes = count * one.bytes
    table._nodes |= {f"x{number}": one for number in range(count - 1)}
    rounds = table.period_s() / SETTINGS.gossip_interval_s
    assert rounds == pytest.approx(max(1.0, count / capacity), rel=0.02)

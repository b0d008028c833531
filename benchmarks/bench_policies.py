"""Which strategy answers soonest: a simulated day of a mixed swarm, once for each strategy.

    python benchmarks/bench_policies.py [--quick] [--json] [--write] [--only STRATEGY …] [--seed N]

Nine nodes (two large accelerators, four small ones, three without), eight models of 1 to 20 GB,
sixty users of whom few do much, conversations that grow with each turn, a working day with bursts.
Everything that decides is the product's own code (`Chooser`, `LoadTable`); what is simulated are
the engines (slots, a prompt cache with the least recently used going first, loading, eviction), the
clients, and the network, over which the four nodes that clients talk to hear of the others' load
with a delay. Time is simulated, so figures depend on the seed and on nothing of this machine.

Then the same load with older and older news, because that is what makes routers herd; `naive` is
there for comparison: whoever was reported to have the least to do, own requests not counted.

--write puts table and chart into docs/guide/.
"""

import argparse
import heapq
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import Usage
from ollamamax_p2p.router.core.candidate import Candidate, PrefixPoint, RequestFacts
from ollamamax_p2p.router.core.choosing import Choice, Chooser, Refuse
from ollamamax_p2p.router.core.load_table import (
    AgedReport,
    BackendLoad,
    BackendModels,
    LoadNews,
    LoadReport,
    LoadTable,
    ModelsReport,
)
from ollamamax_p2p.router.core.strategies import STRATEGIES, hash_of
from ollamamax_p2p.router.settings import RouterSettings

ROOT = Path(__file__).parents[1]
GB = 10**9
DAY_S = 86_400.0
HOP_S = 0.004
"""To another node and back, over an open stream."""
ROUTERS = 4
USERS = 60
GUIDE = ROOT / "docs" / "guide" / "routing.md"
CHART = ROOT / "docs" / "guide" / "routing.svg"


@dataclass(frozen=True, slots=True)
class Machine:
    """What an engine has. Rates are those of a 5 GB model, in tokens/s."""

    kind: str
    memory: int
    prefill_tps: float
    decode_tps: float
    slots: int
    cache_tokens: int
    load_bytes_s: float
    region: str


MACHINES = (
    *(Machine("large", 48 * GB, 3_000, 60, 6, 160_000, 3e9, region) for region in "ab"),
    *(Machine("small", 14 * GB, 1_200, 35, 3, 48_000, 1.5e9, region) for region in "aabb"),
    *(Machine("none", 30 * GB, 90, 9, 2, 24_000, 1e9, region) for region in "abb"),
)
EQUAL = tuple(Machine("small", 14 * GB, 1_200, 35, 3, 48_000, 1.5e9, "a") for _ in range(9))
"""Where old news is tried: among different machines, a herd at the fast ones does little harm."""
MODELS = (
    # Name, bytes, share of the requests.
    ("chat:8b", 5 * GB, 34),
    ("small:3b", 2 * GB, 20),
    ("code:14b", 9 * GB, 14),
    ("tiny:1b", 1 * GB, 10),
    ("large:32b", 20 * GB, 8),
    ("other:7b", 4 * GB, 6),
    ("math:7b", 4 * GB, 5),
    ("long:8b", 5 * GB, 3),
)


@dataclass(slots=True)
class Turn:
    """One request."""

    number: int
    user: str
    conversation: int
    model: int
    system: int
    """Which system prompt it begins with."""
    system_tokens: int
    before_tokens: int
    """What of the prompt the turn before had already, its answer included."""
    prompt_tokens: int
    answer_tokens: int
    points: tuple[PrefixPoint, ...]
    router: int
    followers: "list[tuple[float, int, int]]"
    """Turns that come after it: pause, new tokens, answer."""
    came_at: float = 0.0
    first_at: float = math.inf
    hit_tokens: int = 0


@dataclass(slots=True)
class Outcome:
    """What came of one day."""

    turns: list[Turn] = field(default_factory=list)
    refused: int = 0
    busy_s: dict[int, float] = field(default_factory=dict)
    loads: int = 0
    seconds: float = 0.0

    def first_s(self) -> list[float]:
        return sorted(turn.first_at - turn.came_at for turn in self.turns)


class Engine:
    """One node's engine: a line for each model, slots, memory, a prompt cache."""

    def __init__(self, number: int, machine: Machine, world: "World") -> None:
        self.number, self.machine, self.world = number, machine, world
        self.memory: dict[int, float] = {}
        """Models that are loaded, and when they were used last."""
        self.ready_at: dict[int, float] = {}
        self.busy: dict[int, int] = {}
        self.line: list[tuple[Turn, Callable[[str, Turn], None]]] = []
        self.cache: dict[tuple[str, int], int] = {}
        """Prompts in the cache and their tokens, used last at the end."""
        self.cached_tokens = 0
        self.held = [
            model for model, (_, size, _) in enumerate(MODELS) if size * 1.2 <= machine.memory
        ]
        self.sequence = 1
        self.running: set[int] = set()

    def speed(self, model: int) -> float:
        """Smaller models run faster, nearly in proportion."""
        return float((5 * GB / MODELS[model][1]) ** 0.85)

    def take(self, turn: Turn, tell: Callable[[str, Turn], None]) -> None:
        self.line.append((turn, tell))
        self.work()

    def drop(self, turn: Turn) -> None:
        """A request that is not wanted any more."""
        self.line = [each for each in self.line if each[0] is not turn]

    def work(self) -> None:
        """Begin what can begin, in order; whoever lacks memory holds up those of its model only."""
        waiting, self.line = self.line, []
        for turn, tell in waiting:
            if not self.begin(turn, tell):
                self.line.append((turn, tell))
        self.world.changed(self)

    def begin(self, turn: Turn, tell: Callable[[str, Turn], None]) -> bool:
        model, now = turn.model, self.world.now
        if self.busy.get(model, 0) >= self.machine.slots or not self.make_room(model):
            return False
        self.busy[model] = self.busy.get(model, 0) + 1
        load_s = 0.0
        if model not in self.memory:
            load_s = 0.5 + MODELS[model][1] / self.machine.load_bytes_s
            self.ready_at[model] = now + load_s
            self.world.outcome.loads += 1
        self.memory[model] = now
        load_s = max(self.ready_at[model] - now, 0.0)
        # A second request in the same batch costs both some speed.
        crowd = 1 + 0.06 * (sum(self.busy.values()) - 1)
        speed = self.speed(model)
        turn.hit_tokens = self.look_up(turn)
        read_s = (turn.prompt_tokens - turn.hit_tokens) * crowd
        read_s /= self.machine.prefill_tps * speed
        write_s = turn.answer_tokens * crowd / (self.machine.decode_tps * speed)
        first_s = load_s + 0.03 + read_s
        usage = Usage(
            prompt_tokens=turn.prompt_tokens,
            completion_tokens=turn.answer_tokens,
            load_ns=int(load_s * 1e9),
            prompt_ns=int(read_s * 1e9),
        )
        self.world.outcome.busy_s.setdefault(self.number, 0.0)
        self.world.outcome.busy_s[self.number] += first_s + write_s
        self.world.at(now + first_s, lambda: tell("first", turn))
        self.world.at(now + first_s + write_s, lambda: self.end(turn, tell, usage))
        return True

    def end(self, turn: Turn, tell: Callable[..., None], usage: Usage) -> None:
        self.busy[turn.model] -= 1
        self.memory[turn.model] = self.world.now
        self.keep(turn)
        tell("end", turn, usage)
        self.work()

    def make_room(self, model: int) -> bool:
        """Unload what was used the longest ago and is not in use, until the model fits."""
        if model in self.memory:
            return True
        needed = MODELS[model][1] * 1.2
        idle = [each for each in self.memory if not self.busy.get(each)]
        idle.sort(key=lambda each: self.memory[each])
        while needed > self.free():
            if not idle:
                return False
            gone = idle.pop(0)
            del self.memory[gone]
            for key in [key for key in self.cache if key[0].startswith(f"{gone} ")]:
                self.cached_tokens -= self.cache.pop(key)
        return True

    def free(self) -> float:
        return self.machine.memory - sum(MODELS[each][1] * 1.2 for each in self.memory)

    def look_up(self, turn: Turn) -> int:
        """How much of the prompt is in the cache."""
        conversation = (f"{turn.model} conversation", turn.conversation)
        system = (f"{turn.model} system", turn.system)
        hit = 0
        for key, tokens in ((system, turn.system_tokens), (conversation, turn.before_tokens)):
            if key in self.cache:
                hit = max(hit, min(self.cache[key], tokens))
                self.cache[key] = self.cache.pop(key)
        return hit

    def keep(self, turn: Turn) -> None:
        entries = {
            (f"{turn.model} system", turn.system): turn.system_tokens,
            (f"{turn.model} conversation", turn.conversation): turn.prompt_tokens
            + turn.answer_tokens,
        }
        for key, tokens in entries.items():
            self.cached_tokens += tokens - self.cache.pop(key, 0)
            self.cache[key] = tokens
        while self.cached_tokens > self.machine.cache_tokens and len(self.cache) > 1:
            self.cached_tokens -= self.cache.pop(next(iter(self.cache)))

    def report(self) -> LoadReport:
        self.sequence += 1
        now = self.world.now
        waiting = [turn.model for turn, _ in self.line]
        return LoadReport(
            peer=f"node{self.number}",
            node=f"node{self.number}",
            epoch=1,
            sequence=self.sequence,
            models_version=1,
            region=self.machine.region,
            weight=self.machine.decode_tps,
            memory_free=int(max(self.free(), 0)),
            memory_total=self.machine.memory,
            accelerator="" if self.machine.kind == "none" else "gpu",
            backends=(
                BackendLoad(
                    name="engine",
                    slots=self.machine.slots,
                    loaded=tuple(
                        LoadedModel(
                            name=MODELS[model][0],
                            slots=self.machine.slots,
                            busy=self.busy.get(model, 0) + waiting.count(model),
                            loading=self.ready_at[model] > now,
                        )
                        for model in self.memory
                    ),
                ),
            ),
        )


class NaiveChooser(Chooser):
    """Whoever was reported to have the least to do; what went there since is not counted."""

    def _ranked(
        self, request: RequestFacts, candidates: Iterable[Candidate], now: float
    ) -> list[Candidate]:
        return sorted(candidates, key=lambda each: (not each.loaded, each.others / each.slots))


class Router:
    """A node that clients talk to."""

    def __init__(self, number: int, world: "World", strategy: str, rng: random.Random) -> None:
        settings = RouterSettings(
            # What is measured is the choice, not what makes good for a bad one.
            hedge=False,
            # Reports are sent when something changes only, to save the simulation's time.
            stale_s=1e9,
            dead_s=1e9,
            deadline_s=3_600.0,
        )
        self.world, self.strategy = world, strategy
        self.table = LoadTable(peer=f"router{number}", epoch=1, settings=settings)
        chooser = NaiveChooser if strategy == "naive" else Chooser
        self.chooser = chooser(settings, self.table, rng=rng)
        self.region = "a" if number % 2 == 0 else "b"
        self.turns: dict[int, Turn] = {}
        self.attempts: dict[int, set[int]] = {}
        for engine in world.engines:
            self.hear(engine.report())
            models = tuple(
                ServableModel(name=MODELS[model][0], size=MODELS[model][1], digest=str(model))
                for model in engine.held
            )
            page = ModelsReport(
                peer=f"node{engine.number}",
                epoch=1,
                version=1,
                backends=(BackendModels(name="engine", models=models),),
            )
            self.table.hear("", page, now=0.0)

    def hear(self, report: LoadReport, age_s: float = 0.0) -> None:
        news = LoadNews(reports=(AgedReport(report=report, age_s=age_s),))
        self.table.hear(report.peer, news, now=self.world.now)

    def ask(self, turn: Turn) -> None:
        turn.came_at = self.world.now
        self.turns[turn.number] = turn
        facts = RequestFacts(
            id=turn.number,
            model=MODELS[turn.model][0],
            prompt_tokens=turn.prompt_tokens,
            output_tokens=256,
            prefix=turn.points,
            # Conversations have a name here only where that is what is tried.
            session=str(turn.conversation) if self.strategy == "session_affinity" else "",
            root=turn.points[1].hash,
            region=self.region,
            user=turn.user,
            strategy="" if self.strategy == "naive" else self.strategy,
        )
        self.act(self.chooser.choose(facts, now=self.world.now))
        self.due()

    def act(self, outcome: Any) -> None:
        if isinstance(outcome, Choice):
            turn = self.turns[outcome.request.id]
            self.attempts.setdefault(turn.number, set()).add(outcome.attempt)
            engine = self.world.engines[int(outcome.candidate.key.peer.removeprefix("node"))]

            def tell(what: str, turn: Turn, usage: Usage | None = None) -> None:
                self.world.at(
                    self.world.now + HOP_S / 2,
                    lambda: self.told(outcome.attempt, what, turn, usage),
                )

            self.world.at(self.world.now + HOP_S / 2, lambda: engine.take(turn, tell))
        elif isinstance(outcome, Refuse):
            self.world.outcome.refused += 1
            self.world.over(self.turns.pop(outcome.request.id), answered=False)

    def told(self, attempt: int, what: str, turn: Turn, usage: Usage | None) -> None:
        now = self.world.now
        if what == "first":
            turn.first_at = min(turn.first_at, now)
            self.chooser.first_part(attempt, now=now)
        else:
            self.chooser.ended(attempt, usage=usage, now=now)
            self.world.over(self.turns.pop(turn.number), answered=True)
        self.due()

    def due(self) -> None:
        for outcome in self.chooser.due(now=self.world.now):
            self.act(outcome)
        wake = self.chooser.next_wake(now=self.world.now)
        if wake is not None:
            self.world.at(wake, self.due, once=id(self))


class World:
    """Events in order of time."""

    def __init__(
        self,
        strategy: str,
        *,
        seed: int,
        gossip_s: float = 0.5,
        routers: int = ROUTERS,
        machines: Sequence[Machine] = MACHINES,
    ) -> None:
        self.now = 0.0
        self.slots = sum(each.slots for each in machines)
        self.gossip_s = gossip_s
        self.outcome = Outcome()
        self._events: list[tuple[float, int, Callable[[], None], int]] = []
        self._numbers = itertools.count()
        self._waking: set[int] = set()
        self._told: set[int] = set()
        self.engines = [Engine(number, each, self) for number, each in enumerate(machines)]
        self.routers = [
            Router(number, self, strategy, random.Random(seed * 1_000 + number))
            for number in range(routers)
        ]
        self.turns = itertools.count(1)

    def at(self, time: float, act: Callable[[], None], *, once: int = 0) -> None:
        if once:
            if once in self._waking:
                return
            self._waking.add(once)
        heapq.heappush(self._events, (time, next(self._numbers), act, once))

    def run(self) -> Outcome:
        begun = time.perf_counter()
        while self._events:
            self.now, _, act, once = heapq.heappop(self._events)
            self._waking.discard(once)
            act()
        self.outcome.seconds = time.perf_counter() - begun
        return self.outcome

    def changed(self, engine: Engine) -> None:
        """Tell of it with the next gossip, at most once in its interval."""
        if engine.number in self._told:
            return
        self._told.add(engine.number)
        self.at(self.now + self.gossip_s, lambda: self.tell(engine))

    def tell(self, engine: Engine) -> None:
        """On average the news is as old as half an interval; it was made just now, and arrives a
        hop later.
        """
        self._told.discard(engine.number)
        report = engine.report()
        for router in self.routers:
            router.hear(report, age_s=HOP_S / 2)

    def over(self, turn: Turn, *, answered: bool) -> None:
        if answered:
            self.outcome.turns.append(turn)
        if turn.followers:
            pause, tokens, answer = turn.followers[0]
            follower = Turn(
                number=next(self.turns),
                user=turn.user,
                conversation=turn.conversation,
                model=turn.model,
                system=turn.system,
                system_tokens=turn.system_tokens,
                before_tokens=turn.prompt_tokens + turn.answer_tokens,
                prompt_tokens=turn.prompt_tokens + turn.answer_tokens + tokens,
                answer_tokens=answer,
                points=(),
                router=turn.router,
                followers=turn.followers[1:],
            )
            depth = len(turn.points)
            point = PrefixPoint(hash_of(f"{turn.conversation} {depth}"), follower.prompt_tokens)
            follower.points = (*turn.points, point)
            self.at(self.now + pause, lambda: self.routers[follower.router].ask(follower))


def day_of(world: World, *, hours: float, per_hour: float, seed: int, models: int) -> None:
    """Put the day's conversations into the world; the same for every strategy. models: how many of
    MODELS are asked for.
    """
    rng = random.Random(seed)
    users = [f"user{number}" for number in range(USERS)]
    activity = [1 / (number + 1) ** 0.8 for number in range(USERS)]
    shares = [share for _, _, share in MODELS[:models]]
    systems = [int(rng.lognormvariate(6.2, 0.9)) for _ in range(20)]
    end = hours * 3_600
    at, conversation = 0.0, 0
    burst_until = -1.0
    while at < end:
        hour = (at / end * 24) if hours >= 24 else 10.0 + at / 3_600
        level = 0.25 + max(0.0, math.sin((hour - 7) / 12 * math.pi)) ** 1.5
        if at > burst_until and rng.random() < 0.002:
            burst_until = at + rng.uniform(60, 300)
        level *= 3.0 if at < burst_until else 1.0
        at += rng.expovariate(per_hour * level / 3_600)
        conversation += 1
        user = rng.choices(range(USERS), activity)[0]
        system = rng.randrange(len(systems))
        count = min(1 + int(rng.expovariate(1 / 4)), 20)
        news = [
            4_000 + int(rng.expovariate(1 / 4_000))
            if rng.random() < 0.06
            else 20 + int(rng.expovariate(1 / 150))
            for _ in range(count)
        ]
        answers = [30 + int(rng.expovariate(1 / 220)) for _ in range(count)]
        pauses = [5 + rng.expovariate(1 / 45) for _ in range(count)]
        prompt = systems[system] + news[0]
        turn = Turn(
            number=next(world.turns),
            user=users[user],
            conversation=conversation,
            model=rng.choices(range(models), shares)[0],
            system=system,
            system_tokens=systems[system],
            before_tokens=systems[system],
            prompt_tokens=prompt,
            answer_tokens=answers[0],
            points=(
                PrefixPoint(hash_of(f"system {system}"), systems[system]),
                PrefixPoint(hash_of(f"{conversation} 1"), prompt),
            ),
            router=user % len(world.routers),
            followers=list(zip(pauses[1:], news[1:], answers[1:], strict=True)),
        )
        world.at(at, lambda turn=turn: world.routers[turn.router].ask(turn))  # type: ignore[misc]


def quantile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


def jain(values: Sequence[float]) -> float:
    """1: all alike; 1/n: one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def figures(outcome: Outcome, slot_seconds: float) -> dict[str, float]:
    first = outcome.first_s()
    per_user: dict[str, list[float]] = {}
    for turn in outcome.turns:
        per_user.setdefault(turn.user, []).append(turn.first_at - turn.came_at)
    again = [turn for turn in outcome.turns if len(turn.points) > 2]
    return {
        "requests": len(first),
        "refused": outcome.refused,
        "ttft_p50_s": quantile(first, 0.5),
        "ttft_p99_s": quantile(first, 0.99),
        "ttft_mean_s": sum(first) / len(first),
        "cache_hit": sum(turn.hit_tokens for turn in outcome.turns)
        / sum(turn.prompt_tokens for turn in outcome.turns),
        "turns_found": sum(turn.hit_tokens >= turn.before_tokens for turn in again)
        / max(len(again), 1),
        "jain": jain([sum(each) / len(each) for each in per_user.values()]),
        "utilisation": sum(outcome.busy_s.values()) / slot_seconds,
        "loads": outcome.loads,
    }


def run(
    strategy: str,
    *,
    seed: int,
    hours: float,
    per_hour: float,
    models: int = len(MODELS),
    **world_facts: Any,
) -> dict[str, float]:
    world = World(strategy, seed=seed, **world_facts)
    day_of(world, hours=hours, per_hour=per_hour, seed=seed, models=models)
    return figures(world.run(), world.slots * hours * 3_600)


STALE_S = (0.1, 0.5, 2.0, 8.0, 30.0)
STALE_STRATEGIES = (
    "naive",
    "least_outstanding",
    "power_of_two",
    "prefix_affinity",
    "lowest_expected_time",
)
BUSY_HOURS = 2.0
BUSY_FACTOR = 2.5
"""So many times the day's conversations: more than the machines keep up with at times."""
STALE_ROUTERS = 8
STALE_PER_HOUR = 900.0
COLUMNS = (
    ("TTFT p50", "ttft_p50_s", "{:.2f} s"),
    ("p99", "ttft_p99_s", "{:.1f} s"),
    ("mean", "ttft_mean_s", "{:.2f} s"),
    ("prompt from cache", "cache_hit", "{:.0%}"),
    ("conversations found again", "turns_found", "{:.0%}"),
    ("Jain over users", "jain", "{:.2f}"),
    ("slots busy", "utilisation", "{:.0%}"),
    ("models loaded", "loads", "{:.0f}"),
)


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown, the lowest mean first."""
    lines = [
        "| strategy | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for strategy in sorted(found, key=lambda each: found[each]["ttft_mean_s"]):
        cells = [shape.format(found[strategy][key]) for _, key, shape in COLUMNS]
        lines.append(f"| `{strategy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stale_table(found: dict[str, dict[float, float]]) -> str:
    lines = [
        "| news comes every | " + " | ".join(f"{each:g} s" for each in STALE_S) + " |",
        "|---" * (len(STALE_S) + 1) + "|",
    ]
    for strategy, by_delay in found.items():
        cells = [f"{by_delay[each]:.2f} s" for each in STALE_S]
        lines.append(f"| `{strategy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(found: dict[str, dict[str, float]]) -> str:
    """Two bars for each strategy, on a logarithmic scale from 10 ms on."""
    names = sorted(found, key=lambda each: found[each]["ttft_mean_s"])
    left, width, row, top = 190, 560, 44, 58
    decades = range(-2, 4)
    scale = width / (decades[-1] - decades[0])

    def x(seconds: float) -> float:
        return left + (math.log10(max(seconds, 0.01)) + 2) * scale

    height = top + row * len(names) + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{left + width + 70}" height="{height}" fill="#fff"/>',
        '<text x="12" y="22" font-size="15">Time to the first token, by strategy: '
        "median (dark) and 99th percentile (light)</text>",
    ]
    for decade in decades:
        at = x(10.0**decade)
        out.append(f'<path d="M{at:.0f} {top - 8}V{height - 12}" stroke="#ddd"/>')
        out.append(
            f'<text x="{at:.0f}" y="{top - 12}" text-anchor="middle" fill="#555">'
            f"{10.0**decade:g} s</text>"
        )
    for number, name in enumerate(names):
        y = top + row * number
        out.append(f'<text x="{left - 8}" y="{y + 22}" text-anchor="end">{escape(name)}</text>')
        bars = (("ttft_p50_s", "#1f5f8b", 4, "{:.2f} s"), ("ttft_p99_s", "#9cc3dc", 18, "{:.1f} s"))
        for key, colour, offset, shape in bars:
            end = x(found[name][key])
            out.append(
                f'<rect x="{left}" y="{y + offset}" width="{max(end - left, 1):.0f}" height="13" '
                f'fill="{colour}"/>'
            )
            label = shape.format(found[name][key])
            out.append(f'<text x="{end + 5:.0f}" y="{y + offset + 11}" fill="#333">{label}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def between(text: str, name: str, new: str) -> str:
    """The text with what is between the markers of that name replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + new + "\n" + end + after


def machine() -> dict[str, str]:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "machine": f"{platform.machine()} x{os.cpu_count()}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": done.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two hours instead of a day")
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    parser.add_argument("--write", action="store_true", help="put table and chart into docs/guide")
    parser.add_argument("--only", nargs="*", default=list(STRATEGIES), metavar="STRATEGY")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-hour", type=float, default=400.0, help="conversations, by day")
    parser.add_argument("--no-stale", action="store_true", help="not the part about old news")
    given = parser.parse_args()
    where = machine()
    hours = 2.0 if given.quick else 24.0
    if not given.json:
        print(", ".join(where.values()) + f"; seed {given.seed}")
    day = {"seed": given.seed, "hours": hours, "per_hour": given.per_hour}
    found = compare("day", given.only, day, given.json, where)
    day |= {"hours": BUSY_HOURS, "per_hour": given.per_hour * BUSY_FACTOR}
    busy = compare("busy", given.only, day, given.json, where)
    stale = {} if given.no_stale else stale_news(given.seed, given.json, where)
    if given.write:
        text = GUIDE.read_text()
        text = between(text, "strategies", table(found))
        text = between(text, "busy", table(busy))
        if stale:
            text = between(text, "old news", stale_table(stale))
        GUIDE.write_text(text)
        CHART.write_text(chart(found))


def compare(
    title: str, strategies: Sequence[str], day: dict[str, Any], as_json: bool, where: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Figures by strategy."""
    found: dict[str, dict[str, float]] = {}
    for strategy in strategies:
        begun = time.perf_counter()
        found[strategy] = run(strategy, **day)
        took = time.perf_counter() - begun
        if as_json:
            for name, value in found[strategy].items():
                figure = {"name": f"policy_{title}_{name}", "value": round(value, 4)}
                print(json.dumps(figure | {"strategy": strategy} | day | where), flush=True)
        else:
            shown = ", ".join(
                f"{name} {shape.format(found[strategy][key])}" for name, key, shape in COLUMNS
            )
            requests = f"{found[strategy]['requests']:.0f} requests"
            line = f"{title:<5}{strategy:<21}{shown}; {requests}, {took:.0f} s"
            print(line, flush=True)
    return found


def stale_news(seed: int, as_json: bool, where: dict[str, str]) -> dict[str, dict[float, float]]:
    """Mean time to the first token by strategy and by how often news comes: one busy hour."""
    found: dict[str, dict[float, float]] = {}
    for strategy in STALE_STRATEGIES:
        found[strategy] = {}
        for gossip_s in STALE_S:
            result = run(
                strategy,
                seed=seed,
                hours=1.0,
                per_hour=STALE_PER_HOUR,
                models=1,
                gossip_s=gossip_s,
                routers=STALE_ROUTERS,
                machines=EQUAL,
            )
            found[strategy][gossip_s] = result["ttft_mean_s"]
            if as_json:
                figure = {
                    "name": "policy_stale_ttft_mean_s",
                    "strategy": strategy,
                    "gossip_s": gossip_s,
                    "value": round(result["ttft_mean_s"], 4),
                }
                print(json.dumps(figure | where), flush=True)
        if not as_json:
            cells = ", ".join(
                f"{delay:g} s: {mean:.2f} s" for delay, mean in found[strategy].items()
            )
            print(f"old news, {strategy:<22}{cells}", flush=True)
    return found


if __name__ == "__main__":
    main()

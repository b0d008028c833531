"""What every node tells of its load, and what this node knows of all of them.

The shell calls `tell` with what is so here whenever it looked, `round` every gossip interval, and
`hear` for every message; it sends what these return. A report travels by push gossip: each round a
node sends to `fanout` random peers its own report and those it heard lately (each for a few
rounds, then it takes it for known). Messages are bounded, so that a round costs a swarm of n nodes
n · fanout messages whatever happens. What a peer missed altogether it finds out by comparing
digests: with a new peer at once (`greet`), with a random one now and then.

Which models a node could run changes seldom and is long, so a report carries only a version of that
list; who lacks that version asks whoever told them.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import BadName
from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import Count, Name
from ollamamax_p2p.router.core.candidate import CandidateKey
from ollamamax_p2p.router.settings import RouterSettings
from ollamamax_p2p.wire import Codec, Message

GOSSIP_BYTES_MAX = 48 * 1024
"""Of one message: at one a round to three peers, 300 kB/s at the most."""

REPORT_BYTES_MAX = 12 * 1024
"""Of one load report: room for some 50 loaded models."""

MODEL_BYTES_MAX = 8 * 1024
"""Of one ServableModel; a longer one is not told."""

PAGES_MAX = 64
"""Of one node's models: some 10,000."""

MEMORY_QUANTUM_BYTES = 64 * 1024 * 1024
"""Free memory is told in steps of this, or every report would differ from the last."""

DIGEST_EVERY_ROUNDS = 20
"""A random peer is sent a digest this often: what pushing missed is rare, and replaced soon."""

MODELS_ASKED_MAX = 32
"""Nodes whose models are asked for at once."""

ASK_AGAIN_S = 3.0
"""Models that were asked for and did not come are asked for again, of another peer."""

ANSWER_BYTES_MAX = 512 * 1024
"""What one digest or question is answered with; who needs more asks again."""

_ENVELOPE_BYTES = 256
"""A message around what it carries."""

_AGED_BYTES = 32
"""An AgedReport around its report."""

Short = Annotated[str, Meta(max_length=128)]
Number = Annotated[float, Meta(ge=0, le=1e12)]


class ModelSpeed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node measured of its own model; 0: not yet."""

    model: Name
    ttft_s: Number = 0.0
    prefill_tps: Number = 0.0
    decode_tps: Number = 0.0
    load_s: Number = 0.0


class BackendLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine of a node."""

    name: Short
    slots: Annotated[int, Meta(ge=0, le=65_536)] = 1
    queued: Annotated[int, Meta(ge=0, le=65_536)] = 0
    """Requests that wait in its own queue."""
    loaded: Annotated[tuple[LoadedModel, ...], Meta(max_length=64)] = ()
    speeds: Annotated[tuple[ModelSpeed, ...], Meta(max_length=64)] = ()


class LoadReport(Message, tag="load", frozen=True, kw_only=True, omit_defaults=True):
    """What a node says of itself; replaced by its next."""

    peer: Short
    epoch: Count
    """When the node started, Unix milliseconds."""
    sequence: Count
    models_version: Count = 0
    node: Short = ""
    region: Short = ""
    weight: Number = 1.0
    draining: bool = False
    memory_free: Count = 0
    """Bytes that a model could take, of what its engines use: the accelerator or the machine."""
    memory_total: Count = 0
    accelerator: Short = ""
    tokens_per_s: Number = 0.0
    """What its engines gave of late, together."""
    backends: Annotated[tuple[BackendLoad, ...], Meta(max_length=16)] = ()


class BackendModels(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine could run."""

    name: Short
    models: Annotated[tuple[ServableModel, ...], Meta(max_length=4_096)]


class ModelsReport(Message, tag="models", frozen=True, kw_only=True, omit_defaults=True):
    """What a node could run, or one page of it."""

    peer: Short
    epoch: Count
    version: Count
    page: Annotated[int, Meta(ge=0, lt=64)] = 0
    pages: Annotated[int, Meta(ge=1, le=64)] = 1
    backends: Annotated[tuple[BackendModels, ...], Meta(max_length=16)] = ()


class AgedReport(msgspec.Struct, frozen=True, kw_only=True):
    """A report, and how long ago it was made as far as the teller knows."""

    report: LoadReport
    age_s: Number = 0.0


class LoadNews(Message, tag="news", frozen=True, kw_only=True):
    """What the sender takes for new to the receiver."""

    reports: Annotated[tuple[AgedReport, ...], Meta(max_length=1_024)]


class DigestEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The newest that is known of one node."""

    peer: Short
    epoch: Count
    sequence: Count
    models_version: Count


class LoadDigest(Message, tag="digest", frozen=True, kw_only=True):
    """What the sender knows; the receiver answers with what is newer, asks for what it lacks."""

    entries: Annotated[tuple[DigestEntry, ...], Meta(max_length=1_024)]
    first: Short = ""
    """The entries are all that the sender knows after this peer id …"""
    last: Short = ""
    """… up to and with this one; "": to the end."""


class LoadWanted(Message, tag="wanted", frozen=True, kw_only=True, omit_defaults=True):
    """What the sender would like to be told."""

    reports: Annotated[tuple[Short, ...], Meta(max_length=1_024)] = ()
    """Peer ids whose load report it lacks."""
    models: Annotated[tuple[Short, ...], Meta(max_length=1_024)] = ()
    """Peer ids whose models it lacks."""


GossipMessage = LoadNews | LoadDigest | LoadWanted | ModelsReport

GOSSIP: Codec[GossipMessage] = Codec(GossipMessage, max_bytes=GOSSIP_BYTES_MAX)
"""Encodes and decodes what goes between two nodes' tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """An engine that could run a model, or runs it."""

    peer: str
    backend: str
    servable: ServableModel
    key: CandidateKey
    name: tuple[str, str]
    """Its back end and `model_key`."""
    ring: int
    """Its place for consistent hashing, the same on every node."""


@dataclass(kw_only=True)  # No slots: what is computed when it is needed is kept in the instance.
class KnownNode:
    """A node as this one knows it. Not to be changed from outside."""

    report: LoadReport
    made_at: float
    """When the report was made, on this node's clock."""
    direct: bool
    """The node told it itself, over a connection that is known to be its own."""
    via: str
    """Who told it."""
    bytes: int
    models: tuple[BackendModels, ...] = ()
    """What is known of what it could run; of an older version while the newer is on its way."""
    models_at: tuple[int, int] = (0, 0)
    """Epoch and version of `models`."""
    pages: dict[int, ModelsReport] = field(default_factory=dict)
    """Those of the version that is known, or on its way."""
    pages_bytes: int = 0

    @cached_property
    def backends(self) -> Mapping[str, BackendLoad]:
        """By name."""
        return {backend.name: backend for backend in self.report.backends}

    @cached_property
    def loaded(self) -> Mapping[tuple[str, str], LoadedModel]:
        """By back end and `model_key`."""
        return {
            (backend.name, model_key(model.name)): model
            for backend in self.report.backends
            for model in backend.loaded
        }

    @cached_property
    def speeds(self) -> Mapping[tuple[str, str], ModelSpeed]:
        """By back end and `model_key`."""
        return {
            (backend.name, model_key(speed.model)): speed
            for backend in self.report.backends
            for speed in backend.speeds
        }

    @property
    def wanted(self) -> tuple[int, int]:
        """Epoch and version of the models that the report speaks of."""
        return (self.report.epoch, self.report.models_version)


class LoadTable:
    """What this node knows of the load of all."""

    def __init__(
        self,
        *,
        peer: str,
        epoch: int,
        settings: RouterSettings,
        is_member: Callable[[str], bool] = lambda peer: True,
    ) -> None:
        """peer: this node's id; epoch: when it started, Unix milliseconds; is_member: whose reports
        are believed.
        """
        self.peer = peer
        self._settings = settings
        self._is_member = is_member
        self._nodes: dict[str, KnownNode] = {}
        self._holders: dict[str, dict[tuple[str, str], Holder]] = {}
        self._bytes = 0
        self._reports_bytes = 0
        """Of those, the reports alone."""
        self._rounds = 0
        self._telling: dict[str, int] = {}
        """Of whom there is news to tell, and for how many rounds more."""
        self._told_own_at: float | None = None
        self._own_changed = False
        self._own_known = False
        """Whether `tell` was ever called."""
        self._asked: dict[str, float] = {}
        """Whose models were asked for, and when."""
        self._forgotten: dict[str, tuple[int, int, float]] = {}
        """Who was forgotten: epoch and sequence of the last report, and when."""
        own = self._own_entry(LoadReport(peer=peer, epoch=epoch, sequence=0), 0.0)
        own.models_at = own.wanted
        self._put(own)

    # -- this node -----------------------------------------------------------------------------

    def tell(
        self,
        *,
        node: str,
        draining: bool,
        memory_free: int,
        memory_total: int,
        accelerator: str,
        region: str = "",
        tokens_per_s: float = 0.0,
        backends: Sequence[BackendLoad],
        models: Sequence[BackendModels],
        now: float,
    ) -> None:
        """What is so on this node now. Call it when something changed and once a gossip interval;
        the others are told with the next round, if it differs or the heartbeat is due.

        What is too long for a report is left out of it: the last of the loaded models first.
        """
        self._own_known = True
        own = self._nodes[self.peer]
        old = own.report
        new = LoadReport(
            peer=self.peer,
            epoch=old.epoch,
            sequence=old.sequence,
            models_version=old.models_version,
            node=node[:128],
            region=region[:128],
            weight=min(max(self._settings.weight, 0.0), 1e12),
            draining=draining,
            memory_free=memory_free // MEMORY_QUANTUM_BYTES * MEMORY_QUANTUM_BYTES,
            memory_total=memory_total,
            accelerator=accelerator[:128],
            tokens_per_s=_rounded(tokens_per_s),
            backends=tuple(backends[:16]),
        )
        new = _fitted(new)
        models = tuple(models[:16])
        if models != own.models:
            new = msgspec.structs.replace(new, models_version=old.models_version + 1)
        if new != old:
            new = msgspec.structs.replace(new, sequence=old.sequence + 1)
            self._own_changed = True
        entry = self._own_entry(new, now)
        entry.models, entry.models_at, entry.pages = own.models, own.models_at, own.pages
        entry.pages_bytes = own.pages_bytes
        self._put(entry)
        if new.models_version != old.models_version:
            self._learn_models(entry, _in_pages(new, models), models)

    def _own_entry(self, report: LoadReport, now: float) -> KnownNode:
        return _entry(report, made_at=now, direct=True, via=self.peer)

    # -- gossip --------------------------------------------------------------------------------

    def round(
        self, linked: Sequence[str], *, now: float, rng: random.Random
    ) -> list[tuple[str, GossipMessage]]:
        """What to send to whom now. linked: the peers with a connection."""
        self._rounds += 1
        self._drop_dead(now)
        peers = [peer for peer in linked if peer != self.peer]
        if not peers:
            return []
        self._tell_own(now)
        sent: list[tuple[str, GossipMessage]] = []
        if news := self._news_to_tell(now):
            targets = rng.sample(peers, min(self._settings.gossip_fanout, len(peers)))
            sent += [(peer, news) for peer in targets]
        if self._rounds % DIGEST_EVERY_ROUNDS == 0:
            peer = rng.choice(peers)
            sent += [(peer, page) for page in self.greet(now=now)]
        return sent + self._ask_for_models(peers, now, rng)

    def period_s(self) -> float:
        """How often each node may tell its report, so that all of them fit into the messages."""
        told_bytes = self._reports_bytes + _AGED_BYTES * len(self._nodes)
        rounds = told_bytes * self._settings.gossip_repeats / GOSSIP_BYTES_MAX
        return max(1.0, rounds) * self._settings.gossip_interval_s

    def _tell_own(self, now: float) -> None:
        """Note this node's report as news, if it is due."""
        period_s = self.period_s()
        if not self._own_changed:
            period_s = max(period_s, self._settings.heartbeat_s)
        if not self._own_known:
            return
        if self._told_own_at is not None and now - self._told_own_at < period_s:
            return
        own = self._nodes[self.peer]
        own.made_at = now
        if not self._own_changed:
            own.report = msgspec.structs.replace(own.report, sequence=own.report.sequence + 1)
        self._own_changed = False
        self._told_own_at = now
        self._telling[self.peer] = self._settings.gossip_repeats

    def _news_to_tell(self, now: float) -> LoadNews | None:
        """Its own report first, then what it has told the least often, the youngest first."""
        order = sorted(
            self._telling,
            key=lambda peer: (
                peer != self.peer,
                -self._telling[peer],
                -self._nodes[peer].made_at,
            ),
        )
        told, _ = _first_that_fit([self._nodes[peer] for peer in order])
        for entry in told:
            self._telling[entry.report.peer] -= 1
            if self._telling[entry.report.peer] == 0:
                del self._telling[entry.report.peer]
        return _news(told, now) if told else None

    def greet(self, *, now: float) -> list[GossipMessage]:
        """What to send to a peer that is new: a digest, in pages."""
        pages: list[LoadDigest] = []
        entries: list[DigestEntry] = []
        taken, first = 0, ""
        for peer in sorted(self._nodes):
            report = self._nodes[peer].report
            if taken + len(peer.encode()) + 32 > GOSSIP_BYTES_MAX - _ENVELOPE_BYTES:
                pages.append(LoadDigest(entries=tuple(entries), first=first, last=entries[-1].peer))
                first, taken, entries = entries[-1].peer, 0, []
            taken += len(peer.encode()) + 32
            entries.append(
                DigestEntry(
                    peer=peer,
                    epoch=report.epoch,
                    sequence=report.sequence,
                    models_version=report.models_version,
                )
            )
        return [*pages, LoadDigest(entries=tuple(entries), first=first)]

    def hear(self, via: str, message: GossipMessage, *, now: float) -> list[GossipMessage]:
        """Take in what a peer sent; give what to answer it. via: the authenticated sender."""
        if isinstance(message, LoadNews):
            for aged in message.reports:
                self._hear_report(via, aged, now)
            return []
        if isinstance(message, ModelsReport):
            self._hear_models(message)
            return []
        if isinstance(message, LoadDigest):
            return self._answer_digest(message, now)
        return self._answer_wanted(message, now)

    def _hear_report(self, via: str, aged: AgedReport, now: float) -> None:
        report = aged.report
        if report.peer == self.peer:
            self._refute(report)
            return
        direct = via == report.peer
        if not self._is_news(report, direct) or aged.age_s > self._settings.dead_s:
            return
        entry = _entry(report, made_at=now - aged.age_s, direct=direct, via=via)
        if entry.bytes > REPORT_BYTES_MAX or not self._has_room_for(entry, now):
            return
        old = self._nodes.get(report.peer)
        if old is not None:
            entry.models, entry.models_at = old.models, old.models_at
            entry.pages, entry.pages_bytes = old.pages, old.pages_bytes
        self._put(entry)
        if report.models_version == 0:
            self._learn_models(entry, (), ())
        self._telling[report.peer] = self._settings.gossip_repeats

    def _refute(self, report: LoadReport) -> None:
        """Somebody holds a report of this node that is newer than its newest: one from before it
        was started again with a clock that went back, or a lie. Its own must win.
        """
        own = self._nodes[self.peer]
        if _at(report) > _at(own.report) and report.epoch < 2**53 - 1:
            own.report = msgspec.structs.replace(own.report, epoch=report.epoch + 1)
            own.pages = {
                number: msgspec.structs.replace(page, epoch=own.report.epoch)
                for number, page in own.pages.items()
            }
            own.models_at = own.wanted
            self._own_changed = True

    def _is_news(self, report: LoadReport, direct: bool) -> bool:
        old = self._nodes.get(report.peer)
        if old is not None:
            # What a node says itself beats whatever others say in its name.
            corrects = direct and not old.direct and report != old.report
            return _at(report) > _at(old.report) or corrects
        if report.peer in self._forgotten and _at(report) <= self._forgotten[report.peer][:2]:
            return False
        return self._is_member(report.peer)

    def _has_room_for(self, entry: KnownNode, now: float) -> bool:
        old = self._nodes.get(entry.report.peer)
        if old is not None:
            return True  # Its size is bounded, and it is counted.
        if self._is_full(entry.bytes):
            self._drop_dead(now)
        return not self._is_full(entry.bytes)

    def _is_full(self, more_bytes: int) -> bool:
        return (
            len(self._nodes) >= self._settings.nodes_max
            or self._bytes + more_bytes > self._settings.table_bytes_max
        )

    def _hear_models(self, page: ModelsReport) -> None:
        entry = self._nodes.get(page.peer)
        if entry is None or page.peer == self.peer or (page.epoch, page.version) != entry.wanted:
            return
        if entry.models_at == entry.wanted or page.page >= page.pages:
            return
        started = next(iter(entry.pages.values()), None)
        if started is None or _version(started) != _version(page):
            self._bytes -= entry.pages_bytes
            entry.pages, entry.pages_bytes = {}, 0
        page_bytes = len(msgspec.msgpack.encode(page))
        if page.page in entry.pages or self._bytes + page_bytes > self._settings.table_bytes_max:
            return
        entry.pages[page.page] = page
        entry.pages_bytes += page_bytes
        self._bytes += page_bytes
        if len(entry.pages) == page.pages:
            pages = [entry.pages[number] for number in sorted(entry.pages)]
            self._learn_models(entry, pages, _merged(pages))

    def _answer_digest(self, digest: LoadDigest, now: float) -> list[GossipMessage]:
        theirs = {entry.peer: (entry.epoch, entry.sequence) for entry in digest.entries}
        newer = [
            node
            for peer, node in self._nodes.items()
            if (peer > digest.first or not digest.first)
            and (peer <= digest.last or not digest.last)
            and _at(node.report) > theirs.get(peer, (-1, -1))
        ]
        lacked = [
            entry.peer
            for entry in digest.entries
            if self._is_member(entry.peer)
            and entry.peer != self.peer
            and (entry.epoch, entry.sequence) > self._known_at(entry.peer)
        ]
        answers: list[GossipMessage] = list(_news_in_messages(newer, now))
        if lacked:
            answers.append(LoadWanted(reports=tuple(lacked)))
        return answers

    def _known_at(self, peer: str) -> tuple[int, int]:
        known = self._nodes.get(peer)
        return _at(known.report) if known is not None else (-1, -1)

    def _answer_wanted(self, wanted: LoadWanted, now: float) -> list[GossipMessage]:
        known = [self._nodes[peer] for peer in dict.fromkeys(wanted.reports) if peer in self._nodes]
        answers: list[GossipMessage] = list(_news_in_messages(known, now))
        left = ANSWER_BYTES_MAX
        for peer in dict.fromkeys(wanted.models):
            node = self._nodes.get(peer)
            if node is None or node.models_at != node.wanted or node.pages_bytes > left:
                continue
            left -= node.pages_bytes
            answers += node.pages.values()
        return answers

    def _ask_for_models(
        self, peers: Sequence[str], now: float, rng: random.Random
    ) -> list[tuple[str, GossipMessage]]:
        """Of the node itself where it is linked, else of who told its report, else of anybody."""
        linked = set(peers)
        questions: dict[str, list[str]] = {}
        count = 0
        for peer, node in self._nodes.items():
            if node.models_at == node.wanted or count == MODELS_ASKED_MAX:
                continue
            asked_at = self._asked.get(peer)
            if asked_at is not None and now - asked_at < ASK_AGAIN_S:
                continue
            whom = [each for each in (peer, node.via) if each in linked and asked_at is None]
            questions.setdefault(whom[0] if whom else rng.choice(peers), []).append(peer)
            self._asked[peer] = now
            count += 1
        return [(peer, LoadWanted(models=tuple(models))) for peer, models in questions.items()]

    # -- what is known ---------------------------------------------------------------------------

    def forget(self, peer: str, *, now: float) -> None:
        """It is no member any more, or its connection broke: only a newer report brings it back."""
        entry = self._nodes.get(peer)
        if entry is None or peer == self.peer:
            return
        self._remove(peer)
        epoch, sequence = _at(entry.report)
        self._forgotten[peer] = (epoch, sequence, now)
        if len(self._forgotten) > self._settings.nodes_max:
            del self._forgotten[next(iter(self._forgotten))]

    def node(self, peer: str) -> KnownNode | None:
        """The newest that is known of a node."""
        return self._nodes.get(peer)

    def nodes(self, *, now: float) -> list[KnownNode]:
        """All that were heard of within `dead_s`, this node first."""
        self._drop_dead(now)
        return list(self._nodes.values())

    def suspect_after_s(self) -> float:
        """Who was not heard of for so long is suspect: longer than can be by chance."""
        return max(self._settings.stale_s, 3 * self.period_s())

    def holders(self, model: str) -> list[Holder]:
        """Who could run a model, whatever spelling of its name is given."""
        return list(self._holders.get(model_key(model), {}).values())

    def _put(self, entry: KnownNode) -> None:
        peer = entry.report.peer
        old = self._nodes.get(peer)
        more = entry.bytes - (old.bytes if old is not None else 0)
        self._bytes += more
        self._reports_bytes += more
        self._nodes[peer] = entry

    def _learn_models(
        self, entry: KnownNode, pages: Sequence[ModelsReport], models: tuple[BackendModels, ...]
    ) -> None:
        peer = entry.report.peer
        self._remove_from_index(peer)
        self._bytes -= entry.pages_bytes
        entry.models, entry.models_at = models, entry.wanted
        entry.pages = {page.page: page for page in pages}
        entry.pages_bytes = sum(len(msgspec.msgpack.encode(page)) for page in pages)
        self._bytes += entry.pages_bytes
        self._asked.pop(peer, None)
        for backend in models:
            ring = ring_place(peer, backend.name)
            for model in backend.models:
                holder = Holder(
                    peer=peer,
                    backend=backend.name,
                    servable=model,
                    key=CandidateKey(peer, backend.name, model.name),
                    name=(backend.name, model_key(model.name)),
                    ring=ring,
                )
                key = (peer, backend.name)
                self._holders.setdefault(model_key(model.name), {})[key] = holder

    def _remove_from_index(self, peer: str) -> None:
        for backend in self._nodes[peer].models:
            for model in backend.models:
                name = model_key(model.name)
                holders = self._holders.get(name, {})
                holders.pop((peer, backend.name), None)
                if not holders:
                    self._holders.pop(name, None)

    def _drop_dead(self, now: float) -> None:
        dead = [
            peer
            for peer, node in self._nodes.items()
            if peer != self.peer and now - node.made_at > self._settings.dead_s
        ]
        for peer in dead:
            self._remove(peer)
        kept = self._settings.dead_s
        self._forgotten = {peer: at for peer, at in self._forgotten.items() if now - at[2] <= kept}

    def _remove(self, peer: str) -> None:
        entry = self._nodes[peer]
        self._remove_from_index(peer)
        self._bytes -= entry.bytes + entry.pages_bytes
        self._reports_bytes -= entry.bytes
        del self._nodes[peer]
        self._telling.pop(peer, None)
        self._asked.pop(peer, None)


def _rounded(rate: float) -> float:
    """To two digits, so that a report differs only when something did."""
    return float(f"{min(max(rate, 0.0), 1e9):.2g}")


@lru_cache(maxsize=8_192)  # Reading a name takes 20 µs, and each request needs a few.
def model_key(name: str) -> str:
    """The same for every spelling of a model's name; names that Ollama would not take (an OpenAI
    engine may have such) are compared as they are, but for upper and lower case.
    """
    try:
        return parse_model_name(name).key
    except BadName:
        return name.casefold()


def ring_place(peer: str, backend: str) -> int:
    """64 bits by which an engine stands on every node's ring."""
    drawn = hashlib.blake2b(f"{peer}\0{backend}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "big")


def _at(report: LoadReport) -> tuple[int, int]:
    return (report.epoch, report.sequence)


def _version(page: ModelsReport) -> tuple[int, int, int]:
    return (page.epoch, page.version, page.pages)


def _entry(report: LoadReport, *, made_at: float, direct: bool, via: str) -> KnownNode:
    return KnownNode(
        report=report,
        made_at=made_at,
        direct=direct,
        via=via,
        bytes=len(msgspec.msgpack.encode(report)),
    )


def _fitted(report: LoadReport) -> LoadReport:
    """The report, with what is last in its lists left out until it is short enough."""
    while len(msgspec.msgpack.encode(report)) > REPORT_BYTES_MAX:
        shorter = tuple(
            msgspec.structs.replace(
                backend,
                loaded=backend.loaded[: len(backend.loaded) // 2],
                speeds=backend.speeds[: len(backend.speeds) // 2],
            )
            for backend in report.backends
        )
        report = msgspec.structs.replace(report, backends=shorter)
    return report


def _first_that_fit(nodes: Sequence[KnownNode]) -> tuple[list[KnownNode], list[KnownNode]]:
    """As many as one message takes, in order; and the rest."""
    taken = _ENVELOPE_BYTES
    for count, node in enumerate(nodes):
        taken += node.bytes + _AGED_BYTES
        if taken > GOSSIP_BYTES_MAX or count == 1_024:
            return list(nodes[:count]), list(nodes[count:])
    return list(nodes), []


def _news(nodes: Sequence[KnownNode], now: float) -> LoadNews:
    return LoadNews(
        reports=tuple(
            AgedReport(report=node.report, age_s=min(max(now - node.made_at, 0.0), 1e9))
            for node in nodes
        )
    )


def _news_in_messages(nodes: Sequence[KnownNode], now: float) -> Iterator[LoadNews]:
    for _ in range(ANSWER_BYTES_MAX // GOSSIP_BYTES_MAX):
        first, nodes = _first_that_fit(nodes)
        if not first:
            return
        yield _news(first, now)


def _in_pages(report: LoadReport, models: tuple[BackendModels, ...]) -> list[ModelsReport]:
    """A node's models as messages; what exceeds PAGES_MAX is left out."""
    pages: list[dict[str, list[ServableModel]]] = [{}]
    taken = _ENVELOPE_BYTES
    for backend in models:
        for model in backend.models:
            model_bytes = len(msgspec.msgpack.encode(model))
            if model_bytes > MODEL_BYTES_MAX:
                continue
            if taken + model_bytes + len(backend.name.encode()) + 32 > GOSSIP_BYTES_MAX:
                pages.append({})
                taken = _ENVELOPE_BYTES
            if backend.name not in pages[-1]:
                taken += len(backend.name.encode()) + 32
            taken += model_bytes
            pages[-1].setdefault(backend.name, []).append(model)
    pages = pages[:PAGES_MAX]
    return [
        ModelsReport(
            peer=report.peer,
            epoch=report.epoch,
            version=report.models_version,
            page=number,
            pages=len(pages),
            backends=tuple(
                BackendModels(name=name, models=tuple(held)) for name, held in page.items()
            ),
        )
        for number, page in enumerate(pages)
    ]


def _merged(pages: Sequence[ModelsReport]) -> tuple[BackendModels, ...]:
    models: dict[str, list[ServableModel]] = {}
    for page in pages:
        for backend in page.backends:
            models.setdefault(backend.name, []).extend(backend.models)
    return tuple(BackendModels(name=name, models=tuple(held)) for name, held in models.items())

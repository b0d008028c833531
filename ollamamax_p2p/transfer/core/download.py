"""One download's state: what is wanted, of whom it was asked, what arrived. Sans-IO.

The shell tells what happened (a source came, its part arrived, a chunk proved right) and then
calls `decide`, which gives what to do: `Ask` a peer for a chunk, `Drop` a request, `Claim` a run of
chunks of an origin, `Leave` a source alone. The rules:

- The rarest chunk first, ties at random, the first few at random. Of a seed each fetcher asks for
  its own part of the equally rare ones first.
- What another partial holder can send soon is not asked of a complete one: a seed's upload is what
  the whole swarm waits for, so it should send each chunk about once.
- An origin is asked only for what no peer that serves us has.
- Strict endgame: a second source is asked for a chunk only when every wanted chunk has been asked
  for, that source has nothing else to do, and the first one is late with it.
- Per source as many bytes are outstanding as it sends in three round trips: at least two chunks, at
  most `requests_in_flight_bytes` (but one chunk always); over all peers at most
  `in_flight_bytes_max`.
- A source that is silent while it owes something loses its requests; after a few such strikes it
  is left alone.

A request that was taken back (cancel, choke, stall) may still be answered: the bytes were under
way. So each such request stays noted as a **stray**, is let in and thrown away once, and everything
beyond what was ever asked for is misbehaviour.
"""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Literal

from ollamamax_p2p.errors import PeerMisbehaved
from ollamamax_p2p.transfer.core.chunk_selection import UnaskedChunks
from ollamamax_p2p.transfer.core.messages import PART_BYTES_MIN
from ollamamax_p2p.transfer.core.rate import RateEstimate
from ollamamax_p2p.transfer.settings import TransferSettings

MiB = 1024 * 1024

RANDOM_FIRST = 4
"""Chunks picked at random before rarity counts, as BitTorrent clients do."""

PIPELINE_ROUND_TRIPS = 3.0
"""One keeps a link full at best; more let the measured rate grow until the link, not we, limits it.
With two, a 200 Mbit/s link of 100 ms was at half its rate after two seconds (simulated).
"""

ASKED_MAX = 128
"""Requests outstanding at one source, however small the chunks: half of what a server accepts."""

SPARE_S = 2.0
"""A complete holder is spared what the others can send within this time."""

LATE_S = 0.5
"""A request younger than this is not repeated elsewhere, however slow its source seems."""

RATE_UNKNOWN_BYTES_S = 1.0 * MiB
"""Taken for a source that has sent nothing yet."""

CLAIM_BYTES = 32 * MiB
"""What one connection to an origin is asked for at once: enough that the pause between two requests
does not show, little enough to leave the rest to others.
"""

CHOKED_S_MAX = 300.0
"""A source that has choked us this long is left alone: with 8 slots turning every 10 s, two hundred
peers have had their turn by then.
"""

SourceKind = Literal["peer", "origin"]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this peer for this chunk."""

    source: str
    chunk: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Take the request back; what still comes of it is thrown away."""

    source: str
    chunk: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Fetch this run of chunks from this origin: [first, first + count)."""

    source: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing more is wanted of this source; it has been removed."""

    source: str
    reason: str


Intention = Ask | Drop | Claim | Leave


class Arrival(Enum):
    """What to do with bytes that arrived."""

    MORE = "keep them, the chunk is not whole yet"
    WHOLE = "the chunk is whole: verify it, then tell `chunk_verified` or `chunk_wrong`"
    STRAY = "throw them away"


@dataclass(slots=True)
class _Request:
    asked_at: float
    alone: bool
    """Nothing else was outstanding at the source, so its first part tells the round trip."""
    received: int = 0
    verifying: bool = False


@dataclass(slots=True)
class _Source:
    name: str
    kind: SourceKind
    complete: bool
    has: set[int]
    choked: bool
    heard_at: float
    round_trip_s: float
    asked: dict[int, _Request] = field(default_factory=dict)
    strays: dict[int, list[int]] = field(default_factory=dict)
    rate: RateEstimate = field(default_factory=RateEstimate)
    strikes: int = 0
    stalled: bool = False
    """It lost its requests and has sent nothing since; trusted with one at a time."""
    dry_at: int = -1
    """It had nothing to be asked for when the download's `_turn` was this."""

    def holds(self, chunk: int) -> bool:
        return self.complete or chunk in self.has

    @property
    def owes(self) -> bool:
        return any(not request.verifying for request in self.asked.values())


class Download:
    """Decides what to ask of whom, for one blob cut in one way."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        present: Collection[int],
        settings: TransferSettings,
        rng: random.Random,
        own: str = "",
    ) -> None:
        """lengths: bytes of each chunk; present: the chunks that are here already; own: this
        node's name among the sources' names.
        """
        self._own = own
        self._lengths = lengths
        self._settings = settings
        self._rng = rng
        self._verified = set(present)
        self._unasked = UnaskedChunks(
            (i for i in range(len(lengths)) if i not in self._verified), rng=rng
        )
        self._unasked_bytes = sum(lengths[i] for i in range(len(lengths)) if i in self._unasked)
        self._chunk_bytes = max(lengths, default=0)
        self._offsets = [0, *accumulate(lengths)]
        self._sources: dict[str, _Source] = {}
        self._askers: dict[int, dict[str, None]] = {}  # chunk: sources asked for it now, in order
        self._banned: set[str] = set()
        self._in_flight_bytes = 0
        self._intentions: list[Intention] = []
        self._fetched = 0
        self._turn = 0  # counts what can give a source that had nothing for us something again
        self.verified_bytes = sum(lengths[i] for i in self._verified)
        """Bytes that are here and right, old and new."""
        self._credits: dict[str, int] = {}
        self._refetched_bytes = 0

    # -- what is so ----------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every chunk is here."""
        return len(self._verified) == len(self._lengths)

    @property
    def verified(self) -> set[int]:
        """The chunks that are here; not to be changed."""
        return self._verified

    def outstanding(self, source: str) -> Collection[int]:
        """The chunks that this source is asked for now."""
        known = self._sources.get(source)
        return known.asked.keys() if known else ()

    def active_sources(self) -> int:
        """How many sources have something to send now."""
        return sum(1 for source in self._sources.values() if source.asked)

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes of each chunk."""
        return self._lengths

    @property
    def offsets(self) -> Sequence[int]:
        """Where each chunk begins, and at the end the blob's size."""
        return self._offsets

    def settle(self) -> tuple[dict[str, int], int]:
        """What has come since the last call: verified bytes by source, and bytes that were of no
        use because they were sent twice, wrong, or cut off.
        """
        settled = self._credits, self._refetched_bytes
        self._credits, self._refetched_bytes = {}, 0
        return settled

    def can_go_on(self) -> bool:
        """Whether any source, choked or not, has a chunk that is missing."""
        return any(
            source.complete
            or any(chunk in source.has for chunk in self._askers)
            or any(chunk in source.has for chunk in self._unasked)
            for source in self._sources.values()
        )

    def sources(self) -> Collection[str]:
        """Those that take part, choked ones too."""
        return self._sources.keys()

    # -- sources come and go -------------------------------------------------------------------

    def source_added(
        self,
        name: str,
        *,
        kind: SourceKind = "peer",
        has: Iterable[int] | None = None,
        choked: bool = False,
        round_trip_s: float = 0.0,
        now: float,
    ) -> None:
        """A source takes part. has: its chunks; None if it has them all. round_trip_s: how long it
        took to answer something short. One that was banned stays out.
        """
        if name in self._banned:
            return
        self.source_removed(name)
        source = _Source(name, kind, has is None, set(), choked, now, round_trip_s)
        self._sources[name] = source
        self.source_has(name, has or ())

    def source_has(self, name: str, chunks: Iterable[int]) -> None:
        """It has got these since. Raises PeerMisbehaved for a chunk that the blob does not have."""
        source = self._sources.get(name)
        if source is None or source.complete:
            return
        for chunk in chunks:
            if chunk >= len(self._lengths):
                raise PeerMisbehaved("", f"it says it has chunk {chunk} of {len(self._lengths)}")
            if chunk not in source.has:
                source.dry_at = -1
                source.has.add(chunk)
                self._unasked.seen(chunk, +1)
                self._spare_a_seed(source, chunk)

    def source_removed(self, name: str) -> None:
        """It is gone; others are asked for what it owes."""
        source = self._sources.pop(name, None)
        if source is None:
            return
        self._turn += 1
        for chunk in list(source.asked):
            self._forget(source, chunk)
        for chunk in source.has:
            self._unasked.seen(chunk, -1)

    def source_banned(self, name: str) -> None:
        """It lied: it is gone, and never asked again."""
        self._banned.add(name)
        self.source_removed(name)

    def choked(self, name: str, *, now: float) -> None:
        """It will not answer what it was asked."""
        source = self._sources.get(name)
        if source is not None:
            self._turn += 1
            for chunk in _not_verifying(source):
                self._take_back(source, chunk)
            source.choked = True
            source.heard_at = now

    def unchoked(self, name: str, *, now: float) -> None:
        """It may be asked."""
        source = self._sources.get(name)
        if source is not None:
            source.choked = False
            source.heard_at = now

    # -- bytes arrive --------------------------------------------------------------------------

    def part_arrived(
        self, name: str, chunk: int, offset: int, length: int, *, now: float
    ) -> Arrival:
        """Bytes of a chunk came. Raises PeerMisbehaved if they were never asked for."""
        source = self._sources.get(name)
        if source is None:
            return Arrival.STRAY
        request = source.asked.get(chunk)
        if request is None or request.verifying or request.received != offset:
            self._stray(source, chunk, offset, length)
            self._heard(source, now)
            return Arrival.STRAY
        end = self._part_end(source, chunk, offset, length)
        self._measure(source, request, length, now)
        self._heard(source, now)
        request.received = end
        if end < self._lengths[chunk]:
            return Arrival.MORE
        request.verifying = True
        return Arrival.WHOLE

    def chunk_verified(self, name: str, chunk: int, *, now: float) -> None:
        """The whole chunk that came from this source is right, and written."""
        source = self._sources.get(name)
        request = source.asked.pop(chunk, None) if source else None
        if source is not None and request is not None:
            self._ended(source, chunk)
            source.heard_at = now
        length = self._lengths[chunk]
        if chunk in self._verified:
            self._refetched_bytes += length
            return
        self._verified.add(chunk)
        self._fetched += 1
        self.verified_bytes += length
        self._credits[name] = self._credits.get(name, 0) + length
        if chunk in self._unasked:  # the source was gone before its chunk had been verified
            self._unasked.remove(chunk)
            self._unasked_bytes -= length
        for other in [self._sources[asked] for asked in self._askers.get(chunk, ())]:
            if not other.asked[chunk].verifying:
                self._take_back(other, chunk)
                self._intentions.append(Drop(other.name, chunk))

    def chunk_wrong(self, name: str, chunk: int) -> None:
        """The whole chunk that came from this source is wrong: it is banned."""
        self._refetched_bytes += self._lengths[chunk]
        self.source_banned(name)

    # -- time passes ---------------------------------------------------------------------------

    def tick(self, *, now: float) -> None:
        """Notice who is silent. Call it a few times a second, then `decide`."""
        for source in list(self._sources.values()):
            silent_s = now - source.heard_at
            if source.kind == "origin":
                continue  # its client notices silence itself, and asks again
            if source.owes and silent_s >= self._settings.stall_timeout_s:
                self._strike(source, now)
            elif source.choked and silent_s >= CHOKED_S_MAX:
                self._leave(source, f"it has let us wait for {CHOKED_S_MAX:g} s")

    def decide(self, *, now: float) -> list[Intention]:
        """What to do now, in order. Every intention is given once."""
        for source in self._in_turn():
            while (intention := self._next(source, now)) is not None:
                self._intentions.append(intention)
        intentions, self._intentions = self._intentions, []
        return intentions

    # -- the rules -----------------------------------------------------------------------------

    def _in_turn(self) -> list[_Source]:
        """Partial holders before complete ones before origins, those that stalled last; equals in
        random order.
        """
        sources = list(self._sources.values())
        self._rng.shuffle(sources)
        return sorted(
            sources, key=lambda source: (source.stalled, source.kind == "origin", source.complete)
        )

    def _next(self, source: _Source, now: float) -> Intention | None:
        if source.choked or (source.stalled and source.asked):
            return None
        if source.kind == "origin":
            return self._claim(source, now)
        if not self._has_room(source, 1):
            return None
        chunk = self._unasked_chunk(source) if self._unasked else self._late_chunk(source, now)
        if chunk is None or not self._has_room(source, self._lengths[chunk]):
            return None
        self._ask(source, chunk, now)
        return Ask(source.name, chunk)

    def _unasked_chunk(self, source: _Source) -> int | None:
        if source.complete:
            chunk = self._rarest_of_a_seed()
            return None if chunk is None or self._others_send_soon(chunk) else chunk
        if source.dry_at == self._turn:
            return None
        early = self._fetched < RANDOM_FIRST
        pick = self._unasked.any if early else self._unasked.rarest
        chunk = pick(source.has.__contains__)
        if chunk is None:
            source.dry_at = self._turn
        return chunk

    def _rarest_of_a_seed(self) -> int | None:
        """The rarest, and among equals one of this node's part: those who fetch the same blob from
        the same seed divide its chunks among themselves by the order of their ids, so that what
        one asks for now is not what the others ask for now.
        """
        rarest = self._unasked.rarest(lambda _: True)
        fetchers = sorted([self._own, *self._partial_holders()])
        if rarest is None or len(fetchers) == 1:
            return rarest
        part, parts = fetchers.index(self._own), len(fetchers)
        mine = self._unasked.rarest(lambda chunk: chunk % parts == part)
        if mine is None or self._unasked.holders(mine) > self._unasked.holders(rarest):
            return rarest
        return mine

    def _partial_holders(self) -> list[str]:
        return [source.name for source in self._sources.values() if not source.complete]

    def _others_send_soon(self, chunk: int) -> bool:
        """Whether partial holders can bring all that is unasked within SPARE_S. The chunk is the
        rarest, so if one of them has it, they have them all.
        """
        others = [
            source
            for source in self._sources.values()
            if source.kind == "peer" and not (source.complete or source.choked or source.stalled)
        ]
        if not any(chunk in source.has for source in others):
            return False
        rate = sum(source.rate.bytes_per_s or RATE_UNKNOWN_BYTES_S for source in others)
        return self._unasked_bytes <= rate * SPARE_S

    def _spare_a_seed(self, source: _Source, chunk: int) -> None:
        """A partial holder has got what a complete one was asked for and has not begun to send:
        take the request back, so that the seed sends something that nobody has.
        """
        askers = [self._sources[name] for name in self._askers.get(chunk, ())]
        if len(askers) != 1 or source.choked or source.stalled:
            return
        asker = askers[0]
        waits = chunk in _not_verifying(asker)[1:]  # behind the one that is being sent
        if asker.complete and waits and self._has_room(source, self._lengths[chunk]):
            self._take_back(asker, chunk)
            self._intentions.append(Drop(asker.name, chunk))

    def _late_chunk(self, source: _Source, now: float) -> int | None:
        """Endgame: a chunk that its one source is late with, if this one has nothing to do."""
        if source.asked:
            return None
        late = [
            (self._lateness(other, chunk, source, now), chunk)
            for chunk, askers in self._askers.items()
            if len(askers) == 1 and source.holds(chunk)
            for other in askers
        ]
        worst = max(late, default=(0.0, -1))
        return worst[1] if worst[0] > 0 else None

    def _lateness(self, other: str, chunk: int, source: _Source, now: float) -> float:
        """Seconds by which this source would probably bring the chunk sooner than the other."""
        holder = self._sources[other]
        request = holder.asked[chunk]
        if request.verifying or now - request.asked_at < LATE_S:
            return 0.0
        owed = sum(self._lengths[i] - r.received for i, r in holder.asked.items())
        there_s = owed / max(holder.rate.bytes_per_s, 1.0) + (now - holder.heard_at)
        here_s = self._lengths[chunk] / (source.rate.bytes_per_s or RATE_UNKNOWN_BYTES_S)
        return there_s - 2 * here_s

    def _has_room(self, source: _Source, length: int) -> bool:
        if not self._in_flight_bytes:
            return True
        if self._in_flight_bytes + length > self._settings.in_flight_bytes_max:
            return False
        if not source.asked:
            return True
        if len(source.asked) >= ASKED_MAX:
            return False
        outstanding = sum(self._lengths[chunk] for chunk in source.asked)
        ahead = PIPELINE_ROUND_TRIPS * source.rate.bytes_per_s * source.round_trip_s
        if source.complete and self._partial_holders():
            # What is asked of a seed early, others ask of it too, not knowing of one another.
            owed = outstanding - sum(request.received for request in source.asked.values())
            if owed > max(ahead, self._chunk_bytes / 4):
                return False
        limit = min(max(2 * self._chunk_bytes, ahead), self._settings.requests_in_flight_bytes)
        return outstanding + length <= limit

    def _claim(self, source: _Source, now: float) -> Claim | None:
        """A run within one stretch of CLAIM_BYTES, so that runs claimed at random fit together."""
        if source.asked or source.dry_at == self._turn:
            return None
        chunk = self._unasked.rarest(self._only_an_origin_has)
        if chunk is None:
            source.dry_at = self._turn
            return None
        stretch = self._offsets[chunk] // CLAIM_BYTES
        first, end = chunk, chunk + 1
        while self._claimable(first - 1, stretch):
            first -= 1
        while self._claimable(end, stretch):
            end += 1
        for claimed in range(first, end):
            self._ask(source, claimed, now)
        return Claim(source.name, first, end - first)

    def _claimable(self, chunk: int, stretch: int) -> bool:
        return (
            chunk in self._unasked
            and self._offsets[chunk] // CLAIM_BYTES == stretch
            and self._only_an_origin_has(chunk)
        )

    def _only_an_origin_has(self, chunk: int) -> bool:
        return not any(
            source.kind == "peer"
            and not source.choked
            and not source.stalled
            and source.holds(chunk)
            for source in self._sources.values()
        )

    def _strike(self, source: _Source, now: float) -> None:
        for chunk in _not_verifying(source):
            self._take_back(source, chunk)
            self._intentions.append(Drop(source.name, chunk))
        self._turn += 1
        source.strikes += 1
        source.stalled = True
        source.heard_at = now
        if source.strikes >= self._settings.stall_strikes:
            self._leave(source, f"it fell silent {source.strikes} times")

    def _leave(self, source: _Source, reason: str) -> None:
        self.source_removed(source.name)
        self._intentions.append(Leave(source.name, reason))

    # -- bookkeeping ---------------------------------------------------------------------------

    def _ask(self, source: _Source, chunk: int, now: float) -> None:
        alone = not source.asked
        if alone:
            source.heard_at = now
            source.rate.begin(now)
        source.asked[chunk] = _Request(now, alone)
        self._askers.setdefault(chunk, {})[source.name] = None
        if source.kind == "peer":
            self._in_flight_bytes += self._lengths[chunk]
        if chunk in self._unasked:
            self._unasked.remove(chunk)
            self._unasked_bytes -= self._lengths[chunk]

    def _forget(self, source: _Source, chunk: int) -> _Request:
        """The request will not be answered; the chunk is wanted again if nobody else is asked."""
        request = source.asked.pop(chunk)
        if not request.verifying:  # else `chunk_verified` or `chunk_wrong` will count it
            self._refetched_bytes += request.received
        self._ended(source, chunk)
        if chunk not in self._askers and chunk not in self._verified:
            self._turn += 1
            self._unasked.add(chunk)
            self._unasked_bytes += self._lengths[chunk]
        return request

    def _take_back(self, source: _Source, chunk: int) -> None:
        """As `_forget`, but what is under way may still come."""
        request = self._forget(source, chunk)
        source.strays.setdefault(chunk, []).append(request.received)

    def _ended(self, source: _Source, chunk: int) -> None:
        del self._askers[chunk][source.name]
        if not self._askers[chunk]:
            del self._askers[chunk]
        if source.kind == "peer":
            self._in_flight_bytes -= self._lengths[chunk]

    def _heard(self, source: _Source, now: float) -> None:
        source.heard_at = now
        source.stalled = False

    def _measure(self, source: _Source, request: _Request, length: int, now: float) -> None:
        source.rate.arrived(length, now)
        if request.alone and request.received == 0:
            source.round_trip_s = min(source.round_trip_s, now - request.asked_at)

    def _part_end(self, source: _Source, chunk: int, offset: int, length: int) -> int:
        end, whole = offset + length, self._lengths[chunk]
        if end > whole:
            raise PeerMisbehaved("", f"it sent more of chunk {chunk} than there is")
        if length < PART_BYTES_MIN and end < whole and source.kind == "peer":
            raise PeerMisbehaved("", f"it sends chunks in drops of {length} bytes")
        return end

    def _stray(self, source: _Source, chunk: int, offset: int, length: int) -> None:
        expected = source.strays.get(chunk, [])
        if offset not in expected:
            raise PeerMisbehaved("", f"it sent bytes of chunk {chunk} that were not asked for")
        expected.remove(offset)
        end = self._part_end(source, chunk, offset, length)
        if end < self._lengths[chunk]:
            expected.append(end)
        elif not expected:
            del source.strays[chunk]
        self._refetched_bytes += length


def _not_verifying(source: _Source) -> list[int]:
    return [chunk for chunk, request in source.asked.items() if not request.verifying]


def present_chunks(
    offsets: Sequence[int], lengths: Sequence[int], missing: Sequence[tuple[int, int]]
) -> Iterator[int]:
    """The chunks of which no byte is missing. missing: ranges [start, end), in order."""
    gaps = iter(missing)
    gap = next(gaps, None)
    for chunk, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        while gap is not None and gap[1] <= start:
            gap = next(gaps, None)
        if gap is None or gap[0] >= start + length:
            yield chunk

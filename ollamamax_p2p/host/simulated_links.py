"""What carries bytes in a simulated network: time, rates that streams share, latency, windows.

A `Segment` goes through the sender's upload, the `Link`'s own queue, the link's latency and the
receiver's download, and ends in its `Pipe`, which is one direction of one stream. The `Timeline`
makes all of it happen in one task, in order.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

KiB = 1024

SEGMENT_BYTES = 64 * KiB
"""What is queued and charged at once: the grain of fairness, and of a simulation's cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConditions:
    """What the way between two hosts is like, each direction for itself."""

    latency_s: float = 0.000_5
    """One way; half a millisecond is a local network's."""

    jitter_s: float = 0.000_2
    """Up to this much is added, drawn anew each time; the order of what is sent stays."""

    tick_s: float = 0.0
    """Arrivals are put off to the next multiple of this; 0 leaves them as they are. 2 ms make a
    simulation of a hundred busy nodes run in two thirds of the time: the clock moves less often.
    """

    bandwidth_bytes_s: float = math.inf
    """Of this link alone; a host's own upload and download come before and after it."""

    window_bytes: int = 256 * KiB
    """What a stream carries unread: yamux's window in py-libp2p 0.8.1."""

    connection_life_s_mean: float = math.inf
    """Connections are reset by themselves after a time drawn from an exponential distribution."""

    dial_timeout_s: float = 10.0
    """A dial, or the opening of a stream, that is not answered ends after this long."""


LOCAL_NETWORK = LinkConditions()
"""A switch in the same room."""


class LinkedHost(Protocol):
    """What a link knows of the hosts at its ends."""

    upload: "FairQueue"
    download: "FairQueue"

    def deliver(self, action: Callable[[], None]) -> None:
        """Have the host's program do something, when it runs."""


class Reader(Protocol):
    """The stream that reads a pipe."""

    def lose(self, problem: str) -> None:
        """It was reset."""


def pipes(there: "Link", back: "Link") -> tuple["Pipe", "Pipe"]:
    """The two directions of a new stream."""
    outgoing, incoming = Pipe(there), Pipe(back)
    outgoing.back, incoming.back = incoming, outgoing
    return outgoing, incoming


class Pipe:
    """One direction of one stream: what is between its writer and its reader."""

    __slots__ = (
        "_room", "_unreported", "arrived", "back", "dead", "ended", "link", "reader", "readers",
        "refused", "window", "writers",
    )  # fmt: skip

    def __init__(self, link: "Link") -> None:
        self.link = link
        self.back = self
        """The other direction of the same stream; see `pipes`."""
        self.reader: Reader | None = None
        self.window = link.conditions.window_bytes
        self.arrived: list[bytes | memoryview] = []
        self.ended = False
        """The writer will send nothing more, and the reader knows."""
        self.refused = False
        """The reader has closed the stream, and the writer knows."""
        self.dead = False
        """What arrives now is nobody's."""
        self.readers = trio.lowlevel.ParkingLot()
        self.writers = trio.lowlevel.ParkingLot()
        self._room = self.window
        self._unreported = 0

    def take(self, data: memoryview) -> int:
        """Send as much as the window has room for; gives how many bytes that was."""
        taken = min(len(data), self._room)
        self._room -= taken
        for start in range(0, taken, SEGMENT_BYTES):
            part = data[start : min(start + SEGMENT_BYTES, taken)]
            self.link.source.upload.push(Segment(self, part))
        return taken

    def push_mark(self, action: Callable[[], None]) -> None:
        """Have something happen at the reader when all that was sent before has arrived."""
        self.link.source.upload.push(Segment(self, b"", action))

    def read(self) -> bytes:
        """All that has arrived; makes room for the writer, which it hears of later."""
        data = b"".join(self.arrived)
        self.arrived.clear()
        self._unreported += len(data)
        # Half a window at a time, as yamux reports it: fewer messages, and the writer never stops
        # while the reader keeps up.
        if self._unreported >= self.window // 2:
            self.back.link.carry(partial(self._make_room, self._unreported))
            self._unreported = 0
        return data

    def _make_room(self, size: int) -> None:
        self._room += size
        self.writers.unpark_all()

    def end(self) -> None:
        """The writer has said that it is done."""
        self.ended = True
        self.readers.unpark_all()

    def end_both(self) -> None:
        """The writer has closed its side of the stream altogether: it reads nothing either."""
        self.end()
        self.back.refused = True
        self.back.writers.unpark_all()


class Segment:
    """Bytes on their way; or, with an action, a mark between them."""

    __slots__ = ("_action", "_data", "pipe", "size")

    def __init__(
        self, pipe: Pipe, data: bytes | memoryview, action: Callable[[], None] | None = None
    ) -> None:
        self.pipe = pipe
        self.size = len(data)
        self._data = data
        self._action = action

    def arrive(self) -> None:
        """It is at the reader."""
        if self.pipe.dead:
            return
        if self._action is not None:
            self._action()
        else:
            self.pipe.arrived.append(self._data)
            self.pipe.readers.unpark_all()


class FairQueue:
    """A rate that streams share: each that waits sends one segment in turn."""

    __slots__ = ("_busy", "_forward", "_timeline", "_waiting", "rate")

    def __init__(
        self, timeline: "Timeline", rate: float, forward: Callable[[Segment], None]
    ) -> None:
        self.rate = rate
        self._timeline = timeline
        self._forward = forward
        self._waiting: dict[Pipe, deque[Segment]] = {}  # the first is the next in turn
        self._busy = False

    def push(self, segment: Segment) -> None:
        """Take a segment in; it leaves when its time has been spent on it."""
        if not self._busy and (self.rate == math.inf or not segment.size):
            self._forward(segment)
            return
        queue = self._waiting.get(segment.pipe)
        if queue is None:
            queue = self._waiting[segment.pipe] = deque()
        queue.append(segment)
        if not self._busy:
            self._start()

    def _start(self) -> None:
        pipe = next(iter(self._waiting))
        queue = self._waiting.pop(pipe)
        segment = queue.popleft()
        if queue:
            self._waiting[pipe] = queue
        self._busy = True
        spent_s = 0.0 if segment.pipe.dead else segment.size / self.rate
        self._timeline.at(self._timeline.now() + spent_s, self._finish, segment)

    def _finish(self, segment: Segment) -> None:
        self._busy = False
        if self._waiting:
            self._start()
        if not segment.pipe.dead:
            self._forward(segment)


class Link:
    """The way from one host to another. What it carries arrives in the order it was sent."""

    def __init__(
        self,
        source: LinkedHost,
        target: LinkedHost,
        conditions: LinkConditions,
        *,
        timeline: "Timeline",
        rng: random.Random,
        is_cut: Callable[[], bool],
    ) -> None:
        self.source = source
        self.target = target
        self.conditions = conditions
        self.queue = FairQueue(timeline, conditions.bandwidth_bytes_s, self._depart)
        self._timeline = timeline
        self._rng = rng
        self._is_cut = is_cut
        self._arrival_last = 0.0
        self._held: list[Callable[[], None]] = []

    def set_conditions(self, conditions: LinkConditions) -> None:
        """From the next segment on."""
        self.conditions = conditions
        self.queue.rate = conditions.bandwidth_bytes_s

    def carry(self, action: Callable[[], None]) -> None:
        """Something small, whose bytes are not charged, happens at the other end."""
        delay_s = self.conditions.latency_s + self._rng.random() * self.conditions.jitter_s
        arrival = max(self._arrival_last, self._timeline.now() + delay_s)
        tick_s = self.conditions.tick_s
        self._arrival_last = _next_tick(arrival, tick_s) if tick_s else arrival
        self._timeline.at(self._arrival_last, self._arrive, action)

    async def cross(self) -> None:
        """Wait for one message to the other end, and for the program there to take it."""
        arrived = trio.Event()
        self.carry(partial(self.target.deliver, arrived.set))
        await arrived.wait()

    def go_on(self) -> None:
        """Carry again what a partition held up."""
        if self._held and not self._is_cut():
            held, self._held = self._held, []
            for action in held:
                self.carry(action)

    def _depart(self, segment: Segment) -> None:
        self.carry(partial(self.target.download.push, segment))

    def _arrive(self, action: Callable[[], None]) -> None:
        if self._is_cut():
            self._held.append(action)
        else:
            action()


class Timeline:
    """What will happen when. One task runs it all, in order of time, then of arrival."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self._wakes_at = math.inf
        self._earlier = trio.Event()

    @staticmethod
    def now() -> float:
        """Seconds of trio's clock."""
        return trio.current_time()

    def at(self, time: float, action: Callable[..., None], *arguments: object) -> None:
        """Call the action then, or as soon after as the run goes on."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, action, arguments))
        if time < self._wakes_at:
            self._earlier.set()

    async def run(self) -> None:
        """Make things happen; never ends."""
        while True:
            self._wakes_at = -math.inf  # what is added meanwhile needs no waking
            self._run_due()
            self._wakes_at = self._events[0][0] if self._events else math.inf
            self._earlier = trio.Event()
            with trio.move_on_at(self._wakes_at):
                await self._earlier.wait()

    def _run_due(self) -> None:
        now = self.now()
        while self._events and self._events[0][0] <= now:
            _, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)


def _next_tick(time: float, tick_s: float) -> float:
    """The first multiple of tick_s that is not before time; a multiple, give or take a float's
    rounding, stays as it is.
    """
    return math.ceil(time / tick_s - 1e-6) * tick_s

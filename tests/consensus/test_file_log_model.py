"""FileLog against RamLog: whatever is done to both, with restarts and crashes in between, both hold
the same.
"""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from ollamamax_p2p.consensus.core.messages import Entry, EntryType, HardState
from ollamamax_p2p.consensus.file_log import FileLog
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.errors import StoreFull
from ollamamax_p2p.testing.simulated_disk import Crashed, Loss, SimulatedDisk
from tests.consensus.log_stories import held, opened, snapshot

DATA = st.binary(max_size=30) | st.integers(0, 900).map(bytes) | st.just(b"x" * 1500)
STATES = st.none() | st.builds(
    HardState, st.integers(0, 99), st.integers(0, 5), st.integers(0, 999)
)


class LogMachine(RuleBasedStateMachine):
    """Three things may be behind a crash: the last synced state, and each one since."""

    log: FileLog
    ram: RamLog

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimulatedDisk()
        self.term = 0
        self.done: list = []
        """What was done, since the beginning."""
        self.synced = 0
        """How much of it was promised."""

    @initialize(segment_bytes=st.sampled_from([512, 2048, 16384]))
    def open(self, segment_bytes):
        self.segment_bytes = segment_bytes
        self.log = opened(self.disk, segment_bytes)
        self.ram = RamLog()

    def do(self, action, *, sync=True):
        self.term += 1
        action(self.ram)
        self.done.append(action)
        action(self.log)
        if sync:
            self.synced = len(self.done)

    @rule(back=st.integers(0, 4), data=st.lists(DATA, max_size=6), state=STATES, sync=st.booleans())
    def append(self, back, data, state, sync):
        last = self.ram.last_index()
        first = max(last + 1 - back, self.ram.first_index()) if data else last + 1
        made = [Entry(self.term, first + n, EntryType.NORMAL, each) for n, each in enumerate(data)]
        if self.ram.newest_snapshot() and first <= self.ram.snapshot().metadata.index:
            return  # committed; no Raft replaces it
        self.do(lambda log: log.append(made, state, sync=sync), sync=sync)

    @precondition(lambda self: self.ram.last_index() > 0)
    @rule(draw=st.floats(0, 1))
    def save_snapshot(self, draw):
        newest = self.ram.newest_snapshot()
        low = max(self.ram.first_index() - 1, newest.metadata.index if newest else 1)
        index = low + int(draw * (self.ram.last_index() - low))
        made = snapshot(index, self.ram.term(index))
        self.do(lambda log: log.save_snapshot(made))

    @precondition(
        lambda self: (
            self.ram.newest_snapshot()
            and self.ram.first_index() <= self.ram.snapshot().metadata.index
        )
    )
    @rule(draw=st.floats(0, 1))
    def compact(self, draw):
        low, high = self.ram.first_index(), self.ram.snapshot().metadata.index
        index = low + int(draw * (high - low))
        self.do(lambda log: log.compact(index))

    @rule(ahead=st.integers(0, 30), state=STATES)
    def install_snapshot(self, ahead, state):
        newest = self.ram.newest_snapshot()
        low = newest.metadata.index if newest else self.ram.last_index()
        made = snapshot(low + ahead + 1, self.term)
        self.do(lambda log: log.install_snapshot(made, state))

    @rule()
    def restart(self):
        self.log.close()
        self.synced = len(self.done)
        self.log = opened(self.disk, self.segment_bytes)

    @rule()
    def kill(self):
        self.log = opened(self.disk, self.segment_bytes)
        self.synced = len(self.done)  # opening makes durable what it reads

    @rule(seed=st.integers(0, 2**32), loss=st.sampled_from(Loss))
    def crash(self, seed, loss):
        self.disk.crash(random.Random(seed), loss)
        self.reopen_after_crash(len(self.done))

    @rule(
        seed=st.integers(0, 2**32),
        steps=st.integers(1, 9),
        data=st.lists(DATA, min_size=1, max_size=6),
    )
    def crash_while_appending(self, seed, steps, data):
        self.disk.crash_at = self.disk.steps + steps
        try:
            last = self.ram.last_index()
            made = [
                Entry(self.term, last + 1 + n, EntryType.NORMAL, each)
                for n, each in enumerate(data)
            ]
            self.do(lambda log: log.append(made))
        except Crashed:
            self.disk.crash(random.Random(seed))
            self.reopen_after_crash(len(self.done))
        self.disk.crash_at = None

    @rule(data=st.lists(DATA, min_size=1, max_size=6), later=st.integers(1, 4))
    def full(self, data, later):
        self.disk.fail_write_at = self.disk.writes + later
        last = self.ram.last_index()
        made = [Entry(self.term, last + 1 + n, data=each) for n, each in enumerate(data)]
        try:
            self.log.append(made)
        except StoreFull:
            assert held(self.log) == held(self.ram)
            self.disk.fail_write_at = None
            self.log.append(made)
        self.disk.fail_write_at = None
        self.ram.append(made)
        self.done.append(lambda log: log.append(made))
        self.synced = len(self.done)

    def reopen_after_crash(self, upto):
        self.log = opened(self.disk, self.segment_bytes)
        found = held(self.log)
        ram = RamLog()
        for action in self.done[: self.synced]:
            action(ram)
        kept = self.synced
        matching = [kept] if held(ram) == found else []
        for kept, action in enumerate(self.done[self.synced : upto], self.synced + 1):
            action(ram)
            if held(ram) == found:
                matching.append(kept)
        assert matching, "what was found is no state that there was since the last sync"
        self.done = self.done[: matching[-1]]
        self.synced = len(self.done)
        self.ram = RamLog()
        for action in self.done:
            action(self.ram)

    @invariant()
    def both_hold_the_same(self):
        if hasattr(self, "log"):
            assert held(self.log) == held(self.ram)


TestFileLogIsARamLog = LogMachine.TestCase
TestFileLogIsARamLog.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

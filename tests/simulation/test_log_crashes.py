"""A crash at every write, sync and change of a name in a log's life, with all that it can leave.

After each: the log opens, holds all that was acknowledged and nothing that was not written, whole
batches only, and goes on.
"""

import random

import pytest

from ollamamax_p2p.consensus.core.messages import HardState
from ollamamax_p2p.errors import LogSyncFailed, StoreFull
from ollamamax_p2p.testing.simulated_disk import Crashed, Loss, SimulatedDisk
from tests.consensus.log_stories import (
    BROKEN,
    STORY,
    allowed,
    entries,
    held,
    opened,
    states,
)

STATES = states()


def told(disk: SimulatedDisk, *, from_step: int = 0) -> int:
    """Tell the story until the disk's crash; how many steps returned."""
    done = from_step
    try:
        log = opened(disk)
        for step in STORY[from_step:]:
            step(log)
            done += 1
        log.close()
    except Crashed:
        pass
    return done


def steps_of_the_story() -> int:
    disk = SimulatedDisk()
    told(disk)
    return disk.steps


STEPS = steps_of_the_story()


def goes_on(disk, expected):
    """The log opens, holds one of what is expected, and what is written next is there after a
    crash that loses everything else.
    """
    log = opened(disk)
    found = held(log)
    assert found in expected
    after = log.last_index() + 1
    log.append(entries(after, after + 2, 50, size=400), HardState(50, 1, 1))
    log.append(entries(after + 3, after + 3, 50, size=1500))
    found = held(log)
    disk.crash(random.Random(0), Loss.EVERYTHING)
    assert held(opened(disk)) == found


def test_the_story_is_long_enough():
    assert STEPS > 100


@pytest.mark.parametrize("loss", Loss)
def test_a_crash_at_every_step_loses_nothing_that_was_acknowledged(loss):
    draws = 1 if loss in (Loss.EVERYTHING, Loss.NOTHING) else 60
    for step in range(1, STEPS + 2):
        before = SimulatedDisk()
        before.crash_at = step
        done = told(before)
        for draw in range(draws):
            disk = before.copy()
            disk.crash(random.Random(step * 1000 + draw), loss)
            goes_on(disk, allowed(STATES, done))


@pytest.mark.seeds(10)
def test_a_crash_while_a_crash_is_repaired_loses_nothing_either(rng):
    for step in range(1, STEPS + 2):
        disk = SimulatedDisk()
        disk.crash_at = step
        done = told(disk)
        for _ in range(4):
            disk.crash(rng)
            disk.crash_at = disk.steps + rng.randint(1, 8)
            try:
                opened(disk)
            except Crashed:
                continue
            break
        disk.crash(rng)
        goes_on(disk, allowed(STATES, done))


@pytest.mark.seeds(10)
def test_the_story_can_be_taken_up_after_each_crash(rng):
    """Crash after crash: what is found is where it goes on."""
    for _ in range(20):
        disk = SimulatedDisk()
        done = 0
        while done < len(STORY):
            disk.crash_at = disk.steps + rng.randint(1, 25)
            done = told(disk, from_step=done)
            disk.crash(rng)
            expected = allowed(STATES, done)
            found = held(opened(disk))
            assert found in expected
            done = STATES.index(found)
        assert held(opened(disk)) == STATES[-1]


def test_a_killed_process_loses_nothing_that_a_later_crash_could_take():
    """Opening syncs what it reads: another process may have been killed before its sync."""
    for step in range(1, STEPS + 2):
        disk = SimulatedDisk()
        disk.crash_at = step
        done = told(disk)
        disk.crash_at = None
        found = held(opened(disk))
        assert found in allowed(STATES, done)
        disk.crash(random.Random(step), Loss.EVERYTHING)
        assert held(opened(disk)) == found


def syncs_of_the_story() -> int:
    disk = SimulatedDisk()
    told(disk)
    return disk.syncs


@pytest.mark.parametrize("sync", range(1, syncs_of_the_story() + 1))
def test_when_any_sync_fails_every_later_call_is_refused_and_a_restart_has_it_all(sync):
    disk = SimulatedDisk()
    disk.fail_sync_at = sync
    done, log = 0, None
    with pytest.raises(LogSyncFailed):  # noqa: PT012 - which step fails is what is asked
        log = opened(disk)
        for step in STORY:
            step(log)
            done += 1
        log.close()
        raise LogSyncFailed("", "")  # the sync was one of close, which never raises
    if log is not None and done < len(STORY):
        for call in (
            log.first_index,
            log.last_index,
            log.initial_state,
            log.snapshot,
            lambda: log.term(1),
            lambda: log.entries(1, 2, 1),
            lambda: log.append(entries(1, 1)),
            lambda: log.append(),
            lambda: log.save_snapshot(STATES[-1][-1]),
            lambda: log.install_snapshot(STATES[-1][-1]),
            lambda: log.compact(1),
        ):
            with pytest.raises(LogSyncFailed):
                call()
    for draw in range(10):
        again = disk.copy()
        again.crash(random.Random(draw))
        goes_on(again, allowed(STATES, done))


def writes_of_the_story() -> int:
    disk = SimulatedDisk()
    told(disk)
    return disk.writes


@pytest.mark.parametrize("write", range(1, writes_of_the_story() + 1))
def test_when_the_disk_is_full_nothing_has_changed_and_it_can_be_tried_again(write):
    disk = SimulatedDisk()
    disk.fail_write_at = write
    for number, step in enumerate([opened, *STORY]):
        if number == 0:
            try:
                log = step(disk)
            except StoreFull:
                disk.fail_write_at = None
                log = step(disk)
            continue
        try:
            step(log)
        except StoreFull:
            assert held(log) == STATES[number - 1]
            with pytest.raises(StoreFull):
                step(log)
            assert held(log) == STATES[number - 1]
            for draw in range(5):
                again = disk.copy()
                again.crash(random.Random(draw))
                goes_on(again, allowed(STATES, number - 1))
            disk.fail_write_at = None
            step(log)
        assert held(log) == STATES[number]
    disk.crash(random.Random(write))
    assert held(opened(disk)) == STATES[-1]


def test_room_that_comes_back_after_each_refusal_ends_in_the_same_log():
    """Every write fails once, and is repeated."""
    disk = SimulatedDisk()
    log = opened(disk)
    refused = 0
    for step in STORY:
        disk.fail_write_at = disk.writes + 1
        try:
            step(log)
        except StoreFull:
            refused += 1
            disk.fail_write_at = None
            step(log)
        disk.fail_write_at = None
    assert refused > len(STORY) // 2
    assert held(log) == STATES[-1]
    disk.crash(random.Random(1), Loss.EVERYTHING)
    assert held(opened(disk)) == STATES[-1]


@pytest.mark.parametrize("draw", range(40))
def test_a_torn_write_that_a_full_disk_lets_nobody_clean_up_is_no_damage(draw):
    """Found by the simulation of replicas, seed 12: opening the log began to fill what was torn
    with zeros and found the disk full; the half that was left looked like a damaged header.
    """
    rng = random.Random(draw)
    disk = SimulatedDisk()
    log = opened(disk)
    log.append(entries(1, 3))
    disk.fail_write_at = disk.writes + 1
    with pytest.raises(StoreFull):
        log.append(entries(4, 4, size=rng.choice([10, 90, 700, 1500])))
    disk.crash(rng, Loss.TORN)
    for cut in range(1, 5):
        disk.fail_write_at = disk.writes + cut
        try:
            opened(disk)
        except StoreFull:
            continue
        break
    disk.fail_write_at = None
    assert held(opened(disk))[2] == tuple(entries(1, 3))


def test_a_disk_without_room_for_a_segment_refuses_and_stays_readable():
    disk = SimulatedDisk(capacity=5000)
    log = opened(disk)
    index = 0
    with pytest.raises(StoreFull):  # noqa: PT012 - which step fails is what is asked
        for index in range(1, 1000):
            log.append(entries(index, index, size=100))
    assert held(log)[2] == tuple(entries(1, index - 1, size=100))
    disk.capacity = 10**9
    log.append(entries(index, index, size=100))
    disk.crash(random.Random(1), Loss.EVERYTHING)
    assert held(opened(disk))[2] == tuple(entries(1, index, size=100))


@pytest.mark.parametrize("write", [2, 5, 9, 12, 20])
def test_a_write_that_fails_for_any_other_reason_ends_the_log(write):
    disk = SimulatedDisk()
    log = opened(disk)
    disk.write_error, disk.fail_write_at = BROKEN, disk.writes + write
    done = 0
    with pytest.raises(LogSyncFailed):  # noqa: PT012 - which step fails is what is asked
        for step in STORY:
            step(log)
            done += 1
    disk.crash(random.Random(write))
    goes_on(disk, allowed(STATES, done))

"""The log as Raft sees it, held against a plain list."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.consensus.core.log import RaftLog
from ollamamax_p2p.consensus.core.log_errors import Compacted, Unavailable
from ollamamax_p2p.consensus.core.logger import NoLogger
from ollamamax_p2p.consensus.core.messages import (
    NO_LIMIT,
    ConfState,
    Entry,
    EntryType,
    Snapshot,
    SnapshotMetadata,
    entry_size,
    total_size,
)
from ollamamax_p2p.consensus.ram_log import RamLog


def run_of(first: int, *terms: int) -> list[Entry]:
    return [Entry(term, index, data=b"x") for index, term in enumerate(terms, first)]


def log_with(stable: list[Entry], unstable: list[Entry]) -> RaftLog:
    storage = RamLog()
    storage.append(stable)
    log = RaftLog(storage, NoLogger())
    log.append(unstable)
    return log


def test_entries_come_from_both_parts_and_stop_where_they_do_not_fit() -> None:
    log = log_with(run_of(1, 1, 1), run_of(3, 2, 2))
    size = entry_size(log.entries(1)[0])
    assert [entry.index for entry in log.entries(1)] == [1, 2, 3, 4]
    for count in range(1, 5):
        assert len(log.entries(1, count * size)) == count
        assert len(log.entries(1, count * size + size - 1)) == count
    assert len(log.entries(1, 0)) == 1
    assert len(log.entries(3, 0)) == 1
    assert log.entries(5) == []
    assert log.slice(2, 2) == []


def test_what_is_not_there_is_named() -> None:
    storage = RamLog()
    storage.install_snapshot(Snapshot(SnapshotMetadata(5, 2, ConfState((1,)))))
    log = RaftLog(storage, NoLogger())
    log.append(run_of(6, 2))
    with pytest.raises(Compacted):
        log.entries(5)
    with pytest.raises(Compacted):
        log.term(4)
    with pytest.raises(Unavailable):
        log.term(7)
    assert (log.term(5), log.term(6), log.term_or_zero(7)) == (2, 2, 0)
    assert not log.matches((2, 7))


def test_a_snapshot_that_is_being_installed_stands_for_the_log() -> None:
    log = log_with(run_of(1, 1, 1), [])
    snapshot = Snapshot(SnapshotMetadata(9, 3, ConfState((1,))))
    log.restore(snapshot)
    assert (log.first_index(), log.last_index(), log.term(9)) == (10, 9, 3)
    assert log.snapshot() is snapshot
    assert log.has_next_unstable_snapshot()
    log.accept_unstable()
    assert not log.has_next_unstable_snapshot()
    assert log.has_next_or_in_progress_snapshot()
    log.stable_snapshot_to(8)
    assert log.has_next_or_in_progress_snapshot()
    log.stable_to((3, 9))  # Of the snapshot, which says nothing about entries.
    log.stable_snapshot_to(9)
    assert not log.has_next_or_in_progress_snapshot()


def test_the_answer_for_a_write_that_was_overtaken_changes_nothing() -> None:
    log = log_with([], run_of(1, 1, 1))
    log.accept_unstable()
    log.append(run_of(1, 2))
    log.stable_to((1, 2))
    log.stable_to((1, 1))
    assert [entry.term for entry in log.next_unstable_entries()] == [2]
    log.stable_to((2, 1))
    assert not log.has_next_or_in_progress_unstable_entries()


def test_replacing_a_part_hands_out_only_that_part_again() -> None:
    log = log_with([], run_of(1, 1, 1, 1))
    log.accept_unstable()
    log.append(run_of(2, 2))
    assert [entry.index for entry in log.next_unstable_entries()] == [2]
    assert log.last_index() == 2


def test_applying_pauses_at_its_limit() -> None:
    storage = RamLog()
    entries = run_of(1, 1, 1, 1)
    storage.append(entries)
    log = RaftLog(storage, NoLogger(), max_applying_bytes=2 * entry_size(entries[0]))
    log.commit_to(3)
    batch = log.next_committed_entries(allow_unstable=True)
    assert len(batch) == 2
    log.accept_applying(2, total_size(batch), allow_unstable=True)
    assert log.next_committed_entries(allow_unstable=True) == []
    log.applied_to(2, total_size(batch))
    assert [entry.index for entry in log.next_committed_entries(allow_unstable=True)] == [3]


def test_only_what_is_durable_here_is_applied_if_so_asked() -> None:
    log = log_with(run_of(1, 1), run_of(2, 1))
    log.commit_to(2)
    assert len(log.next_committed_entries(allow_unstable=False)) == 1
    assert len(log.next_committed_entries(allow_unstable=True)) == 2


def test_nothing_of_an_old_term_is_committed_by_counting() -> None:
    log = log_with([], run_of(1, 1, 2))
    assert not log.maybe_commit((2, 1))
    assert not log.maybe_commit((0, 9))
    assert log.maybe_commit((2, 2))
    assert not log.maybe_commit((2, 2))


@pytest.mark.parametrize("first", [1, 126, 2**14 - 2])
def test_the_size_of_a_run_is_that_of_its_entries(first: int) -> None:
    run = [Entry(1, index, EntryType.NORMAL, bytes(index % 3)) for index in range(first, first + 4)]
    assert total_size(run) == sum(map(entry_size, run))
    assert total_size([]) == 0


def test_the_hint_of_a_log_that_begins_behind_a_snapshot() -> None:
    storage = RamLog()
    storage.install_snapshot(Snapshot(SnapshotMetadata(5, 3, ConfState((1,)))))
    log = RaftLog(storage, NoLogger())
    log.append([Entry(3, 6), Entry(5, 7)])
    assert log.find_conflict_by_term(7, 4) == (3, 6)
    assert log.find_conflict_by_term(7, 2) == (0, 4)  # Where the two may agree is not known here.
    assert log.find_conflict_by_term(4, 9) == (0, 4)
    assert log.find_conflict_by_term(8, 9) == (0, 8)


terms = st.lists(st.integers(1, 4), max_size=8).map(sorted)


@given(terms, st.integers(0, 8), st.integers(0, 12), st.integers(0, 5))
def test_the_hint_is_the_last_entry_whose_term_is_low_enough(
    given_terms: list[int], stable: int, index: int, term: int
) -> None:
    entries = run_of(1, *given_terms)
    log = log_with(entries[:stable], entries[stable:])
    found = log.find_conflict_by_term(index, term)
    if index > len(entries):
        assert found == (0, index)
    else:
        low_enough = [(0, 0)] + [(e.term, e.index) for e in entries[:index] if e.term <= term]
        assert found == low_enough[-1]


@given(terms, st.integers(1, 8), st.integers(0, 5))
def test_the_hint_does_not_go_behind_what_was_compacted(
    given_terms: list[int], compacted: int, term: int
) -> None:
    storage = RamLog()
    storage.install_snapshot(Snapshot(SnapshotMetadata(compacted, 2, ConfState((1,)))))
    log = RaftLog(storage, NoLogger())
    log.append(run_of(compacted + 1, *(max(each, 2) for each in given_terms)))
    _, index = log.find_conflict_by_term(log.last_index(), term)
    assert index >= compacted if term >= 2 else index == compacted - 1


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 4)), max_size=25))
def test_the_log_behaves_as_a_list(steps: list[tuple[int, int, int]]) -> None:
    """Appends that replace, writes that are acknowledged in order, commits, applying."""
    storage, term = RamLog(), 1
    log, model = RaftLog(storage, NoLogger()), list[Entry]()
    writing: list[tuple[list[Entry], int, tuple[int, int]]] = []
    for what, number, count in steps:
        if what == 0:
            term += number > 7
            previous = min(log.committed + number % 4, len(model))
            new = run_of(previous + 1, *[term] * count)
            before = (model[previous - 1].term if previous else 0, previous)
            if model[previous : previous + count] != new:
                model[previous:] = new
            assert log.maybe_append(before, new, 0) == previous + count
        elif what == 1 and log.has_next_unstable_entries():
            writing.append((log.next_unstable_entries(), term, log.last_entry_id()[::1]))
            log.accept_unstable()
        elif what == 2 and writing:
            batch, of_term, last = writing.pop(0)
            storage.append(batch)
            if of_term == term:
                log.stable_to(last)
        elif what == 3:
            log.commit_to(min(number, len(model)))
        elif what == 4:
            batch = log.next_committed_entries(allow_unstable=True)
            if batch:
                log.accept_applying(batch[-1].index, total_size(batch), allow_unstable=True)
                log.applied_to(batch[-1].index, total_size(batch))
        assert log.entries(1, NO_LIMIT) == model
        assert log.applied <= log.applying <= log.committed <= log.last_index() == len(model)

"""FileLog on real files: what it takes, what it refuses, and what it says."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ollamamax_p2p.consensus.core.messages import NO_LIMIT, HardState
from ollamamax_p2p.consensus.file_log import open_file_log
from ollamamax_p2p.consensus.log_files import DiskFiles
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import (
    AccessRefused,
    DataDirInUse,
    LocalTrouble,
    LogDamaged,
    LogSyncFailed,
    StoreDamaged,
    StoreFull,
)
from ollamamax_p2p.testing.simulated_disk import SimulatedDisk
from tests.consensus.log_stories import STORY, append, entries, held, opened, snapshot, states

SMALL = ConsensusSettings(segment_bytes=2048)


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.wal"))


def test_the_whole_story_on_real_files(tmp_path):
    expected = states()
    for step, after in zip(STORY, expected[1:], strict=True):
        log = open_file_log(tmp_path, SMALL)
        step(log)
        assert held(log) == after
        log.close()
    log = open_file_log(tmp_path, SMALL)
    assert held(log) == expected[-1]
    log.close()


def test_the_folder_is_made_for_this_user_only(tmp_path):
    folder = tmp_path / "deep" / "log"
    open_file_log(folder, SMALL).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_segments_have_their_size_from_the_beginning_and_keep_it(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    for index in range(1, 20):
        append(index, index, size=300)(log)
    log.close()
    assert len(segments(tmp_path)) > 3
    assert {(tmp_path / name).stat().st_size for name in segments(tmp_path)} == {2048}


def test_space_comes_back_by_segments(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    for index in range(1, 101):
        append(index, index, size=300)(log)
    before = len(segments(tmp_path))
    log.save_snapshot(snapshot(100))
    log.compact(50)
    assert before * 0.4 < len(segments(tmp_path)) < before * 0.6
    log.compact(100)
    assert len(segments(tmp_path)) == 1
    log.close()


def test_a_log_that_is_compacted_for_ever_stays_small(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    for index in range(1, 1001):
        append(index, index, size=100, state=HardState(1, 1, index))(log)
        if index % 50 == 0:
            log.save_snapshot(snapshot(index))
            log.compact(index - 10)
        assert len(segments(tmp_path)) < 10
    log.close()
    log = open_file_log(tmp_path, SMALL)
    assert log.initial_state()[0] == HardState(1, 1, 1000)
    assert log.entries(991, 1001, NO_LIMIT) == entries(991, 1000, size=100)
    log.close()


def test_an_installed_snapshot_frees_all_old_segments(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    for index in range(1, 30):
        append(index, index, size=300)(log)
    log.install_snapshot(snapshot(10))
    assert len(segments(tmp_path)) == 1
    log.close()


def test_files_are_given_back(tmp_path):
    before = len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))
    for _ in range(3):
        log = open_file_log(tmp_path, SMALL)
        for index in range(log.last_index() + 1, log.last_index() + 30):
            append(index, index, size=300)(log)
        log.save_snapshot(snapshot(log.last_index()))
        log.compact(log.last_index())
        log.close()
    (tmp_path / segments(tmp_path)[-1]).write_bytes(b"garbage")
    with pytest.raises(LogDamaged):
        open_file_log(tmp_path, SMALL)
    assert len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")) == before


def test_opening_and_closing_for_ever_does_not_grow_the_log(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    append(1, 3)(log)
    log.close()
    for _ in range(50):
        open_file_log(tmp_path, SMALL).close()
    assert len(segments(tmp_path)) == 1


def test_a_log_can_be_opened_with_other_settings(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    append(1, 9, size=150)(log)
    log.close()
    log = open_file_log(tmp_path, ConsensusSettings(segment_bytes=8192))
    append(10, 20, size=300)(log)
    before = held(log)
    log.close()
    log = open_file_log(tmp_path, SMALL)
    assert held(log) == before
    log.close()


def test_a_second_opening_is_refused_and_says_by_whom(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    with pytest.raises(DataDirInUse, match=f"process {os.getpid()}"):
        open_file_log(tmp_path, SMALL)
    append(1, 1)(log)
    log.close()
    open_file_log(tmp_path, SMALL).close()


def test_a_closed_log_refuses(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    log.close()
    with pytest.raises(LocalTrouble, match="closed"):
        append(1, 1)(log)
    with pytest.raises(LocalTrouble, match="closed"):
        log.last_index()


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "log").write_text("no folder")
    for place in (tmp_path / "log", tmp_path / "log" / "deeper"):
        with pytest.raises(StoreDamaged, match="file where the log's folder"):
            open_file_log(place, SMALL)


AS_NOBODY = """
import os, sys
from pathlib import Path
from ollamamax_p2p.consensus.file_log import open_file_log
from ollamamax_p2p.consensus.log_check import check_log
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import code
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for attempt in (lambda: open_file_log(Path(sys.argv[1]), ConsensusSettings()),
                lambda: check_log(Path(sys.argv[1]))):
    try:
        attempt()
        print("opened")
    except Exception as error:
        print(code(error))
"""


@pytest.mark.parametrize("what", ["folder", "segment"])
def test_what_may_not_be_read_is_refused_by_name(tmp_path, what):
    folder = tmp_path / "log"
    log = open_file_log(folder, SMALL)
    append(1, 3)(log)
    log.close()
    closed = folder if what == "folder" else folder / segments(folder)[0]
    for path in (*tmp_path.parents, tmp_path, folder, *folder.iterdir()):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to(tmp_path.parents[1]):
            path.chmod(0o777)
    closed.chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(folder)], capture_output=True, text=True, check=False
    )
    closed.chmod(0o700)
    assert done.stdout.split() == ["access_refused", "access_refused"], done.stderr


def test_a_batch_that_finds_the_disk_full_is_taken_back(tmp_path):
    """A real refusal by the system: the process may write no more than 64 KiB to a file."""
    log = open_file_log(tmp_path, SMALL)
    append(1, 3)(log)
    before = held(log)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(StoreFull):
            append(4, 9, size=50_000)(log)
        assert held(log) == before
        append(4, 4)(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append(5, 9, size=50_000)(log)
    before = held(log)
    log.close()
    log = open_file_log(tmp_path, SMALL)
    assert held(log) == before
    log.close()
    assert not (tmp_path / "next.tmp").exists()


class RefusingDisk(SimulatedDisk):
    """No new files, as if the folder had become read-only."""

    refuses: int | None = None

    def create(self, name: str, size: int) -> None:
        if self.refuses is not None:
            raise OSError(self.refuses, os.strerror(self.refuses))
        super().create(name, size)


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (13, AccessRefused, "permission denied"),
        (30, LocalTrouble, "file system is read-only"),
        (5, LogSyncFailed, "check the disk"),
    ],
)
def test_why_no_segment_can_be_made_is_said(number, error, text):
    disk = RefusingDisk()
    log = opened(disk)
    append(1, 5, size=200)(log)
    before = held(log)
    disk.refuses = number
    with pytest.raises(error, match=text):
        append(6, 20, size=200)(log)
    disk.refuses = None
    if error is LogSyncFailed:
        with pytest.raises(LogSyncFailed):
            append(6, 6)(log)
        return
    assert held(log) == before
    append(6, 20, size=200)(log)
    after = held(log)
    assert held(opened(disk)) == after


class StubbornDisk(SimulatedDisk):
    """Files can't be removed for a while."""

    stubborn = False

    def remove(self, name: str) -> None:
        if self.stubborn:
            raise PermissionError(13, "Permission denied")
        super().remove(name)


def test_segments_that_can_not_be_removed_are_removed_later():
    disk = StubbornDisk()
    log = opened(disk)
    for index in range(1, 30):
        append(index, index, size=300)(log)
    log.save_snapshot(snapshot(29))
    disk.stubborn = True
    log.compact(20)
    kept = disk.names()
    assert log.first_index() == 21
    disk.stubborn = False
    log.compact(21)
    assert len(disk.names()) < len(kept) - 3


def test_segments_that_could_not_be_removed_are_removed_at_the_next_opening():
    disk = StubbornDisk()
    log = opened(disk)
    for index in range(1, 30):
        append(index, index, size=300)(log)
    disk.stubborn = True
    log.install_snapshot(snapshot(20))
    before, kept = held(log), disk.names()
    assert held(opened(disk)) == before
    disk.stubborn = False
    assert held(opened(disk)) == before
    assert len(disk.names()) < len(kept) - 3


def test_many_threads_may_append(tmp_path):
    """One at a time is promised; two must not spoil the file."""
    log = open_file_log(tmp_path, SMALL)

    def write(term):
        for commit in range(50):
            log.append(hard_state=HardState(term, 0, commit))

    writers = [threading.Thread(target=write, args=(term,)) for term in range(1, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    before = held(log)
    log.close()
    log = open_file_log(tmp_path, SMALL)
    assert held(log) == before
    log.close()


WRITER = """
import sys
from pathlib import Path
from ollamamax_p2p.consensus.core.messages import HardState
from ollamamax_p2p.consensus.file_log import open_file_log
from ollamamax_p2p.consensus.settings import ConsensusSettings
from tests.consensus.log_stories import entries
log = open_file_log(Path(sys.argv[1]), ConsensusSettings(segment_bytes=65536))
index = log.last_index()
while True:
    log.append(entries(index + 1, index + 7, size=500), HardState(1, 1, index))
    index += 7
    sys.stdout.write(f"{index}\\n")
    sys.stdout.flush()
"""


@pytest.mark.network
def test_a_process_that_is_killed_again_and_again_loses_nothing(tmp_path):
    for batches in (1, 5, 40, 3, 100):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            for _ in range(batches):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split("\n")
            acknowledged = int([*[line for line in rest[:-1] if line], acknowledged][-1])
        log = open_file_log(tmp_path, ConsensusSettings(segment_bytes=65536))
        assert log.last_index() >= acknowledged
        assert log.last_index() % 7 == 0
        assert log.entries(1, log.last_index() + 1, NO_LIMIT) == entries(
            1, log.last_index(), size=500
        )
        log.close()


def test_what_was_open_is_closed_when_opening_fails(tmp_path):
    files = DiskFiles(tmp_path)
    (tmp_path / "0000000000000001.wal").write_bytes(b"?" * 100)
    with pytest.raises(LogDamaged):
        open_file_log(tmp_path, SMALL, files)
    DiskFiles(tmp_path).close()  # the lock is free again

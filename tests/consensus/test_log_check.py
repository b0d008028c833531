"""`check_log`: what it says of whole, torn and damaged logs, without changing any."""

import json
import os

import msgspec
import pytest

from ollamamax_p2p.consensus.core.messages import HardState
from ollamamax_p2p.consensus.file_log import open_file_log
from ollamamax_p2p.consensus.log_check import LogReport, check_log
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import LogDamaged, NotFound
from tests.consensus.log_stories import STORY, append, held, snapshot

SMALL = ConsensusSettings(segment_bytes=2048)


@pytest.fixture
def folder(tmp_path):
    """Three segments: entries 1 to 19, a snapshot of 9."""
    log = open_file_log(tmp_path / "log", SMALL)
    for index in range(1, 20):
        append(index, index, 2, size=150, state=HardState(2, 7, index - 1))(log)
    log.save_snapshot(snapshot(9, 2))
    log.close()
    return tmp_path / "log"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wal(folder, number):
    return folder / f"{number:016d}.wal"


def checked(folder) -> LogReport:
    """Checked; and opening the log agrees."""
    before = contents(folder)
    report = check_log(folder)
    assert contents(folder) == before
    try:
        log = open_file_log(folder, SMALL)
    except LogDamaged as error:
        assert not report.ok
        said = str(error)
        assert report.damage[0].file in said
    else:
        assert report.ok
        assert report.last_index == log.last_index()
        assert report.torn_bytes == log.torn_bytes
        log.close()
    return report


def test_a_whole_log(folder):
    report = checked(folder)
    assert report.ok
    assert (report.first_index, report.last_index) == (1, 19)
    assert (report.term, report.vote, report.commit, report.last_term) == (2, 7, 18, 2)
    assert report.snapshot_index == 9
    assert [each.sealed for each in report.segments][-1] is False
    assert all(each.sealed for each in report.segments[:-1])
    assert report.segments[0].first_index == 1
    assert report.segments[-1].last_index == 19
    assert (report.torn_bytes, report.leftovers, report.damage) == (0, (), ())


def test_it_is_json(folder):
    report = check_log(folder)
    assert json.loads(msgspec.json.encode(report))["segments"][0]["file"] == wal(folder, 1).name
    assert msgspec.json.decode(msgspec.json.encode(report), type=LogReport) == report


def test_a_torn_end_is_told_and_is_no_damage(folder):
    start = check_log(folder).segments[-1].used_bytes
    log = open_file_log(folder, SMALL)
    append(20, 20, 2, size=60)(log)
    log.close()
    os.truncate(wal(folder, 3), start + 40)
    os.truncate(wal(folder, 3), 2048)
    report = check_log(folder)
    assert report.ok
    assert (report.torn_at, report.torn_bytes > 0, report.last_index) == (start, True, 19)
    assert checked(folder) == report
    assert check_log(folder).torn_bytes == 0  # opening it cut it off


def test_damage_is_told_with_its_place_and_what_to_do(folder):
    data = bytearray(wal(folder, 2).read_bytes())
    data[700] ^= 1
    wal(folder, 2).write_bytes(data)
    report = checked(folder)
    assert not report.ok
    (finding,) = report.damage
    assert finding.file == wal(folder, 2).name
    assert 64 <= finding.offset <= 700
    assert 9 < finding.last_index < 19
    assert "docs/runbooks/damaged-wal.md" in finding.advice
    assert len(report.segments) == 3


def test_damage_in_every_segment_is_told(folder):
    for number in (1, 2, 3):
        data = bytearray(wal(folder, number).read_bytes())
        data[70] ^= 1
        wal(folder, number).write_bytes(data)
    assert {each.file for each in checked(folder).damage} == {
        wal(folder, number).name for number in (1, 2, 3)
    }


def test_a_missing_segment_is_told(folder):
    wal(folder, 2).unlink()
    report = checked(folder)
    assert "missing" in report.damage[0].problem


def test_a_log_without_segments_has_lost_them(folder):
    for number in (1, 2, 3):
        wal(folder, number).unlink()
    report = checked(folder)
    assert "gone" in report.damage[0].problem
    assert (report.segments, report.last_index) == ((), 0)


def test_leftovers_are_told(folder):
    (folder / "next.tmp").write_bytes(bytes(100))
    assert checked(folder).leftovers == ("next.tmp",)


def test_a_log_that_is_in_use_can_be_checked(tmp_path):
    log = open_file_log(tmp_path, SMALL)
    for step in STORY:
        step(log)
        report = check_log(tmp_path)
        assert report.ok
        assert report.in_use
        last = held(log)[2]
        assert report.last_index == (last[-1].index if last else 0)
        assert report.first_index == (last[0].index if last else 0)
    log.close()
    assert not check_log(tmp_path).in_use


def test_where_there_is_no_log_it_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(NotFound, match="no log"):
            check_log(place)
    assert os.listdir(tmp_path) == ["file"]

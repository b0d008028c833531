"""What people read: sizes, ages, tables, and the lines of a pull."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.live import Live

from ollamamax_p2p import PeerInfo
from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.transfer import PullProgress, PullReport, SourceShare
from omx_cli.exit_codes import exit_code
from omx_cli.output import duration, human_age, human_bytes, say, short_peer, table
from omx_cli.progress import BlobLine, LogView, TerminalView, bar, blob_text, report_line
from omx_cli.swarm_commands import _peer_row

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DIGEST = "sha256:" + "0123456789ab" + "0" * 52


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1 kB"),
        (1_500, "1.5 kB"),
        (98_000_000, "98 MB"),
        (4_661_224_676, "4.6 GB"),
        (12_345_678_901, "12 GB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_sizes_read_as_in_ollama(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [
        (timedelta(0), "Less than a second ago"),
        (timedelta(seconds=1), "1 second ago"),
        (timedelta(seconds=59), "59 seconds ago"),
        (timedelta(seconds=60), "About a minute ago"),
        (timedelta(minutes=5), "5 minutes ago"),
        (timedelta(hours=1), "About an hour ago"),
        (timedelta(hours=47), "47 hours ago"),
        (timedelta(days=3), "3 days ago"),
        (timedelta(days=20), "2 weeks ago"),
        (timedelta(days=100), "3 months ago"),
        (timedelta(days=1000), "2 years ago"),
        (timedelta(minutes=-4), "4 minutes from now"),
    ],
)
def test_ages_read_as_in_ollama(ago, text):
    assert human_age(NOW - ago, NOW) == text


def test_a_table_has_four_spaces_between_columns_and_none_at_the_end():
    assert table(["NAME", "ID"], [["tiny:latest", "ab"]]) == (
        "NAME           ID\ntiny:latest    ab"
    )


def test_durations():
    assert [duration(s) for s in (0.4, 59, 63, 7500)] == ["0s", "59s", "1m3s", "2h5m"]


def test_peers_are_told_apart_by_their_end():
    assert short_peer(PEER) == "12D3KooW…x6nXTN"
    assert short_peer("registry.ollama.ai") == "registry.ollama.ai"


@given(st.integers(0, 10**13), st.integers(0, 10**13), st.integers(4, 40))
def test_a_bar_is_as_wide_as_it_was_asked_to_be(completed, total, columns):
    line = BlobLine("x", total=total, completed=min(completed, total))
    assert len(bar(line, columns)) == columns + 2


def progress(completed, total=4_700_000_000, sources=3):
    return PullProgress(
        status="pulling 0123456789ab",
        digest=DIGEST,
        total=total,
        completed=completed,
        active_sources=sources,
    )


def test_a_blobs_line_tells_percent_bytes_rate_time_left_and_sources():
    line = BlobLine("pulling 0123456789ab")
    line.update(progress(1_000_000_000), now=10.0)
    line.update(progress(1_070_000_000), now=12.0)
    text = blob_text(line, 12.0, 100)
    assert text.startswith("pulling 0123456789ab:  22% ▕████")
    assert text.endswith("1.0 GB/4.7 GB  35 MB/s  1m43s  3 sources")
    assert len(blob_text(line, 12.0, 72)) <= 72
    assert blob_text(line, 12.0, 40).startswith(" 22% pulling 0123456789ab:")


def test_a_stall_is_seen_as_one():
    line = BlobLine("pulling 0123456789ab")
    line.update(progress(0), now=0.0)
    line.update(progress(50_000_000), now=1.0)
    assert line.rate(1.0) == 50_000_000
    assert line.rate(100.0) < 1_000_000


def test_a_finished_blob_shows_its_size():
    line = BlobLine("pulling 0123456789ab")
    line.update(progress(4_700_000_000), now=0.0)
    assert blob_text(line, 1.0, 80).endswith("▏ 4.7 GB")


def report(**changes):
    facts = {
        "model": "smollm2:135m",
        "manifest_digest": DIGEST,
        "bytes_total": 98_000_000,
        "bytes_fetched": 90_000_000,
        "bytes_refetched": 1_000_000,
        "seconds": 9.0,
        "sources": (
            SourceShare(name=PEER, kind="peer", bytes=60_000_000),
            SourceShare(name="registry.ollama.ai", kind="origin", bytes=30_000_000),
        ),
    }
    return PullReport(**(facts | changes))


def test_the_last_line_is_honest():
    assert report_line(report(banned=(PEER,))) == (
        "pulled smollm2:135m: 98 MB in 9.0 s, 10 MB/s; 8 MB was here already; "
        "60 MB from 12D3KooW…x6nXTN, 30 MB from registry.ollama.ai; 1 MB fetched twice; "
        "banned 12D3KooW…x6nXTN"
    )


def test_a_pull_that_fetched_nothing_says_so():
    line = report_line(report(bytes_fetched=0, bytes_refetched=0, sources=(), seconds=0.0))
    assert line == "pulled smollm2:135m: 98 MB in 0.0 s; 98 MB was here already; 0 B fetched twice"


def test_a_log_has_one_line_per_state(capsys):
    view = LogView()
    view.show(PullProgress(status="pulling manifest"))
    for completed in (0, 10, 20):
        view.show(progress(completed))
    for completed in (1, 2, 3):  # a note stays in the states that follow it, and is told once
        facts = {"digest": DIGEST, "total": 5, "completed": completed, "note": "banned x"}
        view.show(PullProgress(status="pulling 0123456789ab", **facts))
    view.show(PullProgress(status="success"))
    assert capsys.readouterr().err.splitlines() == [
        "pulling manifest",
        "pulling 0123456789ab: 4.7 GB",
        "pulling 0123456789ab: 5 B",
        "banned x",
        "success",
    ]


def test_a_terminal_is_told_a_note_once_though_every_later_state_repeats_it(capsys):
    with Live(console=Console(width=80), auto_refresh=False) as live:
        view = TerminalView(live, clock=lambda: 1.0)
        for completed in range(20):
            facts = {"digest": DIGEST, "total": 200, "completed": completed}
            view.show(PullProgress(status="pulling 0123", note="banned x", **facts))
    assert capsys.readouterr().out.count("banned x") == 1


def test_a_wide_terminal_shows_each_sources_share():
    view = TerminalView(live=None, clock=lambda: 1.0)
    shares = (
        SourceShare(name=PEER, kind="peer", bytes=75),
        SourceShare(name="registry.ollama.ai", kind="origin", bytes=25),
    )
    view.show(
        PullProgress(status="pulling 0123", digest=DIGEST, total=200, completed=100, sources=shares)
    )
    assert len(view.lines(80)) == 1
    lines = view.lines(120)
    assert lines[1].split() == ["12D3KooW…x6nXTN", "75%", "75", "B"]
    assert lines[2].split() == ["registry.ollama.ai", "25%", "25", "B"]
    view.show(PullProgress(status="writing manifest"))
    assert view.lines(80)[-1].startswith("writing manifest")


def test_what_strangers_wrote_cannot_steer_the_terminal(capsys):
    say("a\x1b[2Jb\x9bc\r\x07\td\ne")
    assert capsys.readouterr().out == "a�[2Jb�c��\td\ne\n"


def test_every_error_has_an_exit_code():
    def below(cls):
        return [cls, *(deeper for child in cls.__subclasses__() for deeper in below(child))]

    codes = {cls.__name__: exit_code(cls) for cls in below(OmxError)}
    assert codes["TicketExpired"] == 2
    assert codes["ModelNotFound"] == 3
    assert codes["StoreFull"] == 4
    assert codes["OriginRefused"] == 5
    assert codes["WrongChunk"] == codes["DigestMismatch"] == 6
    assert set(codes.values()) == {1, 2, 3, 4, 5, 6}


def test_a_peer_that_lied_is_shown_with_its_lie():
    liar = PeerInfo(
        peer_id=PEER, address="", inbound=True, member=True, banned="it sent a wrong chunk"
    )
    assert _peer_row(liar)[-1] == "yes; banned: it sent a wrong chunk"
    assert _peer_row(replace(liar, banned=""))[-1] == "yes"

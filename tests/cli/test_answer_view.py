"""How an answer looks while it comes: to a person, in a pipe, to a program."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p import AnswerFrame
from omx_cli.answer_view import (
    AnswerView,
    WordWrap,
    columns_of,
    go_duration,
    place_text,
    servers_text,
    timings,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str, columns: int) -> list[str]:
    """What a terminal shows of text with our two movements: so many left, and clear to the end."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[\d+D|\x1b\[K|\x1b\[\d*m|.|\n", text, re.DOTALL):
        if part.endswith("D") and part[0] == "\x1b":
            at -= int(part[2:-1])
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:at]
        elif part == "\n":
            lines.append("")
            at = 0
        elif part == "\r":
            at = 0
        elif part[0] != "\x1b":
            assert at < columns, "it runs over the edge"
            lines[-1] = lines[-1][:at] + part + lines[-1][at + 1 :]
            at += 1
    return lines


def wrapped(parts, columns: int) -> list[str]:
    wrap = WordWrap(columns)
    return screen("".join(map(wrap.feed, parts)), columns)


def test_a_word_that_does_not_fit_goes_to_the_next_line_though_it_began_on_this():
    assert wrapped(["the swi", "ft sheep"], 10) == ["the swift", "sheep"]
    assert wrapped(["the swift she", "ep"], 11) == ["the swift ", "sheep"]


def test_a_word_longer_than_a_line_is_cut():
    assert wrapped(["abcdefghijkl"], 6) == ["abcde", "fghij", "kl"]


def test_line_breaks_of_the_answer_stay():
    assert wrapped(["a\nb", "\n\nc"], 10) == ["a", "b", "", "c"]


@given(st.text("abc déf \n☃", max_size=60), st.integers(2, 12), st.data())
def test_nothing_is_lost_and_nothing_runs_over_whatever_the_bits(text, columns, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    lines = wrapped(parts, columns)
    assert all(len(line) < columns for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_wide_characters_take_two_columns():
    assert [columns_of(char) for char in "a漢\u0301☃"] == [1, 2, 0, 1]
    wrap = WordWrap(6)
    assert wrap.feed("漢字漢") == "漢字\n漢"


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (999, "999ns"),
        (1_500, "1.5µs"),
        (130_079_000, "130.079ms"),
        (1_234_567_891, "1.234567891s"),
        (60_000_000_000, "1m0s"),
        (63_250_000_000, "1m3.25s"),
        (7_384_000_000_001, "2h3m4.000000001s"),
    ],
)
def test_durations_are_as_go_prints_them(nanoseconds, text):
    assert go_duration(nanoseconds) == text


def test_timings_are_in_ollamas_words_and_columns():
    line = {
        "total_duration": 5_043_500_667,
        "load_duration": 5_025_959,
        "prompt_eval_count": 26,
        "prompt_eval_duration": 325_953_000,
        "eval_count": 290,
        "eval_duration": 4_709_213_000,
    }
    assert timings(line) == [
        "total duration:       5.043500667s",
        "load duration:        5.025959ms",
        "prompt eval count:    26 token(s)",
        "prompt eval duration: 325.953ms",
        "prompt eval rate:     79.77 tokens/s",
        "eval count:           290 token(s)",
        "eval duration:        4.709213s",
        "eval rate:            61.58 tokens/s",
    ]
    assert timings({}) == []


def test_places_and_servers_in_words():
    assert place_text(1, None) == "waiting: next"
    assert place_text(3, 12.4) == "waiting: place 3, about 12s"
    assert servers_text(["a (x)", "b (y)"]) == "answered by a (x), moved to b (y)"


def frame(kind: str, **facts) -> AnswerFrame:
    return AnswerFrame(type=kind, **facts)


def said(text: str = "", thinking: str = "") -> AnswerFrame:
    return frame("delta", line={"message": {"content": text, "thinking": thinking}})


START = frame("start", node="kitchen", backend="embedded")
DONE = frame("done", line={"done": True, "eval_count": 3})


def shown(frames, *, terminal: bool = True, **manner) -> tuple[str, str]:
    kind = Terminal if terminal else io.StringIO
    out, err = kind(), kind()
    view = AnswerView(out=out, err=err, **manner)
    for each in frames:
        view.show(each)
    view.end()
    return out.getvalue(), err.getvalue()


def test_on_a_terminal_who_answered_is_said_in_the_end(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    moved = frame("moved", node="attic", backend="ollama")
    out, err = shown([START, said("hel"), moved, said("lo"), DONE])
    assert out == "hello\n"
    assert err.splitlines()[-1] == "answered by kitchen (embedded), moved to attic (ollama)"


def test_in_a_pipe_there_is_the_answer_and_nothing_else():
    frames = [frame("queue", position=2, eta_s=3.0), START, said("hel"), said("lo\n"), DONE]
    assert shown(frames, terminal=False) == ("hello\n", "")


def test_the_place_in_the_queue_is_shown_and_taken_away_again(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    _, err = shown([frame("queue", position=2, eta_s=3.0), START, said("x"), DONE])
    assert "waiting: place 2, about 3s" in err
    assert screen(err, 200)[0] == ""


def test_thinking_is_set_apart_or_hidden(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    frames = [START, said(thinking="hm"), said(thinking=" ..."), said("42"), DONE]
    assert shown(frames)[0] == "Thinking...\nhm ...\n...done thinking.\n\n42\n"
    assert shown(frames, hide_thinking=True)[0] == "42\n"


def test_thinking_is_dim_and_an_answer_that_stops_there_leaves_the_terminal_plain(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = shown([START, said(thinking="hm")])
    assert out == "\x1b[2mThinking...\nhm\x1b[0m\n"


def test_what_a_model_says_does_not_drive_the_terminal():
    out, _ = shown([START, said("\x1b]0;title\x07\x1b[31mred\u009b2J"), DONE])
    assert "\x1b" not in out
    assert "\u009b" not in out
    assert "red" in out


def test_verbose_tells_timings_and_who_answered_also_in_a_pipe():
    out, err = shown([START, said("x"), DONE], terminal=False, verbose=True)
    assert (out, err) == (
        "x\n",
        "\neval count:           3 token(s)\nanswered by kitchen (embedded)\n",
    )


def test_for_programs_each_frame_is_a_line(capsys):
    frames = [frame("queue", position=1, eta_s=None), START, said("x"), DONE]
    view = AnswerView(as_json=True)
    for each in frames:
        view.show(each)
    view.end()
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["type"] for line in lines] == ["queue", "start", "delta", "done"]
    assert lines[1] == {"type": "start", "node": "kitchen", "backend": "embedded"}
    assert lines[2]["line"]["message"]["content"] == "x"
    assert captured.err == ""


def test_what_was_said_is_kept_without_the_thinking():
    view = AnswerView(out=io.StringIO(), err=io.StringIO())
    for each in (START, said(thinking="hm"), said("4"), said("2")):
        view.show(each)
    assert (view.text, view.thinking) == ("42", "hm")

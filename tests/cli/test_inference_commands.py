"""`omx run`, `ps`, `load`, `stop MODEL`, `embed`, `drain` and `top` against a served node."""

import io
import json
import re
import sys
from datetime import UTC, datetime, timedelta

import pytest

from ollamamax_p2p import RunningModel
from ollamamax_p2p.errors import BackendUnavailable, NoCandidate, QueueFull
from ollamamax_p2p.inference import LoadedModel
from ollamamax_p2p.inference.core.requests import Delta, GenerateRequest
from ollamamax_p2p.router import Server
from ollamamax_p2p.testing.scripted_backend import whole_answer
from omx_cli.inference_commands import processor_text, running_row, vector_text
from omx_cli.main import run
from omx_cli.top_view import Look, look_text, node_row
from tests.api.ram_node import OTHER_PEER, PEER, THIRD_PEER, RamNode
from tests.cli.serving_models import TerminalInput, node_load, piped
from tests.cli.test_pictures import PNG

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def nothing_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", TerminalInput())


def said(prompt: str) -> str:
    """As it stands in a pipe: the line is ended."""
    return whole_answer(GenerateRequest(model="tiny", prompt=prompt)) + "\n"


# -- run ---------------------------------------------------------------------------------------


def test_run_asks_once_and_prints_the_answer(talking, capsys):
    assert run(["run", "tiny", "hello", "there"]) == 0
    assert capsys.readouterr() == (said("hello there"), "")


def test_a_pipe_is_the_prompt_and_stands_behind_the_one_that_is_given(talking, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped("größer\nthan\n".encode()))
    assert run(["run", "tiny"]) == 0
    assert capsys.readouterr().out == said("größer\nthan")
    monkeypatch.setattr(sys, "stdin", piped(b"text"))
    assert run(["run", "tiny", "sum", "up:"]) == 0
    assert talking.inference.seen[-1].prompt == "sum up:\ntext"


def test_an_empty_pipe_without_prompt_only_loads_the_model(talking, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped(b""))
    assert run(["run", "tiny", "--keepalive", "10m"]) == 0
    assert capsys.readouterr() == ("", "")
    assert [each[:2] for each in talking.inference.loads] == [("tiny", 600.0)]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"GGUF\xff\x00", "stdin: not UTF-8 at byte 4; not a text?"),
        (b"x" * (12 * 1024 * 1024 + 1), "stdin: more than 12,582,912 bytes"),
    ],
)
def test_a_pipe_that_is_no_prompt_is_refused(talking, capsys, monkeypatch, raw, problem):
    monkeypatch.setattr(sys, "stdin", piped(raw))
    assert run(["run", "tiny"]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1


def test_without_prompt_and_without_terminal_there_is_no_conversation(talking, capsys):
    for line in (["run", "tiny"], ["run", "tiny", "--json"]):
        assert run(line) == 2
        assert "a conversation needs a terminal" in capsys.readouterr().err


def test_what_flags_say_is_in_the_request(talking, capsys):
    flags = ["--format", "json", "--think=high", "--keepalive", "-1", "--hidethinking"]
    assert run(["run", "tiny", "hello", *flags]) == 0
    asked = talking.inference.seen[-1]
    assert (asked.format, asked.think, asked.keep_alive_s) == ("json", "high", -1.0)
    assert run(["run", "tiny", "hello", "--think", "--format", '{"type":"object"}']) == 0
    asked = talking.inference.seen[-1]
    assert (asked.format, asked.think, asked.prompt) == ({"type": "object"}, True, "hello")
    assert run(["run", "tiny", "--", "--think"]) == 0
    assert talking.inference.seen[-1].prompt == "--think"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--format", "xml"], "'xml' is neither json nor a JSON schema"),
        (["--format", "[1]"], "is neither json nor a JSON schema"),
        (["--think=very"], "'very' is not true, false, low, medium, high, max"),
        (["--keepalive", "soon"], 'time: invalid duration "soon"'),
    ],
)
def test_bad_flags_are_one_line_and_2(talking, capsys, flags, problem):
    assert run(["run", "tiny", "x", *flags]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1


def test_verbose_tells_how_long_it_took_and_who_answered(talking, capsys):
    assert run(["run", "tiny", "hello", "--verbose"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^total duration:       \d+\.\d+m?s$", err, re.MULTILINE)
    assert re.search(r"^eval rate:            \d+\.\d\d tokens/s$", err, re.MULTILINE)
    assert err.endswith("answered by ram (scripted)\n")


def test_for_programs_every_frame_is_a_line(talking, capsys):
    assert run(["run", "tiny", "hello", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"type": "start", "node": "ram", "backend": "scripted"}
    text = "".join(line["line"]["response"] for line in lines if line["type"] == "delta")
    assert text + "\n" == said("hello")
    assert lines[-1]["line"]["done_reason"] == "stop"


def test_a_model_that_nobody_has_is_pulled_first(talking, capsys):
    assert run(["run", "new", "hello"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["pulling manifest", "pulling 0123456789ab: 100 B"]
    assert out == said("hello")
    assert run(["run", "new", "again"]) == 0
    assert talking.node.pulls_begun == 1


def test_a_model_that_only_an_engine_knows_is_not_pulled(talking, capsys):
    assert run(["run", "remote", "hello"]) == 0
    assert talking.node.pulls_begun == 0


@pytest.mark.parametrize(
    ("trouble", "code", "name"),
    [
        (NoCandidate("tiny", "all are draining"), 5, "no_candidate"),
        (QueueFull(8, 2.0), 5, "no_candidate"),
        (BackendUnavailable("x", "it is gone"), 5, "network_trouble"),
    ],
)
def test_troubles_have_an_exit_code_and_one_line(talking, capsys, trouble, code, name):
    talking.inference.error = trouble
    assert run(["run", "tiny", "x"]) == code
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert run(["run", "tiny", "x", "--json"]) == code
    assert json.loads(capsys.readouterr().err)["code"] == name


def test_what_is_no_name_is_refused(talking, capsys):
    assert run(["run", "a b", "x"]) == 2
    assert capsys.readouterr().err == "Error: invalid model name\n"


def test_an_answer_that_breaks_off_ends_its_line_and_tells(talking, capsys):
    talking.say(Delta(text="half"), BackendUnavailable("x", "it is gone"))
    assert run(["run", "tiny", "x"]) == 5
    out, err = capsys.readouterr()
    assert out == "half\n"
    assert "it is gone" in err


def test_pictures_go_where_they_are_understood(talking, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    assert run(["run", "seer", "what is ./a.png ?"]) == 0
    asked = talking.inference.seen[-1]
    assert (asked.images, asked.prompt) == ((PNG,), "what is  ?")
    count = len(talking.inference.seen)
    assert run(["run", "tiny", "what is ./a.png ?"]) == 2
    assert capsys.readouterr().err == (
        'Error: "tiny" takes no pictures; leave ./a.png out, or ask another model\n'
    )
    assert len(talking.inference.seen) == count


def test_a_piped_document_sends_no_pictures(talking, monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(sys, "stdin", piped(b"see ./a.png"))
    assert run(["run", "seer"]) == 0
    assert talking.inference.seen[-1].images == ()


def test_a_model_that_only_embeds_gives_its_vector(talking, capsys):
    assert run(["run", "vectors", "hello"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 8


def test_without_a_node_commands_that_need_one_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMX_DATA_DIR", str(tmp_path / "none"))
    for line in (["ps"], ["load", "x"], ["stop", "x"], ["drain", "x"], ["top", "--once"]):
        assert run(line) == 4
        assert "omx up" in capsys.readouterr().err


# -- models in memory --------------------------------------------------------------------------


def test_ps_has_ollamas_columns_and_the_node(talking, capsys):
    assert run(["load", "tiny"]) == 0
    assert capsys.readouterr().out == "loaded 'tiny' on ram (scripted)\n"
    assert run(["ps"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL", "NODE"]
    assert re.fullmatch(
        r"tiny:latest {4}abababababab {4}98 MB {4}100% CPU {5}2048 {7}Forever {4}ram", line
    )
    assert run(["ps", "other"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert run(["ps", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["server"]["node"] == "ram"
    assert found["model"]["name"] == "tiny:latest"


def running(**facts) -> RunningModel:
    model = LoadedModel(**({"name": "m", "size": 100} | facts))
    return RunningModel(model=model, server=Server(peer_id=PEER, node="ram", backend="x"))


def test_how_long_a_model_stays_is_told_in_ollamas_words():
    now = datetime.now(UTC)
    later, before = now + timedelta(minutes=4, seconds=50), now - timedelta(seconds=5)
    assert running_row(running(expires_at=later.timestamp()))[5] == "4 minutes from now"
    assert running_row(running(expires_at=before.timestamp()))[5] == "Stopping..."
    assert running_row(running())[5] == "Forever"


def test_where_a_model_is_told_in_ollamas_words():
    assert processor_text(100, 0) == "100% CPU"
    assert processor_text(100, 100) == "100% GPU"
    assert processor_text(100, 52) == "48%/52% CPU/GPU"
    assert processor_text(100, 101) == processor_text(0, 1) == "Unknown"


def test_load_and_stop_a_model(talking, capsys):
    assert run(["load", "tiny", "--keepalive", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "loaded": "tiny",
        "node": "ram",
        "backend": "scripted",
    }
    assert talking.inference.loads[-1][1] == 30.0
    assert run(["stop", "tiny"]) == 0
    assert capsys.readouterr().out == "stopped 'tiny'\n"
    assert run(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}
    assert run(["stop", "none"]) == 3
    assert capsys.readouterr().err == 'Error: couldn\'t find model "none" to stop\n'
    assert run(["load", "none"]) == 3
    assert capsys.readouterr().err == "Error: model 'none' not found\n"
    assert not talking.node.stop_asked.is_set()


# -- vectors -----------------------------------------------------------------------------------


def test_embed_prints_a_line_for_each_text(talking, capsys, monkeypatch):
    assert run(["embed", "tiny", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    vectors = [json.loads(line) for line in lines]
    assert [len(vector) for vector in vectors] == [8, 8]
    monkeypatch.setattr(sys, "stdin", piped(b"b\n\n" + b"a\n" * 70))
    assert run(["embed", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [lines[1], *[lines[0]] * 70]
    assert [len(each.inputs) for each in talking.inference.seen[-2:]] == [64, 7]


def test_embed_for_programs_and_with_fewer_numbers(talking, capsys):
    assert run(["embed", "tiny", "a", "--dimensions", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["node"]) == ("tiny", "ram")
    assert [len(vector) for vector in found["embeddings"]] == [3]


def test_embed_without_a_text_or_a_model_that_can(talking, capsys):
    assert run(["embed", "tiny"]) == 2
    assert "give a TEXT, or texts on stdin" in capsys.readouterr().err
    assert run(["embed", "seer", "a"]) == 2
    assert "does not support embed" in capsys.readouterr().err
    assert run(["embed", "none", "a"]) == 3
    assert "not found" in capsys.readouterr().err


def test_a_vector_is_cut_to_the_terminal():
    assert vector_text([0.5, -0.25], 20) == "[0.5,-0.25]"
    cut = vector_text([0.123456789] * 576, 40)
    assert (len(cut), cut[-15:]) == (40, "… (576 numbers)")


# -- nodes -------------------------------------------------------------------------------------


def test_drain_and_undrain_by_the_beginning_of_a_name(talking, capsys):
    assert run(["drain", "ra"]) == 0
    assert capsys.readouterr().out == (
        "ram begins nothing new; it finishes 1 request; `omx top` shows when it is done\n"
    )
    assert run(["drain", "attic"]) == 0
    assert "nothing left to finish" in capsys.readouterr().out
    assert run(["undrain", OTHER_PEER, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "peer_id": OTHER_PEER,
        "node": "attic",
        "draining": False,
    }
    assert talking.inference.drained == [(PEER, True), (OTHER_PEER, True), (OTHER_PEER, False)]


def test_a_node_that_is_not_there_or_not_one_only(talking, capsys):
    assert run(["drain", "cellar"]) == 3
    assert "no node is called 'cellar'" in capsys.readouterr().err
    assert run(["drain", "12D3KooW"]) == 2
    assert f"fits 2 nodes; give more of the peer id: {PEER}, {OTHER_PEER}" in (
        capsys.readouterr().err
    )
    assert talking.inference.drained == []


async def look(*nodes, pulls=()) -> Look:
    return Look(status=await RamNode().status(), nodes=nodes, pulls=pulls)


async def test_a_look_at_the_swarm(monkeypatch):
    seen = await look(
        node_load("ram", PEER, busy=2, queued=3),
        node_load("attic", OTHER_PEER, draining=True, loaded=("a", "b", "c", "d", "e")),
        node_load("desk", THIRD_PEER, backends=(), slots=0, busy=0, loaded=()),
        node_load("gone", THIRD_PEER, heard_s=9.0, busy=2, slots=2),
        pulls=(("llama3.2:latest", 63.0),),
    )
    text = look_text(seen, 200, 50)
    summary, _, head, *lines = text.splitlines()
    assert summary == (
        "4 nodes, 1 draining   running 3 of 4   waiting 3   37.5 tokens/s   12:00:00 UTC"
    )
    assert head.split()[:4] == ["NODE", "REGION", "STATE", "SLOTS"]
    assert [line.split()[0] for line in lines[:4]] == ["ram", "attic", "desk", "gone"]
    assert lines[0].startswith("ram *")
    assert "a, b, c and 2 more" in lines[1]
    assert [node_row(each, PEER)[2] for each in seen.nodes] == [
        "busy",
        "draining",
        "no engine",
        "silent",
    ]
    assert lines[-1] == "pulling llama3.2:latest, for 1m3s"


async def test_a_look_fits_its_terminal():
    nodes = [node_load(f"node{number:03}", PEER) for number in range(40)]
    text = look_text(await look(*nodes), 60, 20)
    assert len(text.splitlines()) <= 20
    assert "and 25 more" in text
    assert max(map(len, text.splitlines()[2:])) <= 60


def test_top_once_is_one_look(talking, capsys):
    talking.node.pulling = ("llama3.2:latest",)
    assert run(["top", "--once"]) == 0
    out = capsys.readouterr().out
    assert out.count("running 1 of 4") == 1
    assert "pulling llama3.2:latest, for 0s" in out
    assert run(["top", "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"] == {"busy": 1, "slots": 4, "queued": 0, "tokens_per_s": 25.0}
    assert [each["node"] for each in found["nodes"]] == ["ram", "attic"]
    assert found["pulls"][0]["model"] == "llama3.2:latest"


class LeavesAfter(io.StringIO):
    """A reader that goes after so many writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self._writes = writes

    def write(self, text: str) -> int:
        self._writes -= 1
        if self._writes < 0:
            raise BrokenPipeError
        return super().write(text)


def test_top_looks_again_and_again_until_nobody_reads(talking, monkeypatch):
    out = LeavesAfter(3)
    monkeypatch.setattr(sys, "stdout", out)
    assert run(["top", "--json", "--interval", "0.2"]) == 0
    assert len(out.getvalue().splitlines()) == 3


def test_a_reader_that_leaves_an_answer_early_is_no_error(talking, monkeypatch):
    talking.script(token_s=0.02)
    monkeypatch.setattr(sys, "stdout", LeavesAfter(2))
    assert run(["run", "tiny", "hello"]) == 0


def test_an_answer_of_nothing_is_nothing(talking, capsys):
    talking.say()
    assert run(["run", "tiny", "x"]) == 0
    assert capsys.readouterr() == ("", "")

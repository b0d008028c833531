"""`omx run` on a terminal."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from ollamamax_p2p import LocalClient
from ollamamax_p2p.errors import BackendUnavailable, BadInput
from ollamamax_p2p.inference.core.requests import Delta
from omx_cli.asking import Manner
from omx_cli.conversation import Conversation, parameter
from omx_cli.line_reader import Ended, opens_quotes, unquoted
from tests.cli.running_omx import command, environment
from tests.cli.test_pictures import PNG

pytestmark = pytest.mark.network


@dataclass
class Lines:
    """What a person writes."""

    lines: list[str | Ended]
    keeps_history: bool = True
    kept: list[bool] = field(default_factory=list)

    def read(self) -> str | Ended:
        self.kept.append(self.keeps_history)
        return self.lines.pop(0) if self.lines else Ended.LEFT


@pytest.fixture
def talk(talking, capsys):
    """Has a conversation with these lines; gives it, and what was shown."""

    def run(*lines, model: str = "tiny", capabilities=("completion", "chat"), **manner):
        client = LocalClient.find(talking.data_dir)
        reader = Lines([*lines])
        held = Conversation(client, model, Manner(**manner), capabilities, reader)
        held.run()
        return held, capsys.readouterr()

    return run


def asked(talking) -> list[list[tuple[str, str]]]:
    """The messages of every question."""
    requests = [each for each in talking.inference.seen if each.messages]
    return [[(message.role, message.content) for message in each.messages] for each in requests]


def test_each_question_has_what_was_said_before(talking, talk):
    talking.say(Delta(text="one "), Delta(text="two"))
    talk("hello", "and?", "/clear", "again")
    first, second, third = asked(talking)
    assert first == [("user", "hello")]
    assert second == [("user", "hello"), ("assistant", "one two"), ("user", "and?")]
    assert third == [("user", "again")]
    sessions = [call.session for call in talking.inference.calls]
    assert sessions[0] == sessions[1] == sessions[2] != sessions[3]
    assert len(talking.inference.loads) == 1, "it is loaded before the first question"


def test_what_is_set_is_sent(talking, talk):
    _, (out, err) = talk(
        '/set system """You are\na pirate."""',
        "/set parameter temperature 0.5",
        "/set parameter stop 'a b' c",
        "/set format json",
        "/set think low",
        "hello",
        "/set noformat",
        "/set nothink",
        "hello",
    )
    first, second = (each for each in talking.inference.seen if each.messages)
    assert (first.messages[0].role, first.messages[0].content) == ("system", "You are\na pirate.")
    assert (first.options.temperature, first.options.stop) == (0.5, ("a b", "c"))
    assert (first.format, first.think) == ("json", "low")
    assert (second.format, second.think) == ("", False)
    assert "set temperature to 0.5" in out
    assert err == ""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/set parameter warmth 1", "Error: there is no parameter 'warmth'"),
        ("/set parameter top_k 1.5", "Error: top_k must be a whole number, not '1.5'"),
        ("/set parameter top_p x", "Error: top_p must be a number, not 'x'"),
        ("/set parameter top_p", "Error: /set parameter top_p VALUE"),
        ("/set parameter stop 'x", "Error: stop: No closing quotation"),
        ("/frobnicate now", "there is no command /frobnicate; /? lists them"),
        ("/load none", "Error: model 'none' not found"),
        ("/load vectors", '"vectors" only gives vectors'),
    ],
)
def test_what_is_wrong_is_one_line_and_the_conversation_goes_on(talking, talk, line, problem):
    _, (_, err) = talk(line, "hello")
    assert problem in err
    assert err.count("\n") == 1
    assert asked(talking) == [[("user", "hello")]]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/?", "/save NAME"),
        ("/help set", "/set parameter NAME VALUE"),
        ("/? /show", "/show modelfile"),
        ("/set", "/set parameter NAME VALUE"),
        ("/set nonsense", "/set parameter NAME VALUE"),
        ("/set format yaml", "/set parameter NAME VALUE"),
        ("/set parameter", "num_ctx"),
        ("/show", "/show modelfile"),
        ("/show info", "  Model\n    architecture      llama\n    parameters        135M\n"),
        ("/show license", "MIT"),
        ("/show modelfile", "FROM tiny"),
        ("/show template", "{{ .Prompt }}"),
        ("/show system", "the model has no system"),
        ("/show parameters", "of the model:\ntemperature 0.2"),
        ("/list", "NAME"),
        ("/load", "/load MODEL"),
        ("/save", "/save NAME"),
    ],
)
def test_commands_that_show_something(talk, line, text):
    _, (out, err) = talk(line)
    assert text in out
    assert err == ""


def test_what_was_set_is_shown(talk):
    _, (out, _) = talk(
        "/set system Be brief.", "/show system", "/set parameter seed 7", "/show parameters"
    )
    assert "\nBe brief.\n" in out
    assert "set here:\nseed    7" in out


def test_switches(talk):
    held, _ = talk("/set verbose", "/set nowordwrap", "/set nohistory", "/set history")
    assert (held.manner.verbose, held.manner.wrap) == (True, False)
    assert held.reader.kept == [True, True, True, False, True]
    held, _ = talk("/set quiet", "/set wordwrap", "/set think", verbose=True, wrap=False)
    assert (held.manner.verbose, held.manner.wrap, held.manner.think) == (False, True, True)


def test_another_model_begins_anew(talking, talk):
    held, _ = talk("hello", "/set system x", "/load seer", "hello")
    assert held.model == "seer"
    assert talking.inference.seen[-1].model == "seer"
    assert asked(talking)[-1] == [("user", "hello")]


def test_another_model_that_cannot_be_loaded_changes_nothing(talking, talk):
    held, (_, err) = talk("/load new", "hello")
    assert held.model == "new"
    talking.inference.backends[0]._models.pop("seer:latest")
    held, (_, err) = talk("/load seer", "hello")
    assert held.model == "tiny"
    assert err.splitlines() == ["Error: model 'seer' not found"]


def test_a_conversation_can_be_saved_as_a_model(talking, talk):
    talking.say(Delta(text="Ahoy!"))
    held, (out, _) = talk(
        "/set system A pirate.", "/set parameter stop x y", "/set parameter seed 7", "hi",
        "/save pirate",
    )  # fmt: skip
    assert held._modelfile() == (
        'FROM tiny\nSYSTEM """A pirate."""\nPARAMETER stop "x"\nPARAMETER stop "y"\n'
        'PARAMETER seed 7\nMESSAGE user """hi"""\nMESSAGE assistant """Ahoy!"""\n'
    )
    assert "made pirate:latest" in out
    assert "pirate:latest" in talking.node.held


def test_an_answer_that_breaks_off_is_told_and_remembered(talking, talk):
    talking.say(Delta(text="half"), BackendUnavailable("x", "it is gone"))
    _, (_, err) = talk("hello", "go on")
    assert err.count("it is gone") == 2
    assert asked(talking)[1][:2] == [("user", "hello"), ("assistant", "half")]


def test_a_question_that_is_not_answered_is_forgotten(talking, talk):
    talking.inference.error = BackendUnavailable("x", "it is gone")
    held, (_, err) = talk("hello")
    assert held.messages == []
    assert err.count("Error: ") == 2, "of the load and of the question"


def test_pictures_are_sent_where_the_model_takes_them(talking, talk, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    _, (_, err) = talk(f"{tmp_path}/a.png what is it?", capabilities=("completion", "vision"))
    assert talking.inference.seen[-1].messages[0].images == (PNG,)
    assert err == f"added {tmp_path}/a.png\n"
    count = len(talking.inference.seen)
    _, (_, err) = talk("what is ./a.png ?")
    assert err == 'Error: "tiny" takes no pictures; leave ./a.png out, or ask another model\n'
    (tmp_path / "a.png").write_text("no picture")
    _, (_, err) = talk(f"{tmp_path}/a.png what is it?")
    assert "neither PNG, JPEG nor WebP" in err
    assert len(talking.inference.seen) == count


def test_a_node_that_has_ended_is_said_at_the_next_question(talking, talk):
    talking.stop()
    talking.data_dir.joinpath("node.json").write_text(
        f'{{"pid":{os.getpid()},"api":"127.0.0.1:9","peer_id":"x"}}'
    )
    talking.data_dir.joinpath("api-token").write_text("x" * 40)
    talking.data_dir.joinpath("node.json").chmod(0o600)
    talking.data_dir.joinpath("api-token").chmod(0o600)
    _, (_, err) = talk("hello")
    assert err.count("no node is running") == 2


def test_values_of_parameters():
    assert (parameter("num_ctx", "512"), parameter("min_p", "0.05")) == (512, 0.05)
    assert parameter("stop", "one 'two three'") == ["one", "two three"]
    with pytest.raises(BadInput, match="there is no parameter"):
        parameter("x", "1")


def test_three_quotes_begin_and_end_a_text():
    assert opens_quotes('"""a')
    assert opens_quotes('/set system """a')
    assert not opens_quotes('"""a"""')
    assert not opens_quotes('say """a')
    assert not opens_quotes("a")
    assert unquoted('"""\na\nb"""') == "a\nb"
    assert unquoted("a ") == "a"


# -- at a terminal -----------------------------------------------------------------------------


class Terminal:
    """A process and the terminal it runs in."""

    def __init__(self, process: subprocess.Popen, ours: int) -> None:
        self.process = process
        self._ours = ours
        self.shown = ""

    def write(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> str:
        """What came until that was shown; it and what came before is not looked at again."""
        while text not in self.shown:
            ready, _, _ = select.select([self._ours], [], [], 30)
            assert ready, f"{text!r} did not come; there is {self.shown!r}"
            try:
                self.shown += os.read(self._ours, 65_536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended before {text!r} with {self.shown!r}") from None
        before, _, self.shown = self.shown.partition(text)
        return before

    def press_ctrl_c(self, text: str) -> str:
        """What came until that was shown. Pressed again where nothing happens: CPython's readline
        notices a signal only while it waits for a key, not while it still draws the last one.
        """
        for _ in range(10):
            self.write("\x03")
            ready, _, _ = select.select([self._ours], [], [], 2)
            if ready:
                return self.wait_for(text)
        raise AssertionError(f"nothing came; there is {self.shown!r}")

    def code_after_ctrl_c(self) -> int:
        """How it ended; pressed again where nothing happens, for the same reason."""
        for _ in range(10):
            self.write("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(3)
        raise AssertionError(f"it did not end; there is {self.shown!r}")

    def signal_until_it_ends(self, number: int) -> None:
        """Again where nothing happens, for the same reason."""
        for _ in range(10):
            self.process.send_signal(number)
            ready, _, _ = select.select([self._ours], [], [], 2)
            if ready:
                return

    def code(self) -> int:
        return self.process.wait(30)


@contextmanager
def at_terminal(data_dir, *arguments: str):
    ours, theirs = pty.openpty()
    more = {"TERM": "xterm", "COLUMNS": "80", "LINES": "30", "NO_COLOR": "1"}
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(data_dir, **more),
        cwd=data_dir,
        start_new_session=True,
        preexec_fn=lambda: _take_terminal(theirs),
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal(handle: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(handle, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal


def test_a_conversation_at_a_terminal(talking):
    talking.say(Delta(text="Ahoy "), Delta(text="there"))
    with at_terminal(talking.data_dir, "run", "tiny") as terminal:
        assert "tiny: ask something; /? lists commands" in terminal.wait_for(">>> ")
        terminal.write("hello\r")
        assert "Ahoy there" in terminal.wait_for("answered by ram (scripted)")
        terminal.wait_for(">>> ")
        terminal.write('"""two\r')
        terminal.wait_for("... ")
        terminal.write('lines"""\r')
        terminal.wait_for(">>> ")
        terminal.write("\x1b[A\x1b[A\x1b[A\r")  # three up: hello
        terminal.wait_for(">>> ")
        terminal.write("/bye\r")
        assert terminal.code() == 0
    said = [messages[-1][1] for messages in asked(talking)]
    assert said == ["hello", "two\nlines", "hello"]
    history = talking.data_dir / "history"
    assert history.read_text().splitlines()[:3] == ["hello", '"""two', 'lines"""']
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_an_answer_then_a_line_and_twice_at_an_empty_one_leaves(talking):
    talking.script(token_s=0.05)
    with at_terminal(talking.data_dir, "run", "tiny") as terminal:
        terminal.wait_for(">>> ")
        terminal.write("hello\r")
        terminal.wait_for("swarm")
        terminal.write("\x03")
        terminal.write("\x03")  # in a hurry: the conversation goes on all the same
        terminal.wait_for(">>> ")
        assert talking.inference.backends[0].cancelled == 1
        terminal.write("half a li")
        terminal.wait_for("half a li")
        assert "again" not in terminal.press_ctrl_c(">>> ")
        assert "Ctrl-C again, Ctrl-D or /bye leaves." in terminal.press_ctrl_c(">>> ")
        assert terminal.code_after_ctrl_c() == 0


def test_ctrl_d_leaves(talking):
    with at_terminal(talking.data_dir, "run", "tiny") as terminal:
        terminal.wait_for(">>> ")
        terminal.write("\x04")
        assert terminal.code() == 0


def test_sigterm_ends_the_conversation_at_the_prompt_and_in_an_answer(talking):
    with at_terminal(talking.data_dir, "run", "tiny") as terminal:
        terminal.wait_for(">>> ")
        terminal.write("x")
        terminal.wait_for("x")
        terminal.signal_until_it_ends(signal.SIGTERM)
        terminal.wait_for("Error: interrupted")
        assert terminal.code() == 130
    talking.script(token_s=0.05)
    with at_terminal(talking.data_dir, "run", "tiny") as terminal:
        terminal.wait_for(">>> ")
        terminal.write("hello\r")
        terminal.wait_for("swarm")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.wait_for("Error: interrupted")
        assert terminal.code() == 130


def test_ctrl_c_ends_a_single_question_at_once_and_stops_its_engine(talking):
    talking.script(token_s=0.05)
    with at_terminal(talking.data_dir, "run", "tiny", "hello") as terminal:
        terminal.wait_for("swarm")
        terminal.write("\x03")
        terminal.wait_for("Error: interrupted")
        assert terminal.code() == 130
    assert talking.inference.backends[0].cancelled == 1


def test_top_draws_in_place_and_leaves_the_terminal_as_it_was(talking):
    with at_terminal(talking.data_dir, "top") as terminal:
        drawn = terminal.wait_for("2 nodes, 1 draining")
        assert "\x1b[?1049h" in drawn
        terminal.write("\x03")
        assert "Error" not in terminal.wait_for("\x1b[?1049l")
        assert terminal.code() == 130


def test_a_terminal_shows_the_place_in_the_queue_on_one_line(talking):
    from ollamamax_p2p.router import QueuePlace

    talking.inference.places = [QueuePlace(position=3, eta_s=4.0)]
    talking.script(first_token_s=0.5)
    with at_terminal(talking.data_dir, "run", "tiny", "hello") as terminal:
        terminal.wait_for("waiting: place 3, about 4s")
        answer = terminal.wait_for("answered by ram")
        assert re.match(r"(.*\r)?\x1b\[K", answer, re.DOTALL)
        assert terminal.code() == 0

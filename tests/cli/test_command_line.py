"""Command lines that need no node: usage, settings, start-up."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from omx_cli import cluster_commands
from omx_cli.main import app, run
from tests.cli.running_omx import ROOT, environment


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    for name in [*os.environ]:
        if name.startswith(("OMX_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_help_lists_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    names = "up join invite pull import create list show cp rm peers status stop leave events "
    names += "run ps load embed drain undrain top"
    for command in [*names.split(" "), "doctor", "version", "config", "cluster"]:
        assert f"\n  {command} " in result.output


@pytest.mark.parametrize("command", [c.name for c in cluster_commands.app.registered_commands])
def test_every_cluster_command_has_help_and_json(command):
    result = CliRunner().invoke(app, ["cluster", command, "--help"])
    assert result.exit_code == 0
    for flag in ("--json", "--data-dir", "--config"):
        assert flag in result.output


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_every_command_has_help_and_json(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert command in ("version", "demo") or "--data-dir" in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell, tmp_path):
    def completed(words: str) -> str:
        # What the script that `omx --install-completion` installs asks, in each shell's own way.
        asked = {
            "_OMX_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "_TYPER_COMPLETE_ARGS": words,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        return subprocess.run(
            [sys.executable, "-m", "omx_cli"],
            capture_output=True,
            text=True,
            env=environment(tmp_path) | asked,
        ).stdout

    assert "pull" in completed("omx pu")
    assert "--from-origin" in completed("omx pull --from")
    assert "check" in completed("omx config ch")
    assert "pull" not in completed("omx zz")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["stauts"], "Did you mean 'status'?"),
        (["list", "--jsno"], "No such option"),
        (["pull"], "Missing argument 'MODEL'"),
        (["invite", "--uses", "0"], "--uses"),
        (["invite", "--expires", "soon"], "'soon' is not a time like 90s"),
        (["invite", "--expires", "nan"], "is not a time"),
        (["invite", "--expires", "367d"], "--expires: '367d' is not between 1s and 366d"),
        (["invite", "--uses", "257"], "--uses"),
        (["import", "", "x"], "FILE is empty"),
        (["invite", "--withdraw", "--uses", "2"], "leave --uses and --expires out"),
        (["cluster", "promote"], "Missing argument 'MEMBER'"),
        (["cluster", "set", "voters_max"], "give KEY and VALUE, or neither"),
        (["up", "--region", "two words"], "--region: 'two words' is not one word"),
        (["up", "--voter", "maybe"], "--voter: 'maybe' is not auto, yes or no"),
        (["list", "--data-dir", "/etc/passwd"], "/etc/passwd is a file, not a folder"),
        (["show", "x", "--license", "--system"], "only one of"),
        (["up", "--api", "0.0.0.0:1"], "--api: 0.0.0.0 is not a loopback address"),
        (["up", "--listen", "tcp/1"], "--listen: invalid address"),
        (["up", "--bootstrap", "x"], "--bootstrap: invalid address"),
        (["up", "--config", "none.toml"], "there is no such file"),
    ],
)
def test_bad_usage_is_one_line_and_2(line, text, capsys):
    assert run(line) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", [[], ["config"]])
def test_without_a_command_there_is_help_with_its_line_breaks(line, capsys):
    assert run(line) == 2
    err = capsys.readouterr().err
    assert err.startswith("Usage: omx")
    assert err.count("\n") > 5


def test_a_fifo_is_no_config_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for line in (["config", "check"], ["config", "show", "--config"]):
        assert run([*line, str(tmp_path / "fifo")]) == 2
        assert "not a regular file" in capsys.readouterr().err


TICKET = "omx1" + "q7" * 60


@pytest.mark.parametrize(
    "line",
    [
        ["up", TICKET],
        ["up", "--bootstrap", TICKET.upper()],
        ["join", TICKET, "/ip4/127.0.0.1/tcp/1"],
        ["join", TICKET, TICKET],
        ["join", TICKET[:60], TICKET[60:]],
        [TICKET],
    ],
)
def test_a_ticket_is_never_repeated(line, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OMX_DATA_DIR", str(tmp_path / "d"))
    assert run(line) == 2
    err = capsys.readouterr().err
    assert "q7q7" not in err.lower()
    assert err.count("\n") == 1
    if line[0] == "join":
        assert "give one ticket, or addresses, not both" in err
    assert not (tmp_path / "d").exists()


def test_nothing_is_made_by_a_bad_ticket_or_by_leaving(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OMX_DATA_DIR", str(tmp_path / "d"))
    assert run(["join", "hello"]) == 2
    assert "this is not a whole ticket" in capsys.readouterr().err
    assert run(["leave"]) == 0
    assert capsys.readouterr().out == "this node is alone in its swarm; there is nothing to leave\n"
    assert not (tmp_path / "d").exists()


@pytest.mark.network
def test_ctrl_c_while_it_starts_is_one_line(tmp_path):
    script = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'omx_cli.main':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from omx_cli.entry import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, b"Error: interrupted\n")


def test_ctrl_c_in_a_command_is_one_line(monkeypatch, capsys):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ollamamax_p2p.config.loading.load", pressed)
    assert run(["config", "show"]) == 130
    assert capsys.readouterr().err.strip() == "Error: interrupted"


def test_errors_for_programs_are_json(capsys):
    assert run(["status", "--json"]) == 4
    found = json.loads(capsys.readouterr().err)
    assert found["code"] == "node_not_running"
    for line in (["frobnicate", "--json"], ["--json"], ["--json", "list"]):
        assert run(line) == 2
        assert json.loads(capsys.readouterr().err)["code"] == "usage"


@pytest.mark.parametrize("command", [["status"], ["peers"], ["invite"], ["stop"], ["events"]])
def test_without_a_node_the_mend_is_named(command, capsys):
    assert run(command) == 4
    assert "omx up" in capsys.readouterr().err


def test_config_show_prints_values_and_sources(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OMX_API", "127.0.0.1:7")
    monkeypatch.setenv("OMX_ORIGIN_CREDENTIALS", "reg.local=me:hunter2")
    assert run(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert "hunter2" not in out
    assert ["api.listen", "127.0.0.1:7", "OMX_API"] in [line.split() for line in out.splitlines()]
    assert run(["config", "show", "--json", "--data-dir", str(tmp_path / "d")]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["data_dir"] == {"value": str(tmp_path / "d"), "source": "--data-dir"}
    assert settings["origin.credentials"]["value"] == {"reg.local": "(set, not shown)"}


def test_config_check_tells_good_files_from_bad(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text("[transfer]\nupload_slots = 2\n")
    assert run(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: ok\n"
    file.write_text("[transfer]\nuplod_slots = 2\n")
    assert run(["config", "check", str(file), "--json"]) == 2
    found = json.loads(capsys.readouterr().err)
    assert found["code"] == "bad_config"
    assert "did you mean transfer.upload_slots?" in found["error"]


def test_a_fault_of_ours_is_one_line_without_a_traceback(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("ollamamax_p2p.config.loading.load", broken)
    assert run(["config", "show"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "Error: unexpected ZeroDivisionError: two lines "
        "(this is a fault of omx; OMX_DEBUG=1 shows where)\n"
    )
    monkeypatch.setenv("OMX_DEBUG", "1")
    assert run(["config", "show"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.output.startswith("omx version is ")
    for line in (["version", "--json"], ["--version", "--json"], ["--json", "-v"]):
        assert json.loads(CliRunner().invoke(app, line).output)["version"]


SLOW_MODULES = {
    "libp2p", "starlette", "anycorn", "httpx2", "trio", "rich", "msgspec", "zeroconf",
    "multiaddr", "cryptography", "h11",
}  # fmt: skip


@pytest.mark.network
@pytest.mark.parametrize("line", [["--help"], ["run", "--help"], ["--version"]])
def test_help_loads_nothing_slow(line, tmp_path):
    script = (
        "import sys\nfrom omx_cli.main import run\n"
        f"assert run({line!r}) == 0\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & SLOW_MODULES


@pytest.mark.network
def test_commands_that_only_talk_http_load_no_libp2p(tmp_path):
    script = (
        "import sys\nfrom omx_cli.main import run\n"
        "assert run(['status']) == 4\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    loaded = {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}
    assert not loaded & {"libp2p", "starlette", "anycorn", "httpx2", "zeroconf", "rich"}


def test_the_public_names_are_all_there():
    import ollamamax_p2p

    for name in ollamamax_p2p.__all__:
        assert getattr(ollamamax_p2p, name) is not None
    assert set(ollamamax_p2p.__all__) <= set(dir(ollamamax_p2p))
    with pytest.raises(AttributeError):
        _ = ollamamax_p2p.nothing_of_that_name

"""The Typer app `omx`; every way a command can end."""

import errno
import io
import os
import sys
from typing import Annotated, Any, TextIO, cast

import typer

from omx_cli import (
    cluster_commands,
    config_commands,
    demo,
    doctor,
    inference_commands,
    model_commands,
    node_commands,
    offline_commands,
    swarm_commands,
)
from omx_cli.output import drop, tell

app = typer.Typer(
    name="omx",
    help="One private swarm of the machines that run language models: pull once, share the bytes.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would cost --help half of its 150 ms
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("up")(swarm_commands.up)
app.command("invite")(swarm_commands.invite)
app.command("join")(swarm_commands.join)
app.command("pull")(model_commands.pull)
app.command("push")(model_commands.push)
app.command("import")(model_commands.import_file)
app.command("create")(model_commands.create)
app.command("run")(inference_commands.run)
app.command("ps")(inference_commands.ps)
app.command("load")(inference_commands.load)
app.command("embed")(inference_commands.embed)
app.command("list")(model_commands.list_models)
app.command("ls", hidden=True)(model_commands.list_models)
app.command("show")(model_commands.show)
app.command("cp")(model_commands.cp)
app.command("rm")(model_commands.rm)
app.command("peers")(swarm_commands.peers)
app.command("status")(swarm_commands.status)
app.command("events")(swarm_commands.events)
app.command("stop")(swarm_commands.stop)
app.command("drain")(node_commands.drain)
app.command("undrain")(node_commands.undrain)
app.command("top")(node_commands.top)
app.command("leave")(swarm_commands.leave)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("version")(swarm_commands.version)
app.add_typer(cluster_commands.app, name="cluster")
cluster_commands.app.command("recover")(offline_commands.recover)
cluster_commands.app.add_typer(offline_commands.wal, name="wal")
app.add_typer(config_commands.app, name="config")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-v", help="Show the version.", is_eager=True)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version.")] = False,
) -> None:
    """One private swarm of the machines that run language models: pull once, share the bytes."""
    if version:
        swarm_commands.version(as_json)
        raise typer.Exit
    if as_json:
        raise typer.BadParameter("write --json behind the command")
    if context.invoked_subcommand is None:
        raise typer.BadParameter("name a command; see: omx --help")


def run(arguments: list[str]) -> int:
    """Run one command line; gives its exit code. Errors are one line on stderr, never a traceback
    unless OMX_DEBUG is set.
    """
    as_json = "--json" in arguments
    if sys.stdout is None:
        sys.stdout = cast("TextIO", _ClosedOutput())
    try:
        result: Any = app(_with_values(arguments), prog_name="omx", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the outermost border: told in one line
        if any(isinstance(each, BrokenPipeError) for each in _leaves(error)):
            drop(sys.stdout)  # `omx list | head`: nobody reads any more
            return 0
        return _failed(error, as_json)
    if result == 130:  # Typer turns Ctrl-C into this, without a word
        return _failed(KeyboardInterrupt(), as_json)
    return result if isinstance(result, int) else 0


def _with_values(arguments: list[str]) -> list[str]:
    """`--think` alone is `--think=true`, as in Ollama; Typer knows no option whose value may be
    left out.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = ["--think=true" if each == "--think" else each for each in arguments[:end]]
    return options + arguments[end:]


def _failed(error: BaseException, as_json: bool) -> int:
    """Tell an error; gives the exit code."""
    if os.environ.get("OMX_DEBUG"):
        import traceback

        traceback.print_exception(error)
    text, code, status = _explained(error)
    if not text:
        return status
    if as_json:
        import json

        tell(json.dumps({"error": text, "code": code}, ensure_ascii=False))
    elif code == "help":
        tell(text)
    else:
        tell(f"Error: {text}")
    return status


class _ClosedOutput(io.TextIOBase):
    """In the place of a standard output that was closed before we began."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


def _output_trouble(error: BaseException) -> str:
    """Why standard output takes nothing more, if that is what an error is about."""
    if not isinstance(error, OSError):
        return ""
    if isinstance(sys.stdout, _ClosedOutput):
        return str(error.strerror) if error.errno == errno.EBADF else ""
    try:
        sys.stdout.flush()  # what could not be written is still there, and fails again
    except OSError as again:
        drop(sys.stdout)
        return again.strerror or "it cannot be written"
    return ""


def _explained(error: BaseException) -> tuple[str, str, int]:
    """One line, the error's code, and how the process ends."""
    from ollamamax_p2p import errors
    from omx_cli.exit_codes import INTERRUPTED, LOCAL, UNEXPECTED, USAGE, exit_code
    from omx_cli.running import Interrupted

    leaves = _leaves(error)
    interruption = next((each for each in leaves if isinstance(each, Interrupted)), None)
    if interruption:
        return str(interruption), "interrupted", INTERRUPTED
    if any(isinstance(each, KeyboardInterrupt | typer.Abort) for each in leaves):
        return "interrupted", "interrupted", INTERRUPTED
    named = errors.first_named(error)
    if named:
        return str(named), errors.code(named), exit_code(named)
    if type(error).__name__ == "NoArgsIsHelpError":  # click's, which Typer does not export
        return str(error.format_message()), "help", USAGE  # type: ignore[attr-defined]
    if isinstance(error, _USAGE_ERROR):
        return _safe(error.format_message()), "usage", USAGE  # type: ignore[attr-defined]  # click's
    if isinstance(error, SystemExit):
        return "", "", error.code if isinstance(error.code, int) else UNEXPECTED
    trouble = _output_trouble(leaves[0])
    if trouble:
        return f"cannot write to standard output: {trouble}", "local_trouble", LOCAL
    what = f"{type(leaves[0]).__name__}: {_one_line(str(leaves[0]))}"
    hint = "this is a fault of omx; OMX_DEBUG=1 shows where"
    return f"unexpected {what} ({hint})", "internal_error", UNEXPECTED


_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
# click's ClickException, over UsageError. Typer 0.29 carries a click of its own and older ones use
# the real one, so the class is reached through what Typer itself exports.


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]


def _safe(text: str) -> str:
    """What click says of an argument repeats it, and that may be a ticket."""
    from ollamamax_p2p.errors import OmxError

    return str(OmxError(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())

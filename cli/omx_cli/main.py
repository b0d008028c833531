"""The Typer app `omx`; every way a command can end."""

import os
import sys
from typing import Annotated, Any

import typer

from omx_cli import config_commands, demo, doctor, model_commands, swarm_commands

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
app.command("import")(model_commands.import_file)
app.command("create")(model_commands.create)
app.command("list")(model_commands.list_models)
app.command("ls", hidden=True)(model_commands.list_models)
app.command("show")(model_commands.show)
app.command("cp")(model_commands.cp)
app.command("rm")(model_commands.rm)
app.command("peers")(swarm_commands.peers)
app.command("status")(swarm_commands.status)
app.command("events")(swarm_commands.events)
app.command("stop")(swarm_commands.stop)
app.command("leave")(swarm_commands.leave)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("version")(swarm_commands.version)
app.add_typer(config_commands.app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        swarm_commands.version()
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-v", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """One private swarm of the machines that run language models: pull once, share the bytes."""


def main() -> None:
    """What the console script calls."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; gives its exit code. Errors are one line on stderr, never a traceback
    unless OMX_DEBUG is set.
    """
    as_json = "--json" in arguments
    try:
        result: Any = app(arguments, prog_name="omx", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # `omx list | head`: nobody reads any more. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:  # noqa: BLE001 - the outermost border: told in one line
        return _failed(error, as_json)
    return result if isinstance(result, int) else 0


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

        sys.stderr.write(json.dumps({"error": text, "code": code}, ensure_ascii=False) + "\n")
    else:
        from omx_cli.output import tell

        tell(f"Error: {text}")
    return status


def _explained(error: BaseException) -> tuple[str, str, int]:
    """One line, the error's code, and how the process ends."""
    from ollamamax_p2p import errors
    from omx_cli.exit_codes import INTERRUPTED, UNEXPECTED, USAGE, exit_code
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
    if isinstance(error, _USAGE_ERROR):
        return _one_line(error.format_message()), "usage", USAGE  # type: ignore[attr-defined]  # click's
    if isinstance(error, SystemExit):
        return "", "", error.code if isinstance(error.code, int) else UNEXPECTED
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


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""Writes docs/reference/cli.md from the commands themselves: `python -m omx_cli.reference`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from omx_cli import exit_codes
from omx_cli.main import app

_HEAD = """\
# The command line

<!-- Written by `python -m omx_cli.reference`; do not edit. -->

Answers go to stdout, progress and errors to stderr. An error is one line, `Error: …`; with `--json`
it is `{"error": …, "code": …}`, with the codes of [errors](errors.md). `OMX_DEBUG=1` adds the
traceback. Settings that have no flag are in [settings](settings.md).

Commands that need only this machine's models (`list`, `show`, `cp`, `rm`, `import`, `create`),
`pull`, `push`, `run` and `embed` use the node that runs on the data folder; where none runs they
open one for as long as they take.
"""


def reference_page() -> str:
    """The page."""
    parts = [_HEAD, "## Exit codes\n", _exit_codes()]
    for name, command in _commands(typer.main.get_command(app), "omx"):
        parts.append(f"## {name}\n\n{_usage(name, command)}\n\n{_entries(command)}")
    return "\n".join(parts)


def _exit_codes() -> str:
    text = exit_codes.__doc__ or ""
    return text[text.index("| code") :]


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _usage(name: str, command: Any) -> str:
    arguments = [_argument(part) for part in command.params if _is_argument(part)]
    line = " ".join([name, "[OPTIONS]", *arguments])
    return f"{command.help.strip()}\n\n    {line}"


def _argument(part: Any) -> str:
    name = part.metavar or part.name.upper()
    return name if part.required else f"[{name}]"


def _entries(command: Any) -> str:
    options = [part for part in command.params if not _is_argument(part) and not part.hidden]
    return "".join(_entry(option) for option in options)


def _entry(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in reversed(option.opts))
    value = "" if option.is_flag else f" {option.metavar or 'N'}"
    default = "" if option.default in (None, False, "") else f" Default: {option.default}."
    return f"- {names}{value}: {option.help}{default}\n"


def _is_argument(part: Any) -> bool:
    return bool(part.param_type_name == "argument")


if __name__ == "__main__":
    Path("docs/reference/cli.md").write_text(reference_page())

"""What a runbook tells to type can be typed: at three in the morning nobody reads the source."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from omx_cli.main import app

FOLDER = Path(__file__).parents[2] / "docs" / "runbooks"
PAGES = sorted(FOLDER.glob("*.md"))


def commands_in(text: str) -> list[str]:
    """Those in code: lines of blocks, and whole spans within a line."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
    spans = re.findall(r"`(omx [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line.strip() for line in blocks.splitlines()]
    return [line for line in lines if line.startswith("omx ")] + [
        " ".join(span.split()) for span in spans
    ]


def problem_with(command: str) -> str:
    """Why the command line does not take it; "" if it does."""
    here: Any = typer.main.get_command(app)
    words = command.split()[1:]
    while words and hasattr(here, "commands"):
        name = words.pop(0)
        if name not in here.commands:
            return f"{command}: there is no {name!r}"
        here = here.commands[name]
    if hasattr(here, "commands"):
        return f"{command}: name a command of it"
    known = {option for parameter in here.params for option in parameter.opts}
    unknown = [word for word in words if word.startswith("-") and word not in known]
    return f"{command}: there is no {unknown[0]}" if unknown else ""


def test_there_are_pages_and_they_name_commands():
    names = {page.name for page in PAGES}
    assert names >= {
        "clock-trouble.md",
        "damaged-wal.md",
        "full-disk.md",
        "lost-quorum.md",
        "replacing-a-node.md",
    }
    assert all(commands_in(page.read_text()) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists_with_its_options(page):
    problems = [problem_with(command) for command in commands_in(page.read_text())]
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_that_is_linked_to_is_there(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize(
    "command", ["omx bogus", "omx leave --bogus", "omx config", "omx config bogus"]
)
def test_what_does_not_exist_is_found(command):
    assert problem_with(command)

"""The text transcripts that etcd's raft is tested with, run on our core.

`pytest tests/consensus --raft-transcripts DIR` runs every script below a folder, twice: strictly,
and structurally, without the lines that loggers wrote. Scripts of our own, in tests/vectors/raft,
run always; `rewrite_transcripts` writes what our core prints into them, to be read before it is
believed.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.consensus.older_scripts import brought_up_to_date, theirs_and_ours
from tests.consensus.rewrite_transcripts import rewritten
from tests.consensus.runners import drives_nodes, runner_for
from tests.consensus.transcript_format import Directive, directives

LOGGED = re.compile(r"^\s*(DEBUG|INFO|WARN|ERROR|FATAL) ")


def without_log_lines(text: str) -> str:
    kept = [line for line in text.splitlines() if not LOGGED.match(line)]
    return "\n".join(kept)


def mismatch(script: str, *, strict: bool, read: Callable[[str], str] = str) -> str:
    """Where a script's output is another than ours; empty if it is ours throughout.

    read: what both are put through before they are compared.
    """
    runner = runner_for(script)
    for directive in directives(script):
        ours, theirs = read(runner.run(directive)), read(directive.expected)
        if not strict:
            ours, theirs = without_log_lines(ours), without_log_lines(theirs)
        if not strict and {ours, theirs} <= {"", "ok"}:
            continue
        if ours.rstrip("\n") != theirs.rstrip("\n"):
            return told(directive, ours, theirs)
    return ""


def told(directive: Directive, ours: str, theirs: str) -> str:
    return (
        f"line {directive.line}, {directive.command} {directive.arguments}:\n"
        f"--- expected\n{theirs}\n--- ours\n{ours}\n"
    )


@pytest.mark.parametrize("mode", ["strict", "structural"])
def test_a_transcript_is_reproduced(raft_script: Path, mode: str) -> None:
    problem = mismatch(raft_script.read_text(encoding="utf-8"), strict=mode == "strict")
    assert not problem, f"{raft_script.name}: {problem}"


@pytest.mark.counterpart
def test_an_older_script_comes_to_the_same(older_script: Path) -> None:
    script = older_script.read_text(encoding="utf-8")
    if drives_nodes(script):
        theirs, ours = theirs_and_ours(script)
        assert ours == theirs
        assert any(ours.values())
    else:
        assert not mismatch(script, strict=True, read=brought_up_to_date)


SCRIPT = """\
# A comment.
add-nodes 1 voters=(1) index=2
----
INFO 1 switched to configuration voters=(1)
INFO 1 became follower at term 0
INFO newRaft 1 [peers: [1], term: 0, commit: 2, applied: 2, lastindex: 2, lastterm: 1]

campaign 1
----
INFO 1 is starting a new election at term 0
INFO 1 became candidate at term 1

raft-state
----
1: StateCandidate (Voter) Term:1 Lead:0
"""


def test_a_script_of_our_own_is_reproduced() -> None:
    assert not mismatch(SCRIPT, strict=True)
    assert not mismatch(SCRIPT, strict=False)


def test_a_directive_is_read_as_the_originals_are() -> None:
    line, output = "go 1 to=( a, b(c,d) ) then= \\\n  last=x=y", "----\n----\na\n\nb\n----\n----\n"
    script = f"{line}\ninput\n\nmore\n{output}"
    (directive,) = directives(script)
    assert directive.command == "go"
    assert [(each.key, each.values) for each in directive.arguments] == [
        ("1", ()),
        ("to", (" a", "b(c,d) ")),
        ("then", ("",)),
        ("last", ("x=y",)),
    ]
    assert (directive.input, directive.expected) == ("input\n\nmore", "a\n\nb")


@pytest.mark.parametrize("line", ["go =1", "go to=(1", "go to=(1,(2)"])
def test_a_line_that_is_no_directive_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read|never closed"):
        list(directives(f"{line}\n----\n"))


def test_a_script_is_rewritten_with_what_our_core_prints() -> None:
    begun = re.sub(r"(?<=----\n)(.+\n)+", "", SCRIPT)
    assert "INFO" not in begun
    assert rewritten(begun) == SCRIPT == rewritten(SCRIPT)


def test_a_wrong_line_is_found_in_both_modes() -> None:
    wrong = SCRIPT.replace("StateCandidate", "StateLeader")
    assert "expected" in mismatch(wrong, strict=True)
    assert "expected" in mismatch(wrong, strict=False)


def test_a_wrong_log_line_is_found_in_strict_mode_only() -> None:
    wrong = SCRIPT.replace("INFO 1 became candidate at term 1", "INFO 1 became candidate at term 7")
    assert mismatch(wrong, strict=True)
    assert not mismatch(wrong, strict=False)


def test_an_unknown_command_says_so() -> None:
    assert mismatch("dance 1\n----\nok\n", strict=True)
    assert not mismatch("dance 1\n----\nunknown command\n", strict=True)

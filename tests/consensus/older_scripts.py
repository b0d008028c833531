"""The older set of transcripts, etcd 3.4's, which Debian's package golang-etcd-server-dev brings.

Where it differs from the newer one the newer decides, so its text is not ours. Two things can be
held against it all the same. The scripts without nodes are equal but for two corrections that came
later (OUTDATED). The scripts with nodes come to the same outcomes: who led, which configurations
each node went through, and what it applied, in the same order.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.consensus.interaction import Interaction
from tests.consensus.transcript_format import Directive, directives

FOLDER = Path("/usr/share/gocode/src/go.etcd.io/etcd/raft")

OUTDATED = (
    # A node that is added to an empty log is probed from its first entry, not from before it.
    (re.compile(r"(?<=match=0 )next=0"), "next=1"),
    # The chart's bar of a voter that is level with another was drawn empty.
    (re.compile(r"^[x>? ]*(?= *\d+    \(id=\d+\)$)", re.MULTILINE), ""),
)

_ENTRY = re.compile(r"\d+/\d+ Entry\w+")
_NODE = re.compile(r"> (\d+) ")
_CONFIGURATION = re.compile(r"INFO (\d+) (switched to configuration .*)")
_LEADER = re.compile(r"INFO (\d+) (became leader at term \d+)")


def brought_up_to_date(text: str) -> str:
    """Without what was corrected later."""
    for outdated, newer in OUTDATED:
        text = outdated.sub(newer, text)
    return text


def outcomes(output: Iterable[tuple[Directive, str]]) -> dict[str, list[str]]:
    """What each node applied, and the configurations and leaderships in between, from what scripts
    print."""
    found: dict[str, list[str]] = defaultdict(list)
    for directive, text in output:
        node = directive.arguments[0].key if directive.arguments else ""
        applying = False
        for line in map(str.strip, text.split("\n")):
            if applying and _ENTRY.match(line):
                found[node].append(line)
                continue
            applying = line == "CommittedEntries:"
            if header := _NODE.match(line):
                node = header[1]
            elif happened := _CONFIGURATION.match(line) or _LEADER.match(line):
                found[happened[1]].append(happened[2])
    return dict(found)


def theirs_and_ours(script: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The outcomes of an older script as it tells them, and as they are here."""
    run, commands = Interaction(), list(directives(script))

    def result(directive: Directive) -> str:
        text = run.run(directive)
        if directive.command == "campaign":
            # A candidate's vote for itself counts once it is durable; it used to count at once, and
            # later commands of a script with one voter take for granted that it leads.
            text += run.run(Directive(0, "process-ready", directive.arguments))
        return text

    theirs = outcomes((directive, directive.expected) for directive in commands)
    return theirs, outcomes((directive, result(directive)) for directive in commands)

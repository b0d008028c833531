"""Write into scripts of our own what our core prints now; then read the difference, line by line.

python -m tests.consensus.rewrite_transcripts tests/vectors/raft/*.txt
"""

import sys
from pathlib import Path

from tests.consensus.runners import runner_for
from tests.consensus.transcript_format import DASHES, directives


def rewritten(script: str) -> str:
    """The script with our output in place of what stands there."""
    lines, run = script.split("\n"), runner_for(script)
    parts: list[str] = []
    written = 0
    for directive in directives(script):
        parts += lines[written : directive.output_begins]
        output = run.run(directive).removesuffix("\n")
        blank_inside = any(not line.strip() for line in output.split("\n"))
        around = [DASHES] * (2 if blank_inside else 0)
        parts += [*around[1:], *output.split("\n"), *around]
        written = directive.output_ends
    return "\n".join([*parts, *lines[written:]])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")

"""Draws docs/pull.svg: one pull from two neighbours, as it looked in a real run on this machine.

python docs/draw_pull.py .demo/model
"""

import io
import re
import sys
import tempfile
from pathlib import Path

import trio
from rich.console import Console
from rich.text import Text

from ollamamax_p2p import PullProgress
from omx_cli.progress import TerminalView, report_line
from omx_cli.three_nodes import MODEL_NAME, DemoNode, end, find_model_file, start

COLUMNS = 112
TARGET = Path(__file__).with_name("pull.svg")


async def draw(model: Path) -> None:
    """Let carol pull from alice and bob; keep what her terminal showed at two thirds and after."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        nodes = [DemoNode(name, Path(folder) / name) for name in ("alice", "bob", "carol")]
        alice, bob, carol = nodes
        try:
            await start(alice, "up")
            await alice.client.import_model(find_model_file(model), MODEL_NAME)
            ticket = (await alice.client.invite(uses=2, expires_s=600)).ticket
            await start(bob, "join", ticket)
            await bob.client.pull(MODEL_NAME)
            await start(carol, "join", ticket)
            frames: list[list[str]] = []
            view = TerminalView(None, trio.current_time)

            def show(progress: PullProgress) -> None:
                view.show(progress)
                if progress.completed * 3 >= progress.total * 2 > 1_000_000 and not frames:
                    frames.append(view.lines(COLUMNS))

            report = await carol.client.pull(MODEL_NAME, on_progress=show)
        finally:
            for node in nodes:
                await end(node)
    console.print(Text(f"$ omx pull {MODEL_NAME}", style="bold"))
    for line in [*frames[0], "", "… and when it is done:", "", report_line(report)]:
        console.print(Text(line))
    svg = console.export_svg(title="omx pull")
    # A page that shows it should not fetch fonts from elsewhere; any monospace font will do.
    TARGET.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    trio.run(draw, Path(sys.argv[1]))

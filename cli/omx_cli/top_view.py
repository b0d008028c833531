"""What `omx top` shows: one look at the swarm after another, in place, in lines, or as JSON."""

import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omx_cli.output import (
    duration,
    fitting_table,
    human_bytes,
    printable,
    say,
    say_json,
    terminal_columns,
)

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient, NodeLoad, NodeStatus

LOADED_SHOWN = 3
"""Names of models in one line; the rest is counted."""

SILENT_S = 5.0
"""Nodes tell of themselves every half second; one that has not for so long has most likely gone."""

_HEAD = ["NODE", "REGION", "STATE", "SLOTS", "QUEUED", "TOKENS/S", "MEMORY FREE", "LOADED", "AGE"]
_SPARE = ["REGION", "AGE", "MEMORY FREE", "QUEUED"]
"""Left out on a narrow terminal, the first first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The swarm as this node sees it at one moment."""

    status: "NodeStatus"
    nodes: "tuple[NodeLoad, ...]"
    pulls: tuple[tuple[str, float], ...]
    """Models that this node is pulling, and for how many seconds that has been seen."""

    @property
    def heard(self) -> "tuple[NodeLoad, ...]":
        """Those of whom there is news; what the others last said is not added up."""
        return tuple(each for each in self.nodes if each.heard_s <= SILENT_S)

    @property
    def busy(self) -> int:
        """Requests that engines work on, anywhere."""
        return sum(each.busy for each in self.heard)

    @property
    def slots(self) -> int:
        """How many they could work on at once."""
        return sum(each.slots for each in self.heard)

    @property
    def queued(self) -> int:
        """Requests that wait in front of engines."""
        return sum(each.queued for each in self.heard)

    @property
    def tokens_per_s(self) -> float:
        """Of all nodes together."""
        return sum(each.tokens_per_s for each in self.heard)


async def watched(client: "LocalClient", interval_s: float) -> AsyncIterator[Look]:
    """A look at once, and after each interval another. Raises LocalTrouble where the node does not
    answer any more.
    """
    import trio

    from omx_cli.running import in_time

    since = dict[str, float]()
    while True:
        now = trio.current_time()
        status = await in_time(client, client.status)
        nodes = await in_time(client, client.nodes)
        since = {model: since.get(model, now) for model in status.pulls}
        pulls = tuple((model, now - begun) for model, begun in since.items())
        yield Look(status=status, nodes=nodes, pulls=pulls)
        await trio.sleep(interval_s)


@asynccontextmanager
async def open_top_view(as_json: bool, *, is_live: bool) -> AsyncIterator[Callable[[Look], None]]:
    """Shows looks, as suits where they go."""
    if as_json:
        yield lambda look: say_json(for_programs(look))
    elif not is_live:
        yield _say_look
    else:
        from rich.live import Live

        with Live(screen=True, auto_refresh=False) as live:
            yield lambda look: live.update(_drawn(look), refresh=True)


def _say_look(look: Look) -> None:
    say(look_text(look, terminal_columns(), sys.maxsize) + "\n")
    sys.stdout.flush()


def _drawn(look: Look) -> Any:
    from rich.text import Text

    columns, lines = shutil.get_terminal_size()
    return Text(printable(look_text(look, columns, lines)), no_wrap=True, overflow="crop")


def for_programs(look: Look) -> dict[str, Any]:
    """One line of `--json`."""
    return {
        "at": look.status.now,
        "node": look.status.name,
        "nodes": look.nodes,
        "totals": {
            "busy": look.busy,
            "slots": look.slots,
            "queued": look.queued,
            "tokens_per_s": look.tokens_per_s,
        },
        "pulls": [{"model": model, "seconds": seconds} for model, seconds in look.pulls],
    }


def look_text(look: Look, columns: int, lines: int) -> str:
    """One look in at most so many lines, its table no wider than that where it can be."""
    pulls = [f"pulling {model}, for {duration(seconds)}" for model, seconds in look.pulls]
    room = lines - len(pulls) - 4
    shown = look.nodes if len(look.nodes) <= room else look.nodes[: max(room - 1, 1)]
    rows = [node_row(each, look.status.peer_id) for each in shown]
    parts = [summary_text(look), "", fitting_table(_HEAD, rows, columns, _SPARE)]
    hidden = len(look.nodes) - len(shown)
    if hidden:
        parts.append(f"and {hidden} more")
    return "\n".join([*parts, *([""] if pulls else []), *pulls])


def summary_text(look: Look) -> str:
    """`3 nodes, 1 draining   running 2 of 6   waiting 0   31.4 tokens/s   12:01:07`."""
    count = len(look.nodes)
    nodes = "1 node" if count == 1 else f"{count} nodes"
    draining = sum(each.draining for each in look.nodes)
    if draining:
        nodes += f", {draining} draining"
    clock = look.status.now.partition("T")[2][:8]
    return (
        f"{nodes}   running {look.busy} of {look.slots}   waiting {look.queued}   "
        f"{look.tokens_per_s:.1f} tokens/s   {clock} UTC"
    )


def node_row(node: "NodeLoad", here: str) -> list[str]:
    """A line of the table."""
    if node.heard_s > SILENT_S:
        state = "silent"
    elif node.draining:
        state = "draining"
    elif not node.backends:
        state = "no engine"
    else:
        state = "busy" if node.busy else "idle"
    return [
        f"{node.node} *" if node.peer_id == here else node.node,
        node.region or "-",
        state,
        f"{node.busy}/{node.slots}",
        str(node.queued),
        f"{node.tokens_per_s:.1f}",
        f"{human_bytes(node.memory_free)} of {human_bytes(node.memory_total)}",
        loaded_text(node.loaded),
        duration(node.heard_s),
    ]


def loaded_text(names: tuple[str, ...]) -> str:
    """`llama3.2:latest, smollm2:135m`, and how many more."""
    if not names:
        return "-"
    hidden = len(names) - LOADED_SHOWN
    more = f" and {hidden} more" if hidden > 0 else ""
    return ", ".join(names[:LOADED_SHOWN]) + more

"""omx drain | undrain | top."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import say, say_json

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient, NodeLoad

NodeArgument = Annotated[
    str,
    typer.Argument(
        metavar="NODE",
        help="Its name or peer id, or a beginning of either.",
        show_default=False,
    ),
]

DRAIN_TIMEOUT_S = 15.0
"""The other node is told over the network."""


def drain(
    node: NodeArgument,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Have a node begin no new answers; what it has begun, it finishes."""
    _drain(node, True, data_dir, config, as_json)


def undrain(
    node: NodeArgument,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Have a node that was drained take new requests again."""
    _drain(node, False, data_dir, config, as_json)


def _drain(
    text: str, draining: bool, data_dir: str | None, config: str | None, as_json: bool
) -> None:
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        found = find_node(await client.nodes(), text)
        await client.drain(found.peer_id, draining=draining)
        if as_json:
            say_json({"peer_id": found.peer_id, "node": found.node, "draining": draining})
        elif draining:
            say(f"{found.node} begins nothing new; {_still_running(found)}")
        else:
            say(f"{found.node} takes requests again")

    with_node(node_flags(data_dir=data_dir), config, ask, timeout_s=DRAIN_TIMEOUT_S)


def _still_running(node: "NodeLoad") -> str:
    if not node.busy:
        return "it has nothing left to finish"
    requests = "1 request" if node.busy == 1 else f"{node.busy} requests"
    return f"it finishes {requests}; `omx top` shows when it is done"


def find_node(nodes: "Sequence[NodeLoad]", text: str) -> "NodeLoad":
    """The node that is meant: by its name or peer id, a beginning of either, or its peer id as
    tables show it. Raises BadInput if several fit, NotFound if none does.
    """
    from ollamamax_p2p.errors import BadInput, NotFound

    begin, _, end = text.partition("…")
    exact = [each for each in nodes if text in (each.peer_id, each.node)]
    begun = [
        each
        for each in nodes
        if each.node.startswith(text)
        or (each.peer_id.startswith(begin) and each.peer_id.endswith(end))
    ]
    found = (exact or begun) if text else []
    if len(found) > 1:
        ids = ", ".join(each.peer_id for each in found[:5])
        raise BadInput(f"{text!r} fits {len(found)} nodes; give more of the peer id: {ids}")
    if not found:
        raise NotFound(f"no node is called {text!r}; `omx top --once` lists them all")
    return found[0]


def top(
    once: Annotated[bool, typer.Option("--once", help="One look, then end.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Watch the nodes of the swarm: what they have loaded, how busy and how fast they are."""
    from omx_cli.running import Interrupted, with_node
    from omx_cli.top_view import open_top_view, watched

    async def ask(client: "LocalClient") -> None:
        async with open_top_view(as_json, is_live=not once and sys.stdout.isatty()) as show:
            async for look in watched(client, math.inf if once else interval):
                show(look)
                if once:
                    return

    try:
        with_node(node_flags(data_dir=data_dir), config, ask, timeout_s=math.inf)
    except Interrupted:
        raise Interrupted("") from None  # that is how one leaves it: nothing to say

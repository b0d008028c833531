"""omx up | invite | join | leave | peers | status | events | stop | version."""

import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import fields, human_bytes, say, say_json, short_peer, table, tell

if TYPE_CHECKING:
    from ollamamax_p2p import (
        ClusterStatus,
        Event,
        Invitation,
        LocalClient,
        Node,
        NodeConfig,
        NodeStatus,
        PeerInfo,
    )

STOP_TIMEOUT_S = 20.0
"""A node closes its peers and files within seconds; after this something is wrong with it."""


def up(
    open_swarm: options.Open = False,
    name: options.NodeName = None,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    api: options.Api = None,
    listen: options.Listen = None,
    bootstrap: options.Bootstrap = None,
    no_mdns: options.NoMdns = False,
    region: options.Region = None,
    voter: options.Voter = None,
    ollama_port: options.OllamaPort = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Run a node in the foreground, until Ctrl-C or `omx stop`."""
    from omx_cli.running import load

    flags = node_flags(
        data_dir=data_dir,
        name=name,
        models=models,
        api=api,
        listen=listen,
        bootstrap=bootstrap,
        no_mdns=no_mdns,
        open_swarm=open_swarm,
        region=region,
        voter=voter,
        ollama_port=ollama_port,
    )
    _run_node(load(flags, config), (), as_json)


def join(
    to: Annotated[list[str], typer.Argument(metavar="TICKET|MULTIADDR...", show_default=False)],
    name: options.NodeName = None,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    api: options.Api = None,
    listen: options.Listen = None,
    bootstrap: options.Bootstrap = None,
    no_mdns: options.NoMdns = False,
    open_swarm: options.Open = False,
    region: options.Region = None,
    voter: options.Voter = None,
    ollama_port: options.OllamaPort = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Join a swarm: with the node that runs here, else by starting one in the foreground."""
    from omx_cli.running import load, refuse_without_effect, run, running_node

    flags = node_flags(
        data_dir=data_dir,
        name=name,
        models=models,
        api=api,
        listen=listen,
        bootstrap=bootstrap,
        no_mdns=no_mdns,
        open_swarm=open_swarm,
        region=region,
        voter=voter,
        ollama_port=ollama_port,
    )
    settings = load(flags, config)

    async def tell_running_node() -> bool:
        client = await running_node(settings)
        if client is None:
            return False
        refuse_without_effect(flags, settings)
        report = await client.join(to)
        if as_json:
            say_json(report)
        else:
            say(f"joined swarm {report.swarm_id}")
        return True

    if not run(tell_running_node):
        _run_node(settings, tuple(to), as_json)


def _run_node(config: "NodeConfig", to: tuple[str, ...], as_json: bool) -> None:
    import logging

    # What goes wrong with peers is logged by their names; a node that runs for days wants times.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    # Imported before Ctrl-C is taken over: this takes two seconds, and it should end them too.
    from ollamamax_p2p import check_ticket, open_node
    from omx_cli.running import Interrupted, allow_many_files, run_until_asked

    if to:
        check_ticket(to)  # before there is a data folder with a swarm of its own
    allow_many_files()

    async def work(stop: Any) -> None:
        async with open_node(config, serve_api=True) as node:
            stop.ask = node.request_stop
            if to:
                await node.join(to)
            await _announce(node, as_json)
            await node.wait_for_stop()

    if run_until_asked(work):
        raise Interrupted("")  # by Ctrl-C: nothing to say, but a shell's `&&` must not go on


async def _announce(node: "Node", as_json: bool) -> None:
    status = await node.status()
    invitation = None if status.open_swarm else await _first_ticket(node)
    if as_json:
        say_json({"status": status, "invitation": invitation})
        return
    say(f"omx {status.version} is up; Ctrl-C stops it")
    say(fields([*_status_rows(status), *_way_in(status, invitation)]))
    sys.stdout.flush()


async def _first_ticket(node: "Node") -> "Invitation | None":
    """A ticket to show at the start. A node that cannot issue one runs all the same."""
    from ollamamax_p2p import OmxError

    try:
        return await node.invite()
    except OmxError as error:
        tell(f"no ticket: {error}")
        return None


def _way_in(status: "NodeStatus", invitation: "Invitation | None") -> list[tuple[str, str]]:
    if invitation is None and not status.open_swarm:
        return []
    if invitation is None:
        reachable = status.addresses[-1] if status.addresses else "(no address)"
        return [("join", f"omx join {reachable}")]
    uses = "once" if invitation.uses == 1 else f"{invitation.uses} times"
    return [
        ("ticket", invitation.ticket),
        ("", f"good {uses}, until {invitation.expires_at}; elsewhere: omx join TICKET"),
    ]


def _status_rows(status: "NodeStatus") -> list[tuple[str, str]]:
    store = status.store
    kind = "open" if status.open_swarm else "private"
    room = f"{store.model_count} models, {human_bytes(store.free_bytes)} free"
    return [
        ("peer id", status.peer_id),
        ("name", status.name),
        ("swarm", f"{status.swarm_id} ({kind})" if status.swarm_id else "none"),
        ("peers", str(status.peer_count)),
        ("models", f"{store.path} ({room}{'' if store.writable else ', read-only'})"),
        ("API", f"http://{status.api_address}" if status.api_address else "none"),
        *([("Ollama", f"http://{status.ollama_address}")] if status.ollama_address else []),
        ("mDNS", status.mdns),
        *_cluster_row(status.cluster),
        *(("address", address) for address in status.addresses),
        *(("pulling", model) for model in status.pulls),
        *(("other swarm", swarm) for swarm in status.other_swarms),
    ]


def _cluster_row(cluster: "ClusterStatus | None") -> list[tuple[str, str]]:
    from omx_cli.cluster_view import cluster_line, member_lines

    # None, or a member that has just started and has heard of nobody yet: nothing to say.
    is_known = cluster is not None and (cluster.has_quorum or cluster.last_contact_s is not None)
    if cluster is None or not is_known:
        return []
    alone = len(cluster.members) < 2
    lines = [] if alone or cluster.role == "removed" else member_lines(cluster)
    return [("cluster", cluster_line(cluster)), *(("", line) for line in lines)]


def invite(
    uses: Annotated[int, typer.Option(min=1, max=256, help="How many nodes may join with it.")] = 1,
    expires: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long it is good: 90s, 30m, 12h, 7d; 366d at most."),
    ] = "24h",
    withdraw: Annotated[
        bool,
        typer.Option("--withdraw", help="Print none, but make all that were made before useless."),
    ] = False,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Print a ticket by which others join this node's swarm."""
    from omx_cli.cluster_commands import AGREE_TIMEOUT_S
    from omx_cli.running import with_node

    expires_s = seconds_of(expires)
    if withdraw and (uses, expires) != (1, "24h"):
        raise typer.BadParameter("--withdraw makes no ticket; leave --uses and --expires out")

    async def ask(client: "LocalClient") -> None:
        if withdraw:
            _say_withdrawn(await client.withdraw_tickets(), as_json)
            return
        invitation = await client.invite(uses=uses, expires_s=expires_s)
        if as_json:
            say_json(invitation)
            return
        say(invitation.ticket)
        if sys.stdout.isatty():
            tell(f"good for {invitation.uses} joins, until {invitation.expires_at}")

    with_node(node_flags(data_dir=data_dir), config, ask, timeout_s=AGREE_TIMEOUT_S)


def _say_withdrawn(count: int, as_json: bool) -> None:
    if as_json:
        say_json({"withdrawn": count})
    elif count:
        say("withdrew 1 ticket" if count == 1 else f"withdrew {count} tickets")
    else:
        say("there was no ticket that could still be used")


FORGOTTEN = (
    "forgot the swarm: its key, its peers and this node's part of what was agreed; models and the "
    "node's own key stay. The others do not know it yet: `omx cluster remove` this node there, "
    "also before it joins them again"
)
_OUTCOMES = {
    "left": "left the swarm",
    "not in a swarm": "this node is alone in its swarm; there is nothing to leave",
}


def leave(
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="For a node that cannot be started: forget the swarm here, without telling the "
            "others; one of them must then `omx cluster remove` this node.",
        ),
    ] = False,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Leave the swarm: be a member no more, forget its key and members. Models stay."""
    from omx_cli.running import load, with_any_node

    def tell_outcome(outcome: str) -> None:
        if as_json:
            say_json({"outcome": outcome})
        else:
            say(_OUTCOMES.get(outcome, outcome))

    async def ask(node: "LocalClient | Node") -> None:
        tell_outcome(await node.leave())

    flags = node_flags(data_dir=data_dir)
    settings = load(flags, config)
    if not settings.data_dir.exists():  # a node opened for this would make one
        tell_outcome("not in a swarm")
    elif force:
        from ollamamax_p2p import forget_swarm

        tell_outcome(FORGOTTEN if forget_swarm(settings) else "not in a swarm")
    else:
        with_any_node(flags, config, ask)


def peers(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """List the connected peers."""
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        found = await client.peers()
        if as_json:
            say_json({"peers": found})
        else:
            say(
                table(["PEER", "NAME", "ADDRESS", "ROUND TRIP", "MEMBER"], [*map(_peer_row, found)])
            )

    with_node(node_flags(data_dir=data_dir), config, ask)


def _peer_row(peer: "PeerInfo") -> list[str]:
    round_trip = "-" if peer.round_trip_ms is None else f"{peer.round_trip_ms:.1f} ms"
    member = "yes" if peer.member else "no"
    if peer.banned:
        member = f"{member}; banned: {peer.banned}"
    return [short_peer(peer.peer_id), peer.name or "-", peer.address or "-", round_trip, member]


def status(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Show what the running node is and does."""
    from omx_cli.output import duration
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        found = await client.status()
        if as_json:
            say_json(found)
        else:
            say(f"omx {found.version}, up for {duration(found.uptime_s)}")
            say(fields(_status_rows(found)))

    with_node(node_flags(data_dir=data_dir), config, ask)


def events(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Print what happens on the running node, as it happens."""
    from omx_cli.running import in_time, with_node

    async def ask(client: "LocalClient") -> None:
        await in_time(client, client.status)
        async with client.events() as happening:
            async for event in happening:
                _say_event(event, as_json)

    with_node(node_flags(data_dir=data_dir), config, ask, timeout_s=math.inf)


def _say_event(event: "Event", as_json: bool) -> None:
    if as_json:
        say_json(event)
        return
    facts = " ".join(f"{key}={value}" for key, value in event.facts.items())
    say(f"{event.at}  {event.kind}  {facts}".rstrip())
    sys.stdout.flush()


def stop(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Have this model out of memory, on every node; without: stop the node.",
            show_default=False,
        ),
    ] = "",
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Stop the running node, and wait until it is gone; with MODEL, stop only that model."""
    import trio

    from ollamamax_p2p.errors import DeadlineExceeded
    from omx_cli.inference_commands import stop_model
    from omx_cli.running import WORK_TIMEOUT_S, in_time, is_alive, with_node

    async def ask(client: "LocalClient") -> None:
        if model:
            work = partial(stop_model, client, model, as_json)
            await in_time(client, work, WORK_TIMEOUT_S)
            return
        await in_time(client, client.stop)
        with trio.move_on_after(STOP_TIMEOUT_S) as scope:
            while is_alive(client.pid):  # noqa: ASYNC110 - a process can only be looked at
                await trio.sleep(0.05)
        if scope.cancelled_caught:
            raise DeadlineExceeded(f"stopping the node (process {client.pid})", STOP_TIMEOUT_S)
        if as_json:
            say_json({"stopped": True})
        else:
            say("stopped")

    with_node(node_flags(data_dir=data_dir), config, ask, timeout_s=math.inf)


def version(as_json: options.Json = False) -> None:
    """Show the version."""
    import ollamamax_p2p

    if as_json:
        say_json({"version": ollamamax_p2p.__version__})
    else:
        say(f"omx version is {ollamamax_p2p.__version__}")


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `12h`, `7d`, or seconds; 1 s to 366 days. Raises typer.BadParameter."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # also refuses nan
        raise typer.BadParameter(f"--expires: {text!r} is not a time like 90s, 30m, 12h or 7d")
    if not 1 <= seconds <= 366 * 86_400:
        raise typer.BadParameter(f"--expires: {text!r} is not between 1s and 366d")
    return seconds

"""omx cluster status | members | promote | demote | auto | remove | transfer-leader | snapshot |
rotate-key | set-clock | set.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from omx_cli import options
from omx_cli.cluster_view import (
    ANSWERS_S,
    members_table,
    name_of,
    status_text,
    voters_of,
    voters_text,
)
from omx_cli.options import node_flags
from omx_cli.output import say, say_json, table, tell, terminal_columns

if TYPE_CHECKING:
    from ollamamax_p2p import ClusterMember, ClusterStatus, LocalClient

T = TypeVar("T")

app = typer.Typer(
    help="See and change what the nodes of the cluster agree on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AGREE_TIMEOUT_S = 70.0
"""The node itself gives up before: 20 s for an agreement, and to remove a voter takes two and the
change of the voters between them.
"""

IN_FORCE_S = 20.0
"""For what is agreed to come true, beyond the time that a new voter must have kept up: a learner
catches up, an election comes between.
"""

LOOK_S = 0.5
"""The leader itself looks no more often whether there is something to do."""

LEADS_S = 5.0
"""For all to hear of a new leader: its first heartbeat comes at once."""

INTERRUPTED = "interrupted; what was agreed stays so, see `omx cluster status`"

Member = Annotated[
    str,
    typer.Argument(
        metavar="MEMBER",
        help="Its name or peer id, or a beginning of either.",
        show_default=False,
    ),
]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Return once it is agreed, before it is in force.")
]


@app.command("status")
def status(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Show leader, quorum, and how far every member is, in one look."""
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        found = await client.cluster_status()
        if as_json:
            say_json(found)
            return
        connected = {peer.peer_id for peer in await client.peers()}
        say(status_text(found, connected, terminal_columns()))

    with_node(node_flags(data_dir=data_dir), config, ask)


@app.command("members")
def members(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """List the members: who votes, who may, and where they are."""
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        found = await client.cluster_status()
        if as_json:
            say_json({"members": found.members})
        else:
            say(members_table(found, terminal_columns()))

    with_node(node_flags(data_dir=data_dir), config, ask)


@app.command("promote")
def promote(
    member: Member,
    no_wait: NoWait = False,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Make a member a voter, whatever autopilot thinks. Voters stay an odd number, so another may
    lose its vote to it.
    """
    _change(data_dir, config, lambda client: give_role(client, member, "voter", no_wait, as_json))


@app.command("demote")
def demote(
    member: Member,
    no_wait: NoWait = False,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Take a member's vote, whatever autopilot thinks; it still follows what is agreed. Voters stay
    an odd number, so another may lose its vote as well.
    """
    _change(data_dir, config, lambda client: give_role(client, member, "learner", no_wait, as_json))


@app.command("auto")
def auto(
    member: Member,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Let autopilot decide again whether a member votes."""

    async def ask(client: "LocalClient") -> None:
        seen, found = await _find(client, member)
        await _agreed(client, lambda: client.set_role(found.peer_id, "auto"))
        if as_json:
            say_json({"peer_id": found.peer_id, "wish": "auto"})
        else:
            say(f"autopilot decides about {name_of(seen, found.peer_id)}")

    _change(data_dir, config, ask)


@app.command("remove")
def remove(
    member: Member,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Expel a member: it loses access to every node at once, and comes back by a new ticket."""

    async def ask(client: "LocalClient") -> None:
        seen, found = await _find(client, member)
        is_here = found.peer_id == seen.peer_id  # and will be refused
        if found.role in ("voter", "leader") and not is_here and not as_json:
            tell("its vote is taken first; that may take some seconds")
        await _agreed(client, lambda: client.expel(found.peer_id))
        if as_json:
            say_json({"removed": found.peer_id})
        else:
            say(f"removed {name_of(seen, found.peer_id)}; it has no access any more")

    _change(data_dir, config, ask)


@app.command("transfer-leader")
def transfer_leader(
    member: Member,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Let another voter lead, for example before this one is stopped."""
    from ollamamax_p2p.errors import NetworkTrouble

    async def ask(client: "LocalClient") -> None:
        seen, found = await _find(client, member)
        name = name_of(seen, found.peer_id)
        leads = found.role == "leader" and seen.has_quorum
        if not leads:
            await _agreed(client, lambda: client.transfer_leader(found.peer_id))
            seen = await _look_until(client, lambda now: now.leader == found.peer_id, LEADS_S)
            if seen.leader != found.peer_id:
                leader = name_of(seen, seen.leader) if seen.leader else "nobody yet"
                raise NetworkTrouble(f"{name} was asked to lead, but {leader} leads; try again")
        if as_json:
            say_json({"leader": found.peer_id, "term": seen.term})
        elif leads:
            say(f"{name} leads already, in term {seen.term}")
        else:
            say(f"{name} leads now, in term {seen.term}")

    _change(data_dir, config, ask)


@app.command("snapshot")
def snapshot(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Make a snapshot of the agreed state on this node, and drop the log that it replaces."""

    async def ask(client: "LocalClient") -> None:
        index = await _agreed(client, client.snapshot)
        if as_json:
            say_json({"index": index})
        else:
            say(f"the newest snapshot here has everything up to index {index}")

    _change(data_dir, config, ask)


@app.command("rotate-key")
def rotate_key(
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also if some members are away, and will need a new ticket then."
        ),
    ] = False,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Give the swarm a new key. Every member takes it over within seconds; old tickets end."""

    async def ask(client: "LocalClient") -> None:
        away = await _agreed(client, lambda: client.rotate_swarm_key(force=force))
        if as_json:
            say_json({"away": away})
            return
        say("the swarm has a new key; tickets made before are worth nothing")
        say("the nodes take it over in a few seconds and connect anew; pulls then go on")
        for each in away:
            say(f"away, needs a new ticket to come back: {each}")

    _change(data_dir, config, ask)


@app.command("set-clock")
def set_clock(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Have the cluster take this node's clock for the time, after one that was wrong drove it
    ahead. Withdraws all tickets.
    """
    from datetime import UTC, datetime

    async def ask(client: "LocalClient") -> None:
        clock = await _agreed(client, client.set_clock)
        if as_json:
            say_json({"clock": clock})
            return
        say(
            f"the cluster's clock reads {datetime.fromtimestamp(clock, UTC):%Y-%m-%dT%H:%M:%SZ} now"
        )
        say("all tickets are withdrawn; `omx invite` makes new ones")

    _change(data_dir, config, ask)


@app.command("set")
def set_setting(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)] = "",
    value: Annotated[str, typer.Argument(metavar="VALUE", show_default=False)] = "",
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Change a setting that the whole cluster shares; without KEY and VALUE, list them all."""
    if bool(key) != bool(value):
        raise typer.BadParameter("give KEY and VALUE, or neither to list the settings")

    async def ask(client: "LocalClient") -> None:
        if key:
            await _agreed(client, lambda: client.set_cluster_setting(key, value))
        settings = (await _now(client)).settings
        if as_json:
            say_json({"settings": settings})
        elif key:
            say(f"{key} = {_setting_text(settings[key])}")
        else:
            rows = [[name, _setting_text(each)] for name, each in settings.items()]
            say(table(["SETTING", "VALUE"], rows))

    _change(data_dir, config, ask)


# -- how a change is asked for -----------------------------------------------------------------


def _change(
    data_dir: str | None,
    config: str | None,
    ask: Callable[["LocalClient"], Awaitable[None]],
) -> None:
    from omx_cli.running import with_node

    flags = node_flags(data_dir=data_dir)
    with_node(flags, config, ask, timeout_s=math.inf, interrupted=INTERRUPTED)


async def _agreed(client: "LocalClient", work: Callable[[], Awaitable[T]]) -> T:
    from omx_cli.running import in_time

    return await in_time(client, work, AGREE_TIMEOUT_S)


async def _now(client: "LocalClient") -> "ClusterStatus":
    from omx_cli.running import in_time

    return await in_time(client, client.cluster_status)


async def _find(client: "LocalClient", text: str) -> "tuple[ClusterStatus, ClusterMember]":
    seen = await _now(client)
    return seen, find_member(seen.members, text)


def find_member(members: "Sequence[ClusterMember]", text: str) -> "ClusterMember":
    """The member that is meant: by its name or peer id, a beginning of either, or its peer id as
    tables show it (`12D3KooW…x6nXTN`). Raises BadInput if several fit, NotFound if none does.
    """
    from ollamamax_p2p.errors import BadInput, NotFound

    begin, _, end = text.partition("…")
    exact = [each for each in members if text in (each.peer_id, each.name)]
    begun = [
        each
        for each in members
        if (each.peer_id.startswith(begin) and each.peer_id.endswith(end))
        or each.name.startswith(text)
    ]
    found = (exact or begun) if text else []
    if len(found) > 1:
        ids = ", ".join(each.peer_id for each in found[:5])
        raise BadInput(f"{text!r} fits {len(found)} members; give more of the peer id: {ids}")
    if not found:
        raise NotFound(f"no member is called {text!r}; `omx cluster members` lists them all")
    return found[0]


async def give_role(
    client: "LocalClient",
    text: str,
    role: Literal["voter", "learner"],
    no_wait: bool,
    as_json: bool,
) -> None:
    """Have a role agreed on, and wait until it is in force unless `no_wait`. Raises BadInput,
    NotFound, NetworkTrouble if that is not agreed, or does not come true in time.
    """
    import trio

    begun = trio.current_time()
    seen, found = await _find(client, text)
    await _agreed(client, lambda: client.set_role(found.peer_id, role))
    name = name_of(seen, found.peer_id)
    if not no_wait:
        if not as_json and not _has_role(seen, found.peer_id, role):
            tell(f"agreed; {_what_comes(seen, name, role)} …")
        wait_s = IN_FORCE_S + (seen.settings["stability_s"] if role == "voter" else 0)
        seen = await _look_until(client, lambda now: _has_role(now, found.peer_id, role), wait_s)
    in_force = _has_role(seen, found.peer_id, role)
    if as_json:
        say_json({"peer_id": found.peer_id, "wish": role, "in_force": in_force})
    elif in_force:
        took = trio.current_time() - begun
        what = "votes" if role == "voter" else "has no vote"
        say(f"{name} {what} (after {took:.0f} s); {voters_text(seen)}")
    elif no_wait:
        say(f"agreed: {name} is to be a {role}; `omx cluster status` shows when it is")
    if not in_force and not no_wait:
        raise _not_yet(seen, found.peer_id, role)


def _has_role(seen: "ClusterStatus", peer: str, role: str) -> bool:
    roles = {each.peer_id: each.role for each in seen.members}
    return roles.get(peer) in (("voter", "leader") if role == "voter" else ("learner",))


def _what_comes(seen: "ClusterStatus", name: str, role: str) -> str:
    if role == "learner":
        return f"the others take {name}'s vote in a moment"
    return f"{name} votes once it has kept up for {seen.settings['stability_s']} s"


def _not_yet(seen: "ClusterStatus", peer: str, role: str) -> Exception:
    """Why what is agreed has not come true."""
    from ollamamax_p2p.errors import NetworkTrouble

    name = name_of(seen, peer)
    member = next((each for each in seen.members if each.peer_id == peer), None)
    if member is None:
        return NetworkTrouble(f"{name} is a member no more")
    if not seen.has_quorum:
        why = "too few voters answer (`omx cluster status`)"
    elif role == "learner":
        why = "somebody must vote, and nobody else may now; promote another, or let others join"
    elif member.last_contact_s is None or member.last_contact_s > ANSWERS_S:
        why = f"{name} does not answer; it will vote once it is back and has kept up"
    else:
        most = seen.settings["voters_max"]
        why = (
            f"voters are an odd number and at most {most}, and now {len(voters_of(seen))}; it will "
            "vote when there is room (`omx cluster set voters_max`, or demote another)"
        )
    return NetworkTrouble(f"it is agreed that {name} is to be a {role}, but not so yet: {why}")


async def _look_until(
    client: "LocalClient", is_so: Callable[["ClusterStatus"], bool], timeout_s: float
) -> "ClusterStatus":
    """The cluster as soon as that is so; as it is by then, if it does not come true in time."""
    import trio

    seen = await _now(client)
    with trio.move_on_after(timeout_s):
        while not is_so(seen):
            await trio.sleep(LOOK_S)
            seen = await _now(client)
    return seen


def _setting_text(value: int | bool) -> str:
    return str(value).lower()

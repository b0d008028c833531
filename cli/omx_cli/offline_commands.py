"""omx cluster recover | wal check: on a node's data folder, without the node."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import fields, human_bytes, say, say_json, tell

if TYPE_CHECKING:
    from ollamamax_p2p import LogReport, RecoveryPlan

wal = typer.Typer(help="Look at this node's Raft log.", no_args_is_help=True, rich_markup_mode=None)


@wal.command("check")
def wal_check(
    log: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A log somewhere else, such as a copy."),
    ] = None,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Read the Raft log and say what is in it. Changes nothing, also while the node runs.

    Exit code 0: a node can start with it. 4: it is damaged.
    """
    from ollamamax_p2p import check_raft_log
    from omx_cli.exit_codes import LOCAL
    from omx_cli.running import load

    settings = load(node_flags(data_dir=data_dir), config)
    report = check_raft_log(settings, Path(log) if log else None)
    if as_json:
        say_json(report)
    else:
        _say_log(report)
    if not report.ok:
        raise typer.Exit(LOCAL)


def _say_log(report: "LogReport") -> None:
    used = sum(segment.used_bytes for segment in report.segments)
    last = max(report.last_index, report.snapshot_index)
    entries = f"{report.first_index:,} to {report.last_index:,}" if report.last_index else "none"
    rows = [
        ("log", report.folder),
        ("last entry", f"{last:,}, of term {report.last_term:,}"),
        ("agreed on", f"up to {report.commit:,} at least"),
        ("snapshot", f"up to {report.snapshot_index:,}" if report.snapshot_index else "none"),
        ("entries", entries),
        ("files", f"{len(report.segments)}, {human_bytes(used)} used"),
    ]
    say(_verdict(report))
    say(fields(rows))
    for finding in report.damage:
        say()
        say(f"{finding.file}, byte {finding.offset:,}: {finding.problem}")
        say(f"  entries up to {finding.last_index:,} are before it and can be read")
        say(f"  {finding.advice}")


def _verdict(report: "LogReport") -> str:
    if not report.ok:
        return "damaged: something that was acknowledged cannot be read back"
    if report.torn_bytes and report.in_use:
        return "ok: a node is writing to it"
    if report.torn_bytes:
        return (
            f"ok: a crash left {report.torn_bytes:,} bytes of a write unfinished at byte "
            f"{report.torn_at:,} of {report.segments[-1].file}; the next start drops them, and "
            "nothing in them was acknowledged"
        )
    return "ok: a node runs on it" if report.in_use else "ok"


def recover(
    discard_other_voters: Annotated[
        bool,
        typer.Option(
            "--unsafe-discard-other-voters",
            help="Yes, they are lost for good, and whatever they had agreed on without this node.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Make this node the only voter of its cluster, when most voters are lost for good.

    For a node that is stopped. See docs/runbooks/lost-quorum.md before.
    """
    from ollamamax_p2p import prepare_recovery
    from omx_cli.running import Interrupted, load

    if not discard_other_voters:
        raise typer.BadParameter(
            "this loses what the other voters had agreed on without this node; if they are lost "
            "for good, say --unsafe-discard-other-voters"
        )
    if not yes and (as_json or not sys.stdin.isatty()):
        raise typer.BadParameter("nobody can be asked here; --yes says that you are sure")
    settings = load(node_flags(data_dir=data_dir), config)
    with prepare_recovery(settings) as recovery:
        if not as_json:
            tell(_warning(recovery.plan))
        if not yes and not typer.confirm("Recover?", err=True):
            raise Interrupted("nothing was changed")
        recovery.carry_out()
    if as_json:
        say_json(recovery.plan)
    else:
        say("recovered: this node is the only voter now; start it with `omx up`")


def _warning(plan: "RecoveryPlan") -> str:
    """What will be, and what may be lost."""
    lines = [
        f"{plan.name} ({plan.peer_id}) becomes the only voter of its cluster.",
        f"What it has is kept: entries up to {plan.last_index:,}, of term {plan.last_term:,}.",
        "What the other voters had agreed on without it is lost; this node cannot know how much.",
    ]
    if not plan.voted:
        lines.append("It had no vote, so it may lack more than a voter would.")
    if plan.unconfirmed:
        lines.append(
            f"Its last {plan.unconfirmed:,} entries may never have been agreed on; they count as "
            "agreed from now on."
        )
    if plan.tickets:
        lines.append(f"Tickets that could still be used: {plan.tickets:,}; all are withdrawn.")
    for member in plan.expelled:
        lines.append(f"Expelled: {member.name} ({member.peer_id})")
    if plan.expelled:
        lines.append(
            "Never start those again as they are: two of them could go on as the old cluster. If "
            "one turns up, `omx leave --force` there, then join with a new ticket."
        )
    for member in plan.learners:
        lines.append(f"Stays a member: {member.name} ({member.peer_id})")
    return "\n".join(lines)

"""What people are shown of a cluster: pure functions from a ClusterStatus to lines."""

import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from omx_cli.output import duration, fields, fitting_table, short_peer

if TYPE_CHECKING:
    from ollamamax_p2p import ClusterMember, ClusterStatus

ANSWERS_S = 3.0
"""Who was heard of within this answers now: three times the longest election timeout."""

MEMBER_LINES_MAX = 12
"""In `omx status`, which has more to tell."""

RUNBOOK = "docs/runbooks/lost-quorum.md"

_COUNTS = ("none", "one", "two", "three", "four")


def status_text(status: "ClusterStatus", connected: Collection[str], columns: int) -> str:
    """`omx cluster status`. connected: peer ids; columns: of the terminal."""
    lines = [textwrap.fill(quorum_text(status, connected), columns), "", fields(_rows(status))]
    if status.members:
        lines += ["", _health_table(status, connected, columns)]
    return "\n".join(lines)


def quorum_text(status: "ClusterStatus", connected: Collection[str] = ()) -> str:
    """Whether something can be agreed on, and how many more failures that outlives."""
    if status.role == "removed":
        return (
            "REMOVED: this node is a member of the cluster no more; `omx leave`, then join with a "
            "new ticket if it is to come back"
        )
    voters = voters_of(status)
    count = len(voters)
    if not status.has_quorum:
        return _no_quorum_text(status, connected)
    if not count:
        return "this node has just joined and is still learning what the cluster agreed on"
    if any(each.last_contact_s is None and each.role != "leader" for each in voters) and all(
        each.lag is None for each in voters if each.role != "leader"
    ):
        return f"quorum: there is a leader; it has not said how many of {_voters(count)} answer"
    answering = len([each for each in voters if _answers(each)])
    spare = max(answering - (count // 2 + 1), 0)
    text = f"quorum: {answering} of {_voters(count)} "
    text += "answers" if answering == 1 else "answer"
    text += f"; {_COUNTS[min(spare, 4)]} may fail"
    return text + (", with a third member one may" if len(status.members) == 2 else "")


def _no_quorum_text(status: "ClusterStatus", connected: Collection[str]) -> str:
    what_goes_on = (
        f"nothing new can be agreed on; reads and transfers go on; see {RUNBOOK} if this lasts"
    )
    if status.last_contact_s is None and not status.members:
        return "NO QUORUM yet: this node has just joined and has not heard of a leader"
    voters = voters_of(status)
    here = len([each for each in voters if each.peer_id in (*connected, status.peer_id)])
    needed = len(voters) // 2 + 1
    seen = f"from here {here} of {_voters(len(voters))} can be reached, {needed} must answer"
    if here >= needed:
        seen += ", and they have no leader yet"
    return f"NO QUORUM: {what_goes_on} ({seen})"


def cluster_line(status: "ClusterStatus") -> str:
    """`omx status`, its one line about the cluster."""
    if status.role == "removed":
        return "REMOVED from it; `omx leave`, then join again"
    if not status.has_quorum:
        return "NO QUORUM; `omx cluster status` says more"
    voters = voters_of(status)
    quorum = quorum_text(status).removeprefix("quorum: ").partition(";")[0]
    leads = f"{name_of(status, status.leader)} leads, term {status.term}"
    return f"{leads}, {quorum}" if voters else leads


def member_lines(status: "ClusterStatus") -> list[str]:
    """`omx status`, a line for each member: how it takes part, how far it is, when it was heard."""
    shown = status.members[:MEMBER_LINES_MAX]
    lines = [
        f"{name_of(status, each.peer_id)}: {_role(each)}, lag {_lag(each, status)}, "
        f"last contact {_contact(each, status, ())}"
        for each in shown
    ]
    rest = len(status.members) - len(shown)
    return [*lines, f"and {rest} more: `omx cluster status`"] if rest else lines


def voters_of(status: "ClusterStatus") -> list["ClusterMember"]:
    """Whose votes count now."""
    return [each for each in status.members if each.role in ("leader", "voter")]


def voters_text(status: "ClusterStatus") -> str:
    """`voters now: alice, bob, carol`."""
    return "voters now: " + ", ".join(each.name for each in voters_of(status))


def name_of(status: "ClusterStatus", peer: str) -> str:
    """A member's name, with its id where several have that name."""
    names = {each.peer_id: each.name for each in status.members}
    name = names.get(peer, "")
    if not name:
        return short_peer(peer)
    is_only = list(names.values()).count(name) == 1
    return name if is_only else f"{name} ({_short_ids(status.members)[peer]})"


def members_table(status: "ClusterStatus", columns: int) -> str:
    """`omx cluster members`: who they are; how they are is in `omx cluster status`."""
    rows = [
        [
            each.name,
            _role(each),
            _vote(each),
            each.region or "-",
            each.peer_id,
            each.addresses[0].partition("/p2p/")[0] if each.addresses else "-",
        ]
        for each in status.members
    ]
    head = ["NAME", "ROLE", "VOTE", "REGION", "PEER", "ADDRESS"]
    return fitting_table(head, rows, columns, ["ADDRESS", "REGION", "VOTE"])


def _rows(status: "ClusterStatus") -> list[tuple[str, str]]:
    name = name_of(status, status.peer_id)
    leader = name_of(status, status.leader) if status.leader else "nobody is known to lead"
    if status.leader == status.peer_id:
        leader += " (this node)"
    heard_what = "majority heard" if status.role == "leader" else "leader heard"
    kept = f"kept from {status.log_first} to {status.log_last}"
    behind = f", snapshot at {status.snapshot}" if status.snapshot else ""
    rows = [
        ("this node", f"{name}, {status.role}"),
        ("leader", leader),
        ("term", str(status.term)),
        (heard_what, _ago(status.last_contact_s)),
        ("committed", f"{status.committed}, applied {status.applied}"),
        ("log", kept + behind),
        ("state", f"{status.state_hash[:12]} at {status.state_index}"),
        ("tickets", f"{status.tickets} still good"),
        ("swarm key", f"generation {status.swarm_key_generation}"),
        ("change", "the voters or members are being changed"),
        ("TROUBLE", status.trouble),
    ]
    left_out = {
        "change": not status.changing,
        "TROUBLE": not status.trouble,
        "swarm key": not status.swarm_key_generation,
    }
    return [(key, value) for key, value in rows if not left_out.get(key)]


def _health_table(status: "ClusterStatus", connected: Collection[str], columns: int) -> str:
    ids = _short_ids(status.members)
    rows = [
        [
            each.name,
            ids[each.peer_id],
            _role(each),
            each.region or "-",
            _lag(each, status),
            _contact(each, status, connected),
        ]
        for each in status.members
    ]
    head = ["NAME", "PEER", "ROLE", "REGION", "LAG", "LAST CONTACT"]
    return fitting_table(head, rows, columns, ["REGION", "PEER", "LAG"])


def _role(member: "ClusterMember") -> str:
    """With what it is to become, where that is something else."""
    has_vote = member.role in ("leader", "voter")
    if member.wish == "auto" or (member.wish == "voter") == has_vote:
        return member.role
    return f"{member.role}, to be {member.wish}"


def _vote(member: "ClusterMember") -> str:
    if member.wish != "auto":
        return "told to" if member.wish == "voter" else "told not to"
    return "may" if member.may_vote else "may not"


def _lag(member: "ClusterMember", status: "ClusterStatus") -> str:
    """What the leader does not know of a member that it has not heard of, it takes for all."""
    is_known = member.role == "leader" or member.last_contact_s is not None
    return str(member.lag) if is_known and status.has_quorum else "-"


def _contact(member: "ClusterMember", status: "ClusterStatus", connected: Collection[str]) -> str:
    """When the leader heard of it; where no leader says so, whether it is connected here."""
    if status.has_quorum and member.role == "leader":
        return "-"
    if status.has_quorum and member.lag is not None:
        return _ago(member.last_contact_s)
    if member.peer_id == status.peer_id:
        return "this node"
    return "connected here" if member.peer_id in connected else "not connected"


def _answers(member: "ClusterMember") -> bool:
    return member.last_contact_s is not None and member.last_contact_s <= ANSWERS_S


def _voters(count: int) -> str:
    return "1 voter" if count == 1 else f"{count} voters"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return f"{seconds:.1f} s ago" if seconds < 10 else f"{duration(seconds)} ago"


def _short_ids(members: "Sequence[ClusterMember]") -> dict[str, str]:
    """Every member's peer id, as short as it can be and still be told from the others."""
    ids = [each.peer_id for each in members]
    short = {peer: short_peer(peer) for peer in ids}
    tail = 6
    while len(set(short.values())) < len(set(ids)) and tail < 52:
        tail += 4
        short = {peer: short_peer(peer, tail) for peer in ids}
    return short

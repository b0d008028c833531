"""AgreedMembers: a member gate whose cluster agrees in no time; for networks without Raft.

The rules are the real ones (`cluster.core.rules`), over tables in RAM. All nodes of a simulated
swarm share one, as if each had applied everything.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from ollamamax_p2p.cluster import printable_name
from ollamamax_p2p.cluster.core.commands import (
    VOTES,
    AdmitMember,
    AnyCommand,
    Done,
    FoundCluster,
    IssueTicket,
    RedeemTicket,
    Refused,
    RemoveMember,
    Result,
    WithdrawTickets,
    encode_command,
)
from ollamamax_p2p.cluster.core.rows import Member, Row
from ollamamax_p2p.cluster.core.rules import Place, carry_out
from ollamamax_p2p.consensus.core.messages import ConfState
from ollamamax_p2p.host import ROSTER_MAX, Admission
from ollamamax_p2p.identity import PeerId, Ticket


class RamTables:
    """`cluster.core.rows.Tables` as plain dictionaries."""

    def __init__(self) -> None:
        self.rows: dict[type[Row], dict[str, Row]] = {}

    def get(self, kind: type[Row], key: str) -> Any:
        """The row, or None."""
        return self.rows.get(kind, {}).get(key)

    def put(self, key: str, row: Row) -> None:
        """Add or replace it."""
        self.rows.setdefault(type(row), {})[key] = row

    def delete(self, kind: type[Row], key: str) -> None:
        """Whether it is there or not."""
        self.rows.get(kind, {}).pop(key, None)

    def count(self, kind: type[Row]) -> int:
        """How many there are of a kind."""
        return len(self.rows.get(kind, {}))

    def items(self, kind: type[Row], prefix: str = "") -> list[tuple[str, Any]]:
        """Ascending by key."""
        rows = self.rows.get(kind, {})
        return [(key, rows[key]) for key in sorted(rows) if key.startswith(prefix)]


class AgreedMembers:
    """Who is a member, for every node that is given this gate."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        """wall_clock: Unix seconds, for tickets."""
        self._wall_clock = wall_clock
        self._tables = RamTables()
        self._index = 1

    def add(self, peer: PeerId) -> None:
        """Make it a member, as if it had come by a ticket."""
        if self._tables.count(Member):
            self._do(AdmitMember(peer=peer, name="node"))
        else:
            self._do(FoundCluster(swarm_id=bytes(16), swarm_key=None, peer=peer, name="founder"))

    def remove(self, peer: PeerId) -> None:
        """Let it in no more."""
        self._do(RemoveMember(peer=peer))

    def issue(self, ticket: Ticket, *, uses: int) -> None:
        """Honour the ticket from now on."""
        self._do(
            IssueTicket(
                secret_hash=_hash(ticket.secret),
                uses=uses,
                expires_at=ticket.expires_at,
                issued_at=int(self._wall_clock()),
            )
        )

    def withdraw_tickets(self) -> int:
        """Honour none any more; gives how many could still be used."""
        return self._do(WithdrawTickets()).number

    def is_member(self, peer: PeerId) -> bool:
        """See MemberGate."""
        return self._tables.get(Member, peer) is not None

    async def redeem(self, secret: bytes, peer: PeerId, name: str) -> Admission:
        """See MemberGate."""
        command = RedeemTicket(
            secret_hash=_hash(secret),
            peer=peer,
            now=int(self._wall_clock()),
            name=printable_name(name),
        )
        done = self._do(command)
        members = [(PeerId(key), row.raft_id) for key, row in self._tables.items(Member)]
        roster = tuple(line for line in members if line[0] != peer)[:ROSTER_MAX]
        return Admission(done.number, roster, votes=done.text == VOTES)

    def _do(self, command: AnyCommand) -> Done:
        self._index += 1
        place = Place(self._index, ConfState(voters=(1,)))
        result: Result = carry_out(encode_command(command), place, self._tables)
        if isinstance(result, Refused):
            raise result.error()
        return result


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()

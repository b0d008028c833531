"""What every MemberGate must do: the cluster's own, and the one for networks without Raft."""

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

import pytest
import trio

from ollamamax_p2p.errors import TicketExpired, TicketUnknown, TicketUsedUp
from ollamamax_p2p.host import Admission, MemberGate
from ollamamax_p2p.identity import PeerId, Ticket, peer_id_of
from ollamamax_p2p.testing.agreed_members import AgreedMembers
from tests.cluster.whole_clusters import Machines, open_machines

ONE, TWO, THREE = (peer_id_of(bytes([number] * 32)) for number in (1, 2, 3))
STARTS_AT = 1_800_000_000
LIFETIME_S = 100


def wall_clock() -> float:
    return STARTS_AT + trio.current_time()


class Gate(Protocol):
    """A gate and what makes it move."""

    gate: MemberGate

    async def issue(self, secret: bytes, *, uses: int) -> None:
        """Honour a ticket for LIFETIME_S from now."""

    async def remove(self, peer: PeerId) -> None:
        """Let it in no more."""


class InRam:
    """`AgreedMembers`."""

    def __init__(self) -> None:
        self.gate = AgreedMembers(wall_clock)
        self.gate.add(THREE)

    async def issue(self, secret: bytes, *, uses: int) -> None:
        ticket = Ticket(bytes(16), (), secret, int(wall_clock()) + LIFETIME_S, None)
        self.gate.issue(ticket, uses=uses)

    async def remove(self, peer: PeerId) -> None:
        self.gate.remove(peer)


class OfACluster:
    """`Cluster`, of one machine."""

    def __init__(self, machines: Machines) -> None:
        self.gate = machines[0].up

    async def issue(self, secret: bytes, *, uses: int) -> None:
        expires_at = int(wall_clock()) + LIFETIME_S
        await self.gate.issue_ticket(secret, uses=uses, expires_at=expires_at)

    async def remove(self, peer: PeerId) -> None:
        await self.gate.remove(peer)


@asynccontextmanager
async def in_ram() -> AsyncIterator[Gate]:
    yield InRam()


@asynccontextmanager
async def of_a_cluster() -> AsyncIterator[Gate]:
    with tempfile.TemporaryDirectory() as folder:
        async with open_machines(Path(folder)) as machines:
            yield OfACluster(machines)


Open = Callable[[], AbstractAsyncContextManager[Gate]]


@pytest.fixture(params=[in_ram, of_a_cluster])
def open_gate(request) -> Open:
    return request.param


SECRET, OTHER = b"s" * 16, b"o" * 16


async def test_a_ticket_makes_a_member_of_who_had_none(autojump_clock, repeatable, open_gate):
    async with open_gate() as each:
        assert not each.gate.is_member(ONE)
        await each.issue(SECRET, uses=1)
        admission = await each.gate.redeem(SECRET, ONE, "one")
        assert each.gate.is_member(ONE)
        assert admission.raft_id > 0
        assert not admission.votes
        assert admission.roster
        assert ONE not in dict(admission.roster)


async def test_each_newcomer_has_an_id_of_its_own_and_learns_of_those_before(
    autojump_clock, repeatable, open_gate
):
    async with open_gate() as each:
        await each.issue(SECRET, uses=2)
        first = await each.gate.redeem(SECRET, ONE, "one")
        second = await each.gate.redeem(SECRET, TWO, "two")
        assert first.raft_id != second.raft_id
        assert dict(second.roster)[ONE] == first.raft_id


async def test_a_ticket_is_used_as_often_as_it_says_and_by_its_user_again(
    autojump_clock, repeatable, open_gate
):
    async with open_gate() as each:
        await each.issue(SECRET, uses=1)
        await each.gate.redeem(SECRET, ONE, "one")
        with pytest.raises(TicketUsedUp):
            await each.gate.redeem(SECRET, TWO, "two")
        assert not each.gate.is_member(TWO)
        again = await each.gate.redeem(SECRET, ONE, "one")
        assert isinstance(again, Admission)


async def test_an_unknown_ticket_is_unknown_and_an_expired_one_says_so(
    autojump_clock, repeatable, open_gate
):
    async with open_gate() as each:
        await each.issue(SECRET, uses=1)
        with pytest.raises(TicketUnknown):
            await each.gate.redeem(OTHER, ONE, "one")
        await trio.sleep(LIFETIME_S + 1)
        with pytest.raises(TicketExpired):
            await each.gate.redeem(SECRET, ONE, "one")
        assert not each.gate.is_member(ONE)


async def test_who_is_removed_is_no_member_and_comes_back_as_somebody_else(
    autojump_clock, repeatable, open_gate
):
    async with open_gate() as each:
        await each.issue(SECRET, uses=2)
        before = await each.gate.redeem(SECRET, ONE, "one")
        await each.remove(ONE)
        assert not each.gate.is_member(ONE)
        after = await each.gate.redeem(SECRET, ONE, "one")
        assert after.raft_id > before.raft_id


@pytest.mark.parametrize("name", ["", "\x1b[2J", "x" * 500, "büro"])
async def test_any_name_is_taken_and_made_printable(autojump_clock, repeatable, open_gate, name):
    async with open_gate() as each:
        await each.issue(SECRET, uses=1)
        await each.gate.redeem(SECRET, ONE, name)
        assert each.gate.is_member(ONE)

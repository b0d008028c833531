"""Who is let in, who is thrown out, who is noticed: on the simulated network and its clock."""

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import trio

from ollamamax_p2p.errors import (
    BadInput,
    NetworkTrouble,
    NotAdmitted,
    OmxError,
    PeerGone,
    PeerMisbehaved,
    PeerNotFound,
    PeerUnreachable,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.host import (
    ByteStream,
    ClosedGate,
    Connections,
    HostSettings,
    LinkConditions,
    MessageStream,
    SimulatedHost,
    SimulatedNetwork,
    open_connections,
    open_simulated_network,
)
from ollamamax_p2p.host.connections import backoff_s
from ollamamax_p2p.host.join_messages import (
    FromAnswerer,
    FromDialler,
    Hello,
    Ping,
    Pong,
    Redeem,
    Refused,
    Welcome,
    answerer_codec,
    dialler_codec,
)
from ollamamax_p2p.identity import Address, Membership, PeerId, Ticket
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.testing.agreed_members import AgreedMembers
from ollamamax_p2p.wire import protocol_ids

SETTINGS = HostSettings()
START = 1_800_000_000.0
"""Unix time when a test's virtual clock reads its first second."""


@dataclass
class Node:
    """A host with its connections, as a swarm's node has them."""

    host: SimulatedHost
    links: Connections
    membership: Membership | None
    feed: EventFeed
    heard: list[Address]

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    def linked_to(self) -> set[PeerId]:
        return {status.peer for status in self.links.peers()}


class Swarm:
    """Nodes on one network; the first to be added founds the swarm."""

    def __init__(self, network: SimulatedNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self._nursery = nursery
        self.started_at = trio.current_time()
        self.clock_offset_s = 0.0
        self.members = AgreedMembers(self.wall_clock)

    def wall_clock(self) -> float:
        return START + self.clock_offset_s + trio.current_time() - self.started_at

    async def add(
        self,
        name: str,
        membership: Membership | None,
        *,
        settings: HostSettings = SETTINGS,
        gate: AgreedMembers | None = None,
    ) -> Node:
        """With a membership the node is a member already, of the gate that it is given."""
        host = self.network.add_host(name)
        gate = gate or self.members
        if membership is not None:
            gate.add(host.peer_id)
        node: Node = await self._nursery.start(self._run, name, host, membership, settings, gate)
        return node

    async def _run(self, name, host, membership, settings, gate, task_status) -> None:
        """In a task of its own, as nodes end in any order."""
        feed = EventFeed()
        heard: list[Address] = []
        async with open_connections(
            host,
            membership,
            settings,
            rng=random.Random(name),
            feed=feed,
            agent=f"omx test {name}",
            wall_clock=self.wall_clock,
            on_addresses=heard.extend,
            gate=gate,
        ) as links:
            task_status.started(Node(host, links, membership, feed, heard))
            await trio.sleep_forever()

    async def stranger(self, name: str = "stranger") -> SimulatedHost:
        """A host with no software of ours on it."""
        return self.network.add_host(name)

    def issue(self, node: Node, *, uses: int = 1, lifetime_s: int = 3600) -> Ticket:
        assert node.membership is not None
        ticket = node.membership.new_ticket(
            node.host.addresses, uses=uses, lifetime_s=lifetime_s, now=self.wall_clock()
        )
        self.members.issue(ticket, uses=uses)
        return ticket


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with (
        open_simulated_network(rng=random.Random(1)) as network,
        trio.open_nursery() as nursery,
    ):
        yield Swarm(network, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
def members() -> Callable[[], Membership]:
    """The same swarm for each node, as if each had redeemed a ticket."""
    founder = Membership.create(None)
    ticket = Ticket(founder.swarm_id, (), bytes(16), 0, founder.swarm_key)
    return lambda: Membership.join(None, ticket)


async def talk_as(host: SimulatedHost, peer: PeerId) -> MessageStream[FromDialler, FromAnswerer]:
    stream = await host.open_stream(peer, protocol_ids.JOIN)
    return MessageStream(stream, sends=dialler_codec, receives=answerer_codec)


def hello(membership: Membership) -> Hello:
    return Hello(swarm_id=membership.swarm_id, agent="x", addresses=[])


async def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait in virtual time."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - it costs no real time
            await trio.sleep(0.01)


async def test_members_that_meet_admit_each_other(autojump_clock, swarm, members):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    assert await one.links.reach(two.host.addresses) == two.peer
    await until(lambda: two.linked_to() == {one.peer})
    assert one.linked_to() == {two.peer}
    assert one.host.is_admitted(two.peer)
    assert two.host.is_admitted(one.peer)
    (status,) = one.links.peers()
    assert status.agent == "omx test two"
    assert status.addresses == two.host.addresses
    assert not status.inbound
    assert two.links.peers()[0].inbound


async def test_a_long_agent_is_cut_not_refused(autojump_clock, swarm, members):
    one = await swarm.add("é" * 300, members())
    two = await swarm.add("two", members())
    await two.links.reach(one.host.addresses)
    assert len(two.links.peers()[0].agent) == 128


async def test_the_round_trip_is_measured(autojump_clock, swarm, members):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    await one.links.reach(two.host.addresses)
    await trio.sleep(5)
    for node in (one, two):
        rtt_s = node.links.peers()[0].rtt_s
        assert rtt_s is not None
        assert 0.0009 < rtt_s < 0.003


async def test_a_ticket_makes_a_stranger_a_member_and_tells_it_of_the_others(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    ticket = swarm.issue(founder, uses=2)
    second = await swarm.add("second", None)
    redeemed = await second.links.redeem(ticket)
    assert redeemed.issuer == founder.peer
    second.links.adopt(Membership.join(None, ticket))
    await second.links.reach(redeemed.peers)
    await until(lambda: founder.linked_to() == {second.peer})

    third = await swarm.add("third", None)
    redeemed = await third.links.redeem(ticket)
    assert second.host.addresses[0] in redeemed.peers
    third.links.adopt(Membership.join(None, ticket))
    await third.links.reach(founder.host.addresses)
    assert second.host.addresses[0] in third.heard
    await third.links.reach_peer(second.peer)
    assert third.linked_to() == {founder.peer, second.peer}


async def refused_ticket(swarm: Swarm, ticket: Ticket, name: str = "late") -> OmxError:
    node = await swarm.add(name, None)
    with pytest.raises(OmxError) as caught:
        await node.links.redeem(ticket)
    await until(lambda: not node.host.connections(), within_s=5)
    return caught.value


async def test_an_expired_ticket_says_so(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    ticket = swarm.issue(founder, lifetime_s=60)
    await trio.sleep(61)
    error = await refused_ticket(swarm, ticket)
    assert isinstance(error, TicketExpired)
    assert "2027-01-15T08:01:00Z" in str(error)


async def test_a_clock_set_back_revives_no_ticket(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    ticket = swarm.issue(founder, lifetime_s=60)
    await trio.sleep(61)
    await refused_ticket(swarm, ticket, "late")
    swarm.clock_offset_s = -61
    assert isinstance(await refused_ticket(swarm, ticket, "later"), TicketExpired)


async def test_a_used_up_ticket_says_so_but_not_to_the_one_that_used_it(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    ticket = swarm.issue(founder, uses=1)
    first = await swarm.add("first", None)
    await first.links.redeem(ticket)
    error = await refused_ticket(swarm, ticket)
    assert isinstance(error, TicketUsedUp)
    assert "1 of 1" in str(error)
    again = await first.links.redeem(ticket)
    assert (again.issuer, again.admission.votes) == (founder.peer, False)


async def test_a_withdrawn_ticket_is_unknown(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    ticket = swarm.issue(founder)
    assert swarm.members.withdraw_tickets() == 1
    assert isinstance(await refused_ticket(swarm, ticket), TicketUnknown)


async def test_a_ticket_of_another_swarm_is_unknown(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    other = Membership.create(None)
    ticket = other.new_ticket(founder.host.addresses, uses=1, lifetime_s=60, now=START)
    assert isinstance(await refused_ticket(swarm, ticket), TicketUnknown)


async def test_bad_tickets_beyond_a_few_are_not_explained_any_more(autojump_clock, swarm, caplog):
    founder = await swarm.add("founder", Membership.create(None))
    good = swarm.issue(founder)
    thief = await swarm.add("thief", None)
    for guess in range(5):
        with pytest.raises(TicketUnknown):
            await thief.links.redeem(replace(good, secret=guess.to_bytes(16, "big")))
    with pytest.raises(PeerUnreachable, match="too many tickets"):
        await thief.links.redeem(replace(good, secret=bytes([7] * 16)))
    assert caplog.text.count("refused a ticket") == 5
    await trio.sleep(61)
    with pytest.raises(TicketUnknown):
        await thief.links.redeem(replace(good, secret=bytes([7] * 16)))


async def test_a_good_ticket_is_honoured_however_many_bad_ones_are_shown(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    good = swarm.issue(founder, uses=2)
    for number in range(13):  # sixty bad tickets in a minute are as many as are explained to all
        thief = await swarm.add(f"thief {number}", None)
        for guess in range(5):
            with pytest.raises((TicketUnknown, PeerUnreachable)) as refused:
                await thief.links.redeem(replace(good, secret=guess.to_bytes(16, "big")))
    assert isinstance(refused.value, PeerUnreachable)  # there was no room any more
    honest = await swarm.add("honest", None)
    assert (await honest.links.redeem(good)).issuer == founder.peer
    assert (await thief.links.redeem(good)).issuer == founder.peer


async def test_right_after_a_refusal_the_same_node_may_try_again(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    good = swarm.issue(founder)
    newcomer = await swarm.add("newcomer", None)
    await newcomer.host.connect(founder.host.addresses)
    for guess in range(3):
        with pytest.raises(TicketUnknown):
            await newcomer.links.redeem(replace(good, secret=guess.to_bytes(16, "big")))
        assert newcomer.links._parting  # the refused connection is still being ended
    assert (await newcomer.links.redeem(good)).issuer == founder.peer
    assert not newcomer.links._parting


async def test_a_stranger_gets_nothing_and_is_thrown_out(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    stranger = await swarm.stranger()
    served = []

    async def serve(stream: ByteStream) -> None:
        served.append(stream.peer)

    member.host.set_handler("/omx/providers/1", serve)
    await stranger.connect(member.host.addresses)
    with pytest.raises(NotAdmitted):
        await stranger.open_stream(member.peer, "/omx/providers/1")
    await until(lambda: not stranger.connections(), within_s=11)
    assert not served
    assert not member.links.peers()


async def test_a_stranger_that_asks_gets_a_reason_and_no_address(autojump_clock, swarm, members):
    membership = members()
    member = await swarm.add("member", membership)
    stranger = await swarm.stranger()
    await stranger.connect(member.host.addresses)
    talk = await talk_as(stranger, member.peer)
    await talk.send(hello(membership))
    assert await talk.receive() == Refused(reason="not_a_member")
    await until(lambda: not stranger.connections(), within_s=3)


async def test_a_stranger_that_says_nothing_on_its_stream_is_thrown_out(
    autojump_clock, swarm, members
):
    member = await swarm.add("member", members())
    stranger = await swarm.stranger()
    await stranger.connect(member.host.addresses)
    await talk_as(stranger, member.peer)
    await until(lambda: not stranger.connections(), within_s=12)


async def test_a_member_of_another_swarm_is_refused_by_name(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    other = await swarm.add("other", Membership.create(None))  # that both lists name it, even
    with pytest.raises(NotAdmitted, match="another swarm"):
        await other.links.reach(member.host.addresses)
    await until(lambda: not member.host.connections(), within_s=3)


async def test_a_member_that_is_removed_is_thrown_out_and_stays_out(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    removed = await swarm.add("removed", members())
    await removed.links.reach(member.host.addresses)
    await until(lambda: member.linked_to() == {removed.peer})
    swarm.members.remove(removed.peer)
    member.links.expel(removed.peer)
    assert not member.links.peers()
    assert not member.host.is_admitted(removed.peer)
    await until(lambda: not removed.host.connections(), within_s=3)
    with pytest.raises(NotAdmitted, match="not proved that it is a member"):
        await removed.links.reach(member.host.addresses)
    assert not member.links.peers()


@pytest.mark.parametrize(
    "reason",
    [
        "not_a_member", "other_swarm", "full", "busy", "trouble", "no_quorum", "ticket_unknown",
        "ticket_expired", "ticket_used_up", "", "of a newer version",
    ],
)  # fmt: skip
async def test_whatever_a_member_answers_to_a_hello_ends_nothing_but_the_attempt(
    autojump_clock, swarm, members, reason
):
    member = await swarm.add("member", members())
    rude = await swarm.stranger("rude")
    swarm.members.add(rude.peer_id)
    asked = []

    async def refuse(stream: ByteStream) -> None:
        talk = MessageStream(stream, sends=answerer_codec, receives=dialler_codec)
        asked.append(await talk.receive())
        await talk.send(Refused(reason=reason, expires_at=1, uses=1))

    rude.set_handler(protocol_ids.JOIN, refuse, for_strangers=True)
    with pytest.raises((NetworkTrouble, PeerMisbehaved)):
        await member.links.reach(rude.addresses)
    member.links.keep(rude.addresses)
    await trio.sleep(10)
    assert len(asked) > 1
    other = await swarm.add("other", members())
    await other.links.reach(member.host.addresses)  # it lives
    assert other.linked_to() == {member.peer}


async def test_a_closed_gate_lets_nobody_in(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    ticket = swarm.issue(member)
    member.links._gate = ClosedGate()
    other = await swarm.add("other", members())
    with pytest.raises(NotAdmitted):
        await other.links.reach(member.host.addresses)
    with pytest.raises(PeerUnreachable, match="no member"):
        await member.links.reach(other.host.addresses)
    newcomer = await swarm.add("newcomer", None)
    with pytest.raises(TicketUnknown):
        await newcomer.links.redeem(ticket)


async def test_a_cluster_that_has_no_room_for_one_more_says_so(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None))
    ticket = swarm.issue(founder)

    async def no_room(secret, peer, name):
        raise BadInput("there are 10,000 members, the most there may be")

    swarm.members.redeem = no_room
    node = await swarm.add("node", None)
    with pytest.raises(PeerUnreachable, match="cannot save"):
        await node.links.redeem(ticket)


async def test_a_member_that_one_node_does_not_know_yet_is_let_in_once_it_does(
    autojump_clock, swarm, members
):
    """Agreement reaches nodes one after the other."""
    late = AgreedMembers(swarm.wall_clock)
    behind = await swarm.add("behind", members(), gate=late)
    newcomer = await swarm.add("newcomer", members())
    swarm.members.add(behind.peer)
    newcomer.links.keep(behind.host.addresses)
    await trio.sleep(5)
    assert not behind.links.peers()
    late.add(newcomer.peer)
    await until(lambda: behind.linked_to() == {newcomer.peer})


async def test_an_answerer_that_is_no_member_is_told_nothing(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    impostor = await swarm.stranger("impostor")
    asked = []

    async def welcome(stream: ByteStream) -> None:
        talk = MessageStream(stream, sends=answerer_codec, receives=dialler_codec)
        asked.append(await talk.receive())

    impostor.set_handler(protocol_ids.JOIN, welcome, for_strangers=True)
    with pytest.raises(PeerUnreachable, match="no member"):
        await member.links.reach(impostor.addresses)
    assert asked == []
    assert not member.host.is_admitted(impostor.peer_id)
    await until(lambda: not impostor.connections(), within_s=3)


@pytest.mark.parametrize(
    "nonsense", [b"\x00\x00\x00\x02\xff\xff", b"\xff\xff\xff\xff", b"\x00" * 4]
)
async def test_a_stranger_that_sends_nonsense_is_thrown_out_at_once(
    autojump_clock, swarm, members, nonsense
):
    member = await swarm.add("member", members())
    stranger = await swarm.stranger()
    await stranger.connect(member.host.addresses)
    stream = await stranger.open_stream(member.peer, protocol_ids.JOIN)
    await stream.send_all(nonsense)
    await until(lambda: not stranger.connections(), within_s=1)


async def test_a_first_message_out_of_turn_ends_the_connection(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    stranger = await swarm.stranger()
    await stranger.connect(member.host.addresses)
    talk = await talk_as(stranger, member.peer)
    await talk.send(Ping(nonce=1))
    await until(lambda: not stranger.connections(), within_s=1)


async def test_strangers_are_bounded_and_the_oldest_goes_first(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    strangers = [await swarm.stranger(f"stranger {number}") for number in range(130)]
    for stranger in strangers:
        await stranger.connect(member.host.addresses)
    await trio.sleep(0.1)
    assert [bool(stranger.connections()) for stranger in strangers] == [False] * 2 + [True] * 128


async def test_members_beyond_the_limit_are_told_that_it_is_full(autojump_clock, swarm, members):
    small = await swarm.add("small", members(), settings=replace(SETTINGS, connections_max=1))
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    await one.links.reach(small.host.addresses)
    await until(lambda: small.linked_to() == {one.peer})
    with pytest.raises(PeerUnreachable, match="as many connections as it takes"):
        await two.links.reach(small.host.addresses)
    assert small.linked_to() == {one.peer}


async def test_a_frozen_peer_is_noticed_within_ten_seconds(autojump_clock, swarm, members):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    await one.links.reach(two.host.addresses)
    await trio.sleep(60)
    assert one.linked_to() == {two.peer}  # quiet is not frozen
    async with one.feed.subscribe() as events:
        swarm.network.freeze(two.host)
        frozen_at = trio.current_time()
        await until(lambda: not one.links.peers(), within_s=10)
        assert trio.current_time() - frozen_at <= 10
        event = await anext(events)
    assert event.kind == "peer.lost"
    assert event.facts == {"peer": two.peer, "problem": "silent for 7 s"}
    assert not one.host.connections()


async def test_a_killed_peer_is_noticed_at_once_and_kept_ones_are_dialled_until_they_return(
    autojump_clock, swarm, members
):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    one.links.keep(two.host.addresses)
    await until(lambda: one.linked_to() == {two.peer})
    swarm.network.kill(two.host)
    await until(lambda: not one.links.peers(), within_s=1)
    await trio.sleep(600)
    assert not one.links.peers()
    swarm.network.revive(two.host)
    await until(lambda: one.linked_to() == {two.peer}, within_s=75)


async def test_after_a_partition_heals_both_sides_link_again_and_stay_linked(
    autojump_clock, swarm, members
):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    one.links.keep(two.host.addresses)
    two.links.keep(one.host.addresses)
    await until(lambda: bool(one.links.peers() and two.links.peers()))
    cut = swarm.network.partition([one.host])
    await until(lambda: not one.links.peers() and not two.links.peers(), within_s=20)
    await trio.sleep(120)
    swarm.network.heal(cut)
    await until(lambda: bool(one.links.peers() and two.links.peers()), within_s=75)
    async with one.feed.subscribe() as events:
        await trio.sleep(300)
        with trio.move_on_after(0) as nothing:
            await anext(events)
        assert nothing.cancelled_caught


async def test_peers_that_dial_each_other_at_once_end_up_linked_and_do_not_flap(
    autojump_clock, swarm, members
):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    async with one.feed.subscribe() as ones, two.feed.subscribe() as twos:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.links.reach, two.host.addresses)
            nursery.start_soon(two.links.reach, one.host.addresses)
        await trio.sleep(120)
        assert one.linked_to() == {two.peer}
        assert two.linked_to() == {one.peer}
        for events in (ones, twos):
            assert (await anext(events)).kind == "peer.connected"
            with trio.move_on_after(0) as nothing:
                await anext(events)
            assert nothing.cancelled_caught


async def test_many_tasks_that_reach_the_same_peer_share_one_conversation(
    autojump_clock, swarm, members
):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one.links.reach, two.host.addresses)
    assert one.linked_to() == {two.peer}
    assert len(two.host.connections()) == 1


async def test_a_connection_that_something_else_dialled_is_proved_too(
    autojump_clock, swarm, members
):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    await one.host.connect(two.host.addresses)  # as Kademlia does
    await until(lambda: bool(one.links.peers() and two.links.peers()), within_s=1)


async def test_a_peer_that_leaves_is_forgotten(autojump_clock, swarm, members):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    one.links.keep(two.host.addresses)
    await until(lambda: bool(one.links.peers() and two.links.peers()))
    await two.links.leave()
    await until(lambda: not one.links.peers(), within_s=1)
    await trio.sleep(600)
    assert not one.host.connections()
    with pytest.raises(PeerNotFound):
        await one.links.reach_peer(two.peer)


async def test_a_peer_that_is_forgotten_is_not_dialled_again(autojump_clock, swarm, members):
    one = await swarm.add("one", members())
    two = await swarm.add("two", members())
    one.links.keep(two.host.addresses)
    await until(lambda: bool(one.links.peers()))
    one.links.forget(two.peer)
    await two.host.disconnect(one.peer)
    await trio.sleep(600)
    assert not one.links.peers()


async def test_an_open_swarm_admits_whoever_connects_and_lets_nodes_enter(autojump_clock, swarm):
    founder = await swarm.add("founder", Membership.create(None, open_swarm=True))
    guest = await swarm.stranger("guest")
    await guest.connect(founder.host.addresses)
    await trio.sleep(60)
    assert founder.host.is_admitted(guest.peer_id)

    node = await swarm.add("node", None)
    swarm_id = await node.links.enter(founder.host.addresses)
    node.links.adopt(Membership.join_open(None, swarm_id))
    await node.links.reach(founder.host.addresses)
    await until(lambda: founder.linked_to() == {node.peer})


async def test_a_private_swarm_cannot_be_entered_without_a_ticket(autojump_clock, swarm, members):
    member = await swarm.add("member", members())
    node = await swarm.add("node", None)
    with pytest.raises(NotAdmitted):
        await node.links.enter(member.host.addresses)


async def test_no_secret_reaches_logs_events_or_errors(autojump_clock, swarm, caplog):
    caplog.set_level(logging.DEBUG)
    founder = await swarm.add("founder", Membership.create(None))
    shown: list[str] = []
    async with founder.feed.subscribe() as events:
        ticket = swarm.issue(founder)
        first = await swarm.add("first", None)
        redeemed = await first.links.redeem(ticket)
        first.links.adopt(Membership.join(None, ticket))
        await first.links.reach(redeemed.peers)
        shown.append(str(await refused_ticket(swarm, ticket)))
        await trio.sleep(10)
        with trio.move_on_after(0):
            async for event in events:
                shown.append(repr(event))
    shown += [record.getMessage() for record in caplog.records]
    shown += [repr(ticket), repr(redeemed), repr(founder.membership)]
    shown += [repr(Redeem(swarm_id=ticket.swarm_id, secret=ticket.secret))]
    everything = " ".join(shown)
    assert founder.peer in everything
    for secret in (ticket.secret, ticket.swarm_key):
        for form in (secret.hex(), repr(secret)[2:-1]):
            assert form not in everything


async def test_an_address_for_another_peer_in_a_hello_is_not_believed(
    autojump_clock, swarm, members
):
    membership = members()
    member = await swarm.add("member", membership)
    liar = await swarm.stranger("liar")
    victim = await swarm.stranger("victim")
    swarm.members.add(liar.peer_id)
    await liar.connect(member.host.addresses)
    talk = await talk_as(liar, member.peer)
    await talk.send(
        Hello(
            swarm_id=membership.swarm_id,
            agent="\x1b[2Jagent",
            addresses=[str(victim.addresses[0]), "/ip4/nonsense"],
        )
    )
    assert isinstance(await talk.receive(), Welcome)
    await talk.send(Ping(nonce=1))
    await until(lambda: bool(member.links.peers()))
    (status,) = member.links.peers()
    assert status.addresses == ()
    assert status.agent == "?[2Jagent"
    assert member.links.known_addresses() == ()


async def test_a_peer_may_ping_as_it_likes_and_is_answered(autojump_clock, swarm, members):
    membership = members()
    member = await swarm.add("member", membership)
    host = await swarm.stranger("bare")
    await host.connect(member.host.addresses)
    talk = await talk_as(host, member.peer)
    swarm.members.add(host.peer_id)
    await talk.send(hello(membership))
    assert isinstance(await talk.receive(), Welcome)
    for nonce in (5, 5, 2**53 - 1, 0):
        await talk.send(Ping(nonce=nonce))
        assert await talk.receive() == Pong(nonce=nonce)
    await talk.send(Pong(nonce=77))  # to no question of theirs
    await trio.sleep(0.1)
    assert member.linked_to() == {host.peer_id}
    await talk.send(Redeem(swarm_id=membership.swarm_id, secret=bytes(16)))  # not now
    await until(lambda: not member.links.peers(), within_s=1)


async def test_a_dead_connection_beside_a_living_one_is_noticed(autojump_clock, swarm, members):
    """Half-open: the peer is back on a new connection, and the old one was never told."""
    membership = members()
    member = await swarm.add("member", membership)
    host = await swarm.stranger("bare")
    await host.connect(member.host.addresses)
    swarm.members.add(host.peer_id)
    alive, dead = [await talk_as(host, member.peer) for _ in range(2)]
    for talk in (dead, alive):
        await talk.send(hello(membership))
        assert isinstance(await talk.receive(), Welcome)
        await talk.send(Ping(nonce=1))
        assert await talk.receive() == Pong(nonce=1)

    async def live() -> None:
        with suppress(PeerGone):
            while (message := await alive.receive()) is not None:
                await trio.sleep(0.5)
                asked = isinstance(message, Ping)
                await alive.send(Pong(nonce=message.nonce) if asked else Ping(nonce=9))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await alive.send(Ping(nonce=9))
        assert member.linked_to() == {host.peer_id}
        await until(lambda: not host.connections(), within_s=10)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_reads_nothing_is_lost_and_holds_nobody_up(
    autojump_clock, swarm, members
):
    """It goes on sending signs of life and never takes an answer."""
    membership = members()
    member = await swarm.add("member", membership)
    other = await swarm.add("other", members())
    deaf = await swarm.stranger("deaf")
    await deaf.connect(member.host.addresses)
    talk = await talk_as(deaf, member.peer)
    swarm.members.add(deaf.peer_id)
    await talk.send(hello(membership))
    assert isinstance(await talk.receive(), Welcome)

    async def chatter() -> None:
        with suppress(PeerGone):
            while True:
                await talk.send(Ping(nonce=1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(chatter)
        await other.links.reach(member.host.addresses)
        await until(lambda: deaf.peer_id not in member.linked_to(), within_s=30)
        assert member.linked_to() == {other.peer}
        nursery.cancel_scope.cancel()


@pytest.mark.seeds(3)
async def test_nodes_that_keep_each_other_are_all_linked_once_the_network_calms_down(
    autojump_clock, repeatable, rng, members
):
    rough = LinkConditions(connection_life_s_mean=20.0, latency_s=0.02, jitter_s=0.02)
    async with (
        open_simulated_network(rng=rng, conditions=rough) as network,
        trio.open_nursery() as nursery,
    ):
        swarm = Swarm(network, nursery)
        nodes = [await swarm.add(f"node {number}", members()) for number in range(6)]
        everybody = {node.peer for node in nodes}
        for node in nodes:
            node.links.keep([address for other in nodes for address in other.host.addresses])
        for _ in range(10):
            victim = rng.choice(nodes).host
            harm, mend = rng.choice(
                [(network.freeze, network.thaw), (network.kill, network.revive)]
            )
            harm(victim)
            await trio.sleep(rng.uniform(0, 30))
            mend(victim)
        for one in nodes:
            for other in nodes:
                if one is not other:
                    network.set_link(one.host, other.host, LinkConditions())
        # What was made before may still be reset by its old conditions, twenty seconds on average.
        await trio.sleep(400)
        for node in nodes:
            assert node.linked_to() == everybody - {node.peer}
        nursery.cancel_scope.cancel()


def test_the_pause_between_dials_doubles_up_to_its_maximum_and_varies():
    rng = random.Random(7)
    pauses = [backoff_s(failures, SETTINGS, rng) for failures in range(1, 100)]
    for failures, pause in enumerate(pauses, 1):
        longest = min(0.5 * 2 ** (failures - 1), 60.0)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) > 90

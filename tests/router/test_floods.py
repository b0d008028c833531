"""A member that floods another with requests and reports: the node lives, its memory is bounded,
others are served. On the simulated network and its clock; what is said once and wrongly is in
test_forwarding.py and core/test_load_table.py.
"""

import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host import MessageStream, SimulatedHost, open_simulated_network
from ollamamax_p2p.inference.core.requests import Delta, GenerateRequest
from ollamamax_p2p.router.core.load_table import GOSSIP, AgedReport, LoadNews, LoadReport
from ollamamax_p2p.router.core.messages import (
    PIECE_BYTES,
    Cancel,
    Credit,
    Failed,
    FromAsker,
    Open,
    Piece,
    Terms,
    answerer_codec,
    asker_codec,
    request_codec,
)
from ollamamax_p2p.router.forwarding import (
    CALLS_PER_PEER_MAX,
    OUTBOX_MAX,
    REQUESTS_BYTES_MAX,
    STREAMS_PER_PEER,
    Emit,
    Forwarding,
    _Answering,
    open_forwarding,
)
from ollamamax_p2p.router.gossip import HEARD_PER_S_MAX
from ollamamax_p2p.wire import protocol_ids
from tests.router.routers import answered, ask, routers, scripted

ASK = GenerateRequest(model="tiny", prompt="hello")
BODY = request_codec.encode(ASK)


def framed(body: bytes) -> bytes:
    """As on the wire, whatever is in it."""
    return len(body).to_bytes(4, "big") + body


ACCEPTED_MAX = 20_000
"""Messages of a few bytes that fill the network's windows and no more."""


@dataclass
class Attacked:
    """`node` answers; `member` is honest, `attacker` belongs to the swarm too."""

    node: SimulatedHost
    attacker: SimulatedHost
    asking: Forwarding
    """The honest member's."""
    working: set[int]
    """What the node's back end works on."""

    async def talk(self) -> MessageStream:
        stream = await self.attacker.open_stream(self.node.peer_id, protocol_ids.FORWARD)
        return MessageStream(stream, sends=asker_codec, receives=answerer_codec)

    async def honest_answer(self) -> list:
        got = []

        async def take(event) -> None:
            got.append(event)

        with trio.fail_after(5):
            await self.asking.run(self.node.peer_id, ASK, Terms(), take)
        return got


@asynccontextmanager
async def attacked() -> AsyncIterator[Attacked]:
    working, numbers = set[int](), itertools.count()

    async def serve(peer, request, terms, emit: Emit) -> None:
        number = next(numbers)
        working.add(number)
        try:
            if peer == attacker.peer_id:
                while True:
                    await emit(Delta(text="x" * 1_000))
            await emit(Delta(text="hello"))
        finally:
            working.discard(number)

    async def nobody(peer, request, terms, emit: Emit) -> None:
        raise AssertionError("nobody asks the honest member")

    async with open_simulated_network(rng=random.Random(1)) as network:
        node, member, attacker = (network.add_host(name) for name in ("node", "member", "bad"))
        for other in (member, attacker):
            await other.connect(node.addresses)
            node.admit(other.peer_id)
            other.admit(node.peer_id)
        async with open_forwarding(node, serve), open_forwarding(member, nobody) as asking:
            yield Attacked(node, attacker, asking, working)


def opens() -> Iterator[FromAsker]:
    for number in itertools.count():
        yield Open(number=number, size=5, terms=Terms())


def opened_and_cancelled() -> Iterator[FromAsker]:
    for number in itertools.count():
        yield Open(number=number, size=len(BODY), terms=Terms())
        yield Piece(number=number, data=BODY)
        yield Cancel(number=number)


def endless_credit() -> Iterator[FromAsker]:
    yield Open(number=1, size=len(BODY), terms=Terms())
    yield Piece(number=1, data=BODY)
    while True:
        yield Credit(number=1, size=2**31 - 1)


def empty_pieces() -> Iterator[FromAsker]:
    yield Open(number=1, size=5, terms=Terms())
    while True:
        yield Piece(number=1, data=b"")


def of_calls_that_are_none() -> Iterator[FromAsker]:
    for number in itertools.count():
        yield Cancel(number=2**53 - 1 - number)
        yield Credit(number=number, size=1)
        yield Piece(number=number, data=b"x")


FLOODS = [opens, opened_and_cancelled, endless_credit, empty_pieces, of_calls_that_are_none]


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_member_that_sends_without_end_and_reads_nothing_is_waited_for_by_nobody(
    autojump_clock, flood: Callable[[], Iterator[FromAsker]], monkeypatch
):
    most = {"outbox": 0, "calls": 0}
    heard = _Answering.heard

    async def watched(self, message) -> None:
        await heard(self, message)
        most["outbox"] = max(most["outbox"], len(self._outbox._waiting))
        most["calls"] = max(most["calls"], len(self._calls))

    monkeypatch.setattr(_Answering, "heard", watched)
    async with attacked() as place, trio.open_nursery() as nursery:
        sent = 0

        async def attack() -> None:
            nonlocal sent
            talk = await place.talk()
            with contextlib.suppress(PeerGone):
                for message in itertools.islice(flood(), ACCEPTED_MAX // 2):
                    await talk.send(message)
                    sent += 1

        nursery.start_soon(attack)
        for _ in range(5):
            await trio.sleep(1)
            assert await place.honest_answer() == [Delta(text="hello")]
        assert sent > CALLS_PER_PEER_MAX
        assert most["calls"] <= CALLS_PER_PEER_MAX
        # One ending per call at the most beyond what is waited for.
        assert most["outbox"] <= OUTBOX_MAX + CALLS_PER_PEER_MAX
        nursery.cancel_scope.cancel()
    assert place.working == set()


async def test_who_reads_no_refusals_is_not_listened_to(autojump_clock):
    async with attacked() as place:
        talk = await place.talk()
        sent = 0
        with trio.move_on_after(30):
            for message in opens():
                await talk.send(message)
                sent += 1
        # It stops where the windows of both directions are full of them.
        assert CALLS_PER_PEER_MAX < sent < ACCEPTED_MAX
        assert await place.honest_answer() == [Delta(text="hello")]


async def test_requests_that_wait_take_no_more_than_their_share(autojump_clock):
    """Also those that have come whole: the back end has not begun with them."""
    size = 10 * 1024 * 1024
    request = request_codec.encode(GenerateRequest(model="tiny", prompt="x" * (size - 100)))
    async with attacked() as place:
        talk = await place.talk()
        fit = REQUESTS_BYTES_MAX // len(request)
        for number in range(fit + 1):
            await talk.send(Open(number=number, size=len(request), terms=Terms()))
            if number < fit:
                for start in range(0, len(request), PIECE_BYTES):
                    data = request[start : start + PIECE_BYTES]
                    await talk.send(Piece(number=number, data=data))
        with trio.fail_after(60):
            while not isinstance(refused := await talk.receive(), Failed):
                pass
        assert (refused.number, refused.code) == (fit, "queue_full")
        assert len(place.working) == fit


async def test_who_opens_streams_without_end_has_a_few(autojump_clock):
    async with attacked() as place:
        talks = [await place.talk() for _ in range(50)]
        for number, talk in enumerate(talks):
            with contextlib.suppress(PeerGone):
                await talk.send(Open(number=1, size=len(BODY), terms=Terms()))
                await talk.send(Piece(number=1, data=BODY))
            await trio.sleep(0.01 * (number % 2))
        await trio.sleep(2)
        assert len(place.working) == STREAMS_PER_PEER
        assert await place.honest_answer() == [Delta(text="hello")]
        for talk in talks:
            await talk.aclose()
        await trio.sleep(2)
        assert place.working == set()


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff" * 64,  # a length of 4 GiB
        framed(b""),
        framed(b"\xc1" * 64),
        framed(b"\x91" * 10_000),  # arrays in arrays
        framed(b"\xdd\xff\xff\xff\xff" + bytes(4)),  # an array of 4 billion
        framed(b"\xc6\x7f\xff\xff\xff" + bytes(4)),  # bytes that do not come
    ],
    ids=["huge", "empty", "rubbish", "deep", "many", "short"],
)
@pytest.mark.parametrize("protocol", [protocol_ids.FORWARD, protocol_ids.LOAD])
async def test_what_is_no_message_ends_the_stream_and_nothing_else(autojump_clock, protocol, frame):
    async with routers([[], [scripted()]]) as swarm:
        one, two = swarm.nodes
        stream = await one.host.open_stream(two.host.peer_id, protocol)
        with contextlib.suppress(PeerGone):
            await stream.send_all(frame)
            with trio.fail_after(10):
                while await stream.receive_some():
                    pass
        await stream.aclose()
        text, _, _ = await answered(one, ask("after"))
        assert text


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf"), -1e308])
async def test_a_flood_of_reports_is_heard_at_its_pace_and_holds_up_nobody(autojump_clock, number):
    """Reports of nodes that do not exist; with numbers that cannot be, they end the stream."""
    async with routers([[], [scripted()], []]) as swarm:
        asking, bad = swarm.nodes[0], swarm.nodes[2]
        known = len(asking.router._nodes())
        sent = 0

        async def attack() -> None:
            nonlocal sent
            while True:
                stream = await bad.host.open_stream(asking.host.peer_id, protocol_ids.LOAD)
                talk = MessageStream(stream, sends=GOSSIP, receives=GOSSIP)
                with contextlib.suppress(PeerGone):
                    for _ in range(20):
                        sent += 1
                        report = LoadReport(
                            peer=f"nobody{sent}", epoch=2**52, sequence=sent, weight=number
                        )
                        await talk.send(LoadNews(reports=(AgedReport(report=report),)))
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attack)
            for count in range(10):
                with trio.fail_after(5):
                    text, _, _ = await answered(asking, ask(f"{count}"))
                assert text
                await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
        assert sent > 50
        heard = len(asking.router._nodes()) - known
        if number:
            assert heard == 0
        else:
            # Some are believed, for membership is not this table's to judge; few, at their pace.
            assert 0 < heard <= 2 * HEARD_PER_S_MAX * 15

"""Questions to peers: on the simulated network and its clock."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from ollamamax_p2p.errors import (
    BlobNotFound,
    MalformedMessage,
    NotAdmitted,
    OmxError,
    PeerGone,
    PeerUnreachable,
    StoreFull,
)
from ollamamax_p2p.host import (
    ByteStream,
    MessageStream,
    Requests,
    SimulatedHost,
    SimulatedNetwork,
    open_requests,
    open_simulated_network,
)
from ollamamax_p2p.host.requests import Answer as Reply
from ollamamax_p2p.host.requests import Ask as Question
from ollamamax_p2p.host.requests import Cancel, Failure, FromAnswerer, FromAsker, _failed
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.wire import Codec, Message

PROTOCOL = "/omx/sums/1"


class Sum(Message, tag="sum", frozen=True):
    a: Annotated[int, Meta(ge=0, lt=2**31)]
    b: Annotated[int, Meta(ge=0, lt=2**31)]


class Total(Message, tag="total", frozen=True):
    value: int


sums: Codec[Sum] = Codec(Sum, max_bytes=100)
totals: Codec[Total] = Codec(Total, max_bytes=100)


@dataclass
class Adder:
    """Answers as slowly as it is told, and remembers what it was doing."""

    delay_s: float = 0.0
    error: Exception | None = None
    at_once: int = 0
    at_once_most: int = 0
    begun: int = 0
    cancelled: int = 0
    asked_by: set[PeerId] = field(default_factory=set)

    async def __call__(self, peer: PeerId, request: Sum) -> Total:
        self.begun += 1
        self.asked_by.add(peer)
        self.at_once += 1
        self.at_once_most = max(self.at_once_most, self.at_once)
        try:
            await trio.sleep(self.delay_s)
            if self.error is not None:
                raise self.error
            return Total(value=request.a + request.b)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.at_once -= 1


@dataclass
class Pair:
    network: SimulatedNetwork
    one: SimulatedHost
    two: SimulatedHost


@pytest.fixture
async def pair(autojump_clock) -> AsyncIterator[Pair]:
    async with open_simulated_network(rng=random.Random(1)) as network:
        one, two = network.add_host("one"), network.add_host("two")
        await one.connect(two.addresses)
        one.admit(two.peer_id)
        two.admit(one.peer_id)
        yield Pair(network, one, two)


@asynccontextmanager
async def sums_between(
    pair: Pair, answer: Callable[[PeerId, Sum], Awaitable[Total]], *, in_flight_max: int = 64
) -> AsyncIterator[Requests[Sum, Total]]:
    """one asks, two answers."""
    codecs = {"requests": sums, "answers": totals, "in_flight_max": in_flight_max}
    async with (
        open_requests(pair.two, PROTOCOL, answer=answer, **codecs),
        open_requests(pair.one, PROTOCOL, answer=Adder(), **codecs) as asking,
    ):
        yield asking


async def test_a_question_is_answered(autojump_clock, pair):
    adder = Adder()
    async with sums_between(pair, adder) as asking:
        assert await asking.ask(pair.two.peer_id, Sum(a=1, b=2)) == Total(value=3)
    assert adder.asked_by == {pair.one.peer_id}


async def test_many_questions_share_one_stream_and_each_gets_its_own_answer(autojump_clock, pair):
    opened = []
    open_stream = pair.one.open_stream

    async def counted(peer: PeerId, protocol: str) -> ByteStream:
        opened.append(protocol)
        return await open_stream(peer, protocol)

    pair.one.open_stream = counted
    rng = random.Random(3)

    async def answer(peer: PeerId, request: Sum) -> Total:
        await trio.sleep(rng.random())
        return Total(value=request.a + request.b)

    values = {}

    async def ask(a: int) -> None:
        values[a] = (await asking.ask(pair.two.peer_id, Sum(a=a, b=1))).value

    async with sums_between(pair, answer) as asking, trio.open_nursery() as nursery:
        for a in range(500):
            nursery.start_soon(ask, a)
    assert values == {a: a + 1 for a in range(500)}
    assert opened == [PROTOCOL]


async def test_no_more_than_the_limit_is_worked_on_at_once(autojump_clock, pair):
    adder = Adder(delay_s=1)
    async with (
        sums_between(pair, adder, in_flight_max=8) as asking,
        trio.open_nursery() as nursery,
    ):
        for a in range(40):
            nursery.start_soon(asking.ask, pair.two.peer_id, Sum(a=a, b=1))
    assert adder.at_once_most == 8
    assert adder.begun == 40


async def test_a_peer_that_asks_more_than_allowed_waits(autojump_clock, pair):
    """A peer that does not hold itself back is held back by us."""
    adder = Adder(delay_s=1)
    async with sums_between(pair, adder, in_flight_max=4):
        talk = await raw_talk(pair)
        for number in range(100):
            await talk.send(Question(number=number, body=sums.encode(Sum(a=1, b=1))))
        await trio.sleep(0.5)
        assert adder.begun == 4
        await trio.sleep(2)
        assert adder.begun == 12
        assert adder.at_once_most == 4


async def raw_talk(pair: Pair) -> MessageStream[FromAsker, FromAnswerer]:
    stream = await pair.one.open_stream(pair.two.peer_id, PROTOCOL)
    return MessageStream(
        stream,
        sends=Codec(FromAsker, max_bytes=10_000),
        receives=Codec(FromAnswerer, max_bytes=10_000),
    )


async def test_a_cancelled_question_is_worked_on_no_more_and_others_are(autojump_clock, pair):
    adder = Adder(delay_s=10)
    async with sums_between(pair, adder) as asking, trio.open_nursery() as nursery:
        nursery.start_soon(asking.ask, pair.two.peer_id, Sum(a=1, b=1))
        with trio.move_on_after(1) as impatience:
            await asking.ask(pair.two.peer_id, Sum(a=2, b=2))
        assert impatience.cancelled_caught
        await trio.sleep(1)
        assert adder.cancelled == 1
        assert adder.at_once == 1


async def test_cancelled_questions_free_their_places_for_others(autojump_clock, pair):
    adder = Adder(delay_s=1_000)
    async with sums_between(pair, adder, in_flight_max=4) as asking:
        for _ in range(3):
            with trio.move_on_after(1):
                async with trio.open_nursery() as nursery:
                    for a in range(10):
                        nursery.start_soon(asking.ask, pair.two.peer_id, Sum(a=a, b=1))
        adder.delay_s = 0
        with trio.fail_after(1):
            assert (await asking.ask(pair.two.peer_id, Sum(a=1, b=1))).value == 2


async def test_all_waiting_questions_fail_when_the_peer_is_gone(autojump_clock, pair):
    failures = []

    async def ask(a: int) -> None:
        try:
            await asking.ask(pair.two.peer_id, Sum(a=a, b=1))
        except PeerGone as error:
            failures.append(error.peer)

    async with sums_between(pair, Adder(delay_s=100), in_flight_max=5) as asking:
        async with trio.open_nursery() as nursery:
            for a in range(12):  # more than are in flight: the waiting ones fail too
                nursery.start_soon(ask, a)
            await trio.sleep(1)
            await pair.one.disconnect(pair.two.peer_id)
        assert failures == [pair.two.peer_id] * 12


async def test_a_lost_stream_is_opened_again(autojump_clock, pair):
    async with sums_between(pair, Adder()) as asking:
        await asking.ask(pair.two.peer_id, Sum(a=1, b=1))
        await pair.one.disconnect(pair.two.peer_id)
        await trio.sleep(1)
        await pair.one.connect(pair.two.addresses)
        pair.two.admit(pair.one.peer_id)
        assert (await asking.ask(pair.two.peer_id, Sum(a=1, b=1))).value == 2


async def test_a_peer_that_is_not_connected_is_gone(autojump_clock, pair):
    async with sums_between(pair, Adder()) as asking:
        await pair.one.disconnect(pair.two.peer_id)
        with pytest.raises(PeerGone):
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))


async def test_a_stranger_is_not_answered(autojump_clock, pair):
    adder = Adder()
    pair.two.expel(pair.one.peer_id)
    async with sums_between(pair, adder) as asking:
        with pytest.raises(NotAdmitted):
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))
    assert not adder.begun


async def test_what_is_not_found_there_is_not_found_here(autojump_clock, pair):
    digest = "sha256:" + "ab" * 32
    async with sums_between(pair, Adder(error=BlobNotFound(digest))) as asking:
        with pytest.raises(BlobNotFound, match=digest):
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))


async def test_trouble_of_the_peer_is_not_ours_and_its_paths_stay_there(autojump_clock, pair):
    full = StoreFull("/home/somebody/models", 10, 5)
    async with sums_between(pair, Adder(error=full)) as asking:
        with pytest.raises(PeerUnreachable, match="store_full") as caught:
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))
    assert "somebody" not in str(caught.value)


async def answer_raw(pair: Pair, reply: Callable[[int], FromAnswerer]) -> None:
    """two answers every question with this."""

    async def serve(stream: ByteStream) -> None:
        talk = MessageStream(
            stream,
            sends=Codec(FromAnswerer, max_bytes=10_000),
            receives=Codec(FromAsker, max_bytes=10_000),
        )
        while (question := await talk.receive()) is not None:
            await talk.send(reply(question.number))

    pair.two.set_handler(PROTOCOL, serve)


async def test_a_failure_cannot_steer_the_terminal_nor_name_any_class(autojump_clock, pair):
    async with sums_between(pair, Adder()) as asking:
        await answer_raw(
            pair, lambda number: Failure(number=number, code="omx_\x1b[2J", message="\x1b[31mhi")
        )
        with pytest.raises(PeerUnreachable) as caught:
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))
        assert "\x1b" not in str(caught.value)


async def test_an_answer_that_is_none_names_the_peer(autojump_clock, pair):
    async with sums_between(pair, Adder()) as asking:
        await answer_raw(pair, lambda number: Reply(number=number, body=b"\xc1"))
        with pytest.raises(MalformedMessage) as caught:
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))
        assert caught.value.peer == pair.two.peer_id


async def test_answers_that_nobody_asked_for_are_ignored(autojump_clock, pair):
    async with sums_between(pair, Adder()) as asking:
        await answer_raw(pair, lambda number: Reply(number=number + 1, body=b""))
        with trio.move_on_after(5) as waiting:
            await asking.ask(pair.two.peer_id, Sum(a=1, b=1))
        assert waiting.cancelled_caught


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\xdd\xff\xff\xff\xff"])
async def test_a_malformed_question_ends_its_stream_only(autojump_clock, pair, body):
    adder = Adder()
    async with sums_between(pair, adder) as asking:
        talk = await raw_talk(pair)
        await talk.send(Question(number=1, body=body))
        assert await talk.receive() is None
        assert (await asking.ask(pair.two.peer_id, Sum(a=1, b=1))).value == 2


async def test_a_number_that_is_used_twice_at_once_ends_the_stream(autojump_clock, pair):
    adder = Adder(delay_s=10)
    async with sums_between(pair, adder):
        talk = await raw_talk(pair)
        for _ in range(2):
            await talk.send(Question(number=1, body=sums.encode(Sum(a=1, b=1))))
        await trio.sleep(1)
        assert adder.begun == 1
        assert adder.cancelled == 1


async def test_a_fifth_stream_of_one_peer_is_closed(autojump_clock, pair):
    async with sums_between(pair, Adder()):
        talks = [await raw_talk(pair) for _ in range(5)]
        with trio.fail_after(1):
            assert await talks[4].receive() is None
        with trio.move_on_after(1) as open_still:
            await talks[0].receive()
        assert open_still.cancelled_caught


# -- what is on the wire -----------------------------------------------------------------------

near_messages = st.dictionaries(
    st.sampled_from(["is", "number", "body", "code", "message"]),
    st.one_of(
        st.sampled_from(["ask", "cancel", "answer", "failure", "blob_not_found", "store_full"]),
        st.integers(-(2**63), 2**64 - 1),
        st.binary(max_size=40),
        st.text(max_size=80),
        st.none(),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    max_size=5,
)


@settings(max_examples=10_000, deadline=None)
@given(st.binary(max_size=200) | near_messages.map(msgpack.packb))
def test_any_bytes_are_an_envelope_or_malformed(data):
    for codec, kinds in (
        (Codec(FromAsker, max_bytes=200), (Question, Cancel)),
        (Codec(FromAnswerer, max_bytes=200), (Reply, Failure)),
    ):
        try:
            message = codec.decode(data)
        except MalformedMessage:
            continue
        assert isinstance(message, kinds)
        assert message.number >= 0
        if isinstance(message, Failure):
            told = _failed(PeerId("12D3KooW"), message)
            assert isinstance(told, OmxError)
            assert not isinstance(told, StoreFull), "that would be about this machine"

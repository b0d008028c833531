"""Requests to another node's back ends: on the simulated network and its clock."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    ModelNotFound,
    NotAdmitted,
    OmxError,
    PeerGone,
    PeerUnreachable,
    QueueFull,
    StoreDamaged,
)
from ollamamax_p2p.host import (
    MessageStream,
    SimulatedHost,
    SimulatedNetwork,
    open_simulated_network,
)
from ollamamax_p2p.inference.core.requests import Delta, Embeddings, EmbedRequest, GenerateRequest
from ollamamax_p2p.router import forwarding as forwarding_module
from ollamamax_p2p.router.core.messages import (
    CREDIT_BYTES,
    Alive,
    Cancel,
    Credit,
    Failed,
    News,
    Open,
    Over,
    Piece,
    Terms,
    answerer_codec,
    asker_codec,
    request_codec,
)
from ollamamax_p2p.router.forwarding import (
    BATCH_S,
    CALLS_PER_PEER_MAX,
    SILENCE_S,
    Emit,
    Forwarding,
    open_forwarding,
)
from ollamamax_p2p.wire import protocol_ids

ASK = GenerateRequest(model="tiny", prompt="hello")


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
async def served(pair: Pair, serve) -> AsyncIterator[Forwarding]:
    """one asks, two answers."""
    async with open_forwarding(pair.two, serve), open_forwarding(pair.one, nobody) as asking:
        yield asking


async def nobody(peer, request, terms, emit: Emit) -> None:
    raise ModelNotFound(request.model)


def counting(count: int, *, each_s: float = 0.0, text: str = "word "):
    """Answers with that many deltas."""

    async def serve(peer, request, terms, emit: Emit) -> None:
        for _ in range(count):
            await trio.sleep(each_s)
            await emit(Delta(text=text))

    return serve


async def ask(asking: Forwarding, pair: Pair, request=ASK, terms=Terms()) -> list:  # noqa: B008
    got = []

    async def take(event) -> None:
        got.append(event)

    await asking.run(pair.two.peer_id, request, terms, take)
    return got


async def test_a_request_and_its_terms_arrive_and_the_answer_comes_back_in_order(
    autojump_clock, pair
):
    seen = []

    async def serve(peer, request, terms, emit: Emit) -> None:
        seen.append((peer, request, terms))
        for number in range(300):
            await emit(Delta(text=f"{number} "))

    async with served(pair, serve) as asking:
        got = await ask(asking, pair, terms=Terms(user="me", priority=2))
    assert seen == [(pair.one.peer_id, ASK, Terms(user="me", priority=2))]
    assert "".join(each.text for each in got) == "".join(f"{number} " for number in range(300))


async def test_a_prompt_of_ten_megabytes_and_a_flood_of_vectors_fit(autojump_clock, pair):
    vectors = tuple(tuple(float(place) for place in range(1_000)) for _ in range(500))

    async def serve(peer, request, terms, emit: Emit) -> None:
        assert len(request.inputs[0]) == 10_000_000
        await emit(Embeddings(vectors=vectors))

    async with served(pair, serve) as asking:
        got = await ask(asking, pair, EmbedRequest(model="m", inputs=("x" * 10_000_000,)))
    assert got == [Embeddings(vectors=vectors)]


async def test_many_calls_share_one_stream(autojump_clock, pair):
    opened = []
    open_stream = pair.one.open_stream

    async def counted(peer, protocol):
        opened.append(protocol)
        return await open_stream(peer, protocol)

    pair.one.open_stream = counted
    counts = []

    async def one_call() -> None:
        counts.append(len(await ask(asking, pair)))

    async with served(pair, counting(20, each_s=0.1)) as asking, trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(one_call)
    assert counts == [20] * 50
    assert opened == [protocol_ids.FORWARD]


async def test_deltas_that_come_close_together_travel_together(autojump_clock, pair):
    async with served(pair, counting(100, each_s=BATCH_S / 10)) as asking:
        sent = []
        put = forwarding_module._Outbox.put

        async def counted(self, message) -> None:
            sent.append(message)
            await put(self, message)

        forwarding_module._Outbox.put = counted
        try:
            await ask(asking, pair)
        finally:
            forwarding_module._Outbox.put = put
    assert 5 <= len([each for each in sent if isinstance(each, News)]) <= 15


async def test_the_first_delta_does_not_wait_for_a_batch(autojump_clock, pair):
    async def serve(peer, request, terms, emit: Emit) -> None:
        await emit(Delta(text="first"))
        await trio.sleep_forever()

    arrived = trio.Event()

    async def take(event) -> None:
        arrived.set()

    async with served(pair, serve) as asking, trio.open_nursery() as nursery:
        nursery.start_soon(asking.run, pair.two.peer_id, ASK, Terms(), take)
        with trio.fail_after(0.5):
            await arrived.wait()
        nursery.cancel_scope.cancel()


async def test_a_cancelled_call_is_cancelled_there_within_a_tenth_of_a_second(autojump_clock, pair):
    begun, cancelled = trio.Event(), trio.Event()

    async def serve(peer, request, terms, emit: Emit) -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with served(pair, serve) as asking:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, asking, pair)
            await begun.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(0.1):
            await cancelled.wait()


async def test_who_reads_slowly_holds_up_the_engine_and_nobody_else(autojump_clock, pair):
    emitted = 0

    async def serve(peer, request, terms, emit: Emit) -> None:
        nonlocal emitted
        while True:
            await emit(Delta(text="x" * 1_000))
            if request.prompt == "slow":
                emitted += 1
            elif emitted > 100:
                return

    async def never(event) -> None:
        await trio.sleep_forever()

    async with served(pair, serve) as asking, trio.open_nursery() as nursery:
        slow = GenerateRequest(model="m", prompt="slow")
        nursery.start_soon(asking.run, pair.two.peer_id, slow, Terms(), never)
        await trio.sleep(10)
        before = emitted
        assert await ask(asking, pair) != []
        await trio.sleep(10)
        assert emitted == before
        assert emitted * 1_000 < 2 * CREDIT_BYTES
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (ModelNotFound("tiny"), ModelNotFound, "model 'tiny' not found"),
        (QueueFull(7, 12.0), QueueFull, "try again in 12 s"),
        (BackendFailed("embedded", "/secret/path"), BackendFailed, "its own log tells why"),
        (BackendUnavailable("embedded", "/secret"), BackendUnavailable, "its own log"),
        (StoreDamaged("/secret/path", "torn"), PeerUnreachable, "its own log tells why"),
        (RuntimeError("a fault of ours"), PeerUnreachable, "its own log tells why"),
    ],
)
async def test_errors_arrive_by_their_class_and_keep_the_secrets_of_the_machine(
    autojump_clock, pair, raised, expected, words
):
    async def serve(peer, request, terms, emit: Emit) -> None:
        await emit(Delta(text="before"))
        raise raised

    async with served(pair, serve) as asking:
        with pytest.raises(expected, match=words) as caught:
            await ask(asking, pair)
        assert "secret" not in str(caught.value)
        if isinstance(raised, QueueFull):
            assert caught.value.retry_after_s == 12.0


async def test_a_peer_that_dies_is_noticed_at_once_by_every_call(autojump_clock, pair):
    failures = []

    async def one_call() -> None:
        try:
            await ask(asking, pair)
        except OmxError as error:
            failures.append(error)

    async with served(pair, counting(1_000, each_s=1)) as asking, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one_call)
        await trio.sleep(5)
        pair.network.drop(pair.one, pair.two)
        await trio.sleep(0.5)
        assert [type(error) for error in failures] == [PeerGone] * 5


async def test_a_frozen_peer_is_given_up_soon_but_not_one_that_only_thinks(autojump_clock, pair):
    async def thinks(peer, request, terms, emit: Emit) -> None:
        await trio.sleep(60)
        await emit(Delta(text="at last"))

    async with served(pair, thinks) as asking:
        assert await ask(asking, pair) == [Delta(text="at last")]
        async with trio.open_nursery() as nursery:

            async def given_up() -> None:
                with pytest.raises(PeerGone, match="said nothing"):
                    await ask(asking, pair)
                nursery.cancel_scope.cancel()

            nursery.start_soon(given_up)
            await trio.sleep(5)
            pair.network.freeze(pair.two)
            with trio.fail_after(SILENCE_S + 2):
                await trio.sleep_forever()


async def test_a_stranger_gets_no_answer(autojump_clock, pair):
    pair.two.expel(pair.one.peer_id)
    async with served(pair, counting(1)) as asking:
        with pytest.raises(NotAdmitted):
            await ask(asking, pair)


# -- peers that do not keep to it ----------------------------------------------------------------


async def raw_asker(pair: Pair) -> MessageStream:
    stream = await pair.one.open_stream(pair.two.peer_id, protocol_ids.FORWARD)
    return MessageStream(stream, sends=asker_codec, receives=answerer_codec)


BODY = request_codec.encode(ASK)


@pytest.mark.parametrize(
    "messages",
    [
        [Open(number=1, size=5, terms=Terms()), Open(number=1, size=5, terms=Terms())],
        [Open(number=1, size=5, terms=Terms()), Piece(number=1, data=b"too long")],
        [
            Open(number=1, size=len(BODY), terms=Terms()),
            Piece(number=1, data=BODY),
            Piece(number=1, data=b"more"),
        ],
    ],
)
async def test_a_peer_that_breaks_the_protocol_loses_its_stream_only(
    autojump_clock, pair, messages
):
    async with served(pair, counting(5, each_s=1)) as asking:
        talk = await raw_asker(pair)
        for message in messages:
            await talk.send(message)
        with trio.fail_after(5):
            while await talk.receive() is not None:
                pass
        assert len(await ask(asking, pair)) == 5


async def test_what_is_no_request_is_refused_and_the_stream_lives(autojump_clock, pair):
    async with served(pair, counting(2)):
        talk = await raw_asker(pair)
        await talk.send(Open(number=1, size=4, terms=Terms()))
        await talk.send(Piece(number=1, data=b"\xc1\xff\x00{"))
        refused = await talk.receive()
        assert isinstance(refused, Failed)
        assert refused.code == "bad_input"
        await talk.send(Credit(number=9, size=5))
        await talk.send(Cancel(number=9))
        await talk.send(Open(number=2, size=len(BODY), terms=Terms()))
        await talk.send(Piece(number=2, data=BODY))
        assert isinstance(await talk.receive(), News)


async def test_too_many_calls_are_refused_and_a_cancelled_one_makes_room(autojump_clock, pair):
    async with served(pair, counting(1)):
        talk = await raw_asker(pair)
        for number in range(CALLS_PER_PEER_MAX + 1):
            await talk.send(Open(number=number, size=5, terms=Terms()))
        refused = await talk.receive()
        while isinstance(refused, Alive):
            refused = await talk.receive()
        assert (refused.number, refused.code) == (CALLS_PER_PEER_MAX, "queue_full")
        await talk.send(Cancel(number=0))
        await talk.send(Open(number=1_000_000, size=len(BODY), terms=Terms()))
        await talk.send(Piece(number=1_000_000, data=BODY))
        answer = await talk.receive()
        while isinstance(answer, Alive):
            answer = await talk.receive()
        assert isinstance(answer, News)
        assert isinstance(await talk.receive(), Over)


@pytest.mark.parametrize(
    "news",
    [
        News(number=1, data=b"\xc1"),
        *[News(number=1, data=b"x" * 40_000, more=True)],
    ],
)
async def test_an_answerer_that_sends_rubbish_is_given_up_and_named(autojump_clock, pair, news):
    async def answer(stream) -> None:
        talk = MessageStream(stream, sends=answerer_codec, receives=asker_codec)
        opened = await talk.receive()
        assert isinstance(opened, Open)
        try:
            while True:
                await talk.send(News(number=opened.number, data=news.data, more=news.more))
        except PeerGone:
            return

    pair.two.set_handler(protocol_ids.FORWARD, answer)
    async with open_forwarding(pair.one, nobody) as asking:
        with pytest.raises(PeerGone, match="misbehaved"):
            await ask(asking, pair)

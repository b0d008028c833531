"""Who does not belong obtains nothing: no handshake, no answer, no secret. Over real libp2p."""

import base64
import hashlib
import io
import logging
import random
import traceback
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import msgspec
import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message as KademliaMessage
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_uvarint

from ollamamax_p2p.content.core.digest import raw_hash
from ollamamax_p2p.discovery.core import provider_messages
from ollamamax_p2p.errors import (
    NetworkTrouble,
    NotAdmitted,
    PeerGone,
    PeerUnreachable,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.host import HostSettings, open_connections, open_libp2p_host, requests
from ollamamax_p2p.host.connections import REFUSED_TICKETS_PER_PEER
from ollamamax_p2p.host.join_messages import Hello, Ping, Refused, answerer_codec, dialler_codec
from ollamamax_p2p.host.message_stream import MessageStream
from ollamamax_p2p.identity import Membership, parse_ticket
from ollamamax_p2p.transfer.core import messages as transfer_messages
from ollamamax_p2p.transfer.models_exchange import AskManifest
from ollamamax_p2p.wire import encode_frame, protocol_ids
from tests.node.nodes import heard, model_file, node_at, until, until_peers

pytestmark = pytest.mark.network

SETTINGS = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
GREETING = b"\x13/multistream/1.0.0\n"
REFUSAL = b"\x03na\n"
IDENTIFY, PUSH, PING = "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"
KADEMLIA = "/omx/kad/1.0.0"


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(90):
        yield


@asynccontextmanager
async def outsider(name: str, swarm_key: bytes | None):
    """A libp2p host that is no node: it has a key of its own and perhaps the swarm's."""
    seed = hashlib.sha256(name.encode()).digest()
    async with open_libp2p_host(seed, SETTINGS, swarm_key=swarm_key) as host:
        yield host


@asynccontextmanager
async def two_members(folder):
    """Two linked nodes, of which the first holds a model; and the swarm's key."""
    # Relaying, so that every protocol that a node can have is there.
    async with (
        node_at(folder / "a", **{"host.relay_for_others": True}) as seed,
        node_at(folder / "b") as other,
    ):
        await seed.import_model(model_file(folder / "m.safetensors"), "secret")
        ticket = (await seed.invite()).ticket
        await other.join([ticket])
        await until_peers(seed, other)
        yield seed, other, parse_ticket(ticket).swarm_key


# -- without the swarm key ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", [None, bytes(32), hashlib.sha256(b"x").digest()], ids=["none", "zeros", "another"]
)
async def test_without_the_swarm_key_no_handshake_ends(tmp_path, key):
    async with two_members(tmp_path) as (seed, other, _), outsider("stranger", key) as stranger:
        async with heard(seed) as events:
            with pytest.raises(PeerUnreachable):
                await stranger.connect(seed.addresses)
        assert stranger.connections() == ()
        assert events == []
        peers = [connection.peer for connection in seed._now.host.connections()]
        assert peers == [other.peer_id]


# -- with the key, but no member ---------------------------------------------------------------


def questions(weights: str, about: str) -> dict[str, bytes]:
    """Good questions by protocol, each of which a member is answered."""

    def asked(body: bytes) -> bytes:
        question = msgspec.msgpack.encode(requests.Ask(number=1, body=body))
        return encode_frame(question, max_bytes=1_000)

    fetch = transfer_messages.Open(blob=1, digest=raw_hash(weights))
    whom = provider_messages.Ask(digest=raw_hash(weights))
    find_node = KademliaMessage()
    find_node.type = KademliaMessage.MessageType.FIND_NODE
    find_node.key = ID.from_base58(about).to_bytes()
    record = find_node.SerializeToString()
    return {
        protocol_ids.TRANSFER: encode_frame(msgspec.msgpack.encode(fetch), max_bytes=1_000),
        protocol_ids.MODELS: asked(msgspec.msgpack.encode(AskManifest(name="secret"))),
        protocol_ids.PROVIDERS: asked(msgspec.msgpack.encode(whom)),
        KADEMLIA: encode_uvarint(len(record)) + record,
        PING: random.Random(1).randbytes(32),
        IDENTIFY: b"",
    }


async def answer_to(host, peer: str, protocol: str, question: bytes) -> bytes:
    """All bytes that come back to a question that does not wait for the negotiation's outcome."""
    connection = host.libp2p.get_network().get_connections(ID.from_base58(peer))[0]
    stream = await connection.new_stream()
    name = protocol.encode() + b"\n"
    await stream.write(GREETING + encode_uvarint(len(name)) + name + question)
    said = b""
    with trio.move_on_after(1.5):  # real: what a door that is shut does is nothing
        try:
            while not said.startswith(GREETING) or len(said) <= len(GREETING) + len(name) + 1:
                said += await stream.read(65_536)
        except Exception as error:  # noqa: BLE001 - how py-libp2p says that a stream has ended
            logging.getLogger(__name__).debug("the stream ended: %r", error)
    with trio.move_on_after(1):
        await stream.reset()
    return said


async def test_with_the_key_alone_nothing_but_the_join_protocol_answers(tmp_path):
    async with two_members(tmp_path) as (seed, other, swarm_key):
        weights = (await seed.show("secret")).layers[1].digest
        member = other._now.host
        asked = questions(weights, other.peer_id)
        # That these are good questions: a member has an answer to each.
        for protocol, question in asked.items():
            told = await answer_to(member, seed.peer_id, protocol, question)
            agreed = GREETING + encode_uvarint(len(protocol) + 1) + protocol.encode() + b"\n"
            assert told.startswith(agreed), protocol
            assert len(told) > len(agreed), protocol

        async with outsider("stranger", swarm_key) as stranger, heard(seed) as events:
            called = []

            async def note(stream):
                called.append(stream.protocol)

            served = {str(name) for name in seed._now.host._basic.multiselect.handlers}
            assert {*asked, PUSH, protocol_ids.JOIN} < served
            for protocol in served:
                stranger.set_handler(protocol, note, for_strangers=True)
            await stranger.connect(seed.addresses)
            for protocol in sorted(served - {protocol_ids.JOIN}):
                with pytest.raises(NotAdmitted):
                    await stranger.open_stream(seed.peer_id, protocol)
            for protocol, question in asked.items():
                told = await answer_to(stranger, seed.peer_id, protocol, question)
                assert told.replace(REFUSAL, b"") in (GREETING, b""), protocol
            assert called == [], "and the node asks a stranger nothing by itself"
            assert seed.peer_id in {each.peer for each in stranger.connections()}
        # That somebody leads has nothing to do with the stranger.
        assert [event.kind for event in events if event.kind != "cluster.leader"] == []
        # It left no trace in what members are told.
        assert stranger.peer_id not in seed._now.discovery.known_peers()
        assert {peer.peer_id for peer in await seed.peers()} == {other.peer_id}


async def test_a_stranger_that_claims_to_be_a_member_is_refused_without_a_word_of_others(tmp_path):
    async with two_members(tmp_path) as (seed, other, swarm_key):
        swarm_id = bytes.fromhex((await seed.status()).swarm_id)
        for name, claimed_id in (
            ("this swarm", swarm_id),
            ("no swarm", b""),
            ("another swarm", bytes(16)),
        ):
            async with outsider(name, swarm_key) as stranger:
                await stranger.connect(seed.addresses)
                stream = await stranger.open_stream(seed.peer_id, protocol_ids.JOIN)
                talk = MessageStream(stream, sends=dialler_codec, receives=answerer_codec)
                await talk.send(Hello(swarm_id=claimed_id, agent="x", addresses=[]))
                answer = await talk.receive()
                assert isinstance(answer, Refused), name
                assert answer.reason in ("not_a_member", "other_swarm")
                await until(lambda host=stranger: not host.connections())
        async with outsider("pinging", swarm_key) as stranger:
            await stranger.connect(seed.addresses)
            stream = await stranger.open_stream(seed.peer_id, protocol_ids.JOIN)
            talk = MessageStream(stream, sends=dialler_codec, receives=answerer_codec)
            await talk.send(Ping(nonce=1))
            with suppress(PeerGone):
                assert await talk.receive() is None
            await until(lambda: not stranger.connections())
        assert {peer.peer_id for peer in await seed.peers()} == {other.peer_id}


async def test_guesses_at_tickets_are_soon_not_explained_and_good_tickets_stay_good(tmp_path):
    async with two_members(tmp_path) as (seed, _, swarm_key):
        good = parse_ticket((await seed.invite()).ticket)
        rng = random.Random(1)
        async with outsider("guesser", swarm_key) as guesser:
            outcomes = []
            for _ in range(REFUSED_TICKETS_PER_PEER + 2):
                guess = replace(good, secret=rng.randbytes(16))
                try:
                    await redeemed(guesser, guess)
                except (TicketUnknown, NetworkTrouble) as error:
                    outcomes.append(error)
                await until(lambda: not guesser.connections())
            assert [type(each) for each in outcomes[:-2]] == [TicketUnknown] * (
                REFUSED_TICKETS_PER_PEER
            )
            for error in outcomes[-2:]:
                assert "refused too many tickets lately" in str(error)
            # Who guessed may have a good one too: it cannot be told from an honest newcomer.
            assert (await redeemed(guesser, good)).issuer == seed.peer_id
        another = parse_ticket((await seed.invite()).ticket)
        async with outsider("guest", swarm_key) as guest:
            assert (await redeemed(guest, another)).issuer == seed.peer_id


async def redeemed(host, ticket):
    async with open_connections(
        host, None, SETTINGS, rng=random.Random(1), feed=None, agent="test", wall_clock=lambda: 0.0
    ) as connections:
        try:
            return await connections.redeem(ticket)
        except (TicketUnknown, NetworkTrouble) as error:
            failure = error
        await until(lambda: not host.connections())
    raise failure


# -- secrets and logs --------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keeps all that is logged, as text."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.text = io.StringIO()
        self.loggers: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.loggers.add(record.name)
        self.text.write(f"{record.getMessage()}\n{record.args!r}\n")
        if record.exc_info:
            self.text.write("".join(traceback.format_exception(*record.exc_info)))


@asynccontextmanager
async def everything_logged(monkeypatch):
    """Every logger at DEBUG, py-libp2p's too."""
    monkeypatch.setenv("OMX_LOG", "libp2p")
    handler = Everything()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.NOTSET)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def every_logger_speaks() -> None:
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = True


def spellings(secret: bytes) -> set[str]:
    """How bytes may look in a log, in parts too: a log shows what a buffer happened to hold."""
    found = {base64.b32encode(secret).decode().rstrip("=").lower()}
    for begin in range(0, len(secret) - 7, 4):
        part = secret[begin : begin + 8]
        found |= {part.hex(), repr(part)[2:-1].lower(), ", ".join(map(str, part))}
        # Base64 in each of the three ways in which bytes can lie in it.
        found.add(base64.b64encode(secret[begin : begin + 9]).decode()[:10].lower())
    return found


async def test_a_secret_is_recognised_however_it_is_written():
    secret = random.Random(7).randbytes(32)
    for told in (
        f"key={secret!r}",
        repr(bytearray(b"head" + secret)),
        repr(b"head" + secret[:14]),
        secret.hex().upper(),
        str(list(secret)),
        *(base64.b64encode(bytes(before) + secret).decode() for before in range(3)),
        base64.b32encode(secret).decode(),
    ):
        assert any(spelling in told.lower() for spelling in spellings(secret)), told
    assert not any(
        spelling in random.Random(8).randbytes(32).hex() for spelling in spellings(secret)
    )


@pytest.fixture
def all_levels_restored():
    """Loggers as they were, after a test that has turned them up."""
    known = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    before = [(logger, logger.level, logger.propagate) for logger in known]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


async def test_no_secret_reaches_a_log_in_a_join_and_a_pull(
    tmp_path, monkeypatch, all_levels_restored
):
    async with (
        everything_logged(monkeypatch) as logged,
        node_at(tmp_path / "a") as a,
        node_at(tmp_path / "b") as b,
        node_at(tmp_path / "c") as c,
    ):
        every_logger_speaks()
        await a.import_model(model_file(tmp_path / "m.safetensors"), "tiny")
        ticket = (await a.invite()).ticket
        await b.join([ticket])
        every_logger_speaks()  # those that the join has made, too
        await b.pull("tiny")
        try:
            await c.join([ticket])
            pytest.fail("the ticket was good for one")
        except TicketUsedUp:
            logging.getLogger("test").exception("as a program might")
        secrets = secrets_of(a, b, ticket)
    text = logged.text.getvalue().lower()
    assert {"libp2p", "ollamamax_p2p", "test"} <= {name.split(".")[0] for name in logged.loggers}
    assert len(logged.loggers) > 20
    for name, secret in secrets.items():
        told = [spelling for spelling in spellings(secret) if spelling in text]
        assert not told, f"{name} is in a log"
    assert ticket[4:40] not in text


def secrets_of(a, b, ticket: str) -> dict[str, bytes]:
    membership: Membership = a._now.membership
    return {
        "the swarm key": membership.swarm_key,
        "the ticket's secret": parse_ticket(ticket).secret,
        "a's node key": a._key.seed,
        "b's node key": b._key.seed,
    }

"""LocalClient and RequestClient against a served node that answers questions."""

import socket
from contextlib import suppress
from functools import partial

import pytest
import trio
from trio_websocket import ConnectionClosed, serve_websocket

from ollamamax_p2p.api import ApiSettings, LocalClient, open_api
from ollamamax_p2p.api.websocket_client import CREDITS, FRAME_BYTES_MAX, open_request_client
from ollamamax_p2p.api.websocket_requests import FRAME_BYTES_MAX as TAKEN_BYTES_MAX
from ollamamax_p2p.errors import (
    BadInput,
    LocalTrouble,
    ModelNotFound,
    NetworkTrouble,
    NoCandidate,
    NodeNotRunning,
    first_named,
)
from ollamamax_p2p.inference.core.requests import Delta, Finish, GenerateRequest
from ollamamax_p2p.router import QueuePlace
from ollamamax_p2p.testing.scripted_backend import whole_answer
from tests.api.ram_inference import RamInference, scripted
from tests.api.ram_node import PEER, RamNode

pytestmark = pytest.mark.network

ASK = {"model": "tiny", "prompt": "hello"}
SAID = whole_answer(GenerateRequest(model="tiny", prompt="hello"))


class ListedNode(RamNode):
    async def listed_models(self):
        return ()


@pytest.fixture
async def inference():
    return RamInference()


@pytest.fixture
async def client(tmp_path, inference):
    settings = ApiSettings(listen="127.0.0.1:0")
    with trio.fail_after(30):
        async with open_api(
            ListedNode(), settings, data_dir=tmp_path, peer_id=PEER, inference=inference
        ):
            yield LocalClient.find(tmp_path)


async def frames_of(requests, kind="generate", body=ASK):
    async with requests.ask(kind, body) as frames:
        return [frame async for frame in frames]


def text_of(frames) -> str:
    return "".join(each.line["response"] for each in frames if each.type == "delta")


async def test_an_answer_comes_delta_by_delta(client):
    async with client.connect() as requests:
        start, *deltas, done = await frames_of(requests)
        messages = [{"role": "user", "content": "hello"}]
        chat = await frames_of(requests, "chat", {"model": "tiny", "messages": messages})
    assert (start.type, start.node, start.backend) == ("start", "ram", "scripted")
    assert text_of(deltas) == SAID
    assert done.line["done_reason"] == "stop"
    assert chat[-1].line["message"]["role"] == "assistant"


async def test_many_answers_on_one_connection(client):
    found = []

    async def ask(requests):
        found.append(text_of(await frames_of(requests)))

    async with client.connect() as requests, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask, requests)
    assert found == [SAID] * 8


async def test_an_answer_that_is_longer_than_its_credits_comes_whole(client, inference):
    count = 5 * CREDITS + 3
    inference.parts = [*[Delta(text="x")] * count, Finish(reason="stop")]
    async with client.connect() as requests:
        assert text_of(await frames_of(requests)) == "x" * count


async def test_an_answer_that_is_not_read_holds_no_other(client, inference):
    given = 0

    async def endless():
        nonlocal given
        while True:
            given += 1
            yield Delta(text="x")

    class Endless(RamInference):
        async def _said(self, servers):
            servers.append(self._server(self.backends[0]))
            async for part in endless():
                yield part

    inference.__class__ = Endless
    inference.parts = [Finish(reason="stop")]
    async with client.connect() as requests, requests.ask("generate", ASK) as unread:
        assert (await anext(unread)).type == "start"
        while given <= CREDITS:
            await trio.lowlevel.checkpoint()
        inference.__class__, inference.parts = RamInference, None
        assert text_of(await frames_of(requests)) == SAID
        assert given == CREDITS + 1, "one waits for a credit"


async def test_leaving_early_stops_the_engine_and_the_connection_goes_on(client, inference):
    inference.backends = (scripted(token_s=0.02),)
    async with client.connect() as requests:
        async with requests.ask("generate", ASK) as frames:
            async for frame in frames:
                if frame.type == "delta":
                    break
        while not inference.backends[0].cancelled:
            await trio.lowlevel.checkpoint()
        inference.backends = (scripted(),)
        assert text_of(await frames_of(requests)) == SAID


async def test_places_in_the_queue_and_a_move_are_told(client, inference):
    inference.places = [QueuePlace(position=2, eta_s=1.5)]
    inference.backends = (scripted("first", fail_at=[3]), scripted("second"))
    async with client.connect() as requests:
        frames = await frames_of(requests)
    told = [frame for frame in frames if frame.type not in ("delta", "done")]
    assert [frame.type for frame in told if frame.type != "queue"] == ["start", "moved"]
    assert [frame.backend for frame in told[-2:]] == ["first", "second"]
    assert text_of(frames) == SAID
    assert frames[-1].line["omx_moved"] == 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"model": "none", "prompt": "x"}, ModelNotFound),
        ({"model": "tiny", "prompt": 7}, BadInput),
        ({"model": "tiny", "prompt": "x" * FRAME_BYTES_MAX}, BadInput),
    ],
)
async def test_what_is_wrong_is_raised_as_its_class(client, body, error):
    with pytest.raises(ExceptionGroup) as raised:
        async with client.connect() as requests:
            await frames_of(requests, body=body)
    assert type(first_named(raised.value)) is error


async def test_an_engine_in_trouble_is_network_trouble(client, inference):
    for trouble, cls in ((NoCandidate("tiny", "all busy"), NoCandidate), (None, NetworkTrouble)):
        inference.error = trouble
        inference.backends = (scripted(gone=True),)
        with pytest.raises(ExceptionGroup) as raised:
            async with client.connect() as requests:
                await frames_of(requests)
        assert type(first_named(raised.value)) is cls


def test_what_the_client_sends_at_most_is_what_the_node_takes():
    assert FRAME_BYTES_MAX == TAKEN_BYTES_MAX


async def test_a_node_that_ends_midway_is_said(tmp_path, inference):
    inference.backends = (scripted(token_s=0.05),)
    settings = ApiSettings(listen="127.0.0.1:0")
    stopping = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def serve(task_status):
                async with open_api(
                    RamNode(), settings, data_dir=tmp_path, peer_id=PEER, inference=inference
                ):
                    task_status.started()
                    await stopping.wait()

            await nursery.start(serve)
            client = LocalClient.find(tmp_path)

            async def read_and_stop():
                async with client.connect() as requests, requests.ask("generate", ASK) as frames:
                    async for frame in frames:
                        if frame.type == "delta":
                            stopping.set()

            with pytest.raises(ExceptionGroup) as raised:
                await read_and_stop()
        assert isinstance(first_named(raised.value), LocalTrouble)
        with pytest.raises(NodeNotRunning):
            async with client.connect():
                pass


async def test_what_listens_there_may_be_no_node():
    async def refuse(stream):
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, refuse, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(LocalTrouble, match="is not the node of"):
            async with LocalClient(f"127.0.0.1:{port}", "token").connect():
                pass
        nursery.cancel_scope.cancel()


async def test_where_nobody_listens_no_node_runs():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: nobody else gets the port meanwhile
        client = LocalClient(f"127.0.0.1:{taken.getsockname()[1]}", "token")
        for opened in (client.connect(), client.events()):
            with pytest.raises(NodeNotRunning):
                await opened.__aenter__()


@pytest.mark.parametrize("said", ["no json", '{"type": 7}', '{"id":"1","type":"delta"}'])
async def test_a_node_that_says_nonsense_is_not_believed(said):
    async def talk(request):
        socket = await request.accept()
        with suppress(ConnectionClosed):
            await socket.get_message()
            for _ in range(2 * CREDITS):  # of the last kind: more than the credits allow
                await socket.send_message(said)
            await socket.get_message()

    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_websocket, talk, "127.0.0.1", 0, None)

        async def read_late():
            async with (
                open_request_client(f"127.0.0.1:{server.port}") as requests,
                requests.ask("generate", ASK) as frames,
            ):
                await requests_end(requests)
                async for _ in frames:
                    pass

        with pytest.raises(ExceptionGroup) as raised:
            await read_late()
        assert "restart it" in str(first_named(raised.value))
        nursery.cancel_scope.cancel()


async def requests_end(requests) -> None:
    while requests._gone is None:
        await trio.lowlevel.checkpoint()


async def test_models_that_run_are_loaded_listed_and_unloaded(client, inference):
    server = await client.load("tiny", keep_alive="10m")
    assert (server.node, server.backend) == ("ram", "scripted")
    assert inference.loads == [("tiny", 600.0, inference.loads[0][2])]
    (running,) = await client.running_models()
    assert (running.model.name, running.model.expires_at) == ("tiny:latest", None)
    assert (running.server.node, running.model.context_length) == ("ram", 2048)
    await client.unload("tiny")
    assert await client.running_models() == ()
    with pytest.raises(ModelNotFound):
        await client.unload("none")
    with pytest.raises(BadInput):
        await client.load("tiny", keep_alive="soon")


async def test_texts_become_vectors(client):
    found, server = await client.embed("tiny", ["a", "b"], dimensions=3)
    assert [len(vector) for vector in found.vectors] == [3, 3]
    assert server.node == "ram"
    with pytest.raises(ModelNotFound):
        await client.embed("none", ["a"])


async def test_what_a_model_of_the_swarm_can_do(client):
    assert "chat" in await client.capabilities("tiny")
    assert await client.capabilities("VECTORS:latest") == ("embedding",)
    assert await client.capabilities("none") is None

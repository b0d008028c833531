"""Servers that answer nonsense, break off, fall silent or never end: one clear line each time, and
nothing is left behind. Real sockets on loopback.
"""

import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadConfig,
    BadRequest,
    ContextExceeded,
    ModelNotFound,
    NotSupported,
    OmxError,
)
from ollamamax_p2p.inference.backends import open_backends
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    Finish,
)
from ollamamax_p2p.inference.ollama import open_ollama
from ollamamax_p2p.inference.openai_compatible import open_openai
from ollamamax_p2p.inference.settings import InferenceSettings, OpenAIServer
from tests.content.model_files import check_one_line
from tests.inference.processes import open_files

pytestmark = pytest.mark.network

KEY = "sk-very-secret"
SETTINGS = InferenceSettings(stall_timeout_s=0.3, load_timeout_s=0.6, ollama_url="")
REQUEST = ChatRequest(model="m", messages=(ChatMessage(role="user", content="Hi"),))
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","owned_by":"test"}]}'

Behaviour = Callable[[trio.SocketStream], Awaitable[None]]


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def chunked(*parts: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def says(data: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(data)

    return behave


async def resets(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def hangs(_stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


def then_hangs(data: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(data)
        await trio.sleep_forever()

    return behave


def never_ends(begin: bytes, more: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(begin)
        while True:
            await stream.send_all(more)

    return behave


@asynccontextmanager
async def server(behave: Behaviour) -> AsyncIterator[str]:
    """Answers /v1/models well, and everything else as it is told."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                request = b""
                while b"\r\n\r\n" not in request:
                    data = await stream.receive_some()
                    if not data:
                        return
                    request += data
                if request.startswith(b"GET /v1/models "):
                    await stream.send_all(answer(MODELS, headers="Connection: close\r\n"))
                    return
                await behave(stream)
            except trio.BrokenResourceError:
                pass  # the client has had enough, as it should

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def openai(url: str, **settings):
    to = OpenAIServer(url=f"{url}/v1", key=KEY, name="test")
    async with open_openai(to, replace(SETTINGS, **settings)) as backend:
        yield backend


@asynccontextmanager
async def ollama(url: str, **settings):
    async with open_ollama(replace(SETTINGS, **settings), url) as backend:
        yield backend


async def failure_of(backend) -> OmxError:
    with pytest.raises(OmxError) as caught:
        async with backend.answer(REQUEST) as parts:
            [part async for part in parts]
    check_one_line(caught.value)
    assert KEY not in str(caught.value)
    return caught.value


GOOD = b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n'
LINE = b'{"message":{"role":"assistant","content":"Hi"},"done":false}\n'
DEEP = b"data: " + b"[" * 200_000 + b"\n\n"

BROKEN = [
    pytest.param(says(b"\x00\x01garbage" * 50), BackendFailed, id="garbage"),
    pytest.param(says(b""), BackendUnavailable, id="closes"),
    pytest.param(resets, BackendUnavailable, id="resets"),
    pytest.param(hangs, BackendUnavailable, id="hangs"),
    pytest.param(says(answer(b"oh no", "500 Oh No")), BackendFailed, id="500"),
    pytest.param(says(answer(b"", "500 Oh No")), BackendFailed, id="500-empty"),
    pytest.param(says(answer(b"later", "503 Later")), BackendUnavailable, id="503"),
    pytest.param(says(answer(b"", "302 Away", "Location: http://x/\r\n")), BackendFailed, id="302"),
    pytest.param(
        says(answer(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")), BackendFailed, id="gzip"
    ),
    pytest.param(says(answer(b"data: {nonsense\n\n")), BackendFailed, id="no-json"),
    pytest.param(
        says(answer(b'data: {"choices": 5}\n\n{"message": 5}\n')), BackendFailed, id="wrong-types"
    ),
    pytest.param(says(answer(DEEP + DEEP[6:])), BackendFailed, id="deep"),
    pytest.param(says(answer(b"")), BackendUnavailable, id="empty"),
    pytest.param(
        never_ends(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536), BackendFailed, id="no-line-ends"
    ),
    pytest.param(
        never_ends(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1_000), BackendFailed, id="no-head-ends"
    ),
]


@pytest.mark.parametrize(("behave", "error"), BROKEN)
@pytest.mark.parametrize("opened", [openai, ollama])
async def test_a_broken_server_gives_one_clear_line_and_leaves_nothing(opened, behave, error):
    files = open_files()
    with trio.fail_after(60):
        async with server(behave) as url, opened(url) as backend:
            assert isinstance(await failure_of(backend), error)
            assert backend._busy == {}
    assert open_files() == files


EACH = pytest.mark.parametrize(
    ("opened", "part"), [(openai, GOOD), (ollama, LINE)], ids=["openai", "ollama"]
)


@EACH
@pytest.mark.parametrize(
    ("ending", "words"), [(then_hangs, "silent"), (says, "ended before|broke")]
)
async def test_a_server_that_stops_midway_is_given_up(opened, part, ending, words):
    files = open_files()
    with trio.fail_after(60):
        async with (
            server(ending(chunked(part))) as url,
            opened(url) as backend,
            backend.answer(REQUEST) as parts,
        ):
            assert (await anext(parts)).text == "Hi"
            with pytest.raises(BackendUnavailable, match=words):
                await anext(parts)
    assert open_files() == files


@EACH
async def test_an_answer_that_never_ends_can_be_left(opened, part):
    files = open_files()
    with trio.fail_after(60):
        behave = never_ends(chunked(part), chunked(part).partition(b"\r\n\r\n")[2])
        async with (
            server(behave) as url,
            opened(url) as backend,
            backend.answer(REQUEST) as parts,
        ):
            for _ in range(1_000):
                assert (await anext(parts)).text == "Hi"
    assert open_files() == files


async def test_an_error_midway_is_an_error():
    error = b'data: {"error":{"message":"out of memory","code":500}}\n\n'
    async with server(says(chunked(GOOD, error, b""))) as url, openai(url) as backend:
        assert "out of memory" in str(await failure_of(backend))
    error = b'{"error":"out of memory"}\n'
    async with server(says(chunked(LINE, error, b""))) as url, ollama(url) as backend:
        assert "out of memory" in str(await failure_of(backend))


REFUSALS = [
    (openai, "401 No", f"bad key {KEY}", BackendUnavailable),
    (openai, "400 No", f"no: {KEY}", BadRequest),
    (openai, "400 No", "maximum context length is 5", ContextExceeded),
    (openai, "404 No", "no such model", ModelNotFound),
    (ollama, "404 No", "model 'm' not found", ModelNotFound),
    (ollama, "400 No", '"m" does not support tools', NotSupported),
    (ollama, "400 No", "bad option", BadRequest),
    (ollama, "500 No", "the input length exceeds the context length", ContextExceeded),
]


@pytest.mark.parametrize(("opened", "status", "text", "error"), REFUSALS)
async def test_a_refusal_keeps_its_meaning_and_tells_no_key(opened, status, text, error):
    told = text if opened is ollama else {"message": text}
    body = json.dumps({"error": told}).encode()
    async with server(says(answer(body, status))) as url, opened(url) as backend:
        assert isinstance(await failure_of(backend), error)


async def test_tool_calls_come_whole_from_an_event_stream():
    def call(**function) -> bytes:
        delta = {"tool_calls": [{"index": 0, "id": "c1", "function": function}]}
        return b"data: %s\n\n" % json.dumps({"choices": [{"delta": delta}]}).encode()

    ended = b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    parts = (call(name="now"), call(arguments='{"city":'), call(arguments=' "Paris"}'), ended, b"")
    async with server(says(chunked(*parts))) as url, openai(url) as backend:
        async with backend.answer(REQUEST) as stream:
            delta, finish = [part async for part in stream]
        assert delta.tool_calls[0].name == "now"
        assert delta.tool_calls[0].arguments == {"city": "Paris"}
        assert isinstance(finish, Finish)
    parts = (call(name="now", arguments="{nonsense"), ended, b"")
    async with server(says(chunked(*parts))) as url, openai(url) as backend:
        assert isinstance(await failure_of(backend), BackendFailed)


async def test_vectors_that_are_none_are_refused():
    for body in (b'{"data":[]}', b'{"data":[{"embedding":["x"]}]}', b'{"embeddings":[]}', b"[]"):
        for opened in (openai, ollama):
            async with server(says(answer(body))) as url, opened(url) as backend:
                with pytest.raises(BackendFailed):
                    await backend.embed(EmbedRequest(model="m", inputs=("a",)))


async def test_nobody_there_is_said_with_the_address():
    with trio.socket.socket() as closed:
        await closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        async with ollama(f"http://{address}") as backend:
            with pytest.raises(BackendUnavailable, match=address) as caught:
                await backend.check()
            check_one_line(caught.value)


async def test_a_node_of_ours_is_no_ollama_for_another():
    own = says(answer(b"Ollama is running", headers="Server: omx\r\n"))
    async with server(own) as url, open_ollama(SETTINGS, url, maybe=True) as backend:
        with pytest.raises(BackendUnavailable, match="node"):
            await backend.check()
        assert await backend.models() == ()


async def test_a_node_does_not_take_itself_for_an_ollama():
    own = "http://127.0.0.1:11434"
    here = ["0.0.0.0:11434"]
    settings = replace(SETTINGS, ollama_url="auto")
    async with open_backends(settings, RamStore(), own_addresses=here) as backends:
        assert backends == ()
    async with open_backends(settings, RamStore()) as backends:
        assert [backend.name for backend in backends] == ["ollama"]
    with pytest.raises(BadConfig, match="itself"):
        async with open_backends(replace(settings, ollama_url=own), RamStore(), own_addresses=here):
            pass


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://u:p@x/v1", "x", "http://x:y/"])
async def test_a_url_that_is_none_is_a_bad_setting_and_shows_no_password(url):
    server = OpenAIServer(url=url, key=KEY, name="test")
    assert KEY not in repr(server)
    with pytest.raises(BadConfig) as caught:
        async with open_openai(server, SETTINGS):
            pass
    assert "u:p" not in str(caught.value)

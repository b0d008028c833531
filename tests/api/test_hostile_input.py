"""Whatever is sent to the API, and whatever answers in its place: only named errors."""

import json
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from ollamamax_p2p.api import LocalClient, bodies
from ollamamax_p2p.api.guard import is_loopback_host
from ollamamax_p2p.api.node_routes import REQUEST_BODIES
from ollamamax_p2p.errors import BadInput, LocalTrouble, NodeNotRunning, OmxError


def request_with(raw: bytes) -> Request:
    async def receive():
        return {"type": "http.request", "body": raw, "more_body": False}

    return Request({"type": "http", "headers": []}, receive)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["model", "source", "path", "uses", "expires_s", "to", "modelfile"])


@given(
    st.sampled_from(sorted(REQUEST_BODIES)),
    st.binary(max_size=300)
    | st.builds(
        lambda value: json.dumps(value).encode(),
        st.dictionaries(FIELDS, JSON, max_size=4) | JSON,
    ),
)
def test_no_body_raises_anything_but_bad_input(endpoint, raw):
    async def read():
        with suppress(BadInput):
            body = await bodies.read_body(request_with(raw), REQUEST_BODIES[endpoint])
            assert isinstance(body, REQUEST_BODIES[endpoint])

    trio.run(read)


@given(st.text(max_size=60))
def test_no_host_header_raises(host):
    assert is_loopback_host(host) in (True, False)


@given(st.binary(max_size=200), st.binary(max_size=100))
def test_no_leftover_file_raises_anything_but_our_errors(tmp_path_factory, node, token):
    folder = tmp_path_factory.mktemp("node")
    for name, raw in (("node.json", node), ("api-token", token)):
        (folder / name).write_bytes(raw)
        (folder / name).chmod(0o600)
    with pytest.raises(OmxError):
        LocalClient.find(folder)


@pytest.mark.network
@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"\x00\xff" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nnope!",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nnope\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 500 X\r\nContent-Length: 13\r\n\r\n{"error":"x"}',
    ],
)
async def test_another_program_on_the_port_is_told_as_such(nursery, answer):
    async def serve(stream):
        await stream.receive_some()
        with suppress(trio.BrokenResourceError):
            await stream.send_all(answer)
            await stream.aclose()

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    client = LocalClient(f"127.0.0.1:{listener.socket.getsockname()[1]}", "t")
    with trio.fail_after(10):
        with pytest.raises((LocalTrouble, NodeNotRunning)):
            await client.status()
        with pytest.raises((LocalTrouble, NodeNotRunning)):
            await client.pull("x")

"""Host, Origin, token, and bodies that are not what they should be."""

import json
import socket
from dataclasses import replace

import pytest
import trio
from trio_websocket import HandshakeError, open_websocket_url

from ollamamax_p2p.api.bodies import BODY_BYTES_MAX
from ollamamax_p2p.api.guard import is_loopback_host
from tests.api.ram_node import RamNode
from tests.api.store_node import serving

pytestmark = pytest.mark.network


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11435", "192.168.1.7:11435", ""])
async def test_a_foreign_host_gets_an_empty_403(served, host):
    status, _, body = await served.raw("GET", "/omx/v1/status", host=host)
    assert (status, body) == (403, b"")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", ""])
async def test_a_foreign_origin_gets_an_empty_403(served, origin):
    status, _, body = await served.raw("GET", "/omx/v1/status", origin=origin)
    assert (status, body) == (403, b"")


@pytest.mark.parametrize(
    ("origin", "may"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://0.0.0.0:1", True),
        ("app://obsidian.md", True),
        ("vscode-webview://abc", True),
        ("tauri://localhost", True),
        ("HTTP://LOCALHOST", True),
        ("https://a.example.org", True),
        ("https://example.org", False),
        ("chrome-extension://abc", True),
        ("moz-extension://abc", False),
        ("http://localhost.evil.example", False),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_pages_may_use_ollamas_paths_as_ollama_allows(tmp_path, method, origin, may):
    patterns = ("https://*.example.org", "chrome-extension://*")
    async with serving(RamNode(), tmp_path, origins=patterns) as served:
        status, headers, body = await served.raw(method, "/api/version", origin=origin)
    assert status == ((200 if method == "GET" else 204) if may else 403)
    assert headers.get("access-control-allow-origin") == (origin if may else None)
    assert may or not body


async def test_a_star_lets_every_page_in_but_not_to_what_is_ours(tmp_path):
    async with serving(RamNode(), tmp_path, origins=("*",)) as served:
        origin = "https://evil.example"
        status, headers, _ = await served.raw("GET", "/api/version", origin=origin)
        assert (status, headers["access-control-allow-origin"]) == (200, "*")
        assert "vary" not in headers
        _, preflight, _ = await served.raw("OPTIONS", "/api/chat", origin=origin)
        assert preflight["access-control-allow-origin"] == "*"
        assert (await served.raw("GET", "/omx/v1/status", origin=origin))[0] == 403


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("localhost:11434", True),
        ("127.0.0.1", True),
        ("[::1]:11434", True),
        ("192.168.1.7:11434", True),
        ("10.0.0.1", True),
        ("0.0.0.0:1", True),
        ("gpu.local", True),
        ("x.internal:80", True),
        ("models.example.org", True),
        ("8.8.8.8", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("local", False),
    ],
)
async def test_the_host_is_checked_for_ollamas_paths_too(tmp_path, host, may):
    async with serving(RamNode(), tmp_path, hosts=("models.example.org",)) as served:
        status, _, body = await served.raw("GET", "/api/version", host=host)
        assert (status, bool(body)) == ((200, True) if may else (403, False))
        # A page that is served under a name of its own cannot rebind it to us either.
        origin = f"http://{host}"
        rebound, _, _ = await served.raw("GET", "/api/version", host=host, origin=origin)
        assert (rebound == 200) is may
        named = may and not host[0].isdigit() and host[0] != "["
        status, _, _ = await served.raw("OPTIONS", "/api/version", host=host)
        assert status == (204 if named else 405 if may else 403)


async def test_two_hosts_are_none(served):
    host, _, port = served.server.address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nhost: evil.example\r\n\r\n")
        status = int((await stream.receive_some()).split()[1])
    assert status in (400, 403)


async def test_the_second_port_has_ollamas_paths_and_nothing_of_ours(tmp_path):
    async with serving(RamNode(), tmp_path, ollama_listen="127.0.0.1:0") as served:
        first, second = served.server.address, served.server.ollama_address
        assert first != second
        beside = replace(served, server=replace(served.server, address=second))
        assert (await beside.raw("GET", "/"))[2] == b"Ollama is running"
        for path in ("/omx/v1/status", "/omx/v1/version", "/omx/v1/events"):
            assert (await beside.raw("GET", path))[::2] == (404, b"404 page not found")
        assert (await served.raw("GET", "/omx/v1/version"))[0] == 200


async def test_a_second_port_that_another_holds_is_left_to_it(tmp_path, caplog):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = f"127.0.0.1:{holder.getsockname()[1]}"
        async with serving(RamNode(), tmp_path, ollama_listen=taken) as served:
            assert served.server.ollama_address == ""
            assert (await served.raw("GET", "/"))[0] == 200
    assert "is not served on" in caplog.text


async def test_our_own_origin_and_localhost_are_answered(served):
    own = f"http://{served.server.address}"
    assert (await served.raw("GET", "/omx/v1/status", origin=own))[0] == 200
    port = served.server.address.rpartition(":")[2]
    assert (await served.raw("GET", "/omx/v1/status", host=f"localhost:{port}"))[0] == 200


@pytest.mark.parametrize(
    ("header", "value"),
    [("Origin", "https://evil.example"), ("Host", "evil.example"), ("Authorization", "Bearer no")],
)
async def test_a_websocket_handshake_passes_the_same_guard(served, header, value):
    token = f"Bearer {served.server.token}"
    headers = {"Authorization": token} | ({header: value} if header != "Host" else {})
    # trio-websocket takes the Host header from the URL; the name resolves here, as in a rebinding.
    url = f"ws://{served.server.address}/omx/v1/events"
    if header == "Host":
        status, _, body = await served.raw(
            "GET",
            "/omx/v1/events",
            host="evil.example",
            connection="Upgrade",
            upgrade="websocket",
            sec_websocket_version="13",
            sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==",
            content_length=None,
        )
        assert (status, body) == (403, b"")
        return
    extra = [(name.encode(), text.encode()) for name, text in headers.items()]
    with pytest.raises(HandshakeError) as refused:
        async with open_websocket_url(url, extra_headers=extra):
            pass
    assert refused.value.status_code == (401 if header == "Authorization" else 403)


@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", "Bearer", "Basic x", b"Bearer \xff"]
)
async def test_without_the_token_nothing_is_answered(served, authorization):
    for method, path in (("GET", "/omx/v1/status"), ("POST", "/omx/v1/stop"), ("GET", "/omx/x")):
        status, _, body = await served.raw(method, path, authorization=authorization)
        assert status == 401
        assert json.loads(body)["code"] == "unauthorized"
    assert not served.node.stop_asked.is_set()


async def test_the_root_and_the_version_are_open(served):
    status, _, body = await served.raw("GET", "/", authorization=None)
    assert (status, body) == (200, b"Ollama is running")
    status, _, body = await served.raw("GET", "/omx/v1/version", authorization=None)
    assert (status, json.loads(body)) == (200, {"version": "0.1.0"})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "missing request body"),
        (b"{", "truncated"),
        (b"\xff\xfe", "request body"),
        (b'{"model": 7}', "$.model"),
        (b'{"model": ""}', "$.model"),
        (b'{"modle": "x"}', "modle"),
        (b"[" * 100_000, "request body"),
        (b'{"model": "' + b"x" * 2_000 + b'"}', "$.model"),
    ],
)
async def test_a_bad_body_gets_one_line_and_400(served, body, problem):
    status, _, answer = await served.raw("POST", "/omx/v1/models/show", body)
    found = json.loads(answer)
    assert (status, found["code"]) == (400, "bad_input")
    assert problem in found["error"]
    assert "\n" not in found["error"]


async def test_a_body_beyond_the_limit_gets_413(served):
    length = str(BODY_BYTES_MAX + 1)
    status, _, _ = await served.raw("POST", "/omx/v1/create", content_length=length)
    assert status == 413


async def test_a_relative_path_is_refused(served):
    body = b'{"path": "a.gguf", "model": "x"}'
    status, _, answer = await served.raw("POST", "/omx/v1/import", body)
    assert status == 400
    assert "absolute" in json.loads(answer)["error"]


async def test_unknown_paths_and_methods_are_answered_in_json(served):
    status, _, answer = await served.raw("GET", "/omx/v1/nothing")
    assert (status, json.loads(answer)["code"]) == (404, "not_found")
    status, _, answer = await served.raw("GET", "/omx/v1/pull")
    assert (status, json.loads(answer)["code"]) == (405, "bad_input")


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("LOCALHOST.:80", True),
        ("omx.localhost:1", True),
        ("127.1.2.3:9", True),
        ("[::1]:11435", True),
        ("::1", True),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("0.0.0.0:1", False),
        ("[::1", True),
        ("a b", False),
    ],
)
def test_which_hosts_are_this_machine(host, is_ours):
    assert is_loopback_host(host) is is_ours

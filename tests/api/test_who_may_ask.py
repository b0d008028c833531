"""Host, Origin, token, and bodies that are not what they should be."""

import json

import pytest
from trio_websocket import HandshakeError, open_websocket_url

from ollamamax_p2p.api.bodies import BODY_BYTES_MAX
from ollamamax_p2p.api.guard import is_loopback_host

pytestmark = pytest.mark.network


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11435", "192.168.1.7:11435", ""])
async def test_a_foreign_host_gets_an_empty_403(served, host):
    status, _, body = await served.raw("GET", "/omx/v1/status", host=host)
    assert (status, body) == (403, b"")


@pytest.mark.parametrize("path", ["/", "/omx/v1/status"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", ""])
async def test_a_foreign_origin_gets_an_empty_403(served, path, origin):
    status, _, body = await served.raw("GET", path, origin=origin)
    assert (status, body) == (403, b"")


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
    for method, path in (("GET", "/omx/v1/status"), ("POST", "/omx/v1/stop"), ("GET", "/none")):
        status, _, body = await served.raw(method, path, authorization=authorization)
        assert status == 401
        assert json.loads(body)["code"] == "unauthorized"
    assert not served.node.stop_asked.is_set()


async def test_the_root_and_the_version_are_open(served):
    status, _, body = await served.raw("GET", "/", authorization=None)
    assert (status, body) == (200, b"omx is running")
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

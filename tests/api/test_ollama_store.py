"""The store half of Ollama's surface: byte for byte, and by what clients and strangers send."""

import hashlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamamax_p2p.api import ollama_store_routes
from ollamamax_p2p.api.ollama_framing import decoded
from ollamamax_p2p.api.ollama_store_requests import CopyRequest, CreateRequest, ShowRequest
from ollamamax_p2p.content import CreationRequest, RamStore, check_creation_request
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.manifest import CONFIG_TYPE, Layer, build_manifest
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import BadInput, ModelNotFound, SwarmChanging
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.transfer import PullProgress
from tests.api.ram_node import WRITTEN, progress
from tests.api.store_node import StoreNode, serving
from tests.content.model_files import gguf_file

pytestmark = pytest.mark.network

VECTORS = json.loads(
    (Path(__file__).parents[1] / "vectors" / "ollama-api" / "store.json").read_text()
)
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "tokenizer.ggml.tokens": ["<s>", "b"],
}
GGUF = gguf_file({"output.weight": bytes(1500)}, METADATA)
HELLO = digest_of(b"hello")


async def scripted(name, tell):
    tell(PullProgress(status="pulling manifest"))
    await trio.lowlevel.checkpoint()
    if name == "nope":
        raise ModelNotFound(name)
    for completed in (0, 40, 100):
        tell(progress(completed))
        # Who reads has to come in between: what it has not read is replaced by what is newer.
        await trio.testing.wait_all_tasks_blocked(0.01)
    digest = progress(100).digest
    tell(PullProgress(status="verifying sha256 digest", digest=digest, total=100, completed=100))
    tell(PullProgress(status="verifying sha256 digest"))
    tell(PullProgress(status="writing manifest"))
    tell(PullProgress(status="success"))


async def node_with_a_model(**changes) -> StoreNode:
    node = StoreNode(script=scripted, **changes)
    digest = await node.store.put(GGUF)
    request = CreationRequest(
        files={"tiny.gguf": digest},
        template="{{ .Prompt }}",
        system="Be <b>rief & kind.",
        parameters={"temperature": 0.7, "num_ctx": 4096},
    )
    await node.create_from_request("tiny", request)
    return node


@pytest.fixture
async def served(tmp_path):
    async with serving(await node_with_a_model(), tmp_path) as found:
        yield found


@pytest.mark.parametrize("vector", VECTORS, ids=[each["name"] for each in VECTORS])
async def test_an_answer_has_the_bytes_of_ollamas(served, vector, caplog):
    request = vector["request"]
    headers = {"authorization": None} | request.get("headers", {})
    status, found, body = await served.raw(
        request["method"], request["path"], request.get("body", "").encode(), **headers
    )
    assert (status, body.decode()) == (vector["status"], vector["body"])
    assert {name: found.get(name) for name in vector["headers"]} == vector["headers"]
    assert not set(vector.get("absent", ())) & set(found)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# -- tags over the swarm -----------------------------------------------------------------------


class Swarm:
    """What others in the swarm can run."""

    def __init__(self, *models: ServableModel) -> None:
        self.models = models

    async def swarm_models(self):
        from ollamamax_p2p.api.served_inference import SwarmModel

        return tuple(SwarmModel(model=model, holders=()) for model in self.models)


async def test_tags_are_those_of_the_swarm_and_of_this_store_newest_first(tmp_path):
    now = WRITTEN.timestamp()
    digest = digest_of(b"manifest")
    swarm = Swarm(
        ServableModel(name="newer:1b", digest=digest, size=5, modified_at=now + 0.5, family="phi"),
        ServableModel(name="Tiny:latest", modified_at=now + 9),  # ours, and others have it too
        ServableModel(name="older:latest", modified_at=now - 1, capabilities=("tools",)),
    )
    async with serving(await node_with_a_model(), tmp_path, inference=swarm) as served:
        _, _, body = await served.raw("GET", "/api/tags")
        models = json.loads(body)["models"]
    assert [each["name"] for each in models] == ["newer:1b", "tiny:latest", "older:latest"]
    assert models[0] == {
        "name": "newer:1b",
        "model": "newer:1b",
        "modified_at": "2026-11-20T12:00:00.5Z",
        "size": 5,
        "digest": digest.removeprefix("sha256:"),
        "details": {
            "parent_model": "",
            "format": "",
            "family": "phi",
            "families": ["phi"],
            "parameter_size": "",
            "quantization_level": "",
        },
    }
    assert models[2]["capabilities"] == ["tools"]


async def test_between_two_swarms_there_are_the_tags_of_this_store(tmp_path):
    class Nowhere(Swarm):
        async def swarm_models(self):
            raise SwarmChanging

    async with serving(await node_with_a_model(), tmp_path, inference=Nowhere()) as served:
        status, _, body = await served.raw("GET", "/api/tags")
    assert (status, len(json.loads(body)["models"])) == (200, 1)


# -- uploads -----------------------------------------------------------------------------------


async def test_a_blob_comes_in_pieces_of_unknown_number(served):
    head = f"POST /api/blobs/{HELLO} HTTP/1.1\r\nHost: x.localhost\r\nConnection: close\r\n"
    pieces = b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n", b"3\r\nllo\r\n", b"0\r\n\r\n"
    host, _, port = served.server.address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(head.encode())
        for piece in pieces:
            await stream.send_all(piece)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 201 ")
    assert await served.node.store.has(HELLO)


async def test_an_upload_that_breaks_off_leaves_nothing_and_the_next_succeeds(served):
    host, _, port = served.server.address.rpartition(":")
    head = f"POST /api/blobs/{HELLO} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhel"
    ended = trio.Event()
    receive = served.node.store.receive

    async def watched(*args, **kwargs):
        try:
            await receive(*args, **kwargs)
        finally:
            ended.set()

    served.node.store.receive = watched
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(head.encode())
    await ended.wait()
    assert not await served.node.store.has(HELLO)
    status, _, _ = await served.raw("POST", f"/api/blobs/{HELLO}", b"hello")
    assert status == 201


async def test_a_hundred_gigabytes_on_a_small_disk_are_refused_before_they_are_sent(tmp_path):
    node = StoreNode(store=RamStore(capacity_bytes=1_000_000))
    async with serving(node, tmp_path) as served:
        length = str(100 * 10**9)
        status, _, body = await served.raw("POST", f"/api/blobs/{HELLO}", content_length=length)
        assert (status, "not enough room" in json.loads(body)["error"]) == (500, True)
        # Who does not say how much it is gets as far as the room.
        big = bytes(1_000_001)
        status, _, body = await served.raw("POST", f"/api/blobs/{digest_of(big)}", big)
        assert status == 500
    assert await node.store.blobs() == []


@pytest.mark.parametrize(
    "digest",
    [
        "sha256-" + "a" * 63 + "/",
        "sha256:" + "../" * 21 + "a",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "sha256:" + "g" * 64,
        "sha256:" + "a" * 64 + "%00",
        "sha512:" + "a" * 64,
    ],
)
@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_a_digest_that_leads_elsewhere_is_none(served, method, digest):
    status, _, _ = await served.raw(method, f"/api/blobs/{digest}", b"x" * (method == "POST"))
    assert status in (307, 400, 404)  # 307: a slash at the end is taken off, as by Ollama
    assert len(await served.node.store.blobs()) == 5  # the model's


async def test_an_upload_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ollama_store_routes, "PART_TIMEOUT_S", 0.01)
    monkeypatch.setattr(ollama_store_routes, "DRAINED_S", 0.01)
    async with serving(StoreNode(), tmp_path) as served:
        status, _, _ = await served.raw("POST", f"/api/blobs/{HELLO}", content_length="5")
    assert status == 408


async def test_what_still_comes_of_a_refused_upload_is_taken_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(ollama_store_routes, "DRAINED_BYTES_MAX", 1000)
    async with serving(StoreNode(), tmp_path) as served:
        host, _, port = served.server.address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            head = (
                "POST /api/blobs/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
            )
            await stream.send_all(head.encode() + bytes(2000))
            received = b""
            while part := await stream.receive_some():
                received += part
    assert b" 400 " in received
    assert received.endswith(b'{"error":"invalid digest format"}')


async def test_a_remote_model_is_refused_as_where_the_cloud_is_off(served):
    config = b'{"remote_host": "https://ollama.com", "remote_model": "big"}'
    layer = Layer(CONFIG_TYPE, await served.node.store.put(config), len(config))
    await served.node.store.put_manifest(parse_model_name("far"), build_manifest(layer, []))
    status, _, body = await served.raw("POST", "/api/show", b'{"model": "far"}')
    problem = "ollama cloud is disabled: remote model details are unavailable"
    assert (status, json.loads(body)) == (403, {"error": problem})


# -- what may be in a body ---------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = [
    "model", "name", "stream", "from", "files", "adapters", "template", "license", "system",
    "parameters", "messages", "renderer", "parser", "requires", "info", "quantize", "draft_files",
    "source", "destination", "insecure", "verbose", "options", "username", "remote_host",
]  # fmt: skip
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6)


@given(body=BODIES)
@settings(max_examples=300, deadline=None)
def test_a_body_of_any_types_is_read_or_refused(body):
    raw = json.dumps(body).encode()
    for wanted in (CreateRequest, CopyRequest, ShowRequest):
        with suppress(BadInput):
            read = decoded(raw, wanted)
            if isinstance(read, CreateRequest):
                check_creation_request(read.asked())


@given(
    bodies=st.lists(
        st.tuples(st.sampled_from(["show", "create", "copy", "delete", "push", "pull"]), BODIES),
        min_size=40,
        max_size=40,
    )
)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_body_is_answered_by_a_fault_of_ours(bodies):
    async def ask(folder: Path) -> None:
        async with serving(await node_with_a_model(), folder) as served:
            for path, body in bodies:
                method = "DELETE" if path == "delete" else "POST"
                raw = json.dumps({"model": "tiny"} | body).encode()
                status, found, answer = await served.raw(method, f"/api/{path}", raw)
                assert "internal error" not in answer.decode()
                assert status in (200, 400, 403, 404, 500)
                if "json" in found.get("content-type", ""):
                    for line in answer.splitlines():
                        json.loads(line)

    with tempfile.TemporaryDirectory() as folder:
        trio.run(ask, Path(folder))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/show"),
        ("POST", "/api/create"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/copy"),
    ],
)
@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"\xff", b'"x"', b"{}x", b'{"model": "' + b"x" * 70_000]
)
async def test_a_body_that_is_no_object_is_a_bad_request(served, method, path, body):
    status, headers, answer = await served.raw(method, path, body)
    assert (status, headers["content-type"]) == (400, "application/json; charset=utf-8")
    assert set(json.loads(answer)) == {"error"}


async def test_a_client_that_goes_ends_its_push(served):
    began, ended = trio.Event(), trio.Event()

    async def push(name, *, insecure=False, on_progress=None):
        on_progress(PullProgress(status="retrieving manifest"))
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    served.node.push = push
    host, _, port = served.server.address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        body = b'{"model": "tiny"}'
        head = f"POST /api/push HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        await stream.send_all(head.encode() + body)
        await began.wait()
    await ended.wait()


async def test_two_clients_that_pull_one_model_share_the_pull(served):
    found = []

    async def pull():
        found.append(await served.raw("POST", "/api/pull", b'{"model": "other"}'))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull)
        nursery.start_soon(pull)
    assert served.node.pulls_begun == 1
    assert all(body.endswith(b'{"status":"success"}\n') for _, _, body in found)


# -- the client that everybody has -------------------------------------------------------------

CLIENT = """
import json, sys
from pathlib import Path
import ollama
host, path = sys.argv[1:]
client = ollama.Client(host=host)
digest = client.create_blob(path)
made = [each.status for each in client.create(
    "mine", files={"m.gguf": digest}, system="Hi", parameters={"top_k": 3}, stream=True)]
one = client.create("mine2", from_="mine", license=["MIT"], template="{{ .Prompt }}")
shown = client.show("mine2")
client.copy("mine", "mine3")
names = [each.model for each in client.list().models]
client.delete("mine3")
pulled = [each.status for each in client.pull("other", stream=True)]
pushed = [each.status for each in client.push("mine", stream=True)]
try:
    client.show("nope")
except ollama.ResponseError as error:
    refused = [error.status_code, error.error]
print(json.dumps({
    "digest": digest, "made": made, "one": one.status, "license": shown.license,
    "family": shown.details.family, "info": shown.modelinfo["general.architecture"],
    "capabilities": shown.capabilities, "names": sorted(names), "left": len(client.list().models),
    "pulled": pulled[0], "pushed": pushed, "refused": refused,
    "pull": client.pull("other").status, "push": client.push("mine").status}))
"""


@pytest.mark.counterpart
async def test_the_python_client_drives_every_method_it_has(served, tmp_path):
    pytest.importorskip("ollama", reason="needs ollama: pip install ollama")
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF)
    run = await trio.run_process(
        [sys.executable, "-c", CLIENT, f"http://{served.server.address}", str(path)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env={**os.environ, "NO_PROXY": "*"},
    )
    assert run.returncode == 0, run.stderr.decode()
    found = json.loads(run.stdout)
    assert found["digest"] == "sha256:" + hashlib.sha256(GGUF).hexdigest()
    assert found["made"][0] == "parsing GGUF"
    assert found["made"][-2:] == ["writing manifest", "success"]
    assert (found["one"], found["pull"], found["push"]) == ("success", "success", "success")
    assert (found["license"], found["family"], found["info"]) == ("MIT", "llama", "llama")
    assert found["capabilities"] == ["completion"]
    assert found["names"] == ["mine2:latest", "mine3:latest", "mine:latest", "tiny:latest"]
    assert found["left"] == 3
    assert found["pulled"] == "pulling manifest"
    assert found["pushed"][0] == "retrieving manifest"
    assert found["pushed"][-1] == "success"
    assert found["refused"] == [404, "model 'nope' not found"]
    assert served.node.origin.manifests[parse_model_name("mine").key].size > 0

"""Pushes to registries that misbehave in one way each."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import h11
import pytest
import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.manifest import CONFIG_TYPE, MODEL_TYPE, Layer, build_manifest
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import BadName, BlobNotFound, OriginRefused, OriginUnavailable
from ollamamax_p2p.transfer import registry_push
from ollamamax_p2p.transfer.registry_origin import open_registry_origin
from ollamamax_p2p.transfer.settings import OriginSettings

pytestmark = pytest.mark.network

BLOB = random.Random(5).randbytes(70_000)
DIGEST, CONFIG = digest_of(BLOB), b"{}"
MANIFEST = build_manifest(
    Layer(CONFIG_TYPE, digest_of(CONFIG), len(CONFIG)), [Layer(MODEL_TYPE, DIGEST, len(BLOB))]
)


@dataclass
class Registry:
    """A registry in memory; `before` may answer instead of it: status, headers, or None."""

    port: int = 0
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    before: Callable[[str, str, dict[str, str]], tuple[int, dict[str, str]] | None] | None = None
    torn_after: int = 0
    """The next long body is cut off after so many bytes, which are kept."""
    begun: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        async with stream:
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Request):
                    request, body = event, bytearray()
                elif isinstance(event, h11.Data):
                    body += event.data
                    if self.torn_after and len(body) > self.torn_after:
                        self.keep_torn(request, body)
                        return
                elif isinstance(event, h11.EndOfMessage):
                    status, headers = self.answer(request, bytes(body))
                    length = {} if status == 204 else {"content-length": "0"}
                    sent = [*(length | headers).items()]
                    data = http.send(h11.Response(status_code=status, headers=sent))
                    await stream.send_all(data + http.send(h11.EndOfMessage()))
                    if http.our_state is h11.MUST_CLOSE:
                        return
                    http.start_next_cycle()
                else:
                    return

    def keep_torn(self, request: h11.Request, body: bytearray) -> None:
        self.uploads[_key(request.target.decode())] += body[: self.torn_after]
        self.torn_after = 0

    def answer(self, request: h11.Request, body: bytes) -> tuple[int, dict[str, str]]:
        method, target = request.method.decode(), request.target.decode()
        headers = {name.decode(): value.decode() for name, value in request.headers}
        self.asked.append((method, target, headers))
        instead = self.before(method, target, headers) if self.before else None
        return instead or self.usual(method, target, headers, body)

    def usual(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str]]:
        where = {"location": f"/upload/{self.begun}?state={len(self.asked)}"}
        if target.startswith("/elsewhere/"):
            self.uploads[target.rsplit("/", 1)[1]] += body
            return 200, {}
        if method == "HEAD":
            return (200 if target.rsplit("/", 1)[1] in self.blobs else 404), {}
        if method == "POST":
            self.begun += 1
            self.uploads[str(self.begun)] = bytearray()
            return 202, {"location": f"/upload/{self.begun}?state=0"}
        if "/manifests/" in target:
            self.manifests[target] = headers["content-type"], body
            return 201, {}
        upload = self.uploads.get(_key(target))
        if upload is None:
            return 404, {}
        if method == "GET":
            return 204, where | {"range": f"0-{max(len(upload) - 1, 0)}"}
        if method == "PATCH":
            if int(headers["content-range"].partition("-")[0]) != len(upload):
                return 416, {}
            upload += body
            return 202, where
        digest = target.partition("digest=")[2].partition("&")[0]
        if digest_of(bytes(upload)) != digest:
            return 400, {}
        self.blobs[digest] = bytes(upload)
        return 201, {}


def _key(target: str) -> str:
    return target.partition("?")[0].rsplit("/", 1)[1]


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    found = Registry()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    found.port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, _sturdy(found.serve), [listener])
        yield found
        nursery.cancel_scope.cancel()


def _sturdy(serve: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def served(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, h11.RemoteProtocolError):
            await serve(stream)

    return served


@asynccontextmanager
async def origin_of(registry: Registry, **changes: Any) -> AsyncIterator[Any]:
    settings = {
        "insecure": (registry.host,),
        "allow_private": (registry.host,),
        "backoff_first_s": 0.001,
        "backoff_max_s": 0.001,
        **changes,
    }
    async with open_registry_origin(
        OriginSettings(**settings),
        node_key=None,
        rng=random.Random(1),
        user_agent="omx-test/1",
        environ={},
    ) as origin:
        with trio.fail_after(30):
            yield origin


async def store_with_model() -> RamStore:
    store = RamStore()
    await store.put(BLOB)
    await store.put(CONFIG)
    return store


async def push(registry: Registry, *, name: str = "lab/tiny:1", **changes: Any) -> Any:
    async with origin_of(registry, **changes) as origin:
        where = parse_model_name(f"{registry.host}/{name}")
        return await origin.push(where, MANIFEST, await store_with_model())


def asked(registry: Registry, method: str) -> list[str]:
    return [target for each, target, _ in registry.asked if each == method]


async def test_a_push_is_head_post_patch_put_and_the_manifest(registry):
    report = await push(registry)
    assert registry.blobs == {DIGEST: BLOB, digest_of(CONFIG): CONFIG}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    assert registry.manifests == {"/v2/lab/tiny/manifests/1": (kind, MANIFEST.raw)}
    steps = [method for method, _, _ in registry.asked]
    assert steps == [*["HEAD", "POST", "PATCH", "PUT"] * 2, "PUT"]
    assert report.bytes_sent == MANIFEST.size
    assert f"{len(BLOB) - 1}" in registry.asked[2][2]["content-range"]


async def test_what_broke_off_is_asked_for_and_not_sent_again(registry):
    registry.torn_after = 40_000
    await push(registry)
    assert registry.blobs[DIGEST] == BLOB
    assert len(asked(registry, "POST")) == 2  # one per blob: the upload was gone on with
    resumed = next(headers for method, _, headers in registry.asked if method == "PATCH")
    assert resumed["content-range"] == f"40000-{len(BLOB) - 1}"


async def test_an_upload_that_the_registry_has_lost_is_begun_again(registry):
    lost = []

    def lose(method, target, headers):
        if method == "PATCH" and not lost:
            lost.append(target)
            registry.uploads.clear()
        return None

    registry.before = lose
    await push(registry)
    assert registry.blobs[DIGEST] == BLOB
    assert len(asked(registry, "POST")) == 3


@pytest.mark.parametrize("method", ["HEAD", "POST", "PATCH", "PUT"])
async def test_a_registry_that_is_busy_now_and_then_is_tried_again(registry, method):
    refused = []

    def busy(each, target, headers):
        if each == method and len(refused) < 3:
            refused.append(target)
            return 503, {}
        return None

    registry.before = busy
    await push(registry)
    assert registry.blobs[DIGEST] == BLOB
    assert registry.manifests


async def test_a_registry_that_stays_busy_is_given_up(registry):
    registry.before = lambda method, *_: (503, {}) if method == "PATCH" else None
    with pytest.raises(OriginUnavailable, match="503"):
        await push(registry)
    assert not registry.manifests


async def test_a_part_that_is_wanted_elsewhere_goes_there_without_proof(registry):
    def elsewhere(method, target, headers):
        if method == "PATCH":
            key = _key(target)
            place = f"http://{registry.host}/elsewhere/{key}"
            return 307, {"location": place, "docker-upload-location": f"/upload/{key}?x=1"}
        return None

    registry.before = elsewhere
    await push(registry)
    assert registry.blobs[DIGEST] == BLOB
    patch = next(headers for method, _, headers in registry.asked if method == "PATCH")
    assert patch["x-redirect-uploads"] == "1"
    (finish,) = [target for target in asked(registry, "PUT") if DIGEST in target]
    assert finish.endswith("-1")  # Ollama's etag: so many parts
    assert "etag=" in finish


async def test_a_blob_goes_in_parts(registry, monkeypatch):
    monkeypatch.setattr(registry_push, "PART_BYTES_MIN", 30_000)
    await push(registry)
    ranges = [
        headers["content-range"] for method, _, headers in registry.asked if method == "PATCH"
    ]
    assert ranges[:3] == ["0-29999", "30000-59999", "60000-69999"]
    assert registry.blobs[DIGEST] == BLOB


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "does not say where"),
        ({"location": "ftp://x/"}, "redirects us to"),
        ({"location": "http://user@x/"}, "redirects us to"),
    ],
)
async def test_a_registry_that_leads_nowhere_is_no_registry(registry, headers, problem):
    registry.before = lambda method, *_: (202, headers) if method == "POST" else None
    with pytest.raises(OriginUnavailable, match=problem):
        await push(registry)


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_no_is_said_once_and_is_final(registry, method):
    registry.before = lambda each, *_: (403, {}) if each == method else None
    with pytest.raises(OriginRefused, match="403"):
        await push(registry)
    assert len(asked(registry, method)) == 1


async def test_a_repository_that_is_not_there_is_said_so(registry):
    registry.before = lambda each, *_: (404, {}) if each == "POST" else None
    with pytest.raises(OriginRefused, match="is there such a repository"):
        await push(registry)


async def test_a_registry_that_has_more_than_was_sent_is_sent_all_again(registry):
    states = iter([(503, {}), None, None, None])

    def odd(method, target, headers):
        if method == "GET":
            return 204, {"range": f"0-{len(BLOB)}"}
        return next(states, None) if method == "PATCH" else None

    registry.before = odd
    await push(registry)
    assert registry.blobs[DIGEST] == BLOB


async def test_a_model_whose_blob_is_gone_is_not_pushed(registry):
    async with origin_of(registry) as origin:
        with pytest.raises(BlobNotFound):
            await origin.push(parse_model_name(f"{registry.host}/a/b:1"), MANIFEST, RamStore())
        with pytest.raises(BadName):
            await origin.push(parse_model_name("a:b:c/d/e:1"), MANIFEST, RamStore())


async def test_a_cancelled_push_ends_at_once(registry):
    store = await store_with_model()
    with trio.CancelScope() as scope:
        registry.before = lambda method, *_: scope.cancel() if method == "PATCH" else None
        async with origin_of(registry) as origin:
            await origin.push(parse_model_name(f"{registry.host}/a/b:1"), MANIFEST, store)
    assert scope.cancelled_caught
    assert not registry.manifests

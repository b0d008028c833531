"""The registry origin against Debian's docker-registry, really running."""

import base64
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.manifest import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    MODEL_TYPE,
    TEMPLATE_TYPE,
    Layer,
    Manifest,
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import BlobNotFound, ModelNotFound, OriginRefused
from ollamamax_p2p.transfer import PullProgress, registry_push
from ollamamax_p2p.transfer.registry_origin import RegistryOrigin, open_registry_origin
from ollamamax_p2p.transfer.settings import OriginSettings
from tests.network.counterparts import docker_registry

pytestmark = [pytest.mark.network, pytest.mark.counterpart]

MODEL = random.Random(3).randbytes(5_000_000)
CONFIG = json.dumps({"model_format": "gguf", "os": "linux"}).encode()


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    async with docker_registry(tmp_path) as host:
        yield host


@pytest.fixture
async def guarded_registry(tmp_path: Path) -> AsyncIterator[str]:
    async with docker_registry(tmp_path, user="me", password="hunter2") as host:
        yield host


@asynccontextmanager
async def origin_of(host: str, password: str | None = None) -> AsyncIterator[RegistryOrigin]:
    settings = OriginSettings(
        insecure=(host,),
        allow_private=(host,),
        credentials={} if password is None else {host: f"me:{password}"},
    )
    async with open_registry_origin(
        settings, node_key=None, rng=random.Random(1), user_agent="omx-test/1", environ={}
    ) as origin:
        with trio.fail_after(60):
            yield origin


async def pushed(host: str, authorization: str = "") -> tuple[ModelName, Manifest]:
    """Put a model into a registry by the push protocol, with plain requests."""
    headers = {"Authorization": authorization} if authorization else {}
    async with httpx2.AsyncClient(base_url=f"http://{host}", headers=headers) as client:
        for blob in (CONFIG, MODEL):
            begun = await client.post("/v2/lab/tiny/blobs/uploads/")
            assert begun.status_code == 202, begun.text
            where = httpx2.URL(begun.headers["Location"])
            done = await client.put(
                where.copy_merge_params({"digest": digest_of(blob)}), content=blob
            )
            assert done.status_code == 201, done.text
        manifest = build_manifest(
            Layer(CONFIG_TYPE, digest_of(CONFIG), len(CONFIG)),
            [Layer(MODEL_TYPE, digest_of(MODEL), len(MODEL))],
        )
        done = await client.put(
            "/v2/lab/tiny/manifests/q4",
            content=manifest.raw,
            headers={"Content-Type": MANIFEST_TYPE},
        )
        assert done.status_code == 201, done.text
    return parse_model_name(f"{host}/lab/tiny:q4"), manifest


async def fetched(
    origin: RegistryOrigin, name: ModelName, digest: Digest, start: int, end: int
) -> bytes:
    async with origin.fetch_range(name, digest, start, end) as parts:
        return b"".join([part async for part in parts])


async def test_a_model_comes_whole_out_of_a_docker_registry(registry: str) -> None:
    name, pushed_manifest = await pushed(registry)
    async with origin_of(registry) as origin:
        manifest = await origin.manifest(name)
        assert manifest == pushed_manifest
        for layer in (manifest.config, *manifest.layers):
            blob = await fetched(origin, name, layer.digest, 0, layer.size)
            assert digest_of(blob) == layer.digest


async def test_ranges_of_one_blob_come_side_by_side(registry: str) -> None:
    name, _ = await pushed(registry)
    ranges = [(at, min(at + 700_000, len(MODEL))) for at in range(0, len(MODEL), 700_000)]
    found: dict[int, bytes] = {}

    async with origin_of(registry) as origin, trio.open_nursery() as nursery:

        async def fetch(start: int, end: int) -> None:
            found[start] = await fetched(origin, name, digest_of(MODEL), start, end)

        for start, end in ranges:
            nursery.start_soon(fetch, start, end)
    assert b"".join(found[start] for start, _ in ranges) == MODEL


async def test_what_a_docker_registry_does_not_have_is_not_found(registry: str) -> None:
    name, _ = await pushed(registry)
    async with origin_of(registry) as origin:
        with pytest.raises(ModelNotFound):
            await origin.manifest(parse_model_name(f"{registry}/lab/tiny:nonsense"))
        with pytest.raises(ModelNotFound):
            await origin.manifest(parse_model_name(f"{registry}/lab/nonsense:q4"))
        with pytest.raises(BlobNotFound):
            await fetched(origin, name, digest_of(b"nonsense"), 0, 8)


async def test_a_range_beyond_the_blob_is_not_asked_for_for_ever(registry: str) -> None:
    from ollamamax_p2p.errors import OriginUnavailable

    name, _ = await pushed(registry)
    async with origin_of(registry) as origin:
        with pytest.raises(OriginUnavailable, match="shorter than its manifest"):
            await fetched(origin, name, digest_of(MODEL), len(MODEL) + 1, len(MODEL) + 2)
        with pytest.raises(OriginUnavailable, match="another range"):
            await fetched(origin, name, digest_of(MODEL), len(MODEL) - 1, len(MODEL) + 1)


async def test_a_docker_registry_with_a_password_opens_to_that_password(
    guarded_registry: str,
) -> None:
    login = "Basic " + base64.b64encode(b"me:hunter2").decode()
    name, pushed_manifest = await pushed(guarded_registry, login)
    async with origin_of(guarded_registry, "hunter2") as origin:
        assert await origin.manifest(name) == pushed_manifest
        assert await fetched(origin, name, digest_of(MODEL), 10, 20) == MODEL[10:20]


@pytest.mark.parametrize("password", [None, "wrong-password"])
async def test_a_docker_registry_with_a_password_says_no_without_it(
    guarded_registry: str, password: str | None
) -> None:
    async with origin_of(guarded_registry, password) as origin:
        with pytest.raises(OriginRefused, match=r"origin\.credentials") as caught:
            await origin.manifest(parse_model_name(f"{guarded_registry}/lab/tiny:q4"))
        assert caught.value.status == 401
        assert "wrong-password" not in str(caught.value)


async def stored() -> tuple[RamStore, Manifest]:
    """A model in memory, as the one that `pushed` puts into a registry."""
    store = RamStore()
    layers = [
        Layer(MODEL_TYPE, await store.put(MODEL), len(MODEL)),
        Layer(TEMPLATE_TYPE, await store.put(b""), 0),  # an empty blob is one too
    ]
    return store, build_manifest(Layer(CONFIG_TYPE, await store.put(CONFIG), len(CONFIG)), layers)


async def test_a_pushed_model_comes_out_again(
    registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_push, "PART_BYTES_MIN", 1_500_000)  # so that there are several
    store, manifest = await stored()
    name = parse_model_name(f"{registry}/lab/tiny:q4")
    states: list[PullProgress] = []
    async with origin_of(registry) as origin:
        report = await origin.push(name, manifest, store, on_progress=states.append)
        assert await origin.manifest(name) == manifest
        blob = await fetched(origin, name, digest_of(MODEL), 0, len(MODEL))
        assert digest_of(blob) == digest_of(MODEL)
        assert (report.bytes_total, report.bytes_sent) == (manifest.size, manifest.size)
        assert [state.status for state in states[-2:]] == ["pushing manifest", "success"]
        of_model = [each for each in states if each.digest == digest_of(MODEL)]
        assert of_model[0].status == f"pushing {digest_of(MODEL)[7:19]}"
        assert (of_model[0].completed, of_model[-1].completed) == (0, len(MODEL))

        again = await origin.push(name, manifest, store)
        assert again.bytes_sent == 0

        source = Layer(MODEL_TYPE, digest_of(MODEL), len(MODEL), str(name))
        second = build_manifest(manifest.config, [source])
        mounted = await origin.push(parse_model_name(f"{registry}/lab/two:1"), second, store)
        assert mounted.bytes_sent == len(CONFIG)


async def test_a_push_shows_its_password_and_not_to_who_has_none(guarded_registry: str) -> None:
    store, manifest = await stored()
    name = parse_model_name(f"{guarded_registry}/lab/tiny:q4")
    async with origin_of(guarded_registry, "hunter2") as origin:
        await origin.push(name, manifest, store)
        assert await origin.manifest(name) == manifest
    async with origin_of(guarded_registry) as origin:
        with pytest.raises(OriginRefused, match=r"origin\.credentials"):
            await origin.push(name, manifest, store)

"""The registry origin against servers that misbehave in one way each."""

import gzip
import random
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.manifest import (
    CONFIG_TYPE,
    MODEL_TYPE,
    Layer,
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import (
    BadConfig,
    BlobNotFound,
    MalformedMessage,
    ModelNotFound,
    OmxError,
    OriginRefused,
    OriginUnavailable,
)
from ollamamax_p2p.transfer.registry_auth import SigningKey
from ollamamax_p2p.transfer.registry_origin import RegistryOrigin, open_registry_origin
from ollamamax_p2p.transfer.settings import OriginSettings
from tests.transfer.scripted_http import (
    Asked,
    ScriptedServer,
    respond,
    respond_range,
    scripted_server,
)

pytestmark = pytest.mark.network

BLOB = random.Random(7).randbytes(300_000)
DIGEST = digest_of(BLOB)
CONFIG = Layer(CONFIG_TYPE, digest_of(b"{}"), 2)
MANIFEST = build_manifest(CONFIG, [Layer(MODEL_TYPE, DIGEST, len(BLOB))])


@asynccontextmanager
async def origin_of(
    *servers: ScriptedServer,
    environ: Mapping[str, str] | None = None,
    node_key: SigningKey | None = None,
    resolve: Any = None,
    **settings: Any,
) -> AsyncIterator[RegistryOrigin]:
    """An origin that may speak to these servers by plain http and does not wait long."""
    hosts = tuple(server.host for server in servers)
    settings = {
        "insecure": hosts,
        "allow_private": hosts,
        "backoff_first_s": 0.001,
        "backoff_max_s": 0.001,
        **settings,
    }
    more = {} if resolve is None else {"resolve": resolve}
    async with open_registry_origin(
        OriginSettings(**settings),
        node_key=node_key,
        rng=random.Random(1),
        user_agent="omx-test/1",
        environ=environ or {},
        **more,
    ) as origin:
        with trio.fail_after(30):
            yield origin


def model_on(server: ScriptedServer | str) -> ModelName:
    host = server if isinstance(server, str) else server.host
    return parse_model_name(f"{host}/lab/tiny:latest")


async def fetched(
    origin: RegistryOrigin,
    name: ModelName,
    start: int = 0,
    end: int = len(BLOB),
    digest: Digest = DIGEST,
) -> bytes:
    async with origin.fetch_range(name, digest, start, end) as parts:
        return b"".join([part async for part in parts])


# -- the protocol when all is well ---------------------------------------------------------------


async def test_a_manifest_is_asked_for_by_name_and_kept_byte_for_byte():
    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        manifest = await origin.manifest(model_on(server))
        assert manifest == MANIFEST
        (asked,) = server.asked
        assert asked.target == "/v2/lab/tiny/manifests/latest"
        assert "vnd.docker.distribution.manifest.v2+json" in asked.headers["accept"]
        assert "vnd.oci.image.manifest.v1+json" in asked.headers["accept"]
        assert asked.headers["user-agent"] == "omx-test/1"
        assert asked.headers["accept-encoding"] == "identity"


async def test_a_range_gives_exactly_its_bytes_over_one_connection():
    async def answer(asked, stream):
        await respond_range(stream, asked, BLOB)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        name = model_on(server)
        assert await fetched(origin, name, 1_000, 200_000) == BLOB[1_000:200_000]
        assert await fetched(origin, name, 0, 1) == BLOB[:1]
        assert server.asked[0].headers["range"] == "bytes=1000-199999"
        assert server.targets() == [f"/v2/lab/tiny/blobs/{DIGEST}"] * 2
        assert not server.hung_up.is_set()


async def test_an_empty_range_asks_for_nothing():
    async def answer(asked, stream):
        await respond(stream, 500)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        assert await fetched(origin, model_on(server), 5, 5) == b""
        assert server.asked == []


async def test_plain_http_is_not_spoken_to_a_registry_that_is_not_listed_for_it():
    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with (
        scripted_server(answer) as server,
        origin_of(server, insecure=(), tries=1) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"origin\.insecure"):
            await origin.manifest(model_on(server))
        assert server.asked == []
        assert (await origin.manifest(model_on(server), insecure=True)) == MANIFEST


async def test_no_more_ranges_than_set_are_fetched_at_once():
    running, most, release = 0, 0, trio.Event()

    async def answer(asked, stream):
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            # Both slots are taken: let whoever else would come have its chance to.
            await trio.testing.wait_all_tasks_blocked(0.05)
            release.set()
        await release.wait()
        running -= 1
        await respond_range(stream, asked, BLOB)

    async with (
        scripted_server(answer) as server,
        origin_of(server, connections=2) as origin,
        trio.open_nursery() as nursery,
    ):
        for _ in range(6):
            nursery.start_soon(fetched, origin, model_on(server), 0, 1_000)
    assert len(server.asked) == 6
    assert most == 2


def test_the_http_library_is_not_imported_before_the_first_request():
    code = (
        "import sys, ollamamax_p2p.transfer.registry_origin\n"
        "print([m for m in ('httpx2', 'httpcore2', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- answers that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-99/300000", "bytes 100-298/300000", "bytes 100-200/300000", "lines 100-199/*", ""],
)
async def test_another_range_than_the_one_asked_for_is_refused(content_range):
    async def answer(asked, stream):
        await respond(stream, 206, BLOB[100:200], {"Content-Range": content_range})

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="another range"):
            await fetched(origin, model_on(server), 100, 200)
        assert len(server.asked) == 1


async def test_a_length_that_is_not_the_ranges_is_refused():
    async def answer(asked, stream):
        await respond(stream, 206, BLOB[100:300], {"Content-Range": "bytes 100-199/300000"})

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="sends 200 bytes when asked for 100"):
            await fetched(origin, model_on(server), 100, 200)


async def test_an_endless_answer_is_cut_where_the_range_ends():
    async def answer(asked, stream):
        await respond(
            stream,
            206,
            headers={"Content-Range": "bytes 0-99999/300000", "Transfer-Encoding": "chunked"},
            with_length=False,
        )
        while True:
            await stream.send_all(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")

    async with scripted_server(answer) as server, origin_of(server) as origin:
        assert await fetched(origin, model_on(server), 0, 100_000) == b"x" * 100_000
        await server.hung_up.wait()


async def test_a_whole_blob_for_a_part_is_taken_only_where_the_part_comes_first():
    async def answer(asked, stream):
        await respond(stream, 200, BLOB)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        name = model_on(server)
        assert await fetched(origin, name) == BLOB
        assert await fetched(origin, name, 0, 10) == BLOB[:10]
        with pytest.raises(OriginUnavailable, match="whole blob"):
            await fetched(origin, name, 10, 20)


async def test_a_compressed_answer_is_refused():
    async def answer(asked, stream):
        packed = gzip.compress(MANIFEST.raw if "manifests" in asked.target else BLOB)
        await respond(stream, 200, packed, {"Content-Encoding": "gzip"})

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="gzip-compressed"):
            await fetched(origin, model_on(server))
        with pytest.raises(OriginUnavailable, match="gzip-compressed"):
            await origin.manifest(model_on(server))


async def test_a_manifest_is_bounded():
    async def answer(asked, stream):
        await respond(stream, 200, headers={"Transfer-Encoding": "chunked"}, with_length=False)
        while True:
            await stream.send_all(b"10000\r\n" + b" " * 0x10000 + b"\r\n")

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="longer than 4,194,304 bytes"):
            await origin.manifest(model_on(server))
        await server.hung_up.wait()


async def test_a_manifest_that_is_none_says_where_it_came_from():
    async def answer(asked, stream):
        await respond(stream, 200, b"<html>hotel wifi: please log in</html>")

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(MalformedMessage, match=server.host):
            await origin.manifest(model_on(server))


async def test_something_that_is_not_http_is_not_a_registry():
    async def answer(asked, stream):
        await stream.send_all(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")

    async with scripted_server(answer) as server, origin_of(server, tries=2) as origin:
        with pytest.raises(OriginUnavailable, match=r"the connection failed .*tried 2 times"):
            await origin.manifest(model_on(server))


# -- answers that break off, stall or drip -------------------------------------------------------


async def test_a_broken_off_answer_is_continued_where_it_broke():
    async def answer(asked, stream):
        first, last = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
        whole = BLOB[first : last + 1]
        headers = {
            "Content-Range": f"bytes {first}-{last}/{len(BLOB)}",
            "Content-Length": str(len(whole)),
        }
        await respond(stream, 206, whole[:100_000], headers, with_length=False)
        await stream.aclose()

    async with scripted_server(answer) as server, origin_of(server) as origin:
        assert await fetched(origin, model_on(server)) == BLOB
        ranges = [asked.headers["range"] for asked in server.asked]
        assert ranges == [f"bytes={at}-299999" for at in (0, 100_000, 200_000)]


async def test_a_registry_that_stalls_is_asked_again_and_then_unavailable():
    async def answer(asked, stream):
        headers = {"Content-Range": "bytes 0-999/300000", "Content-Length": "1000"}
        await respond(stream, 206, b"", headers, with_length=False)
        await trio.sleep_forever()

    async with (
        scripted_server(answer) as server,
        origin_of(server, stall_timeout_s=0.05, tries=3) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"sent nothing for 0.05 s \(tried 3 times\)"):
            await fetched(origin, model_on(server), 0, 1_000)
        assert len(server.asked) == 3


async def test_a_registry_that_takes_the_request_and_says_nothing_is_unavailable():
    async def answer(asked, stream):
        await trio.sleep_forever()

    async with (
        scripted_server(answer) as server,
        origin_of(server, answer_timeout_s=0.05, tries=2) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"did not answer within 0.05 s"):
            await origin.manifest(model_on(server))


async def test_a_drip_is_given_up():
    async def answer(asked, stream):
        headers = {"Content-Range": "bytes 0-999/300000", "Content-Length": "1000"}
        await respond(stream, 206, b"", headers, with_length=False)
        while True:
            await stream.send_all(b"x")
            await trio.sleep(0.005)

    async with (
        scripted_server(answer) as server,
        origin_of(server, stall_timeout_s=0.1, slowest_bytes_per_s=100_000, tries=1) as origin,
    ):
        with pytest.raises(OriginUnavailable, match="bytes per second"):
            await fetched(origin, model_on(server), 0, 1_000)


async def test_leaving_early_ends_the_request():
    async def answer(asked, stream):
        await respond(
            stream, 206, BLOB[:100_000], {"Content-Range": "bytes 0-299999/300000"} | LONG
        )
        await trio.sleep_forever()

    async with scripted_server(_until_gone(answer)) as server, origin_of(server) as origin:
        async with origin.fetch_range(model_on(server), DIGEST, 0, len(BLOB)) as parts:
            assert await anext(parts)
        await server.hung_up.wait()


async def test_cancelling_ends_the_request_at_once():
    async def answer(asked, stream):
        await respond(stream, 206, BLOB[:10], {"Content-Range": "bytes 0-299999/300000"} | LONG)
        await trio.sleep_forever()

    async with scripted_server(_until_gone(answer)) as server, origin_of(server) as origin:
        with trio.CancelScope() as scope:
            async with origin.fetch_range(model_on(server), DIGEST, 0, len(BLOB)) as parts:
                async for _ in parts:
                    scope.cancel()
        assert scope.cancelled_caught
        await server.hung_up.wait()


LONG = {"Content-Length": "300000"}


def _until_gone(answer):
    """The answer, ended when the client hangs up."""

    async def watched(asked, stream):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, asked, stream)
            while await stream.receive_some():
                pass
            nursery.cancel_scope.cancel()

    return watched


# -- answers that say no -------------------------------------------------------------------------


async def test_what_the_registry_does_not_have_is_not_found():
    async def answer(asked, stream):
        await respond(stream, 404, b'{"error": "no"}')

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(ModelNotFound, match="lab/tiny"):
            await origin.manifest(model_on(server))
        with pytest.raises(BlobNotFound, match=DIGEST):
            await fetched(origin, model_on(server))
        assert len(server.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_registry_in_trouble_is_asked_again(status):
    async def answer(asked, stream):
        if len(server.asked) < 3:
            await respond(stream, status)
        else:
            await respond(stream, 200, MANIFEST.raw)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        assert await origin.manifest(model_on(server)) == MANIFEST
        assert len(server.asked) == 3


async def test_a_registry_that_stays_in_trouble_is_unavailable():
    async def answer(asked, stream):
        await respond(stream, 503)

    async with scripted_server(answer) as server, origin_of(server, tries=4) as origin:
        with pytest.raises(OriginUnavailable, match=r"answered 503 \(tried 4 times\)"):
            await origin.manifest(model_on(server))
        assert len(server.asked) == 4


@pytest.mark.parametrize("retry_after", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
async def test_a_registry_that_wants_a_long_pause_is_given_up_at_once(retry_after):
    async def answer(asked, stream):
        await respond(stream, 429, headers={"Retry-After": retry_after})

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="asks us to wait"):
            await origin.manifest(model_on(server))
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [b'{"error": "Repository is not GGUF"}', b'{"errors":[{"message":"Repository is not GGUF"}]}'],
)
async def test_a_refusal_carries_the_registrys_reason(body):
    async def answer(asked, stream):
        await respond(stream, 400, body)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginRefused, match="answered 400: Repository is not GGUF") as caught:
            await origin.manifest(model_on(server))
        assert caught.value.status == 400


async def test_a_refusal_in_json_without_end_is_a_refusal_without_a_reason():
    deep = b'{"x":' + b"[" * 4_000 + b"]" * 4_000 + b"}"

    async def answer(asked, stream):
        await respond(stream, 403, deep)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginRefused, match=r"answered 403$") as caught:
            await origin.manifest(model_on(server))
        assert caught.value.status == 403


@pytest.mark.parametrize(
    "retry_after",
    [
        "Mon, 01 Jan 2020 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 2020 00:00:00 +" + "9" * 5_000,
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "9" * 5_000,
        "soon",
        "",
    ],
)
async def test_a_pause_that_makes_no_sense_is_none(retry_after):
    async def answer(asked, stream):
        await respond(stream, 503, headers={"Retry-After": retry_after})

    async with scripted_server(answer) as server, origin_of(server, tries=2) as origin:
        with pytest.raises(OriginUnavailable, match=r"answered 503 \(tried 2 times\)"):
            await origin.manifest(model_on(server))


# -- redirects ---------------------------------------------------------------------------


async def test_a_blob_may_be_elsewhere_and_its_place_is_remembered_until_it_expires():
    places = 0

    async def registry_answer(asked, stream):
        nonlocal places
        places += 1
        location = f"http://{store.host}/place{places}?signature=s3cret"
        await respond(stream, 307, headers={"Location": location})

    async def store_answer(asked, stream):
        expired = places == 1 and len(store.asked) > 2
        if expired:
            await respond(stream, 403)
        else:
            await respond_range(stream, asked, BLOB)

    async with (
        scripted_server(registry_answer) as registry,
        scripted_server(store_answer) as store,
        origin_of(registry, store) as origin,
    ):
        for start in (0, 100, 200):
            got = await fetched(origin, model_on(registry), start, start + 100)
            assert got == BLOB[start : start + 100]
        assert len(registry.asked) == 2
        assert [target[:7] for target in store.targets()] == ["/place1"] * 3 + ["/place2"]


async def test_a_relative_redirect_stays_on_the_registry():
    async def answer(asked, stream):
        if asked.target.startswith("/v2"):
            await respond(stream, 302, headers={"Location": "../moved"})
        else:
            await respond_range(stream, asked, BLOB)

    async with scripted_server(answer) as server, origin_of(server) as origin:
        assert await fetched(origin, model_on(server), 0, 10) == BLOB[:10]
        assert server.targets()[1] == "/v2/lab/tiny/moved"


async def test_redirects_are_bounded():
    async def answer(asked, stream):
        await respond(stream, 307, headers={"Location": "/again"})

    async with scripted_server(answer) as server, origin_of(server, redirects_max=3) as origin:
        with pytest.raises(OriginUnavailable, match="too often"):
            await fetched(origin, model_on(server))
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    "location",
    [
        "",
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "http://user:password@127.0.0.1/",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://exa mple/",
        "http://a\\@b/",
    ],
)
async def test_a_redirect_to_what_is_no_url_is_refused(location):
    async def answer(asked, stream):
        # An empty Location is a relative one: to the same place, for ever.
        await respond(stream, 307, headers={"Location": location})

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="redirects us"):
            await fetched(origin, model_on(server))


async def test_a_redirect_does_not_lead_to_an_unlisted_host_by_plain_http():
    async def store_answer(asked, stream):
        await respond_range(stream, asked, BLOB)

    async def answer(asked, stream):
        await respond(stream, 307, headers={"Location": f"http://{store.host}/x"})

    async with (
        scripted_server(store_answer) as store,
        scripted_server(answer) as server,
        origin_of(server, allow_private=("127.0.0.1",)) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"origin\.insecure"):
            await fetched(origin, model_on(server))
        assert store.asked == []


# -- the address guard ---------------------------------------------------------------------------


async def test_a_private_address_is_refused_unless_it_is_allowed():
    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with (
        scripted_server(answer) as server,
        origin_of(server, allow_private=()) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"origin\.allow_private"):
            await origin.manifest(model_on(server))
        with pytest.raises(OriginUnavailable, match=r"origin\.allow_private"):
            await origin.manifest(model_on(f"localhost:{server.port}"), insecure=True)
        assert server.asked == []


async def test_a_redirect_does_not_lead_to_a_private_address():
    async def inside_answer(asked, stream):
        await respond_range(stream, asked, BLOB)

    async def answer(asked, stream):
        await respond(stream, 307, headers={"Location": f"http://{inside.host}/admin"})

    async with (
        scripted_server(inside_answer) as inside,
        scripted_server(answer) as server,
        origin_of(server, inside, allow_private=(server.host,)) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"origin\.allow_private"):
            await fetched(origin, model_on(server))
        assert inside.asked == []


async def test_a_name_that_changes_its_mind_is_judged_by_the_address_connected_to():
    """DNS rebinding: the first look-up is harmless, the next points into the local network."""
    looked_up = []

    async def resolve(host, port):
        looked_up.append(host)
        return ["127.0.0.1"]

    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with scripted_server(answer) as server:
        name = model_on(f"registry.test:{server.port}")
        async with origin_of(server, resolve=resolve) as origin:
            with pytest.raises(OriginUnavailable, match="not on the public internet"):
                await origin.manifest(name, insecure=True)
        assert server.asked == []
        async with origin_of(server, resolve=resolve, allow_private=("registry.test",)) as origin:
            looked_up.clear()
            await origin.manifest(name, insecure=True)
        # Looked up once: what was checked is what was connected to.
        assert looked_up == ["registry.test"]
        assert server.asked[0].headers["host"] == f"registry.test:{server.port}"


async def test_a_public_address_beside_a_private_one_is_the_only_one_used():
    tried = []

    async def resolve(host, port):
        return ["10.0.0.1", "127.0.0.1"]

    async def answer(asked, stream):
        tried.append(asked)

    async with scripted_server(answer) as server, origin_of(resolve=resolve) as origin:
        with pytest.raises(OriginUnavailable, match=r"10\.0\.0\.1, 127\.0\.0\.1"):
            await origin.manifest(model_on(f"registry.test:{server.port}"), insecure=True)
    assert tried == []


async def test_the_next_address_of_a_name_is_tried():
    async def resolve(host, port):
        return ["127.9.9.9", "127.0.0.1"]

    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with (
        scripted_server(answer) as server,
        origin_of(resolve=resolve, allow_private=("registry.test",), tries=1) as origin,
    ):
        name = model_on(f"registry.test:{server.port}")
        assert await origin.manifest(name, insecure=True) == MANIFEST


async def test_a_name_that_nobody_knows_and_a_port_where_nobody_listens_say_what_to_check():
    async def resolve(host, port):
        raise OSError(-3, "Temporary failure in name resolution")

    async with origin_of(resolve=resolve, tries=2) as origin:
        with pytest.raises(OriginUnavailable, match=r"cannot look up registry\.test .*network"):
            await origin.manifest(model_on("registry.test"))
    with trio.socket.socket() as free:
        await free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        async with origin_of(allow_private=("127.0.0.1",), tries=2) as origin:
            with pytest.raises(OriginUnavailable, match=r"refused.*check that the registry runs"):
                await origin.manifest(model_on(f"127.0.0.1:{port}"))


# -- proxies -----------------------------------------------------------------------------


async def test_a_proxy_of_the_environment_is_used_and_looks_names_up_itself():
    async def resolve(host, port):
        raise AssertionError(f"looked up {host}")

    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with scripted_server(answer) as proxy:
        environ = {"HTTP_PROXY": f"http://me:pass%20word@{proxy.host}"}
        async with origin_of(environ=environ, resolve=resolve) as origin:
            manifest = await origin.manifest(model_on("registry.test"), insecure=True)
    assert manifest == MANIFEST
    (asked,) = proxy.asked
    assert asked.target == "http://registry.test:80/v2/lab/tiny/manifests/latest"
    assert asked.headers["proxy-authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert asked.headers["host"] == "registry.test"


async def test_https_goes_through_a_proxys_tunnel():
    async def answer(asked, stream):
        await respond(stream, 502)

    async with scripted_server(answer) as proxy:
        environ = {"https_proxy": proxy.host}
        async with origin_of(environ=environ, tries=1) as origin:
            with pytest.raises(OriginUnavailable, match="502"):
                await origin.manifest(model_on("registry.test"))
    assert [(asked.method, asked.target) for asked in proxy.asked] == [
        ("CONNECT", "registry.test:443")
    ]


async def test_a_proxy_is_not_asked_for_a_private_address():
    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async with (
        scripted_server(answer) as proxy,
        origin_of(environ={"HTTP_PROXY": proxy.host}) as origin,
    ):
        with pytest.raises(OriginUnavailable, match=r"origin\.allow_private"):
            await origin.manifest(model_on("10.0.0.1"), insecure=True)
        assert proxy.asked == []


async def test_no_proxy_is_honoured():
    async def answer(asked, stream):
        await respond(stream, 200, MANIFEST.raw)

    async def resolve(host, port):
        return ["127.0.0.1"]

    async with scripted_server(answer) as proxy, scripted_server(answer) as server:
        environ = {"HTTP_PROXY": proxy.host, "NO_PROXY": "other.example, .test"}
        settings = {"allow_private": ("registry.test",), "resolve": resolve}
        async with origin_of(environ=environ, **settings) as origin:
            await origin.manifest(model_on(f"registry.test:{server.port}"), insecure=True)
    assert len(server.asked) == 1
    assert proxy.asked == []


async def test_a_proxy_that_cannot_be_used_is_named_without_its_password():
    async with origin_of(environ={"HTTPS_PROXY": "socks5://me:hunter2@127.0.0.1:1080"}) as origin:
        with pytest.raises(BadConfig, match="HTTPS_PROXY") as caught:
            await origin.manifest(model_on("registry.test"))
    assert "hunter2" not in _everything(caught.value)


# -- who is told what ----------------------------------------------------------------------------


def _everything(error: BaseException) -> str:
    """All that a log could hold of an error: its text, its causes, its fields."""
    fields = " ".join(map(repr, vars(error).values()))
    return "".join(traceback.format_exception(error)) + repr(error) + fields


def _bearer(realm: str) -> dict[str, str]:
    return {
        "WWW-Authenticate": f'Bearer realm="{realm}",service="reg",scope="repository:lab/tiny:pull"'
    }


def _registry_with_tokens(realm: list[str], token: str = "t0ken-of-ours"):
    """A registry that gives what it has for a token only; realm[0] is where it sends for one."""

    async def answer(asked: Asked, stream: trio.abc.Stream) -> None:
        if asked.target.startswith("/token"):
            await respond(stream, 200, b'{"token": "%s"}' % token.encode())
        elif asked.headers.get("authorization") != f"Bearer {token}":
            await respond(stream, 401, b"{}", _bearer(realm[0]))
        elif "/manifests/" in asked.target:
            await respond(stream, 200, MANIFEST.raw)
        else:
            await respond_range(stream, asked, BLOB)

    return answer


async def test_a_token_is_fetched_with_the_password_and_used_for_all_that_follows():
    realm = [""]
    async with scripted_server(_registry_with_tokens(realm)) as server:
        realm[0] = f"http://{server.host}/token"
        async with origin_of(server, credentials={server.host: "me:hunter2"}) as origin:
            assert await origin.manifest(model_on(server)) == MANIFEST
            assert await fetched(origin, model_on(server), 0, 10) == BLOB[:10]
    assert [asked.headers.get("authorization", "") for asked in server.asked] == [
        "",
        "Basic bWU6aHVudGVyMg==",
        "Bearer t0ken-of-ours",
        "Bearer t0ken-of-ours",
    ]
    assert server.asked[1].target == "/token?service=reg&scope=repository%3Alab%2Ftiny%3Apull"


@pytest.mark.parametrize("credentials", [True, False])
async def test_a_token_service_elsewhere_is_not_told_who_we_are(credentials):
    """CVE-2025-51471: a registry names somebody else's token service and gets proof for itself."""
    realm = [""]
    key = SigningKey(b"p" * 32, lambda message: b"s" * 64)
    async with (
        scripted_server(_registry_with_tokens(realm)) as elsewhere,
        scripted_server(_registry_with_tokens(realm)) as server,
    ):
        realm[0] = f"http://{elsewhere.host}/token"
        given = {server.host: "me:hunter2"} if credentials else {}
        async with origin_of(server, elsewhere, credentials=given, node_key=key) as origin:
            with pytest.raises(OriginRefused, match=elsewhere.host):
                await origin.manifest(model_on(server))
        assert elsewhere.asked == []


async def test_a_token_service_that_is_listed_is_told_and_gets_no_token_later():
    realm = [""]
    async with (
        scripted_server(_registry_with_tokens(realm)) as elsewhere,
        scripted_server(_registry_with_tokens(realm)) as server,
    ):
        realm[0] = f"http://{elsewhere.host}/token"
        async with origin_of(
            server,
            elsewhere,
            credentials={server.host: "me:hunter2"},
            token_hosts={server.host: elsewhere.host},
        ) as origin:
            assert await origin.manifest(model_on(server)) == MANIFEST
    assert [asked.headers["authorization"] for asked in elsewhere.asked] == [
        "Basic bWU6aHVudGVyMg=="
    ]
    assert [asked.headers.get("authorization") for asked in server.asked] == [
        None,
        "Bearer t0ken-of-ours",
    ]


async def test_a_node_key_signs_the_request_as_ollama_does():
    import base64

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from ollamamax_p2p.transfer.registry_auth import signing_key

    realm = [""]
    async with scripted_server(_registry_with_tokens(realm)) as server:
        realm[0] = f"http://{server.host}/token"
        key = signing_key(bytes(range(32)))
        async with origin_of(server, node_key=key) as origin:
            assert await origin.manifest(model_on(server)) == MANIFEST
        asked = server.asked[1]
        public, signature = map(base64.b64decode, asked.headers["authorization"].split(":"))
        assert public == b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + key.public
        nothing = base64.b64encode(
            b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        ).decode()
        message = f"GET,http://{server.host}{asked.target},{nothing}"
        # Raises InvalidSignature if it is not ours.
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature, message.encode())
        assert "&ts=" in asked.target
        assert "nonce=" in asked.target


async def test_a_registry_that_refuses_the_signature_is_asked_anonymously():
    async def answer(asked, stream):
        if asked.target.startswith("/token"):
            if "authorization" in asked.headers:
                await respond(stream, 401)
            else:
                await respond(stream, 200, b'{"access_token": "anonymous"}')
        elif asked.headers.get("authorization") == "Bearer anonymous":
            await respond(stream, 200, MANIFEST.raw)
        else:
            await respond(stream, 401, b"", _bearer(f"http://{server.host}/token"))

    key = SigningKey(b"p" * 32, lambda message: b"s" * 64)
    async with scripted_server(answer) as server, origin_of(server, node_key=key) as origin:
        assert await origin.manifest(model_on(server)) == MANIFEST


async def test_proof_does_not_follow_a_redirect_nor_come_back_with_one():
    async def elsewhere_answer(asked, stream):
        await respond(stream, 307, headers={"Location": f"http://{server.host}/v2/back"})

    async def answer(asked, stream):
        if asked.target == "/v2/back":
            await respond_range(stream, asked, BLOB)
        elif asked.headers.get("authorization") is None:
            await respond(stream, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})
        else:
            await respond(stream, 307, headers={"Location": f"http://{elsewhere.host}/away"})

    async with (
        scripted_server(elsewhere_answer) as elsewhere,
        scripted_server(answer) as server,
        origin_of(server, elsewhere, credentials={server.host: "me:hunter2"}) as origin,
    ):
        assert await fetched(origin, model_on(server), 0, 10) == BLOB[:10]
        seen = [
            (asked.target, "authorization" in asked.headers)
            for asked in server.asked + elsewhere.asked
        ]
        blob = f"/v2/lab/tiny/blobs/{DIGEST}"
        assert seen == [(blob, False), (blob, True), ("/v2/back", False), ("/away", False)]


async def test_another_port_of_the_host_is_another_registry():
    async def answer(asked, stream):
        await respond(stream, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})

    async with (
        scripted_server(answer) as server,
        scripted_server(answer) as neighbour,
        origin_of(server, neighbour, credentials={neighbour.host: "me:hunter2"}) as origin,
    ):
        with pytest.raises(OriginRefused, match=r"origin\.credentials"):
            await origin.manifest(model_on(server))
        assert all("authorization" not in asked.headers for asked in server.asked)


async def test_a_password_that_is_not_taken_is_tried_once():
    async def answer(asked, stream):
        await respond(stream, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})

    async with (
        scripted_server(answer) as server,
        origin_of(server, credentials={server.host: "me:hunter2"}) as origin,
    ):
        with pytest.raises(OriginRefused, match="does not take the user and password") as caught:
            await origin.manifest(model_on(server))
        assert len(server.asked) == 2
        assert "hunter2" not in _everything(caught.value)


async def test_a_token_that_has_run_out_is_renewed():
    valid = 1

    async def answer(asked, stream):
        if asked.target.startswith("/token"):
            await respond(stream, 200, b'{"token": "number-%d"}' % valid)
        elif asked.headers.get("authorization") == f"Bearer number-{valid}":
            await respond(stream, 200, MANIFEST.raw)
        else:
            await respond(stream, 401, b"", _bearer(f"http://{server.host}/token"))

    async with scripted_server(answer) as server, origin_of(server) as origin:
        await origin.manifest(model_on(server))
        valid = 2
        assert await origin.manifest(model_on(server)) == MANIFEST


@pytest.mark.parametrize(
    "token_answer", [b"", b"[]", b"{}", b'{"token": "a\\r\\nX: y"}', b'{"token": 5}', b"\xff"]
)
async def test_a_token_that_is_none_is_not_sent(token_answer):
    async def answer(asked, stream):
        if asked.target.startswith("/token"):
            await respond(stream, 200, token_answer)
        else:
            await respond(stream, 401, b"", _bearer(f"http://{server.host}/token"))

    async with scripted_server(answer) as server, origin_of(server) as origin:
        with pytest.raises(OriginUnavailable, match="token service"):
            await origin.manifest(model_on(server))
        assert len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 500, 307, 200])
async def test_no_error_holds_a_password_a_token_or_a_signed_url(status):
    """A registry that throws back at us all it was told."""

    async def answer(asked, stream):
        proof = asked.headers.get("authorization", "")
        if asked.target.startswith("/token"):
            await respond(stream, 200, b'{"token": "t0ken-of-ours"}')
        elif not proof:
            await respond(stream, 401, b"{}", _bearer(f"http://{server.host}/token?k=s1gned"))
        else:
            body = b'{"error": "you sent %s"}' % proof.encode()
            location = {"Location": f"https://{server.host}/?s1gned={proof.split()[-1]}"}
            await respond(stream, status, body, location)

    async with (
        scripted_server(answer) as server,
        origin_of(server, tries=1, credentials={server.host: "me:hunter2"}) as origin,
    ):
        with pytest.raises(OmxError) as caught:
            await origin.manifest(model_on(server))
        told = _everything(caught.value)
    for secret in ("hunter2", "bWU6aHVudGVyMg", "t0ken-of-ours", "s1gned"):
        assert secret not in told


def test_settings_do_not_show_their_passwords():
    settings = OriginSettings(credentials={"registry.example": "me:hunter2"})
    assert "hunter2" not in repr(settings)

"""The registry origin against nginx, really running: static files, TLS, redirects, compression."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.manifest import CONFIG_TYPE, MODEL_TYPE, Layer, build_manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import BlobNotFound, ModelNotFound, OriginUnavailable
from ollamamax_p2p.transfer.registry_origin import RegistryOrigin, open_registry_origin
from ollamamax_p2p.transfer.settings import OriginSettings
from tests.network.counterparts import Authority, free_port, make_authority, nginx
from tests.transfer.scripted_http import respond, scripted_server

pytestmark = [pytest.mark.network, pytest.mark.counterpart]

BLOB = random.Random(5).randbytes(3_000_000)
DIGEST = digest_of(BLOB)
MANIFEST = build_manifest(
    Layer(CONFIG_TYPE, digest_of(b"{}"), 2), [Layer(MODEL_TYPE, DIGEST, len(BLOB))]
)


@dataclass(frozen=True)
class Site:
    """A static /v2 tree behind nginx."""

    plain: int
    """Port that speaks http, and has a folder for each behaviour: see the configuration."""
    tls: int
    authority: Authority
    access_log: Path


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    for repository in ("good", "whole", "packed", "away", "downgrade", "cut"):
        for kind in ("manifests", "blobs"):
            (tmp_path / "www/v2/lab" / repository / kind).mkdir(parents=True)
        (tmp_path / "www/v2/lab" / repository / "manifests/latest").write_bytes(MANIFEST.raw)
        (tmp_path / "www/v2/lab" / repository / "blobs" / DIGEST).write_bytes(BLOB)
    (tmp_path / "www/elsewhere").write_bytes(BLOB)
    authority = make_authority(tmp_path)
    plain, tls = free_port(), free_port()
    rules = f"""
        root {tmp_path}/www; default_type application/octet-stream;
        location /v2/lab/whole/ {{ max_ranges 0; }}
        location /v2/lab/packed/ {{
            gzip on; gzip_min_length 1; gzip_types *; gzip_proxied any;
            add_header Content-Encoding gzip;
        }}
        location /v2/lab/away/blobs/ {{ return 307 $scheme://localhost:$server_port/elsewhere; }}
        location /v2/lab/downgrade/blobs/ {{ return 307 http://localhost:{plain}/elsewhere; }}
        location /v2/lab/limited/ {{ return 429; }}
    """
    servers = f"""
        server {{ listen 127.0.0.1:{plain}; {rules} }}
        server {{
            listen 127.0.0.1:{tls} ssl;
            ssl_certificate {authority.certificate_file};
            ssl_certificate_key {authority.key_file};
            {rules}
        }}
    """
    async with nginx(tmp_path, servers, port=plain):
        yield Site(plain, tls, authority, tmp_path / "nginx-access.log")


@asynccontextmanager
async def origin_of(**settings: Any) -> AsyncIterator[RegistryOrigin]:
    settings = {"allow_private": ("127.0.0.1", "localhost"), "backoff_first_s": 0.01, **settings}
    async with open_registry_origin(
        OriginSettings(**settings),
        node_key=None,
        rng=random.Random(1),
        user_agent="omx-test/1",
        environ={},
    ) as origin:
        with trio.fail_after(60):
            yield origin


def model(port: int, repository: str = "good", host: str = "127.0.0.1") -> ModelName:
    return parse_model_name(f"{host}:{port}/lab/{repository}")


async def fetched(
    origin: RegistryOrigin, name: ModelName, start: int = 0, end: int = len(BLOB)
) -> bytes:
    async with origin.fetch_range(name, DIGEST, start, end) as parts:
        return b"".join([part async for part in parts])


async def test_a_static_tree_is_a_registry(site: Site) -> None:
    async with origin_of(insecure=("127.0.0.1",)) as origin:
        name = model(site.plain)
        assert await origin.manifest(name) == MANIFEST
        assert await fetched(origin, name) == BLOB
        assert await fetched(origin, name, 1_000_000, 1_000_001) == BLOB[1_000_000:1_000_001]
        with pytest.raises(ModelNotFound):
            await origin.manifest(model(site.plain, "nonsense"))
        with pytest.raises(BlobNotFound):
            await fetched(origin, model(site.plain, "nonsense"))


async def test_a_certificate_of_ones_own_ca_is_trusted_when_named(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(site.authority.ca_file))
    async with origin_of() as origin:
        for host in ("127.0.0.1", "localhost"):
            assert await origin.manifest(model(site.tls, host=host)) == MANIFEST
        assert await fetched(origin, model(site.tls)) == BLOB


async def test_a_certificate_of_an_unknown_ca_is_refused_at_once(site: Site) -> None:
    async with origin_of() as origin:
        with pytest.raises(OriginUnavailable, match=r"not trusted .*SSL_CERT_FILE"):
            await origin.manifest(model(site.tls))
    assert site.access_log.read_text() == ""


async def test_a_certificate_of_another_host_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(site.authority.ca_file))

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    settings = OriginSettings(allow_private=("other.test", "registry.test"))
    async with open_registry_origin(
        settings,
        node_key=None,
        rng=random.Random(1),
        user_agent="omx-test/1",
        resolve=resolve,
        environ={},
    ) as origin:
        # Pinned to an address, and still judged by its name.
        assert await origin.manifest(model(site.tls, host="registry.test")) == MANIFEST
        with pytest.raises(OriginUnavailable, match=r"not trusted .*other\.test"):
            await origin.manifest(model(site.tls, host="other.test"))


async def test_plain_http_to_a_tls_port_and_tls_to_a_plain_port_say_what_is_wrong(
    site: Site,
) -> None:
    async with origin_of(tries=1) as origin:
        with pytest.raises(OriginUnavailable, match=r"TLS failed .*origin\.insecure"):
            await origin.manifest(model(site.plain))


async def test_a_blob_on_another_host_is_fetched_from_there(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(site.authority.ca_file))
    async with origin_of() as origin:
        assert await fetched(origin, model(site.tls, "away"), 7, 2_000_000) == BLOB[7:2_000_000]
        assert await fetched(origin, model(site.tls, "away"), 9, 10) == BLOB[9:10]
    requests = [line.split('"')[1].split()[1] for line in site.access_log.read_text().splitlines()]
    assert requests == [f"/v2/lab/away/blobs/{DIGEST}", "/elsewhere", "/elsewhere"]


async def test_a_redirect_from_https_to_http_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(site.authority.ca_file))
    async with origin_of(insecure=(f"localhost:{site.plain}",)) as origin:
        with pytest.raises(OriginUnavailable, match="from https to plain http"):
            await fetched(origin, model(site.tls, "downgrade"))


async def test_a_redirect_to_a_host_that_may_not_be_private_is_refused(site: Site) -> None:
    async with origin_of(
        insecure=("127.0.0.1", "localhost"), allow_private=("127.0.0.1",)
    ) as origin:
        with pytest.raises(OriginUnavailable, match=r"localhost.*origin\.allow_private"):
            await fetched(origin, model(site.plain, "away"))


async def test_a_server_without_ranges_serves_whole_blobs_only(site: Site) -> None:
    async with origin_of(insecure=("127.0.0.1",)) as origin:
        assert await fetched(origin, model(site.plain, "whole")) == BLOB
        with pytest.raises(OriginUnavailable, match="whole blob"):
            await fetched(origin, model(site.plain, "whole"), 1, 2)


async def test_a_server_that_compresses_in_any_case_is_refused(site: Site) -> None:
    async with origin_of(insecure=("127.0.0.1",)) as origin:
        with pytest.raises(OriginUnavailable, match="gzip-compressed"):
            await origin.manifest(model(site.plain, "packed"))


async def test_a_limit_on_requests_is_waited_for_and_then_named(site: Site) -> None:
    async with origin_of(insecure=("127.0.0.1",), tries=3) as origin:
        with pytest.raises(OriginUnavailable, match=r"answered 429 \(tried 3 times\)"):
            await origin.manifest(model(site.plain, "limited"))
    assert len(site.access_log.read_text().splitlines()) == 3


async def test_a_password_crosses_no_plain_connection_that_a_tls_registry_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TLS registry whose challenge names a token service on its own host, without TLS."""
    from ollamamax_p2p.errors import OriginRefused

    authority = make_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))

    async def answer(asked: Any, stream: trio.abc.Stream) -> None:
        realm = f'Bearer realm="http://{server.host}/token",service="x"'
        await respond(stream, 401, b"", {"WWW-Authenticate": realm})

    async with scripted_server(answer, tls=authority.server_context()) as server:
        async with origin_of(credentials={server.host: "me:hunter2"}) as origin:
            with pytest.raises(OriginRefused, match="without https"):
                await origin.manifest(parse_model_name(f"{server.host}/lab/tiny"))
        assert len(server.asked) == 1


async def test_tls_is_end_to_end_through_a_proxys_tunnel(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(site.authority.ca_file))

    async def tunnel(asked: Any, stream: trio.abc.Stream) -> None:
        async def copy(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            while data := await source.receive_some():
                await sink.send_all(data)
            nursery.cancel_scope.cancel()

        async with await trio.open_tcp_stream("127.0.0.1", site.tls) as there:
            await stream.send_all(b"HTTP/1.1 200 Connected\r\n\r\n")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, there, stream)
                nursery.start_soon(copy, stream, there)

    async with scripted_server(tunnel) as proxy:
        async with open_registry_origin(
            OriginSettings(),
            node_key=None,
            rng=random.Random(1),
            user_agent="omx-test/1",
            environ={"HTTPS_PROXY": f"http://me:hunter2@{proxy.host}"},
        ) as origin:
            name = parse_model_name("registry.test/lab/good")
            assert await origin.manifest(name) == MANIFEST
            assert await fetched(origin, name) == BLOB
        connect, *more = proxy.asked
    assert (connect.method, connect.target, more) == ("CONNECT", "registry.test:443", [])
    assert connect.headers["proxy-authorization"] == "Basic bWU6aHVudGVyMg=="
    assert "hunter2" not in site.access_log.read_text()

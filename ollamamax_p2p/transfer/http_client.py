"""HTTP requests to the outside: the only module that knows the HTTP library.

That library is httpcore2, on which httpx2 is built and with which it comes. httpx2's own client was
not taken, because the address guard needs a network backend, which it does not let one set; what it
adds (cookies, decompression, redirects, URLs in logs) is what must not happen here anyway. One
request is one connection or one from the pool; nothing is retried and no redirect is followed here.

Proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as Go and so Ollama read them. A proxy looks names up
itself, so the guard sees its address and not the registry's; it was configured by whoever runs this
machine and may be private.
"""

import ipaddress
import os
import socket
import ssl
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import trio

from ollamamax_p2p.errors import BadConfig, OriginUnavailable
from ollamamax_p2p.transfer.outbound_addresses import (
    Resolver,
    WebUrl,
    is_ip_address,
    is_loopback_name,
    parse_url,
    shown_host,
    usable_addresses,
)

if TYPE_CHECKING:
    import httpcore2

IDLE_CONNECTIONS_MAX = 16
"""Kept open for the next range; a pull uses `OriginSettings.connections` and a redirect target's
as many.
"""

IDLE_S = 30.0
"""How long. Object stores close idle connections after about a minute."""

CLOSE_GRACE_S = 1.0
"""Closing a connection waits for nothing on the network; this is for when it does."""


ADDRESS_TIMEOUT_S = 5.0
"""Per address of a name: one behind a broken IPv6 route must leave time for the next."""

AddressCheck = Callable[[str, int, Iterable[str]], list[str]]
"""Host, port and addresses to those that may be connected to; raises OriginUnavailable."""


class HttpTrouble(Exception):
    """A request failed below HTTP. Its text is one line, and says what to do where it is known."""

    def __init__(self, problem: str, *, final: bool = False) -> None:
        """final: trying again changes nothing."""
        super().__init__(problem)
        self.final = final


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer whose body has not been read. Must be closed."""

    status: int
    headers: Mapping[str, list[str]]
    """Every value of a header, names in lower case."""
    _response: "httpcore2.Response"
    _parts: Any

    def header(self, name: str) -> str:
        """The last value of a header; empty if it is missing."""
        return self.headers.get(name, [""])[-1]

    async def read(self) -> bytes:
        """The next part of the body, at most 64 KiB, as it was sent; empty at the end.

        Raises HttpTrouble if the connection ends before the body does.
        """
        with _translated():
            async for part in self._parts:
                if part:
                    return bytes(part)
        return b""

    async def aclose(self) -> None:
        """Give the connection back, or end it if there is more of the body."""
        with _closing():
            await self._parts.aclose()
            await self._response.aclose()


class HttpClient:
    """Made by `open_http_client`."""

    def __init__(
        self, check: AddressCheck, resolve: Resolver, context: ssl.SSLContext, proxies: "Proxies"
    ) -> None:
        self._check = check
        self._resolve = resolve
        self._context = context
        self._proxies = proxies
        self._pools: dict[str | None, httpcore2.AsyncConnectionPool] = {}

    async def ask(
        self,
        method: str,
        url: WebUrl,
        headers: Mapping[str, str],
        body: AsyncIterable[bytes] | None = None,
    ) -> HttpAnswer:
        """Ask, and wait for the head of the answer; deadlines are the caller's.

        body: of as many bytes as the header Content-Length says; None for none.
        Raises HttpTrouble; OriginUnavailable for an address that may not be connected to.
        """
        import httpcore2

        proxy = self._proxies.for_url(url)
        if proxy is not None and is_ip_address(url.host):
            # The proxy would connect to it for us; only what names mean is beyond our sight.
            self._check(url.host, url.port, [url.host])
        request = httpcore2.Request(
            method,
            httpcore2.URL(
                scheme=url.scheme.encode(),
                host=(f"[{url.host}]" if ":" in url.host else url.host).encode(),
                port=url.port,
                target=url.target.encode(),
            ),
            headers=[
                (name.encode(), value.encode())
                for name, value in {
                    "Host": url.authority,
                    "Accept-Encoding": "identity",
                    **headers,
                }.items()
            ],
            content=body,
        )
        with _translated():
            response = await self._pool(proxy).handle_async_request(request)
        return HttpAnswer(
            response.status, _header_lists(response.headers), response, response.aiter_stream()
        )

    async def aclose(self) -> None:
        """End every connection."""
        with _closing():
            for pool in self._pools.values():
                await pool.aclose()

    def _pool(self, proxy: str | None) -> "httpcore2.AsyncConnectionPool":
        import httpcore2

        if proxy not in self._pools:
            check = self._check if proxy is None else _any_address
            self._pools[proxy] = httpcore2.AsyncConnectionPool(
                ssl_context=self._context,
                proxy=None if proxy is None else _proxy(proxy, self._context),
                # The caller bounds what runs at once; a bound here would only hide waiting.
                max_connections=None,
                max_keepalive_connections=IDLE_CONNECTIONS_MAX,
                keepalive_expiry=IDLE_S,
                network_backend=_guarded_backend(check, self._resolve),
            )
        return self._pools[proxy]


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxy a request goes through."""

    by_scheme: Mapping[str, str]
    """`http` and `https` to a proxy's URL, which may hold user and password."""
    exceptions: tuple[str, ...]
    """Of NO_PROXY: host, .domain, host:port, address, network, or *."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Proxies":
        """Read them as Go's net/http does; lower-case names count too."""

        def value(name: str) -> str:
            return (environ.get(name.upper()) or environ.get(name) or "").strip()

        found = {"http": value("http_proxy"), "https": value("https_proxy")}
        exceptions = tuple(part.strip().lower() for part in value("no_proxy").split(","))
        return cls(
            {scheme: url for scheme, url in found.items() if url},
            tuple(part for part in exceptions if part),
        )

    def for_url(self, url: WebUrl) -> str | None:
        """The proxy's URL, or None to connect directly; this machine itself is never proxied."""
        if is_loopback_name(url.host) or any(_excepted(url, rule) for rule in self.exceptions):
            return None
        return self.by_scheme.get(url.scheme)


@asynccontextmanager
async def open_http_client(
    *, allow_private: Collection[str], resolve: Resolver, environ: Mapping[str, str]
) -> AsyncIterator[HttpClient]:
    """A client whose connections pass the address guard.

    allow_private: host[:port]s that may be at a private address. environ: for the proxies; the
    certificates to trust are the system's, or SSL_CERT_FILE's or SSL_CERT_DIR's.
    Raises BadConfig for a proxy that cannot be used.
    """
    proxies = Proxies.of(environ)
    for proxy in proxies.by_scheme.values():
        _proxy_url(proxy)
    # Importing and reading the system's certificates takes 0.1 s, too long for the event loop.
    context = await trio.to_thread.run_sync(_ssl_context)
    check = partial(usable_addresses, allow_private=allow_private)
    client = HttpClient(check, resolve, context, proxies)
    try:
        yield client
    finally:
        await client.aclose()


def as_unavailable(url: WebUrl, trouble: HttpTrouble) -> OriginUnavailable:
    """The error for a request that is not tried again."""
    return OriginUnavailable(str(url), str(trouble))


def _closing() -> trio.CancelScope:
    """Clean-up goes on when the task is cancelled, but not for long."""
    return trio.CancelScope(deadline=trio.current_time() + CLOSE_GRACE_S, shield=True)


def _ssl_context() -> ssl.SSLContext:
    import httpcore2

    return httpcore2.default_ssl_context()


def _any_address(_host: str, _port: int, addresses: Iterable[str]) -> list[str]:
    """For proxies: whoever runs this machine named them."""
    return list(addresses)


def _guarded_backend(check: AddressCheck, resolve: Resolver) -> "httpcore2.AsyncNetworkBackend":
    """A network backend that looks a name up once, checks, and connects to what it checked."""
    import httpcore2

    class GuardedBackend(httpcore2.TrioBackend):
        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,  # noqa: ASYNC109 - the library's interface
            local_address: str | None = None,
            socket_options: Iterable[Any] | None = None,
        ) -> httpcore2.AsyncNetworkStream:
            host = host.strip("[]")
            found = [host] if is_ip_address(host) else await _looked_up(host, port, resolve)
            trouble = HttpTrouble(f"{host} has no address")
            for address in check(host, port, found):
                try:
                    with trio.fail_after(ADDRESS_TIMEOUT_S):
                        return await super().connect_tcp(address, port, socket_options=())
                except (httpcore2.ConnectError, trio.TooSlowError) as error:
                    trouble = HttpTrouble(
                        f"cannot connect to {shown_host(address, port)} ({_reason(error)}); "
                        "check that the registry runs and that the network is up"
                    )
            raise trouble

    return GuardedBackend()


async def _looked_up(host: str, port: int, resolve: Resolver) -> list[str]:
    try:
        return await resolve(host, port)
    except OSError as error:
        raise HttpTrouble(
            f"cannot look up {host} ({error.strerror or error}); "
            "check the spelling, the network and the name server",
            # A name server that says no says it again; one that does not answer may yet.
            final=isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME,
        ) from error


@contextmanager
def _translated() -> Iterator[None]:
    """The library's exceptions as ours, with what to do where it is known."""
    import httpcore2

    try:
        yield
    except (
        httpcore2.TimeoutException,
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        httpcore2.ProxyError,
    ) as error:
        untrusted = _cause(error, ssl.SSLCertVerificationError)
        if isinstance(untrusted, ssl.SSLCertVerificationError):
            raise HttpTrouble(
                f"its certificate is not trusted ({untrusted.verify_message}); if your own CA "
                "signed it, set SSL_CERT_FILE to that CA's certificate",
                final=True,
            ) from None
        if (tls := _cause(error, ssl.SSLError)) is not None:
            raise HttpTrouble(
                f"TLS failed ({_ssl_reason(tls)}); if the registry speaks plain http, "
                "list it in origin.insecure or use --insecure"
            ) from None
        # from None: a proxy's answer or a header that the library quotes may hold a secret.
        raise HttpTrouble(f"the connection failed ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """What went wrong, in few words."""
    system = _cause(error, OSError)
    if isinstance(system, OSError) and system.errno:
        return os.strerror(system.errno).lower()
    if isinstance(error, trio.TooSlowError):
        return "no answer"
    return str(error)[:200] or type(error).__name__


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The innermost cause of a kind; the libraries nest them, trio also in groups."""
    inner = error.__cause__ or error.__context__
    if isinstance(error, BaseExceptionGroup):
        inner = error.exceptions[0]
    found = _cause(inner, kind) if inner is not None else None
    return found or (error if isinstance(error, kind) else None)


def _ssl_reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error).replace("_", " ").lower()


def _header_lists(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for name, value in headers:
        lists.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return lists


def _proxy(url: str, context: ssl.SSLContext) -> "httpcore2.Proxy":
    import httpcore2

    where, user = _proxy_url(url)
    return httpcore2.Proxy(
        where.full, auth=user, ssl_context=context if where.scheme == "https" else None
    )


def _proxy_url(url: str) -> tuple[WebUrl, tuple[str, str] | None]:
    """Where a proxy is, and its user and password. Raises BadConfig."""
    scheme, _, rest = url.rpartition("://")
    user, _, host = rest.rpartition("@")
    try:
        where = parse_url(f"{scheme or 'http'}://{host}")
    except ValueError as error:
        # Without the URL, which may hold a password.
        raise BadConfig("HTTP_PROXY or HTTPS_PROXY", f"{error}; write http://host:port") from None
    name, _, password = user.partition(":")
    return where, (unquote(name), unquote(password)) if user else None


def _excepted(url: WebUrl, rule: str) -> bool:
    """Whether one NO_PROXY entry covers a URL: `example.com` covers its subdomains too."""
    if rule in ("*", url.host, shown_host(url.host, url.port)):
        return True
    if is_ip_address(url.host):
        try:
            return ipaddress.ip_address(url.host) in ipaddress.ip_network(rule, strict=False)
        except ValueError:
            return False
    name, _, port = rule.removeprefix("*").partition(":")
    if port and port != str(url.port):
        return False
    return url.host.endswith(f".{name.removeprefix('.')}") or url.host == name

"""Who may ask at all: every request passes here before it is read further.

Two sets of paths, two sets of rules. What is ours (/omx) is for this user's programs on this
machine: a loopback Host, no foreign Origin, and the token of the node. The rest is what Ollama's
clients know: they have no token, and pages of the origins that Ollama allows may use it.

Browsers reach loopback and the local network too. A page on the web must not be able to use a node,
neither by naming its address (its Origin gives it away) nor by a name of its own that resolves to
it (DNS rebinding: its Host gives it away). So the Host is checked whatever address is listened on,
where Ollama checks it on loopback only; `api.hosts` has the names that a node is known by besides.
"""

import hmac
import socket
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import ip_address

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollamamax_p2p.api.cors import Origins
from ollamamax_p2p.api.error_responses import ErrorBody, plain_error

OURS = "/omx/"
OPEN_PATHS = frozenset({"/omx/v1/version"})
"""What of ours answers without a token: enough to see that an omx listens here."""

LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
"""Names below these cannot be bought, so no stranger's page has one."""

Headers = list[tuple[bytes, bytes]]


class Guard:
    """ASGI middleware: Host, Origin and, for what is ours, the token."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        """token: what `Authorization: Bearer` must carry; None where nothing of ours is served.
        origins, hosts: see ApiSettings.
        """
        self._app = app
        self._expected = None if token is None else f"bearer {token}".encode()
        self._origins = Origins(origins)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by a refusal or a preflight, or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        is_ours = self._expected is not None and scope["path"].startswith(OURS)
        answer = self._refusal(scope) if is_ours else self._of_ollama(scope)
        if answer is None:
            headers = [] if is_ours else self._added(scope)
            await self._app(scope, receive, _with_headers(send, headers) if headers else send)
        elif scope["type"] == "http":
            await answer(scope, receive, send)
        else:
            await _refuse_handshake(answer, send)

    # -- /omx ----------------------------------------------------------------------------------

    def _refusal(self, scope: Scope) -> Response | None:
        host = _header(scope, b"host")
        if host is None or not is_loopback_host(host):
            return Response(status_code=403)  # empty, as Ollama's guard: tell a stranger nothing
        origin = _header(scope, b"origin")
        if origin is not None and origin.lower() != f"http://{host.lower()}":
            return Response(status_code=403)
        if scope["path"] in OPEN_PATHS or self._knows_token(scope):
            return None
        problem = "the token is missing or wrong; read api-token in the node's data folder"
        return plain_error(401, ErrorBody(problem, "unauthorized"))

    def _knows_token(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization") or ""
        scheme, _, token = given.partition(" ")
        offered = f"{scheme.lower()} {token.strip()}".encode()
        return self._expected is not None and hmac.compare_digest(offered, self._expected)

    # -- everything else -----------------------------------------------------------------------

    def _of_ollama(self, scope: Scope) -> Response | None:
        """In Ollama's order: the Origin first."""
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        method = scope.get("method", "GET")
        if origin is not None and not _is_own(origin, host):
            if not self._origins.allow(origin):
                return Response(status_code=403)
            if not self._is_known(host):
                return Response(status_code=403)
            if method == "OPTIONS":
                return self._origins.preflight(origin)
        elif not self._is_known(host):
            return Response(status_code=403)
        if method == "OPTIONS" and not _is_address(_name_of(host or "")):
            return Response(status_code=204)
        return None

    def _is_known(self, host: str | None) -> bool:
        """None: HTTP/1.0 names no host, and no browser speaks that."""
        return host is None or _name_of(host) in self._hosts or is_local_host(host)

    def _added(self, scope: Scope) -> Headers:
        """What every answer says: who it is, and that a foreign page may read it."""
        headers: Headers = [(b"server", b"omx")]
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        if origin is not None and not _is_own(origin, host):
            headers += self._origins.headers(origin)
        return headers


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine: localhost, *.localhost or a loopback address."""
    name = _name_of(host).rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def is_local_host(host: str) -> bool:
    """Whether a Host header is one that no page of the web can have: an address of this machine or
    of a private network, this machine's name, or a name that cannot be registered.
    """
    name = _name_of(host)
    try:
        address = ip_address(name)
    except ValueError:
        return (
            name in ("", "localhost", socket.gethostname().lower())
            or name.endswith(LOCAL_SUFFIXES)
            or is_loopback_host(host)
        )
    local = address.is_loopback or address.is_private or address.is_unspecified
    return local or str(address) in _own_addresses()


@lru_cache(maxsize=1)
def _own_addresses() -> frozenset[str]:
    import ifaddr  # 20 ms, and only a public address needs it

    found = (ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips)
    return frozenset(ip if isinstance(ip, str) else ip[0] for ip in found)


def _name_of(host: str) -> str:
    """Without port and brackets."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0] if name.count(":") == 1 else name


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_own(origin: str, host: str | None) -> bool:
    """Whether it is the page's own server that it asks; browsers send an Origin then too."""
    return host is not None and origin.lower() in (
        f"http://{host.lower()}",
        f"https://{host.lower()}",
    )


def _header(scope: Scope, name: bytes) -> str | None:
    """The header's value; None if it is not there, "?" (which nothing accepts) if it is twice."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    values = [value for key, value in headers if key.lower() == name]
    if len(values) > 1:
        return "?"
    return values[0].decode("latin-1") if values else None


def _with_headers(send: Send, headers: Headers) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return sending


async def _refuse_handshake(refusal: Response, send: Send) -> None:
    await send(
        {
            "type": "websocket.http.response.start",
            "status": refusal.status_code,
            "headers": refusal.raw_headers,
        }
    )
    await send({"type": "websocket.http.response.body", "body": bytes(refusal.body)})

"""Who may ask at all: every request passes here before it is read further.

The API listens on loopback, which browsers reach too. A page on the web must not be able to use it,
neither by naming our address (its Origin gives it away) nor by a name of its own that resolves to
127.0.0.1 (DNS rebinding: its Host gives it away). The token keeps out other users of the machine.
"""

import hmac
from collections.abc import Iterable
from ipaddress import ip_address

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ollamamax_p2p.api.error_responses import ErrorBody, plain_error

OPEN_PATHS = frozenset({"/", "/omx/v1/version"})
"""What answers without a token: enough to see that an omx listens here."""


OPEN_PREFIXES = ("/api/", "/v1/")
"""What other clients than ours know; they have no token."""


class Guard:
    """ASGI middleware: Host, then Origin, then token."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        """token: what `Authorization: Bearer` must carry."""
        self._app = app
        self._expected = f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by a refusal, or pass on."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await _refuse_handshake(refusal, send)

    def _refusal(self, scope: Scope) -> Response | None:
        host = _header(scope, b"host")
        if host is None or not is_loopback_host(host):
            return Response(status_code=403)  # empty, as Ollama's guard: tell a stranger nothing
        origin = _header(scope, b"origin")
        if origin is not None and origin.lower() != f"http://{host.lower()}":
            return Response(status_code=403)
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES) or self._knows_token(scope):
            return None
        problem = "the token is missing or wrong; read api-token in the node's data folder"
        return plain_error(401, ErrorBody(problem, "unauthorized"))

    def _knows_token(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization") or ""
        scheme, _, token = given.partition(" ")
        offered = f"{scheme.lower()} {token.strip()}".encode()
        return hmac.compare_digest(offered, self._expected)


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine: localhost, *.localhost or a loopback address."""
    name = host.lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name.rstrip(".") == "localhost" or name.rstrip(".").endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _header(scope: Scope, name: bytes) -> str | None:
    """The header's value; None if it is not there, "" (which nothing accepts) if it is twice."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    values = [value for key, value in headers if key.lower() == name]
    if len(values) > 1:
        return ""
    return values[0].decode("latin-1") if values else None


async def _refuse_handshake(refusal: Response, send: Send) -> None:
    await send(
        {
            "type": "websocket.http.response.start",
            "status": refusal.status_code,
            "headers": refusal.raw_headers,
        }
    )
    await send({"type": "websocket.http.response.body", "body": bytes(refusal.body)})

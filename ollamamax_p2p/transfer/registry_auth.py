"""Proving to a registry who asks: challenges, token requests, and who may see which secret.

A registry that wants proof answers 401 with `WWW-Authenticate`. For `Basic` the configured user and
password go along with the next request. For `Bearer` a token is fetched from the URL that the
challenge names, its realm, in one of two dialects: Ollama's, where the node's Ed25519 key signs the
token request, and the one of Docker and OCI registries, where user and password go along with it,
or nothing.

The realm is outside text. Whoever controls a registry could name a realm elsewhere and be sent
proof that is good against a third party (CVE-2025-51471), so proof goes to a realm on the
registry's own host only, or on one that `OriginSettings.token_hosts` lists for it. Any other realm
may still hand out an anonymous token, over https. The token itself goes to the registry's own
scheme, host and port and nowhere else.

This module is pure; `registry_origin` carries the requests.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated
from urllib.parse import quote, urlencode

import msgspec

from ollamamax_p2p.errors import OriginRefused, OriginUnavailable
from ollamamax_p2p.transfer.outbound_addresses import WebUrl, parse_url, shown_host
from ollamamax_p2p.transfer.settings import KNOWN_TOKEN_HOSTS

TOKEN_ANSWER_BYTES_MAX = 256 * 1024
"""A token is a few KB; one of an enterprise with many groups has been seen at 60."""

_CHALLENGE_CHARS_MAX = 8_192
_TOKEN = re.compile(r"\A[A-Za-z0-9._~+/=-]{1,65536}\Z")
_SCHEME = re.compile(r"[ ,\t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)")
_PARAMETER = re.compile(
    r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]+))\s*(?:,|\Z)"
)
_SHA256_OF_NOTHING = hashlib.sha256(b"").hexdigest().encode()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key that can sign; the secret half is inside `sign`."""

    public: bytes
    """The raw 32-byte public key."""
    sign: Callable[[bytes], bytes] = field(repr=False)
    """Gives the raw 64-byte signature."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a 401 offers."""

    scheme: str
    """Lower case: `basic`, `bearer`."""
    parameters: Mapping[str, str]
    """Names in lower case."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A GET that should bring a token."""

    url: WebUrl
    headers: Mapping[str, str] = field(repr=False)


def signing_key(seed: bytes) -> SigningKey:
    """The key of a 32-byte Ed25519 seed."""
    # Imported here: nothing signs before a registry asks, and cryptography takes 30 ms.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(seed)
    return SigningKey(private.public_key().public_bytes_raw(), private.sign)


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """The challenges of all WWW-Authenticate headers; what cannot be read is left out."""
    challenges = []
    for text in headers:
        if len(text) <= _CHALLENGE_CHARS_MAX:
            challenges += _challenges_in(text)
    return challenges


def basic_authorization(user_and_password: str) -> str:
    """The Authorization header for `user:password`."""
    return "Basic " + base64.b64encode(user_and_password.encode()).decode()


def may_see_proof(realm: WebUrl, *, registry: WebUrl, token_hosts: Mapping[str, str]) -> bool:
    """Whether a realm may be sent what proves who we are to the registry that named it.

    token_hosts: see OriginSettings.
    """
    if realm.scheme not in ("https", registry.scheme):
        return False
    if (realm.host, realm.port) == (registry.host, registry.port):
        return True
    listed = {**KNOWN_TOKEN_HOSTS, **token_hosts}
    return any(names(host, realm) for entry, host in listed.items() if names(entry, registry))


def names(entry: str, url: WebUrl) -> bool:
    """Whether a host[:port] of the settings is a URL's, port included.

    Without a port it means the scheme's own: the other ports of a host are other programs, and what
    is decided here is who gets a secret.
    """
    return entry.lower() in (url.authority, shown_host(url.host, url.port))


def token_requests(
    challenge: Challenge,
    *,
    registry: WebUrl,
    credentials: str | None,
    key: SigningKey | None,
    token_hosts: Mapping[str, str],
    timestamp: int,
    nonce: bytes,
) -> list[TokenRequest]:
    """What to ask for a token, best first; the next is for when one is refused.

    registry: any URL of it. timestamp: Unix seconds. nonce: 16 fresh random bytes.
    Raises OriginRefused for a realm that may not be asked.
    """
    realm = _realm(challenge, registry)
    trusted = may_see_proof(realm, registry=registry, token_hosts=token_hosts)
    if realm.scheme != "https" and not trusted:
        raise OriginRefused(
            str(registry), f"it sends us to {realm.authority} for a token without https", 401
        )
    asked = [("service", challenge.parameters.get("service", ""))]
    asked += [("scope", scope) for scope in challenge.parameters.get("scope", "").split(" ")]
    asked = [(name, value) for name, value in asked if value]
    anonymous = TokenRequest(_with_query(realm, asked), {})
    if credentials is not None:
        if not trusted:
            raise OriginRefused(
                str(registry),
                f"it wants its password sent to {realm.authority}; if that is meant, "
                f'add "{realm.authority}" to origin.token_hosts for it',
                401,
            )
        return [TokenRequest(anonymous.url, {"Authorization": basic_authorization(credentials)})]
    if key is None or not trusted:
        return [anonymous]
    return [_signed(realm, asked, key=key, timestamp=timestamp, nonce=nonce), anonymous]


def read_token(body: bytes, *, url: WebUrl) -> str:
    """The token in a token service's answer. Raises OriginUnavailable if there is none."""
    try:
        answer = msgspec.json.decode(body, type=_TokenAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # the last: too deep
        raise OriginUnavailable(str(url), "the token service's answer is not understood") from None
    token = answer.token or answer.access_token
    if not _TOKEN.match(token):
        raise OriginUnavailable(str(url), "the token service's answer holds no token")
    return token


class _TokenAnswer(msgspec.Struct):
    """Docker's services say `token`, OAuth's say `access_token`, some say both."""

    token: Annotated[str, msgspec.Meta(max_length=65_536)] = ""
    access_token: Annotated[str, msgspec.Meta(max_length=65_536)] = ""


def _realm(challenge: Challenge, registry: WebUrl) -> WebUrl:
    try:
        return parse_url(challenge.parameters.get("realm", ""))
    except ValueError as error:
        raise OriginRefused(str(registry), f"it asks for a token from {error}", 401) from None


def _signed(
    realm: WebUrl, asked: list[tuple[str, str]], *, key: SigningKey, timestamp: int, nonce: bytes
) -> TokenRequest:
    """Ollama's dialect: the signature covers method, whole URL and the empty body's hash.

    Source: ollama/ollama, server/auth.go and auth/auth.go.
    """
    stamp = base64.urlsafe_b64encode(nonce).rstrip(b"=").decode()
    url = _with_query(realm, sorted([*asked, ("ts", str(timestamp)), ("nonce", stamp)]))
    message = f"GET,{url.full},{base64.b64encode(_SHA256_OF_NOTHING).decode()}".encode()
    public = base64.b64encode(_ssh_string(b"ssh-ed25519") + _ssh_string(key.public)).decode()
    signature = base64.b64encode(key.sign(message)).decode()
    return TokenRequest(url, {"Authorization": f"{public}:{signature}"})


def _ssh_string(data: bytes) -> bytes:
    """RFC 4251: length, then bytes; the public key travels as OpenSSH writes it."""
    return len(data).to_bytes(4, "big") + data


def _with_query(realm: WebUrl, asked: list[tuple[str, str]]) -> WebUrl:
    path, _, query = realm.target.partition("?")
    query = "&".join(part for part in (query, urlencode(asked, quote_via=quote)) if part)
    return replace(realm, target=f"{path}?{query}" if query else path)


def _challenges_in(text: str) -> list[Challenge]:
    """Read `scheme name=value, name="value", scheme …`; stop at what is not that."""
    found: list[Challenge] = []
    at = 0
    while (scheme := _SCHEME.match(text, at)) is not None:
        at = scheme.end()
        parameters: dict[str, str] = {}
        while (match := _PARAMETER.match(text, at)) is not None:
            at = match.end()
            value = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
            parameters.setdefault(match[1].lower(), value)
        found.append(Challenge(scheme[1].lower(), parameters))
    return found

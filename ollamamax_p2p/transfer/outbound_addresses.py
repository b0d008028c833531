"""Which addresses a registry may lead us to.

A model name, a redirect and a token challenge are outside text that makes this machine open
connections. Without a guard, `omx pull 169.254.169.254/a/b` or a redirect to `http://192.168.0.1/`
would make it a stranger's hand inside the local network. So a name is looked up once, its addresses
are checked here, and the connection is made to exactly the addresses that passed: looking the name
up again to connect would let its owner answer differently (DNS rebinding).
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import trio

from ollamamax_p2p.errors import OriginUnavailable

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Gives the addresses of a host as text, best first. Raises OSError."""

URL_CHARS_MAX = 8_192
"""Signed redirects of object stores reach about 2,000."""

ADDRESSES_MAX = 6
"""Addresses of one name that are tried; large services list dozens."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_MULTICAST_OR_RESERVED = "is_multicast", "is_reserved", "is_unspecified"

_HOST_NAME = re.compile(r"\A[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_.])?\Z")
_DEFAULT_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True)
class WebUrl:
    """An http(s) URL, taken apart once, so that what was checked is what is connected to.

    Two parsers that disagree about where the host ends are how such checks are got around; nothing
    here parses a URL a second time. Made by `parse_url` only.
    """

    scheme: str
    host: str
    """Lower case, without brackets."""
    port: int
    target: str
    """Path and query, ASCII."""

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: what has to be equal for a secret to go along."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """host[:port] as the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def full(self) -> str:
        """The whole URL. Its query may hold a signature: not for people, see `__str__`."""
        return f"{self.scheme}://{self.authority}{self.target}"

    def __str__(self) -> str:
        """For people and logs: without the query."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"

    def __repr__(self) -> str:
        return f"WebUrl({self})"


def parse_url(text: str, *, base: WebUrl | None = None) -> WebUrl:
    """Check a URL that came from outside; with a base it may be relative.

    Raises ValueError, whose text does not repeat the URL.
    """
    if len(text) > URL_CHARS_MAX or not text.isascii() or re.search(r"[\x00-\x20\x7f\\]", text):
        raise ValueError("a URL that is too long or has characters that no URL has")
    parts = urlsplit(text if base is None else urljoin(base.full, text))
    host, port = parts.hostname or "", parts.port
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("a URL that is neither http nor https")
    if "@" in parts.netloc:
        raise ValueError("a URL with a user name in it")
    # Brackets are for IPv6 only; urlsplit drops those around other things.
    bracketed = ("[" in parts.netloc) is (":" in host)
    if not (bracketed and (_HOST_NAME.match(host) or is_ip_address(host))) or port == 0:
        raise ValueError("a URL without a usable host")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebUrl(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], target)


async def system_resolver(host: str, port: int) -> list[str]:
    """What the operating system says. Raises OSError."""
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def usable_addresses(
    host: str, port: int, addresses: Iterable[str], *, allow_private: Collection[str]
) -> list[str]:
    """Those of a host's addresses that may be connected to, in order.

    allow_private: host or host:port entries that may be anywhere.
    Raises OriginUnavailable if there is none.
    """
    distinct = list(dict.fromkeys(addresses))
    if host_listed(host, port, allow_private):
        return distinct[:ADDRESSES_MAX]
    public = [address for address in distinct if is_public(address)]
    if not public:
        raise OriginUnavailable(
            shown_host(host, port),
            f"refused to connect, because it is at {', '.join(distinct[:3]) or 'no address'}, "
            f"which is not on the public internet; if that is meant, add "
            f'"{shown_host(host, port)}" to origin.allow_private',
        )
    return public[:ADDRESSES_MAX]


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet may be asked to connect to.

    IPv6 forms that carry an IPv4 address are judged by that one as well. Anything that is not an
    address is not public.
    """
    try:
        # A scope ("%eth0") occurs with link-local addresses only.
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    carried = _carried_ipv4(ip)
    if carried is not None and not is_public(str(carried)):
        return False
    if any(getattr(ip, kind) for kind in _MULTICAST_OR_RESERVED) and carried is None:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        return not ip.is_site_local and (ip.ipv4_mapped is not None or ip.is_global)
    return ip.is_global


def is_ip_address(host: str) -> bool:
    """Whether a URL's host is an address already."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback_name(host: str) -> bool:
    """Whether a URL's host is this machine without any look-up."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return is_ip_address(host) and ipaddress.ip_address(host).is_loopback


def host_listed(host: str, port: int, entries: Collection[str]) -> bool:
    """Whether host or host:port is among the entries; `[::1]` and `::1` are the same."""
    wanted = {host.lower(), f"[{host}]".lower(), shown_host(host, port).lower()}
    return any(entry.lower() in wanted for entry in entries)


def shown_host(host: str, port: int) -> str:
    """host:port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _carried_ipv4(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | None:
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)

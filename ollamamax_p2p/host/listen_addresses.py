"""The addresses we listen on: checked before, and shown per interface afterwards."""

import errno
import ipaddress
import socket
from collections.abc import Iterable

import ifaddr
import trio
from multiaddr import Multiaddr

from ollamamax_p2p.errors import BadAddress, LocalTrouble, PortInUse
from ollamamax_p2p.identity import parse_transport


async def check_listen(texts: Iterable[str]) -> list[str]:
    """The normal form of addresses that we can listen on. Raises BadAddress or PortInUse."""
    found: dict[tuple[str, int], str] = {}
    for text in texts:
        address, ip, port = _listen_address(text)
        if port and found.setdefault((ip, port), address) != address:
            raise BadAddress(text, "TCP and WebSocket need a port each")
        if not port:
            found[address, len(found)] = address
        await _try_port(text, ip, port)
    return list(found.values())


def _listen_address(text: str) -> tuple[str, str, int]:
    """Its normal form, IP address and port."""
    address = Multiaddr(parse_transport(text))
    names = [protocol.name for protocol in address.protocols()]
    if names not in (["ip4", "tcp"], ["ip6", "tcp"], ["ip4", "tcp", "ws"], ["ip6", "tcp", "ws"]):
        raise BadAddress(text, "listen on /ip4/…/tcp/… or /ip6/…/tcp/…, with or without /ws")
    ip = str(address.value_for_protocol(names[0]))
    return str(address), ip, int(str(address.value_for_protocol("tcp")))


async def _try_port(text: str, ip: str, port: int) -> None:
    """Listen there for a moment.

    py-libp2p listens with SO_REUSEPORT, so that a second program on the same port would silently
    get half of the connections; and it swallows failures. So we try the port first, without.
    Raises BadAddress or PortInUse.
    """
    try:
        with trio.socket.socket(_family(ip), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await probe.bind((ip, port))
            probe.listen(1)
    except OSError as error:
        raise _trouble(text, error) from error


def _trouble(text: str, error: OSError) -> BadAddress | LocalTrouble:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(text, "--listen")
    if error.errno == errno.EADDRNOTAVAIL:
        return BadAddress(text, "this machine has no such address")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadAddress(text, "not permitted; choose a port above 1023")
    return BadAddress(text, f"cannot listen there ({error.strerror})")


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def per_interface(transports: Iterable[str]) -> list[str]:
    """The same multiaddrs with wildcards replaced by this machine's addresses; loopback last, and
    before it those over WebSocket.
    """
    found: dict[str, None] = {}
    for text in transports:
        _, kind, ip, rest = text.split("/", 3)
        for each in machine_ips(kind) if ipaddress.ip_address(ip).is_unspecified else [ip]:
            found[f"/{kind}/{each}/{rest}"] = None
    return sorted(found, key=_last)


def _last(transport: str) -> tuple[bool, bool]:
    return ipaddress.ip_address(transport.split("/")[2]).is_loopback, transport.endswith("/ws")


def machine_ips(kind: str) -> list[str]:
    """This machine's addresses; kind: ip4 or ip6. Link-local ones of IPv6 cannot be dialled without
    naming an interface, so they are left out.
    """
    found = []
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            if each.is_IPv4 == (kind == "ip4"):
                ip = each.ip if isinstance(each.ip, str) else each.ip[0]
                if kind == "ip4" or not ipaddress.ip_address(ip).is_link_local:
                    found.append(ip)
    return found

"""Ollama's environment variables where they are written otherwise than our settings.

Ollama warns of a value that it cannot use and takes its default; so nothing here is an error.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import ip_address

_DEFAULT_PORTS = {"": "11434", "http": "80", "https": "443"}


def listen_of_host(text: str) -> str | None:
    """OLLAMA_HOST, `[scheme://][host][:port][/path]`, as host:port to listen on.

    None for the name of a machine: it tells Ollama's client where a server is, and this is seldom
    here.
    """
    scheme, marker, rest = text.partition("://")
    if not marker:
        scheme, rest = "", text
    host, _, port = _split(rest.partition("/")[0])
    if not (port.isascii() and port.isdigit() and int(port) <= 65_535):
        port = _DEFAULT_PORTS.get(scheme.lower(), "11434")
    if host.lower() == "localhost":
        return f"localhost:{port}"
    try:
        address = ip_address(host or "0.0.0.0")
    except ValueError:
        return None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _split(place: str) -> tuple[str, str, str]:
    """Host and port. A missing host in front of a port is every address; nothing is loopback."""
    match = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", place)
    if match:
        return match[1], "", match[2] or ""
    if place.count(":") == 1:
        return place.partition(":")
    return place or "127.0.0.1", "", ""


def streams_of(text: str) -> str | None:
    """OLLAMA_MAX_TRANSFER_STREAMS within what a registry may be asked for at once."""
    return str(min(max(int(text), 1), 64)) if re.fullmatch(r"[0-9]{1,9}", text) else None


READERS: Mapping[str, Callable[[str], str | None]] = {
    "OLLAMA_HOST": listen_of_host,
    "OLLAMA_MAX_TRANSFER_STREAMS": streams_of,
}
"""Variable -> our spelling of its value; None where we do not take it. Others are taken as they
are.
"""

"""Ollama's environment variables where they are written otherwise than our settings.

Ollama warns of a value that it cannot use and takes its default; so nothing here is an error.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import ip_address

from ollamamax_p2p.config.checks import SECONDS_MAX

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


def seconds_of(text: str) -> float | None:
    """A duration as Go writes it, `1h30m`, `-1ns`, or whole seconds."""
    if re.fullmatch(r"[+-]?[0-9]{1,12}", text):
        return float(text)
    match = re.fullmatch(rf"([+-]?)((?:{_PART})+)", text)
    if match is None:
        return None
    total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, match[2]))
    return -total if match[1] == "-" else total


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"([0-9]{1,12}(?:\.[0-9]{0,9})?)(ns|us|µs|ms|s|m|h)"


def _keep_alive(text: str) -> str | None:
    """Negative: for ever, there as here."""
    seconds = seconds_of(text)
    return None if seconds is None else str(min(seconds, SECONDS_MAX))


def _timeout(text: str) -> str | None:
    """None or a negative one is none, which is a month here."""
    seconds = seconds_of(text)
    if seconds is None:
        return None
    return str(min(seconds, SECONDS_MAX) if seconds > 0 else SECONDS_MAX)


def _count(text: str, most: int) -> str | None:
    """0 leaves it to the program."""
    is_count = re.fullmatch(r"[0-9]{1,9}", text) and int(text) > 0
    return str(min(int(text), most)) if is_count else None


READERS: Mapping[str, Callable[[str], str | None]] = {
    "OLLAMA_HOST": listen_of_host,
    "OLLAMA_MAX_TRANSFER_STREAMS": partial(_count, most=64),
    "OLLAMA_NUM_PARALLEL": partial(_count, most=1_024),
    "OLLAMA_CONTEXT_LENGTH": partial(_count, most=2**24),
    "OLLAMA_KEEP_ALIVE": _keep_alive,
    "OLLAMA_LOAD_TIMEOUT": _timeout,
    "OLLAMA_MAX_QUEUE": partial(_count, most=10**6),
}
"""Variable -> our spelling of its value, within our bounds; None where we do not take it. Others
are taken as they are.
"""

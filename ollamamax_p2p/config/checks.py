"""Which values can be used: ranges, addresses, and settings that must fit each other."""

import math
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from ollamamax_p2p.errors import BadAddress, BadPeerId

Problem = tuple[str, str]
"""A setting's key and what is wrong with its value."""

_COUNTS_MIN: Mapping[str, int] = {
    "host.connections_max": 1,
    "transfer.upload_slots": 0,  # 0: a node that only takes; honest about it, so allowed
    "transfer.sources_max": 1,
    "transfer.stall_strikes": 1,
    "transfer.requests_in_flight_bytes": 1024 * 1024,  # one chunk of the smallest size
    "origin.connections": 1,
    "api.connections_max": 8,
    "discovery.remembered_peers_max": 0,
    "content.reserve_bytes": 0,
    "inference.slots": 1,
    "inference.ollama_slots": 1,
    "inference.openai_slots": 1,
    "inference.context_length": 16,
    "inference.batch_tokens": 1,
    "router.queue_max": 1,
    "router.queue_per_user_max": 1,
    "router.attempts_max": 1,
    "router.gossip_fanout": 1,
    "router.gossip_repeats": 1,
    "router.nodes_max": 2,
    "router.table_bytes_max": 1024 * 1024,
    "consensus.max_message_bytes": 64 * 1024,
    "consensus.max_command_bytes": 256 * 1024,  # what the cluster's commands may take
    "consensus.segment_bytes": 1024 * 1024,
    "consensus.snapshot_rate": 64 * 1024,
}

_COUNTS_MAX: Mapping[str, int] = {
    "host.connections_max": 65_536,
    "transfer.upload_slots": 1_024,
    "transfer.sources_max": 1_024,
    "api.connections_max": 65_536,
    "origin.connections": 64,  # more is an attack on the registry
    "discovery.remembered_peers_max": 100_000,
    "inference.slots": 1_024,
    "inference.ollama_slots": 1_024,
    "inference.openai_slots": 65_536,
    "inference.context_length": 2**24,
    "inference.threads": 1_024,
    "router.attempts_max": 100,
    "router.gossip_fanout": 100,
}

SECONDS_MAX = 30 * 86_400.0
"""No interval or timeout of ours makes sense beyond a month; a larger one is a wrong unit."""

_ORDERED = (
    ("host.heartbeat_interval_s", "host.heartbeat_timeout_s", "or every peer is dropped"),
    ("host.reconnect_delay_s_min", "host.reconnect_delay_s_max", "the pause grows between the two"),
    (
        "discovery.announce_interval_s",
        "discovery.announce_lifetime_s",
        "or announcements lapse before they are renewed",
    ),
    (
        "consensus.heartbeat_ticks",
        "consensus.election_ticks",
        "or members elect another leader before they have heard of the first",
    ),
)


NAME_CHARS_MAX = 64
"""A node's name is shown in tables and sent to peers; host names may have 253 characters."""


def first_problem(values: Mapping[str, Any]) -> Problem | None:
    """The first thing that cannot be used. values: all of a config's, by key."""
    for key, value in values.items():
        problem = value_problem(key, value)
        if problem:
            return key, problem
    return next(_misfits(values), None)


def value_problem(key: str, value: Any) -> str | None:
    """What is wrong with one setting's value, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return _number_problem(key, value)
    check = _CHECKS.get(key)
    return check(value) if check else None


def _misfits(values: Mapping[str, Any]) -> Iterator[Problem]:
    for low, high, why in _ORDERED:
        if values[low] > values[high]:
            yield low, f"must not be more than {high} ({values[high]:g}), {why}"
    if values["consensus.heartbeat_ticks"] == values["consensus.election_ticks"]:
        yield "consensus.election_ticks", "must be more than consensus.heartbeat_ticks"


def _number_problem(key: str, value: float) -> str | None:
    if key == "inference.keep_alive_s" and (value <= 0 or value == math.inf):
        return None  # 0: not at all; negative: for ever
    if key.endswith(("_s", "_s_min", "_s_max")):
        if not math.isfinite(value) or not 0 < value <= SECONDS_MAX:
            return f"{value:g} is not between 0 and {SECONDS_MAX:,.0f} seconds"
        return None
    least = 1 if key.startswith("consensus.") else 0
    low, high = _COUNTS_MIN.get(key, least), _COUNTS_MAX.get(key)
    if value < low:
        return f"{value} is too small, the least is {low}"
    if high is not None and value > high:
        return f"{value} is too large, the most is {high}"
    return None


def _name_problem(name: str) -> str | None:
    if not 1 <= len(name) <= NAME_CHARS_MAX:
        return f"a name has 1 to {NAME_CHARS_MAX} characters"
    return None if name.isprintable() else "a name has printable characters only"


def _transports_problem(addresses: tuple[str, ...]) -> str | None:
    from ollamamax_p2p.identity import parse_transport  # costs multiaddr

    return _first_bad(parse_transport, addresses)


def _listen_problem(addresses: tuple[str, ...]) -> str | None:
    if not addresses:
        return "give at least one, e.g. /ip4/0.0.0.0/tcp/4011"
    return _transports_problem(addresses)


def _addresses_problem(addresses: tuple[str, ...]) -> str | None:
    from ollamamax_p2p.identity import parse_address

    return _first_bad(parse_address, addresses)


def _first_bad(parse: Any, texts: tuple[str, ...]) -> str | None:
    for text in texts:
        try:
            parse(text)
        except (BadAddress, BadPeerId) as error:
            return str(error)
    return None


def _interfaces_problem(interfaces: tuple[str, ...]) -> str | None:
    for text in interfaces:
        try:
            ip_address(text)
        except ValueError:
            return f"{text!r} is not an IP address; give the interface's own, e.g. 192.168.1.7"
    return None


def _api_problem(listen: str) -> str | None:
    problem = _place_problem(listen)
    host = _host_of(listen)
    if problem or host == "localhost" or ip_address(host).is_loopback:
        return problem
    return (
        f"{host} is not a loopback address; the node's API has no encryption, so only this machine "
        "(Ollama's API may be served elsewhere: api.ollama_listen)"
    )


def _ollama_listen_problem(listen: str) -> str | None:
    return _place_problem(listen) if listen else None


def _place_problem(listen: str) -> str | None:
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65_535:
        return f"{listen!r} is not host:port with a port of 0 to 65535, e.g. 127.0.0.1:11435"
    if host == "localhost":
        return None
    try:
        address = ip_address(_host_of(listen))
    except ValueError:
        return f"{host!r} is not an IP address, e.g. 127.0.0.1:11435"
    if address.version == 6 and not host.startswith("["):
        return f"write an IPv6 address in brackets: [{host}]:{port}"
    return None


def _host_of(listen: str) -> str:
    return listen.rpartition(":")[0].removeprefix("[").removesuffix("]")


def _origins_problem(origins: tuple[str, ...]) -> str | None:
    for origin in origins:
        scheme, marker, rest = origin.partition("://")
        if origin != "*" and (not marker or not scheme or not rest or "/" in rest):
            return f"{origin!r} is not scheme://host[:port], e.g. https://chat.example.org"
        if origin.count("*") > 1:
            return f"{origin!r} has more than one *"
    return None


def _hosts_problem(hosts: tuple[str, ...]) -> str | None:
    wrong = next((host for host in hosts if not host or set(host) & set("/:* ")), None)
    return None if wrong is None else f"{wrong!r} is not a host's name without a port"


def _registries_problem(hosts: tuple[str, ...]) -> str | None:
    wrong = next((host for host in hosts if not host or "/" in host or " " in host), None)
    return None if wrong is None else f"{wrong!r} is not host[:port]"


def _token_hosts_problem(hosts: Mapping[str, str]) -> str | None:
    return _registries_problem((*hosts, *hosts.values()))


def _credentials_problem(credentials: Mapping[str, str]) -> str | None:
    for host, secret in credentials.items():
        if _registries_problem((host,)):
            return f"{host!r} is not host[:port]"
        if ":" not in secret:
            return f"the value for {host} is not user:password"  # the secret itself is not shown
    return None


def _region_problem(region: str) -> str | None:
    if re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?", region):
        return None
    return f"{region!r} is not one word of letters, digits, '-', '_' and '.', at most 64"


def _ollama_problem(url: str) -> str | None:
    return None if url in ("", "auto") else _url_problem(url)


def _url_problem(url: str) -> str | None:
    if re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", url):
        return None
    return f"{url!r} is not a URL like http://10.0.0.7:8000/v1"


def _openai_problem(servers: tuple[str, ...]) -> str | None:
    names = [server.partition("=")[0] for server in servers]
    for server, name in zip(servers, names, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}", name) or "=" not in server:
            return f"{server!r} is not name=url, e.g. vllm=http://10.0.0.7:8000/v1"
        if name in ("embedded", "ollama") or names.count(name) > 1:
            return f"a back end is called {name!r} already; give this one another name"
        if problem := _url_problem(server.partition("=")[2]):
            return problem
    return None


def _voter_problem(voter: str) -> str | None:
    return None if voter in ("auto", "yes", "no") else f"{voter!r} is not auto, yes or no"


_CHECKS: Mapping[str, Any] = {
    "cluster.region": _region_problem,
    "cluster.voter": _voter_problem,
    "inference.ollama_url": _ollama_problem,
    "inference.openai": _openai_problem,
    "name": _name_problem,
    "host.listen": _listen_problem,
    "host.announce": _transports_problem,
    "discovery.bootstrap": _addresses_problem,
    "discovery.mdns_interfaces": _interfaces_problem,
    "origin.insecure": _registries_problem,
    "origin.allow_private": _registries_problem,
    "origin.credentials": _credentials_problem,
    "origin.token_hosts": _token_hosts_problem,
    "api.listen": _api_problem,
    "api.ollama_listen": _ollama_listen_problem,
    "api.origins": _origins_problem,
    "api.hosts": _hosts_problem,
}

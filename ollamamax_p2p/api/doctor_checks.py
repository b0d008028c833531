"""What is wrong with this machine, and the mend: the checks behind `omx doctor`.

Each check looks at one thing and gives findings; none changes anything, and none of them fails when
what it looks at is broken. A running node is asked for what only it can know.
"""

import os
import platform
import shutil
import socket
import ssl
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import h11
import trio

from ollamamax_p2p.api.client import LocalClient
from ollamamax_p2p.api.node_file import NODE_FILE_NAME, TOKEN_FILE_NAME
from ollamamax_p2p.api.served_node import NodeStatus
from ollamamax_p2p.api.settings import ApiSettings
from ollamamax_p2p.content import ContentSettings
from ollamamax_p2p.discovery import DiscoverySettings
from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.host import HostSettings
from ollamamax_p2p.transfer import OriginSettings

CLOCK_ORIGIN = "https://registry.ollama.ai/"
"""Asked for the time, in the Date header of whatever it answers, if origins are enabled."""

CLOCK_TIMEOUT_S = 4.0
CLOCK_OFFSET_S_MAX = 60.0
"""Tickets and announcements live for minutes; a clock that is off by more makes them misbehave."""

MULTICAST_TIMEOUT_S = 1.0
_MDNS_GROUP = "224.0.0.251"
_SECRET_FILES = ("node-key", "swarm", TOKEN_FILE_NAME, NODE_FILE_NAME)

Verdict = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    check: str
    verdict: Verdict
    text: str
    mend: str = ""
    """What to do about it; empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class _Machine:
    """What is examined."""

    data_dir: Path
    content: ContentSettings
    host: HostSettings
    discovery: DiscoverySettings
    origin: OriginSettings
    api: ApiSettings
    clock_origin: str
    status: NodeStatus | None
    """Of the running node, if one runs."""


async def examine_machine(
    *,
    data_dir: Path,
    content: ContentSettings,
    host: HostSettings,
    discovery: DiscoverySettings,
    origin: OriginSettings,
    api: ApiSettings,
    clock_origin: str = CLOCK_ORIGIN,
) -> list[Finding]:
    """Examine this machine with these settings. Takes some seconds where there is no network."""
    status = await _ask_node(data_dir)
    machine = _Machine(data_dir, content, host, discovery, origin, api, clock_origin, status)
    checks: list[Callable[[_Machine], Awaitable[list[Finding]]]] = [
        *(_in_thread(check) for check in (_versions, _node, _folders, _secrets, _models, _ports)),
        *(_in_thread(check) for check in (_firewall, _file_times)),
        _clock,
        _multicast,
        _in_thread(_swarms),
    ]
    found: dict[int, list[Finding]] = {}

    async def run(index: int, check: Callable[[_Machine], Awaitable[list[Finding]]]) -> None:
        found[index] = await check(machine)

    async with trio.open_nursery() as nursery:
        for index, check in enumerate(checks):
            nursery.start_soon(run, index, check)
    return [finding for index in sorted(found) for finding in found[index]]


def _in_thread(
    check: Callable[[_Machine], Iterator[Finding]],
) -> Callable[[_Machine], Awaitable[list[Finding]]]:
    """For checks that touch the disk or make system calls that may wait."""

    async def run(machine: _Machine) -> list[Finding]:
        return await trio.to_thread.run_sync(lambda: list(check(machine)))

    return run


async def _ask_node(data_dir: Path) -> NodeStatus | None:
    try:
        return await LocalClient.find(data_dir).status()
    except OmxError:
        return None


# -- this machine ------------------------------------------------------------------------------


def _versions(machine: _Machine) -> Iterator[Finding]:
    ours, theirs = _version_of("ollamamax-p2p"), _version_of("libp2p")
    python = platform.python_version()
    text = f"omx {ours}, Python {python}, py-libp2p {theirs}, {platform.platform(terse=True)}"
    if _numbers(theirs) < (0, 8, 1):
        mend = "install libp2p 0.8.1 or newer: older ones can be made to run out of memory"
        yield Finding("versions", "fail", text, mend)
    else:
        yield Finding("versions", "ok", text)


def _node(machine: _Machine) -> Iterator[Finding]:
    status = machine.status
    if status is None:
        yield Finding("node", "unknown", f"none runs on {machine.data_dir}", "omx up")
    elif not status.peer_count:
        text = f"{status.peer_id} runs, connected to nobody"
        yield Finding(
            "node", "warn", text, "omx join TICKET, with one that a member got from `omx invite`"
        )
    else:
        yield Finding("node", "ok", f"{status.peer_id} runs, {status.peer_count} peers")


def _folders(machine: _Machine) -> Iterator[Finding]:
    path = machine.data_dir
    parent, problem = _nearest(path)
    if problem:
        yield Finding(
            "data folder", "fail", f"{path} cannot be reached: {problem}", _mend_way(path)
        )
        return
    if parent != path:
        if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
            yield Finding("data folder", "ok", f"{path} will be made")
        else:
            mend = f"make it and give it to this user, or choose another with --data-dir ({parent})"
            yield Finding("data folder", "fail", f"{path} cannot be made", mend)
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if not path.is_dir() or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        mend = f"chown or chmod it, or choose another with --data-dir (mode {mode:04o})"
        yield Finding("data folder", "fail", f"{path} cannot be written", mend)
    elif mode & 0o022:
        text = f"others may write in {path} (mode {mode:04o})"
        yield Finding("data folder", "fail", text, f"chmod 700 '{path}'")
    else:
        yield Finding("data folder", "ok", f"{path} (mode {mode:04o})")


def _nearest(path: Path) -> tuple[Path, str]:
    """The path itself or the nearest folder above it that can be seen; and what, if anything, keeps
    this user from seeing whether there is more.
    """
    problem = ""
    for each in (path, *path.parents):
        try:
            if each.exists():
                return each, problem
        except OSError as error:
            problem = problem or (error.strerror or str(error)).lower()
    return Path("/"), problem


def _mend_way(path: Path) -> str:
    return f"let this user read {path} and enter every folder above it"


def _secrets(machine: _Machine) -> Iterator[Finding]:
    exposed = []
    for name in _SECRET_FILES:
        path = machine.data_dir / name
        try:
            mode = stat.S_IMODE(path.lstat().st_mode)
        except OSError:
            continue  # not there, or the folder's own finding says why
        if mode & 0o077:
            exposed.append(path)
    if exposed:
        names = " ".join(f"'{path}'" for path in exposed)
        text = f"others may read {', '.join(path.name for path in exposed)}"
        yield Finding("secrets", "fail", text, f"chmod 600 {names}")
    else:
        yield Finding("secrets", "ok", "no key or token can be read by others")


def _models(machine: _Machine) -> Iterator[Finding]:
    # A running node may have been given another store than the one that is set here.
    path = Path(machine.status.store.path) if machine.status else machine.content.models
    place, problem = _nearest(path)
    if not problem and place == path and not os.access(path, os.R_OK | os.X_OK):
        problem = "permission denied"
    if problem:
        # A store that Ollama's own service made belongs to its user, and is often closed to others.
        mend = f"{_mend_way(path)}, or choose another with --models"
        yield Finding("models", "fail", f"{path} cannot be reached: {problem}", mend)
    elif not place.is_dir():
        mend = "move it away, or choose another with --models"
        yield Finding("models", "fail", f"{place} is not a folder", mend)
    elif not os.access(place, os.W_OK | os.X_OK):
        text = f"{path} is read-only: it can be served, but nothing can be pulled into it"
        yield Finding("models", "warn", text, "make it writable, or choose another with --models")
    else:
        yield Finding("models", "ok", str(path) if path.exists() else f"{path} will be made")
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free in {place}"
    if free < machine.content.reserve_bytes:
        reserve = f"{machine.content.reserve_bytes / 1e9:.1f} GB must stay free"
        mend = f"{reserve}; omx rm what is not needed, or set content.reserve_bytes"
        yield Finding("disk", "fail", text, mend)
    elif free < machine.content.reserve_bytes + 5e9:
        yield Finding("disk", "warn", text, "larger models will not fit")
    else:
        yield Finding("disk", "ok", text)


def _ports(machine: _Machine) -> Iterator[Finding]:
    if machine.status is not None:
        listening = ", ".join(address.partition("/p2p/")[0] for address in machine.status.addresses)
        yield Finding("ports", "ok", f"the node listens on {listening}")
        return
    for what, flag, host, port in _endpoints(machine):
        problem = _bind_problem(host, port)
        if problem:
            mend = f"stop what holds it (ss -ltnp 'sport = :{port}'), or choose another with {flag}"
            yield Finding("ports", "fail", f"{what} {host}:{port}: {problem}", mend)
        else:
            yield Finding("ports", "ok", f"{what} {host}:{port} is free")


def _endpoints(machine: _Machine) -> Iterator[tuple[str, str, str, int]]:
    """Where the node would listen: what for, the flag, host, port."""
    for address in machine.host.listen:
        parts = address.split("/")
        if len(parts) > 4 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp":
            yield "peers", "--listen", parts[2], int(parts[4])
    host, _, port = machine.api.listen.rpartition(":")
    yield "API", "--api", host.strip("[]"), int(port)


def _bind_problem(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _firewall(machine: _Machine) -> Iterator[Finding]:
    port = next((port for what, _, _, port in _endpoints(machine) if what == "peers"), 4011)
    if "ENABLED=yes" in _text_of(Path("/etc/ufw/ufw.conf")):
        mend = f"sudo ufw allow {port}/tcp && sudo ufw allow 5353/udp"
        yield Finding("firewall", "warn", "ufw is on; it may keep peers out", mend)
    elif Path("/run/firewalld").is_dir():
        mend = f"sudo firewall-cmd --permanent --add-port={port}/tcp --add-service=mdns"
        mend += " && sudo firewall-cmd --reload"
        yield Finding("firewall", "warn", "firewalld is on; it may keep peers out", mend)
    elif platform.system() == "Darwin":
        mend = "System Settings → Network → Firewall: allow incoming connections for python"
        yield Finding("firewall", "unknown", "macOS asks when a peer first connects", mend)
    else:
        yield Finding("firewall", "ok", "neither ufw nor firewalld is on; nftables not looked at")


def _text_of(path: Path) -> str:
    """Empty where there is none, or none for us."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _file_times(machine: _Machine) -> Iterator[Finding]:
    """A file of ours from the future means that the clock has been set back."""
    now = datetime.now(UTC).timestamp()
    newest = 0.0
    for path in (machine.data_dir, *_entries(machine.data_dir), machine.content.models / "blobs"):
        try:
            newest = max(newest, path.lstat().st_mtime)
        except OSError:
            continue
    if newest > now + CLOCK_OFFSET_S_MAX:
        text = f"files were written {newest - now:.0f} s in the future: the clock was set back"
        yield Finding("clock", "warn", text, "set the clock (timedatectl set-ntp true)")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())[:1_000]
    except OSError:
        return []


def _swarms(machine: _Machine) -> Iterator[Finding]:
    status = machine.status
    if status is None:
        yield Finding("other swarms", "unknown", "only a running node sees them", "omx up")
    elif status.other_swarms:
        text = f"also on this network: {', '.join(status.other_swarms)}"
        mend = "if this machine belongs there: omx leave, then omx join with a ticket from there"
        yield Finding("other swarms", "warn", text, mend)
    else:
        yield Finding("other swarms", "ok", "none seen on this network")


# -- the clock ---------------------------------------------------------------------------------


async def _clock(machine: _Machine) -> list[Finding]:
    if not machine.origin.enabled:
        return [Finding("clock", "unknown", "origins are disabled, so nobody was asked")]
    host = machine.clock_origin.partition("://")[2].partition("/")[0]
    with trio.move_on_after(CLOCK_TIMEOUT_S):
        offset = await _offset_from(machine.clock_origin)
        if offset is not None:
            return [_clock_finding(offset, host)]
    return [Finding("clock", "unknown", f"{host} did not tell the time (no network?)")]


def _clock_finding(offset_s: float, source: str) -> Finding:
    """offset_s: their clock minus ours."""
    if abs(offset_s) <= CLOCK_OFFSET_S_MAX:
        return Finding("clock", "ok", f"agrees with {source}")
    direction = "behind" if offset_s > 0 else "ahead of"
    text = f"{abs(offset_s):.0f} s {direction} {source}"
    return Finding("clock", "fail", text, "set the clock (timedatectl set-ntp true)")


async def _offset_from(url: str) -> float | None:
    """What a web server's Date header says, minus our clock; None if it cannot be had."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.partition("/")[0].partition(":")
    try:
        stream = await _connected(scheme, host, int(port or (443 if scheme == "https" else 80)))
        async with stream:
            return await _date_offset(stream, host)
    except (OSError, ssl.SSLError, trio.BrokenResourceError, h11.RemoteProtocolError, ValueError):
        return None


async def _connected(scheme: str, host: str, port: int) -> trio.abc.Stream:
    if scheme == "https":
        # The certificate is not checked: with a wrong clock it would seem expired, and that is what
        # we are here to find out. Nothing is sent and nothing but the time is read.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return await trio.open_ssl_over_tcp_stream(
            host, port, ssl_context=context, https_compatible=True
        )
    return await trio.open_tcp_stream(host, port)


async def _date_offset(stream: trio.abc.Stream, host: str) -> float | None:
    http = h11.Connection(h11.CLIENT)
    headers = [("Host", host), ("Connection", "close"), ("User-Agent", "omx-doctor")]
    request = h11.Request(method="HEAD", target="/", headers=headers)
    await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(bytes(await stream.receive_some(65_536)))
    if not isinstance(event, h11.Response):
        return None
    dates = [value for name, value in event.headers if name == b"date"]
    if not dates:
        return None
    theirs = parsedate_to_datetime(dates[0].decode("latin-1"))
    if theirs.tzinfo is None:  # a zone of "-0000" says UTC, and not where
        theirs = theirs.replace(tzinfo=UTC)
    return (theirs - datetime.now(UTC)).total_seconds()


# -- multicast ---------------------------------------------------------------------------------


async def _multicast(machine: _Machine) -> list[Finding]:
    """Send a datagram to mDNS's group on each interface, and see whether it comes back."""
    if not machine.discovery.mdns:
        return [Finding("mDNS", "ok", "switched off")]
    interfaces = machine.discovery.mdns_interfaces or ("0.0.0.0",)
    findings = [await _multicast_on(interface) for interface in interfaces]
    if machine.status is not None and machine.status.mdns not in ("on", "off"):
        findings.append(Finding("mDNS", "warn", f"the node says: {machine.status.mdns}"))
    return findings


async def _multicast_on(interface: str) -> Finding:
    where = "the default interface" if interface == "0.0.0.0" else interface
    mend = "peers must be named: omx join TICKET, or discovery.bootstrap; or --no-mdns"
    try:
        if ":" in interface:
            return Finding("mDNS", "unknown", f"{where}: IPv6 multicast is not tried")
        with trio.move_on_after(MULTICAST_TIMEOUT_S):
            await _send_to_myself(interface)
            return Finding("mDNS", "ok", f"multicast works on {where}")
    except OSError as error:
        text = f"no multicast on {where} ({error.strerror or error})"
        return Finding("mDNS", "warn", text, mend)
    return Finding("mDNS", "warn", f"multicast sent on {where} does not come back", mend)


async def _send_to_myself(interface: str) -> None:
    token = os.urandom(16)
    membership = struct.pack("4s4s", socket.inet_aton(_MDNS_GROUP), socket.inet_aton(interface))
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # A port of our own, not 5353: the datagram must not reach the network's responders.
        await probe.bind(("", 0))
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(interface))
        await probe.sendto(token, (_MDNS_GROUP, probe.getsockname()[1]))
        while (await probe.recvfrom(64))[0] != token:
            pass


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _numbers(text: str) -> tuple[int, ...]:
    """`0.8.1` as (0, 8, 1); an unknown version is not called too old."""
    parts = text.split(".")
    return tuple(int(part) for part in parts if part.isdigit()) or (999,)

"""Raft beside etcd and PySyncObj: how fast commands are agreed on, read and survived.

    python benchmarks/bench_raft.py [--json] [--quick] [--pysyncobj PYTHON] [--only NAME]

Three real processes over libp2p with Noise in a private swarm, commands of 256 bytes, each answered
when a majority has it on disk (fdatasync) and its proposer has applied it. Who proposes sits in the
leader's process, as in a node, and in PySyncObj's. etcd (Debian's etcd-server) is a server, so its
load comes over gRPC: from a small program with etcd's own Go client (`raft_counterparts/`, built
with `go`), sent to the leader. PySyncObj writes nothing to disk. It is run as it comes and with
`appendEntriesUseBatch=False`, without which one command at a time waits for its ticks.

The systems take turns, so that what else the machine does falls on all of them; of several rounds
the median is given. A full run takes ten minutes, --quick two. What is missing is named.
"""

import argparse
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_raft_core import COMMAND, Cluster, run
from ollamamax_p2p.consensus.core.messages import ConfState, Snapshot, SnapshotMetadata
from ollamamax_p2p.consensus.core.raft_frames import (
    batch,
    decode_batch,
    encode_message,
    is_between_nodes,
)
from ollamamax_p2p.consensus.ram_log import RamLog

HERE = Path(__file__).parent
COUNTERPARTS = HERE / "raft_counterparts"
IN_FLIGHT = (1, 64, 1000)
ETCD_CONNECTIONS = {1: 1, 64: 1, 1000: 10}
"""What was fastest of 1, 8, 10 and 100."""
LEADER_WAIT_S = 30


class Process:
    """A child that answers each line with one."""

    def __init__(self, *line: str, stderr: int | None = None) -> None:
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )

    def send(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r} ended with {self.process.wait()}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise SystemExit(said["error"])
        return said

    def ask(self, **what: Any) -> dict[str, Any]:
        self.send(**what)
        return self.receive()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def new_node() -> Process:
    """A process of ours with everything imported, before it is any node."""
    return Process(sys.executable, str(HERE / "raft_node.py"))


class Ours:
    """A cluster of processes, each with its folder."""

    def __init__(self, folder: Path, count: int, *, state: str = "ram", **settings: Any) -> None:
        self.folder, self.state, self.settings = folder, state, settings
        self.ids = tuple(range(1, count + 1))
        self.nodes: dict[int, Process] = {}
        self.addresses: dict[int, list[str]] = {}

    def start(self, raft_id: int, process: Process | None = None, **given: Any) -> dict[str, Any]:
        """Open a node and connect it to those that run."""
        node = process or new_node()
        if process is None:
            node.receive()
        said = node.ask(
            do="open", id=raft_id, folder=str(self.folder / str(raft_id)), private=True,
            state=self.state, settings=self.settings, **given,
        )  # fmt: skip
        others = [at for other, at in self.addresses.items() if other in self.nodes]
        self.nodes[raft_id], self.addresses[raft_id] = node, said["addresses"]
        node.ask(do="connect", to=others)
        return said

    def start_all(self) -> None:
        waiting = {raft_id: new_node() for raft_id in self.ids}
        for raft_id, process in waiting.items():
            process.receive()
            self.start(raft_id, process, voters=self.ids)

    def leader(self) -> int:
        """Who leads, once all agree."""
        until = time.perf_counter() + LEADER_WAIT_S
        while time.perf_counter() < until:
            said = {int(each.ask(do="status")["leader"]) for each in self.nodes.values()}
            if len(said) == 1 and (leader := said.pop()) in self.nodes:
                return leader
            time.sleep(0.05)
        raise SystemExit("no leader was elected")

    def settle(self) -> None:
        """Until all have applied the same."""
        leader = self.nodes[self.leader()]
        index = leader.ask(do="status")["committed"]
        for each in self.nodes.values():
            each.ask(do="applied", index=index)

    def end(self) -> None:
        for each in self.nodes.values():
            each.end()


@contextmanager
def ours(folder: Path, count: int = 3, **given: Any) -> Iterator[Ours]:
    cluster = Ours(folder, count, **given)
    try:
        cluster.start_all()
        cluster.leader()
        yield cluster
    finally:
        cluster.end()


Figures = dict[str, list[float]]
"""What was measured, by name, each round."""


def take(figures: Figures, name: str, said: dict[str, Any]) -> None:
    """One load's rate, and of a single writer its latency."""
    figures.setdefault(f"{name}, per s", []).append(said["count"] / said["seconds"])
    for key in ("p50_ms", "p99_ms"):
        figures.setdefault(f"{name}, {key[:3]} ms", []).append(said[key])


def measure_ours(figures: Figures, folder: Path, seconds: float) -> None:
    with ours(folder) as cluster:
        leader = cluster.nodes[cluster.leader()]
        leader.ask(do="puts", in_flight=1, seconds=0.5)
        for count in IN_FLIGHT:
            said = leader.ask(do="puts", in_flight=count, seconds=seconds)
            take(figures, f"ours: puts, {count} in flight", said)
        for count in (64, 1000):
            said = leader.ask(do="reads", in_flight=count, seconds=seconds / 2)
            take(figures, f"ours: ReadIndex reads, {count} in flight", said)


# -- counterparts ------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def etcd_load(folder: Path) -> Path | None:
    """The load's program; None if it can't be built."""
    program = folder / "etcd_load"
    if shutil.which("go") is None:
        return None
    done = subprocess.run(
        ["go", "build", "-o", str(program), "."],
        cwd=COUNTERPARTS / "etcd_load", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    return program


@contextmanager
def etcd(folder: Path, count: int = 3) -> Iterator[str]:
    """Client addresses of a cluster of etcds."""
    ports = free_ports(2 * count)
    clients, peers = ports[:count], ports[count:]
    cluster = ",".join(f"n{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
    children = []
    try:
        for i, (client, peer) in enumerate(zip(clients, peers, strict=True)):
            line = [
                "etcd", "--name", f"n{i}", "--data-dir", str(folder / str(i)),
                "--listen-client-urls", f"http://127.0.0.1:{client}",
                "--advertise-client-urls", f"http://127.0.0.1:{client}",
                "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                "--initial-cluster", cluster, "--logger", "zap", "--log-level", "error",
            ]  # fmt: skip
            quiet = subprocess.DEVNULL
            children.append(subprocess.Popen(line, stdout=quiet, stderr=quiet))
        yield ",".join(f"127.0.0.1:{port}" for port in clients)
    finally:
        for child in children:
            child.kill()
            child.wait()


def measure_etcd(figures: Figures, folder: Path, seconds: float, program: Path) -> None:
    def load(count: int, seconds: float, *more: str) -> dict[str, Any]:
        line = [
            str(program), "-endpoints", endpoints, "-in-flight", str(count),
            "-connections", str(ETCD_CONNECTIONS[count]), "-seconds", str(seconds), *more,
        ]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    with etcd(folder) as endpoints:
        load(1, 0.5)
        for count in IN_FLIGHT:
            take(figures, f"etcd: puts, {count} in flight", load(count, seconds))
        said = load(1000, seconds / 2, "-reads")
        take(figures, "etcd: linearizable reads, 1000 in flight", said)


def measure_pysyncobj(figures: Figures, python: str, seconds: float) -> None:
    for name, flags in (("as it comes", ()), ("not batching", ("--no-batch",))):
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        nodes = [
            Process(
                python, str(COUNTERPARTS / "pysyncobj_node.py"), own,
                *(each for each in addresses if each != own), *flags, stderr=subprocess.DEVNULL,
            )
            for own in addresses
        ]  # fmt: skip
        try:
            for node in nodes:
                node.receive()
            leader = pysyncobj_leader(nodes)
            for count in IN_FLIGHT:
                said = leader.ask(in_flight=count, seconds=seconds)
                take(figures, f"PySyncObj {name}: puts, {count} in flight", said)
        finally:
            for node in nodes:
                node.end()


def pysyncobj_leader(nodes: list[Process]) -> Process:
    until = time.perf_counter() + LEADER_WAIT_S
    while time.perf_counter() < until:
        for node in nodes:
            if node.ask(do="leads")["leads"]:
                return node
        time.sleep(0.1)
    raise SystemExit("PySyncObj elected no leader")


# -- what goes wrong ---------------------------------------------------------------------------


def measure_failover(figures: Figures, folder: Path, kills: int) -> None:
    """How long a client at a survivor gets no answer when the leader is killed. It proposes one
    command after the other through its own node; the worse of the two survivors' counts.
    """
    gaps = []
    with ours(folder) as cluster:
        for each in cluster.nodes.values():
            each.ask(do="stream", pause_s=0.005)
        spare = new_node()
        spare.receive()
        rng = random.Random(1)
        for _ in range(kills):
            cluster.settle()
            time.sleep(rng.uniform(0.2, 0.5))  # anywhere between two heartbeats
            victim = cluster.leader()
            around = time.perf_counter()
            cluster.nodes.pop(victim).end()
            gaps.append(gap_after(cluster, around))
            cluster.start(victim, spare)
            cluster.nodes[victim].ask(do="stream", pause_s=0.005)
            spare = new_node()
            spare.receive()
        spare.end()
    gaps.sort()
    figures["failover after SIGKILL of the leader, p50 s"] = [statistics.median(gaps)]
    figures["failover after SIGKILL of the leader, p99 s"] = [gaps[round(0.99 * (kills - 1))]]
    figures["failover after SIGKILL of the leader, longest s"] = [gaps[-1]]
    figures["leaders killed"] = [kills]


def gap_after(cluster: Ours, around: float) -> float:
    until = time.perf_counter() + LEADER_WAIT_S
    while time.perf_counter() < until:
        time.sleep(0.25)
        found = [each.ask(do="gap", around=around)["gap_s"] for each in cluster.nodes.values()]
        if all(found):
            return float(max(found))
    raise SystemExit("no command was answered after the leader's death")


def measure_restart(figures: Figures, folder: Path, entries: int = 100_000) -> None:
    """A member that was killed comes back: its log is read and checked, all of it applied anew (the
    state is in RAM), and what the others have meanwhile fetched.
    """
    cluster = Ours(folder, 3, snapshot_entries=10 * entries, trailing_entries=entries)
    try:
        for raft_id in cluster.ids:
            node = new_node()
            node.receive()
            node.ask(
                do="fill_log", folder=str(folder / str(raft_id)), entries=entries,
                voters=cluster.ids,
            )  # fmt: skip
            cluster.start(raft_id, node)
        leader = cluster.leader()
        cluster.settle()
        victim = leader % 3 + 1
        cluster.nodes.pop(victim).end()
        begun = time.perf_counter()
        spare = new_node()
        spare.receive()
        opening = time.perf_counter()
        said = cluster.start(victim, spare)
        index = cluster.nodes[leader].ask(do="status")["committed"]
        applied = cluster.nodes[victim].ask(do="applied", index=index)["at"]
        figures[f"restart with {entries:,} entries, s"] = [applied - opening]
        figures["restart: reading and checking the log alone, s"] = [said["log_seconds"]]
        figures["restart: from the start of its process, imports included, s"] = [applied - begun]
    finally:
        cluster.end()


def measure_snapshot(figures: Figures, folder: Path) -> None:
    """A new learner gets the cluster's state, in SQLite on disk, from the change of members that
    adds it until it has applied everything.
    """
    cluster = Ours(folder, 1, state="sqlite")
    try:
        leader = new_node()
        leader.receive()
        rows = {"tags": 70_000, "chunk_maps": 95_000}
        said = leader.ask(do="fill_state", folder=str(folder / "1"), id=1, **rows)
        assert said["filled"] == sum(rows.values())
        cluster.start(1, leader)
        cluster.leader()
        size = leader.ask(do="snapshot")["bytes"]
        cluster.start(2)
        begun = time.perf_counter()
        leader.ask(do="add", id=2)
        index = leader.ask(do="status")["committed"]
        done = cluster.nodes[2].ask(do="applied", index=index)["at"]
        figures["snapshot, MB"] = [size / 1e6]
        figures["snapshot: sent and installed, s"] = [done - begun]
    finally:
        cluster.end()


# -- the cost of size --------------------------------------------------------------------------


def measure_sizes(figures: Figures, folder: Path, seconds: float, sizes: tuple[int, ...]) -> None:
    """Real processes, as many as the machine can bear."""
    for count in sizes:
        with ours(folder / str(count), count) as cluster:
            leader = cluster.nodes[cluster.leader()]
            leader.ask(do="puts", in_flight=1, seconds=0.5)
            for load in (1, 64):
                said = leader.ask(do="puts", in_flight=load, seconds=seconds)
                take(figures, f"{count} voters, real: puts, {load} in flight", said)


def measure_simulated(figures: Figures, entries: int) -> None:
    """What a batch of 64 costs the leader, its core and the encoding of what it sends, when its
    followers cost nothing: all in one thread, no network and no disk.
    """
    for voters in (3, 5, 7):
        for learners in (0, 10, 100):
            cost = LeaderCost(voters, learners)
            cost.run(entries)
            name = f"{voters} voters, {learners} learners, simulated"
            figures[f"{name}: leader's CPU, us per entry"] = [1e6 * cost.seconds / entries]
            figures[f"{name}: leader sends, bytes per entry"] = [cost.byte_count / entries]
            figures[f"{name}: messages to and from it, per batch of 64"] = [
                64 * cost.message_count / entries
            ]


class LeaderCost(Cluster):
    """A cluster whose leader's work is timed, with what it encodes and decodes."""

    def __init__(self, voters: int, learners: int) -> None:
        self.voters = voters
        super().__init__(voters + learners, asynchronous=True)
        self.seconds = 0.0
        self.byte_count = self.message_count = 0

    def new_log(self, ids: tuple[int, ...]) -> RamLog:
        log = RamLog()
        conf_state = ConfState(voters=ids[: self.voters], learners=ids[self.voters :])
        log.install_snapshot(Snapshot(SnapshotMetadata(1, 1, conf_state)))
        return log

    def run(self, entries: int) -> None:
        leader = self.nodes[1]
        leader.campaign()
        self.settle()
        self.seconds, self.byte_count, self.message_count = 0.0, 0, 0
        commands = [COMMAND] * 64
        for _ in range(entries // 64):
            begun = time.thread_time()
            leader.propose_batch(commands)
            self.seconds += time.thread_time() - begun
            self.settle()

    def handle_ready(self, node: int, raw: Any) -> None:
        begun = time.thread_time()
        super().handle_ready(node, raw)
        if node == 1:
            self.seconds += time.thread_time() - begun

    def deliver(self, message: Any) -> None:
        own = message.from_ == message.to or not is_between_nodes(message)
        if own or 1 not in (message.to, message.from_):
            begun = time.thread_time()
            super().deliver(message)
            if message.from_ == 1 or message.to == 1:
                self.seconds += time.thread_time() - begun
            return
        self.message_count += 1
        if message.to == 1:
            payload = batch([encode_message(message)])
            begun = time.thread_time()
            [message] = decode_batch(payload).messages
            super().deliver(message)
            self.seconds += time.thread_time() - begun
            return
        begun = time.thread_time()
        payload = batch([encode_message(message)])
        self.seconds += time.thread_time() - begun
        self.byte_count += len(payload)
        super().deliver(message)


# -- probes and the whole ----------------------------------------------------------------------


def fdatasync_ms(folder: Path, count: int = 400) -> tuple[float, float]:
    """p50 and p99 of what one batch of a log costs: 512 bytes into a file of full size."""
    taken = []
    with (folder / "probe").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 1024 * 1024)
        for i in range(count):
            begun = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 512, 512 * i)
            os.fdatasync(file.fileno())
            taken.append(1000 * (time.perf_counter() - begun))
    taken.sort()
    return taken[count // 2], taken[int(0.99 * count)]


def loopback_us(count: int = 2000) -> float:
    """p50 of a round trip of 100 bytes between two threads, plain TCP."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            with server.accept()[0] as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(100):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        taken = []
        with socket.create_connection(server.getsockname()) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                begun = time.perf_counter()
                client.sendall(bytes(100))
                client.recv(100)
                taken.append(1e6 * (time.perf_counter() - begun))
        thread.join()
    return statistics.median(taken)


def probe(figures: Figures, folder: Path) -> None:
    p50, p99 = fdatasync_ms(folder)
    figures.setdefault("probe: 512 bytes and fdatasync, p50 ms", []).append(p50)
    figures.setdefault("probe: 512 bytes and fdatasync, p99 ms", []).append(p99)
    figures.setdefault("probe: loopback round trip, p50 us", []).append(loopback_us())


BARS: list[tuple[str, Callable[[float], bool], str]] = [
    ("ours: puts, 1 in flight, p50 ms", lambda value: value <= 3, "<= 3"),
    ("ours: puts, 1 in flight, p99 ms", lambda value: value <= 15, "<= 15"),
    ("ours: puts, 64 in flight, per s", lambda value: value >= 2000, ">= 2,000"),
    ("ours: puts, 1000 in flight, per s", lambda value: value >= 4000, ">= 4,000"),
    ("ours: ReadIndex reads, 1000 in flight, per s", lambda value: value >= 5000, ">= 5,000"),
    ("failover after SIGKILL of the leader, p99 s", lambda value: value <= 2, "<= 2"),
    ("restart with 100,000 entries, s", lambda value: value <= 3, "<= 3"),
    ("snapshot: sent and installed, s", lambda value: value <= 5, "<= 5"),
    ("core alone, batches of 64, entries per s", lambda value: value >= 50_000, ">= 50,000"),
    ("ours / etcd, 64 in flight", lambda value: value >= 0.5, ">= 0.5"),
    *(
        (f"ours / PySyncObj {mode}, {count} in flight", lambda value: value > 1, "> 1")
        for mode in ("as it comes", "not batching")
        for count in IN_FLIGHT
    ),
]


def ratios(found: dict[str, float]) -> dict[str, float]:
    """Ours over theirs, of what was measured."""
    others = ("etcd", "PySyncObj as it comes", "PySyncObj not batching")
    made = {}
    for other in others:
        for count in IN_FLIGHT:
            theirs = found.get(f"{other}: puts, {count} in flight, per s")
            mine = found.get(f"ours: puts, {count} in flight, per s")
            if theirs and mine:
                made[f"ours / {other}, {count} in flight"] = mine / theirs
    return made


def about(pysyncobj: str | None) -> dict[str, str]:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "machine": f"{platform.machine()} x{os.cpu_count()}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "libp2p": version("libp2p"),
        "etcd": etcd_version(),
        "pysyncobj": pysyncobj or "missing",
        "commit": done.stdout.strip() or "unknown",
    }


def etcd_version() -> str:
    if shutil.which("etcd") is None:
        return "missing"
    done = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.split("\n", 1)[0].removeprefix("etcd Version: ")


def pysyncobj_version(python: str) -> str | None:
    code = "import importlib.metadata as m; print(m.version('pysyncobj'))"
    with suppress(OSError):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    parser.add_argument("--quick", action="store_true", help="two minutes instead of ten")
    parser.add_argument(
        "--pysyncobj", default=sys.executable, metavar="PYTHON", help="one that has PySyncObj"
    )
    parts = ("rates", "failover", "restart", "snapshot", "core", "sizes", "simulated")
    parser.add_argument("--only", choices=parts, action="append", help="one part, or several")
    given = parser.parse_args()
    chosen = given.only or parts
    rounds, seconds, kills, entries = (1, 2.0, 5, 640) if given.quick else (3, 3.0, 50, 6400)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = etcd_load(folder) if shutil.which("etcd") else None
        pysyncobj = pysyncobj_version(given.pysyncobj)
        if "rates" in chosen:
            if shutil.which("etcd") is None:
                say("etcd is missing (Debian: apt install etcd-server): not compared")
            elif program is None:
                say("etcd's load could not be built (it needs go and the Go module proxy)")
            if pysyncobj is None:
                say(f"PySyncObj is missing in {given.pysyncobj}; see --pysyncobj")
        for number in range(rounds if "rates" in chosen else 1):
            probe(figures, folder)
            if "rates" not in chosen:
                break
            measure_ours(figures, folder / f"ours{number}", seconds)
            if program is not None:
                measure_etcd(figures, folder / f"etcd{number}", seconds, program)
            if pysyncobj is not None:
                measure_pysyncobj(figures, given.pysyncobj, seconds)
        if "failover" in chosen:
            measure_failover(figures, folder / "failover", kills)
        if "restart" in chosen:
            measure_restart(figures, folder / "restart")
        if "snapshot" in chosen:
            measure_snapshot(figures, folder / "snapshot")
        if "sizes" in chosen:
            measure_sizes(figures, folder / "sizes", seconds, (3, 5) if given.quick else (3, 5, 7))
    if "core" in chosen:
        rates = [run(nodes=3, entries=32_000, batch=64, asynchronous=True) for _ in range(rounds)]
        figures["core alone, batches of 64, entries per s"] = rates
    if "simulated" in chosen:
        measure_simulated(figures, entries)
    found = {name: statistics.median(values) for name, values in figures.items()}
    found |= ratios(found)
    report(found, about(pysyncobj), as_json=given.json)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def report(found: dict[str, float], machine: dict[str, str], *, as_json: bool) -> None:
    bars = {name: (passes, text) for name, passes, text in BARS}
    missed = [name for name, value in found.items() if name in bars and not bars[name][0](value)]
    if not as_json:
        print(" · ".join(f"{key} {value}" for key, value in machine.items()))
    for name, value in found.items():
        bar = bars[name][1] if name in bars else ""
        if as_json:
            line = {"figure": name, "value": round(value, 4), "bar": bar or None, **machine}
            print(json.dumps(line))
        else:
            verdict = f"  (bar {bar}{', MISSED' if name in missed else ''})" if bar else ""
            print(f"{value:12,.2f}  {name}{verdict}")
    if missed:
        sys.exit(f"{len(missed)} bars missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()

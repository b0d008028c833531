"""The router beside vllm-router and LiteLLM: what a request costs that does not go straight there.

    python benchmarks/bench_router.py [--json] [--quick] [--counterparts FOLDER] [--only NAME]

One back end answers everything at once: a stub that speaks OpenAI's HTTP, in Go. It is asked
directly, through a node of ours that has it (`omx up`), through a second node of ours that has
nothing and reaches the first over libp2p, and through the two counterparts, by a load generator in
Go (`router_counterparts/`): a direct request takes some 0.15 ms. What a router adds to the direct
p50 of the same round is its own. `--counterparts` is a virtual environment that has them, each in a
process (vllm-router is Rust; LiteLLM's proxy is Python and runs one worker, as we are one process).

- Whole answers at 1, 16 and 128 at once, each client asking again when it is answered.
- Streams as fast as they go, 16 at once: chunks per second, and per second of the router's CPU,
  which tells of one core also where something else runs beside it.
- 1,000 streams of a chunk per second: memory of all the router's processes before and amidst them.

The systems take turns, so that what else the machine does falls on all of them; of several rounds
the median is given. A full run takes five minutes, --quick under two. What is missing is named.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_raft import free_ports, loopback_us

ROOT = Path(__file__).parents[1]
COUNTERPARTS = Path(__file__).parent / "router_counterparts"
DEFAULT_VENV = "/tmp/bench-router-venv"
MODEL = "stub"
IN_FLIGHT = (1, 16, 128)
STREAMS, STREAM_CHUNKS = 16, 500
SLOW_STREAMS = 1000
READY_S = 60.0
TICKET_TRIES = 10
NODE_SLOTS = 2048
"""Of the stub: nothing is to wait for a place."""

Figures = dict[str, list[float]]
"""What was measured, by name, each round."""


class System:
    """A way to the stub: where to ask, and the processes that are between."""

    def __init__(self, name: str, port: int, *processes: int) -> None:
        """processes: by id; empty for the direct way. Their children count too."""
        self.name, self.url, self.processes = name, f"http://127.0.0.1:{port}/v1", processes

    def _all(self) -> Iterator[psutil.Process]:
        for pid in self.processes:
            process = psutil.Process(pid)
            yield process
            yield from process.children(recursive=True)

    def cpu_s(self) -> float:
        """Of all its processes, until now."""
        times = [process.cpu_times() for process in self._all()]
        return sum(each.user + each.system for each in times)

    def memory_mb(self) -> float:
        """Resident, of all its processes."""
        return sum(process.memory_info().rss for process in self._all()) / 1e6


class Load:
    """The load generator."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def line(self, system: System, **options: Any) -> list[str]:
        given = {"url": system.url, "model": MODEL, **options}
        told = [
            f"-{name.replace('_', '-')}={json.dumps(value).strip(chr(34))}"
            for name, value in given.items()
        ]
        return [str(self._program), "load", *told]

    def __call__(self, system: System, **options: Any) -> dict[str, Any]:
        line = self.line(system, **options)
        return _said(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def _said(text: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(text)
    return said


# -- who is measured ---------------------------------------------------------------------------


@contextmanager
def running(log: Path, *line: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A program that is ended with the block; what it says on stderr goes to the log."""
    with log.open("w") as err:
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, text=True,
            env=os.environ | more, cwd=log.parent, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def first_line(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """What a program tells once it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{log.stem} ended with {process.wait()}: {log.read_text()[-400:]}")
    return _said(line)


@contextmanager
def node(folder: Path, *command: str, **more: str) -> Iterator[tuple[System, dict[str, str]]]:
    """A node of ours, with no other back end than those it is given."""
    folder.mkdir(parents=True)
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")]),
        "HOME": str(folder),
        "OMX_DATA_DIR": str(folder / "data"),
        "OMX_MODELS": str(folder / "models"),
        "OMX_NAME": folder.name,
        "OMX_ORIGIN_ENABLED": "0",
        "OMX_NO_MDNS": "1",
        "OMX_LISTEN": "/ip4/127.0.0.1/tcp/0",
        "OMX_API": "127.0.0.1:0",
        "OMX_CONTENT_RESERVE_BYTES": "0",
        "OMX_INFERENCE_EMBEDDED": "0",
        "OMX_INFERENCE_OLLAMA_URL": "",
        "OMX_INFERENCE_OPENAI_SLOTS": str(NODE_SLOTS),
        **more,
    }
    log = folder / "stderr.log"
    line = (sys.executable, "-m", "omx_cli", *command, "--json")
    with running(log, *line, **settings) as process:
        first_line(process, log)
        api: str = _said((folder / "data" / "node.json").read_text())["api"]
        yield System(folder.name, int(api.rpartition(":")[2]), process.pid), settings


def ticket_of(settings: dict[str, str]) -> str:
    """An invitation to the swarm of a node that has just started."""
    line = [sys.executable, "-m", "omx_cli", "invite", "--json"]
    for _ in range(TICKET_TRIES):  # at first its cluster may have no leader yet
        done = subprocess.run(
            line, env=os.environ | settings, cwd=settings["HOME"], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if not done.returncode:
            ticket: str = _said(done.stdout)["ticket"]
            return ticket
        time.sleep(1)
    raise SystemExit(f"omx invite: {done.stderr.strip()}")


@contextmanager
def vllm_router(folder: Path, venv: Path, stub_port: int) -> Iterator[System]:
    """vllm-router, in front of one worker."""
    folder.mkdir(parents=True)
    port, prometheus = free_ports(2)
    line = (
        str(venv / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-port", str(prometheus), "--policy", "round_robin", "--log-level", "error",
        "--worker-urls", f"http://127.0.0.1:{stub_port}",
    )  # fmt: skip
    with running(folder / "stderr.log", *line) as process:
        yield System("vllm-router", port, process.pid)


@contextmanager
def litellm(folder: Path, venv: Path, stub_port: int) -> Iterator[System]:
    """LiteLLM's proxy as it comes, without a database, keys and logging; one worker."""
    folder.mkdir(parents=True)
    (port,) = free_ports(1)
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}",
                    "api_base": f"http://127.0.0.1:{stub_port}/v1",
                    "api_key": "none",
                },
            }
        ],
        "litellm_settings": {"telemetry": False},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # YAML holds JSON
    line = (
        str(venv / "bin" / "litellm"), "--config", str(folder / "config.yaml"), "--host",
        "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False",
    )  # fmt: skip
    more = {
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # ours asks for none either
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_COLOR": "1",
    }
    with running(folder / "stderr.log", *line, **more) as process:
        yield System("LiteLLM", port, process.pid)


def wait_until_it_answers(system: System) -> str:
    """ "", or why it does not."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "chunks=1 delay_ms=0"}]}
    request = urllib.request.Request(
        f"{system.url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    until, problem = time.perf_counter() + READY_S, ""
    while time.perf_counter() < until:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                answer.read()
                return ""
        except (OSError, urllib.error.HTTPError) as error:
            problem = str(error)
        time.sleep(0.2)
    return problem


# -- measuring ---------------------------------------------------------------------------------


def take(figures: Figures, name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)


def measure_whole(figures: Figures, systems: list[System], load: Load, seconds: float) -> None:
    """Whole answers, each system in its turn at each number of clients."""
    for clients in IN_FLIGHT:
        direct = {}
        for system in systems:
            load(system, clients=clients, seconds=0.3)
            cpu = system.cpu_s()
            said = load(system, clients=clients, seconds=seconds)
            cpu = system.cpu_s() - cpu
            name = f"{system.name}: {clients} at once"
            direct = direct or said  # it comes first
            if system.processes:
                for key in ("p50", "p99"):
                    added = said[f"{key}_ms"] - direct[f"{key}_ms"]
                    take(figures, f"{name}, added {key} ms", added)
                take(figures, f"{name}, CPU ms per request", 1000 * cpu / max(said["count"], 1))
            else:
                for key in ("p50", "p99"):
                    take(figures, f"{name}, {key} ms", said[f"{key}_ms"])
            take(figures, f"{name}, requests per s", said["count"] / said["seconds"])
            noted(said, name)


def measure_streams(figures: Figures, systems: list[System], load: Load, seconds: float) -> None:
    """As many chunks as go through; each is a write of its own of the stub's."""
    for system in systems:
        cpu = system.cpu_s()
        said = load(system, clients=STREAMS, seconds=seconds, stream=True, chunks=STREAM_CHUNKS)
        cpu = system.cpu_s() - cpu
        take(figures, f"{system.name}: streamed chunks per s", said["chunks"] / said["seconds"])
        if system.processes:
            name = f"{system.name}: streamed chunks per s of its CPU"
            take(figures, name, said["chunks"] / max(cpu, 0.01))
        noted(said, f"{system.name}: streams")


def measure_slow(figures: Figures, systems: list[System], load: Load, chunks: int) -> None:
    """Memory with 1,000 streams open that give a chunk each second."""
    for system in systems:
        if not system.processes:
            continue
        before = system.memory_mb()
        line = load.line(
            system, clients=SLOW_STREAMS, once=True, ramp=2, stream=True, chunks=chunks,
            delay_ms=1000,
        )  # fmt: skip
        most = before
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                most = max(most, system.memory_mb())
                time.sleep(0.25)
            assert process.stdout is not None
            said = _said(process.stdout.read())
        name = f"{system.name}: {SLOW_STREAMS} slow streams"
        take(figures, f"{name}, added MB", most - before)
        take(figures, f"{name}, dropped", said["errors"])
        noted(said, name)


def noted(said: dict[str, Any], name: str) -> None:
    if said["errors"]:
        say(f"{name}: {said['errors']} failed, one by: {said['first_error'][:200]}")


# -- the whole ---------------------------------------------------------------------------------


def at_most(limit: float) -> tuple[Callable[[float], bool], str]:
    return (lambda value: value <= limit), f"<= {limit:g}"


def at_least(limit: float) -> tuple[Callable[[float], bool], str]:
    return (lambda value: value >= limit), f">= {limit:,.0f}"


BARS: dict[str, tuple[Callable[[float], bool], str]] = {
    "same node: 1 at once, added p50 ms": at_most(1.5),
    "another node: 1 at once, added p50 ms": at_most(4),
    "same node: streamed chunks per s of its CPU": at_least(5000),
    f"same node: {SLOW_STREAMS} slow streams, added MB": at_most(150),
    f"same node: {SLOW_STREAMS} slow streams, dropped": at_most(0),
    **{
        f"same node / LiteLLM, {clients} at once, added p50": ((lambda value: value < 1), "< 1")
        for clients in IN_FLIGHT
    },
}


def ratios(found: dict[str, float]) -> dict[str, float]:
    """Ours over theirs, of what was measured."""
    made = {}
    for other in ("LiteLLM", "vllm-router"):
        for clients in IN_FLIGHT:
            theirs = found.get(f"{other}: {clients} at once, added p50 ms")
            ours = found.get(f"same node: {clients} at once, added p50 ms")
            if theirs and ours:
                made[f"same node / {other}, {clients} at once, added p50"] = ours / theirs
    return made


def build(folder: Path) -> Path:
    """The stub and the load generator."""
    if shutil.which("go") is None:
        raise SystemExit("bench_router.py: go is missing; the stub and the load are built with it")
    program = folder / "router_counterparts"
    line = ["go", "build", "-o", str(program), "."]
    done = subprocess.run(line, cwd=COUNTERPARTS, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_router.py: {done.stderr.strip()}")
    return program


@contextmanager
def all_systems(folder: Path, program: Path, venv: Path) -> Iterator[list[System]]:
    """Every way to one stub, the direct one first."""
    with ExitStack() as stack:
        log = folder / "stub.log"
        process = stack.enter_context(running(log, str(program), "stub", "-model", MODEL))
        port = int(first_line(process, log)["port"])
        systems = [System("direct", port)]
        # The slowest to start first.
        others = []
        for name, open_one in (("litellm", litellm), ("vllm-router", vllm_router)):
            if (venv / "bin" / name).exists():
                others.append(stack.enter_context(open_one(folder / name, venv, port)))
            else:
                say(f"{name} is missing in {venv}: not compared; see benchmarks/README.md")
        openai = {"OMX_INFERENCE_OPENAI": f"stub=http://127.0.0.1:{port}/v1"}
        same, settings = stack.enter_context(node(folder / "same node", "up", **openai))
        ticket = ticket_of(settings)
        other, _ = stack.enter_context(node(folder / "another node", "join", ticket))
        systems += [same, other, *others]
        ready = []
        for system in systems:
            problem = wait_until_it_answers(system)
            if problem:
                say(f"{system.name} does not answer: {problem}")
            else:
                ready.append(system)
        yield ready


def about(venv: Path) -> dict[str, str]:
    def said(*line: str) -> str:
        with suppress(OSError):
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
            return done.stdout.strip()
        return ""

    def theirs(package: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return said(str(venv / "bin" / "python"), "-c", code) or "missing"

    return {
        "machine": f"{platform.machine()} x{os.cpu_count()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "go": said("go", "env", "GOVERSION"),
        "libp2p": version("libp2p"),
        "vllm-router": theirs("vllm-router"),
        "litellm": theirs("litellm"),
        "commit": said("git", "rev-parse", "--short", "HEAD") or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--counterparts", type=Path, default=Path(DEFAULT_VENV), metavar="FOLDER",
        help="a virtual environment with litellm[proxy] and vllm-router",
    )  # fmt: skip
    parts = ("whole", "streams", "slow")
    parser.add_argument("--only", choices=parts, action="append", help="one part, or several")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and what it started with it
    chosen = given.only or parts
    rounds, seconds, slow_chunks = (1, 0.7, 3) if given.quick else (3, 2.5, 12)
    machine = about(given.counterparts)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder)
        load = Load(program)
        with all_systems(folder, program, given.counterparts) as systems:
            for _ in range(rounds):
                take(figures, "probe: loopback round trip, p50 us", loopback_us())
                if "whole" in chosen:
                    measure_whole(figures, systems, load, seconds)
                if "streams" in chosen:
                    measure_streams(figures, systems, load, seconds)
            if "slow" in chosen:
                measure_slow(figures, systems, load, slow_chunks)
    found = {name: statistics.median(values) for name, values in figures.items()}
    report(found | ratios(found), machine, as_json=given.json)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def report(found: dict[str, float], machine: dict[str, str], *, as_json: bool) -> None:
    missed = [name for name, value in found.items() if name in BARS and not BARS[name][0](value)]
    if not as_json:
        print(" · ".join(f"{key} {value}" for key, value in machine.items()))
    for name, value in found.items():
        bar = BARS[name][1] if name in BARS else ""
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

"""`omx demo`: three nodes on this machine, one real model, one of them killed halfway; then a
fourth that holds nothing and is asked all the same.

Everything is real: `omx` processes with stores of their own, tickets, libp2p on loopback, SIGKILL,
and llama.cpp. What it prints is measured. Exit code 0 only if all three stores verify, and the
answer whose node was killed is the undisturbed one.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ollamamax_p2p import LocalClient, OmxError, PullProgress, PullReport
from omx_cli.demo_questions import QUESTION, AskingFailed, Told, ask

MODEL_NAME = "smollm2:135m"
START_TIMEOUT_S = 60.0
# A cold start compiles bytecode and imports libp2p: 5 s on a slow laptop.
PULL_TIMEOUT_S = 600.0
KILL_AFTER = 12
# Parts of an answer that are seen before its node is killed.


Show = Callable[[PullProgress], None]


class DemoFailed(Exception):
    """The demo did not show what it is for; the message says what happened."""


@dataclass(slots=True)
class DemoNode:
    """One of the three: a process, its folders, and how its pulls went."""

    name: str
    folder: Path
    process: trio.Process | None = None
    said: dict[str, Any] = field(default_factory=dict)
    reports: list[PullReport] = field(default_factory=list)
    fetched_before_kill: int = 0

    @property
    def data_dir(self) -> Path:
        """Where its key and swarm are."""
        return self.folder / "data"

    @property
    def models(self) -> Path:
        """Its store, in Ollama's layout."""
        return self.folder / "models"

    @property
    def client(self) -> LocalClient:
        """Its API; found anew, because the port changes when it starts again."""
        return LocalClient.find(self.data_dir)


async def run_demo(model: Path, *, as_json: bool, console: Console) -> int:
    """Run it all in a temporary folder. model: a GGUF file, or a folder that holds one.

    Returns the exit code. Raises OmxError or DemoFailed.
    """
    gguf = find_model_file(model)
    say = _silent if as_json else console.print
    with tempfile.TemporaryDirectory(prefix="omx-demo-") as folder:
        nodes = [DemoNode(name, Path(folder) / name) for name in ("alice", "bob", "carol")]
        dora = DemoNode("dora", Path(folder) / "dora")
        answers: list[Told] = []
        live = console.is_terminal and not as_json
        try:
            with trio.fail_after(PULL_TIMEOUT_S):
                await _story(nodes, gguf, console, say, live=live)
                if has_engine():
                    answers = await _questions(nodes, dora, console, say, live=live)
                else:
                    say("No questions are asked: llama.cpp is not installed (the extra [engine]).")
        finally:
            with trio.CancelScope(shield=True):
                for node in (*nodes, dora):
                    await end(node)
        verified = [count_verified(node.models) for node in nodes]
    if len(set(verified)) != 1 or not verified[0]:
        raise DemoFailed(f"the stores do not hold the same verified blobs: {verified}")
    _show(nodes, verified, answers, as_json, console)
    return 0


async def _story(
    nodes: list[DemoNode],
    gguf: Path,
    console: Console,
    say: Callable[..., None],
    *,
    live: bool,
) -> None:
    alice, bob, carol = nodes
    size = (await trio.Path(gguf).stat()).st_size
    say(f"The model: {gguf.name}, {size / 1e6:.0f} MB, imported as {MODEL_NAME} on alice.")
    await start(alice, "up")
    await alice.client.import_model(gguf, MODEL_NAME)
    ticket = (await alice.client.invite(uses=2, expires_s=600)).ticket
    say("bob and carol join with alice's ticket, as processes of their own.")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(start, bob, "join", ticket)
        nursery.start_soon(start, carol, "join", ticket)
    say("Both pull at once. carol is killed halfway (SIGKILL), starts again and resumes.")
    with _bars(console, live) as bars:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pull, bob, bars("bob"))
            nursery.start_soon(_pull_killed_halfway, carol, bars, say)


async def _questions(
    nodes: list[DemoNode],
    dora: DemoNode,
    console: Console,
    say: Callable[..., None],
    *,
    live: bool,
) -> list[Told]:
    """Ask a node without the model; then again, and kill whoever answers. Gives both answers."""
    ticket = (await nodes[0].client.invite(uses=1, expires_s=600)).ticket
    await start(dora, "join", ticket)
    say("dora joins and holds no model. She is asked:")
    say(f"> {QUESTION}")
    by_name = {node.name: node for node in nodes}

    def show(told: Told, words: str) -> None:
        if live:
            console.print(words, end="", markup=False, highlight=False)

    def kill_midway(told: Told, words: str) -> None:
        show(told, words)
        process = by_name[told.node].process if told.node in by_name else None
        if told.deltas == KILL_AFTER and process is not None:
            process.send_signal(signal.SIGKILL)

    api = dora.said["status"]["api_address"]
    try:
        calm = await ask(api, MODEL_NAME, show)
        say("" if live else calm.text)
        say(f"{calm.node} answered: {calm.tokens} tokens in {calm.seconds:.1f} s.")
        say("She is asked again, and whoever answers is killed in the middle (SIGKILL).")
        moved = await ask(api, MODEL_NAME, kill_midway)
    except AskingFailed as error:
        raise DemoFailed(f"dora got no answer: {error}") from error
    say("" if live else moved.text)
    if moved.text != calm.text:
        raise DemoFailed(f"the answer that moved differs: {moved.text!r}, not {calm.text!r}")
    if not moved.moved:
        raise DemoFailed(f"{moved.node} answered to the end although it was killed")
    say(
        f"{moved.node} was killed after {KILL_AFTER} parts of it; another went on after "
        f"{moved.longest_pause_s:.1f} s. It is the same answer, character for character."
    )
    return [calm, moved]


async def start(node: DemoNode, *command: str) -> None:
    """Start `omx up` or `omx join …` and wait until it says where it is."""
    await trio.Path(node.folder).mkdir(exist_ok=True)
    arguments = [
        *command,
        "--json",
        *("--name", node.name),
        *("--data-dir", str(node.data_dir), "--models", str(node.models)),
        *("--api", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns"),
    ]
    log = node.folder / "log"
    with log.open("ab") as stderr:
        node.process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "omx_cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # Several engines on one machine are in each other's way with more.
            env={**os.environ, "OMX_INFERENCE_THREADS": "1"},
        )
    node.said = json.loads(await _first_line(node.process) or "{}")
    if not node.said:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise DemoFailed(f"{node.name} did not start: {' '.join(tail) or 'it said nothing'}")


async def _first_line(process: trio.Process) -> bytes:
    """What the process says first; empty if it ends or says nothing in time."""
    assert process.stdout is not None
    line = b""
    with trio.move_on_after(START_TIMEOUT_S):
        while not line.endswith(b"\n"):
            data = await process.stdout.receive_some()
            if not data:
                return b""
            line += data
        return line.splitlines()[0]
    return b""


async def _pull(node: DemoNode, show: Callable[[PullProgress], None]) -> None:
    node.reports.append(await node.client.pull(MODEL_NAME, on_progress=show))


async def _pull_killed_halfway(
    node: DemoNode, bars: Callable[[str], Show], say: Callable[..., None]
) -> None:
    """Pull until half is there, kill the process, start it again, pull the rest."""
    show = bars(node.name)

    def watch(progress: PullProgress) -> None:
        show(progress)
        if progress.total > 1_000_000 and progress.completed * 2 >= progress.total:
            node.fetched_before_kill = progress.completed
            if node.process is not None:
                node.process.send_signal(signal.SIGKILL)

    with contextlib.suppress(OmxError):  # the node we speak to goes away, as it should
        await _pull(node, watch)
    if not node.fetched_before_kill:
        raise DemoFailed(f"{node.name} finished before it could be killed")
    if not node.reports:
        await end(node)
        say(f"carol was killed with {node.fetched_before_kill / 1e6:.0f} MB there.")
        await start(node, "up")
        await _pull(node, show)


async def end(node: DemoNode) -> None:
    """End the process, kindly if it lets us, and wait for it."""
    if node.process is None:
        return
    if node.process.poll() is None:
        node.process.terminate()
        with trio.move_on_after(10):
            await node.process.wait()
    if node.process.poll() is None:
        node.process.kill()
    await node.process.wait()
    assert node.process.stdout is not None
    await node.process.stdout.aclose()
    node.process = None


def has_engine() -> bool:
    """Whether llama.cpp is installed here; it is looked for, not loaded."""
    return importlib.util.find_spec("xllamacpp") is not None


def find_model_file(path: Path) -> Path:
    """The GGUF file that a path means: itself, or the only one below a folder."""
    try:
        found = [path] if path.is_file() else sorted(path.rglob("*.gguf"))
    except OSError as error:
        raise DemoFailed(f"{path} cannot be read: {error.strerror}") from error
    if len(found) != 1:
        raise DemoFailed(f"{path} holds {len(found)} GGUF files; give one with --model")
    return found[0]


def count_verified(models: Path) -> int:
    """How many blobs a store shows. Raises DemoFailed if one is not what its name says."""
    blobs = sorted((models / "blobs").glob("sha256-*"))
    for blob in blobs:
        with blob.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if blob.name != f"sha256-{actual}":
            raise DemoFailed(f"{blob} holds other bytes than its name says")
    return len(blobs)


# -- what a person sees ------------------------------------------------------------------------


@contextlib.contextmanager
def _bars(console: Console, live: bool) -> Iterator[Callable[[str], Show]]:
    """Live bars on a terminal; nothing elsewhere, the table says it all."""
    if not live:
        yield lambda _: _silent
        return
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[sources]}"),
    )
    with Progress(*columns, console=console) as progress:

        def bar(name: str) -> Callable[[PullProgress], None]:
            task: TaskID = progress.add_task(name, total=None, sources="")

            def show(state: PullProgress) -> None:
                if state.total > 1_000_000:  # the small blobs would only flicker
                    words = f"{state.active_sources} sources"
                    progress.update(
                        task, total=state.total, completed=state.completed, sources=words
                    )

            return show

        yield bar


def _show(
    nodes: list[DemoNode],
    verified: list[int],
    answers: list[Told],
    as_json: bool,
    console: Console,
) -> None:
    rows = [_row(node) for node in nodes if node.reports]
    if as_json:
        told = [
            {
                "node": each.node,
                "tokens": each.tokens,
                "seconds": round(each.seconds, 3),
                "longest_pause_s": round(each.longest_pause_s, 3),
                "moved": each.moved,
                "text": each.text,
            }
            for each in answers
        ]
        console.print_json(json.dumps({"nodes": rows, "verified_blobs": verified, "answers": told}))
        return
    table = Table(title="One model, three stores, every byte verified", title_justify="left")
    for heading in ("node", "seconds", "MB/s", "sources", "refetched bytes", "note"):
        table.add_column(heading, justify="left" if heading in ("node", "note") else "right")
    table.add_row("alice", "-", "-", "-", "-", "imported it")
    for row in rows:
        note = f"resumed with {row['resumed_bytes'] / 1e6:.0f} MB" if row["resumed_bytes"] else ""
        table.add_row(
            row["node"],
            f"{row['seconds']:.2f}",
            f"{row['mb_per_s']:.1f}",
            str(row["sources"]),
            f"{row['refetched_bytes']:,}",
            note,
        )
    console.print(table)


def _row(node: DemoNode) -> dict[str, Any]:
    """What one puller measured in its last pull; a resumed pull counts what it still had to do."""
    report = node.reports[-1]
    resumed = report.bytes_total - report.bytes_fetched
    return {
        "node": node.name,
        "seconds": round(report.seconds, 3),
        "mb_per_s": round(report.bytes_fetched / 1e6 / max(report.seconds, 1e-9), 1),
        "sources": len([share for share in report.sources if share.bytes]),
        "refetched_bytes": report.bytes_refetched + max(0, node.fetched_before_kill - resumed),
        "fetched_bytes": report.bytes_fetched,
        "resumed_bytes": resumed,
    }


def _silent(*_: object) -> None:
    """Where nothing is to be shown."""

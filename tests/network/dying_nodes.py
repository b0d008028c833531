"""A swarm in processes whose nodes are killed while they answer, and what its clients saw.

Three nodes hold the real model, a fourth holds none and is asked. A round asks it one or more
questions, kills (SIGKILL) whoever answers the first at a drawn moment, starts it again meanwhile,
and compares what came with the undisturbed answers. Shared by test_stream_survives.py and
benchmarks/bench_failover.py; the seed repeats questions and moments, not how the machine schedules.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import trio

from ollamamax_p2p import LocalClient
from tests.cli.running_omx import command
from tests.inference.processes import children
from tests.network.processes import settings

MODEL = "smollm2:135m"
HOLDERS = ("alice", "bob", "carol")
START_S = 90.0
"""For a node to say where it is, on a machine with everything else to do."""
ANSWER_S = 90.0
"""An answer that is not complete by then hangs."""
ENGINE_END_S = 30.0

QUESTIONS = (
    "Tell me in a few sentences how bees make honey.",
    "Wie heißen die Jahreszeiten? Erzähle von jeder.",
    "Write three lines about the sea, with an emoji in each 🌊.",
    "Why is the sky blue? Explain it to a child.",
    "List five animals and the sound that each makes.",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
)

ENVIRONMENT = {
    "OMX_INFERENCE_THREADS": "1",
    "OMX_INFERENCE_OLLAMA_URL": "",
    "OMX_INFERENCE_CONTEXT_LENGTH": "512",
    "OMX_INFERENCE_SLOTS": "2",
    "OMX_INFERENCE_MEMORY_BYTES": "2000000000",
}


@dataclass(slots=True)
class Answer:
    """What one client saw."""

    text: str = ""
    node: str = ""
    """Who began it."""
    moved: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    reason: str = ""
    problem: str = ""
    """What came instead of the end."""
    parts: int = field(default=0, compare=False)
    longest_pause_s: float = field(default=0.0, compare=False)
    """Between two parts, or from the question to the first."""


@dataclass(frozen=True, slots=True)
class Round:
    """One kill."""

    question: str
    victim: str
    after_parts: int
    """How many the client had; 0: it was killed before the first."""
    answers: tuple[Answer, ...]
    """The first is the one whose node was killed."""
    wrong: tuple[str, ...]
    """In what they differ from the undisturbed ones."""
    pause_s: float
    """The longest that its client waited for the next part."""
    engines_gone_s: float
    """From the kill until no engine of the node was left."""


@dataclass(slots=True, eq=False)
class Node:
    """A process, its folder, and what it said when it started."""

    name: str
    folder: Path
    process: trio.Process | None = None
    said: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0

    @property
    def client(self) -> LocalClient:
        """Its API; found anew, because the port changes when it starts again."""
        return LocalClient.find(self.folder / "data")

    async def start(self, *words: str) -> None:
        """`omx up` or `omx join …`; returns once it says where it is."""
        await trio.Path(self.folder).mkdir(exist_ok=True)
        with (self.folder / "stderr").open("ab") as stderr:
            process = await trio.lowlevel.open_process(
                [*command(*words), "--json", "--name", self.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=settings(self.folder / "data", **ENVIRONMENT),
            )
        self.process = process
        assert process.stdout is not None
        line = b""
        with trio.fail_after(START_S):
            while not line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                if not data:
                    said = (self.folder / "stderr").read_text(errors="replace")
                    raise AssertionError(f"{self.name} did not start: {said[-2_000:]}")
                line += data
        self.said = json.loads(line)

    async def kill(self) -> float:
        """SIGKILL; returns how long its engines were there after it, in seconds."""
        assert self.process is not None
        engines = [os.pidfd_open(pid) for pid in children(self.process.pid)]
        began = time.perf_counter()
        self.process.send_signal(signal.SIGKILL)
        try:
            with trio.fail_after(ENGINE_END_S):
                for descriptor in engines:
                    await trio.lowlevel.wait_readable(descriptor)  # it has ended
        finally:
            for descriptor in engines:
                os.close(descriptor)
        took = time.perf_counter() - began
        await self._reap()
        return took

    async def end(self) -> None:
        """Kindly, if it lets us."""
        if self.process is None:
            return
        self.process.terminate()
        with trio.move_on_after(10):
            await self.process.wait()
        if self.process.returncode is None:
            self.process.kill()
        await self._reap()

    async def _reap(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        await self.process.wait()
        await self.process.stdout.aclose()
        self.process = None


class DyingSwarm:
    """Made by `open_dying_swarm`."""

    def __init__(
        self, folder: Path, nursery: trio.Nursery, rng: random.Random, tokens: int
    ) -> None:
        self.holders = {name: Node(name, folder / name) for name in HOLDERS}
        self.asker = Node("dora", folder / "dora")
        self.rounds: list[Round] = []
        self._nursery = nursery
        self._rng = rng
        self._tokens = tokens
        self._away: set[str] = set()
        """Killed, and not there again."""
        self._started = trio.Event()
        """One that was started again has said where it is."""
        self._undisturbed: dict[str, Answer] = {}
        self._sessions = 0

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All four."""
        return (*self.holders.values(), self.asker)

    async def start(self, gguf: Path) -> None:
        """All of them, three with the model."""
        alice, bob, carol = self.holders.values()
        await alice.start("up")
        await alice.client.import_model(gguf, MODEL)
        ticket = (await alice.client.invite(uses=3, expires_s=600)).ticket
        async with trio.open_nursery() as nursery:
            for node in (bob, carol, self.asker):
                nursery.start_soon(node.start, "join", ticket)
        async with trio.open_nursery() as nursery:
            for node in (bob, carol):
                nursery.start_soon(node.client.pull, MODEL)
        await self.all_linked()

    async def end(self) -> None:
        """All of them."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for node in self.nodes:
                    nursery.start_soon(node.end)

    # -- rounds ----------------------------------------------------------------------------------

    async def round(self, *, clients: int = 1) -> Round:
        """Ask, kill, start again, compare."""
        asked = [self._rng.choice(QUESTIONS) for _ in range(clients)]
        for question in asked:
            await self.undisturbed(question)
        parts = self._undisturbed[asked[0]].parts
        # Before the first part is one moment among many, and another case: one round in eight.
        after_parts = self._rng.randrange(1, parts) if self._rng.random() > 1 / 8 else 0
        answers = [Answer() for _ in asked]
        killed: list[tuple[str, float]] = []
        self._sessions += 1
        likely = ""
        if after_parts == 0:
            # Nobody says who will answer, but a session stays with whom it was.
            warm = await self._ask(asked[0], Answer(), tokens=1)
            likely = warm.node

        async def kill(name: str) -> None:
            node = self.holders[name]
            self._away.add(name)
            killed.append((name, await node.kill()))
            self._nursery.start_soon(self._start_again, node)

        async with trio.open_nursery() as nursery:

            def part_came(answer: Answer) -> None:
                if answer.parts == after_parts and answer is answers[0] and not self._away:
                    nursery.start_soon(kill, answer.node)

            for question, answer in zip(asked, answers, strict=True):
                nursery.start_soon(self._ask_noting, question, answer, part_came)
            if likely:
                nursery.start_soon(kill, likely)
        wrong = tuple(
            f"{question!r}: {_difference(answer, self._undisturbed[question])}"
            for question, answer in zip(asked, answers, strict=True)
            if _difference(answer, self._undisturbed[question])
        )
        victim, gone_s = killed[0] if killed else ("", 0.0)
        done = Round(
            question=asked[0],
            victim=victim,
            after_parts=after_parts,
            answers=tuple(answers),
            wrong=wrong,
            pause_s=answers[0].longest_pause_s,
            engines_gone_s=gone_s,
        )
        self.rounds.append(done)
        return done

    async def undisturbed(self, question: str) -> Answer:
        """What is answered while nothing dies; asked once."""
        if question not in self._undisturbed:
            self._undisturbed[question] = await self._ask(question, Answer())
        return self._undisturbed[question]

    async def all_linked(self) -> None:
        """Until the asker is connected to everybody who runs and knows what they hold."""
        with trio.fail_after(START_S):
            while not await self._knows_all():  # noqa: ASYNC110
                # Nothing tells of another node's tables.
                await trio.sleep(0.05)

    async def ready(self) -> None:
        """Until every node is there again, and the asker knows."""
        while self._away:
            self._started = trio.Event()
            await self._started.wait()
        await self.all_linked()

    async def _knows_all(self) -> bool:
        running = {node.said["status"]["peer_id"] for node in self.holders.values()}
        linked = {peer.peer_id for peer in await self.asker.client.peers()}
        known = {
            node.peer_id
            for node in await self.asker.client.nodes()
            if node.models and node.heard_s < 5
        }
        return running <= linked & known

    async def _start_again(self, node: Node) -> None:
        await node.start("up")
        node.restarts += 1
        self._away.discard(node.name)
        self._started.set()

    # -- asking ----------------------------------------------------------------------------------

    async def _ask_noting(self, question: str, answer: Answer, part_came: Any) -> None:
        await self._ask(question, answer, part_came=part_came)

    async def _ask(
        self, question: str, answer: Answer, *, tokens: int | None = None, part_came: Any = None
    ) -> Answer:
        """As any client of Ollama would, always the likeliest token."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "options": {"temperature": 0, "seed": 1, "num_predict": tokens or self._tokens},
        }
        headers = {"omx-session": f"s{self._sessions}", "omx-strategy": "session_affinity"}
        api = self.asker.said["status"]["api_address"]
        last = time.perf_counter()
        try:
            with trio.fail_after(ANSWER_S):
                async with (
                    httpx2.AsyncClient(timeout=None, trust_env=False) as client,
                    client.stream(
                        "POST", f"http://{api}/api/chat", json=body, headers=headers
                    ) as answered,
                ):
                    answer.node = answered.headers.get("omx-node", "")
                    async for line in answered.aiter_lines():
                        now = time.perf_counter()
                        answer.longest_pause_s = max(answer.longest_pause_s, now - last)
                        last = now
                        _note(answer, json.loads(line))
                        if part_came is not None:
                            part_came(answer)
        except trio.TooSlowError:
            answer.problem = f"it hangs after {answer.parts} parts"
        except (httpx2.HTTPError, json.JSONDecodeError) as error:
            answer.problem = f"{type(error).__name__}: {error}"
        return answer


def _note(answer: Answer, line: dict[str, Any]) -> None:
    if "error" in line:
        answer.problem = line["error"]
        return
    answer.text += line["message"]["content"]
    if line["done"]:
        answer.prompt_tokens = line["prompt_eval_count"]
        answer.tokens = line["eval_count"]
        answer.reason = line["done_reason"]
        answer.moved = line.get("omx_moved", 0)
    else:
        answer.parts += 1


def _difference(answer: Answer, undisturbed: Answer) -> str:
    """Empty if the client saw the same, whoever answered."""
    same = replace(answer, node=undisturbed.node, moved=undisturbed.moved)
    return "" if same == undisturbed else f"{answer} instead of {undisturbed}"


@asynccontextmanager
async def open_dying_swarm(
    folder: Path, gguf: Path, *, rng: random.Random, tokens: int = 40
) -> AsyncIterator[DyingSwarm]:
    """Start it; end every process with the block. tokens: of each answer, at most."""
    async with trio.open_nursery() as nursery:
        swarm = DyingSwarm(folder, nursery, rng, tokens)
        try:
            await swarm.start(gguf)
            yield swarm
        finally:
            nursery.cancel_scope.cancel()
            await swarm.end()


def percentile(values: list[float], part: float) -> float:
    """The value that so much of them does not exceed. part: 0 to 1."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else 0.0


def report(rounds: list[Round]) -> dict[str, Any]:
    """What the rounds measured, as JSON. Seconds."""
    pauses = [each.pause_s for each in rounds]
    gone = [each.engines_gone_s for each in rounds]
    return {
        "kills": len(rounds),
        "clients": sum(len(each.answers) for each in rounds),
        "before_the_first_part": sum(not each.after_parts for each in rounds),
        "moved": sum(bool(each.answers[0].moved) for each in rounds),
        "wrong": [wrong for each in rounds for wrong in each.wrong],
        "pause_s": {f"p{part}": round(percentile(pauses, part / 100), 3) for part in (50, 90, 99)}
        | {"max": round(max(pauses, default=0.0), 3)},
        "engines_gone_s": {
            "p50": round(percentile(gone, 0.5), 3),
            "max": round(max(gone, default=0.0), 3),
        },
    }

"""A node in RAM that answers questions, served on loopback for `omx` to ask."""

import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from ollamamax_p2p import NodeLoad
from ollamamax_p2p.api import ApiSettings, open_api
from ollamamax_p2p.content import ShowAnswer, ShownDetails
from ollamamax_p2p.errors import ModelNotFound, PeerNotFound
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.inference.core.requests import Delta, Finish
from ollamamax_p2p.testing.scripted_backend import Script, ScriptedBackend
from tests.api.ram_inference import AT_ONCE, EMBEDDER, MODEL, RamInference
from tests.api.ram_node import OTHER_PEER, PEER, RamNode

NEW = ServableModel(name="new:latest", capabilities=("completion", "chat"))
"""Nobody has it, until it is pulled."""

SEER = ServableModel(name="seer:latest", capabilities=("completion", "chat", "vision"))
UNSHOWN = ServableModel(name="remote:latest", capabilities=("completion", "chat"))
"""An engine has it, and no node can show it."""


def backend(name: str = "scripted", **script) -> ScriptedBackend:
    return ScriptedBackend(
        (MODEL, EMBEDDER, SEER, UNSHOWN, NEW),
        name=name,
        slots=8,
        script=Script(**(AT_ONCE | script)),
    )


def node_load(name: str, peer: str, **changes) -> NodeLoad:
    facts = {
        "peer_id": peer,
        "node": name,
        "region": "attic",
        "draining": False,
        "heard_s": 0.4,
        "memory_free": 3_100_000_000,
        "memory_total": 16_000_000_000,
        "accelerator": "",
        "backends": ("scripted",),
        "slots": 2,
        "busy": 1,
        "queued": 0,
        "tokens_per_s": 12.5,
        "models": 3,
        "loaded": ("tiny:latest",),
    }
    return NodeLoad(**(facts | changes))


@dataclass
class TalkingNode(RamNode):
    pulled: list[str] = field(default_factory=list)
    pulling: tuple[str, ...] = ()

    async def status(self):
        return replace(await RamNode.status(self), pulls=self.pulling)

    async def listed_models(self):
        return ()

    async def show_model(self, name, *, verbose=False, system="", options=None):
        known = {each.name: each for each in (MODEL, EMBEDDER, SEER)}
        found = known.get(name if ":" in name else f"{name}:latest")
        if found is None and name not in self.pulled:
            raise ModelNotFound(name)
        return ShowAnswer(
            details=ShownDetails(
                parent_model="",
                format="gguf",
                family="llama",
                families=("llama",),
                parameter_size="135M",
                quantization_level="Q8_0",
            ),
            license="MIT",
            parameters="temperature 0.2",
            modelfile="FROM tiny",
            template="{{ .Prompt }}",
            model_info={"general.architecture": "llama", "llama.context_length": 2048},
            capabilities=found.capabilities if found else ("completion",),
            modified_at="2026-11-20T12:00:00Z",
        )

    async def pull(self, name, **more):
        if name != "new":
            raise ModelNotFound(name)
        report = await RamNode.pull(self, name, **more)
        self.pulled.append(name)
        return report


@dataclass
class TalkingInference(RamInference):
    lacks: set[str] = field(default_factory=lambda: {"new:latest"})

    async def swarm_models(self):
        found = await RamInference.swarm_models(self)
        return tuple(each for each in found if each.model.name not in self.lacks)

    loads_of_nodes: tuple[NodeLoad, ...] = (
        node_load("ram", PEER),
        node_load("attic", OTHER_PEER, draining=True, region="", loaded=(), busy=0),
    )
    drained: list[tuple[str, bool]] = field(default_factory=list)

    async def nodes(self):
        return self.loads_of_nodes

    async def drain(self, node, draining):
        if node not in [each.peer_id for each in self.loads_of_nodes]:
            raise PeerNotFound(node)
        self.drained.append((node, draining))


class Talking:
    """The served node, in a thread with a loop of its own: the test's main thread runs `omx`."""

    def __init__(self, data_dir: Path) -> None:
        self.node = TalkingNode()
        self.inference = TalkingInference((backend(),))
        self.data_dir = data_dir
        self._serving = threading.Event()
        self._token: trio.lowlevel.TrioToken
        self._stop: trio.Event
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))

    def script(self, **script) -> None:
        """How the engine behaves from now on."""
        self.inference.backends = (backend(**script),)

    def say(self, *parts) -> None:
        """What every answer is from now on; one that no exception ends has an end."""
        is_whole = not parts or isinstance(parts[-1], Delta)
        self.inference.parts = [*parts, Finish(reason="stop")] if is_whole else parts

    def start(self) -> None:
        self._thread.start()
        assert self._serving.wait(30)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._token.run_sync_soon(self._stop.set)
        self._thread.join(30)

    async def _serve(self) -> None:
        self._token, self._stop = trio.lowlevel.current_trio_token(), trio.Event()
        settings = ApiSettings(listen="127.0.0.1:0")
        async with open_api(
            self.node, settings, data_dir=self.data_dir, peer_id=PEER, inference=self.inference
        ):
            self._serving.set()
            await self._stop.wait()


@pytest.fixture
def talking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Talking]:
    for name in [*os.environ]:
        if name.startswith(("OMX_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMX_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    served = Talking(tmp_path)
    served.start()
    yield served
    served.stop()


class TerminalInput(io.StringIO):
    """A standard input that is a terminal at which nobody writes."""

    def isatty(self) -> bool:
        return True


def piped(text: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")

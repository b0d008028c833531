"""A node in RAM that answers questions, served on loopback for `omx` to ask."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from ollamamax_p2p import NodeLoad
from ollamamax_p2p.api import ApiSettings, LocalClient, open_api
from ollamamax_p2p.content import ShowAnswer, ShownDetails
from ollamamax_p2p.errors import ModelNotFound, PeerNotFound
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.testing.scripted_backend import Script, ScriptedBackend
from tests.api.ram_inference import AT_ONCE, EMBEDDER, MODEL, RamInference
from tests.api.ram_node import OTHER_PEER, PEER, RamNode

SEER = ServableModel(name="seer:latest", capabilities=("completion", "chat", "vision"))
UNSHOWN = ServableModel(name="remote:latest", capabilities=("completion", "chat"))
"""An engine has it, and no node can show it."""


def backend(name: str = "scripted", **script) -> ScriptedBackend:
    return ScriptedBackend(
        (MODEL, EMBEDDER, SEER, UNSHOWN), name=name, slots=8, script=Script(**(AT_ONCE | script))
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
        from dataclasses import replace

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
        report = await RamNode.pull(self, name, **more)
        self.pulled.append(name)
        return report


@dataclass
class TalkingInference(RamInference):
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


@dataclass
class Talking:
    node: TalkingNode
    inference: TalkingInference
    client: LocalClient
    data_dir: Path

    def script(self, **script) -> None:
        """How the engine behaves from now on."""
        self.inference.backends = (backend(**script),)


@pytest.fixture
async def talking(tmp_path: Path) -> AsyncIterator[Talking]:
    node, inference = TalkingNode(), TalkingInference((backend(),))
    settings = ApiSettings(listen="127.0.0.1:0")
    with trio.fail_after(60):
        async with open_api(node, settings, data_dir=tmp_path, peer_id=PEER, inference=inference):
            yield Talking(node, inference, LocalClient.find(tmp_path), tmp_path)

"""Small swarms of routers on the simulated network, each with scripted back ends."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from ollamamax_p2p.errors import ModelNotFound
from ollamamax_p2p.host import SimulatedHost, SimulatedNetwork, open_simulated_network
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.inference.core.requests import ChatMessage, ChatRequest, Delta, Finish
from ollamamax_p2p.router import Call
from ollamamax_p2p.router.dispatch import Router, Surroundings, open_router
from ollamamax_p2p.router.settings import RouterSettings
from ollamamax_p2p.testing import Script, ScriptedBackend

MODEL = ServableModel(
    name="tiny:latest",
    digest="sha256:" + "a" * 64,
    size=100,
    capabilities=("completion", "embedding", "tools"),
    can_resume=True,
    context_length=2048,
)
GiB = 2**30


@dataclass
class RouterNode:
    host: SimulatedHost
    router: Router
    backends: Sequence[ScriptedBackend]

    @property
    def peer(self) -> str:
        return str(self.host.peer_id)

    @property
    def backend(self) -> ScriptedBackend:
        return self.backends[0]


@dataclass
class RouterSwarm:
    network: SimulatedNetwork
    nodes: list[RouterNode]

    async def settle(self) -> None:
        """Until everybody has heard of everybody."""
        with trio.fail_after(60):
            while any(len(node.router._nodes()) < len(self.nodes) for node in self.nodes):  # noqa: ASYNC110
                await trio.sleep(0.2)
        await trio.sleep(3)


@asynccontextmanager
async def routers(
    backends: Sequence[Sequence[ScriptedBackend]],
    *,
    seed: int = 1,
    settings: RouterSettings | None = None,
    settled: bool = True,
    links: int = 0,
) -> AsyncIterator[RouterSwarm]:
    """A node for each list of back ends, all connected, all heard of.

    links: that each dials, drawn at random; 0: everybody dials everybody.
    """
    rng = random.Random(seed)
    async with open_simulated_network(rng=rng) as network, AsyncExitStack() as stack:
        hosts = [network.add_host(f"node{place}") for place in range(len(backends))]
        for one in hosts:
            others = [host for host in hosts if host is not one]
            for other in rng.sample(others, links) if links else others:
                await one.connect(other.addresses)
        for host in hosts:
            for connection in host.connections():
                host.admit(connection.peer)
        nodes = []
        for place, (host, theirs) in enumerate(zip(hosts, backends, strict=True)):
            router = await stack.enter_async_context(
                open_router(
                    host,
                    theirs,
                    settings or RouterSettings(),
                    _around(host, place),
                    rng=random.Random(rng.getrandbits(32)),
                )
            )
            nodes.append(RouterNode(host, router, theirs))
        swarm = RouterSwarm(network, nodes)
        if settled:
            await swarm.settle()
        yield swarm


def _around(host: SimulatedHost, place: int) -> Surroundings:
    async def connect(peer) -> None:
        pass

    async def show(name: str, verbose: bool) -> bytes:
        return f"{name} of node{place}".encode()

    async def pull(name: str) -> None:
        raise ModelNotFound(name)

    async def memory() -> tuple[int, int, str]:
        return (8 * GiB, 16 * GiB, "")

    return Surroundings(
        name=f"node{place}",
        region="",
        epoch=1_000 + place,
        linked=lambda: [each.peer for each in host.connections()],
        connect=connect,
        is_member=lambda peer: True,
        show=show,
        pull=pull,
        memory=memory,
    )


def scripted(**script) -> ScriptedBackend:
    slots = script.pop("slots", 1)
    name = script.pop("name", "scripted")
    models = script.pop("models", (MODEL,))
    return ScriptedBackend(models, name=name, slots=slots, script=Script(**script))


def ask(text: str = "hello", **more) -> ChatRequest:
    return ChatRequest(model="tiny", messages=(ChatMessage(role="user", content=text),), **more)


async def answered(node: RouterNode, request=None, call: Call | None = None):
    """Text, finish and who answered."""
    parts = []
    async with node.router.answer(request or ask(), call or Call()) as answer:
        async for part in answer:
            parts.append(part)
        servers = answer.servers
    text = "".join(part.text for part in parts if isinstance(part, Delta))
    assert isinstance(parts[-1], Finish)
    return text, parts[-1], servers

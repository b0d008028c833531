"""A ServedInference in RAM over ScriptedBackends: asks the first, and goes on with the next when
one breaks off midway; or says just what the test gives it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio

from ollamamax_p2p.api.served_inference import RunningModel, SwarmModel
from ollamamax_p2p.errors import BackendUnavailable, CannotResume, OmxError
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.inference.core.requests import (
    Delta,
    Embeddings,
    EmbedRequest,
    Options,
    Part,
    Resume,
    TextRequest,
)
from ollamamax_p2p.router import Call, QueuePlace, Server
from ollamamax_p2p.testing.scripted_backend import Script, ScriptedBackend
from tests.api.ram_node import PEER

MODEL = ServableModel(
    name="tiny:latest",
    digest="sha256:" + "ab" * 32,
    size=98_000_000,
    modified_at=1_700_000_000.0,
    capabilities=("completion", "chat", "tools", "embedding"),
    can_resume=True,
    context_length=2_048,
    embedding_length=8,
    format="gguf",
    family="llama",
    parameter_size="135M",
    quantization="Q8_0",
)
EMBEDDER = ServableModel(name="vectors:latest", capabilities=("embedding",), context_length=4)

AT_ONCE = {"load_s": 0.0, "first_token_s": 0.0, "token_s": 0.0}


def scripted(name: str = "scripted", **script) -> ScriptedBackend:
    """A back end with both models that takes no time unless told to."""
    return ScriptedBackend(
        (MODEL, EMBEDDER), name=name, slots=8, script=Script(**(AT_ONCE | script))
    )


class RamAnswer:
    """An answer on its way."""

    def __init__(self, parts: AsyncIterator[Part], servers: list[Server], queued_s: float) -> None:
        self._parts = parts
        self._servers = servers
        self.queued_s = queued_s

    @property
    def server(self) -> Server:
        return self._servers[-1]

    @property
    def servers(self) -> tuple[Server, ...]:
        return tuple(self._servers)

    def __aiter__(self) -> AsyncIterator[Part]:
        return self._parts


@dataclass
class RamInference:
    backends: Sequence[ScriptedBackend] = field(default_factory=lambda: (scripted(),))
    node_name: str = "ram"
    parts: Sequence[Part | Exception] | None = None
    """What every answer is, word for word, in place of a back end's; an exception is raised."""
    error: OmxError | None = None
    """What everything raises."""
    places: Sequence[QueuePlace] = ()
    """Told before an answer begins."""
    queued_s: float = 0.0
    calls: list[Call] = field(default_factory=list)
    left: trio.Event = field(default_factory=trio.Event)
    """Set when an answer is over, or was left."""
    seen: list[TextRequest | EmbedRequest] = field(default_factory=list)
    loads: list[tuple[str, float | None, Options | None]] = field(default_factory=list)

    @asynccontextmanager
    async def answer(self, request: TextRequest, call: Call) -> AsyncIterator[RamAnswer]:
        self._note(call)
        self.seen.append(request)
        for place in self.places:
            assert call.on_queue is not None
            call.on_queue(place)
        async with AsyncExitStack() as stack:
            stack.callback(self._note_left)
            servers: list[Server] = []
            parts = self._said(servers) if self.parts else self._asked(request, servers, stack)
            stack.push_async_callback(parts.aclose)
            first = await anext(parts)
            yield RamAnswer(_chained(first, parts), servers, self.queued_s)

    def _note_left(self) -> None:
        self.left.set()
        self.left = trio.Event()

    async def _said(self, servers: list[Server]):
        servers.append(self._server(self.backends[0]))
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def _asked(self, request: TextRequest, servers: list[Server], stack: AsyncExitStack):
        given: list[str] = []
        for backend in self.backends:
            servers.append(self._server(backend))
            if given:
                resume = Resume(text="".join(given), completion_tokens=len(given))
                request = type(request)(
                    **{
                        name: getattr(request, name)
                        for name in request.__struct_fields__
                        if name != "resume"
                    },
                    resume=resume,
                )
            try:
                parts = await stack.enter_async_context(backend.answer(request))
                async for part in parts:
                    if isinstance(part, Delta):
                        given.append(part.text)
                    yield part
            except BackendUnavailable as error:
                last = error
            else:
                return
        raise CannotResume(str(last)) if given else last

    async def embed(self, request: EmbedRequest, call: Call) -> tuple[Embeddings, Server]:
        self._note(call)
        self.seen.append(request)
        return await self.backends[0].embed(request), self._server(self.backends[0])

    async def load(
        self,
        model: str,
        call: Call,
        *,
        keep_alive_s: float | None = None,
        options: Options | None = None,
    ) -> Server:
        self._note(call)
        self.loads.append((model, keep_alive_s, options))
        await self.backends[0].load(model, keep_alive_s=keep_alive_s, options=options)
        return self._server(self.backends[0])

    async def unload(self, model: str) -> None:
        for backend in self.backends:
            await backend.unload(model)

    async def swarm_models(self) -> tuple[SwarmModel, ...]:
        if self.error:
            raise self.error
        holders = tuple(self._server(backend) for backend in self.backends)
        models = await self.backends[0].models()
        return tuple(SwarmModel(model=model, holders=holders) for model in models)

    async def running_models(self) -> tuple[RunningModel, ...]:
        found = []
        for backend in self.backends:
            server = self._server(backend)
            found += [RunningModel(model=model, server=server) for model in await backend.loaded()]
        return tuple(found)

    def _note(self, call: Call) -> None:
        self.calls.append(call)
        if self.error:
            raise self.error

    def _server(self, backend: ScriptedBackend) -> Server:
        return Server(peer_id=PEER, node=self.node_name, backend=backend.name)


async def _chained(first: Part, rest: AsyncIterator[Part]) -> AsyncIterator[Part]:
    yield first
    async for part in rest:
        yield part

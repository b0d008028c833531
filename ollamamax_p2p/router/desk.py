"""Desk: what this node's own back ends work on, whoever asked: this node's router or another's.

A request runs here or not at all; it is never sent on. Where it waits is the asking router's
queue; what comes nevertheless while the engines are busy waits in the engine's own, up to a bound.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio

from ollamamax_p2p.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    ModelNotFound,
    OmxError,
    QueueFull,
)
from ollamamax_p2p.inference import Backend, ServableModel
from ollamamax_p2p.inference.core.requests import Delta, Embeddings, EmbedRequest, TextRequest
from ollamamax_p2p.router.core.load_table import BackendLoad, BackendModels, ModelSpeed, model_key
from ollamamax_p2p.router.core.messages import (
    AnyAsk,
    Begun,
    Done,
    DrainRequest,
    Event,
    LoadRequest,
    Shown,
    ShowRequest,
    Terms,
    UnloadRequest,
)

Emit = Callable[[Event], Awaitable[None]]
Show = Callable[[str, bool], Awaitable[bytes]]
"""A model's name, and whether at length; what it is made of, as JSON. Raises ModelNotFound."""

LOOK_S = 2.0
"""A back end that does not tell within this what it has is told of as having nothing."""

WAITING_PER_SLOT_MAX = 64
"""Requests that one engine has beyond its slots, for each of them; more are refused."""

RETRY_AFTER_S = 1.0


class Desk:
    """The back ends of one node."""

    def __init__(self, backends: Sequence[Backend], *, show: Show, draining: bool = False) -> None:
        self.draining = draining
        """Begin nothing new; what runs is finished."""
        self.tokens = 0
        """That the engines gave since this node began."""
        self._backends = {backend.name: backend for backend in backends}
        self._show = show
        self._running: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """Requests that are being worked on, or wait in an engine's queue."""
        return self._running.total()

    async def serve(self, request: AnyAsk, terms: Terms, emit: Emit) -> None:
        """Fulfil a request; returns once its last event is emitted.

        Raises what the back end raises, ModelNotFound, QueueFull, DeadlineExceeded where nothing
        came in time, and BackendUnavailable while this node is being drained.
        """
        if isinstance(request, ShowRequest):
            await emit(Shown(body=await self._show(request.model, request.verbose)))
            return
        if isinstance(request, UnloadRequest):
            for backend in self._backends.values():
                if terms.backend in ("", backend.name):
                    await backend.unload(request.model)
            await emit(Done())
            return
        if isinstance(request, DrainRequest):
            self.draining = request.draining
            await emit(Done())
            return
        if self.draining:
            raise BackendUnavailable(terms.backend or "any", "this node is being drained")
        backend = await self._backend_for(request.model, terms.backend)
        if self._running[backend.name] >= backend.slots * (1 + WAITING_PER_SLOT_MAX):
            raise QueueFull(backend.slots * WAITING_PER_SLOT_MAX, RETRY_AFTER_S)
        self._running[backend.name] += 1
        try:
            await self._run(backend, request, terms, emit)
        finally:
            self._running[backend.name] -= 1

    async def _run(
        self,
        backend: Backend,
        request: TextRequest | EmbedRequest | LoadRequest,
        terms: Terms,
        emit: Emit,
    ) -> None:
        allowed_s = terms.deadline_s
        patience = trio.CancelScope()
        if allowed_s is not None:
            patience.deadline = trio.current_time() + allowed_s
        with patience:
            await emit(Begun(backend=backend.name))
            if isinstance(request, LoadRequest):
                await backend.load(
                    request.model, keep_alive_s=request.keep_alive_s, options=request.options
                )
                await emit(Done())
            elif isinstance(request, EmbedRequest):
                vectors: Embeddings = await backend.embed(request)
                patience.deadline = float("inf")
                await emit(vectors)
            else:
                async with backend.answer(request) as parts:
                    begun = False
                    async for part in parts:
                        if not begun:  # from here on it may take as long as it takes
                            begun, patience.deadline = True, float("inf")
                        if isinstance(part, Delta):
                            self.tokens += max(len(part.tokens), 1)
                        await emit(part)
        if patience.cancelled_caught:
            raise DeadlineExceeded("the request", allowed_s or 0.0)

    async def _backend_for(self, model: str, name: str) -> Backend:
        if name:
            if name not in self._backends:
                raise BackendUnavailable(name, "this node has none of that name")
            return self._backends[name]
        for backend in self._backends.values():
            if any(model_key(each.name) == model_key(model) for each in await models_of(backend)):
                return backend
        raise ModelNotFound(model)

    async def look(
        self, speeds: Callable[[str], tuple[ModelSpeed, ...]]
    ) -> tuple[list[BackendLoad], list[BackendModels]]:
        """What the back ends have now; one that does not answer has nothing."""
        loads: list[BackendLoad] = []
        models: list[BackendModels] = []

        async def look_at(backend: Backend) -> None:
            try:
                with trio.fail_after(LOOK_S):
                    servable, loaded = await backend.models(), await backend.loaded()
            except (OmxError, trio.TooSlowError):
                return
            if not servable and not loaded:  # nothing can be sent there
                return
            waiting = max(self._running[backend.name] - backend.slots, 0)
            loads.append(
                BackendLoad(
                    name=backend.name,
                    slots=backend.slots,
                    queued=waiting,
                    loaded=loaded,
                    speeds=speeds(backend.name),
                )
            )
            models.append(BackendModels(name=backend.name, models=servable))

        async with trio.open_nursery() as nursery:
            for backend in self._backends.values():
                nursery.start_soon(look_at, backend)
        order = list(self._backends)
        return (
            sorted(loads, key=lambda each: order.index(each.name)),
            sorted(models, key=lambda each: order.index(each.name)),
        )


async def models_of(backend: Backend) -> tuple[ServableModel, ...]:
    """What it could run; nothing if it does not answer."""
    try:
        with trio.fail_after(LOOK_S):
            return await backend.models()
    except (OmxError, trio.TooSlowError):
        return ()

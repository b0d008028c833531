"""SwarmInference: all engines of the swarm as one, as a node's users see it.

A node outlives its sessions, and with them its routers: every request goes to the router of the
moment, and one that is under way when the session ends is told so.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from ollamamax_p2p.errors import SwarmChanging
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    Options,
    TextRequest,
)
from ollamamax_p2p.router import (
    Answer,
    Call,
    NodeLoad,
    Router,
    RunningModel,
    Server,
    SwarmModel,
)


class SwarmInference:
    """Made by the node; implements `api.ServedInference`."""

    def __init__(self, router: Callable[[], Router]) -> None:
        """router: the one of the moment; raises SwarmChanging between two sessions."""
        self._router = router
        self._under_way: set[trio.CancelScope] = set()

    def session_ends(self) -> None:
        """The router of the moment is about to go, and would leave its clients waiting for ever."""
        for scope in self._under_way:
            scope.cancel()

    @asynccontextmanager
    async def _within_session(self) -> AsyncIterator[None]:
        scope = trio.CancelScope()
        self._under_way.add(scope)
        try:
            with scope:
                yield
        finally:
            self._under_way.discard(scope)
        if scope.cancelled_caught:
            raise SwarmChanging

    # -- what ServedInference asks for

    @asynccontextmanager
    async def answer(self, request: TextRequest, call: Call) -> AsyncIterator[Answer]:
        """See `api.ServedInference.answer`."""
        async with self._within_session(), self._router().answer(request, call) as answer:
            yield answer

    async def embed(self, request: EmbedRequest, call: Call) -> tuple[Embeddings, Server]:
        """See `api.ServedInference.embed`."""
        async with self._within_session():
            return await self._router().embed(request, call)

    async def load(
        self,
        model: str,
        call: Call,
        *,
        keep_alive_s: float | None = None,
        options: Options | None = None,
    ) -> Server:
        """See `api.ServedInference.load`."""
        async with self._within_session():
            return await self._router().load(
                model, call, keep_alive_s=keep_alive_s, options=options
            )

    async def unload(self, model: str) -> None:
        """See `api.ServedInference.unload`."""
        await self._router().unload(model)

    async def swarm_models(self) -> tuple[SwarmModel, ...]:
        """See `api.ServedInference.swarm_models`."""
        return await self._router().swarm_models()

    async def running_models(self) -> tuple[RunningModel, ...]:
        """See `api.ServedInference.running_models`."""
        return await self._router().running_models()

    async def nodes(self) -> tuple[NodeLoad, ...]:
        """See `api.ServedInference.nodes`."""
        return await self._router().nodes()

    async def drain(self, node: str, draining: bool) -> None:
        """See `api.ServedInference.drain`."""
        await self._router().drain(node, draining)

    # -- what a library's user wants

    def chat(
        self,
        model: str,
        messages: Sequence[ChatMessage] | str,
        *,
        options: Options | None = None,
        call: Call | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of an answer to a conversation, or to one question. Raises as `answer`.

        Close it (`contextlib.aclosing`) if you leave before its end: only that stops the engine.
        """
        said = (
            (ChatMessage(role="user", content=messages),)
            if isinstance(messages, str)
            else tuple(messages)
        )
        request = ChatRequest(model=model, messages=said, options=options or Options())
        return self._deltas(request, call or Call())

    def generate(
        self,
        model: str,
        prompt: str,
        *,
        options: Options | None = None,
        call: Call | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The same for a prompt that is to be continued."""
        request = GenerateRequest(model=model, prompt=prompt, options=options or Options())
        return self._deltas(request, call or Call())

    async def _deltas(self, request: TextRequest, call: Call) -> AsyncGenerator[Delta, None]:
        async with self.answer(request, call) as answer:
            async for part in answer:
                if isinstance(part, Delta):
                    yield part

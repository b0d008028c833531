"""Backend: an engine that runs models, as the router sees it.

Implementations: `embedded` (llama.cpp in a child process), `ollama` (an Ollama server),
`openai_compatible` (vLLM, SGLang, llama-server, LM Studio), and `testing.ScriptedBackend`; one
contract suite (`tests/contracts/test_backend.py`).

Errors: BackendUnavailable (it is not there, or ended meanwhile: may be tried elsewhere),
BackendFailed (it answered with a fault of its own: may be tried elsewhere), ModelNotFound,
NotSupported and BadRequest (the caller's fault: the same everywhere).
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import (
    ChatRequest,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    Options,
    Part,
)

__all__ = ["Backend", "LoadedModel", "ServableModel"]


class Backend(Protocol):
    """An engine. Every method may be called from any task."""

    @property
    def name(self) -> str:
        """Which of this node's back ends: `embedded`, `ollama`, or what the settings call it."""

    @property
    def slots(self) -> int:
        """Requests to one model that it works on at once; more wait in its own queue."""

    async def models(self) -> tuple[ServableModel, ...]:
        """What it could run now. Raises BackendUnavailable."""

    async def loaded(self) -> tuple[LoadedModel, ...]:
        """What is in its memory. Raises BackendUnavailable."""

    def answer(
        self, request: GenerateRequest | ChatRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[Part]]:
        """Deltas, then one Finish; leaving the block earlier stops the engine within 100 ms.

        Loads the model if need be. Raises BackendUnavailable, BackendFailed, ModelNotFound,
        NotSupported, BadRequest: from entering the block, or from the iterator. A `resume` that it
        cannot honour raises CannotResume before any part.
        """

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Raises as `answer`."""

    async def load(
        self, model: str, *, keep_alive_s: float | None = None, options: Options | None = None
    ) -> None:
        """Have it in memory. Raises as `answer`."""

    async def unload(self, model: str) -> None:
        """Have it out of memory once nobody uses it any more; nothing if it is not in it."""

    async def check(self) -> None:
        """Returns if it answers. Raises BackendUnavailable."""

"""ServedInference: what the inference API needs of a node.

`node.Node` implements it; the tests have a small one in RAM over `testing.ScriptedBackend`. Names
are taken as users write them; every method raises OmxErrors only.
"""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ollamamax_p2p.inference.core.requests import Embeddings, EmbedRequest, Options, TextRequest
from ollamamax_p2p.router import (
    Answer,
    Call,
    NodeLoad,
    RunningModel,
    Server,
    SwarmModel,
)

__all__ = ["RunningModel", "ServedInference", "SwarmModel"]


class ServedInference(Protocol):
    """The swarm as something that answers."""

    def answer(self, request: TextRequest, call: Call) -> AbstractAsyncContextManager[Answer]:
        """Entered once the first part has arrived: until then failures are retried unseen. Leaving
        the block earlier stops the engine, wherever it is.

        Raises ModelNotFound, NotSupported, BadRequest (the caller's), QueueFull, NoCandidate,
        DeadlineExceeded, BackendUnavailable, BackendFailed.
        """

    async def embed(self, request: EmbedRequest, call: Call) -> tuple[Embeddings, Server]:
        """Raises as `answer`."""

    async def load(
        self,
        model: str,
        call: Call,
        *,
        keep_alive_s: float | None = None,
        options: Options | None = None,
    ) -> Server:
        """Have the model in memory where it fits best. Raises as `answer`."""

    async def unload(self, model: str) -> None:
        """Have it out of memory on every node. Raises ModelNotFound."""

    async def swarm_models(self) -> tuple[SwarmModel, ...]:
        """What anybody in the swarm can run, by name, newest first."""

    async def running_models(self) -> tuple[RunningModel, ...]:
        """What is in memory anywhere, the one that stays longest first."""

    async def nodes(self) -> tuple[NodeLoad, ...]:
        """How busy every node is that was heard of, this one first."""

    async def drain(self, node: str, draining: bool) -> None:
        """Have a node, by name or peer id, begin no new answers, or begin again; what runs is
        finished. Raises PeerNotFound, BadInput if several have that name, NetworkTrouble.
        """

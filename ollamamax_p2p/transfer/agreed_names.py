"""AgreedNames: what the swarm has agreed that a name means. `cluster.SharedCatalogue` is one."""

from typing import Protocol

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.model_name import ModelName


class AgreedNames(Protocol):
    """One digest for a name, on every node."""

    async def meaning(self, name: ModelName) -> Digest | None:
        """The manifest that the name stands for; None if nothing is agreed about it. As new as can
        be known here now; never raises because others cannot be reached.
        """

    async def agree(self, name: ModelName, manifest: Digest, *, replaces: Digest | None) -> Digest:
        """Have it agreed, if nothing was, or `replaces` was; gives what is agreed then: it may be
        another one that came first. Raises NetworkTrouble if nothing can be agreed on now.
        """

"""Who holds which blob, from the connected peers first and from Kademlia beyond them."""

from collections.abc import Sequence

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.discovery.providers import ProviderDirectory
from ollamamax_p2p.identity import PeerId


class MergedProviders:
    """A ProviderDirectory over a near one and a far one."""

    def __init__(self, near: ProviderDirectory, far: ProviderDirectory) -> None:
        """far: asked only where the near one knows nobody, because asking costs seconds."""
        self._near = near
        self._far = far

    async def announce(self, digests: Sequence[Digest]) -> None:
        """This node holds these now."""
        await self._near.announce(digests)
        await self._far.announce(digests)

    async def withdraw(self, digests: Sequence[Digest]) -> None:
        """This node holds these no longer."""
        await self._near.withdraw(digests)
        await self._far.withdraw(digests)

    async def find(self, digest: Digest) -> Sequence[PeerId]:
        """Near holders; if there are none, far ones."""
        return await self._near.find(digest) or await self._far.find(digest)

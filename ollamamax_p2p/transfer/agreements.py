"""What the swarm has agreed about models and blobs, as transfers need it. `cluster.SharedCatalogue`
is both.
"""

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


class AgreedMaps(Protocol):
    """One chunk map for a blob, on every node; told by whoever has verified the whole blob."""

    def chunk_map_of(self, blob: Digest) -> Digest | None:
        """The digest of the map that is agreed; None if none is."""

    def tell_chunk_map(self, blob: Digest, chunk_map: Digest, size: int) -> None:
        """The blob of this many bytes is here, and this is its map: have that agreed when it can
        be, if none is. Returns at once.
        """

    def tell_wrong_chunk_map(self, blob: Digest, chunk_map: Digest) -> None:
        """The agreed map did not make the blob: have it forgotten when that can be. Returns at
        once.
        """

"""Who holds which blob. ProviderDirectory is what transfer sees of it."""

from collections.abc import Sequence
from typing import Protocol

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.identity import PeerId


class ProviderDirectory(Protocol):
    """Announce what this node holds; find who holds a blob."""

    async def announce(self, digests: Sequence[Digest]) -> None:
        """This node holds these now; renewed until withdrawn. Returns at once, the telling goes on
        behind.
        """

    async def withdraw(self, digests: Sequence[Digest]) -> None:
        """This node holds these no longer."""

    async def find(self, digest: Digest) -> Sequence[PeerId]:
        """Peers, connected when this returns, that are said to hold all or part of the blob; best
        first, at most 32.

        An empty answer means nobody was found within the time it allows itself (some seconds at
        most).
        """

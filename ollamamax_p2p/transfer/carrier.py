"""ChunkCarrier: how the transfer protocol's messages get to a peer and back.

`chunk_streams` carries them on a stream of the host; lanes (dedicated connections) can be a second
one. Both ends speak the messages of `core.messages`, whatever carries them.
"""

from typing import Protocol

from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.transfer.core.messages import FromFetcher, FromSource


class SourceConversation(Protocol):
    """The fetcher's end. Any task may send; one at a time may receive."""

    @property
    def peer(self) -> PeerId:
        """The source."""

    async def send(self, message: FromFetcher) -> None:
        """Waits while the source does not read. Raises PeerGone."""

    async def receive(self) -> FromSource | None:
        """The next message; None when the source has ended in good order. Raises PeerGone, or
        PeerMisbehaved that names the peer.
        """

    async def aclose(self) -> None:
        """End it at once; never raises."""


class FetcherConversation(Protocol):
    """The source's end. Any task may send; one at a time may receive."""

    @property
    def peer(self) -> PeerId:
        """The fetcher."""

    async def send(self, message: FromSource) -> None:
        """Waits while the fetcher does not read. Raises PeerGone."""

    async def receive(self) -> FromFetcher | None:
        """The next message; None when the fetcher has ended in good order. Raises PeerGone, or
        PeerMisbehaved that names the peer.
        """


class ChunkCarrier(Protocol):
    """Opens conversations with sources."""

    async def open(self, peer: PeerId) -> SourceConversation:
        """Begin one. Raises PeerGone, NotAdmitted."""

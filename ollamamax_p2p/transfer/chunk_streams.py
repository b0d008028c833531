"""The transfer protocol on the host's ordinary streams: works wherever peers can connect at all."""

from collections.abc import Awaitable, Callable

from ollamamax_p2p.host import ByteStream, MessageStream, PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.transfer.carrier import FetcherConversation, SourceConversation
from ollamamax_p2p.transfer.core.messages import (
    FromFetcher,
    FromSource,
    fetcher_codec,
    source_codec,
)
from ollamamax_p2p.wire import protocol_ids


class StreamCarrier:
    """A stream per conversation."""

    def __init__(self, host: PeerHost) -> None:
        self._host = host

    async def open(self, peer: PeerId) -> SourceConversation:
        """See ChunkCarrier."""
        stream = await self._host.open_stream(peer, protocol_ids.TRANSFER)
        return MessageStream[FromFetcher, FromSource](
            stream, sends=fetcher_codec, receives=source_codec
        )


def serve_streams(host: PeerHost, serve: Callable[[FetcherConversation], Awaitable[None]]) -> None:
    """Have every fetcher's stream served."""

    async def handle(stream: ByteStream) -> None:
        await serve(
            MessageStream[FromSource, FromFetcher](
                stream, sends=source_codec, receives=fetcher_codec
            )
        )

    host.set_handler(protocol_ids.TRANSFER, handle)

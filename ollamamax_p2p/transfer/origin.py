"""Origin: a registry on the internet as a pull sees it; `registry_origin` is the one over HTTP."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.transfer.progress import PullProgress, PushReport


class Origin(Protocol):
    """Where models come from that no peer holds. One object serves every registry host."""

    async def manifest(self, name: ModelName, *, insecure: bool = False) -> Manifest:
        """What the registry says the name means now.

        insecure: plain http is allowed for this host, as `ollama pull --insecure` does.
        Raises ModelNotFound, OriginUnavailable, OriginRefused; MalformedMessage for a bad manifest.
        """

    def fetch_range(
        self, name: ModelName, digest: Digest, start: int, end: int, *, insecure: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Bytes [start, end) of a blob of that model, in parts as they arrive; not verified.

        Gives exactly end - start bytes or raises OriginUnavailable, OriginRefused, BlobNotFound.
        Leaving the block early ends the request.
        """

    async def push(
        self,
        name: ModelName,
        manifest: Manifest,
        store: BlobStore,
        *,
        insecure: bool = False,
        on_progress: Callable[[PullProgress], None] = lambda _: None,
    ) -> PushReport:
        """Give the registry a model whose blobs are in the store, under this name.

        on_progress: called in the event loop with every state; must not block.
        Raises BadName, BlobNotFound, OriginUnavailable, OriginRefused.
        """

"""RegistryOrigin: the registry protocol that Ollama speaks, over HTTP.

It serves Ollama's own registry, hf.co (`hf.co/<user>/<repo>:<quant>`) and any OCI registry, because
all of them answer `GET /v2/<repository>/manifests/<tag>` and `GET /v2/<repository>/blobs/<digest>`.
Blobs are asked for by ranges, so that an origin is one more source beside the peers.

What comes back is not trusted. Every answer must be exactly the range that was asked for, not
compressed, and arrive at a rate; redirects are followed within bounds and never from https to http;
proof of who we are goes to the registry's own scheme, host and port only and, once a redirect has
left it, no more. What a failed or broken-off answer leaves missing is asked for again, a bounded
number of times. The caller verifies the bytes.
"""

import os
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

import trio

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.manifest import Manifest, parse_manifest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.errors import MalformedMessage
from ollamamax_p2p.transfer.outbound_addresses import Resolver, WebUrl, system_resolver
from ollamamax_p2p.transfer.progress import PullProgress, PushReport
from ollamamax_p2p.transfer.registry_auth import SigningKey
from ollamamax_p2p.transfer.registry_push import RegistryPush
from ollamamax_p2p.transfer.registry_requests import (
    Body,
    LateClient,
    Place,
    Requests,
    Retries,
    TryAgain,
    place_of,
)
from ollamamax_p2p.transfer.settings import OriginSettings


@asynccontextmanager
async def open_registry_origin(
    settings: OriginSettings,
    *,
    node_key: SigningKey | None,
    rng: random.Random,
    user_agent: str,
    resolve: Resolver = system_resolver,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator["RegistryOrigin"]:
    """An origin for as long as the block is open; connections end with it.

    node_key: signs token requests as Ollama does; None to stay anonymous. rng: for the jitter of
    waits. environ: where proxies are read from, the process's own if None.
    """
    async with AsyncExitStack() as stack:
        http = LateClient(stack, settings, resolve, os.environ if environ is None else environ)
        yield RegistryOrigin(settings, Requests(settings, http, node_key, user_agent), rng)


class RegistryOrigin:
    """An `Origin` over HTTP. Made by `open_registry_origin`."""

    def __init__(self, settings: OriginSettings, requests: "Requests", rng: random.Random) -> None:
        self._settings = settings
        self._requests = requests
        self._rng = rng
        # Weak, so that a registry that is not used any more takes no room.
        self._slots: WeakValueDictionary[WebUrl, trio.Semaphore] = WeakValueDictionary()

    async def manifest(self, name: ModelName, *, insecure: bool = False) -> Manifest:
        """See Origin."""
        place = place_of(name, self._settings, insecure=insecure)
        retries = Retries(self._settings, self._rng)
        while True:
            try:
                raw = await self._requests.manifest(place)
                break
            except TryAgain as trouble:
                await trio.sleep(retries.wait_s(trouble))
        try:
            return parse_manifest(raw)
        except MalformedMessage as error:
            raise MalformedMessage("", f"{place.registry}: {error.problem}") from None

    @asynccontextmanager
    async def fetch_range(
        self, name: ModelName, digest: Digest, start: int, end: int, *, insecure: bool = False
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """See Origin. At most `OriginSettings.connections` at once per registry; the rest wait."""
        if not 0 <= start <= end:
            raise ValueError(f"not a range: {start} to {end}")
        place = place_of(name, self._settings, insecure=insecure)
        slots = self._slots.setdefault(
            place.registry, trio.Semaphore(max(1, self._settings.connections))
        )
        async with slots:
            parts = _RangeParts(
                self._requests, place, digest, start, end, Retries(self._settings, self._rng)
            )
            try:
                yield parts
            finally:
                await parts.aclose()

    async def push(
        self,
        name: ModelName,
        manifest: Manifest,
        store: BlobStore,
        *,
        insecure: bool = False,
        on_progress: Callable[[PullProgress], None] = lambda _: None,
    ) -> PushReport:
        """See Origin."""
        push = RegistryPush(self._requests, self._settings, self._rng, store, on_progress)
        return await push.run(name, manifest, insecure=insecure)


class _RangeParts:
    """A blob's bytes [start, end), asked for again from where an answer broke off."""

    def __init__(
        self,
        requests: "Requests",
        place: Place,
        digest: Digest,
        start: int,
        end: int,
        retries: Retries,
    ) -> None:
        self._requests, self._place, self._digest = requests, place, digest
        self._at, self._end = start, end
        self._retries = retries
        self._body: Body | None = None

    def __aiter__(self) -> "_RangeParts":
        return self

    async def __anext__(self) -> bytes:
        while self._at < self._end:
            try:
                return await self._next()
            except TryAgain as trouble:
                await self.aclose()
                await trio.sleep(self._retries.wait_s(trouble))
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()

    async def _next(self) -> bytes:
        if self._body is None:
            self._body = await self._requests.blob(self._place, self._digest, self._at, self._end)
        part = await self._body.part()
        if not part:
            raise TryAgain(self._body.url, "the answer ended too early")
        # An answer without a length may go on for ever; whoever sends it, we stop here.
        part = part[: self._end - self._at]
        self._at += len(part)
        if self._at == self._end:
            await self._body.finish()
        return part

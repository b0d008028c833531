"""A RamNode whose models are real ones, in a store in memory; its registry is in memory too."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ollamamax_p2p.api import ApiSettings, LocalClient, ModelInfo, open_api
from ollamamax_p2p.content import (
    BlobStore,
    ModelListing,
    RamStore,
    create_from_request,
    describe_for_show,
)
from ollamamax_p2p.content.core.digest import parse_digest
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import ModelNotFound
from ollamamax_p2p.transfer import PullProgress
from tests.api.ram_node import PEER, WRITTEN, RamNode
from tests.api.serving import Served
from tests.transfer.ram_origin import RamOrigin


@dataclass
class StoreNode(RamNode):
    store: BlobStore = field(default_factory=lambda: RamStore(now=lambda: WRITTEN))
    origin: RamOrigin = field(default_factory=RamOrigin)

    async def listed_models(self):
        return await ModelListing(self.store).models()

    async def models(self):
        return tuple(
            ModelInfo(
                name=str(each.name),
                digest=each.manifest_digest,
                size=each.size,
                modified_at=each.modified_at,
            )
            for each in await self.store.models()
        )

    async def show_model(self, name, *, verbose=False, system="", options=None):
        parsed = parse_model_name(name)
        return await describe_for_show(
            self.store, parsed, verbose=verbose, system=system, options=options
        )

    async def copy(self, source, destination):
        manifest = await self.store.manifest(parse_model_name(source))
        await self.store.put_manifest(parse_model_name(destination), manifest)
        return await self._made(destination)

    async def remove(self, name):
        await self.store.remove_manifest(parse_model_name(name))

    async def has_blob(self, digest):
        return await self.store.has(parse_digest(digest))

    async def put_blob(self, digest, parts, *, size=None):
        await self.store.receive(parse_digest(digest), parts, size=size)

    async def create_from_request(self, name, request, *, on_progress=None):
        def tell(status):
            if on_progress:
                on_progress(PullProgress(status=status))

        await create_from_request(self.store, parse_model_name(name), request, tell=tell)
        return await self._made(name)

    async def push(self, name, *, insecure=False, on_progress=None):
        tell = on_progress or (lambda _: None)
        tell(PullProgress(status="retrieving manifest"))
        parsed = parse_model_name(name)
        manifest = await self.store.manifest(parsed)
        return await self.origin.push(parsed, manifest, self.store, on_progress=tell)

    async def _made(self, name):
        wanted = str(parse_model_name(name))
        return next(each for each in await self.models() if each.name == wanted)


@asynccontextmanager
async def serving(
    node: RamNode, folder: Path, *, inference=None, **settings
) -> AsyncIterator[Served]:
    chosen = ApiSettings(**{"listen": "127.0.0.1:0"} | settings)
    with trio.fail_after(60):
        async with open_api(
            node, chosen, data_dir=folder, peer_id=PEER, inference=inference
        ) as server:
            yield Served(node, server, LocalClient.find(folder), folder)


async def not_here(name, tell):
    """A pull that finds nothing."""
    tell(PullProgress(status="pulling manifest"))
    await trio.lowlevel.checkpoint()
    raise ModelNotFound(name)

"""SharedCatalogue: what names mean, how blobs are cut and who holds them, as is agreed.

What this node has to tell the others, but nobody waits for (chunk maps, holdings), is remembered
here and proposed from the background: bounded, many at once, again when there was no quorum.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from ollamamax_p2p.cluster.core.commands import (
    ANY,
    HOLDS_BATCH_MAX,
    AnyCommand,
    ForgetChunkMap,
    Holds,
    Refused,
    SetChunkMap,
    SetTag,
)
from ollamamax_p2p.cluster.membership import Cluster
from ollamamax_p2p.content.core.digest import Digest, parse_digest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.discovery import ProviderDirectory
from ollamamax_p2p.errors import BadInput, NetworkTrouble, OmxError
from ollamamax_p2p.host import Connections
from ollamamax_p2p.identity import PeerId

READ_S = 2.0
"""To ask whether our state is up to date; after that what is here must do."""

TELL_INTERVAL_S = 2.0
"""Between two looks at what is to be told: a pull of three blobs is then one command, not six."""

NEWS_MAX = 4_096
"""Chunk maps that wait to be told. More are forgotten: the next fetch of that blob tells it."""

FOUND_ENOUGH = 4
"""Holders that are enough to begin with; the catalogue's hints are tried if fewer are found."""

FOUND_MAX = 32
"""As many as a ProviderDirectory gives."""

HINTS_TRIED = 8
REACH_S = 3.0
"""How many of the catalogue's holders are dialled at once, and for how long: they are hints."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_shared_catalogue(cluster: Cluster) -> AsyncIterator["SharedCatalogue"]:
    """Tell the cluster what this node has to tell for as long as the block is open."""
    catalogue = SharedCatalogue(cluster)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalogue._tell_all)
        yield catalogue
        nursery.cancel_scope.cancel()


class SharedCatalogue:
    """A `transfer.AgreedNames` and `AgreedMaps` over the agreed state. Made by
    `open_shared_catalogue`.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._news: dict[Digest, SetChunkMap | ForgetChunkMap] = {}
        self._held: set[Digest] = set()
        self._held_changed = False
        self._has_news = trio.Event()

    # -- names

    async def meaning(self, name: ModelName) -> Digest | None:
        """See AgreedNames. Linearizable while the cluster agrees, else as of the last contact."""
        try:
            with trio.move_on_after(READ_S):
                await self._cluster.read()
        except (NetworkTrouble, BadInput) as error:  # BadInput: we are a member no more
            _log.info("reading the catalogue as it is here: %s", error)
        return self._cluster.state.tag(name)

    async def agree(self, name: ModelName, manifest: Digest, *, replaces: Digest | None) -> Digest:
        """See AgreedNames."""
        result = await self._cluster.ask(
            SetTag(name=name.full(), manifest=str(manifest), expected=replaces and str(replaces))
        )
        if not isinstance(result, Refused):
            return manifest
        if result.reason == "tag_differs" and result.actual:
            return parse_digest(result.actual)
        if result.reason == "tag_differs":  # it was removed meanwhile
            return await self.agree(name, manifest, replaces=None)
        raise result.error()

    async def define(self, name: ModelName, manifest: Digest) -> None:
        """Have it agreed whatever was agreed before: its owner made a new version. Raises
        NetworkTrouble.
        """
        await self._cluster.change(SetTag(name=name.full(), manifest=str(manifest), expected=ANY))

    # -- chunk maps

    def chunk_map_of(self, blob: Digest) -> Digest | None:
        """See AgreedMaps."""
        found = self._cluster.state.chunk_map_of(blob)
        return found[0] if found else None

    def tell_chunk_map(self, blob: Digest, chunk_map: Digest, size: int) -> None:
        """See AgreedMaps."""
        if self._cluster.state.chunk_map_of(blob) is None:
            self._tell(blob, SetChunkMap(blob=blob, chunk_map=chunk_map, size=size))

    def tell_wrong_chunk_map(self, blob: Digest, chunk_map: Digest) -> None:
        """See AgreedMaps."""
        self._tell(blob, ForgetChunkMap(blob=blob, chunk_map=chunk_map))

    def _tell(self, blob: Digest, news: SetChunkMap | ForgetChunkMap) -> None:
        if len(self._news) < NEWS_MAX:
            self._news[blob] = news
            self._has_news.set()

    # -- holdings

    def holds(self, digests: Sequence[Digest]) -> None:
        """This node holds these; told to the others before long."""
        self._change_held(self._held | set(digests))

    def holds_no_more(self, digests: Sequence[Digest]) -> None:
        """This node holds these no longer."""
        self._change_held(self._held - set(digests))

    def _change_held(self, held: set[Digest]) -> None:
        if held != self._held:
            self._held = held
            self._held_changed = True
            self._has_news.set()

    def holders(self, digest: Digest) -> list[PeerId]:
        """Members that said they hold it, this node left out; hints."""
        return [
            peer for peer in self._cluster.state.holders(digest) if peer != self._cluster.peer_id
        ]

    # -- telling

    async def _tell_all(self) -> None:
        while True:
            await self._has_news.wait()
            self._has_news = trio.Event()
            await trio.sleep(TELL_INTERVAL_S)
            try:
                await self._tell_maps()
                if self._held_changed:
                    await self._tell_holdings()
            except NetworkTrouble as error:
                _log.info("telling the cluster what is here: %s; trying again", error)
                self._has_news.set()

    async def _tell_maps(self) -> None:
        while self._news:
            blob, command = next(iter(self._news.items()))
            await self._propose(command)
            if self._news.get(blob) is command:
                del self._news[blob]

    async def _tell_holdings(self) -> None:
        self._held_changed = False
        try:
            own = self._cluster.peer_id
            told = set(await trio.to_thread.run_sync(self._cluster.state.holdings, own))
            added, dropped = sorted(self._held - told), sorted(told - self._held)
            for at in range(0, max(len(added), len(dropped)), HOLDS_BATCH_MAX):
                page = slice(at, at + HOLDS_BATCH_MAX)
                await self._propose(
                    Holds(peer=own, added=tuple(added[page]), dropped=tuple(dropped[page]))
                )
        except NetworkTrouble:
            self._held_changed = True
            raise

    async def _propose(self, command: AnyCommand) -> None:
        """A refusal is final: another map came first, or there is no room for more."""
        try:
            await self._cluster.change(command)
        except BadInput as error:
            _log.info("%s", error)


class AgreedProviders:
    """A `discovery.ProviderDirectory` that also tells the catalogue, and asks it when others know
    too few: its holders are known on every node, without asking anybody.
    """

    def __init__(
        self, inner: ProviderDirectory, catalogue: SharedCatalogue, connections: Connections
    ) -> None:
        self._inner = inner
        self._catalogue = catalogue
        self._connections = connections

    async def announce(self, digests: Sequence[Digest]) -> None:
        """See ProviderDirectory."""
        self._catalogue.holds(digests)
        await self._inner.announce(digests)

    async def withdraw(self, digests: Sequence[Digest]) -> None:
        """See ProviderDirectory."""
        self._catalogue.holds_no_more(digests)
        await self._inner.withdraw(digests)

    async def find(self, digest: Digest) -> Sequence[PeerId]:
        """See ProviderDirectory."""
        found = list(await self._inner.find(digest))
        if len(found) >= FOUND_ENOUGH:
            return found
        hints = [peer for peer in self._catalogue.holders(digest) if peer not in found]
        reached: list[PeerId] = []
        with trio.move_on_after(REACH_S):
            async with trio.open_nursery() as nursery:
                for peer in hints[:HINTS_TRIED]:
                    nursery.start_soon(self._reach, peer, reached)
        return [*found, *reached][:FOUND_MAX]

    async def _reach(self, peer: PeerId, reached: list[PeerId]) -> None:
        try:
            await self._connections.reach_peer(peer)
        except OmxError as error:
            _log.info("a holder by the catalogue: %s", error)
        else:
            reached.append(peer)

"""SharedCatalogue: what names mean, as the cluster has agreed."""

import logging

import trio

from ollamamax_p2p.cluster.core.commands import ANY, Refused, SetTag
from ollamamax_p2p.cluster.membership import Cluster
from ollamamax_p2p.content.core.digest import Digest, parse_digest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.errors import NetworkTrouble

READ_S = 2.0
"""To ask whether our state is up to date; after that what is here must do."""

_log = logging.getLogger(__name__)


class SharedCatalogue:
    """A `transfer.AgreedNames` over the agreed state."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def meaning(self, name: ModelName) -> Digest | None:
        """See AgreedNames. Linearizable while the cluster agrees, else as of the last contact."""
        try:
            with trio.move_on_after(READ_S):
                await self._cluster.read()
        except NetworkTrouble as error:
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

    async def set(self, name: ModelName, manifest: Digest) -> None:
        """Have it agreed whatever was agreed before: its owner made a new version. Raises
        NetworkTrouble.
        """
        await self._cluster.change(SetTag(name=name.full(), manifest=str(manifest), expected=ANY))

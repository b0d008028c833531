"""What the models of a store are, all of them, as `/api/tags` lists them.

What a manifest stands for never changes, so each is read once and remembered by its digest.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from ollamamax_p2p.content.blob_store import BlobStore, StoredModel
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.model_description import read_model
from ollamamax_p2p.content.model_show import ShownDetails, details_of
from ollamamax_p2p.errors import OmxError

REMEMBERED_MAX = 4_096
"""Some 500 bytes each."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """One model of a list."""

    name: str
    """As Ollama displays it."""
    digest: str
    """sha256:<hex> of its manifest."""
    size: int
    modified_at: datetime
    details: ShownDetails
    capabilities: tuple[str, ...]


class ModelListing:
    """The models of one store."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._known: OrderedDict[Digest, tuple[ShownDetails, tuple[str, ...]]] = OrderedDict()

    async def models(self) -> tuple[ListedModel, ...]:
        """Newest first. A model that cannot be read is left out, as by Ollama."""
        found = []
        for stored in await self._store.models():
            try:
                details, capabilities = await self._read(stored)
            except OmxError as error:
                _log.warning("leaving %s out of the list: %s", stored.name, error)
                continue
            found.append(
                ListedModel(
                    name=str(stored.name),
                    digest=stored.manifest_digest,
                    size=stored.size,
                    modified_at=stored.modified_at,
                    details=details,
                    capabilities=capabilities,
                )
            )
        return tuple(found)

    async def _read(self, stored: StoredModel) -> tuple[ShownDetails, tuple[str, ...]]:
        known = self._known.get(stored.manifest_digest)
        if known is None:
            content = await read_model(self._store, stored.name, stored)
            known = details_of(content), content.capabilities
            self._known[content.stored.manifest_digest] = known
            while len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return known

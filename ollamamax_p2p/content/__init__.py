"""Blobs, manifests and models on this node; knows no network.

Start at `blob_store.BlobStore`, the contract; `open_disk_store` and `RamStore` keep it.
`create_model`, `create_from_request` and `import_model` make models, `describe_model` and
`describe_for_show` show one. Values and decisions are in `core/`, the front door for them: names,
digests, manifests, chunk maps, file headers. Fetching blobs is left to `transfer`.
"""

from ollamamax_p2p.content import durable_files
from ollamamax_p2p.content.blob_store import BlobReader, BlobStore, PartialBlob, StoredModel
from ollamamax_p2p.content.creation_request import (
    CreationRequest,
    check_creation_request,
    create_from_request,
)
from ollamamax_p2p.content.disk_store import DiskStore, open_disk_store
from ollamamax_p2p.content.model_creation import ResolveModel, create_model, import_model
from ollamamax_p2p.content.model_description import (
    ModelContent,
    ModelDescription,
    describe_model,
    read_model,
)
from ollamamax_p2p.content.model_listing import ListedModel, ModelListing
from ollamamax_p2p.content.model_show import ShowAnswer, ShownDetails, describe_for_show
from ollamamax_p2p.content.ram_store import RamStore
from ollamamax_p2p.content.settings import ContentSettings

__all__ = [
    "BlobReader",
    "BlobStore",
    "ContentSettings",
    "CreationRequest",
    "DiskStore",
    "ListedModel",
    "ModelContent",
    "ModelDescription",
    "ModelListing",
    "PartialBlob",
    "RamStore",
    "ResolveModel",
    "ShowAnswer",
    "ShownDetails",
    "StoredModel",
    "check_creation_request",
    "create_from_request",
    "create_model",
    "describe_for_show",
    "describe_model",
    "durable_files",
    "import_model",
    "open_disk_store",
    "read_model",
]

"""Ollama manifests: what a model is made of, by digest."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ollamamax_p2p.content.core.digest import Digest, digest_of, parse_digest
from ollamamax_p2p.content.core.go_json import Json, go_json
from ollamamax_p2p.errors import BadDigest, MalformedMessage

MANIFEST_BYTES_MAX = 4 * 1024 * 1024
"""A model of a thousand tensor layers has 200 KB."""

LAYER_COUNT_MAX = 4_096
"""Models stored tensor by tensor have some hundreds."""

BLOB_BYTES_MAX = 2**50
"""What the transfer protocol can say."""

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"

_IMAGE = "application/vnd.ollama.image."
MODEL_TYPE = _IMAGE + "model"
ADAPTER_TYPE = _IMAGE + "adapter"
PROJECTOR_TYPE = _IMAGE + "projector"
TEMPLATE_TYPE = _IMAGE + "template"
PROMPT_TYPE = _IMAGE + "prompt"
"""What templates were called before; read, not written."""
SYSTEM_TYPE = _IMAGE + "system"
PARAMS_TYPE = _IMAGE + "params"
MESSAGES_TYPE = _IMAGE + "messages"
LICENSE_TYPE = _IMAGE + "license"
TENSOR_TYPE = _IMAGE + "tensor"
JSON_TYPE = _IMAGE + "json"
DRAFT_TYPE = _IMAGE + "draft"
EMBED_TYPE = _IMAGE + "embed"
"""Deprecated by Ollama; read, not written."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a model and what it is for."""

    media_type: str
    digest: Digest
    size: int
    source: str = ""
    """`from`: the model that Ollama took the layer over from."""
    name: str = ""
    """Of a tensor, in models that are stored tensor by tensor."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest and the exact bytes it was read from; those bytes are what is stored and hashed.

    Made by `parse_manifest` and `build_manifest` only.
    """

    raw: bytes
    config: Layer
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> Digest:
        """The sha256 of the bytes; what `list` shows as ID."""
        return digest_of(self.raw)

    def blobs(self) -> tuple[tuple[Digest, int], ...]:
        """Every distinct blob and its size: the layers in order, the config last. That is the
        order in which Ollama pulls.
        """
        return tuple({part.digest: part.size for part in (*self.layers, self.config)}.items())

    @property
    def size(self) -> int:
        """Bytes of all its distinct blobs."""
        return sum(size for _, size in self.blobs())

    def layers_of(self, media_type: str) -> tuple[Layer, ...]:
        """The layers of one type, in order."""
        return tuple(layer for layer in self.layers if layer.media_type == media_type)


_Text = Annotated[str, msgspec.Meta(max_length=1_024)]


class _RawLayer(msgspec.Struct):
    digest: _Text
    size: Annotated[int, msgspec.Meta(ge=0, lt=BLOB_BYTES_MAX)]
    mediaType: _Text = ""
    from_: _Text = msgspec.field(name="from", default="")
    name: _Text = ""


class _RawManifest(msgspec.Struct):
    schemaVersion: int
    config: _RawLayer
    layers: Annotated[list[_RawLayer], msgspec.Meta(max_length=LAYER_COUNT_MAX)] | None


_decoder = msgspec.json.Decoder(_RawManifest)


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest that came from a file, a peer or a registry.

    Unknown fields are kept in the bytes and otherwise ignored. Raises MalformedMessage: too long,
    not a manifest of schema 2, a wrong digest or size, one blob with two sizes.
    """
    if len(raw) > MANIFEST_BYTES_MAX:
        raise MalformedMessage("", f"a manifest may have {MANIFEST_BYTES_MAX} bytes at most")
    try:
        read = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage("", f"not a manifest: {error}") from error
    if read.schemaVersion != 2:
        raise MalformedMessage("", f"a manifest of schema {read.schemaVersion}; only 2 is known")
    manifest = Manifest(raw, _layer(read.config), tuple(map(_layer, read.layers or ())))
    sizes = dict(manifest.blobs())
    for part in (manifest.config, *manifest.layers):
        if sizes[part.digest] != part.size:
            raise MalformedMessage("", f"a manifest gives {part.digest} two sizes")
    return manifest


def _layer(read: _RawLayer) -> Layer:
    try:
        digest = parse_digest(read.digest)
    except BadDigest as error:
        raise MalformedMessage("", f"a manifest has an {error}") from error
    return Layer(read.mediaType, digest, read.size, read.from_, read.name)


def build_manifest(config: Layer, layers: Iterable[Layer]) -> Manifest:
    """Write a manifest as Ollama writes it, byte for byte (a newline at the end included)."""
    layers = tuple(layers)
    document: dict[str, Json] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _fields(config),
        "layers": [_fields(layer) for layer in layers],
    }
    return Manifest(go_json(document) + b"\n", config, layers)


def _fields(layer: Layer) -> dict[str, str | int]:
    fields: dict[str, str | int] = {
        "mediaType": layer.media_type,
        "digest": layer.digest,
        "size": layer.size,
    }
    optional = {"from": layer.source, "name": layer.name}
    return fields | {key: value for key, value in optional.items() if value}

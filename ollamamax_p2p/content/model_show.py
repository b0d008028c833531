"""What `/api/show` answers of a model: one value that can be sent from the node that holds it.

Field by field as Ollama's ShowResponse, in its order; what Ollama leaves out when it is empty is
left out by the encoder too. GGUF metadata are given as they are; arrays, a vocabulary of 260,000
words among them, only to who asks for them.
"""

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta

from ollamamax_p2p.content.blob_store import BlobStore
from ollamamax_p2p.content.core.gguf import GgufHeader, Skipped, Value, read_gguf_header
from ollamamax_p2p.content.core.go_json import Json
from ollamamax_p2p.content.core.manifest import MODEL_TYPE, PROJECTOR_TYPE, Layer
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.content.core.modelfile import as_float32, render_parameters
from ollamamax_p2p.content.model_description import (
    DEFAULT_TEMPLATE,
    ModelContent,
    length_of,
    modelfile_of,
    read_model,
)
from ollamamax_p2p.errors import BadModelFile

SHOW_BYTES_MAX = 96 * 1024 * 1024
"""Of an encoded answer: the longest vocabulary with its merges, and the tensors."""

VERBOSE_ARRAY_MAX = 2**21
"""Merges of a vocabulary of 260,000 are some 500,000."""
VERBOSE_KEPT_BYTES_MAX = 48 * 1024 * 1024

_NOT_SHOWN = ("general.name", "tokenizer.chat_template")

Text = Annotated[str, Meta(max_length=16 * 1024 * 1024)]


class ShownDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What kind of model it is."""

    parent_model: str
    format: str
    family: str
    families: tuple[str, ...] | None
    parameter_size: str
    quantization_level: str
    context_length: int = 0
    embedding_length: int = 0


class ShownMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the conversation that it begins with."""

    role: str
    content: str


class ShownTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the weights."""

    name: str
    type: str
    shape: tuple[int, ...]


class ShowAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a model says about itself."""

    license: Text = ""
    modelfile: Text = ""
    parameters: Text = ""
    template: Text = ""
    system: Text = ""
    renderer: str = ""
    parser: str = ""
    details: ShownDetails
    messages: tuple[ShownMessage, ...] = ()
    remote_model: str = ""
    remote_host: str = ""
    model_info: dict[str, Any]
    projector_info: dict[str, Any] = {}
    tensors: Annotated[tuple[ShownTensor, ...], Meta(max_length=65_536)] = ()
    capabilities: tuple[str, ...] = ()
    modified_at: str
    """RFC 3339."""
    requires: str = ""


async def describe_for_show(
    store: BlobStore,
    name: ModelName,
    *,
    verbose: bool = False,
    system: str = "",
    options: Mapping[str, Json] | None = None,
) -> ShowAnswer:
    """What a model in this store says about itself.

    verbose: with the arrays in its metadata, and the tensors' shapes. system, options: shown in the
    place of the model's own.
    Raises ModelNotFound, BlobNotFound, StoreDamaged.
    """
    content = await read_model(store, name)
    content = replace(content, system=system or content.system)
    overlaid = replace(content, parameters={**content.parameters, **(options or {})})
    config = content.config
    header = await _gguf_header(store, content, MODEL_TYPE, verbose)
    projector = await _gguf_header(store, content, PROJECTOR_TYPE, verbose)
    # In a thread: the scores of a vocabulary take a second to write out.
    model_info = await trio.to_thread.run_sync(_info, header, verbose)
    projector_info = await trio.to_thread.run_sync(_info, projector, verbose)
    return ShowAnswer(
        license="\n".join(content.licenses),
        modelfile=modelfile_of(store, overlaid, "ollama"),
        parameters=render_parameters(content.parameters),
        template=content.template or DEFAULT_TEMPLATE,
        system=content.system,
        renderer=_text(config, "renderer"),
        parser=_text(config, "parser"),
        details=details_of(content),
        messages=tuple(ShownMessage(role=m.role, content=m.content) for m in content.messages),
        remote_model=_text(config, "remote_model"),
        remote_host=_text(config, "remote_host"),
        model_info=model_info,
        projector_info=projector_info,
        tensors=_tensors(header) if header else (),
        capabilities=content.capabilities,
        modified_at=rfc3339(content),
        requires=_text(config, "requires"),
    )


def details_of(content: ModelContent) -> ShownDetails:
    """What `show` and `tags` both tell."""
    config = content.config
    weights = content.manifest.layers_of(MODEL_TYPE)
    families = config.get("model_families")
    named = None
    if isinstance(families, list):
        named = tuple(each for each in families if isinstance(each, str))
    return ShownDetails(
        parent_model=next((layer.source for layer in weights if layer.source), ""),
        format=_text(config, "model_format"),
        family=_text(config, "model_family"),
        families=named,
        parameter_size=_text(config, "model_type"),
        quantization_level=_text(config, "file_type"),
        context_length=length_of(content, "context_length"),
        embedding_length=length_of(content, "embedding_length"),
    )


def rfc3339(content: ModelContent) -> str:
    """When it was named, as Go writes a time: no zeros at the end of a fraction."""
    text = content.stored.modified_at.isoformat().replace("+00:00", "Z")
    whole, point, fraction = text.removesuffix("Z").partition(".")
    return f"{whole}{point}{fraction.rstrip('0')}Z" if point else text


async def _gguf_header(
    store: BlobStore, content: ModelContent, media_type: str, verbose: bool
) -> GgufHeader | None:
    """The first such layer's header; None if there is none, or none that can be read."""
    layers = content.manifest.layers_of(media_type)
    if not layers:
        return None
    if media_type == MODEL_TYPE and not verbose:  # read already
        return content.header if isinstance(content.header, GgufHeader) else None
    try:
        return await _read_header(store, layers[0], verbose)
    except BadModelFile:
        return None  # an engine may still read what we cannot


async def _read_header(store: BlobStore, layer: Layer, verbose: bool) -> GgufHeader:
    more = (VERBOSE_ARRAY_MAX, VERBOSE_KEPT_BYTES_MAX) if verbose else (0, 1024 * 1024)
    async with await store.open(layer.digest) as reader:

        def read_at(offset: int, length: int) -> bytes:
            return trio.from_thread.run(reader.read_at, offset, length)

        def read() -> GgufHeader:
            return read_gguf_header(
                read_at, reader.size, layer.digest, array_kept_max=more[0], kept_bytes_max=more[1]
            )

        return await trio.to_thread.run_sync(read)


def _info(header: GgufHeader | None, verbose: bool) -> dict[str, Any]:
    if header is None:
        return {}
    shown: dict[str, Any] = {
        key: _shown(value, verbose)
        for key, value in header.metadata.items()
        if key not in _NOT_SHOWN
    }
    shown["general.parameter_count"] = header.parameter_count
    return dict(sorted(shown.items()))  # a map, which Go writes by its sorted keys


def _shown(value: Value | Skipped, verbose: bool) -> Any:
    if isinstance(value, Skipped) or (isinstance(value, tuple) and not verbose):
        return None
    if isinstance(value, tuple):
        return [_shown(item, verbose) for item in value]
    return _float(value) if isinstance(value, float) else value


def _float(value: float) -> float | None:
    """GGUF's floats have 32 bits nearly always; Go writes the shortest decimal of those."""
    if value != value or value in (float("inf"), float("-inf")):
        return None  # JSON has no such number
    try:
        is_single = struct.unpack("<f", struct.pack("<f", value))[0] == value
    except OverflowError:
        return value
    return as_float32(value) if is_single else value


def _tensors(header: GgufHeader) -> tuple[ShownTensor, ...]:
    return tuple(
        ShownTensor(name=tensor.name, type=tensor.type_name, shape=tensor.dims)
        for tensor in header.tensors
    )


def _text(config: Mapping[str, Json], key: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) else ""

"""What a model says about itself: what `show` shows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypedDict

import msgspec

from ollamamax_p2p.content.blob_store import BlobStore, StoredModel
from ollamamax_p2p.content.core.digest import file_name
from ollamamax_p2p.content.core.gguf import GgufHeader
from ollamamax_p2p.content.core.go_json import Json
from ollamamax_p2p.content.core.manifest import (
    ADAPTER_TYPE,
    LICENSE_TYPE,
    MESSAGES_TYPE,
    MODEL_TYPE,
    PARAMS_TYPE,
    PROJECTOR_TYPE,
    PROMPT_TYPE,
    SYSTEM_TYPE,
    TEMPLATE_TYPE,
    Layer,
    Manifest,
)
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.content.core.modelfile import Message, render_modelfile, render_parameters
from ollamamax_p2p.content.disk_store import DiskStore
from ollamamax_p2p.content.model_creation import (
    Header,
    read_blob_header,
    read_json,
    read_small,
)
from ollamamax_p2p.errors import BadModelFile, ModelNotFound, StoreDamaged

DEFAULT_TEMPLATE = "{{ .Prompt }}"
"""What Ollama uses, and shows, for a model that has no template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContent:
    """Everything small in a model, read."""

    stored: StoredModel
    manifest: Manifest
    config: Mapping[str, Json]
    parameters: Mapping[str, Json]
    messages: tuple[Message, ...]
    template: str
    system: str
    licenses: tuple[str, ...]
    header: Header | None
    """Of the model's weights; None if there are none or their header cannot be read."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """completion or embedding, then vision, tools, insert, thinking; as far as it can be told
        from the model's files.
        """
        return tuple(_capabilities(self))


class ModelDescription(TypedDict):
    """What people are shown of a model. Empty text or 0: the model does not say."""

    name: str
    digest: str
    size: int
    modified_at: datetime
    format: str
    architecture: str
    parameter_size: str
    quantization: str
    context_length: int
    embedding_length: int
    capabilities: tuple[str, ...]
    license: str
    modelfile: str
    parameters: str
    template: str
    system: str


async def describe_model(store: BlobStore, name: ModelName) -> ModelDescription:
    """What `show` shows. Raises ModelNotFound, BlobNotFound, StoreDamaged."""
    content = await read_model(store, name)
    config = content.config
    return {
        "name": str(content.stored.name),
        "digest": content.stored.manifest_digest,
        "size": content.stored.size,
        "modified_at": content.stored.modified_at,
        "format": _text(config.get("model_format")),
        "architecture": _text(config.get("model_family")),
        "parameter_size": _text(config.get("model_type")),
        "quantization": _text(config.get("file_type")),
        "context_length": length_of(content, "context_length"),
        "embedding_length": length_of(content, "embedding_length"),
        "capabilities": content.capabilities,
        "license": "\n".join(content.licenses),
        "modelfile": modelfile_of(store, content, "omx"),
        "parameters": render_parameters(content.parameters),
        "template": content.template,
        "system": content.system,
    }


async def read_model(
    store: BlobStore, name: ModelName, stored: StoredModel | None = None
) -> ModelContent:
    """Read all that is small in a model, and the header of its weights.

    stored: the model's entry in the store's list, if that is known already.
    Raises ModelNotFound, BlobNotFound, StoreDamaged.
    """
    manifest = await store.manifest(name)
    texts = {
        kind: [
            (await read_small(store, layer)).decode(errors="replace")
            for layer in manifest.layers_of(kind)
        ]
        for kind in (TEMPLATE_TYPE, PROMPT_TYPE, SYSTEM_TYPE, LICENSE_TYPE)
    }
    parameters: dict[str, Json] = {}
    for layer in manifest.layers_of(PARAMS_TYPE):
        parameters |= await read_json(store, layer)
    return ModelContent(
        stored=stored or await _stored(store, name),
        manifest=manifest,
        config=await read_json(store, manifest.config),
        parameters=parameters,
        messages=await _messages(store, manifest.layers_of(MESSAGES_TYPE)),
        template=_last(texts[TEMPLATE_TYPE] or texts[PROMPT_TYPE]),
        system=_last(texts[SYSTEM_TYPE]),
        licenses=tuple(texts[LICENSE_TYPE]),
        header=await _header(store, manifest),
    )


async def _stored(store: BlobStore, name: ModelName) -> StoredModel:
    named = [model for model in await store.models() if model.name.matches(name)]
    if not named:
        raise ModelNotFound(str(name))
    return next((model for model in named if model.name == name), named[0])


async def _messages(store: BlobStore, layers: Sequence[Layer]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for layer in layers:
        try:
            messages += msgspec.json.decode(await read_small(store, layer), type=list[Message])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StoreDamaged(layer.digest, f"these are no messages: {error}") from error
    return tuple(messages)


async def _header(store: BlobStore, manifest: Manifest) -> Header | None:
    for layer in manifest.layers_of(MODEL_TYPE)[:1]:
        async with await store.open(layer.digest) as reader:
            try:
                return await read_blob_header(reader, layer.digest)
            except BadModelFile:
                # An engine may still read what we cannot; show what there is besides.
                return None
    return None


def _capabilities(content: ModelContent) -> list[str]:
    header, template = content.header, content.template
    told = content.config.get("capabilities")
    found = [_text(name) for name in told] if isinstance(told, Sequence) else []
    if isinstance(header, GgufHeader):
        embeds = header.of_architecture("pooling_type") is not None
        found.append("embedding" if embeds else "completion")
        sees = header.of_architecture("vision.block_count") is not None
        found += ["vision"] if sees else []
        if not template:
            built_in = header.metadata.get("tokenizer.chat_template")
            template = _built_in_variables(built_in) if isinstance(built_in, str) else ""
    if content.manifest.layers_of(PROJECTOR_TYPE):
        found.append("vision")
    for capability, variable in (("tools", "Tools"), ("insert", "Suffix"), ("thinking", "Think")):
        if re.search(rf"\.{variable}(ing)?\b", template):
            found.append(capability)
    return list(dict.fromkeys(filter(None, found)))


def _built_in_variables(jinja: str) -> str:
    """The Jinja template inside a GGUF file, as far as it matters here, in Go's spelling."""
    thinks = "<think>" in jinja or "enable_thinking" in jinja
    return (" .Tools" if re.search(r"\btools\b", jinja) else "") + (" .Think" if thinks else "")


def modelfile_of(store: BlobStore, content: ModelContent, program: str) -> str:
    """A Modelfile that makes this model; program: whose `show` writes it."""

    def paths(media_type: str) -> list[str]:
        return [_path_of(store, layer) for layer in content.manifest.layers_of(media_type)]

    name = content.stored.name
    origins = [*paths(MODEL_TYPE), *paths(PROJECTOR_TYPE)]
    instructions = render_modelfile(
        origins=origins or [str(name)],
        adapters=paths(ADAPTER_TYPE),
        template=content.template or DEFAULT_TEMPLATE,
        system=content.system,
        parameters=content.parameters,
        licenses=content.licenses,
        messages=content.messages,
        renderer=_text(content.config.get("renderer")),
        parser=_text(content.config.get("parser")),
    )
    return (
        f'# Modelfile generated by "{program} show"\n'
        "# To build a new Modelfile based on this, replace FROM with:\n"
        f"# FROM {name}\n\n{instructions}"
    )


def _path_of(store: BlobStore, layer: Layer) -> str:
    if isinstance(store, DiskStore):
        return str(store.blob_path(layer.digest))
    return file_name(layer.digest)


def length_of(content: ModelContent, key: str) -> int:
    """A length that the GGUF metadata give, else the config."""
    if isinstance(content.header, GgufHeader):
        value = content.header.of_architecture(key)
        if isinstance(value, int):
            return value
    told = content.config.get(key)
    return told if isinstance(told, int) else 0


def _last(texts: Sequence[str]) -> str:
    return texts[-1] if texts else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""

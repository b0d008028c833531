"""Make models: from a file, or from a Modelfile as Ollama reads it.

What is written is what Ollama would write: the same layers in the same order, the same JSON in
params, messages and config. Two things Ollama does and this does not: it guesses a TEMPLATE for a
GGUF file that has none in its Modelfile, and it converts safetensors; a safetensors file becomes
the model's one layer as it is.
"""

import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from ollamamax_p2p.content.blob_store import BlobReader, BlobStore
from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.gguf import MAGIC, GgufHeader, read_gguf_header
from ollamamax_p2p.content.core.go_json import Json, go_json
from ollamamax_p2p.content.core.header_reading import ReadAt
from ollamamax_p2p.content.core.manifest import (
    ADAPTER_TYPE,
    CONFIG_TYPE,
    DRAFT_TYPE,
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
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.content.core.modelfile import (
    Message,
    Modelfile,
    Origin,
    human_number,
    parse_modelfile,
)
from ollamamax_p2p.content.core.safetensors import SafetensorsHeader, read_safetensors_header
from ollamamax_p2p.errors import (
    AccessRefused,
    BadModelFile,
    BadName,
    ModelNotFound,
    StoreDamaged,
    StoreReadOnly,
)

ResolveModel = Callable[[ModelName], Awaitable[Manifest]]
TellStatus = Callable[[str], None]
"""Called with each step, in Ollama's words."""

Header = GgufHeader | SafetensorsHeader

SMALL_BLOB_BYTES_MAX = 16 * 1024 * 1024
"""Configs, templates, licenses: read whole, so bounded."""

_CONFIG_FIELDS = (
    "model_format", "model_family", "model_families", "model_type", "file_type", "renderer",
    "parser", "requires", "remote_host", "remote_model", "capabilities", "context_length",
    "embedding_length", "base_name", "draft", "architecture", "os", "rootfs",
)  # fmt: skip
_ALWAYS = ("model_format", "model_family", "model_families", "model_type", "file_type")


async def import_model(store: BlobStore, path: Path, name: ModelName) -> Manifest:
    """Make a GGUF or safetensors file a model. The file is neither moved nor changed.

    Raises BadModelFile, AccessRefused, StoreFull, StoreReadOnly.
    """
    path = await trio.to_thread.run_sync(_absolute, path)
    nothing_else = Modelfile(origins=(Origin(str(path), 1),), parameters={})
    return await _create(store, name, nothing_else, path.parent, store.manifest, str(path))


async def create_model(
    store: BlobStore,
    name: ModelName,
    modelfile: str,
    base_dir: Path,
    resolve_model: ResolveModel | None = None,
) -> Manifest:
    """Make a model from a Modelfile's text.

    base_dir: relative paths in it count from here.
    resolve_model: gives the manifest that a FROM names, with all its blobs in the store, say by
    pulling it; without one, only what is in the store is found.
    Raises BadModelFile, ModelNotFound, AccessRefused, StoreFull, StoreReadOnly.
    """
    parsed = parse_modelfile(modelfile)
    return await _create(store, name, parsed, base_dir, resolve_model or store.manifest, None)


@dataclass(slots=True)
class Draft:
    """A model that is being put together."""

    layers: list[Layer] = field(default_factory=list)
    config: dict[str, Json] = field(default_factory=dict)
    written: set[Digest] = field(default_factory=set)
    """Blobs that were not here before."""

    def replace(self, layer: Layer, *more_types: str) -> None:
        """Take out the layers of its type (and of more types), and put it last."""
        gone = {layer.media_type, *more_types}
        self.layers = [kept for kept in self.layers if kept.media_type not in gone]
        self.layers.append(layer)


async def _create(
    store: BlobStore,
    name: ModelName,
    modelfile: Modelfile,
    base_dir: Path,
    resolve_model: ResolveModel,
    where: str | None,
) -> Manifest:
    if not store.writable:
        raise StoreReadOnly(store.place)
    draft = Draft()
    for origin in modelfile.origins:
        await _add_origin(store, draft, origin, base_dir, resolve_model, where)
    for media_type, origins in ((ADAPTER_TYPE, modelfile.adapters), (DRAFT_TYPE, modelfile.drafts)):
        for origin in origins:
            await _add_part(store, draft, origin, base_dir, media_type)
    return await finish_model(store, name, draft, modelfile)


async def finish_model(
    store: BlobStore,
    name: ModelName,
    draft: Draft,
    modelfile: Modelfile,
    tell: TellStatus = lambda _: None,
) -> Manifest:
    """Add what a Modelfile has besides files, and name it. What only the model that had the name
    before needed is removed.
    """
    await _add_texts(store, draft, modelfile)
    config = await _put_config(store, draft, modelfile)
    for layer in draft.layers:
        step = "creating new layer" if layer.digest in draft.written else "using existing layer"
        tell(f"{step} {layer.digest}")
    tell("writing manifest")
    manifest = build_manifest(config, draft.layers)
    replaced = await _existing(store, name)
    await store.put_manifest(name, manifest)
    await store.remove_unused([digest for digest, _ in replaced])
    return manifest


async def _existing(store: BlobStore, name: ModelName) -> tuple[tuple[Digest, int], ...]:
    try:
        return (await store.manifest(name)).blobs()
    except (ModelNotFound, StoreDamaged):
        return ()


# -- FROM, ADAPTER, DRAFT ----------------------------------------------------------------------


async def _add_origin(
    store: BlobStore,
    draft: Draft,
    origin: Origin,
    base_dir: Path,
    resolve_model: ResolveModel,
    where: str | None,
) -> None:
    place = where or f"Modelfile, line {origin.line}"
    path = await _existing_path(origin, base_dir, place)
    if path is not None:
        await _add_file(store, draft, path)
        return
    try:
        source = parse_model_name(origin.text)
    except BadName as error:
        raise BadModelFile(place, f"{origin.text[:200]!r} is no file and no model name") from error
    await inherit(store, draft, source, await resolve_model(source))


async def inherit(store: BlobStore, draft: Draft, source: ModelName, manifest: Manifest) -> None:
    """Take over the layers and the config of a model."""
    draft.layers += [
        Layer(layer.media_type, layer.digest, layer.size, str(source), layer.name)
        for layer in manifest.layers
    ]
    draft.config = await read_json(store, manifest.config) | draft.config


async def _existing_path(origin: Origin, base_dir: Path, place: str) -> Path | None:
    text = origin.text
    if not text or "\0" in text:
        raise BadModelFile(place, "it needs a file or a model's name")
    try:
        path = await trio.to_thread.run_sync(_absolute, Path(text), base_dir)
    except RuntimeError as error:  # what pathlib says of an unknown user's home
        raise BadModelFile(place, f"{text[:200]!r}: {error}") from error
    # A model's name never looks like these, so the reader meant a file.
    is_meant = text.startswith(("/", "./", "../", "~")) or text.endswith((".gguf", ".safetensors"))
    try:
        mode = (await trio.Path(path).stat()).st_mode
    except OSError as error:
        # A node may run as a user who cannot look into the folder that a model is named in.
        if not is_meant:
            return None
        if isinstance(error, PermissionError):
            raise AccessRefused(str(path), "read") from error
        raise BadModelFile(place, _absence(path, place, error)) from error
    if stat.S_ISDIR(mode):
        problem = "is a folder; name the GGUF or safetensors file in it"
        raise BadModelFile(place, _about(path, place, problem))
    return path


def _absence(path: Path, place: str, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return _about(path, place, f"cannot be read: {error.strerror}")
    return "there is no such file" if place == str(path) else f"there is no file {path}"


def _about(path: Path, place: str, problem: str) -> str:
    """The problem with its path, unless the place is that path."""
    return problem if place == str(path) else f"{path} {problem}"


def _absolute(path: Path, base_dir: Path = Path()) -> Path:
    return (base_dir / path.expanduser()).absolute()


async def _add_file(store: BlobStore, draft: Draft, path: Path) -> None:
    # Looked at before it is imported: a file that is no model should not cost a copy.
    header = await trio.to_thread.run_sync(_read_file_header, path)
    digest = await store.import_file(path)
    add_header(draft, header, Layer(media_type_of(header), digest, await store.size_of(digest)))


def add_header(draft: Draft, header: Header, layer: Layer) -> None:
    """Add a file's layer, and what its header says."""
    draft.layers.append(layer)
    if layer.media_type == MODEL_TYPE:
        draft.config = _config_of(header) | {k: v for k, v in draft.config.items() if v}
    if layer.media_type == DRAFT_TYPE and isinstance(header, GgufHeader):
        draft.config["draft"] = {"model_format": "gguf", "architecture": header.architecture}


async def _add_part(
    store: BlobStore, draft: Draft, origin: Origin, base_dir: Path, media_type: str
) -> None:
    place = f"Modelfile, line {origin.line}"
    path = await _existing_path(origin, base_dir, place)
    if path is None:
        raise BadModelFile(place, f"there is no file {base_dir / origin.text}")
    header = await trio.to_thread.run_sync(_read_file_header, path)
    if not isinstance(header, GgufHeader):
        raise BadModelFile(place, f"{path} is not a GGUF file")
    if media_type == ADAPTER_TYPE and media_type_of(header) != ADAPTER_TYPE:
        raise BadModelFile(
            place, f"{path} is no adapter: its general.type is not adapter; name a LoRA file"
        )
    digest = await store.import_file(path)
    add_header(draft, header, Layer(media_type, digest, await store.size_of(digest)))


def _read_file_header(path: Path) -> Header:
    try:
        # NONBLOCK: to open a FIFO would wait for its writer, in a thread that nothing can end.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadModelFile(str(path), "not a regular file")

            def read_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            return read_header(read_at, os.fstat(file.fileno()).st_size, str(path))
    except FileNotFoundError as error:
        raise BadModelFile(str(path), "there is no such file") from error
    except OSError as error:
        raise BadModelFile(str(path), error.strerror or "it cannot be read") from error


def read_header(read_at: ReadAt, size: int, where: str) -> Header:
    """Read a GGUF or safetensors header, whichever it is. Raises BadModelFile."""
    start = read_at(0, min(size, 9))
    if start[8:] == b"{" and not start.startswith(MAGIC):
        return read_safetensors_header(read_at, size, where)
    if start and start[:4] not in (MAGIC, MAGIC[::-1]):  # reversed: big-endian, told apart below
        raise BadModelFile(where, "not a GGUF or safetensors file")
    return read_gguf_header(read_at, size, where)


def media_type_of(header: Header) -> str:
    """Which layer a file becomes."""
    if isinstance(header, SafetensorsHeader):
        return MODEL_TYPE
    kind = header.metadata.get("general.type")
    if kind == "adapter":
        return ADAPTER_TYPE
    if kind in ("projector", "mmproj"):
        return PROJECTOR_TYPE
    # A standalone vision tower says how deep it is, and that it has no text model.
    sees = header.of_architecture("vision.block_count") or header.architecture == "clip"
    return PROJECTOR_TYPE if sees and not header.of_architecture("block_count") else MODEL_TYPE


def _config_of(header: Header) -> dict[str, Json]:
    size = human_number(header.parameter_count)
    if isinstance(header, SafetensorsHeader):
        kinds = {tensor.dtype for tensor in header.tensors}
        return {
            "model_format": "safetensors",
            "model_type": size,
            "file_type": kinds.pop() if len(kinds) == 1 else "",
        }
    return {
        "model_format": "gguf",
        "model_family": header.architecture,
        "model_families": [header.architecture],
        "model_type": size,
        "file_type": header.file_type,
    }


# -- everything else ---------------------------------------------------------------------------


async def _add_texts(store: BlobStore, draft: Draft, modelfile: Modelfile) -> None:
    async def layer(media_type: str, data: bytes) -> Layer:
        if not await store.has(digest_of(data)):
            draft.written.add(digest_of(data))
        return Layer(media_type, await store.put(data), len(data))

    if modelfile.template:
        draft.replace(await layer(TEMPLATE_TYPE, modelfile.template.encode()), PROMPT_TYPE)
    if modelfile.system:
        draft.replace(await layer(SYSTEM_TYPE, modelfile.system.encode()))
    for text in modelfile.licenses:
        draft.layers.append(await layer(LICENSE_TYPE, text.encode()))
    if modelfile.parameters:
        merged = await _inherited_parameters(store, draft.layers) | dict(modelfile.parameters)
        data = go_json({key: merged[key] for key in sorted(merged)}) + b"\n"
        draft.replace(await layer(PARAMS_TYPE, data))
    if modelfile.messages:
        data = go_json(list(map(_message, modelfile.messages))) + b"\n"
        draft.replace(await layer(MESSAGES_TYPE, data))


async def _inherited_parameters(store: BlobStore, layers: Iterable[Layer]) -> dict[str, Json]:
    merged: dict[str, Json] = {}
    for layer in layers:
        if layer.media_type == PARAMS_TYPE:
            merged |= await read_json(store, layer)
    return merged


def _message(message: Message) -> Mapping[str, Json]:
    return {"role": message.role, "content": message.content}


async def _put_config(store: BlobStore, draft: Draft, modelfile: Modelfile) -> Layer:
    given = {
        "renderer": modelfile.renderer,
        "parser": modelfile.parser,
        "requires": modelfile.requires,
    }
    config: dict[str, Json] = draft.config | {key: value for key, value in given.items() if value}
    for key in _ALWAYS:
        config.setdefault(key, None if key == "model_families" else "")
    # Docker's image format wants these three; Ollama writes them on every machine alike.
    config["architecture"], config["os"] = "amd64", "linux"
    config["rootfs"] = {"type": "layers", "diff_ids": [layer.digest for layer in draft.layers]}
    data = go_json({key: config[key] for key in _CONFIG_FIELDS if key in config}) + b"\n"
    return Layer(CONFIG_TYPE, await store.put(data), len(data))


# -- reading small blobs -----------------------------------------------------------------------


async def read_small(store: BlobStore, layer: Layer) -> bytes:
    """A layer's bytes. Raises BlobNotFound, StoreDamaged if it is longer than such a layer is."""
    async with await store.open(layer.digest) as reader:
        if reader.size > SMALL_BLOB_BYTES_MAX:
            raise StoreDamaged(layer.digest, f"a {layer.media_type} of {reader.size:,} bytes")
        return await reader.read_at(0, reader.size)


async def read_json(store: BlobStore, layer: Layer) -> dict[str, Json]:
    """A layer that is a JSON object. Raises BlobNotFound, StoreDamaged."""
    try:
        read = msgspec.json.decode(await read_small(store, layer), type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreDamaged(layer.digest, f"the {layer.media_type} is no JSON: {error}") from error
    return read  # type: ignore[return-value]  # what JSON decodes to is Json


async def read_blob_header(reader: BlobReader, where: str) -> Header:
    """The header of a model blob. Raises BadModelFile."""

    def read_at(offset: int, length: int) -> bytes:
        return trio.from_thread.run(reader.read_at, offset, length)

    return await trio.to_thread.run_sync(read_header, read_at, reader.size, where)

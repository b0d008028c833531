"""Make a model from what `/api/create` is sent: a model or uploaded blobs, and what goes with them.

The same rules as for a Modelfile (`model_creation`); only files are named by digest, because they
are not on this machine. Errors have Ollama's words.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ollamamax_p2p.content.blob_store import BlobStore
from ollamamax_p2p.content.core.digest import Digest, parse_digest
from ollamamax_p2p.content.core.gguf import GgufHeader
from ollamamax_p2p.content.core.go_json import Json
from ollamamax_p2p.content.core.manifest import ADAPTER_TYPE, DRAFT_TYPE, Layer, Manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.content.core.modelfile import Message, Modelfile
from ollamamax_p2p.content.model_creation import (
    Draft,
    ResolveModel,
    TellStatus,
    add_header,
    finish_model,
    inherit,
    media_type_of,
    read_blob_header,
)
from ollamamax_p2p.errors import (
    BadDigest,
    BadInput,
    BadModelFile,
    BadName,
    BlobNotFound,
    StoreReadOnly,
)

FILES_MAX = 1_024
"""Of a model in many parts; Ollama's limit."""

_CONFIG_TEXTS = {
    "model_family": "model_family",
    "base_name": "base_name",
    "quantization_level": "file_type",
    "parameter_size": "model_type",
}
"""Field of `info` -> field of the config."""
_CONFIG_NUMBERS = ("context_length", "embedding_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationRequest:
    """What a model shall be. Empty: not given."""

    origin: str = ""
    """`from`: the model to begin with."""
    files: Mapping[str, str] | None = None
    """File name -> digest of an uploaded blob; where there is no `origin`."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    draft_files: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    system: str = ""
    licenses: tuple[str, ...] = ()
    parameters: Mapping[str, Json] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    info: Mapping[str, Json] = field(default_factory=dict)
    """Overrides of what the files say of themselves."""
    quantize: str = ""


def check_creation_request(request: CreationRequest) -> None:
    """Raise BadInput for what no store can change: paths, digests, what is not supported."""
    for files in (request.files or {}, request.adapters, request.draft_files):
        if len(files) > FILES_MAX:
            raise BadInput(f"too many files: {len(files)} exceeds maximum {FILES_MAX}")
        for path, digest in files.items():
            if not _is_relative(path):
                raise BadInput("file path must be relative")
            try:
                parse_digest(digest)
            except BadDigest:
                raise BadInput("invalid digest format") from None
    if len(request.adapters) > 1:
        raise BadInput("only one adapter is currently supported")
    if request.quantize:
        raise BadInput(
            f"this node cannot quantize (to {request.quantize[:40]}); "
            "upload a GGUF file that is quantized already"
        )


async def create_from_request(
    store: BlobStore,
    name: ModelName,
    request: CreationRequest,
    *,
    resolve_model: ResolveModel | None = None,
    tell: TellStatus = lambda _: None,
) -> Manifest:
    """Make a model of what is in the store.

    resolve_model: gives the manifest that `from` names, with all its blobs in the store; without
    one, only what is in the store is found. tell: called with each step.
    Raises BadInput, BadModelFile, ModelNotFound, StoreFull, StoreReadOnly; nothing is named then.
    """
    if not store.writable:
        raise StoreReadOnly(store.place)
    check_creation_request(request)
    draft = Draft()
    if request.origin:
        source = _source(request.origin)
        await inherit(store, draft, source, await (resolve_model or store.manifest)(source))
    elif request.files is not None:
        await _add_files(store, draft, request.files, "", tell)
    else:
        raise BadInput("neither 'from' or 'files' was specified")
    if request.adapters:
        await _add_files(store, draft, request.adapters, ADAPTER_TYPE, tell)
    if request.draft_files:
        await _add_files(store, draft, request.draft_files, DRAFT_TYPE, tell)
    _apply_info(draft.config, request.info)
    return await finish_model(store, name, draft, _as_modelfile(request), tell)


def _source(text: str) -> ModelName:
    try:
        return parse_model_name(text)
    except BadName:
        raise BadInput("invalid model name") from None


async def _add_files(
    store: BlobStore, draft: Draft, files: Mapping[str, str], media_type: str, tell: TellStatus
) -> None:
    """media_type: what they have to be; "": what they are."""
    if not files:
        raise BadInput("no files provided to convert")
    for path in sorted(files):
        if path.endswith(".safetensors"):
            raise BadInput("this node cannot convert safetensors; convert them to GGUF first")
    for path in sorted(files):
        tell("parsing GGUF")
        digest = parse_digest(files[path])
        header = await _header(store, path, digest)
        found = media_type_of(header)
        if media_type == ADAPTER_TYPE and found != ADAPTER_TYPE:
            raise BadInput(f"{path[:200]} is no adapter: its general.type is not adapter")
        layer = Layer(media_type or found, digest, await store.size_of(digest))
        add_header(draft, header, layer)


async def _header(store: BlobStore, path: str, digest: Digest) -> GgufHeader:
    try:
        reader = await store.open(digest)
    except BlobNotFound:
        raise BadInput(f"blob not found for {path[:200]} (digest {digest})") from None
    async with reader:
        start = await reader.read_at(0, min(4, reader.size))
        if start not in (b"GGUF", b"FUGG"):
            raise BadInput(
                "supplied file was not in GGUF format" if _is_gguf(path) else "unknown type"
            )
        header = await read_blob_header(reader, path[:200])
    if not isinstance(header, GgufHeader):
        raise BadModelFile(path[:200], "not a GGUF file")
    return header


def _is_gguf(path: str) -> bool:
    return path.endswith(".gguf")


def _is_relative(path: str) -> bool:
    """Go's fs.ValidPath: parts between slashes, none of them empty, "." or ".."; nothing is ever
    joined from it here, but what Ollama refuses is refused.
    """
    parts = path.split("/")
    return not re.search(r"[\\:\0]", path) and all(part not in ("", ".", "..") for part in parts)


def _apply_info(config: dict[str, Json], info: Mapping[str, Json]) -> None:
    for key, target in _CONFIG_TEXTS.items():
        if key in info:
            value = info[key]
            if not isinstance(value, str):
                raise BadInput(f'info field "{key}" must be a string')
            config[target] = value
    if "model_family" in info:
        config["model_families"] = [info["model_family"]] if info["model_family"] else None
    for key in _CONFIG_NUMBERS:
        if key in info:
            number = info[key]
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise BadInput(f'info field "{key}" must be a number')
            if number < 0 or number != number // 1 or number >= 2**53:
                raise BadInput(f'info field "{key}" must be a non-negative integer')
            config[key] = int(number)
    if "capabilities" in info:
        names = info["capabilities"]
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise BadInput('info field "capabilities" must be an array of strings')
        config["capabilities"] = names


def _as_modelfile(request: CreationRequest) -> Modelfile:
    return Modelfile(
        origins=(),
        template=request.template,
        system=request.system,
        licenses=request.licenses,
        parameters=request.parameters,  # type: ignore[arg-type]  # whatever JSON says, as in Ollama
        messages=request.messages,
        renderer=request.renderer,
        parser=request.parser,
        requires=request.requires,
    )

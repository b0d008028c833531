"""Models of this node's store as an engine needs them: what they can do, and where their files are.

Read once for each manifest; a model that is pulled, removed or made anew is seen at the next call.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from ollamamax_p2p.content import DiskStore, ModelContent, read_model
from ollamamax_p2p.content.core.gguf import GgufHeader
from ollamamax_p2p.content.core.manifest import ADAPTER_TYPE, MODEL_TYPE, PROJECTOR_TYPE
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import BadName, ModelNotFound, OmxError
from ollamamax_p2p.inference.backend import ServableModel
from ollamamax_p2p.inference.core.requests import ChatMessage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """A model that llama.cpp can be given."""

    about: ServableModel
    header: GgufHeader
    weights: Path
    projector: Path | None
    adapters: tuple[Path, ...]
    file_bytes: int
    """Of all three."""
    parameters: dict[str, object]
    """The model's own options."""
    system: str
    messages: tuple[ChatMessage, ...]
    """Said before every conversation."""

    @property
    def thinks_in_marks(self) -> bool:
        """Whether its template marks thinking with <think> and </think>."""
        template = self.header.metadata.get("tokenizer.chat_template")
        return isinstance(template, str) and "</think>" in template

    @property
    def context_length(self) -> int:
        """What it was trained with; 0: it does not say."""
        return self.about.context_length


class StoredModels:
    """The store, read for engines."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._read: dict[str, EngineModel | None] = {}
        self._reading = trio.Lock()

    async def all(self) -> tuple[EngineModel, ...]:
        """Every model that llama.cpp may run, newest first."""
        async with self._reading:
            stored = await self._store.models()
            found = []
            for model in stored:
                engine_model = await self._of(model.name, model.manifest_digest)
                if engine_model is not None:
                    found.append(
                        _named(engine_model, str(model.name), model.modified_at.timestamp())
                    )
            present = {model.manifest_digest for model in stored}
            self._read = {key: value for key, value in self._read.items() if key in present}
            return tuple(found)

    async def named(self, name: str) -> EngineModel:
        """Raises ModelNotFound, also for a model that is no GGUF."""
        try:
            parsed = parse_model_name(name)
            manifest = await self._store.manifest(parsed)
        except (BadName, ModelNotFound):
            raise ModelNotFound(name) from None
        async with self._reading:
            found = await self._of(parsed, manifest.digest)
        if found is None:
            raise ModelNotFound(name)
        return _named(found, str(parsed), found.about.modified_at)

    async def _of(self, name: ModelName, digest: str) -> EngineModel | None:
        if digest not in self._read:
            try:
                self._read[digest] = self._made(await read_model(self._store, name))
            except OmxError as error:
                log.warning("the embedded engine passes over %s: %s", name, error)
                return None
        return self._read[digest]

    def _made(self, content: ModelContent) -> EngineModel | None:
        header, manifest = content.header, content.manifest
        weights = manifest.layers_of(MODEL_TYPE)
        if not weights or not _may_be_gguf(content):
            return None
        if not isinstance(header, GgufHeader):
            # llama.cpp may read what we cannot, and if not, it says better what is wrong.
            header = GgufHeader(3, {}, (), alignment=32, data_offset=0)
        parts = (*weights, *manifest.layers_of(PROJECTOR_TYPE), *manifest.layers_of(ADAPTER_TYPE))
        projectors = manifest.layers_of(PROJECTOR_TYPE)
        return EngineModel(
            about=_about(content, header),
            header=header,
            weights=self._store.blob_path(weights[0].digest),
            projector=self._store.blob_path(projectors[0].digest) if projectors else None,
            adapters=tuple(
                self._store.blob_path(layer.digest) for layer in manifest.layers_of(ADAPTER_TYPE)
            ),
            file_bytes=sum(layer.size for layer in parts),
            parameters=dict(content.parameters),
            system=content.system,
            messages=tuple(
                ChatMessage(role=message.role, content=message.content)
                for message in content.messages
            ),
        )


def engine_capabilities(told: Sequence[str], header: GgufHeader) -> tuple[str, ...]:
    """What a model can here. Tools, thinking and text for a gap depend on what llama.cpp uses, the
    file's own Jinja template and tokens, and not on a TEMPLATE layer, which it does not run.
    """
    jinja = header.metadata.get("tokenizer.chat_template")
    template = jinja if isinstance(jinja, str) else ""
    here = {
        "tools": re.search(r"\btools\b", template) is not None,
        "thinking": "<think>" in template or "enable_thinking" in template,
        "insert": any(
            f"tokenizer.ggml.{key}_token_id" in header.metadata for key in ("fim_pre", "prefix")
        ),
    }
    kept = [name for name in told or ("completion",) if name not in here]
    return (*kept, *(name for name, able in here.items() if able))


def _may_be_gguf(content: ModelContent) -> bool:
    told = content.config.get("model_format")
    return told in (None, "", "gguf")


def _about(content: ModelContent, header: GgufHeader) -> ServableModel:
    def number(key: str) -> int:
        value = header.of_architecture(key)
        return value if isinstance(value, int) and value >= 0 else 0

    def text(key: str, limit: int) -> str:
        value = content.config.get(key)
        return value[:limit] if isinstance(value, str) else ""

    capabilities = engine_capabilities(content.capabilities, header)
    return ServableModel(
        name=str(content.stored.name),
        digest=content.stored.manifest_digest,
        size=content.stored.size,
        modified_at=content.stored.modified_at.timestamp(),
        capabilities=capabilities[:16],
        can_resume="completion" in capabilities,
        context_length=number("context_length"),
        embedding_length=number("embedding_length"),
        format=text("model_format", 32) or "gguf",
        family=text("model_family", 64),
        parameter_size=text("model_type", 32),
        quantization=text("file_type", 32),
    )


def _named(model: EngineModel, name: str, modified_at: float) -> EngineModel:

    about = msgspec.structs.replace(model.about, name=name, modified_at=modified_at)
    return replace(model, about=about)

"""The real SmolLM2-135M in a store on disk, and variants of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ollamamax_p2p.content import ContentSettings, DiskStore, import_model, open_disk_store
from ollamamax_p2p.content.core.manifest import (
    PARAMS_TYPE,
    SYSTEM_TYPE,
    TEMPLATE_TYPE,
    Layer,
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.inference.settings import InferenceSettings
from tests.content.model_files import real_model

MODEL = "smollm2:135m"
TUNED = "tuned:latest"
"""The same weights with SYSTEM, PARAMETER and TEMPLATE layers."""
GARBAGE = "garbage:latest"

SETTINGS = InferenceSettings(
    context_length=512, slots=2, threads=1, ollama_url="", memory_bytes=2_000_000_000
)


@asynccontextmanager
async def open_store(folder: Path) -> AsyncIterator[DiskStore]:
    settings = ContentSettings(reserve_bytes=0)
    async with open_disk_store(folder / "models", folder / "side", settings) as store:
        name = parse_model_name(MODEL)
        manifest = await import_model(store, real_model(), name)
        extra = {
            SYSTEM_TYPE: b"Answer in one word.",
            PARAMS_TYPE: b'{"temperature":0,"stop":["\\n"],"num_predict":3}',
            TEMPLATE_TYPE: b"{{ .System }}{{ .Prompt }}{{ .Tools }}",
        }
        layers = [Layer(kind, await store.put(data), len(data)) for kind, data in extra.items()]
        tuned = build_manifest(manifest.config, [*manifest.layers, *layers])
        await store.put_manifest(parse_model_name(TUNED), tuned)
        yield store


async def add_garbage(store: DiskStore) -> None:
    """A model whose weights are no GGUF file."""
    good = await store.manifest(parse_model_name(MODEL))
    data = b"no model at all " * 100
    bad = Layer(good.layers[0].media_type, await store.put(data), len(data))
    await store.put_manifest(parse_model_name(GARBAGE), build_manifest(good.config, [bad]))

"""The real SmolLM2-135M in a store on disk, and variants of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

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


TOOLS_TEMPLATE = r"""
{%- if tools %}{{ '<|im_start|>system\nTools: ' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '\nCall one so: <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + "
    "message.content.split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is not defined or enable_thinking %}{{ '<think>\\n' }}{% endif %}"
    "{%- endif %}"
)


async def add_templated(store: DiskStore, name: str, template: str, folder: Path) -> None:
    """The same weights with another chat template inside."""
    path = folder / "templated.gguf"
    await trio.to_thread.run_sync(path.write_bytes, templated(template))
    await import_model(store, path, parse_model_name(name))


def templated(template: str) -> bytes:
    """Its GGUF file with another chat template inside."""
    data = real_model().read_bytes()
    key = b"tokenizer.chat_template" + (8).to_bytes(4, "little")  # 8: a string
    at = data.index(key) + len(key)
    old = int.from_bytes(data[at : at + 8], "little")
    # What follows is aligned to 32 bytes, so the length changes by a multiple of them.
    new = template.encode()
    new += b"{#" + b" " * ((old - len(new) - 4) % 32) + b"#}"
    return data[:at] + len(new).to_bytes(8, "little") + new + data[at + 8 + old :]

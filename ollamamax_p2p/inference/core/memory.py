"""How much memory a model takes, and which models go to make room for another."""

from collections.abc import Iterable
from dataclasses import dataclass

from ollamamax_p2p.content.core.gguf import GgufHeader

MiB = 1024 * 1024

PROCESS_BYTES = 100 * MiB
"""Interpreter, llama.cpp's code and its buffers for a small model; measured 80 MB with SmolLM2-135M
(205 MB resident, 98 MB of it the model, 24 MB its cache)."""

CACHE_VALUE_BYTES = 2
"""The key-value cache has 16-bit numbers."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """A model in memory, or on its way there."""

    key: object
    size: int
    last_used: float
    idle: bool


class DoesNotFit(Exception):
    """Not even with every other model out of memory."""


def needed_bytes(
    header: GgufHeader, file_bytes: int, *, context: int, slots: int, batch: int
) -> int:
    """What a model will take: weights, key-value cache, logits, and what every process takes.

    Models whose layers differ in their count of heads are taken for their largest; a state space
    model's cache is smaller than this says.
    """

    def number(key: str, default: int) -> int:
        value = header.of_architecture(key)
        if isinstance(value, tuple):
            value = max((each for each in value if isinstance(each, int)), default=default)
        return value if isinstance(value, int) else default

    layers, width = number("block_count", 0), number("embedding_length", 0)
    heads = max(1, number("attention.head_count", 1))
    cached_heads = number("attention.head_count_kv", heads)
    per_head = number("attention.key_length", width // heads) + number(
        "attention.value_length", width // heads
    )
    cache = layers * cached_heads * per_head * CACHE_VALUE_BYTES * context * slots
    logits = number("vocab_size", 0) * 4 * batch
    return file_bytes + cache + logits + PROCESS_BYTES


def models_to_unload(present: Iterable[InMemory], needed: int, budget: int) -> list[object] | None:
    """The keys of those that go so that `needed` bytes fit: idle ones, the longest unused first.

    None: it will fit once busy ones are idle, so wait. Raises DoesNotFit.
    """
    if needed > budget:
        raise DoesNotFit
    models = list(present)
    free = budget - sum(model.size for model in models)
    gone: list[object] = []
    for model in sorted(models, key=lambda model: model.last_used):
        if free >= needed:
            break
        if model.idle:
            gone.append(model.key)
            free += model.size
    return gone if free >= needed else None

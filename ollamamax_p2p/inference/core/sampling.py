"""Options as llama.cpp's server takes them; the model's own before Ollama's defaults."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from ollamamax_p2p.inference.core.requests import Options

DEFAULTS = Options(
    num_keep=4,
    seed=-1,
    num_predict=-1,
    top_k=40,
    top_p=0.9,
    min_p=0.0,
    typical_p=1.0,
    repeat_last_n=64,
    temperature=0.8,
    repeat_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    stop=(),
)
"""Ollama's. llama.cpp's own differ (top_p 0.95, min_p 0.05), so each is said."""

_SAME_NAME = (
    "seed",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_last_n",
    "temperature",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)

ENDLESS_CONTEXTS = 10
"""An answer without a limit ends after so many contexts, as in Ollama: a small model that repeats
itself would else never end."""


def merged(request: Options, model: Mapping[str, object]) -> Options:
    """The request's options, else the model's parameters, else the defaults.

    A parameter of the model that is none of ours, or has another type, is passed over, as Ollama
    does: it comes from a manifest, which anybody can write.
    """
    chosen = msgspec.structs.asdict(DEFAULTS)
    for name, value in model.items():
        if name in chosen and value is not None:
            with suppress(msgspec.ValidationError):
                read = msgspec.convert({name: value}, Options, strict=False)
                chosen[name] = getattr(read, name)
    asked = msgspec.structs.asdict(request)
    return Options(**chosen | {name: v for name, v in asked.items() if v is not None})


def sampling_fields(options: Options) -> dict[str, Any]:
    """How to sample, as fields of a request to llama.cpp. options: merged."""
    fields = {name: getattr(options, name) for name in _SAME_NAME}
    return fields | {"n_keep": options.num_keep, "stop": list(options.stop or ())}


def tokens_left(options: Options, used: int, context: int) -> int:
    """How many tokens may still come. used: those of an answer that is resumed; context: tokens of
    the engine's."""
    limit = options.num_predict
    if limit is None or limit < 0:
        limit = ENDLESS_CONTEXTS * context
    return max(0, limit - used)

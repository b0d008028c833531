"""Engines that run models: embedded llama.cpp, Ollama servers, whatever speaks OpenAI's HTTP.

Chooses nothing: which engine of which node answers is the router's. Start at `backend`; the values
are in `core.requests` and `core.models`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.inference.backend import Backend
from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    Delta,
    EmbedRequest,
    GenerateRequest,
    Options,
)
from ollamamax_p2p.inference.settings import InferenceSettings

if TYPE_CHECKING:
    from ollamamax_p2p.inference.backends import open_backends

__all__ = [
    "Backend",
    "ChatMessage",
    "ChatRequest",
    "Delta",
    "EmbedRequest",
    "GenerateRequest",
    "InferenceSettings",
    "LoadedModel",
    "Options",
    "ServableModel",
    "open_backends",
]


def __getattr__(name: str) -> Any:
    if name != "open_backends":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.backends").open_backends

"""What an engine says of its models: which it could run, which are in its memory; sans-IO."""

from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.inference.core.requests import Count, Name


class ServableModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that a back end can run now."""

    name: Name
    """As Ollama displays it: `smollm2:135m`."""
    digest: Annotated[str, Meta(max_length=71)] = ""
    """sha256:<hex> of its manifest; "" where the engine has no such thing."""
    size: Count = 0
    """Bytes of all its blobs."""
    modified_at: float = 0.0
    """Unix seconds."""
    capabilities: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    """completion, chat, tools, insert, vision, embedding, thinking."""
    can_resume: bool = False
    """Whether an answer that began elsewhere can go on here."""
    context_length: Count = 0
    embedding_length: Count = 0
    format: Annotated[str, Meta(max_length=32)] = ""
    family: Annotated[str, Meta(max_length=64)] = ""
    parameter_size: Annotated[str, Meta(max_length=32)] = ""
    quantization: Annotated[str, Meta(max_length=32)] = ""


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model in an engine's memory."""

    name: Name
    digest: Annotated[str, Meta(max_length=71)] = ""
    size: Count = 0
    """Bytes that it takes in all."""
    size_vram: Count = 0
    """Of those, on accelerators."""
    context_length: Count = 0
    expires_at: float | None = None
    """Unix seconds; None: it stays."""
    slots: Annotated[int, Meta(ge=0, le=65_536)] = 1
    """Requests that it works on at once."""
    busy: Annotated[int, Meta(ge=0, le=65_536)] = 0
    loading: bool = False
    """It is not ready yet."""

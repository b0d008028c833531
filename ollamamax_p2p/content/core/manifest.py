"""Ollama manifests: what a model is made of, by digest."""

from dataclasses import dataclass

from ollamamax_p2p.content.core.digest import Digest


@dataclass(frozen=True, slots=True)
class Layer:
    """One blob of a model and what it is for."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest and the exact bytes it was read from; those bytes are what is stored and hashed.

    Made by `parse_manifest` and `build_manifest` only.
    """

    raw: bytes
    config: Layer
    layers: tuple[Layer, ...]

"""What a node and an engine's process tell one another over the lifeline; answers go over HTTP."""

from typing import Annotated

from msgspec import Meta

from ollamamax_p2p.inference.core.requests import Count
from ollamamax_p2p.wire import Codec, Message

MESSAGE_BYTES_MAX = 256 * 1024

_Path = Annotated[str, Meta(max_length=4_096)]


class EngineStart(Message, tag="start", frozen=True, kw_only=True):
    """What to load and how; the first and only thing that the node says."""

    model: _Path
    projector: _Path = ""
    adapters: tuple[_Path, ...] = ()
    socket: _Path
    """Where to listen."""
    embeds: bool = False
    """Give vectors, not answers: llama.cpp is set to one of the two."""
    pooling: str = ""
    """last, where a model does not say how its tokens' vectors become one; "": it does."""
    context: Count
    """Tokens of one slot."""
    slots: Count = 1
    batch: Count = 128
    threads: Count = 0
    """0: as llama.cpp finds best."""
    gpu_layers: int = -1
    """-1: all that fit."""
    main_gpu: int = 0
    use_mmap: bool = True
    data_bytes_max: Count = 0
    """Memory beside the mapped file that the process may have; 0: no limit."""


class EngineReady(Message, tag="ready", frozen=True, kw_only=True):
    """The model is loaded and the socket answers."""


class EngineFailed(Message, tag="failed", frozen=True, kw_only=True):
    """It cannot be loaded; the process ends."""

    problem: Annotated[str, Meta(max_length=4_096)]


TO_ENGINE: Codec[EngineStart] = Codec(EngineStart, max_bytes=MESSAGE_BYTES_MAX)
FROM_ENGINE: Codec[EngineReady | EngineFailed] = Codec(
    EngineReady | EngineFailed, max_bytes=MESSAGE_BYTES_MAX
)

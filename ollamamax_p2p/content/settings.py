"""What an operator sets about the store."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentSettings:
    """Where models live."""

    models: Path = Path("~/.ollama/models")
    """Ollama's store: blobs/ and manifests/. `OLLAMA_MODELS` is honoured when ours is not set."""

    reserve_bytes: int = 1_000_000_000
    """A pull that would leave less than this free is refused before it begins: a full disk breaks
    more than us.
    """

    record_interval_bytes: int = 32 * 1024 * 1024
    """An unfinished blob is made durable after so many new bytes. It is what a power cut costs at
    most, and what is read again when a pull resumes: some 30 ms.
    """

    partial_lifetime_s: float = 14 * 86_400.0
    """An unfinished blob that no pull has had for so long is removed when the node starts: its
    pull was given up, and it holds gigabytes that nothing lists. A holiday must not cost a pull.
    """

    hash_threads: int = 2
    """Threads that hash whole blobs: so many cores are busy beside the event loop at most."""

    disk_threads: int = 8
    """Reads and writes at once; a solid-state disk is slower with fewer."""

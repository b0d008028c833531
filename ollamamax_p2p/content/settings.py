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

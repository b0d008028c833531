"""What an operator sets about the local HTTP API."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Where the CLI reaches this node."""

    listen: str = "127.0.0.1:11435"
    """host:port. Beside Ollama's 11434, so that both can run; only loopback addresses are taken."""

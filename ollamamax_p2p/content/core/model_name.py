"""Model names by Ollama's grammar: `[scheme://][host/][namespace/]model[:tag]`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """A whole, valid name. Made by `parse_model_name` only."""

    host: str
    namespace: str
    model: str
    tag: str

"""Errors of Ollama's API as classes again, where only a status and a text have crossed."""

from ollamamax_p2p import errors
from ollamamax_p2p.errors import OmxError

_CLASSES: dict[int, type[OmxError]] = {
    400: errors.BadInput,
    404: errors.ModelNotFound,
    413: errors.BadInput,
    499: errors.NetworkTrouble,
    500: errors.NetworkTrouble,
    503: errors.NoCandidate,
    504: errors.DeadlineExceeded,
}
"""The reverse of what `ollama_framing` does, as far as it can be reversed. 500 is what an engine or
the way to it did wrong, nearly always; a fault of ours is told with that word."""


def error_of_status(status: int, text: str) -> OmxError:
    """What a status and its text were before they were told."""
    return errors.restored(errors.code(_CLASSES.get(status, errors.OmxError)), text)

"""Pictures that a prompt names by their paths, as Ollama's command line takes them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

PICTURE_BYTES_MAX = 11 * 1024 * 1024
"""In base64 that is what one request may carry, with its text beside it."""

_BEGIN = r"(?:file://|~?/|\.{1,2}[/\\]|[A-Za-z]:[/\\])"
# A name alone is a word of the text: who asks about `logo.png` may not want it sent.
_ENDING = r"\.(?:png|jpe?g|webp)"
_PATH = re.compile(
    rf"""(?P<quote>["'])(?P<quoted>{_BEGIN}[^"'\n]*?{_ENDING})(?P=quote)
    | (?<!\S)(?P<bare>{_BEGIN}(?:\\.|[^\s\\"'])*?{_ENDING})(?=[\s,;:!?.)]|$)""",
    re.IGNORECASE | re.VERBOSE,
)
_HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


@dataclass(frozen=True, slots=True)
class Illustrated:
    """A prompt without the paths in it, and what they name."""

    text: str
    pictures: tuple[bytes, ...]
    paths: tuple[str, ...]
    """As they were written."""


def illustrated(prompt: str) -> Illustrated:
    """Read the pictures that a prompt names. A path that leads to no file stays a part of the text.

    Raises BadInput for a file that is no such picture, is too large or cannot be read.
    """
    pictures, paths = list[bytes](), list[str]()

    def taken(match: "re.Match[str]") -> str:
        path = _existing(match["quoted"] or match["bare"])
        if path is None:
            return match[0]
        pictures.append(_picture(path))
        paths.append(match["quoted"] or match["bare"])
        return ""

    text = _PATH.sub(taken, prompt)
    return Illustrated(text.strip() if paths else prompt, tuple(pictures), tuple(paths))


def named(paths: Sequence[str]) -> str:
    """`./a.png and ./b.png`."""
    return " and ".join(paths)


def _existing(written: str) -> Path | None:
    plain = unquote(written.removeprefix("file://")) if written.startswith("file://") else written
    for text in (plain, re.sub(r"\\(.)", r"\1", plain)):  # shells write a space as `\ `
        path = Path(os.path.expanduser(text))
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name too long, a zero byte
            return None
    return None


def _picture(path: Path) -> bytes:
    from ollamamax_p2p.config import read_regular_file
    from ollamamax_p2p.errors import BadInput

    try:
        data = read_regular_file(path, PICTURE_BYTES_MAX + 1)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if len(data) > PICTURE_BYTES_MAX:
        limit = f"{PICTURE_BYTES_MAX / 1e6:.0f} MB"
        raise BadInput(f"{path}: larger than {limit}, the most that one request carries")
    if not data.startswith(_HEADS) and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        raise BadInput(f"{path}: neither PNG, JPEG nor WebP, whatever its name says")
    return data

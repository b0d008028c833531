"""multipart/form-data, as much of it as an upload of one file needs: bounded, and in memory.

Source: RFC 7578.
"""

import re

import trio
from starlette.requests import Request

from ollamamax_p2p.api.ollama_framing import read_bytes
from ollamamax_p2p.errors import BadInput

FORM_BYTES_MAX = 25 * 1024 * 1024
"""OpenAI's limit for sound, and Ollama's."""
PARTS_MAX = 64

_BOUNDARY = re.compile(r'boundary="?([0-9A-Za-z\'()+_,./:=? -]{1,70})"?', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"\r\n]{1,200})"', re.IGNORECASE)


async def read_form(request: Request) -> dict[str, bytes]:
    """The parts by name, the first of each. Raises BadInput, in Go's words where it has any."""
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        raise _bad("request Content-Type isn't multipart/form-data")
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise _bad("no multipart boundary param in Content-Type")
    body = await read_bytes(request)
    if len(body) > FORM_BYTES_MAX:
        raise _bad(f"it is longer than {FORM_BYTES_MAX:,} bytes")
    # Searching 25 MB takes some 10 ms.
    return await trio.to_thread.run_sync(parse_form, body, boundary[1].strip().encode())


def parse_form(body: bytes, boundary: bytes) -> dict[str, bytes]:
    """See read_form."""
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, PARTS_MAX + 1)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise _bad("multipart: NextPart: EOF")
    found: dict[str, bytes] = {}
    for piece in pieces[1:-1]:
        head, separator, content = piece.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if not separator:
            raise _bad("malformed MIME header")
        if name is not None:
            found.setdefault(name[1].decode(errors="replace"), content)
    return found


def _bad(problem: str) -> BadInput:
    return BadInput(f"failed to parse multipart form: {problem}")

"""How programs of the same user find a running node: two small files in its data folder.

`node.json` says where its API listens, `api-token` is the secret that the API asks for. The token
is new at every start. A node removes both when it stops; after a kill -9 they stay, so whoever
reads them also looks whether the process is still there.
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from ollamamax_p2p.errors import NodeNotRunning
from ollamamax_p2p.identity import read_secret, remove_secret, write_secret

NODE_FILE_NAME = "node.json"
TOKEN_FILE_NAME = "api-token"
_TOKEN = re.compile(rb"[A-Za-z0-9_-]{20,100}")


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """What node.json holds."""

    pid: int
    api: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F.:\[\]]{3,50}:[0-9]{1,5}$")]
    """host:port, the host a number."""
    peer_id: str


def new_token() -> str:
    """256 bits, safe in a header."""
    return secrets.token_urlsafe(32)


def write_files(data_dir: Path, found: NodeFile, token: str) -> None:
    """Say where the node is. The token first: whoever sees node.json can use it."""
    write_secret(data_dir / TOKEN_FILE_NAME, token.encode())
    write_secret(data_dir / NODE_FILE_NAME, msgspec.json.encode(found) + b"\n")


def remove_files(data_dir: Path) -> None:
    """Say that it is gone."""
    remove_secret(data_dir / NODE_FILE_NAME)
    remove_secret(data_dir / TOKEN_FILE_NAME)


def read_files(data_dir: Path) -> tuple[NodeFile, str]:
    """Where a node runs and its token. Raises NodeNotRunning, or as `read_secret`."""
    raw = read_secret(data_dir / NODE_FILE_NAME)
    token = read_secret(data_dir / TOKEN_FILE_NAME)
    if raw is None or token is None:
        raise NodeNotRunning(str(data_dir))
    try:
        found = msgspec.json.decode(raw, type=NodeFile)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise NodeNotRunning(f"{data_dir} ({NODE_FILE_NAME} there is damaged)") from None
    if not _TOKEN.fullmatch(token):
        raise NodeNotRunning(f"{data_dir} ({TOKEN_FILE_NAME} there is damaged)")
    if not _is_alive(found.pid):
        raise NodeNotRunning(str(data_dir))
    return found, token.decode()


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False  # kill(0) would mean our own process group
    with suppress(ProcessLookupError, OverflowError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False

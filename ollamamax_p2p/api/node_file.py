"""How programs of the same user find a running node: two small files in its data folder.

`node.json` says where its API listens, `api-token` is the secret that the API asks for. The token
is new at every start. A node removes both when it stops; after a kill -9 they stay, so whoever
reads them also looks whether the process is still there.
"""

import fcntl
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from ollamamax_p2p.errors import LocalTrouble, NodeNotRunning, StoreDamaged
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
    """Where a node runs and its token. Raises NodeNotRunning, LocalTrouble if one runs but cannot
    be asked, or as `read_secret`.
    """
    raw = _read(data_dir, NODE_FILE_NAME)
    token = _read(data_dir, TOKEN_FILE_NAME)
    if raw is None and token is None:
        mend = "it starts or stops, or is a command at work (omx pull); wait for it"
        raise unusable(data_dir, "has no API", mend)
    if raw is None or token is None:
        raise unusable(data_dir, f"its {TOKEN_FILE_NAME if raw else NODE_FILE_NAME} is missing")
    try:
        found = msgspec.json.decode(raw, type=NodeFile)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise unusable(data_dir, f"its {NODE_FILE_NAME} is damaged") from None
    if not _TOKEN.fullmatch(token):
        raise unusable(data_dir, f"its {TOKEN_FILE_NAME} is damaged")
    if not _is_alive(found.pid):
        raise unusable(data_dir, f"its {NODE_FILE_NAME} is damaged")
    return found, token.decode()


def unusable(data_dir: Path, problem: str, mend: str = "") -> LocalTrouble:
    """Why the node of a data folder cannot be asked: there is none, or it runs but has a problem.

    The lock decides: a running node holds it whatever became of its files.
    """
    pid = lock_holder(data_dir)
    if pid is None:
        return NodeNotRunning(str(data_dir))
    mend = mend or f"run: kill {pid}, then omx up"
    return LocalTrouble(f"a node (process {pid}) runs on {data_dir} but {problem}; {mend}")


def lock_holder(data_dir: Path) -> int | None:
    """The process that holds a data folder, or None."""
    with suppress(OSError):
        handle = os.open(data_dir / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = os.read(handle, 20).decode(errors="replace").strip()
            # Tried only where a process of that number lives: to hold the lock, be it for a
            # moment, would turn away a node that starts just now.
            if not pid.isdigit() or not _is_alive(int(pid)):
                return None
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(pid)
        finally:
            os.close(handle)
    return None


def _read(data_dir: Path, name: str) -> bytes | None:
    try:
        return read_secret(data_dir / name)
    except StoreDamaged:
        if lock_holder(data_dir) is None:
            raise
        raise unusable(data_dir, f"its {name} is damaged") from None


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

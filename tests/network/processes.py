"""`omx` as whole processes on loopback, and machines made bad for them: full disks, no network.

What needs root or a namespace says so and skips.
"""

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.running_omx import Ended, command, environment

OFFLINE = {
    "OMX_ORIGIN_ENABLED": "0",
    "OMX_NO_MDNS": "1",
    "OMX_LISTEN": "/ip4/127.0.0.1/tcp/0",
    "OMX_API": "127.0.0.1:0",
    "OMX_CONTENT_RESERVE_BYTES": "0",
}
BUDGET_S = 90
"""Real seconds for one command, on a busy machine."""


def settings(data_dir: Path, **more: str | None) -> dict[str, str]:
    """The environment of a node that touches loopback only; None takes one of these away."""
    merged = OFFLINE | more
    return environment(data_dir, **{key: value for key, value in merged.items() if value})


async def omx(data_dir: Path, *arguments: str, within: Sequence[str] = (), **more: Any) -> Ended:
    """Run a command to its end. within: what starts it, such as `unshare`."""
    with trio.fail_after(BUDGET_S):
        done = await trio.run_process(
            [*within, *command(*arguments)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=settings(data_dir, **more),
        )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def up(
    data_dir: Path, *arguments: str, within: Sequence[str] = (), **more: Any
) -> AsyncIterator[dict[str, Any]]:
    """A node in a process of its own; gives what it announced."""
    said = data_dir.parent / f"{data_dir.name}.stderr"
    with said.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            [*within, *command(*(arguments or ("up",)), "--json")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=settings(data_dir, **more),
        )
    try:
        with trio.fail_after(BUDGET_S):
            line = b""
            while not line.endswith(b"\n"):
                part = await process.stdout.receive_some()
                assert part, f"it ended with {await process.wait()}: {said.read_text()}"
                line += part
        yield {**json.loads(line), "stderr": said}
    finally:
        if process.returncode is None:
            process.terminate()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 20):
            await process.wait()
        if process.returncode is None:
            process.kill()


def error_line(ended: Ended, *, besides: str = "pulling ") -> str:
    """The one line in which a command told why it failed; what pull says before is progress.

    besides: how another line may begin.
    """
    assert "Traceback" not in ended.err, ended.err
    lines = ended.err.splitlines()
    errors = [line for line in lines if not line.startswith(("pulling ", "verifying ", besides))]
    assert len(errors) == 1, ended.err
    assert errors == lines[-1:]
    assert errors[0].startswith("Error: ")
    assert "this is a fault of omx" not in errors[0]
    return errors[0]


# -- bad machines ------------------------------------------------------------------------------


@lru_cache
def no_network() -> list[str]:
    """What runs a command without any network, loopback included."""
    for line in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which(line[0]) and not subprocess.run([*line, "true"], check=False).returncode:
            return line
    pytest.skip("needs a network namespace: unshare --net, as root or where users may")


@contextmanager
def closed_folder(folder: Path) -> Iterator[list[str]]:
    """A folder that a user may not look into; gives what runs a command as such a user."""
    folder.mkdir()
    runner: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv: apt-get install util-linux")
        # Root without its right to pass over modes, which still reads the interpreter's own files.
        rights = "-dac_override,-dac_read_search"
        runner = ["setpriv", "--bounding-set", rights, "--inh-caps", rights]
        os.chown(folder, 65534, 65534)
    folder.chmod(0o700 if runner else 0)
    try:
        yield runner
    finally:
        folder.chmod(0o700)


def loopback_only() -> list[str]:
    """What runs a command with a loopback interface and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2")
    return [*no_network(), "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own in a folder, of so many bytes."""
    folder.mkdir()
    _mount(["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)])
    try:
        yield folder
    finally:
        _unmount(folder)


@contextmanager
def read_only(source: Path, folder: Path) -> Iterator[Path]:
    """A folder's contents once more, read-only also for root."""
    folder.mkdir()
    _mount(["--bind", str(source), str(folder)])
    try:
        _mount(["-o", "remount,bind,ro", str(folder)])
        yield folder
    finally:
        _unmount(folder)


def _mount(arguments: Sequence[str]) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    # Lazily: a child that is just ending may still hold a file.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room that is left on a small disk; gives the file that took it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(64 * 1024))
    return ballast

"""Run `omx` as a user does."""

import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Omx = Callable[..., Awaitable[Ended]]


def environment(data_dir: Path, **more: str) -> dict[str, str]:
    """A shell that knows nothing of the machine's own omx and Ollama."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    return {
        **kept,
        "HOME": str(data_dir.parent),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")]),
        "PYTHONIOENCODING": "utf-8",
        "OMX_DATA_DIR": str(data_dir),
        "OMX_MODELS": str(data_dir / "models"),
        **more,
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "omx_cli", *arguments]


@pytest.fixture
def omx(tmp_path: Path) -> Omx:
    """Run `omx` as a process of its own, on the data folder that `served` uses."""

    async def run(*arguments: str, stdin: bytes = b"", **more: str) -> Ended:
        with trio.fail_after(60):
            done = await trio.run_process(
                command(*arguments),
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment(tmp_path, **more),
                cwd=tmp_path,
            )
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run

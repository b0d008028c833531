"""One engine in a process of its own: started, watched, ended."""

import os
import re
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ollamamax_p2p.errors import BackendFailed, BackendUnavailable, MalformedMessage
from ollamamax_p2p.inference.core.engine_messages import (
    FROM_ENGINE,
    MESSAGE_BYTES_MAX,
    TO_ENGINE,
    EngineFailed,
    EngineStart,
)
from ollamamax_p2p.inference.core.lines import LineSplitter, LineTooLong
from ollamamax_p2p.inference.http_client import HttpClient, open_http_client
from ollamamax_p2p.wire import FrameDecoder, encode_frame

LOG_LINES_KEPT = 50
LOG_LINE_BYTES_MAX = 64 * 1024
_LOG_PREFIX = re.compile(r"^[\d.]+ [A-Z] +(?:[\w~]+ +)?")


@dataclass(slots=True)
class EngineProcess:
    """A loaded model that answers. Made by `open_engine`."""

    pid: int
    http: HttpClient
    died: trio.Event = field(default_factory=trio.Event)
    schemas: dict[bytes, bool] = field(default_factory=dict)
    """Whether it keeps answers to a JSON schema; of those that were tried."""

    def resident_bytes(self) -> int | None:
        """Memory that the process holds, the mapped part of the model included; None where the
        system does not tell (macOS)."""
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
        return None


@asynccontextmanager
async def open_engine(
    backend: str, start: EngineStart, *, load_timeout_s: float, stall_timeout_s: float
) -> AsyncIterator[EngineProcess]:
    """Load a model in a new process, which ends with the block.

    Raises BackendFailed if llama.cpp does not take the model, BackendUnavailable if the process
    ends or takes too long.
    """
    async with _spawned() as (process, lifeline, errors), trio.open_nursery() as nursery:
        log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        logged = trio.Event()
        nursery.start_soon(_read_log, errors, log, logged)
        try:
            with trio.fail_after(load_timeout_s):
                await _begin(backend, lifeline, start, log, logged)
        except trio.TooSlowError:
            raise BackendUnavailable(
                backend, f"the model is not loaded after {load_timeout_s:g} s"
            ) from None
        async with open_http_client(
            backend, "http://engine", socket_path=start.socket, stall_timeout_s=stall_timeout_s
        ) as http:
            engine = EngineProcess(process.pid, http)
            nursery.start_soon(_watch, lifeline, engine.died)
            yield engine
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _spawned() -> AsyncIterator[
    tuple[subprocess.Popen[bytes], trio.SocketStream, trio.lowlevel.FdStream]
]:
    ours, theirs = socket.socketpair()
    try:
        # In this thread, which lives as long as the loop does: the kernel ends the child with the
        # thread that started it, and trio's own `open_process` starts it in a passing one.
        process = subprocess.Popen(  # noqa: ASYNC220 - some ms; the reason is above
            [
                sys.executable,
                "-m",
                "ollamamax_p2p.inference.engine_child",
                str(theirs.fileno()),
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            # Ctrl-C is for the node, which ends its engines itself.
            start_new_session=True,
            env=_environment(),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    assert process.stderr is not None
    lifeline = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    errors = trio.lowlevel.FdStream(os.dup(process.stderr.fileno()))
    process.stderr.close()
    try:
        yield process, lifeline, errors
    finally:
        # It holds nothing that must be saved, and a kill works whatever it is doing.
        process.kill()
        with trio.CancelScope(shield=True):
            await lifeline.aclose()
            await errors.aclose()
            await trio.to_thread.run_sync(process.wait)


def _environment() -> dict[str, str]:
    """Ours without our settings, which hold secrets, and with where we found our own modules."""
    kept = {
        name: value
        for name, value in os.environ.items()
        # AIP_: a cloud's variables, by which llama.cpp's server would open a port of its own.
        if not name.startswith(("OMX_", "AIP_", "LLAMA_ARG_"))
    }
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


async def _begin(
    backend: str,
    lifeline: trio.SocketStream,
    start: EngineStart,
    log: deque[str],
    logged: trio.Event,
) -> None:
    decoder = FrameDecoder(max_bytes=MESSAGE_BYTES_MAX)
    try:
        await lifeline.send_all(encode_frame(TO_ENGINE.encode(start), max_bytes=MESSAGE_BYTES_MAX))
        while data := await lifeline.receive_some():
            for frame in decoder.feed(data):
                told = FROM_ENGINE.decode(frame)
                if isinstance(told, EngineFailed):
                    await logged.wait()
                    raise BackendFailed(backend, _why(told.problem, log))
                return
    except (trio.BrokenResourceError, MalformedMessage):
        pass
    await logged.wait()
    raise BackendUnavailable(backend, _why("its process ended while it loaded a model", log))


async def _watch(lifeline: trio.SocketStream, died: trio.Event) -> None:
    """The child says nothing more; what comes is the end."""
    with suppress(trio.BrokenResourceError):
        while await lifeline.receive_some():
            pass
    died.set()


async def _read_log(errors: trio.lowlevel.FdStream, log: deque[str], logged: trio.Event) -> None:
    splitter = LineSplitter(max_bytes=LOG_LINE_BYTES_MAX)
    try:
        async for data in errors:
            try:
                lines = splitter.feed(bytes(data))
            except LineTooLong:
                splitter, lines = LineSplitter(max_bytes=LOG_LINE_BYTES_MAX), []
            log += (line.decode(errors="replace") for line in lines)
    except trio.BrokenResourceError:
        pass
    finally:
        logged.set()


def _why(problem: str, log: deque[str]) -> str:
    """The first error that llama.cpp wrote, which is the cause of the others; else what is told."""
    errors = [line for line in log if re.match(r"^[\d.]+ E ", line)]
    return _LOG_PREFIX.sub("", errors[0])[:300] if errors else problem

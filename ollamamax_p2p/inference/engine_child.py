"""The engine's own process: `python -m ollamamax_p2p.inference.engine_child FD PARENT`.

Loads one model with llama.cpp (xllamacpp, which is llama.cpp's server as a library) and answers
HTTP on a Unix socket; no Python runs for a token. FD is the lifeline, a socket whose other end the
node holds: what to load comes through it, and when it ends, this process does. docs/adr/0008 says
why a process, and why one for each model.
"""

import ctypes
import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ollamamax_p2p.inference.core.engine_messages import (
    FROM_ENGINE,
    MESSAGE_BYTES_MAX,
    TO_ENGINE,
    EngineFailed,
    EngineReady,
    EngineStart,
)
from ollamamax_p2p.wire import FrameDecoder, encode_frame

_PR_SET_PDEATHSIG = 1
_EXACT_BATCH = 32
"""Tokens computed at once on a processor. Below 64, llama.cpp's flash attention sums as it does for
one token, so that an answer which is gone on with here (its text is read in batches) takes the same
turns as where it was written token by token; from 64 on, one answer in nine took another. On a
processor it reads prompts no slower."""
_OOM_SCORE = 800
"""Of -1000 to 1000: when memory runs out, an engine goes before the node does."""


def main(descriptor: int, parent: int) -> None:
    """Serve until the node ends the lifeline, or ends itself."""
    _die_with(parent)
    lifeline = socket.socket(fileno=descriptor)
    start = _received(lifeline)
    threading.Thread(target=_exit_at_end, args=(lifeline,), daemon=True).start()
    _bound_memory(start.data_bytes_max)
    answer: EngineReady | EngineFailed
    try:
        server = _load(start)  # kept: the model goes with the object
    except Exception as error:  # noqa: BLE001 - whatever it is, the node is to hear of it
        answer = EngineFailed(problem=f"{error}"[:4_000])
        _send(lifeline, answer)
        os._exit(1)
    _send(lifeline, EngineReady())
    threading.Event().wait()
    del server


def _die_with(parent: int) -> None:
    """End when the node ends, whatever ends it. The thread that watches the lifeline cannot run
    while llama.cpp loads (it holds Python's lock), so on Linux the kernel sees to it as well.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    if os.getppid() != parent:
        os._exit(1)  # it ended before the kernel was told


def _exit_at_end(lifeline: socket.socket) -> None:
    with suppress(OSError):
        while lifeline.recv(4_096):
            pass
    os._exit(0)


def _bound_memory(bytes_max: int) -> None:
    """RLIMIT_DATA counts private memory and not the mapped model file, whose pages the kernel may
    drop; RLIMIT_AS would count both, and address space that is never used. macOS ignores it.
    """
    if bytes_max:
        with suppress(ValueError, OSError):
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            if hard != resource.RLIM_INFINITY:
                bytes_max = min(bytes_max, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (bytes_max, hard))


def _load(start: EngineStart) -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise RuntimeError(
            f"llama.cpp is not installed ({error}); run: pip install 'ollamamax-p2p[engine]'"
        ) from None
    params = xllamacpp.CommonParams()
    params.model.path = start.model
    if start.projector:
        params.mmproj.path = start.projector
    if start.adapters:
        params.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in start.adapters
        ]
    params.hostnames = [start.socket]
    params.n_parallel = start.slots
    params.n_ctx = start.context * start.slots
    params.n_batch = start.context if start.embeds else start.batch
    # A text that is to become one vector must be computed at once.
    params.n_ubatch = start.context if start.embeds else _computed_at_once(xllamacpp, start)
    params.n_gpu_layers = start.gpu_layers
    params.main_gpu = start.main_gpu
    if not start.use_mmap:
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.n_threads_http = start.slots + 4
    params.ctx_shift = True
    params.embedding = start.embeds
    if start.pooling == "last":
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    if start.threads:
        params.cpuparams.n_threads = start.threads
        params.cpuparams_batch.n_threads = start.threads
    params.warmup = False
    # Else it would keep up to 8 GiB of finished conversations, which nothing here counts.
    params.cache_ram_mib = 0
    params.fit_params = False  # a model that does not fit is to fail, not to become slow
    params.ui = False
    params.offline = True
    params.verbosity = 2  # errors and warnings
    return xllamacpp.Server(params)


def _computed_at_once(xllamacpp: Any, start: EngineStart) -> int:
    """Accelerators need large batches to be fast, and compute single tokens in another way
    whatever the batch is."""
    kinds = {device["type"].name for device in xllamacpp.get_device_info()}
    accelerated = start.gpu_layers and any(kind.endswith("GPU") for kind in kinds)
    return start.batch if accelerated else min(start.batch, _EXACT_BATCH)


def _received(lifeline: socket.socket) -> EngineStart:
    decoder = FrameDecoder(max_bytes=MESSAGE_BYTES_MAX)
    while data := lifeline.recv(65_536):
        for frame in decoder.feed(data):
            return TO_ENGINE.decode(frame)
    os._exit(0)


def _send(lifeline: socket.socket, message: EngineReady | EngineFailed) -> None:
    with suppress(OSError):
        lifeline.sendall(encode_frame(FROM_ENGINE.encode(message), max_bytes=MESSAGE_BYTES_MAX))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

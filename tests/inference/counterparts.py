"""Real servers on loopback, in processes of their own: Ollama, and llama.cpp's own server."""

import hashlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.content.model_files import real_model
from tests.inference.real_model import MODEL

LLAMA_SERVER = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], 0, ["127.0.0.1"]
params.model_alias = [sys.argv[2]]
params.n_ctx, params.n_parallel, params.warmup, params.ui = 1024, 2, False, False
params.n_batch = params.n_ubatch = 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_ram_mib, params.verbosity = 0, 1
if sys.argv[3] == "embeds":
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
if sys.argv[4:]:
    params.api_keys = [sys.argv[4]]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(*, embeds: bool = False, key: str = "") -> Iterator[str]:
    """llama.cpp's server with SmolLM2, and its URL, `/v1` included."""
    kind = "embeds" if embeds else "answers"
    process = subprocess.Popen(
        [sys.executable, "-c", LLAMA_SERVER, str(real_model()), MODEL, kind, *filter(None, [key])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            assert address, "llama.cpp's server did not start"
            yield f"{address}/v1"
        finally:
            process.kill()


def ollama_program() -> str:
    """A real Ollama; `go install github.com/ollama/ollama@v0.6.5` builds one with cgo alone."""
    building = os.environ.get("TESTS_OLLAMA_BUILD", "")
    if building:
        _wait_for_process(int(building))
    found = shutil.which("ollama", path=f"{os.environ['PATH']}:{Path.home()}/go/bin")
    if found is None:
        reason = "needs ollama: go install github.com/ollama/ollama@v0.6.5"
        pytest.skip(f"{NOT_BUILT}{reason}" if building else reason)
    return found


NOT_BUILT = "could not be built here: "
"""Of a counterpart that CI tried to build: the one reason for which it may skip (conftest)."""


def _wait_for_process(pid: int) -> None:
    """Until it has ended, BUILD_S at the most; at once if it is not there any more."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [], BUILD_S)
    finally:
        os.close(descriptor)


BUILD_S = 900.0


@contextmanager
def ollama_server(folder: Path) -> Iterator[str]:
    """A real Ollama with SmolLM2, and its URL."""
    program = ollama_program()
    address = f"127.0.0.1:{_free_port()}"
    process = subprocess.Popen(
        [program, "serve"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "HOME": str(folder),
            "OLLAMA_HOST": address,
            "OLLAMA_MODELS": str(folder / "ollama"),
            "OLLAMA_CONTEXT_LENGTH": "512",
            "OLLAMA_NUM_PARALLEL": "2",
        },
    )
    with process:
        try:
            _until_up(f"http://{address}")
            _give_model(f"http://{address}")
            yield f"http://{address}"
        finally:
            process.terminate()  # it ends its own runner then


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_up(url: str) -> None:
    while True:
        try:
            urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.05)
        else:
            return


def _give_model(url: str) -> None:
    data = real_model().read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    _post(f"{url}/api/blobs/{digest}", data)
    body = {"model": MODEL, "files": {"model.gguf": digest}, "stream": False}
    _post(f"{url}/api/create", json.dumps(body).encode())


def _post(url: str, data: bytes) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data=data, method="POST")) as answer:
        assert answer.status in (200, 201)

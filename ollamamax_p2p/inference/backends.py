"""Opens the back ends that a node is set to have."""

import importlib.util
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager

from ollamamax_p2p.content import BlobStore, DiskStore
from ollamamax_p2p.errors import BadConfig
from ollamamax_p2p.inference.backend import Backend
from ollamamax_p2p.inference.embedded import open_embedded
from ollamamax_p2p.inference.http_client import host_and_port
from ollamamax_p2p.inference.ollama import DEFAULT_URL, open_ollama
from ollamamax_p2p.inference.openai_compatible import open_openai
from ollamamax_p2p.inference.settings import InferenceSettings

log = logging.getLogger(__name__)

AUTO = "auto"


def engine_is_installed() -> bool:
    """Whether llama.cpp is there; it is looked for, not loaded."""
    return importlib.util.find_spec("xllamacpp") is not None


@asynccontextmanager
async def open_backends(
    settings: InferenceSettings, store: BlobStore, *, own_addresses: Collection[str] = ()
) -> AsyncIterator[tuple[Backend, ...]]:
    """Every back end of a node for as long as the block is open; may be none.

    own_addresses: host:port where this node itself answers as an Ollama: it must not take itself
    for one. Raises BadConfig.
    """
    async with AsyncExitStack() as stack:
        backends: list[Backend] = []
        if settings.embedded and isinstance(store, DiskStore):
            if engine_is_installed():
                backends.append(await stack.enter_async_context(open_embedded(store, settings)))
            else:
                log.info(
                    "no embedded engine: llama.cpp is not installed; "
                    "pip install 'ollamamax-p2p[engine]' brings it"
                )
        if url := _ollama_url(settings.ollama_url, own_addresses):
            maybe = settings.ollama_url == AUTO
            ollama = open_ollama(settings, url, maybe=maybe)
            backends.append(await stack.enter_async_context(ollama))
        for server in settings.openai:
            backends.append(await stack.enter_async_context(open_openai(server, settings)))
        names = [backend.name for backend in backends]
        for name in names:
            if names.count(name) > 1:
                raise BadConfig("inference.openai", f"two back ends are called {name!r}; name one")
        yield tuple(backends)


def _ollama_url(told: str, own_addresses: Collection[str]) -> str:
    """Where the Ollama is; "" for none."""
    url = DEFAULT_URL if told == AUTO else told
    if not url:
        return ""
    if _is_own(host_and_port(url), own_addresses):
        if told != AUTO:
            raise BadConfig("inference.ollama_url", f"{url} is this node itself")
        return ""
    return url


def _is_own(address: str, own_addresses: Collection[str]) -> bool:
    """Whether both are this machine, on the same port."""
    host, _, port = address.rpartition(":")
    local = {"127.0.0.1", "localhost", "[::1]", "::1", "0.0.0.0", "[::]"}
    for own in own_addresses:
        own_host, _, own_port = own.rpartition(":")
        if port == own_port and (host == own_host or {host, own_host} <= local):
            return True
    return False

"""An origin in memory, with faults to order."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest, digest_of, short
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.errors import ModelNotFound, OriginUnavailable
from ollamamax_p2p.transfer import PullProgress, PushReport


class RamOrigin:
    """Serves blobs at a rate; each range may be made to fail or lie."""

    def __init__(self, *blobs: bytes, bytes_s: float = 10e6) -> None:
        self.blobs: dict[Digest, bytes] = {digest_of(blob): blob for blob in blobs}
        self.manifests: dict[str, Manifest] = {}
        self.bytes_s = bytes_s
        self.bytes_sent = 0
        self.ranges = 0
        self.failures = 0
        """So many of the next long ranges end in the middle."""
        self.lies = 0
        """So many of the next ranges are zeros."""

    async def manifest(self, name: ModelName, *, insecure: bool = False) -> Manifest:
        await trio.sleep(0.05)
        if name.key not in self.manifests:
            raise ModelNotFound(str(name))
        return self.manifests[name.key]

    @asynccontextmanager
    async def fetch_range(
        self, name: ModelName, digest: Digest, start: int, end: int, *, insecure: bool = False
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        self.ranges += 1
        await trio.sleep(0.05)
        data = self.blobs[digest][start:end]
        if self.lies:
            self.lies -= 1
            data = bytes(len(data))
        fails = self.failures > 0 and len(data) > 1_000_000
        self.failures -= fails

        async def parts() -> AsyncIterator[bytes]:
            for at in range(0, len(data), 100_000):
                part = data[at : at + 100_000]
                await trio.sleep(len(part) / self.bytes_s)
                if fails and at >= len(data) // 2:
                    raise OriginUnavailable("https://origin.test", "the connection broke")
                self.bytes_sent += len(part)
                yield part

        yield parts()

    async def push(
        self,
        name: ModelName,
        manifest: Manifest,
        store: BlobStore,
        *,
        insecure: bool = False,
        on_progress: Callable[[PullProgress], None] = lambda _: None,
    ) -> PushReport:
        for digest, size in manifest.blobs():
            async with await store.open(digest) as reader:
                self.blobs[digest] = await reader.read_at(0, size)
            status = f"pushing {short(digest)}"
            on_progress(PullProgress(status=status, digest=digest, total=size, completed=size))
        self.manifests[name.key] = manifest
        on_progress(PullProgress(status="success"))
        return PushReport(
            model=str(name),
            manifest_digest=manifest.digest,
            bytes_total=manifest.size,
            bytes_sent=manifest.size,
            seconds=1.0,
        )


class DeadOrigin(RamOrigin):
    """Has a name for everything that it was given, and cannot be reached for a single byte."""

    @asynccontextmanager
    async def fetch_range(
        self, name: ModelName, digest: Digest, start: int, end: int, *, insecure: bool = False
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        self.ranges += 1
        raise OriginUnavailable("https://origin.test", "cannot look up origin.test")
        yield

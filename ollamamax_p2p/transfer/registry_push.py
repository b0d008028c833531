"""Push: give a registry the blobs of a model that it lacks, then the manifest.

Each blob: HEAD (is it there?), POST `uploads/` (perhaps it can be mounted from another repository
there), PATCH part by part, PUT with its digest. A registry may send the part elsewhere, to its
object store, by a 307; then the bytes go there and no proof of who we are goes with them. What a
broken-off part has left there is asked for and not sent again. Ollama's registry and Docker's
`distribution` both speak this.
Source: OCI distribution specification 1.1, "Push"; Ollama's server/upload.go for 307 and etag.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
import trio

from ollamamax_p2p.content import BlobReader, BlobStore
from ollamamax_p2p.content.core.digest import Digest, short
from ollamamax_p2p.content.core.manifest import MANIFEST_TYPE, Layer, Manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import BadName, BlobNotFound, OriginRefused, OriginUnavailable
from ollamamax_p2p.transfer.http_client import HttpAnswer
from ollamamax_p2p.transfer.outbound_addresses import WebUrl
from ollamamax_p2p.transfer.progress import PullProgress, PushReport
from ollamamax_p2p.transfer.registry_requests import (
    Place,
    Requests,
    Retries,
    TryAgain,
    Upload,
    place_of,
)
from ollamamax_p2p.transfer.settings import OriginSettings

PART_BYTES_MIN = 100_000_000
PART_BYTES_MAX = 1_000_000_000
PARTS = 16
"""Ollama's registry gets the parts that Ollama would send it."""

SENT_AT_ONCE = 256 * 1024
"""Read from the store and handed to the socket."""

PROGRESS_INTERVAL_S = 0.1
"""Ten states a second look smooth and cost little."""

_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})\Z")

OnProgress = Callable[[PullProgress], None]


class RegistryPush:
    """One model on its way to a registry."""

    def __init__(
        self,
        requests: Requests,
        settings: OriginSettings,
        rng: random.Random,
        store: BlobStore,
        on_progress: OnProgress,
    ) -> None:
        self._requests, self._settings, self._rng = requests, settings, rng
        self._store = store
        self._on_progress = on_progress
        self._sent = 0
        self._told_at = -float("inf")

    async def run(self, name: ModelName, manifest: Manifest, *, insecure: bool) -> PushReport:
        """Raises BadName, BlobNotFound, OriginUnavailable, OriginRefused."""
        began = trio.current_time()
        place = place_of(name, self._settings, insecure=insecure)
        done: set[Digest] = set()
        for layer in (*manifest.layers, manifest.config):
            if layer.digest not in done:
                await self._push(_BlobPush(place, layer))
                done.add(layer.digest)
        self._on_progress(PullProgress(status="pushing manifest"))
        await self._push_manifest(place, manifest)
        self._on_progress(PullProgress(status="success"))
        return PushReport(
            model=str(name),
            manifest_digest=manifest.digest,
            bytes_total=manifest.size,
            bytes_sent=self._sent,
            seconds=trio.current_time() - began,
        )

    async def _push(self, blob: "_BlobPush") -> None:
        retries, furthest = Retries(self._settings, self._rng), 0
        while True:
            try:
                return await self._push_once(blob)
            except TryAgain as trouble:
                if blob.at > furthest:  # it goes forward: the tries are for one place, not for all
                    retries, furthest = Retries(self._settings, self._rng), blob.at
                await trio.sleep(retries.wait_s(trouble))

    # -- one blob ------------------------------------------------------------------------------

    async def _push_once(self, blob: "_BlobPush") -> None:
        self._tell(blob, always=True)
        if blob.session is not None and blob.is_torn:
            blob.session = await self._find_place(blob, blob.session)
        if blob.session is None and (await self._is_there(blob) or await self._begin(blob)):
            blob.at = blob.layer.size
            self._tell(blob, always=True)
            return
        part_bytes = _part_bytes(blob.layer.size)
        async with await self._store.open(blob.layer.digest) as reader:
            if reader.size != blob.layer.size:
                raise BlobNotFound(blob.layer.digest)
            while blob.at < blob.layer.size:
                end = min(blob.at + part_bytes, blob.layer.size)
                await self._send_part(blob, reader, end)
        await self._finish(blob)
        self._tell(blob, always=True)

    async def _is_there(self, blob: "_BlobPush") -> bool:
        url = blob.place.url("blobs", blob.layer.digest)
        answer, url = await self._requests.ask(blob.place, url, {}, "HEAD")
        await answer.aclose()
        if answer.status not in (200, 404):
            await self._requests.raise_status(answer, url, blob.place, _no_repository(url))
        return answer.status == 200

    async def _begin(self, blob: "_BlobPush") -> bool:
        """Open an upload; True if the registry had the blob elsewhere, and needs none."""
        query = _mount(blob)
        url = blob.place.url("blobs", f"uploads/{query}")
        answer, url = await self._requests.ask(blob.place, url, {}, "POST", _NOTHING)
        try:
            if answer.status == 201 and query:
                return True
            if answer.status not in (201, 202):
                await self._refused(answer, url, blob)
            blob.session = self._next_url(answer, url)
            blob.at, blob.is_torn, blob.part_hashes = 0, False, []
        finally:
            await answer.aclose()
        return False

    async def _find_place(self, blob: "_BlobPush", session: WebUrl) -> WebUrl | None:
        """Where a broken-off upload goes on, and with which byte; None if that cannot be told."""
        answer, url = await self._requests.ask(blob.place, session, {})
        await answer.aclose()
        held = _RANGE.match(answer.header("range"))
        # 0-0 is said of one byte and of none.
        if held is None or answer.status not in (200, 204) or int(held[1]) == 0:
            return None
        if int(held[1]) >= blob.layer.size:
            return None
        blob.at, blob.is_torn, blob.in_whole_parts = int(held[1]) + 1, False, False
        return self._next_url(answer, url) if answer.header("location") else session

    async def _send_part(self, blob: "_BlobPush", reader: BlobReader, end: int) -> None:
        assert blob.session is not None
        start, blob.is_torn = blob.at, True

        def parts(goes_on: Callable[[], None]) -> _Parts:
            def asked(at: int) -> None:
                goes_on()
                self._tell(blob, at)

            blob.sending = _Parts(reader, start, end, asked)
            return blob.sending

        upload = Upload(end - start, parts)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{start}-{end - 1}",
            "X-Redirect-Uploads": "1",
        }
        answer, url = await self._requests.ask(blob.place, blob.session, headers, "PATCH", upload)
        try:
            if answer.status == 307:
                blob.session = self._next_url(answer, url, "docker-upload-location")
                await self._send_elsewhere(blob, answer, url, upload)
            elif answer.status in (200, 201, 202, 204):
                blob.session = self._next_url(answer, url)
            else:
                await self._refused(answer, url, blob)
        finally:
            await answer.aclose()
        blob.at, blob.is_torn = end, False
        self._sent += end - start
        assert blob.sending is not None
        blob.part_hashes.append(blob.sending.hashing.digest())

    async def _send_elsewhere(
        self, blob: "_BlobPush", answer: HttpAnswer, url: WebUrl, upload: Upload
    ) -> None:
        target = self._requests.leads_to(answer.header("location"), url)
        headers = {"Content-Type": "application/octet-stream"}
        placed, where = await self._requests.ask(blob.place, target, headers, "PUT", upload)
        try:
            if placed.status not in (200, 201, 204):
                await self._refused(placed, where, blob)
        finally:
            await placed.aclose()

    async def _finish(self, blob: "_BlobPush") -> None:
        assert blob.session is not None
        query = f"digest={blob.layer.digest}"
        if blob.in_whole_parts and blob.part_hashes:
            whole = hashlib.md5(b"".join(blob.part_hashes), usedforsecurity=False).hexdigest()
            query += f"&etag={whole}-{len(blob.part_hashes)}"
        blob.is_torn = True
        url = _with_query(blob.session, query)
        answer, url = await self._requests.ask(blob.place, url, {}, "PUT", _NOTHING)
        try:
            if answer.status not in (200, 201, 204):
                await self._refused(answer, url, blob)
        finally:
            await answer.aclose()

    async def _refused(self, answer: HttpAnswer, url: WebUrl, blob: "_BlobPush") -> None:
        if answer.status in (404, 416) and blob.session is not None:
            blob.session = None
            raise TryAgain(url, f"answered {answer.status} to a part of {blob.layer.digest}")
        await self._requests.raise_status(answer, url, blob.place, _no_repository(url))

    def _next_url(self, answer: HttpAnswer, url: WebUrl, *names: str) -> WebUrl:
        """Where the upload goes on."""
        for name in (*names, "docker-upload-location", "location"):
            if answer.header(name):
                return self._requests.leads_to(answer.header(name), url)
        raise OriginUnavailable(str(url), "does not say where the upload goes on")

    # -- the manifest, telling -----------------------------------------------------------------

    async def _push_manifest(self, place: Place, manifest: Manifest) -> None:
        retries = Retries(self._settings, self._rng)
        while True:
            try:
                return await self._put_manifest(place, manifest)
            except TryAgain as trouble:
                await trio.sleep(retries.wait_s(trouble))

    async def _put_manifest(self, place: Place, manifest: Manifest) -> None:
        url = place.url("manifests", place.name.tag)
        headers = {"Content-Type": _media_type(manifest)}
        upload = Upload(len(manifest.raw), lambda _: _Once(manifest.raw))
        answer, url = await self._requests.ask(place, url, headers, "PUT", upload)
        try:
            if answer.status not in (200, 201, 202, 204):
                await self._requests.raise_status(answer, url, place, _no_repository(url))
        finally:
            await answer.aclose()

    def _tell(self, blob: "_BlobPush", at: int | None = None, *, always: bool = False) -> None:
        now = trio.current_time()
        if not always and now < self._told_at + PROGRESS_INTERVAL_S:
            return
        self._told_at = now
        self._on_progress(
            PullProgress(
                status=f"pushing {short(blob.layer.digest)}",
                digest=blob.layer.digest,
                total=blob.layer.size,
                completed=blob.at if at is None else at,
            )
        )


@dataclass(slots=True, eq=False)
class _BlobPush:
    """A blob on its way."""

    place: Place
    layer: Layer
    session: WebUrl | None = None
    """Where the upload goes on; None before it has begun, and when the registry has lost it."""
    at: int = 0
    """So much is there for certain."""
    is_torn: bool = False
    """A part was begun, and it is not known how much of it is there."""
    in_whole_parts: bool = True
    part_hashes: list[bytes] = field(default_factory=list)
    sending: "_Parts | None" = None


class _Parts:
    """A range of a blob as a body; `hashing` is the MD5 of what was given out."""

    def __init__(
        self, reader: BlobReader, start: int, end: int, asked: Callable[[int], None]
    ) -> None:
        self._reader, self._at, self._end, self._asked = reader, start, end, asked
        self.hashing = hashlib.md5(usedforsecurity=False)  # a name, as S3 gives to parts

    def __aiter__(self) -> "_Parts":
        return self

    async def __anext__(self) -> bytes:
        self._asked(self._at)
        length = min(SENT_AT_ONCE, self._end - self._at)
        if not length:
            raise StopAsyncIteration
        part = await self._reader.read_at(self._at, length)
        self._at += length
        self.hashing.update(part)
        return part


class _Once:
    """Bytes as a body."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __aiter__(self) -> "_Once":
        return self

    async def __anext__(self) -> bytes:
        data, self._data = self._data, b""
        if not data:
            raise StopAsyncIteration
        return data


_NOTHING = Upload(0, lambda _: _Once(b""))


def _part_bytes(size: int) -> int:
    return min(max(size // PARTS, PART_BYTES_MIN), PART_BYTES_MAX)


def _mount(blob: _BlobPush) -> str:
    """Asks for the blob of the repository that the layer was taken from, if that is there too."""
    try:
        source = parse_model_name(blob.layer.source)
    except BadName:
        return ""
    if source.host != blob.place.name.host:
        return ""
    return f"?mount={blob.layer.digest}&from={source.namespace}/{source.model}"


def _with_query(url: WebUrl, query: str) -> WebUrl:
    return replace(url, target=f"{url.target}{'&' if '?' in url.target else '?'}{query}")


def _no_repository(url: WebUrl) -> OriginRefused:
    return OriginRefused(str(url), "answered 404; is there such a repository?", 404)


class _ManifestHead(msgspec.Struct):
    mediaType: str = ""


def _media_type(manifest: Manifest) -> str:
    return msgspec.json.decode(manifest.raw, type=_ManifestHead).mediaType or MANIFEST_TYPE

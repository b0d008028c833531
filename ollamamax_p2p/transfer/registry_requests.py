"""One request to a registry at a time: redirects, challenges, retries, and what an answer must be.

`registry_origin` fetches with it and `registry_push` uploads. What comes back is not trusted: no
answer may be compressed, each must arrive at a rate; redirects are followed within bounds and never
from https to http; proof of who we are goes to the registry's own scheme, host and port only and,
once a redirect has left it, no more.
"""

import random
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NoReturn, TypeVar

import msgspec
import trio

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.manifest import MANIFEST_BYTES_MAX
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.errors import (
    BadName,
    BlobNotFound,
    ModelNotFound,
    OmxError,
    OriginRefused,
    OriginUnavailable,
)
from ollamamax_p2p.transfer.http_client import (
    HttpAnswer,
    HttpClient,
    HttpTrouble,
    as_unavailable,
    open_http_client,
)
from ollamamax_p2p.transfer.outbound_addresses import (
    Resolver,
    WebUrl,
    host_listed,
    parse_url,
)
from ollamamax_p2p.transfer.registry_auth import (
    TOKEN_ANSWER_BYTES_MAX,
    SigningKey,
    basic_authorization,
    names,
    parse_challenges,
    read_token,
    token_requests,
)
from ollamamax_p2p.transfer.settings import OriginSettings

MANIFEST_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.oci.image.manifest.v1+json"
)

REMEMBERED_MAX = 256
"""Proofs, and places that blobs were redirected to: a pull needs one and a handful."""

EXPLANATION_BYTES_MAX = 8_192
EXPLANATION_CHARS_MAX = 200

_K = TypeVar("_K")
_V = TypeVar("_V")
_REDIRECTS = {301, 302, 303, 307, 308}
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_CONTENT_RANGE = re.compile(r"\Abytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is."""

    name: ModelName
    registry: WebUrl
    """scheme://host/, the only place that is shown proof."""
    repository: str
    """namespace/model."""

    def url(self, kind: str, reference: str) -> WebUrl:
        """Of one of its manifests or blobs."""
        return parse_url(f"/v2/{self.repository}/{kind}/{reference}", base=self.registry)


@dataclass(frozen=True, slots=True)
class Upload:
    """A body to send."""

    length: int
    parts: Callable[[Callable[[], None]], AsyncIterable[bytes]]
    """Makes it anew for each try; calls what it is given before every part."""


class TryAgain(Exception):
    """A request failed in a way that trying again may mend."""

    def __init__(self, url: WebUrl, problem: str, pause_s: float = 0.0) -> None:
        """pause_s: how long the registry asks us to wait."""
        super().__init__(problem)
        self.url, self.problem, self.pause_s = url, problem, pause_s


class Retries:
    """How often, and after which wait, one thing is tried again. Pure."""

    def __init__(self, settings: OriginSettings, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._failed = 0

    def wait_s(self, trouble: TryAgain) -> float:
        """Seconds until the next try. Raises OriginUnavailable when there is to be none."""
        settings = self._settings
        self._failed += 1
        if trouble.pause_s > settings.retry_after_max_s:
            raise OriginUnavailable(
                str(trouble.url),
                f"{trouble.problem} and asks us to wait {trouble.pause_s:.0f} s; try again then",
            )
        if self._failed >= settings.tries:
            times = "once" if self._failed == 1 else f"{self._failed} times"
            raise OriginUnavailable(str(trouble.url), f"{trouble.problem} (tried {times})")
        doubled = settings.backoff_first_s * 2.0 ** min(self._failed - 1, 32)
        backoff = min(doubled, settings.backoff_max_s) * self._rng.uniform(0.5, 1.5)
        return max(backoff, trouble.pause_s)


class Body:
    """An answer's body as it arrives; one that stalls or drips is given up."""

    def __init__(
        self, answer: HttpAnswer, url: WebUrl, settings: OriginSettings, *, exact: bool
    ) -> None:
        """exact: the answer says that it is as long as what is wanted of it."""
        self.url = url
        self._answer, self._settings, self._exact = answer, settings, exact
        self._waited_s, self._bytes = 0.0, 0

    async def part(self) -> bytes:
        """The next bytes; empty at the end. Raises TryAgain."""
        limit_s = self._settings.stall_timeout_s
        began = trio.current_time()
        part = None
        with trio.move_on_after(limit_s):
            try:
                part = await self._answer.read()
            except HttpTrouble as trouble:
                raise TryAgain(self.url, str(trouble)) from None
        if part is None:
            raise TryAgain(self.url, f"sent nothing for {limit_s:g} s")
        # Only our waiting counts, not what the reader does between two parts.
        self._waited_s += trio.current_time() - began
        self._bytes += len(part)
        if self._waited_s >= limit_s:
            self._judge_rate()
        return part

    async def finish(self) -> None:
        """All that is wanted is here: leave the connection usable for the next request."""
        if self._exact:
            await self.part()

    async def aclose(self) -> None:
        """Read no more."""
        await self._answer.aclose()

    def _judge_rate(self) -> None:
        rate = self._bytes / self._waited_s
        if rate < self._settings.slowest_bytes_per_s:
            raise TryAgain(self.url, f"sends only {rate:.0f} bytes per second")
        self._waited_s, self._bytes = 0.0, 0


class Requests:
    """One request at a time to a registry: redirects, challenges, and what an answer must be."""

    def __init__(
        self,
        settings: OriginSettings,
        http: "LateClient",
        node_key: SigningKey | None,
        user_agent: str,
    ) -> None:
        self._settings, self._http = settings, http
        self._node_key, self._user_agent = node_key, user_agent
        self._proofs: OrderedDict[tuple[WebUrl, str], str] = OrderedDict()
        # Where a registry sent us for a blob. Asking it again for each range of a large blob would
        # be thousands of requests that all bring the same answer.
        self._elsewhere: OrderedDict[tuple[WebUrl, Digest], WebUrl] = OrderedDict()

    async def manifest(self, place: Place) -> bytes:
        """A manifest's bytes. Raises TryAgain and what Origin says."""
        url = place.url("manifests", place.name.tag)
        answer, url = await self.ask(place, url, {"Accept": MANIFEST_TYPES})
        try:
            if answer.status != 200:
                await self.raise_status(answer, url, place, ModelNotFound(str(place.name)))
            _require_plain(answer, url)
            return await self._whole(answer, url, MANIFEST_BYTES_MAX)
        finally:
            await answer.aclose()

    async def blob(self, place: Place, digest: Digest, start: int, end: int) -> Body:
        """The body with a blob's bytes [start, end). Raises TryAgain and what Origin says."""
        key = place.registry, digest
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept": "application/octet-stream, */*"}
        known = self._elsewhere.pop(key, None)
        answer, url = await self.ask(place, known or place.url("blobs", digest), headers)
        if known is not None and answer.status not in (200, 206):
            # Such places expire; the registry names a new one.
            await answer.aclose()
            answer, url = await self.ask(place, place.url("blobs", digest), headers)
        try:
            if answer.status not in (200, 206):
                await self.raise_status(answer, url, place, BlobNotFound(digest))
            _require_plain(answer, url)
            exact = _require_range(answer, url, start, end)
        except BaseException:
            await answer.aclose()
            raise
        if url.origin != place.registry.origin:
            _remember(self._elsewhere, key, url)
        return Body(answer, url, self._settings, exact=exact)

    async def ask(
        self,
        place: Place,
        url: WebUrl,
        headers: Mapping[str, str],
        method: str = "GET",
        upload: Upload | None = None,
    ) -> tuple[HttpAnswer, WebUrl]:
        """Ask, through one challenge; the answer and where it came from. Redirects are followed for
        what only reads; where an upload is sent to is its sender's to decide.
        """
        follows = method in ("GET", "HEAD")
        at_home, challenged, redirects = url.origin == place.registry.origin, False, 0
        key = place.registry, place.repository
        while True:
            proof = {"Authorization": self._proofs[key]} if at_home and key in self._proofs else {}
            answer = await self._send(url, {**headers, **proof}, method, upload)
            if follows and answer.status in _REDIRECTS:
                await answer.aclose()
                redirects += 1
                if redirects > self._settings.redirects_max:
                    raise OriginUnavailable(str(url), "redirects us too often")
                url = self.leads_to(answer.header("location"), url)
                # For good: a redirect that comes back is one that a stranger chose.
                at_home = at_home and url.origin == place.registry.origin
            elif answer.status == 401 and at_home and not challenged:
                await answer.aclose()
                challenged = True
                self._proofs.pop(key, None)
                _remember(self._proofs, key, await self._proof(answer, url))
            else:
                return answer, url

    async def _send(
        self,
        url: WebUrl,
        headers: Mapping[str, str],
        method: str = "GET",
        upload: Upload | None = None,
    ) -> HttpAnswer:
        """One request, no further than the head of its answer. Raises TryAgain."""
        http = await self._http.opened()
        limit_s = self._settings.answer_timeout_s
        with trio.move_on_after(limit_s) as scope:

            def goes_on() -> None:
                """Another part is asked for: the time counts from here again."""
                scope.deadline = trio.current_time() + limit_s

            try:
                sent = {"User-Agent": self._user_agent, **headers}
                if upload is not None:
                    sent["Content-Length"] = str(upload.length)
                parts = upload.parts(goes_on) if upload else None
                return await http.ask(method, url, sent, parts)
            except HttpTrouble as trouble:
                if trouble.final:
                    raise as_unavailable(url, trouble) from None
                raise TryAgain(url, str(trouble)) from None
        raise TryAgain(url, f"did not answer within {limit_s:g} s")

    def leads_to(self, location: str, url: WebUrl) -> WebUrl:
        """Where an answer from url sends us. Raises OriginUnavailable if we do not go there."""
        try:
            target = parse_url(location, base=url)
        except ValueError as error:
            raise OriginUnavailable(str(url), f"redirects us to {error}") from None
        if target.scheme == "http" and url.scheme == "https":
            raise OriginUnavailable(
                str(url), f"redirects us from https to plain http ({target}), which is refused"
            )
        listed = host_listed(target.host, target.port, self._settings.insecure)
        if target.scheme == "http" and target.origin != url.origin and not listed:
            raise OriginUnavailable(
                str(url),
                f"redirects us to {target} by plain http; if that is meant, "
                f'add "{target.authority}" to origin.insecure',
            )
        return target

    async def _proof(self, answer: HttpAnswer, url: WebUrl) -> str:
        """The Authorization header that a 401 asks for."""
        challenges = parse_challenges(answer.headers.get("www-authenticate", []))
        credentials = self._credentials(url)
        for challenge in challenges:
            if challenge.scheme == "bearer":
                asked = token_requests(
                    challenge,
                    registry=url,
                    credentials=credentials,
                    key=self._node_key,
                    token_hosts=self._settings.token_hosts,
                    timestamp=int(datetime.now(UTC).timestamp()),
                    nonce=secrets.token_bytes(16),
                )
                for request in asked:
                    if (token := await self._token(request.url, request.headers)) is not None:
                        return f"Bearer {token}"
                _refuse_login(url, has_credentials=credentials is not None)
        if credentials is not None and any(each.scheme == "basic" for each in challenges):
            return basic_authorization(credentials)
        _refuse_login(url, has_credentials=False)

    async def _token(self, url: WebUrl, headers: Mapping[str, str]) -> str | None:
        """A token, or None if the service says no. It is not followed anywhere else."""
        answer = await self._send(url, {"Accept": "application/json", **headers})
        try:
            if answer.status in _TRY_AGAIN:
                raise TryAgain(url, f"answered {answer.status}", _pause_s(answer))
            if answer.status in (400, 401, 403, 404):
                return None
            if answer.status != 200:
                raise OriginUnavailable(
                    str(url), f"the token service answered {answer.status}, which makes no sense"
                )
            _require_plain(answer, url)
            return read_token(await self._whole(answer, url, TOKEN_ANSWER_BYTES_MAX), url=url)
        finally:
            await answer.aclose()

    async def _whole(self, answer: HttpAnswer, url: WebUrl, limit: int) -> bytes:
        body = Body(answer, url, self._settings, exact=True)
        whole = bytearray()
        while part := await body.part():
            whole += part
            if len(whole) > limit:
                raise OriginUnavailable(str(url), f"the answer is longer than {limit:,} bytes")
        return bytes(whole)

    async def raise_status(
        self, answer: HttpAnswer, url: WebUrl, place: Place, missing: OmxError
    ) -> NoReturn:
        """What an answer that is not a success means."""
        status = answer.status
        if status == 404:
            raise missing
        if status in _TRY_AGAIN:
            raise TryAgain(url, f"answered {status}", _pause_s(answer))
        if status == 401 and url.origin == place.registry.origin:
            _refuse_login(url, has_credentials=self._credentials(url) is not None)
        if status == 416:
            raise OriginUnavailable(str(url), "says that the blob is shorter than its manifest")
        if not 400 <= status < 500:
            raise OriginUnavailable(str(url), f"answered {status}, which makes no sense here")
        explained = await self._explanation(answer, url, place)
        raise OriginRefused(str(url), f"answered {status}{explained}", status)

    async def _explanation(self, answer: HttpAnswer, url: WebUrl, place: Place) -> str:
        """What a registry says about its no: hf.co tells there that a repository has no GGUF."""
        try:
            raw = await self._whole(answer, url, EXPLANATION_BYTES_MAX)
            said = msgspec.json.decode(raw, type=_RegistryError).text()
        except (
            TryAgain,
            OriginUnavailable,
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,  # JSON that is deep enough
        ):
            return ""
        proof = self._proofs.get((place.registry, place.repository), "")
        known = [proof.partition(" ")[2], *(self._credentials(url) or "").split(":", 1)[1:]]
        if not said or any(secret and secret in said for secret in known):
            return ""
        clean = "".join(char if char.isprintable() else " " for char in said)
        return f": {clean[:EXPLANATION_CHARS_MAX]}"

    def _credentials(self, url: WebUrl) -> str | None:
        return next(
            (secret for host, secret in self._settings.credentials.items() if names(host, url)),
            None,
        )


class LateClient:
    """The HTTP client, opened by the first request: a swarm may never ask an origin."""

    def __init__(
        self,
        stack: AsyncExitStack,
        settings: OriginSettings,
        resolve: Resolver,
        environ: Mapping[str, str],
    ) -> None:
        self._stack, self._settings = stack, settings
        self._resolve, self._environ = resolve, environ
        self._opening = trio.Lock()
        self._client: HttpClient | None = None

    async def opened(self) -> HttpClient:
        """The client."""
        async with self._opening:
            if self._client is None:
                self._client = await self._stack.enter_async_context(
                    open_http_client(
                        allow_private=self._settings.allow_private,
                        resolve=self._resolve,
                        environ=self._environ,
                    )
                )
        return self._client


class _RegistryMessage(msgspec.Struct):
    message: str = ""


class _RegistryError(msgspec.Struct):
    """`{"error": "…"}` as Ollama's and hf.co's, `{"errors": [{"message": "…"}]}` as OCI's."""

    error: str = ""
    errors: list[_RegistryMessage] = []

    def text(self) -> str:
        return self.error or (self.errors[0].message if self.errors else "")


def place_of(name: ModelName, settings: OriginSettings, *, insecure: bool) -> Place:
    """Where a name's registry is; http only if that was allowed for it. Raises BadName."""
    try:
        secure = parse_url(f"https://{name.host}/")
        plain = parse_url(f"http://{name.host}/")
    except ValueError:
        raise BadName(str(name), f"{name.host!r} is not a host that can be asked") from None
    by_http = insecure or host_listed(plain.host, plain.port, settings.insecure)
    return Place(name, plain if by_http else secure, f"{name.namespace}/{name.model}")


def _require_plain(answer: HttpAnswer, url: WebUrl) -> None:
    """Bytes must come as they are: unpacking a stranger's bytes is how small answers fill memory,
    and a range of a packed blob is not a range of the blob.
    """
    encoding = ", ".join(answer.headers.get("content-encoding", [])).strip().lower()
    if encoding not in ("", "identity"):
        raise OriginUnavailable(str(url), f"sent the answer {encoding}-compressed, which we refuse")


def _require_range(answer: HttpAnswer, url: WebUrl, start: int, end: int) -> bool:
    """Check that an answer is bytes [start, end), or begins with them; whether it says exactly.

    A 200, the whole blob, is taken when its beginning is what is wanted: the rest is not read.
    """
    length = answer.header("content-length")
    if answer.status == 200:
        if start > 0:
            raise OriginUnavailable(
                str(url), "sends the whole blob when asked for a part, so it cannot be a source"
            )
        if length.isdecimal() and len(length) < 20 and int(length) < end:
            raise OriginUnavailable(str(url), f"has only {length} of {end} bytes of the blob")
        return length == str(end)
    match = _CONTENT_RANGE.match(answer.header("content-range"))
    if match is None or (int(match[1]), int(match[2])) != (start, end - 1):
        raise OriginUnavailable(str(url), "sends another range than the one it was asked for")
    if length and length != str(end - start):
        raise OriginUnavailable(str(url), f"sends {length} bytes when asked for {end - start}")
    return bool(length)


def _pause_s(answer: HttpAnswer) -> float:
    """Retry-After in seconds, given either way; 0 if it is missing or not understood."""
    text = answer.header("retry-after").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        aware = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0.0, (aware - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):  # the second for years and zones beyond any calendar
        return 0.0


def _refuse_login(url: WebUrl, *, has_credentials: bool) -> NoReturn:
    if has_credentials:
        problem = f'does not take the user and password of origin.credentials."{url.authority}"'
    else:
        problem = (
            "wants to know who asks; set user:password for "
            f'"{url.authority}" in origin.credentials, or check the model\'s name'
        )
    raise OriginRefused(str(url), problem, 401)


def _remember(kept: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > REMEMBERED_MAX:
        kept.popitem(last=False)

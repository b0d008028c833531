"""Ollama's endpoints about what is stored: tags, show, pull, push, create, blobs, copy, delete; and
those that only Ollama's cloud could answer, answered as Ollama does whose cloud is off.

They need no token: Ollama's have none, and its clients send none. Host and Origin are checked.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import trio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from ollamamax_p2p.api import ollama_store_requests as bodies
from ollamamax_p2p.api.bodies import PullBody
from ollamamax_p2p.api.multipart import read_form
from ollamamax_p2p.api.ollama_framing import (
    CLIENT_CLOSED,
    REQUEST_CANCELED,
    StatusError,
    answer_error,
    error_response,
    json_response,
    read_bytes,
    read_json,
)
from ollamamax_p2p.api.ollama_generation_routes import time_text
from ollamamax_p2p.api.openai_routes import openai_refusal
from ollamamax_p2p.api.progress_lines import ProgressAnswer, watched
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import OnProgress, ServedNode
from ollamamax_p2p.api.shared_pulls import SharedPulls
from ollamamax_p2p.content import ListedModel, ShownDetails, check_creation_request
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.content.core.modelfile import go_quoted
from ollamamax_p2p.errors import (
    BadDigest,
    BadName,
    DigestMismatch,
    ModelNotFound,
    NetworkTrouble,
    OmxError,
)
from ollamamax_p2p.inference import ServableModel
from ollamamax_p2p.transfer import PullProgress

OLLAMA_VERSION = "0.14.0"
"""Whose API this is: clients ask for it and refuse an older one. The first that has all of it but
for what `/api/version` is not asked about; ours is in the header `server` and in /omx/v1/version.
"""

RUNNING = "Ollama is running"
BAD_NAME = "invalid model name"
CLOUD_DISABLED = "ollama cloud is disabled"

PART_TIMEOUT_S = 60.0
"""An upload of which nothing arrives for so long has been given up by its sender."""

DRAINED_S = 5.0
DRAINED_BYTES_MAX = 64 * 1024 * 1024
"""What is taken of a blob that was refused: a disk is full for the largest, which are let go."""


class ListedLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model of /api/tags, in the order of Ollama's struct."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    """Hex digits without the algorithm, as Ollama has it here."""
    details: ShownDetails
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreRoute:
    """One line of the table."""

    method: str
    path: str
    endpoint: str
    """The method of OllamaStoreRoutes that answers."""


STORE_ROUTES = (
    StoreRoute("HEAD", "/", "running"),
    StoreRoute("GET", "/", "running"),
    StoreRoute("HEAD", "/api/version", "version"),
    StoreRoute("GET", "/api/version", "version"),
    StoreRoute("GET", "/api/status", "status"),
    StoreRoute("HEAD", "/api/tags", "tags"),
    StoreRoute("GET", "/api/tags", "tags"),
    StoreRoute("POST", "/api/show", "show"),
    StoreRoute("POST", "/api/pull", "pull"),
    StoreRoute("POST", "/api/push", "push"),
    StoreRoute("POST", "/api/create", "create"),
    StoreRoute("HEAD", "/api/blobs/{digest}", "has_blob"),
    StoreRoute("POST", "/api/blobs/{digest}", "put_blob"),
    StoreRoute("POST", "/api/copy", "copy"),
    StoreRoute("DELETE", "/api/delete", "delete"),
    StoreRoute("POST", "/api/me", "me"),
    StoreRoute("POST", "/api/signout", "sign_out"),
    StoreRoute("DELETE", "/api/user/keys/{key}", "sign_out"),
    StoreRoute("POST", "/api/experimental/web_search", "web_search"),
    StoreRoute("POST", "/api/experimental/web_fetch", "web_fetch"),
    StoreRoute("GET", "/api/experimental/model-recommendations", "recommendations"),
    StoreRoute("POST", "/v1/audio/transcriptions", "transcribe"),
)


class OllamaStoreRoutes:
    """The endpoints over one node and, where it has one, its swarm."""

    def __init__(
        self, node: ServedNode, pulls: SharedPulls, inference: ServedInference | None
    ) -> None:
        self._node, self._pulls, self._inference = node, pulls, inference

    # -- what is here --------------------------------------------------------------------------

    async def running(self, request: Request) -> Response:
        """Clients look for these words."""
        return Response(RUNNING, media_type="text/plain")

    async def version(self, request: Request) -> Response:
        """The version of Ollama whose API this is."""
        return json_response({"version": OLLAMA_VERSION})

    async def status(self, request: Request) -> Response:
        """There is no cloud behind this."""
        return json_response({"cloud": {"disabled": True, "source": "config"}})

    async def tags(self, request: Request) -> Response:
        """Every model of the swarm and of this store, newest first; each name once."""
        found: dict[str, tuple[datetime, ListedLine]] = {}
        for servable in await self._of_swarm():
            written = datetime.fromtimestamp(servable.modified_at, UTC)
            found[servable.name.lower()] = written, _servable_line(servable, written)
        for listed in await self._node.listed_models():  # ours says more about itself
            found[listed.name.lower()] = listed.modified_at, _listed_line(listed)
        newest_first = sorted(found.values(), key=lambda each: each[0], reverse=True)
        return json_response({"models": [line for _, line in newest_first]})

    async def _of_swarm(self) -> list[ServableModel]:
        if self._inference is None:
            return []
        try:
            return [each.model for each in await self._inference.swarm_models()]
        except NetworkTrouble:  # between two swarms there are our own
            return []

    async def show(self, request: Request) -> Response:
        """All that a model says about itself."""
        body = await read_json(request, bodies.ShowRequest, "ShowRequest")
        if not body.named:
            raise StatusError(400, "model is required")
        _parsed(body.named, BAD_NAME)
        try:
            answer = await self._node.show_model(
                body.named,
                verbose=bool(body.verbose),
                system=body.system or "",
                options=body.options,
            )
        except ModelNotFound:
            raise _not_found(body.named) from None
        if answer.remote_host:
            raise StatusError(403, f"{CLOUD_DISABLED}: remote model details are unavailable")
        if body.verbose:  # a vocabulary: others are not to wait while it is written out
            return await trio.to_thread.run_sync(json_response, answer)
        return json_response(answer)

    # -- moving and making models --------------------------------------------------------------

    async def pull(self, request: Request) -> Any:
        """Fetch a model from whoever has it."""
        body = await read_json(request, bodies.TransferRequest, "PullRequest")
        _parsed(body.named, BAD_NAME)
        insecure, stream = bool(body.insecure), body.stream is not False
        if _is_plain_http(body.named) and not insecure:
            return ProgressAnswer(watched(_insecure), stream=stream)
        wanted = PullBody(model=body.named, insecure=insecure)
        return ProgressAnswer(self._pulls.watch(wanted), stream=stream)

    async def push(self, request: Request) -> Any:
        """Give a model to the registry that its name names."""
        body = await read_json(request, bodies.TransferRequest, "PushRequest")
        if not body.named:
            raise StatusError(400, "model is required")
        insecure = bool(body.insecure)

        async def work(tell: OnProgress) -> None:
            if _is_plain_http(body.named) and not insecure:
                tell(PullProgress(status="retrieving manifest"))
                await _insecure(tell)
            try:
                await self._node.push(body.named, insecure=insecure, on_progress=tell)
            except BadName:
                raise StatusError(400, BAD_NAME) from None
            except ModelNotFound:
                raise StatusError(500, f"model '{body.named}' not found") from None

        return ProgressAnswer(watched(work), stream=body.stream is not False)

    async def create(self, request: Request) -> Any:
        """Make a model of another, or of uploaded blobs."""
        body = await read_json(request, bodies.CreateRequest, "CreateRequest")
        asked = body.asked()
        check_creation_request(asked)
        _parsed(body.named, BAD_NAME)

        async def work(tell: OnProgress) -> None:
            await self._node.create_from_request(body.named, asked, on_progress=tell)

        return ProgressAnswer(watched(work), stream=body.stream is not False)

    async def has_blob(self, request: Request) -> Response:
        """Whether a blob is here; the answer has no body, as to any HEAD."""
        digest = request.path_params["digest"]
        try:
            is_here = await self._node.has_blob(digest)
        except BadDigest:
            return error_response(400, "invalid digest format")
        if not is_here:
            return error_response(404, f"blob {go_quoted(digest)} not found")
        return Response(status_code=200)

    async def put_blob(self, request: Request) -> "EarlyAnswer":
        """Take a blob as it arrives: 201 if it is new."""
        body = ArrivingBody(request)
        return EarlyAnswer(await self._put_blob(request, body), body)

    async def _put_blob(self, request: Request, body: "ArrivingBody") -> Response:
        digest = request.path_params["digest"]
        try:
            if await self._node.has_blob(digest):
                return Response(status_code=200)
            async with aclosing(body.parts()) as parts:
                await self._node.put_blob(digest, parts, size=_length(request))
        except BadDigest:
            return error_response(400, "invalid digest format")
        except DigestMismatch as error:
            expected, actual = go_quoted(digest), go_quoted(error.actual)
            return error_response(400, f"digest mismatch, expected {expected}, got {actual}")
        except OmxError as error:  # a full disk, first of all
            return answer_error(error)
        return Response(status_code=201)

    async def copy(self, request: Request) -> Response:
        """Give a model a second name."""
        body = await read_json(request, bodies.CopyRequest, "CopyRequest")
        source, destination = body.source or "", body.destination or ""
        _parsed(source, f"source {go_quoted(source)} is invalid")
        _parsed(destination, f"destination {go_quoted(destination)} is invalid")
        try:
            await self._node.copy(source, destination)
        except ModelNotFound:
            raise StatusError(404, f"model {go_quoted(source)} not found") from None
        return Response(status_code=200)

    async def delete(self, request: Request) -> Response:
        """Remove a name and the blobs that no other needs."""
        body = await read_json(request, bodies.ModelRequest, "DeleteRequest")
        _parsed(body.named, f"name {go_quoted(body.named)} is invalid")
        try:
            await self._node.remove(body.named)
        except ModelNotFound:
            raise _not_found(body.named) from None
        return Response(status_code=200)

    # -- what only the cloud could answer ------------------------------------------------------

    async def me(self, request: Request) -> Response:
        """Nobody has an account here."""
        return error_response(503, "account unavailable")

    async def sign_out(self, request: Request) -> Response:
        """Nobody was signed in."""
        return error_response(401, "you are not currently signed in")

    async def web_search(self, request: Request) -> Response:
        """Asks Ollama's cloud, which there is none of."""
        return await _cloud_only(request, "web search is unavailable")

    async def web_fetch(self, request: Request) -> Response:
        """Asks Ollama's cloud, which there is none of."""
        return await _cloud_only(request, "web fetch is unavailable")

    async def recommendations(self, request: Request) -> Response:
        """Asks Ollama's cloud, which there is none of."""
        return error_response(403, f"{CLOUD_DISABLED}: model recommendations are unavailable")

    async def transcribe(self, request: Request) -> Response:
        """OpenAI's transcription: no engine of a node takes sound."""
        try:
            model = await self._model_to_hear(request)
            raise StatusError(400, f"{go_quoted(model)} does not support audio")
        except Exception as error:  # noqa: BLE001 - this path speaks OpenAI's dialect
            return openai_refusal(error)

    async def _model_to_hear(self, request: Request) -> str:
        form = await read_form(request)
        model = form.get("model", b"").decode(errors="replace")
        if not model:
            raise StatusError(400, "model is required")
        if "file" not in form:
            raise StatusError(400, "file is required: http: no such file")
        if not form["file"]:
            raise StatusError(400, "audio file is empty")
        name = _parsed(model, BAD_NAME)
        known = {each.name.lower() for each in await self._of_swarm()}
        known |= {each.name.lower() for each in await self._node.models()}
        if str(name).lower() not in known:
            raise StatusError(404, f"model {go_quoted(model)} not found, try pulling it first")
        return model


def store_routes(
    node: ServedNode, pulls: SharedPulls, inference: ServedInference | None
) -> list[BaseRoute]:
    """The routes of the table."""
    answers = OllamaStoreRoutes(node, pulls, inference)
    return [
        Route(each.path, _answered(getattr(answers, each.endpoint)), methods=[each.method])
        for each in STORE_ROUTES
    ]


def _answered(
    endpoint: Callable[[Request], Awaitable[Any]],
) -> Callable[[Request], Awaitable[Any]]:
    """The endpoint, with what is wrong told in Ollama's way."""

    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return error_response(CLIENT_CLOSED, REQUEST_CANCELED)  # nobody reads it
        except Exception as error:  # noqa: BLE001 - the border
            return answer_error(error)

    return answer


# -- reading -----------------------------------------------------------------------------------


def _parsed(text: str, problem: str) -> ModelName:
    """problem: what Ollama says here of a name that is none."""
    try:
        return parse_model_name(text)
    except BadName:
        raise StatusError(400, problem) from None


def _not_found(name: str) -> StatusError:
    return StatusError(404, f"model '{name}' not found")


def _is_plain_http(name: str) -> bool:
    return name.startswith("http://")


async def _insecure(_: OnProgress) -> None:
    raise StatusError(500, "insecure protocol http")


def _length(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class ArrivingBody:
    """A request's body, read part by part."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self.is_whole = False
        """Whether all of it has been read."""

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """What comes, from where the last reader stopped. Raises ClientDisconnect if it ends before
        its end, StatusError if nothing comes for long.
        """
        while not self.is_whole:
            message = None
            with trio.move_on_after(PART_TIMEOUT_S):
                message = await self._receive()
            if message is None:
                raise StatusError(408, f"nothing of the blob arrived for {PART_TIMEOUT_S:g} s")
            if message["type"] != "http.request":
                raise ClientDisconnect
            self.is_whole = not message.get("more_body", False)
            yield message.get("body", b"")


class EarlyAnswer:
    """An answer that may come before its request's body has.

    Most clients read it only when they have sent all; a connection that is closed under them while
    they send loses the answer too. So some of what still comes is taken and thrown away.
    """

    def __init__(self, response: Response, body: ArrivingBody) -> None:
        self._response, self._body = response, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, then take what comes, within bounds."""
        response = self._response
        head = {"status": response.status_code, "headers": response.raw_headers}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        taken = 0
        with suppress(ClientDisconnect), trio.move_on_after(DRAINED_S):
            async for part in self._body.parts():
                taken += len(part)
                if taken > DRAINED_BYTES_MAX:
                    break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cloud_only(request: Request, what: str) -> Response:
    if not (await read_bytes(request)).strip():
        raise StatusError(400, "missing request body")
    return error_response(403, f"{CLOUD_DISABLED}: {what}")


# -- writing -----------------------------------------------------------------------------------


def _listed_line(model: ListedModel) -> ListedLine:
    return ListedLine(
        name=model.name,
        model=model.name,
        modified_at=time_text(model.modified_at),
        size=model.size,
        digest=model.digest.removeprefix("sha256:"),
        details=model.details,
        capabilities=model.capabilities,
    )


def _servable_line(model: ServableModel, written: datetime) -> ListedLine:
    return ListedLine(
        name=model.name,
        model=model.name,
        modified_at=time_text(written),
        size=model.size,
        digest=model.digest.removeprefix("sha256:"),
        details=ShownDetails(
            parent_model="",
            format=model.format,
            family=model.family,
            families=(model.family,) if model.family else None,
            parameter_size=model.parameter_size,
            quantization_level=model.quantization,
            context_length=model.context_length,
            embedding_length=model.embedding_length,
        ),
        capabilities=model.capabilities,
    )

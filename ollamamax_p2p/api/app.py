"""The route tables and the order of middleware, on one page.

Ours live under /omx/v1, so that Ollama's /api and OpenAI's /v1 fit beside them. Each table may be
served without the other: what listens beyond loopback serves no path of ours.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.websockets import WebSocket

from ollamamax_p2p.api.bodies import BODY_BYTES_MAX, BodyTooLarge
from ollamamax_p2p.api.error_responses import ErrorBody, error_response, plain_error
from ollamamax_p2p.api.event_stream import stream_events
from ollamamax_p2p.api.guard import Guard
from ollamamax_p2p.api.inference_routes import inference_routes
from ollamamax_p2p.api.node_routes import Endpoint, NodeRoutes
from ollamamax_p2p.api.ollama_store_routes import store_routes
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import ServedNode
from ollamamax_p2p.api.settings import ApiSettings
from ollamamax_p2p.api.shared_pulls import SharedPulls

PREFIX = "/omx/v1"
EVENTS_PATH = f"{PREFIX}/events"


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """One line of the table."""

    method: str
    path: str
    endpoint: str
    """The method of NodeRoutes that answers."""


ROUTES = (
    ApiRoute("GET", f"{PREFIX}/version", "version"),
    ApiRoute("GET", f"{PREFIX}/status", "status"),
    ApiRoute("GET", f"{PREFIX}/peers", "peers"),
    ApiRoute("GET", f"{PREFIX}/models", "models"),
    ApiRoute("POST", f"{PREFIX}/models/show", "show"),
    ApiRoute("POST", f"{PREFIX}/models/copy", "copy"),
    ApiRoute("POST", f"{PREFIX}/models/delete", "delete"),
    ApiRoute("POST", f"{PREFIX}/pull", "pull"),
    ApiRoute("POST", f"{PREFIX}/push", "push"),
    ApiRoute("POST", f"{PREFIX}/import", "import_model"),
    ApiRoute("POST", f"{PREFIX}/create", "create"),
    ApiRoute("POST", f"{PREFIX}/invite", "invite"),
    ApiRoute("POST", f"{PREFIX}/join", "join"),
    ApiRoute("POST", f"{PREFIX}/leave", "leave"),
    ApiRoute("GET", f"{PREFIX}/cluster", "cluster_status"),
    ApiRoute("POST", f"{PREFIX}/cluster/role", "set_role"),
    ApiRoute("POST", f"{PREFIX}/cluster/remove", "expel"),
    ApiRoute("POST", f"{PREFIX}/cluster/transfer-leader", "transfer_leader"),
    ApiRoute("POST", f"{PREFIX}/cluster/snapshot", "snapshot"),
    ApiRoute("POST", f"{PREFIX}/cluster/rotate-key", "rotate_swarm_key"),
    ApiRoute("POST", f"{PREFIX}/cluster/set-clock", "set_clock"),
    ApiRoute("POST", f"{PREFIX}/cluster/set", "set_cluster_setting"),
    ApiRoute("POST", f"{PREFIX}/cluster/withdraw-tickets", "withdraw_tickets"),
    ApiRoute("GET", f"{PREFIX}/nodes", "nodes"),
    ApiRoute("POST", f"{PREFIX}/nodes/drain", "drain"),
    ApiRoute("POST", f"{PREFIX}/stop", "stop"),
    ApiRoute("GET", f"{PREFIX}/doctor", "doctor"),
)


def make_app(
    node: ServedNode,
    pulls: SharedPulls,
    *,
    token: str,
    inference: ServedInference | None = None,
    settings: ApiSettings | None = None,
    serves_ours: bool = True,
) -> Starlette:
    """The ASGI application of one node. inference: None leaves out what runs models. serves_ours:
    False leaves out /omx, for a port that others than this user's programs reach.
    """
    settings = settings or ApiSettings()
    routes = store_routes(node, pulls, inference)
    if inference is not None:
        routes = inference_routes(inference, node, pulls) + routes  # asked most: matched first
    _only_their_methods(routes)
    if serves_ours:
        routes += _our_routes(node, pulls, inference)
    guard = Middleware(
        Guard,
        token=token if serves_ours else None,
        origins=settings.origins,
        hosts=settings.hosts,
    )
    return Starlette(
        routes=routes,
        middleware=[guard],
        exception_handlers={HTTPException: partial(_http_error, routes, serves_ours)},
    )


def _our_routes(
    node: ServedNode, pulls: SharedPulls, inference: ServedInference | None
) -> list[BaseRoute]:
    answers = NodeRoutes(node, pulls, inference)

    async def events(websocket: WebSocket) -> None:
        await stream_events(websocket, node.events)

    routes = [
        Route(each.path, _answered(getattr(answers, each.endpoint)), methods=[each.method])
        for each in ROUTES
    ]
    return [*routes, WebSocketRoute(EVENTS_PATH, events)]


def _only_their_methods(routes: list[BaseRoute]) -> None:
    """Starlette answers HEAD wherever it answers GET; Ollama where its table says so."""
    for route in routes:
        if isinstance(route, Route) and route.methods and "GET" in route.methods:
            route.methods.discard("HEAD")


def _answered(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint with every error translated: a request's failure is not the node's."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)  # type: ignore[return-value]  # any ASGI app answers
        except BodyTooLarge:
            problem = f"the request body is larger than {BODY_BYTES_MAX:,} bytes"
            return plain_error(413, ErrorBody(problem, "bad_input"))
        except Exception as error:  # noqa: BLE001 - the border: named, or logged and answered 500
            return error_response(error)

    return answer


async def _http_error(
    routes: list[BaseRoute], serves_ours: bool, request: Request, error: Exception
) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    if not (serves_ours and request.url.path.startswith(f"{PREFIX}/")):
        return _as_gin(routes, request, error.status_code)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return plain_error(404, ErrorBody(f"{what}: no such path", "not_found"))
    return plain_error(error.status_code, ErrorBody(f"{what}: {error.detail}", "bad_input"))


def _as_gin(routes: list[BaseRoute], request: Request, status: int) -> Response:
    """What the framework under Ollama says; clients have been seen to compare it."""
    if status != 405:
        return _text(404, "404 page not found")
    response = _text(405, "405 method not allowed")
    matching = [each for each in routes if each.matches(request.scope)[0] is not Match.NONE]
    methods = set[str]()
    for each in matching:
        methods |= (each.methods or set()) if isinstance(each, Route) else set()
    response.headers["allow"] = ", ".join(each for each in _GIN_METHODS if each in methods)
    return response


_GIN_METHODS = ("HEAD", "GET", "POST", "DELETE")
# In the order in which Ollama's table first has them.


def _text(status: int, text: str) -> Response:
    response = Response(text, status)
    response.headers["content-type"] = "text/plain"  # without the charset that Starlette adds
    return response

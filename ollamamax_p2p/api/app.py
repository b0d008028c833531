"""The route table and the order of middleware, on one page.

Ours live under /omx/v1, so that Ollama's /api and OpenAI's /v1 fit beside them.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from ollamamax_p2p.api.bodies import BODY_BYTES_MAX, BodyTooLarge
from ollamamax_p2p.api.error_responses import ErrorBody, error_response, plain_error
from ollamamax_p2p.api.event_stream import stream_events
from ollamamax_p2p.api.guard import Guard
from ollamamax_p2p.api.inference_routes import inference_routes
from ollamamax_p2p.api.node_routes import Endpoint, NodeRoutes
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import ServedNode
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
    ApiRoute("GET", "/", "hello"),
    ApiRoute("GET", f"{PREFIX}/version", "version"),
    ApiRoute("GET", f"{PREFIX}/status", "status"),
    ApiRoute("GET", f"{PREFIX}/peers", "peers"),
    ApiRoute("GET", f"{PREFIX}/models", "models"),
    ApiRoute("POST", f"{PREFIX}/models/show", "show"),
    ApiRoute("POST", f"{PREFIX}/models/copy", "copy"),
    ApiRoute("POST", f"{PREFIX}/models/delete", "delete"),
    ApiRoute("POST", f"{PREFIX}/pull", "pull"),
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
    ApiRoute("POST", f"{PREFIX}/stop", "stop"),
    ApiRoute("GET", f"{PREFIX}/doctor", "doctor"),
)


def make_app(
    node: ServedNode,
    pulls: SharedPulls,
    *,
    token: str,
    inference: ServedInference | None = None,
) -> Starlette:
    """The ASGI application of one node. inference: None leaves /api and /v1 out."""
    answers = NodeRoutes(node, pulls)

    async def events(websocket: WebSocket) -> None:
        await stream_events(websocket, node.events)

    routes: list[BaseRoute] = [
        Route(each.path, _answered(getattr(answers, each.endpoint)), methods=[each.method])
        for each in ROUTES
    ]
    if inference is not None:
        routes = inference_routes(inference, node, pulls) + routes  # asked most: matched first
    return Starlette(
        routes=[*routes, WebSocketRoute(EVENTS_PATH, events)],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={HTTPException: _http_error},
    )


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


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return plain_error(404, ErrorBody(f"{what}: no such path", "not_found"))
    return plain_error(error.status_code, ErrorBody(f"{what}: {error.detail}", "bad_input"))

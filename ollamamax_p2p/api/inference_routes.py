"""The table of what a node answers for its swarm's models: Ollama's, OpenAI's, Anthropic's paths.

They need no token: Ollama's have none, and its clients send none. Host and Origin are checked.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from ollamamax_p2p.api.anthropic_routes import AnthropicRoutes, anthropic_refusal
from ollamamax_p2p.api.ollama_framing import CLIENT_CLOSED, answer_error
from ollamamax_p2p.api.ollama_generation_routes import OllamaGenerationRoutes
from ollamamax_p2p.api.openai_routes import OpenAIRoutes, openai_refusal
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import ServedNode
from ollamamax_p2p.api.shared_pulls import SharedPulls
from ollamamax_p2p.api.websocket_requests import RequestSocket

WEBSOCKET_PATH = "/api/ws"


@dataclass(frozen=True, slots=True)
class InferenceRoute:
    """One line of the table."""

    method: str
    path: str
    dialect: type[Any]
    endpoint: str
    """The method of the dialect's class that answers."""


INFERENCE_ROUTES = (
    InferenceRoute("POST", "/api/generate", OllamaGenerationRoutes, "generate"),
    InferenceRoute("POST", "/api/chat", OllamaGenerationRoutes, "chat"),
    InferenceRoute("POST", "/api/embed", OllamaGenerationRoutes, "embed"),
    InferenceRoute("POST", "/api/embeddings", OllamaGenerationRoutes, "embeddings"),
    InferenceRoute("GET", "/api/ps", OllamaGenerationRoutes, "ps"),
    InferenceRoute("POST", "/v1/chat/completions", OpenAIRoutes, "chat_completions"),
    InferenceRoute("POST", "/v1/completions", OpenAIRoutes, "completions"),
    InferenceRoute("POST", "/v1/embeddings", OpenAIRoutes, "embeddings"),
    InferenceRoute("POST", "/v1/responses", OpenAIRoutes, "responses"),
    InferenceRoute("GET", "/v1/models", OpenAIRoutes, "models"),
    InferenceRoute("GET", "/v1/models/{model:path}", OpenAIRoutes, "model"),
    InferenceRoute("POST", "/v1/messages", AnthropicRoutes, "messages"),
)

_REFUSALS: dict[type[Any], Callable[[Exception], Response]] = {
    OllamaGenerationRoutes: answer_error,
    OpenAIRoutes: openai_refusal,
    AnthropicRoutes: anthropic_refusal,
}


def inference_routes(
    inference: ServedInference, node: ServedNode, pulls: SharedPulls
) -> list[BaseRoute]:
    """The routes of the table, and the WebSocket."""
    dialects = {each: each(inference) for each in _REFUSALS}

    async def websocket(socket: WebSocket) -> None:
        await RequestSocket(socket, inference, node, pulls).serve()

    routes: list[BaseRoute] = [
        Route(
            each.path,
            _answered(getattr(dialects[each.dialect], each.endpoint), _REFUSALS[each.dialect]),
            methods=[each.method],
        )
        for each in INFERENCE_ROUTES
    ]
    return [*routes, WebSocketRoute(WEBSOCKET_PATH, websocket)]


def _answered(
    endpoint: Callable[[Request], Awaitable[Any]], refusal: Callable[[Exception], Response]
) -> Callable[[Request], Awaitable[Any]]:
    """The endpoint, with what is wrong with a request told in its dialect."""

    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)  # nobody reads it
        except Exception as error:  # noqa: BLE001 - the border
            return refusal(error)

    return answer

"""Writes docs/reference/http-api.md and errors.md from the code: `python -m
ollamamax_p2p.api.reference`.
"""

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from ollamamax_p2p import errors
from ollamamax_p2p.api.app import EVENTS_PATH, ROUTES, ApiRoute
from ollamamax_p2p.api.bodies import BODY_BYTES_MAX
from ollamamax_p2p.api.error_responses import INTERNAL_ERROR, status_of
from ollamamax_p2p.api.guard import OPEN_PATHS
from ollamamax_p2p.api.inference_routes import INFERENCE_ROUTES, WEBSOCKET_PATH, InferenceRoute
from ollamamax_p2p.api.node_routes import REQUEST_BODIES, NodeRoutes
from ollamamax_p2p.api.ollama_store_routes import STORE_ROUTES, OllamaStoreRoutes, StoreRoute

_API_HEAD = f"""\
# The HTTP API

<!-- Written by `python -m ollamamax_p2p.api.reference`; do not edit. -->

A node that `omx up` runs listens on `api.listen` (127.0.0.1:11435), loopback only. `node.json` in
its data folder says where (`{{"pid": …, "api": "host:port", "peer_id": …}}`), `api-token` beside it
holds the token; both have mode 0600, are new at every start and gone after it.

Every request needs `Authorization: Bearer <token>`, except
{" and ".join(f"`{path}`" for path in sorted(OPEN_PATHS))}. A request whose `Host` is no loopback
name, or whose `Origin` is not the API's own, gets an empty 403. Bodies are JSON of at most
{BODY_BYTES_MAX:,} bytes; unknown fields are refused. Answers are JSON; an error is
`{{"error": text, "code": name}}` with a status and a name from [errors](errors.md).
"""

_API_TAIL = f"""\
## Events

`{EVENTS_PATH}` is a WebSocket: one JSON text per event, `{{"kind": …, "at": …, "facts": {{…}}}}`,
from the handshake on. A client that falls 1,000 events behind loses the oldest and gets an
`events.lost` with their count. What a client sends is ignored.

## A pull

The answer is NDJSON (`application/x-ndjson`): a line per state with the fields of PullProgress
(`status`, `digest`, `total`, `completed`, `sources`, `active_sources`, `note`), then
`{{"status": "success", "report": {{…}}}}`. An error before the first state has its HTTP status; a
later one is the last line. Two clients that pull one model watch the same pull; it stops, to be
resumed by the next, when the last of them disconnects. A push is answered in the same way, with a
PushReport at its end.

## Ollama's, OpenAI's and Anthropic's paths

They are served beside the node's own, and alone on `api.ollama_listen`. They need no token; what
they take and give is in the documentation of those three. The header `server` of an answer is
`omx`. What differs is told here, and in the guides to [clients](../guide/clients.md)
and to [the store](../guide/ollama-api.md).

Their `Host` must be an address of this machine or of a private network, this machine's name, a name
that ends in .localhost, .local or .internal, or one of `api.hosts`; else the answer is an empty
403, on every address that is listened on. A page of another origin gets an empty 403 unless Ollama
lets it in or `api.origins` does.

| path | what it does here |
|---|---|
"""

_WEBSOCKET = "Many requests on one connection: [its protocol](../protocols/websocket.md)."

_ERRORS_HEAD = """\
# Errors

<!-- Written by `python -m ollamamax_p2p.api.reference`; do not edit. -->

The code is what the HTTP API and `--json` print; the class is what the library raises, from
`ollamamax_p2p.errors`. The exit codes of `omx` are in [the command line](cli.md).

| code | class | HTTP | meaning |
|---|---|---|---|
"""


def api_page() -> str:
    """docs/reference/http-api.md."""
    routes = "\n".join([_API_HEAD, *map(_route, ROUTES), _API_TAIL])
    rows = [_ollama_row(OllamaStoreRoutes, each) for each in STORE_ROUTES]
    rows += [_ollama_row(each.dialect, each) for each in INFERENCE_ROUTES]
    rows.append(f"| WebSocket `{WEBSOCKET_PATH}` | {_WEBSOCKET} |\n")
    return routes + "".join(rows)


def _ollama_row(answers: type[Any], route: StoreRoute | InferenceRoute) -> str:
    text = inspect.cleandoc(getattr(answers, route.endpoint).__doc__).replace("\n", " ")
    return f"| {route.method} `{route.path}` | {text} |\n"


def _route(route: ApiRoute) -> str:
    text = inspect.cleandoc(getattr(NodeRoutes, route.endpoint).__doc__)
    body = REQUEST_BODIES.get(route.endpoint)
    fields = "".join(f"\n- {_field(each)}" for each in msgspec.structs.fields(body)) if body else ""
    return f"## {route.method} {route.path}\n\n{text}\n{fields}".rstrip() + "\n"


def _field(field: msgspec.structs.FieldInfo) -> str:
    if field.default is msgspec.NODEFAULT:
        return f"`{field.name}` ({_kind(field.type)})"
    default = msgspec.json.encode(field.default).decode()
    return f"`{field.name}` ({_kind(field.type)}, default {default})"


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(annotation))
    names = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    plain = getattr(annotation, "__origin__", annotation)
    return names.get(plain, "list of texts")


def errors_page() -> str:
    """docs/reference/errors.md."""
    rows = [_row(cls) for cls in _tree(errors.OmxError)]
    ours = f"| `{INTERNAL_ERROR}` | | 500 | A fault of omx; the node's log has the details. |"
    return _ERRORS_HEAD + "\n".join([*rows, ours]) + "\n"


def _tree(cls: type[errors.OmxError]) -> list[type[errors.OmxError]]:
    below = [deeper for child in cls.__subclasses__() for deeper in _tree(child)]
    return below if cls is errors.OmxError else [cls, *below]


def _row(cls: type[errors.OmxError]) -> str:
    meaning = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return f"| `{errors.code(cls)}` | {cls.__name__} | {status_of(cls)} | {meaning} |"


def write(folder: Path) -> None:
    """Both pages."""
    (folder / "http-api.md").write_text(api_page())
    (folder / "errors.md").write_text(errors_page())


if __name__ == "__main__":
    write(Path("docs/reference"))

"""The application without a server or a socket: every message that it sends is seen, on the virtual
clock too.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from ollamamax_p2p.api.app import make_app
from ollamamax_p2p.api.shared_pulls import open_shared_pulls
from tests.api.ram_inference import RamInference
from tests.api.ram_node import RamNode


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    flushes: list[bytes] = field(default_factory=list)
    """Every write that had bytes."""
    ended: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.flushes)

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    def events(self) -> list[tuple[str, Any]]:
        """Server-sent events: name, data."""
        found = []
        for block in self.body.decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = fields["data"]
            found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
        return found


class AsgiSocket:
    """The client's side of a WebSocket."""

    def __init__(self) -> None:
        self.to_app, self._app_reads = trio.open_memory_channel(1_000)
        self.to_app.send_nowait({"type": "websocket.connect"})
        self._app_writes, self._from_app = trio.open_memory_channel(0)

    async def receive(self) -> Any:
        return await self._app_reads.receive()

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.send":
            await self._app_writes.send(json.loads(message["text"]))

    async def say(self, *frames: Any) -> None:
        for frame in frames:
            text = frame if isinstance(frame, str) else json.dumps(frame)
            await self.to_app.send({"type": "websocket.receive", "text": text})

    async def next(self) -> Any:
        """The next frame; a test waits for it a minute."""
        with trio.fail_after(60):
            return await self._from_app.receive()

    async def until_done(self, frame_id: str) -> list[Any]:
        """All frames up to the one that ends this request."""
        found = [await self.next()]
        while found[-1]["id"] != frame_id or found[-1]["type"] not in ("done", "error"):
            found.append(await self.next())
        return found


@dataclass
class AsgiClient:
    app: Any
    node: RamNode
    inference: RamInference

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        gone: trio.Event | None = None,
        reading: trio.Event | None = None,
        reply: Reply | None = None,
    ) -> Reply:
        """One request. gone: set when the client leaves. reading: writes wait until it is set."""
        raw = body if isinstance(body, bytes) else b"" if body is None else _dumped(body)
        reply = reply or Reply()
        sent = [{"type": "http.request", "body": raw, "more_body": False}]
        left = trio.Event() if gone is None else gone

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await trio.lowlevel.checkpoint()
            if reading is not None:
                await reading.wait()
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                reply.flushes += [message["body"]] if message.get("body") else []
                reply.ended = not message.get("more_body", False)

        given = {"host": "localhost", "content-length": str(len(raw))} | (headers or {})
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.app(scope, receive, send)
        return reply

    @asynccontextmanager
    async def websocket(self, path: str = "/api/ws") -> AsyncIterator["AsgiSocket"]:
        """A WebSocket; leaving the block is the client's going."""
        socket = AsgiSocket()
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "subprotocols": [],
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.app, scope, socket.receive, socket.send)
            try:
                yield socket
            finally:
                socket.to_app.send_nowait({"type": "websocket.disconnect", "code": 1000})

    async def post(self, path: str, body: Any = None, **more: Any) -> Reply:
        return await self.ask("POST", path, body, **more)


def _dumped(body: Any) -> bytes:
    return json.dumps(body).encode()


@asynccontextmanager
async def open_asgi(
    inference: RamInference | None = None, node: RamNode | None = None
) -> AsyncIterator[AsgiClient]:
    inference, node = inference or RamInference(), node or RamNode()
    async with open_shared_pulls(node) as pulls:
        yield AsgiClient(make_app(node, pulls, token="t", inference=inference), node, inference)

"""A RamNode served on a free port of loopback."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import h11
import pytest
import trio

from ollamamax_p2p.api import ApiServer, ApiSettings, LocalClient, open_api
from tests.api.ram_node import PEER, RamNode


@dataclass
class Served:
    node: RamNode
    server: ApiServer
    client: LocalClient
    data_dir: Path

    async def raw(
        self, method: str, path: str, body: bytes = b"", **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request with exactly these headers; None leaves a usual one out."""
        usual = {"host": self.server.address, "authorization": f"Bearer {self.server.token}"}
        usual |= {"content-length": str(len(body)), "connection": "close"}
        usual |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = [(name, value) for name, value in usual.items() if value is not None]
        return await _exchange(self.server.address, method, path, sent, body)


async def _exchange(address, method, path, headers, body):
    http = h11.Connection(h11.CLIENT)
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(http.send(h11.Request(method=method, target=path, headers=headers)))
        if body:
            await stream.send_all(http.send(h11.Data(data=body)))
        if dict(headers).get("content-length") in (None, str(len(body))):
            await stream.send_all(http.send(h11.EndOfMessage()))
        status, found, received = 0, {}, b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Response):
                status = event.status_code
                found = {key.decode(): value.decode() for key, value in event.headers}
            elif isinstance(event, h11.Data):
                received += event.data
            else:
                return status, found, received


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    node = RamNode()
    settings = ApiSettings(listen="127.0.0.1:0")
    with trio.fail_after(30):
        async with open_api(node, settings, data_dir=tmp_path, peer_id=PEER) as server:
            yield Served(node, server, LocalClient.find(tmp_path), tmp_path)

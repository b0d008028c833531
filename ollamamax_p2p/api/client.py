"""LocalClient: a running node of this machine, over its HTTP API.

It has a node's methods under the same names, so that a program (or the CLI) can use either. One
connection per request: on loopback that costs less than keeping one healthy.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h11
import msgspec
import trio

from ollamamax_p2p import errors
from ollamamax_p2p.api.node_file import lock_holder, read_files, unusable
from ollamamax_p2p.api.served_node import (
    Invitation,
    JoinReport,
    ModelDetails,
    ModelInfo,
    NodeStatus,
    OnProgress,
    PeerInfo,
)
from ollamamax_p2p.api.told_errors import error_of_status
from ollamamax_p2p.cluster import ClusterStatus, RoleWish
from ollamamax_p2p.content import ShowAnswer
from ollamamax_p2p.errors import LocalTrouble, NodeNotRunning, OmxError
from ollamamax_p2p.inference import LoadedModel
from ollamamax_p2p.inference.core.requests import Embeddings
from ollamamax_p2p.observability import Event
from ollamamax_p2p.router import NodeLoad, RunningModel, Server
from ollamamax_p2p.transfer import PullProgress, PullReport, PushReport

if TYPE_CHECKING:
    from ollamamax_p2p.api.websocket_client import RequestClient

CONNECT_TIMEOUT_S = 5.0
"""Loopback connects at once or not at all; a full backlog may take a moment."""

LINE_BYTES_MAX = 8 * 1024 * 1024
"""A longer line is not one of ours; Ollama's own client has the same limit."""

ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""A hundred thousand models make a list of some 20 MB."""

OLLAMAS = "/api/"
"""Paths that are not ours, but that a node has too."""

T = TypeVar("T")


class LocalClient:
    """Speaks to the node at one address. `find` makes one for the node of a data folder."""

    def __init__(
        self, address: str, token: str, *, data_dir: Path | None = None, pid: int = 0
    ) -> None:
        """address: host:port; data_dir: named in errors; pid: the node's process, 0 if unknown."""
        self.address = address
        self.pid = pid
        self._token = token
        self._data_dir = data_dir
        self._where = str(data_dir or address)

    @classmethod
    def find(cls, data_dir: Path) -> "LocalClient":
        """The node that runs on a data folder. Raises NodeNotRunning, KeyExposed, AccessRefused."""
        found, token = read_files(data_dir)
        return cls(found.api, token, data_dir=data_dir, pid=found.pid)

    async def status(self) -> NodeStatus:
        """One look at the node."""
        return await self._ask("GET", "/status", NodeStatus)

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers connected now."""
        return (await self._ask("GET", "/peers", _Peers)).peers

    async def models(self) -> tuple[ModelInfo, ...]:
        """What the store holds, newest first."""
        return (await self._ask("GET", "/models", _Models)).models

    async def show(self, name: str) -> ModelDetails:
        """What a model is made of."""
        return await self._ask("POST", "/models/show", ModelDetails, {"model": name})

    async def copy(self, source: str, destination: str) -> ModelInfo:
        """Give a model a second name."""
        names = {"source": source, "destination": destination}
        return await self._ask("POST", "/models/copy", ModelInfo, names)

    async def remove(self, name: str) -> None:
        """Remove a name and the blobs that no other needs."""
        await self._ask("POST", "/models/delete", dict[str, Any], {"model": name})

    async def pull(
        self,
        name: str,
        *,
        from_origin: bool = False,
        insecure: bool = False,
        on_progress: OnProgress | None = None,
    ) -> PullReport:
        """Have the node fetch a model. Cancelling stops the pull unless another client watches it;
        what was fetched is kept.
        """
        body = {"model": name, "from_origin": from_origin, "insecure": insecure}
        return await self._reported("/pull", body, PullReport, on_progress)

    async def push(
        self, name: str, *, insecure: bool = False, on_progress: OnProgress | None = None
    ) -> PushReport:
        """Have the node give a model to the registry that its name names. Cancelling ends it."""
        body = {"model": name, "insecure": insecure}
        return await self._reported("/push", body, PushReport, on_progress)

    async def _reported(
        self, path: str, body: Any, wanted: type[T], on_progress: OnProgress | None
    ) -> T:
        async with self._request("POST", path, body) as answer:
            async for line in answer.lines():
                found = self._decoded(line, _ReportedLine)
                if found.error:
                    raise errors.restored(found.code, found.error)
                if found.report:
                    return self._decoded(bytes(found.report), wanted)
                if on_progress is not None:
                    on_progress(self._decoded(line, PullProgress))
        raise _broken_off(self._where)

    async def import_model(self, path: Path | str, name: str) -> ModelInfo:
        """Make a local file a model."""
        body = {"path": _whole(path), "model": name}
        return await self._ask("POST", "/import", ModelInfo, body)

    async def create_model(self, name: str, modelfile: str, base_dir: Path | str) -> ModelInfo:
        """Make a model from a Modelfile's text; relative paths in it count from base_dir."""
        body = {"model": name, "modelfile": modelfile, "base_dir": _whole(base_dir)}
        return await self._ask("POST", "/create", ModelInfo, body)

    async def invite(self, *, uses: int = 1, expires_s: float = 86_400.0) -> Invitation:
        """Issue a ticket."""
        return await self._ask(
            "POST", "/invite", Invitation, {"uses": uses, "expires_s": expires_s}
        )

    async def join(self, ticket_or_addresses: Sequence[str]) -> JoinReport:
        """Join a swarm by ticket, or connect to multiaddrs."""
        several = not isinstance(ticket_or_addresses, str)
        to = list(ticket_or_addresses) if several else [ticket_or_addresses]
        return await self._ask("POST", "/join", JoinReport, {"to": to})

    async def withdraw_tickets(self) -> int:
        """Let nobody join by a ticket that was issued before; gives how many were still good."""
        path = "/cluster/withdraw-tickets"
        return (await self._ask("POST", path, dict[str, int], {}))["withdrawn"]

    async def leave(self) -> str:
        """Be a member no more and forget the swarm; gives `left`, `not in a swarm`, or what the
        others still have to do.
        """
        outcome: str = (await self._ask("POST", "/leave", dict[str, str], {}))["outcome"]
        return outcome

    async def cluster_status(self) -> ClusterStatus:
        """The cluster in one look."""
        return await self._ask("GET", "/cluster", ClusterStatus)

    async def set_role(self, peer: str, role: RoleWish) -> None:
        """Make a member a voter or a learner; returns once that is agreed, before it is so."""
        await self._ask("POST", "/cluster/role", dict[str, Any], {"peer": peer, "role": role})

    async def expel(self, peer: str) -> None:
        """Remove a member."""
        await self._ask("POST", "/cluster/remove", dict[str, Any], {"peer": peer})

    async def transfer_leader(self, peer: str) -> None:
        """Let another voter lead."""
        await self._ask("POST", "/cluster/transfer-leader", dict[str, Any], {"peer": peer})

    async def snapshot(self) -> int:
        """Make a snapshot of the agreed state there; gives the last index in it."""
        return (await self._ask("POST", "/cluster/snapshot", dict[str, int], {}))["index"]

    async def rotate_swarm_key(self, *, force: bool = False) -> tuple[str, ...]:
        """Give the swarm a new key; gives the names of members that will need a new ticket."""
        return (await self._ask("POST", "/cluster/rotate-key", _Away, {"force": force})).away

    async def set_clock(self) -> int:
        """Have the cluster take that node's clock for the time; gives it, Unix seconds."""
        return (await self._ask("POST", "/cluster/set-clock", dict[str, int], {}))["clock"]

    async def set_cluster_setting(self, key: str, value: str) -> None:
        """Change a setting that the whole cluster shares."""
        await self._ask("POST", "/cluster/set", dict[str, Any], {"key": key, "value": value})

    # -- models that run

    async def show_model(self, name: str) -> ShowAnswer:
        """All that a model says about itself, wherever in the swarm it is. Raises ModelNotFound."""
        return await self._ask("POST", "/api/show", ShowAnswer, {"model": name})

    async def capabilities(self, name: str) -> tuple[str, ...] | None:
        """What a model of the swarm can do, also one of an engine that shows no more of it; ()
        if it does not say, None if nobody has such a model.
        """
        listed = (await self._ask("GET", "/api/tags", _Listed)).models
        wanted = {name.lower(), f"{name.lower()}:latest"}
        return next((each.capabilities for each in listed if each.name.lower() in wanted), None)

    async def running_models(self) -> tuple[RunningModel, ...]:
        """What is in memory on any node, the one that stays longest first."""
        found = await self._ask("GET", "/api/ps", _Running)
        return tuple(each.as_running() for each in found.models)

    async def load(self, name: str, *, keep_alive: float | str | None = None) -> Server:
        """Have a model in memory where it fits best; gives where.

        keep_alive: seconds, or a duration as Go writes it (`10m`); negative: for ever; None: as the
        engine is set.
        """
        body = {"model": name, "stream": False, "keep_alive": keep_alive}
        async with self._request("POST", "/api/generate", body) as answer:
            await answer.everything()
            return answer.server()

    async def unload(self, name: str) -> None:
        """Have a model out of memory on every node. Raises ModelNotFound."""
        body = {"model": name, "stream": False, "keep_alive": 0}
        await self._ask("POST", "/api/generate", dict[str, Any], body)

    async def embed(
        self,
        name: str,
        inputs: Sequence[str],
        *,
        dimensions: int = 0,
        keep_alive: float | str | None = None,
    ) -> tuple[Embeddings, Server]:
        """A vector of length 1 for each text, and who made them. keep_alive: as for `load`."""
        body = {"model": name, "input": list(inputs), "keep_alive": keep_alive}
        body |= {"dimensions": dimensions} if dimensions else {}
        async with self._request("POST", "/api/embed", body) as answer:
            found = self._decoded(await answer.everything(), _Embedded)
            return found.as_embeddings(), answer.server()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["RequestClient"]:
        """Ask for answers, many at once if need be, and have them as they come."""
        from trio_websocket import HandshakeError

        from ollamamax_p2p.api.websocket_client import open_request_client

        async with AsyncExitStack() as stack:
            try:
                client = await stack.enter_async_context(open_request_client(self.address))
            except (HandshakeError, OSError, trio.TooSlowError) as error:
                raise self._no_websocket(error) from error
            yield client

    # -- nodes

    async def nodes(self) -> tuple[NodeLoad, ...]:
        """How busy every node is that this one has heard of, itself first."""
        return (await self._ask("GET", "/nodes", _Nodes)).nodes

    async def drain(self, node: str, *, draining: bool = True) -> None:
        """Have a node, by name or peer id, begin no new answers, or begin again."""
        await self._ask(
            "POST", "/nodes/drain", dict[str, Any], {"node": node, "draining": draining}
        )

    async def stop(self) -> None:
        """Ask the node to stop; it may still run for a moment when this returns."""
        await self._ask("POST", "/stop", dict[str, Any], {})

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """What happens on the node, from entering the block on. Iteration ends when it stops."""
        from trio_websocket import ConnectionClosed, HandshakeError, open_websocket_url

        async def received(socket: Any) -> AsyncIterator[Event]:
            try:
                while True:
                    yield msgspec.json.decode(await socket.get_message(), type=Event)
            except ConnectionClosed:
                return

        headers = [(b"Authorization", f"Bearer {self._token}".encode())]
        url = f"ws://{self.address}/omx/v1/events"
        try:
            opened = open_websocket_url(url, extra_headers=headers)
            socket = await opened.__aenter__()
        except (HandshakeError, OSError) as error:
            raise self._no_websocket(error) from error
        try:
            yield received(socket)
        finally:
            await opened.__aexit__(None, None, None)

    # -- one request ---------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, wanted: type[T], body: Any = None) -> T:
        async with self._request(method, path, body) as answer:
            return self._decoded(await answer.everything(), wanted)

    def _decoded(self, raw: bytes, wanted: type[T]) -> T:
        try:
            return msgspec.json.decode(raw, type=wanted)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise LocalTrouble(
                f"the node at {self.address} answers in a way this omx does not know "
                f"({error}); restart it with this version"
            ) from None

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: Any) -> AsyncIterator["_Answer"]:
        """An answer whose status is 200; any other is raised as the error it carries."""
        stream = await self._connected()
        async with stream:
            answer = _Answer(stream, self._where)
            await answer.ask(self._head(method, path, body), msgspec.json.encode(body))
            if answer.status != 200:
                raise self._error(path, answer.status, await answer.everything())
            yield answer

    async def _connected(self) -> trio.SocketStream:
        host, _, port = self.address.rpartition(":")
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                return await trio.open_tcp_stream(host.strip("[]"), int(port))
        except (OSError, trio.TooSlowError) as error:
            raise self._unreachable() from error

    def _head(self, method: str, path: str, body: Any) -> h11.Request:
        length = len(msgspec.json.encode(body)) if body is not None else 0
        headers = [
            ("Host", self.address),
            ("Authorization", f"Bearer {self._token}"),
            ("Content-Length", str(length)),
            ("Connection", "close"),
        ]
        target = path if path.startswith(OLLAMAS) else f"/omx/v1{path}"
        return h11.Request(method=method, target=target, headers=headers)

    def _error(self, path: str, status: int, raw: bytes) -> OmxError:
        try:
            found = msgspec.json.decode(raw, type=_Told)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return self._refused(status)
        if status == 401:
            return self._refused(status)
        if not found.code and path.startswith(OLLAMAS):
            return error_of_status(status, found.error)
        if not found.code:
            return self._refused(status)
        return errors.restored(found.code, found.error)

    def _no_websocket(self, error: Exception) -> OmxError:
        """trio-websocket tells by one class that somebody refused, and (by its cause, or by none
        and no status) that nobody was there.
        """
        status: int | None = getattr(error, "status_code", None)
        if status is None:
            return self._unreachable()
        return self._refused(status)

    def _unreachable(self) -> OmxError:
        if self._data_dir is None:
            return NodeNotRunning(self._where)
        return unusable(self._data_dir, f"does not answer on {self.address}")

    def _refused(self, status: int) -> OmxError:
        """Something answers there, but not as the node of our data folder would."""
        if status == 401 and self._data_dir and lock_holder(self._data_dir) == self.pid:
            return unusable(self._data_dir, "its api-token is damaged")
        return LocalTrouble(
            f"what listens on {self.address} is not the node of {self._where} (HTTP {status}); "
            "is it a node with another --data-dir?"
        )


class _Answer:
    """One HTTP exchange on a stream of its own."""

    def __init__(self, stream: trio.SocketStream, where: str) -> None:
        self._stream = stream
        self._where = where
        self._http = h11.Connection(h11.CLIENT)
        self.status = 0
        self._headers: dict[bytes, bytes] = {}

    def server(self) -> Server:
        """Whose engine answered, as the headers say."""
        node, backend = (
            self._headers.get(name, b"").decode("latin-1") for name in (b"omx-node", b"omx-backend")
        )
        return Server(peer_id="", node=node, backend=backend)

    async def ask(self, head: h11.Request, body: bytes) -> None:
        """Send the request; returns once the status is known."""
        data = self._http.send(head) or b""
        if dict(head.headers)[b"content-length"] != b"0":
            data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        with suppress(trio.BrokenResourceError):  # an early refusal (413) may be there to read
            await self._stream.send_all(data)
        event = await self._next_event()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next_event()
        assert isinstance(event, h11.Response)
        self.status = event.status_code
        self._headers = dict(event.headers)

    async def everything(self) -> bytes:
        """The whole body."""
        whole = bytearray()
        async for part in self._parts():
            whole += part
            if len(whole) > ANSWER_BYTES_MAX:
                raise LocalTrouble(f"the answer of {self._where} is unreasonably long")
        return bytes(whole)

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines as they arrive."""
        rest = bytearray()
        async for part in self._parts():
            rest += part
            *whole, last = rest.split(b"\n")
            for line in whole:
                yield bytes(line)
            rest = bytearray(last)
            if len(rest) > LINE_BYTES_MAX:
                raise LocalTrouble(f"a line in the answer of {self._where} is unreasonably long")

    async def _parts(self) -> AsyncIterator[bytes]:
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            else:
                return

    async def _next_event(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(65_536))
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
            raise _broken_off(self._where) from error
        if isinstance(event, h11.ConnectionClosed):
            raise _broken_off(self._where)
        return event


class _ReportedLine(msgspec.Struct):
    """What tells the lines of a pull or a push apart: an error or a report is the last."""

    error: str = ""
    code: str = ""
    report: msgspec.Raw = msgspec.Raw()


class _Peers(msgspec.Struct):
    peers: tuple[PeerInfo, ...]


class _Models(msgspec.Struct):
    models: tuple[ModelInfo, ...]


class _Nodes(msgspec.Struct):
    nodes: tuple[NodeLoad, ...]


class _Told(msgspec.Struct):
    """An error; Ollama's have no code."""

    error: str
    code: str = ""


class _ListedModel(msgspec.Struct):
    name: str
    capabilities: tuple[str, ...] = ()


class _Listed(msgspec.Struct):
    models: tuple[_ListedModel, ...]


FOREVER_YEARS = 100
"""A model that stays for good is told as one that stays for 292 years."""


class _RunningModel(msgspec.Struct):
    name: str
    size: int
    digest: str
    expires_at: datetime
    size_vram: int
    context_length: int
    omx_node: str
    omx_backend: str

    def as_running(self) -> RunningModel:
        now = datetime.now(self.expires_at.tzinfo)
        stays = self.expires_at.year - now.year > FOREVER_YEARS
        model = LoadedModel(
            name=self.name,
            digest=self.digest,
            size=self.size,
            size_vram=self.size_vram,
            context_length=self.context_length,
            expires_at=None if stays else self.expires_at.timestamp(),
        )
        server = Server(peer_id="", node=self.omx_node, backend=self.omx_backend)
        return RunningModel(model=model, server=server)


class _Running(msgspec.Struct):
    models: tuple[_RunningModel, ...]


class _Embedded(msgspec.Struct):
    embeddings: tuple[tuple[float, ...], ...]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0

    def as_embeddings(self) -> Embeddings:
        return Embeddings(
            vectors=self.embeddings,
            prompt_tokens=self.prompt_eval_count,
            load_ns=self.load_duration,
            total_ns=self.total_duration,
        )


class _Away(msgspec.Struct):
    away: tuple[str, ...]


def _broken_off(where: str) -> OmxError:
    return LocalTrouble(
        f"the node on {where} ended in the middle of an answer; start it again and repeat the "
        "command, a pull resumes"
    )


def _whole(path: Path | str) -> str:
    """The node's working folder is another than ours."""
    return os.path.abspath(path)

"""What the node answers under /omx/v1: each function reads a body, asks the node, gives JSON."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollamamax_p2p.api import bodies
from ollamamax_p2p.api.bodies import read_body
from ollamamax_p2p.api.progress_lines import watched
from ollamamax_p2p.api.pull_stream import ReportedResponse
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import OnProgress, ServedNode
from ollamamax_p2p.api.shared_pulls import SharedPulls
from ollamamax_p2p.errors import BadInput, PeerNotFound
from ollamamax_p2p.transfer import PushReport

Answer = Response | ReportedResponse
Endpoint = Callable[[Request], Awaitable[Answer]]


class NodeRoutes:
    """The endpoints of one served node."""

    def __init__(
        self, node: ServedNode, pulls: SharedPulls, inference: ServedInference | None
    ) -> None:
        self._node = node
        self._pulls = pulls
        self._inference = inference

    async def version(self, request: Request) -> Response:
        """The version of the node."""
        return _json({"version": (await self._node.status()).version})

    async def status(self, request: Request) -> Response:
        """One look at the node: a NodeStatus."""
        return _json(await self._node.status())

    async def peers(self, request: Request) -> Response:
        """The peers connected now."""
        return _json({"peers": await self._node.peers()})

    async def models(self, request: Request) -> Response:
        """What the store holds, newest first."""
        return _json({"models": await self._node.models()})

    async def show(self, request: Request) -> Response:
        """What a model is made of: a ModelDetails."""
        body = await read_body(request, bodies.ModelBody)
        return _json(await self._node.show(body.model))

    async def copy(self, request: Request) -> Response:
        """Give a model a second name; answers with the new one, as `models` lists it."""
        body = await read_body(request, bodies.CopyBody)
        return _json(await self._node.copy(body.source, body.destination))

    async def delete(self, request: Request) -> Response:
        """Remove a name and the blobs that no other needs."""
        body = await read_body(request, bodies.ModelBody)
        await self._node.remove(body.model)
        return _json({})

    async def pull(self, request: Request) -> Answer:
        """Fetch a model: NDJSON, a line per state, then `{"status":"success","report":…}`."""
        return ReportedResponse(self._pulls.watch(await read_body(request, bodies.PullBody)))

    async def push(self, request: Request) -> Answer:
        """Give a model to the registry that its name names: NDJSON, as a pull. A client that goes
        ends it.
        """
        body = await read_body(request, bodies.PushBody)

        async def work(tell: OnProgress) -> PushReport:
            return await self._node.push(body.model, insecure=body.insecure, on_progress=tell)

        return ReportedResponse(watched(work))

    async def import_model(self, request: Request) -> Response:
        """Make a GGUF or safetensors file of this machine a model."""
        body = await read_body(request, bodies.ImportBody)
        return _json(await self._node.import_model(_absolute(body.path, "path"), body.model))

    async def create(self, request: Request) -> Response:
        """Make a model from a Modelfile's text."""
        body = await read_body(request, bodies.CreateBody)
        base_dir = _absolute(body.base_dir, "base_dir")
        return _json(await self._node.create_model(body.model, body.modelfile, base_dir))

    async def invite(self, request: Request) -> Response:
        """Issue a ticket."""
        body = await read_body(request, bodies.InviteBody)
        return _json(await self._node.invite(uses=body.uses, expires_s=body.expires_s))

    async def join(self, request: Request) -> Response:
        """Join a swarm by ticket, or connect to multiaddrs."""
        body = await read_body(request, bodies.JoinBody)
        return _json(await self._node.join(body.to))

    async def leave(self, request: Request) -> Response:
        """Be a member no more and forget the swarm. `outcome` is `left`, `not in a swarm`, or a
        sentence that says what the others still have to do.
        """
        return _json({"outcome": await self._node.leave()})

    async def cluster_status(self, request: Request) -> Response:
        """The cluster in one look, members included: a ClusterStatus."""
        return _json(await self._node.cluster_status())

    async def set_role(self, request: Request) -> Response:
        """Make a member a voter or a learner whatever autopilot thinks; `auto` leaves it to that.
        The answer says that it is agreed; it takes effect when the leader has carried it out.
        """
        body = await read_body(request, bodies.RoleBody)
        await self._node.set_role(body.peer, body.role)
        return _json({})

    async def expel(self, request: Request) -> Response:
        """Remove a member: it loses access at once."""
        body = await read_body(request, bodies.MemberBody)
        await self._node.expel(body.peer)
        return _json({})

    async def transfer_leader(self, request: Request) -> Response:
        """Let another voter lead."""
        body = await read_body(request, bodies.MemberBody)
        await self._node.transfer_leader(body.peer)
        return _json({})

    async def snapshot(self, request: Request) -> Response:
        """Make a snapshot of the agreed state on this node: `index` is the last one in it."""
        return _json({"index": await self._node.snapshot()})

    async def rotate_swarm_key(self, request: Request) -> Response:
        """Give the swarm a new key. `away` names the members that need a new ticket."""
        body = await read_body(request, bodies.RotateKeyBody)
        return _json({"away": await self._node.rotate_swarm_key(force=body.force)})

    async def set_clock(self, request: Request) -> Response:
        """Have the cluster take this node's clock for the time: `clock`, in Unix seconds. Withdraws
        all tickets.
        """
        return _json({"clock": await self._node.set_clock()})

    async def set_cluster_setting(self, request: Request) -> Response:
        """Change a setting that the whole cluster shares."""
        body = await read_body(request, bodies.ClusterSettingBody)
        await self._node.set_cluster_setting(body.key, body.value)
        return _json({})

    async def withdraw_tickets(self, request: Request) -> Response:
        """Let nobody join by a ticket issued before; `withdrawn` counts those still good."""
        return _json({"withdrawn": await self._node.withdraw_tickets()})

    async def nodes(self, request: Request) -> Response:
        """How busy every node is that this one has heard of, itself first."""
        return _json({"nodes": await self._inference.nodes() if self._inference else ()})

    async def drain(self, request: Request) -> Response:
        """Have a node begin no new answers, or begin again; what runs is finished."""
        body = await read_body(request, bodies.DrainBody)
        if self._inference is None:
            raise PeerNotFound(body.node)
        await self._inference.drain(body.node, body.draining)
        return _json({})

    async def stop(self, request: Request) -> Response:
        """Ask the node to stop; it ends after this answer."""
        self._node.request_stop()
        return _json({})

    async def doctor(self, request: Request) -> Response:
        """What the node knows that `omx doctor` cannot see from outside."""
        status, peers = await self._node.status(), await self._node.peers()
        return _json({"status": status, "peers": peers})


def _json(value: Any) -> Response:
    return Response(
        msgspec.json.encode(value),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


def _absolute(text: str, field: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise BadInput(f"{field} must be an absolute path, not {text!r}")
    return path


REQUEST_BODIES: Mapping[str, type[msgspec.Struct]] = {
    "show": bodies.ModelBody,
    "copy": bodies.CopyBody,
    "delete": bodies.ModelBody,
    "pull": bodies.PullBody,
    "push": bodies.PushBody,
    "import_model": bodies.ImportBody,
    "create": bodies.CreateBody,
    "invite": bodies.InviteBody,
    "join": bodies.JoinBody,
    "set_role": bodies.RoleBody,
    "expel": bodies.MemberBody,
    "transfer_leader": bodies.MemberBody,
    "rotate_swarm_key": bodies.RotateKeyBody,
    "drain": bodies.DrainBody,
    "set_cluster_setting": bodies.ClusterSettingBody,
}
"""Which body an endpoint reads; for the reference page."""

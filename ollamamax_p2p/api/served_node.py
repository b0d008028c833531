"""ServedNode: what the API needs of a node, and the values that cross the API.

`node.Node` implements it; the tests have a small one in RAM (`tests/api/ram_node.py`). The values
are plain frozen dataclasses, so that server and client share one definition and library users get
the same objects with or without HTTP in between.
"""

from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ollamamax_p2p.cluster import ClusterStatus, RoleWish
from ollamamax_p2p.content import CreationRequest, ListedModel, ShowAnswer
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.transfer import PullProgress, PullReport, PushReport


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """The model store as it is now."""

    path: str
    writable: bool
    free_bytes: int
    """Room left on its file system."""
    model_count: int
    partial_count: int = 0
    """Unfinished blobs that a later pull resumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One look at a running node."""

    peer_id: str
    name: str
    """What peers are shown; the host name unless set."""
    version: str
    swarm_id: str
    """Empty while the node belongs to no swarm."""
    open_swarm: bool
    """True if the swarm has no key: everybody may connect."""
    addresses: tuple[str, ...]
    """Multiaddrs with /p2p/<peer id> under which it can be dialled."""
    api_address: str
    """host:port of the HTTP API; "" if it has none."""
    ollama_address: str = ""
    """host:port where Ollama's API is served besides; "" if nowhere."""
    data_dir: str
    uptime_s: float
    now: str
    """This node's clock, ISO 8601 in UTC."""
    peer_count: int
    store: StoreStatus
    pulls: tuple[str, ...] = ()
    """Models being pulled right now."""
    mdns: str = "off"
    """`on`, `off`, or why it does not work."""
    other_swarms: tuple[str, ...] = ()
    """Ids of other swarms seen on this network."""
    cluster: ClusterStatus | None = None
    """What is agreed; None where this node is a member of no cluster (in an open swarm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A connected peer."""

    peer_id: str
    address: str
    """Its transport address as seen from here; "" if unknown."""
    inbound: bool
    """True if it dialled us."""
    member: bool
    """True if it is admitted to the swarm."""
    name: str = ""
    """What it calls itself; not verified."""
    round_trip_ms: float | None = None
    banned: str = ""
    """What it lied about, if it did: no model is fetched from it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model in the store."""

    name: str
    """As Ollama displays it: default host and namespace left out, the tag always there."""
    digest: str
    """sha256:<hex> of the manifest; its first 12 digits are what `list` shows as ID."""
    size: int
    """Bytes of all its blobs."""
    modified_at: datetime
    note: str = ""
    """What its maker should know of a new one: why the cluster has not agreed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayer:
    """One blob of a model."""

    media_type: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """What a model is made of, as `show` tells it. Empty text or 0 means that the model does not
    say.
    """

    name: str
    digest: str
    size: int
    modified_at: datetime
    layers: tuple[ModelLayer, ...] = ()
    format: str = ""
    """`gguf` or `safetensors`."""
    architecture: str = ""
    parameter_size: str = ""
    """As people say it: `134.52M`."""
    quantization: str = ""
    context_length: int = 0
    embedding_length: int = 0
    capabilities: tuple[str, ...] = ()
    license: str = ""
    modelfile: str = ""
    parameters: str = ""
    """One per line, name and value."""
    template: str = ""
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """A ticket just issued."""

    ticket: str
    uses: int
    expires_at: str
    """ISO 8601 in UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinReport:
    """The swarm a node now belongs to."""

    swarm_id: str
    peers: tuple[str, ...]
    """Who let it in, or answered."""


OnProgress = Callable[[PullProgress], None]
"""Called for every state of a pull, push or creation, in the event loop; must not block."""


class ServedNode(Protocol):
    """A running node, as the API sees it. Raises OmxErrors only; names are taken as users write
    them.
    """

    @property
    def events(self) -> EventFeed:
        """What happens on this node."""

    async def status(self) -> NodeStatus:
        """One look at the node."""

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers connected now."""

    async def models(self) -> tuple[ModelInfo, ...]:
        """What the store holds, newest first."""

    async def show(self, name: str) -> ModelDetails:
        """Raises BadName, ModelNotFound."""

    async def copy(self, source: str, destination: str) -> ModelInfo:
        """Give a model a second name. Raises BadName, ModelNotFound, StoreReadOnly."""

    async def remove(self, name: str) -> None:
        """Remove a name and the blobs that no other needs. Raises BadName, ModelNotFound,
        StoreReadOnly.
        """

    async def pull(
        self,
        name: str,
        *,
        from_origin: bool = False,
        insecure: bool = False,
        on_progress: OnProgress | None = None,
    ) -> PullReport:
        """Fetch a model from whoever has it. Cancelling keeps what is there for the next time.

        from_origin: ask the origin, not the peers, what the name means now; the bytes may still
        come from peers.
        insecure: this origin may be spoken to by plain http.
        """

    async def import_model(self, path: Path, name: str) -> ModelInfo:
        """Make a local GGUF or safetensors file a model; the file is neither moved nor changed."""

    async def create_model(self, name: str, modelfile: str, base_dir: Path) -> ModelInfo:
        """Make a model from a Modelfile's text; relative paths in it count from base_dir."""

    async def push(
        self, name: str, *, insecure: bool = False, on_progress: OnProgress | None = None
    ) -> PushReport:
        """Give a model of this node to the registry that its name names. Raises BadName,
        ModelNotFound, OriginTrouble.
        """

    async def listed_models(self) -> tuple[ListedModel, ...]:
        """What the store holds and what each is, newest first."""

    async def show_model(
        self,
        name: str,
        *,
        verbose: bool = False,
        system: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> ShowAnswer:
        """All that a model says about itself. Raises BadName, ModelNotFound."""

    async def has_blob(self, digest: str) -> bool:
        """Whether the store has a blob. Raises BadDigest."""

    async def put_blob(
        self, digest: str, parts: AsyncIterable[bytes], *, size: int | None = None
    ) -> None:
        """Store a blob as it arrives. size: how long it says it will be, if it does. Raises
        BadDigest, DigestMismatch, StoreFull, StoreReadOnly, and what iterating over parts raises.
        """

    async def create_from_request(
        self, name: str, request: CreationRequest, *, on_progress: OnProgress | None = None
    ) -> ModelInfo:
        """Make a model of another, which is pulled if need be, or of blobs in the store. Raises
        BadInput, ModelNotFound, StoreFull, StoreReadOnly.
        """

    async def invite(self, *, uses: int, expires_s: float) -> Invitation:
        """Issue a ticket to this node's swarm."""

    async def join(self, ticket_or_addresses: Sequence[str]) -> JoinReport:
        """Become a member by a ticket, or connect to the given multiaddrs. Raises BadTicket and
        its kinds, BadAddress, PeerUnreachable, NotAdmitted.
        """

    async def withdraw_tickets(self) -> int:
        """Let nobody join by a ticket that was issued before; gives how many were still good."""

    async def leave(self) -> str:
        """Be a member no more and forget the swarm. Models stay. `left`, `not in a swarm`, or what
        the others still have to do.
        """

    async def cluster_status(self) -> ClusterStatus:
        """The cluster in one look. Raises BadConfig where this node is a member of none."""

    async def set_role(self, peer: str, role: RoleWish) -> None:
        """Make a member a voter or a learner. Raises BadInput, PeerNotFound, NetworkTrouble."""

    async def expel(self, peer: str) -> None:
        """Remove a member. Raises as `set_role`."""

    async def transfer_leader(self, peer: str) -> None:
        """Let another voter lead. Raises as `set_role`, and NotLeader."""

    async def snapshot(self) -> int:
        """Make a snapshot of the agreed state; gives the last index in it."""

    async def rotate_swarm_key(self, *, force: bool) -> tuple[str, ...]:
        """Give the swarm a new key; gives the names of members that will need a new ticket."""

    async def set_clock(self) -> int:
        """Have the cluster take this node's clock for the time; gives it, Unix seconds. All tickets
        are withdrawn.
        """

    async def set_cluster_setting(self, key: str, value: str) -> None:
        """Change a setting that the whole cluster shares."""

    def request_stop(self) -> None:
        """Ask the node's owner to close it; `wait_for_stop` then returns. Idempotent."""

    async def wait_for_stop(self) -> None:
        """Returns once somebody has asked the node to stop."""

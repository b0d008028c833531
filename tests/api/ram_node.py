"""A ServedNode in RAM: models are a dictionary, a pull does what its script says, the cluster is a
list of members that are at once what they shall be.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import trio

from ollamamax_p2p.api import (
    Invitation,
    JoinReport,
    ModelDetails,
    ModelInfo,
    NodeStatus,
    PeerInfo,
    StoreStatus,
)
from ollamamax_p2p.cluster import ClusterMember, ClusterStatus, RoleWish
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import (
    BadInput,
    BadModelFile,
    ModelNotFound,
    PeerNotFound,
    TicketMistyped,
)
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.transfer import PullProgress, PullReport, SourceShare

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
OTHER_PEER = "12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"
THIRD_PEER = "12D3KooWBfMxHK4Uso1BxznNgR7DgwqeBiBw4YrsymQJ5JhLU2fT"
WRITTEN = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)

Tell = Callable[[PullProgress], None]
PullScript = Callable[[str, Tell], Awaitable[None]]


def progress(completed: int, total: int = 100) -> PullProgress:
    return PullProgress(
        status="pulling 0123456789ab",
        digest="sha256:" + "0123456789ab" + "0" * 52,
        total=total,
        completed=completed,
        sources=(SourceShare(name=OTHER_PEER, kind="peer", bytes=completed),),
        active_sources=1,
    )


async def at_once(name: str, tell: Tell) -> None:
    tell(PullProgress(status="pulling manifest"))
    tell(progress(40))
    await trio.lowlevel.checkpoint()
    tell(progress(100))


def member(peer: str, name: str, raft_id: int, **changes) -> ClusterMember:
    facts = {
        "peer_id": peer,
        "name": name,
        "region": "",
        "role": "voter",
        "wish": "auto",
        "may_vote": True,
        "raft_id": raft_id,
        "lag": 0,
        "state": "replicate",
        "last_contact_s": 0.1,
    }
    return ClusterMember(**(facts | changes))


THREE_MEMBERS = (
    member(PEER, "ram", 1, role="leader", state="", last_contact_s=0.0),
    member(OTHER_PEER, "bob", 2, region="attic", lag=3),
    member(THIRD_PEER, "carol", 3, addresses=(f"/ip4/127.0.0.1/tcp/9/p2p/{THIRD_PEER}",)),
)


def cluster_status(members: tuple[ClusterMember, ...] = THREE_MEMBERS, **changes) -> ClusterStatus:
    """Of three voters that are well, as the first of them sees it, unless changed."""
    facts = {
        "peer_id": PEER,
        "role": "leader",
        "leader": PEER,
        "term": 4,
        "has_quorum": True,
        "last_contact_s": 0.05,
        "committed": 120,
        "applied": 120,
        "log_first": 1,
        "log_last": 120,
        "snapshot": 0,
        "state_index": 120,
        "state_hash": "ab" * 32,
        "changing": False,
        "trouble": "",
        "swarm_key_generation": 1,
        "tickets": 2,
        "settings": {"autopilot": True, "voters_max": 5, "stability_s": 10},
    }
    return ClusterStatus(**(facts | changes), members=members)


@dataclass
class RamNode:
    script: PullScript = at_once
    held: dict[str, ModelInfo] = field(default_factory=dict)
    events: EventFeed = field(default_factory=EventFeed)
    joined: list[Sequence[str]] = field(default_factory=list)
    pulls_begun: int = 0
    pulls_cancelled: int = 0
    cluster: ClusterStatus = field(default_factory=cluster_status)
    obeys: bool = True
    """False: what a member shall be is agreed on, and never comes true."""
    note: str = ""
    """With every model that is made."""
    leave_outcome: str = "left"
    stop_asked: trio.Event = field(default_factory=trio.Event)

    async def status(self) -> NodeStatus:
        store = StoreStatus(
            path="/models", writable=True, free_bytes=5_000_000_000, model_count=len(self.held)
        )
        return NodeStatus(
            peer_id=PEER,
            name="ram",
            version="0.1.0",
            swarm_id="5a5a5a5a",
            open_swarm=False,
            addresses=(f"/ip4/127.0.0.1/tcp/4011/p2p/{PEER}",),
            api_address="127.0.0.1:11435",
            data_dir="/data",
            uptime_s=12.5,
            now="2026-11-22T12:00:00Z",
            peer_count=1,
            store=store,
            cluster=self.cluster,
        )

    async def peers(self) -> tuple[PeerInfo, ...]:
        return (
            PeerInfo(peer_id=OTHER_PEER, address="/ip4/127.0.0.1/tcp/9", inbound=True, member=True),
        )

    async def models(self) -> tuple[ModelInfo, ...]:
        return tuple(self.held.values())

    async def show(self, name: str) -> ModelDetails:
        found = self._find(name)
        return ModelDetails(
            name=found.name,
            digest=found.digest,
            size=found.size,
            modified_at=found.modified_at,
            architecture="llama",
            license="MIT",
            modelfile="FROM x",
            template="{{ .Prompt }}",
        )

    async def copy(self, source: str, destination: str) -> ModelInfo:
        name = str(parse_model_name(destination))
        self.held[name] = replace(self._find(source), name=name, note=self.note)
        return self.held[name]

    async def remove(self, name: str) -> None:
        del self.held[self._find(name).name]

    async def pull(
        self,
        name: str,
        *,
        from_origin: bool = False,
        insecure: bool = False,
        on_progress: Tell | None = None,
    ) -> PullReport:
        self.pulls_begun += 1
        try:
            await self.script(name, on_progress or (lambda _: None))
        except trio.Cancelled:
            self.pulls_cancelled += 1
            raise
        held = self._hold(name, 100)
        return PullReport(
            model=held.name,
            manifest_digest=held.digest,
            bytes_total=100,
            bytes_fetched=100,
            bytes_refetched=0,
            seconds=2.0,
            sources=(SourceShare(name=OTHER_PEER, kind="peer", bytes=100),),
        )

    async def import_model(self, path: Path, name: str) -> ModelInfo:
        if path.suffix != ".gguf":
            raise BadModelFile(str(path), "not a GGUF file")
        return self._hold(name, 7)

    async def create_model(self, name: str, modelfile: str, base_dir: Path) -> ModelInfo:
        if "FROM" not in modelfile:
            raise BadModelFile("Modelfile", "it has no FROM")
        return self._hold(name, len(modelfile))

    async def invite(self, *, uses: int, expires_s: float) -> Invitation:
        return Invitation(ticket="omx1ticket", uses=uses, expires_at="2026-11-23T12:00:00Z")

    async def join(self, ticket_or_addresses: Sequence[str]) -> JoinReport:
        if ticket_or_addresses[0] == "omx1broken":
            raise TicketMistyped("its checksum is wrong")
        self.joined.append(ticket_or_addresses)
        return JoinReport(swarm_id="5a5a5a5a", peers=(OTHER_PEER,))

    async def withdraw_tickets(self) -> int:
        count, self.cluster = self.cluster.tickets, replace(self.cluster, tickets=0)
        return count

    async def leave(self) -> str:
        return self.leave_outcome

    async def cluster_status(self) -> ClusterStatus:
        return self.cluster

    async def set_role(self, peer: str, role: RoleWish) -> None:
        found = self._member(peer)
        changed = replace(found, wish=role)
        if self.obeys and role != "auto" and found.role != "leader":
            changed = replace(changed, role=role)
        self._replace(found, changed)

    async def expel(self, peer: str) -> None:
        self._replace(self._member(peer))

    async def transfer_leader(self, peer: str) -> None:
        found = self._member(peer)
        if found.role not in ("voter", "leader"):
            raise BadInput(f"{peer} has no vote")
        self._replace(self._member(self.cluster.leader), replace(THREE_MEMBERS[0], role="voter"))
        self._replace(found, replace(found, role="leader"))
        self.cluster = replace(self.cluster, leader=found.peer_id, term=self.cluster.term + 1)

    async def snapshot(self) -> int:
        self.cluster = replace(self.cluster, snapshot=self.cluster.applied)
        return self.cluster.applied

    async def rotate_swarm_key(self, *, force: bool) -> tuple[str, ...]:
        away = tuple(each.name for each in self.cluster.members if each.last_contact_s is None)
        if away and not force:
            raise BadInput(f"{len(away)} of the members cannot be reached now")
        self.cluster = replace(
            self.cluster, swarm_key_generation=self.cluster.swarm_key_generation + 1
        )
        return away

    async def set_clock(self) -> int:
        self.cluster = replace(self.cluster, tickets=0)
        return 1_800_000_000

    async def set_cluster_setting(self, key: str, value: str) -> None:
        if key not in self.cluster.settings:
            raise BadInput(f"{key}: no such setting of the cluster")
        settings = self.cluster.settings | {key: int(value)}
        self.cluster = replace(self.cluster, settings=settings)

    def _member(self, text: str) -> ClusterMember:
        for each in self.cluster.members:
            if text in (each.peer_id, each.name):
                return each
        raise PeerNotFound(text)

    def _replace(self, old: ClusterMember, *new: ClusterMember) -> None:
        members = self.cluster.members
        at = members.index(old)
        self.cluster = replace(self.cluster, members=(*members[:at], *new, *members[at + 1 :]))

    def request_stop(self) -> None:
        self.stop_asked.set()

    async def wait_for_stop(self) -> None:
        await self.stop_asked.wait()

    def _hold(self, name: str, size: int) -> ModelInfo:
        whole = str(parse_model_name(name))
        self.held[whole] = ModelInfo(
            name=whole,
            digest="sha256:" + "ab" * 32,
            size=size,
            modified_at=WRITTEN,
            note=self.note,
        )
        return self.held[whole]

    def _find(self, name: str) -> ModelInfo:
        whole = str(parse_model_name(name))
        if whole not in self.held:
            raise ModelNotFound(name)
        return self.held[whole]

"""A ServedNode in RAM: models are a dictionary, a pull does what its script says."""

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
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import BadModelFile, ModelNotFound, TicketMistyped
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.transfer import PullProgress, PullReport, SourceShare

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
OTHER_PEER = "12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"
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


@dataclass
class RamNode:
    script: PullScript = at_once
    held: dict[str, ModelInfo] = field(default_factory=dict)
    events: EventFeed = field(default_factory=EventFeed)
    joined: list[Sequence[str]] = field(default_factory=list)
    pulls_begun: int = 0
    pulls_cancelled: int = 0
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

    async def copy(self, source: str, destination: str) -> None:
        name = str(parse_model_name(destination))
        self.held[name] = replace(self._find(source), name=name)

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

    async def leave(self) -> str:
        return "left"

    def request_stop(self) -> None:
        self.stop_asked.set()

    async def wait_for_stop(self) -> None:
        await self.stop_asked.wait()

    def _hold(self, name: str, size: int) -> ModelInfo:
        whole = str(parse_model_name(name))
        self.held[whole] = ModelInfo(
            name=whole, digest="sha256:" + "ab" * 32, size=size, modified_at=WRITTEN
        )
        return self.held[whole]

    def _find(self, name: str) -> ModelInfo:
        whole = str(parse_model_name(name))
        if whole not in self.held:
            raise ModelNotFound(name)
        return self.held[whole]

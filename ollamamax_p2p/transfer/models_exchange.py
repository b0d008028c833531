"""Ask members what a model's name means to them, and answer them (`/omx/models/1`)."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import trio
from msgspec import Meta

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.manifest import MANIFEST_BYTES_MAX, Manifest, parse_manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.discovery import ProviderDirectory
from ollamamax_p2p.errors import (
    MalformedMessage,
    ModelNotFound,
    NoSources,
    OmxError,
    PeerMisbehaved,
)
from ollamamax_p2p.host import PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.wire import Codec, Message, protocol_ids

if TYPE_CHECKING:
    from ollamamax_p2p.host import Requests

ASKED_MAX = 64
"""Members asked at once; in a swarm that is larger, a model worth having is among so many."""

ANSWER_S = 5.0
"""How long members are waited for: a manifest is some KB, read from a file."""

LAGGARDS_S = 0.5
"""How long the rest is waited for once one has answered: a frozen member must not delay every
pull.
"""


class AskManifest(Message, tag="ask_manifest", frozen=True):
    """What does this name mean to you?"""

    name: Annotated[str, Meta(max_length=1_024)]


class HeldManifest(Message, tag="held_manifest", frozen=True):
    """This; a name that is not held is answered by ModelNotFound."""

    raw: Annotated[bytes, Meta(max_length=MANIFEST_BYTES_MAX)]
    modified_at: Annotated[float, Meta(ge=0, le=1e11)]
    """Unix seconds at which the answerer stored it, by its own clock."""


_questions: Codec[AskManifest] = Codec(AskManifest, max_bytes=2_048)
_answers: Codec[HeldManifest] = Codec(HeldManifest, max_bytes=MANIFEST_BYTES_MAX + 1_024)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the members take a name to mean."""

    manifest: Manifest
    holders: int
    """How many gave this one."""
    others: int
    """How many gave another."""


@asynccontextmanager
async def open_models_exchange(
    host: PeerHost,
    store: BlobStore,
    connected_peers: Callable[[], Sequence[PeerId]],
    providers: ProviderDirectory,
    on_misbehaviour: Callable[[PeerId, PeerMisbehaved], None],
) -> AsyncIterator["ModelsExchange"]:
    """Ask and answer for as long as the block is open.

    providers: finds holders beyond the connected peers; models are announced there by `model_key`.
    """
    from ollamamax_p2p.host import open_requests

    async def answer(peer: PeerId, question: AskManifest) -> HeldManifest:
        return await _held(store, parse_model_name(question.name))

    async with open_requests(
        host, protocol_ids.MODELS, requests=_questions, answers=_answers, answer=answer
    ) as requests:
        yield ModelsExchange(requests, connected_peers, providers, on_misbehaviour)


def model_key(name: ModelName) -> Digest:
    """Under which a model's holders are announced and found, as if its name were a blob."""
    return digest_of(b"omx model 1\0" + name.key.encode())


async def _held(store: BlobStore, name: ModelName) -> HeldManifest:
    manifest = await store.manifest(name)
    dates = [model.modified_at for model in await store.models() if model.name.matches(name)]
    return HeldManifest(raw=manifest.raw, modified_at=dates[0].timestamp() if dates else 0.0)


class ModelsExchange:
    """Asks the members."""

    def __init__(
        self,
        requests: "Requests[AskManifest, HeldManifest]",
        connected_peers: Callable[[], Sequence[PeerId]],
        providers: ProviderDirectory,
        on_misbehaviour: Callable[[PeerId, PeerMisbehaved], None],
    ) -> None:
        self._requests = requests
        self._connected_peers = connected_peers
        self._providers = providers
        self._on_misbehaviour = on_misbehaviour

    async def meaning(self, name: ModelName) -> Meaning:
        """What most members take it to mean; of two that are held equally often the one stored
        last. The connected members are asked; if none knows it, those that are said to hold it.

        Raises ModelNotFound if nobody knows it, NoSources if there was nobody to ask.
        """
        neighbours = list(self._connected_peers())[:ASKED_MAX]
        held = await self._ask_all(neighbours, name)
        asked = set(neighbours)
        if not held:
            further = [p for p in await self._providers.find(model_key(name)) if p not in asked]
            held = await self._ask_all(further, name)
            asked.update(further)
        if not asked:
            raise NoSources(str(name), "no member of the swarm can be reached; see `omx peers`")
        return choose(name, [answer for _, answer in sorted(held.items())])

    async def _ask_all(
        self, peers: Sequence[PeerId], name: ModelName
    ) -> dict[PeerId, HeldManifest]:
        held: dict[PeerId, HeldManifest] = {}
        with trio.move_on_after(ANSWER_S) as waiting:
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(self._ask, peer, name, held, waiting)
        return held

    async def _ask(
        self,
        peer: PeerId,
        name: ModelName,
        held: dict[PeerId, HeldManifest],
        waiting: trio.CancelScope,
    ) -> None:
        try:
            answer = await self._requests.ask(peer, AskManifest(name=name.full()))
            parse_manifest(answer.raw)
        except PeerMisbehaved as error:
            self._on_misbehaviour(peer, type(error)(peer, error.problem))
        except OmxError:
            return  # it does not know the name, or cannot be asked: the others can
        else:
            held[peer] = answer
            waiting.deadline = min(waiting.deadline, trio.current_time() + LAGGARDS_S)


def choose(name: ModelName, answers: Sequence[HeldManifest]) -> Meaning:
    """The manifest that most gave; ties go to the newest, then to the larger bytes."""
    if not answers:
        raise ModelNotFound(str(name))
    votes = Counter(answer.raw for answer in answers)
    newest = {raw: max(a.modified_at for a in answers if a.raw == raw) for raw in votes}
    raw = max(votes, key=lambda raw: (votes[raw], newest[raw], raw))
    try:
        manifest = parse_manifest(raw)
    except MalformedMessage:
        raise ModelNotFound(str(name)) from None
    return Meaning(manifest, votes[raw], len(answers) - votes[raw])

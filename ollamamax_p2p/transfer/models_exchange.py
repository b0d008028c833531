"""Ask members what a model's name means to them, and answer them (`/omx/models/1`)."""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
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
    NetworkTrouble,
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


FUTURE_MAX_S = 86_400.0
"""A date this far in the future is not a clock that is a little fast; it says nothing then."""


class AskManifest(Message, tag="ask_manifest", frozen=True):
    """What does this name mean to you?"""

    name: Annotated[str, Meta(max_length=1_024)]


_DATE_MAX = 1e11


class HeldManifest(Message, tag="held_manifest", frozen=True):
    """This; a name that is not held is answered by ModelNotFound."""

    raw: Annotated[bytes, Meta(max_length=MANIFEST_BYTES_MAX)]
    modified_at: Annotated[float, Meta(ge=0, le=_DATE_MAX)]
    """Unix seconds at which the answerer stored it, by its own clock."""


_log = logging.getLogger(__name__)

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
    is_banned: Callable[[PeerId], bool],
    wall_clock: Callable[[], float],
) -> AsyncIterator["ModelsExchange"]:
    """Ask and answer for as long as the block is open.

    is_banned: these are neither asked nor listened to. wall_clock: Unix seconds.
    providers: finds holders beyond the connected peers; models are announced there by `model_key`.
    """
    from ollamamax_p2p.host import open_requests

    async def answer(peer: PeerId, question: AskManifest) -> HeldManifest:
        return await _held(store, parse_model_name(question.name))

    async with open_requests(
        host, protocol_ids.MODELS, requests=_questions, answers=_answers, answer=answer
    ) as requests:
        yield ModelsExchange(
            requests, connected_peers, providers, on_misbehaviour, is_banned, wall_clock
        )


def model_key(name: ModelName) -> Digest:
    """Under which a model's holders are announced and found, as if its name were a blob."""
    return digest_of(b"omx model 1\0" + name.key.encode())


async def _held(store: BlobStore, name: ModelName) -> HeldManifest:
    manifest = await store.manifest(name)
    written = (await store.modified_at(name)).timestamp()
    return HeldManifest(raw=manifest.raw, modified_at=min(max(0.0, written), _DATE_MAX))


class ModelsExchange:
    """Asks the members."""

    def __init__(
        self,
        requests: "Requests[AskManifest, HeldManifest]",
        connected_peers: Callable[[], Sequence[PeerId]],
        providers: ProviderDirectory,
        on_misbehaviour: Callable[[PeerId, PeerMisbehaved], None],
        is_banned: Callable[[PeerId], bool],
        wall_clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._connected_peers = connected_peers
        self._providers = providers
        self._on_misbehaviour = on_misbehaviour
        self._is_banned = is_banned
        self._wall_clock = wall_clock

    async def meaning(self, name: ModelName, wanted: Digest | None = None) -> Meaning:
        """What most members take it to mean; of two that are held equally often the one stored
        last. The connected members are asked; if none knows it, those that are said to hold it.

        wanted: the manifest that it must be; other answers do not count.
        Raises ModelNotFound if nobody knows it, NoSources if nobody could be asked.
        """
        neighbours = self._welcome(self._connected_peers())[:ASKED_MAX]
        replies = _only(wanted, await self._ask_all(neighbours, name))
        if not any(replies.values()):
            further = self._welcome(await self._providers.find(model_key(name)))
            others = await self._ask_all([p for p in further if p not in neighbours], name)
            replies |= _only(wanted, others)
            if not any(replies.values()):
                # Who is busy may hold it: the only holder, whom many ask at once, for one.
                silent = [peer for peer in (*neighbours, *further) if peer not in replies]
                replies |= _only(wanted, await self._ask_all(self._welcome(silent), name))
        if not replies:
            raise NoSources(str(name), "no member of the swarm can be reached; see `omx peers`")
        # Somebody may have been found lying while the others were waited for.
        held = [replies[peer] for peer in self._welcome(sorted(replies))]
        return choose(name, [each for each in held if each], self._wall_clock())

    def _welcome(self, peers: Iterable[PeerId]) -> list[PeerId]:
        return [peer for peer in peers if not self._is_banned(peer)]

    async def _ask_all(
        self, peers: Sequence[PeerId], name: ModelName
    ) -> dict[PeerId, HeldManifest | None]:
        """What those said who said anything; None for a no."""
        replies: dict[PeerId, HeldManifest | None] = {}
        with trio.move_on_after(ANSWER_S) as waiting:
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(self._ask, peer, name, replies, waiting)
        return replies

    async def _ask(
        self,
        peer: PeerId,
        name: ModelName,
        replies: dict[PeerId, HeldManifest | None],
        waiting: trio.CancelScope,
    ) -> None:
        try:
            answer = await self._requests.ask(peer, AskManifest(name=name.full()))
            parse_manifest(answer.raw)
        except PeerMisbehaved as error:
            self._on_misbehaviour(peer, type(error)(peer, error.problem))
            replies[peer] = None
        except NetworkTrouble as error:
            _log.info("not asked about %s: %s", name, error)
            return  # the others can be
        except OmxError:
            replies[peer] = None
        else:
            replies[peer] = answer
            waiting.deadline = min(waiting.deadline, trio.current_time() + LAGGARDS_S)


def _only(
    wanted: Digest | None, replies: dict[PeerId, HeldManifest | None]
) -> dict[PeerId, HeldManifest | None]:
    """What is another manifest than the wanted one counts as none."""
    if wanted is None:
        return replies
    return {
        peer: each if each is not None and digest_of(each.raw) == wanted else None
        for peer, each in replies.items()
    }


def choose(name: ModelName, answers: Sequence[HeldManifest], now: float) -> Meaning:
    """The manifest that most gave; ties go to the newest, then to the larger bytes.

    now: Unix seconds; nothing was written later than that.
    """
    if not answers:
        raise ModelNotFound(str(name))
    votes = Counter(answer.raw for answer in answers)
    newest = {
        raw: max(_believed(a.modified_at, now) for a in answers if a.raw == raw) for raw in votes
    }
    raw = max(votes, key=lambda raw: (votes[raw], newest[raw], raw))
    try:
        manifest = parse_manifest(raw)
    except MalformedMessage:
        raise ModelNotFound(str(name)) from None
    return Meaning(manifest, votes[raw], len(answers) - votes[raw])


def _believed(modified_at: float, now: float) -> float:
    """When a manifest was written, given what its holder says."""
    return min(modified_at, now) if modified_at <= now + FUTURE_MAX_S else 0.0

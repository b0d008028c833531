"""Dispatch: one request from its arrival to its end: queue, pick, send, stream back, fail over.

Every decision is `core.choosing`'s; here requests are sent, parts are passed on, and what happened
is told to the chooser. Until the first part has arrived a failure is retried unseen. After it, the
answer goes on at another candidate from what the client has (`Resume`).
"""

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import trio

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadInput,
    ModelNotFound,
    NotAdmitted,
    OmxError,
    PeerNotFound,
    first_named,
)
from ollamamax_p2p.host import PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.inference import Backend, ServableModel
from ollamamax_p2p.inference.core.requests import (
    Delta,
    Embeddings,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Options,
    Part,
    Resume,
    TextRequest,
)
from ollamamax_p2p.router.call import (
    Call,
    NodeLoad,
    QueuePlace,
    RunningModel,
    Server,
    SwarmModel,
)
from ollamamax_p2p.router.core.candidate import RequestFacts
from ollamamax_p2p.router.core.choosing import Choice, Chooser, Refuse, Wait
from ollamamax_p2p.router.core.load_table import KnownNode, LoadTable, model_key
from ollamamax_p2p.router.core.messages import (
    AnyAsk,
    Begun,
    Done,
    DrainRequest,
    Event,
    LoadRequest,
    Shown,
    ShowRequest,
    Terms,
    UnloadRequest,
)
from ollamamax_p2p.router.core.request_facts import facts_of
from ollamamax_p2p.router.desk import Desk, Emit, Show
from ollamamax_p2p.router.forwarding import Forwarding, open_forwarding
from ollamamax_p2p.router.gossip import open_gossip
from ollamamax_p2p.router.settings import RouterSettings

EVENTS_WAITING_MAX = 64
"""Of one answer, between whoever gives it and whoever reads it; beyond it the giver waits."""

DEADLINE_STEP_S = 0.25
"""How much too early an answer may be given up that had begun; the timeout is in seconds."""

FIRST_REPORT_S = 3.0
"""For a peer that was just met to tell what it holds; until then a model may yet be found."""

NEWS_LOOKED_FOR_S = 0.05

TOKENS_OVER_S = 5.0
"""What is told of tokens per second is of this time, to twice this."""

UNLOAD_S = 10.0
"""For a peer to say that it has let go of a model."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a router needs to know of the node that it runs on."""

    name: str
    region: str
    epoch: int
    """When the node started, Unix milliseconds."""
    linked: Callable[[], Sequence[PeerId]]
    """The members connected now."""
    connect: Callable[[PeerId], Awaitable[None]]
    """Be connected to a member. Raises NetworkTrouble, PeerNotFound."""
    is_member: Callable[[str], bool] = lambda peer: True
    """Whose requests are answered, and whose reports believed. All that the door lets in, but in an
    open swarm, where that is everybody.
    """
    show: Show
    """What a model of this node is made of."""
    pull: Callable[[str], Awaitable[None]]
    """Fetch a model to this node."""
    memory: Callable[[], Awaitable[tuple[int, int, str]]]
    """Bytes free for models, in all, and the accelerator's name ("": none)."""
    draining: bool = False
    """Whether the node begins as one that is being drained."""
    on_draining: Callable[[bool], None] = lambda draining: None
    """Told when that changes, by whomever."""


@asynccontextmanager
async def open_router(
    host: PeerHost,
    backends: Sequence[Backend],
    settings: RouterSettings,
    around: Surroundings,
    *,
    rng: random.Random,
) -> AsyncIterator["Router"]:
    """Answer requests by this node's back ends and the others', for as long as the block is open,
    and let the others use this node's.
    """
    table = LoadTable(
        peer=str(host.peer_id),
        epoch=around.epoch,
        settings=settings,
        is_member=around.is_member,
    )
    chooser = Chooser(settings, table, rng=rng)
    desk = Desk(backends, show=around.show, draining=around.draining)

    async def serve(peer: PeerId, request: AnyAsk, terms: Terms, emit: Emit) -> None:
        if not around.is_member(str(peer)):
            raise NotAdmitted(str(peer), "it is no member of this node's cluster")
        await desk.serve(request, terms, emit)
        if isinstance(request, DrainRequest):
            around.on_draining(desk.draining)

    async with open_forwarding(host, serve) as forwarding, trio.open_nursery() as nursery:
        router = Router(host, settings, around, table, chooser, desk, forwarding, nursery)
        async with open_gossip(
            host,
            table,
            interval_s=settings.gossip_interval_s,
            linked=around.linked,
            look=router.look,
            rng=rng,
        ):
            nursery.start_soon(router._wake_those_that_wait)
            await router.look()
            yield router
        nursery.cancel_scope.cancel()


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in the queue."""

    call: Call
    settled: trio.Event = field(default_factory=trio.Event)
    outcome: Choice | Refuse | None = None
    told: QueuePlace | None = None


class Router:
    """Made by `open_router`. It is what `api.ServedInference` asks for."""

    def __init__(
        self,
        host: PeerHost,
        settings: RouterSettings,
        around: Surroundings,
        table: LoadTable,
        chooser: Chooser,
        desk: Desk,
        forwarding: Forwarding,
        nursery: trio.Nursery,
    ) -> None:
        self._host = host
        self._peer = str(host.peer_id)
        self._settings = settings
        self._around = around
        self._table = table
        self._chooser = chooser
        self._desk = desk
        self._forwarding = forwarding
        self._nursery = nursery
        self._waiting: dict[int, _Waiter] = {}
        self._changed = trio.Event()
        self._looking = trio.Lock()
        self._number = 0
        self._linked_since: dict[str, float] = {}
        """When each peer that is connected now was first seen to be."""
        begun = (trio.current_time(), desk.tokens)
        self._tokens_told = (begun, begun)
        """When, and how many tokens this node's engines had given then: twice, the later last."""

    # -- asking ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def answer(self, request: TextRequest, call: Call) -> AsyncIterator["RoutedAnswer"]:
        """See `api.ServedInference.answer`."""
        facts = await self._facts(request, call)
        routed = RoutedAnswer(self, request, facts, call)
        try:
            await routed._begin()
            yield routed
        finally:
            routed._leave()

    async def embed(self, request: EmbedRequest, call: Call) -> tuple[Embeddings, Server]:
        """See `api.ServedInference.embed`."""
        event, server = await self._one_event(request, await self._facts(request, call), call)
        assert isinstance(event, Embeddings)
        return event, server

    async def load(
        self,
        model: str,
        call: Call,
        *,
        keep_alive_s: float | None = None,
        options: Options | None = None,
    ) -> Server:
        """See `api.ServedInference.load`."""
        facts = await self._facts(GenerateRequest(model=model), call)
        request = LoadRequest(model=model, keep_alive_s=keep_alive_s, options=options or Options())
        _, server = await self._one_event(request, replace(facts, needs=()), call)
        return server

    async def _one_event(
        self, request: EmbedRequest | LoadRequest, facts: RequestFacts, call: Call
    ) -> tuple[Event, Server]:
        routed = RoutedAnswer(self, request, facts, call)
        try:
            await routed._begin()
            async for event in routed._events():
                return event, routed.server
        finally:
            routed._leave()
        raise BackendFailed(routed.server.backend, "it ended without an answer")

    async def _facts(self, request: TextRequest | EmbedRequest, call: Call) -> RequestFacts:
        """Numbered; once the model is known to be held by somebody, pulled if settings allow it."""
        if not self._table.holders(request.model):
            await self._heard_of_all_that_just_came(request.model)
            if not self._table.holders(request.model):
                if not self._settings.pull_on_demand:
                    raise ModelNotFound(request.model)
                await self._around.pull(request.model)
                await self.look()
        self._number += 1
        return facts_of(
            request,
            call,
            id=self._number,
            region=self._around.region,
            now=trio.current_time(),
        )

    async def _heard_of_all_that_just_came(self, model: str) -> None:
        """A node that has just joined has yet to be told what the others hold."""
        await self.look()
        while not self._table.holders(model) and self._awaits_reports():  # noqa: ASYNC110
            await trio.sleep(NEWS_LOOKED_FOR_S)

    def _awaits_reports(self) -> bool:
        now = trio.current_time()
        for peer in self._around.linked():
            since = self._linked_since.setdefault(str(peer), now)
            known = self._table.node(str(peer))
            if now - since < FIRST_REPORT_S and (known is None or known.models_at != known.wanted):
                return True
        return False

    async def unload(self, model: str) -> None:
        """See `api.ServedInference.unload`."""
        peers = {holder.peer for holder in self._table.holders(model)}
        if not peers:
            raise ModelNotFound(model)
        key = model_key(model)
        having = {
            peer
            for peer in peers
            if (node := self._table.node(peer)) is not None
            and any(name == key for _, name in node.loaded)
        }

        async def unload_at(peer: str) -> None:
            try:
                with trio.move_on_after(UNLOAD_S):
                    await self._run_at(peer, UnloadRequest(model=model), Terms(), _ignore)
            except OmxError as error:
                _log.info("peer %s has not let go of %s: %s", peer, model, error)

        async with trio.open_nursery() as nursery:
            for peer in having | ({self._peer} & peers):
                nursery.start_soon(unload_at, peer)
        await self.look()

    async def show(self, model: str, *, verbose: bool) -> bytes:
        """What a model is made of, as JSON, told by a node that holds it. Raises ModelNotFound."""
        holders = self._table.holders(model)
        # This node first: it costs nothing there.
        peers = sorted({holder.peer for holder in holders}, key=lambda peer: peer != self._peer)
        found: list[bytes] = []

        async def take(event: Event) -> None:
            if isinstance(event, Shown):
                found.append(event.body)

        trouble: OmxError = ModelNotFound(model)
        for peer in peers[: self._settings.attempts_max]:
            try:
                await self._run_at(peer, ShowRequest(model=model, verbose=verbose), Terms(), take)
            except OmxError as error:
                trouble = error
            if found:
                return found[0]
        raise trouble

    # -- seeing ----------------------------------------------------------------------------------

    async def look(self) -> None:
        """See what this node's back ends have, so that choosing knows."""
        linked = {str(peer) for peer in self._around.linked()}
        now = trio.current_time()
        self._linked_since = {peer: self._linked_since.get(peer, now) for peer in linked}
        async with self._looking:
            loads, models = await self._desk.look(self._chooser.speeds)
            free, total, accelerator = await self._around.memory()
            self._table.tell(
                node=self._around.name,
                draining=self._desk.draining,
                memory_free=free,
                memory_total=total,
                accelerator=accelerator,
                region=self._around.region,
                tokens_per_s=self._tokens_per_s(),
                backends=loads,
                models=models,
                now=trio.current_time(),
            )
        self._changed.set()

    async def drain(self, node: str, draining: bool) -> None:
        """Have a node, by name or peer id, begin nothing new on its back ends, or begin again; what
        runs is finished. Raises PeerNotFound, BadInput if two have that name, NetworkTrouble.
        """
        peer = self._peer_called(node)
        await self._run_at(peer, DrainRequest(draining=draining), Terms(), _ignore)
        if peer == self._peer:
            self._around.on_draining(draining)
        await self.look()

    def _peer_called(self, node: str) -> str:
        reports = [each.report for each in self._nodes()]
        found = {each.peer for each in reports if node in (each.peer, each.node)}
        if not found:
            raise PeerNotFound(node)
        if len(found) > 1:
            raise BadInput(f"{len(found)} nodes are called {node!r}; give the peer id")
        return found.pop()

    def _tokens_per_s(self) -> float:
        """Over the last TOKENS_OVER_S or so."""
        now, told = trio.current_time(), self._tokens_told
        if now - told[0][0] >= TOKENS_OVER_S:
            self._tokens_told = (told[1], (now, self._desk.tokens))
        since, tokens = self._tokens_told[0]
        return (self._desk.tokens - tokens) / (now - since) if now > since else 0.0

    @property
    def running(self) -> int:
        """Requests that this node's own back ends have."""
        return self._desk.running

    @property
    def waiting(self) -> int:
        """Requests in this node's queue."""
        return len(self._waiting)

    def _nodes(self) -> list[KnownNode]:
        return self._table.nodes(now=trio.current_time())

    async def nodes(self) -> tuple[NodeLoad, ...]:
        """What is known of every node's load, this one first."""
        await self.look()
        now = trio.current_time()
        found = [_node_load(each, now) for each in self._nodes()]
        return tuple(sorted(found, key=lambda each: (each.peer_id != self._peer, each.node)))

    async def swarm_models(self) -> tuple[SwarmModel, ...]:
        """See `api.ServedInference.swarm_models`."""
        await self.look()
        found: dict[str, tuple[ServableModel, list[Server]]] = {}
        for node in sorted(self._nodes(), key=lambda node: node.report.peer != self._peer):
            for backend in node.models:
                server = Server(
                    peer_id=node.report.peer, node=node.report.node, backend=backend.name
                )
                for model in backend.models:
                    found.setdefault(model_key(model.name), (model, []))[1].append(server)
        models = [SwarmModel(model=model, holders=tuple(at)) for model, at in found.values()]
        return tuple(sorted(models, key=lambda each: -each.model.modified_at))

    async def running_models(self) -> tuple[RunningModel, ...]:
        """See `api.ServedInference.running_models`."""
        await self.look()
        found = [
            RunningModel(
                model=model,
                server=Server(
                    peer_id=node.report.peer, node=node.report.node, backend=backend.name
                ),
            )
            for node in self._nodes()
            for backend in node.report.backends
            for model in backend.loaded
        ]
        return tuple(
            sorted(
                found,
                key=lambda each: (
                    -(float("inf") if each.model.expires_at is None else each.model.expires_at)
                ),
            )
        )

    # -- the queue -------------------------------------------------------------------------------

    async def _placed(self, facts: RequestFacts, call: Call) -> Choice:
        """Where the request goes, once it goes anywhere. Raises what the chooser refuses it by."""
        outcome = self._chooser.choose(facts, now=trio.current_time())
        if isinstance(outcome, Wait):
            waiter = self._waiting[facts.id] = _Waiter(call)
            _tell_place(waiter, outcome.place)
            self._changed.set()
            try:
                await waiter.settled.wait()
            finally:
                del self._waiting[facts.id]
                if waiter.outcome is None:
                    self._chooser.leave(facts.id)
            assert waiter.outcome is not None
            outcome = waiter.outcome
        if isinstance(outcome, Refuse):
            raise outcome.error
        return outcome

    async def _wake_those_that_wait(self) -> None:
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            self._settle(now)
            at = self._chooser.next_wake(now=now)
            with trio.CancelScope(deadline=float("inf") if at is None else at):
                await self._changed.wait()

    def _settle(self, now: float) -> None:
        for outcome in self._chooser.due(now=now):
            waiter = self._waiting.get(outcome.request.id)
            if waiter is not None:
                waiter.outcome = outcome
                waiter.settled.set()
            elif isinstance(outcome, Choice):  # its client left in this very turn
                self._chooser.cancelled(outcome.attempt, now=now)
        if any(waiter.call.on_queue for waiter in self._waiting.values()):
            for number, place in self._chooser.places(now=now).items():
                if number in self._waiting:
                    _tell_place(self._waiting[number], place)

    # -- sending ---------------------------------------------------------------------------------

    async def _run_at(self, peer: str, request: AnyAsk, terms: Terms, emit: Emit) -> None:
        if peer == self._peer:
            await self._desk.serve(request, terms, emit)
            return
        node = PeerId(peer)
        await self._around.connect(node)
        await self._forwarding.run(node, request, terms, emit)

    def _something_happened(self) -> None:
        if self._waiting:  # else nobody is to be woken
            self._changed.set()


class RoutedAnswer:
    """An answer on its way; see `call.Answer`."""

    def __init__(
        self,
        router: Router,
        request: TextRequest | EmbedRequest | LoadRequest,
        facts: RequestFacts,
        call: Call,
    ) -> None:
        self.servers: tuple[Server, ...] = ()
        self.queued_s = 0.0
        self._router = router
        self._request = request
        self._facts = facts
        self._call = call
        self._send, self._receive = trio.open_memory_channel[Event](EVENTS_WAITING_MAX)
        self._left = False
        self._begun = trio.Event()
        self._error: OmxError | None = None
        self._attempts: dict[int, trio.CancelScope] = {}
        self._winner: int | None = None
        """The attempt whose parts are passed on."""
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._tokens: list[int] = []
        self._tokens_known = True
        self._deltas = 0
        self._asked_at = trio.current_time()
        self._first_at = 0.0

    @property
    def server(self) -> Server:
        """Who answers now."""
        return self.servers[-1]

    async def __aiter__(self) -> AsyncIterator[Part]:
        """See `call.Answer`."""
        async for event in self._events():
            if isinstance(event, Delta | Finish):
                yield event

    async def _events(self) -> AsyncIterator[Event]:
        while True:
            # What came in one burst goes on in one turn of the event loop, and in one write.
            try:
                event = self._receive.receive_nowait()
            except trio.WouldBlock:
                try:
                    event = await self._receive.receive()
                except trio.EndOfChannel:
                    break
            except trio.EndOfChannel:
                break
            yield event
        if self._error is not None:
            raise self._error

    async def _begin(self) -> None:
        """Returns once the first part is here. Raises what it came to instead."""
        choice = await self._router._placed(self._facts, self._call)
        self.queued_s = choice.queued_s
        self._start(choice)
        await self._begun.wait()
        if self._error is not None and not self.servers:
            raise self._error

    def _leave(self) -> None:
        self._left = True
        for scope in self._attempts.values():
            scope.cancel()

    def _start(self, choice: Choice) -> None:
        if self._left:
            self._router._chooser.cancelled(choice.attempt, now=trio.current_time())
            return
        scope = self._attempts[choice.attempt] = trio.CancelScope()
        # In the router's nursery, because errors that come through one of its own would be groups.
        self._router._nursery.start_soon(self._attempt, choice, scope)

    async def _attempt(self, choice: Choice, scope: trio.CancelScope) -> None:
        """One try, from its sending to its end; what comes of it is told to the chooser."""
        number, chooser = choice.attempt, self._router._chooser
        error: OmxError | None = None
        finish: Finish | None = None
        with scope:
            try:
                finish = await self._try(choice)
            except* Exception as group:  # noqa: BLE001 - a request's fault is not the node's
                error = first_named(group)
                if error is None:
                    _log.error("a request failed unexpectedly", exc_info=group)
                    error = BackendFailed(
                        choice.candidate.key.backend, "a fault of omx, see its log"
                    )
        del self._attempts[number]
        now = trio.current_time()
        if scope.cancelled_caught:
            chooser.cancelled(number, now=now)
        elif error is None:
            chooser.ended(number, usage=finish.usage if finish else None, now=now)
            self._end(None)
        else:
            self._failed(number, error, now)
        self._router._something_happened()

    def _failed(self, number: int, error: OmxError, now: float) -> None:
        outcome = self._router._chooser.failed(number, error, now=now)
        if self._winner == number:
            self._winner = None
        if isinstance(outcome, Choice):
            self._start(outcome)
        elif isinstance(outcome, Refuse):
            self._end(outcome.error)

    def _end(self, error: OmxError | None) -> None:
        self._error = error
        self._begun.set()
        self._send.close()

    async def _try(self, choice: Choice) -> Finish | None:
        if choice.after_s:
            await trio.sleep(choice.after_s)
        key = choice.candidate.key
        settings = self._router._settings
        patience = trio.CancelScope(deadline=trio.current_time() + choice.first_part_within_s)
        finish: list[Finish] = []
        server = Server(peer_id=key.peer, node=choice.candidate.node, backend=key.backend)

        async def take(event: Event) -> None:
            if isinstance(event, Begun):
                return
            if not self._wins(choice, server):
                await trio.sleep_forever()  # the other was first; this one is being cancelled
            if isinstance(event, Finish):
                finish.append(event)
                event = self._of_the_whole(event)
            self._note(event)
            try:
                self._send.send_nowait(event)
            except trio.WouldBlock:
                # Who reads slowly is not a candidate that hangs.
                patience.deadline = float("inf")
                await self._send.send(event)
            until = trio.current_time() + settings.next_part_timeout_s
            # Moving a deadline costs as much as all else here: not for each part.
            if not until - DEADLINE_STEP_S < patience.deadline <= until:
                patience.deadline = until

        terms = Terms(
            backend=key.backend,
            user=self._call.user[:256],
            priority=self._call.priority,
            deadline_s=self._time_left_s(),
        )
        with patience:
            if choice.hedge_after_s is None:
                await self._router._run_at(key.peer, self._asked(choice), terms, take)
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hedge, choice)
                    await self._router._run_at(key.peer, self._asked(choice), terms, take)
                    nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            raise BackendUnavailable(key.backend, "it gave nothing for too long")
        return finish[0] if finish else None

    def _of_the_whole(self, finish: Finish) -> Finish:
        """The end of an answer that moved: the last engine timed its own part only."""
        if len(self.servers) < 2:
            return finish
        now = trio.current_time()
        usage = msgspec.structs.replace(
            finish.usage,
            completion_ns=int((now - self._first_at) * 1e9),
            total_ns=int((now - self._asked_at) * 1e9),
        )
        return msgspec.structs.replace(finish, usage=usage)

    def _time_left_s(self) -> float | None:
        """Of what the client gives until the answer begins."""
        if self._facts.begin_by is None or self.servers:
            return None
        return min(max(self._facts.begin_by - trio.current_time(), 0.0), 86_400.0)

    async def _hedge(self, choice: Choice) -> None:
        assert choice.hedge_after_s is not None
        await trio.sleep(choice.hedge_after_s)
        second = self._router._chooser.hedge(choice.attempt, now=trio.current_time())
        if second is not None:
            self._start(second)

    def _wins(self, choice: Choice, server: Server) -> bool:
        """Whether this attempt's parts are the answer's; its first part decides."""
        if self._winner is None:
            self._winner = choice.attempt
            self._router._chooser.first_part(choice.attempt, now=trio.current_time())
            self._first_at = self._first_at or trio.current_time()
            self.servers = (*self.servers, server)
            for number, scope in self._attempts.items():
                if number != choice.attempt:
                    scope.cancel()  # it was asked beside this one, and is later
            self._begun.set()
        return self._winner == choice.attempt

    def _note(self, event: Event) -> None:
        """Remember what the client has, should the answer have to go on elsewhere."""
        if not isinstance(event, Delta):
            return
        self._deltas += 1
        self._text.append(event.text)
        self._thinking.append(event.thinking)
        self._tokens += event.tokens
        if (event.text or event.thinking) and not event.tokens:
            self._tokens_known = False

    def _asked(self, choice: Choice) -> TextRequest | EmbedRequest | LoadRequest:
        """The request, under the name that the candidate has for the model."""
        request = msgspec.structs.replace(self._request, model=choice.candidate.key.model)
        if not choice.resumes or isinstance(request, EmbedRequest | LoadRequest):
            return request
        tokens = tuple(self._tokens) if self._tokens_known else ()
        resume = Resume(
            text="".join(self._text),
            thinking="".join(self._thinking),
            tokens=tokens,
            completion_tokens=len(tokens) or self._deltas,
        )
        return msgspec.structs.replace(request, resume=resume)


def _node_load(known: KnownNode, now: float) -> NodeLoad:
    report = known.report
    loaded = [model for backend in report.backends for model in backend.loaded]
    return NodeLoad(
        peer_id=report.peer,
        node=report.node,
        region=report.region,
        draining=report.draining,
        heard_s=max(now - known.made_at, 0.0),
        memory_free=report.memory_free,
        memory_total=report.memory_total,
        accelerator=report.accelerator,
        backends=tuple(backend.name for backend in report.backends),
        slots=sum(backend.slots for backend in report.backends),
        busy=sum(model.busy for model in loaded),
        queued=sum(backend.queued for backend in report.backends),
        tokens_per_s=report.tokens_per_s,
        models=sum(len(backend.models) for backend in known.models),
        loaded=tuple(model.name for model in loaded),
    )


def _tell_place(waiter: _Waiter, place: QueuePlace) -> None:
    if waiter.call.on_queue is not None and place != waiter.told:
        waiter.told = place
        waiter.call.on_queue(place)


async def _ignore(event: Event) -> None:
    assert isinstance(event, Done | Begun)

"""Which models are in memory: loads them, shares them, unloads idle ones, keeps to the budget.

Each model is a process of its own (`engine_process`), run by a task of the pool. Who uses one holds
it; the timer of `keep_alive` begins when nobody does. A process that ended by itself is started
again for the next request, later each time it happens again.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from ollamamax_p2p.errors import BackendUnavailable, OmxError, first_named
from ollamamax_p2p.inference.core.engine_messages import EngineStart
from ollamamax_p2p.inference.core.memory import DoesNotFit, InMemory, models_to_unload
from ollamamax_p2p.inference.engine_process import EngineProcess, open_engine
from ollamamax_p2p.inference.settings import InferenceSettings, MiB

log = logging.getLogger(__name__)

BACKOFF_S_MAX = 60.0
UNLOAD_TRY_S = 1.0
"""How often somebody who waits for room looks again: a model that becomes idle tells him, so this
is only for one whose process dies meanwhile."""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What shares one process: the same model, for answers or for vectors."""

    digest: str
    embeds: bool


@dataclass(slots=True, eq=False)
class Engine:
    """A model in memory, or on its way there."""

    key: EngineKey
    name: str
    start: EngineStart
    size: int
    """Bytes: estimated until it is loaded, then as the system tells."""
    turns: trio.CapacityLimiter
    """One for each slot."""
    keep_alive_s: float
    loaded_at: float = 0.0
    last_used: float = 0.0
    users: int = 0
    expires_at: float | None = None
    """On trio's clock; None: in use, or it stays."""
    process: EngineProcess | None = None
    failure: OmxError | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    stop: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)

    @property
    def loading(self) -> bool:
        """Not ready yet."""
        return not self.ready.is_set()


@dataclass(slots=True)
class _Crashes:
    count: int
    not_before: float
    failure: OmxError


class EnginePool:
    """Made by `open_engine_pool`."""

    def __init__(
        self,
        backend: str,
        folder: Path,
        settings: InferenceSettings,
        budget: int,
        nursery: trio.Nursery,
    ) -> None:
        self._backend, self._folder, self._settings = backend, folder, settings
        self.budget = budget
        self._nursery = nursery
        self._engines: dict[EngineKey, Engine] = {}
        self._crashes: dict[EngineKey, _Crashes] = {}
        self._started = 0
        self._changed = trio.Event()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those in memory, the one used last first."""
        return tuple(sorted(self._engines.values(), key=lambda e: e.last_used, reverse=True))

    @asynccontextmanager
    async def use(
        self,
        key: EngineKey,
        name: str,
        start: EngineStart,
        needed: int,
        keep_alive_s: float | None,
    ) -> AsyncIterator[tuple[Engine, EngineProcess]]:
        """Have a model loaded while the block is open.

        start: what and how; the socket is chosen here.
        needed: bytes that it will take. keep_alive_s: how long it stays afterwards; None: as set.
        Waits while models that are in use leave no room. Raises BackendUnavailable, BackendFailed.
        """
        engine = await self._held(key, name, start, needed)
        try:
            engine.keep_alive_s = (
                self._settings.keep_alive_s if keep_alive_s is None else keep_alive_s
            )
            await engine.ready.wait()
            if engine.failure is not None:
                raise engine.failure.with_traceback(None)
            if engine.process is None or engine.process.died.is_set():
                raise BackendUnavailable(self._backend, "the engine's process ended; try again")
            yield engine, engine.process
        finally:
            self._release(engine)

    def succeeded(self, key: EngineKey) -> None:
        """An answer came to its end: what went wrong before counts no more."""
        self._crashes.pop(key, None)

    def unload(self, digest: str) -> None:
        """Have a model out of memory once nobody uses it."""
        for engine in self._engines.values():
            if engine.key.digest == digest:
                engine.keep_alive_s = 0.0
                self._idle(engine)

    async def _held(self, key: EngineKey, name: str, start: EngineStart, needed: int) -> Engine:
        """An engine that counts us among its users."""
        while True:
            present = self._engines.get(key)
            if present is not None and present.stop.is_set():
                await present.gone.wait()
            elif present is not None and _same(present.start, start):
                present.users += 1
                present.expires_at = None
                return present
            elif present is not None and present.users:
                await self._until_changed()
            elif present is not None:
                # Other load options: as in Ollama, the model is loaded anew.
                await self._end(present)
            else:
                self._check_crashes(key)
                victims = self._victims(name, needed)
                if victims is None:
                    await self._until_changed()
                elif victims:
                    for victim in victims:
                        await self._end(victim)
                else:
                    return self._begin(key, name, start, needed)

    def _victims(self, name: str, needed: int) -> list[Engine] | None:
        present = [
            InMemory(engine.key, engine.size, engine.last_used, engine.users == 0)
            for engine in self._engines.values()
        ]
        try:
            keys = models_to_unload(present, needed, self.budget)
        except DoesNotFit:
            raise BackendUnavailable(
                self._backend,
                f"{name} needs {needed // MiB:,} MiB of memory, and {self.budget // MiB:,} MiB "
                "are for models; raise inference.memory_bytes, or ask for a smaller num_ctx",
            ) from None
        if keys is None:
            return None
        return [engine for engine in self._engines.values() if engine.key in keys]

    def _begin(self, key: EngineKey, name: str, start: EngineStart, needed: int) -> Engine:
        self._started += 1
        engine = Engine(
            key,
            name,
            start,
            needed,
            trio.CapacityLimiter(start.slots),
            self._settings.keep_alive_s,
            last_used=trio.current_time(),
            users=1,
        )
        self._engines[key] = engine
        self._nursery.start_soon(self._run, engine, f"{self._started}.sock")
        return engine

    async def _run(self, engine: Engine, socket_name: str) -> None:
        start = _with(
            engine.start,
            socket=str(self._folder / socket_name),
            data_bytes_max=self.budget,
        )
        try:
            async with open_engine(
                self._backend,
                start,
                load_timeout_s=self._settings.load_timeout_s,
                stall_timeout_s=self._settings.stall_timeout_s,
            ) as process:
                engine.process = process
                engine.size = max(engine.size, process.resident_bytes() or 0)
                engine.loaded_at = trio.current_time()
                engine.ready.set()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._notice_death, engine, process)
                    nursery.start_soon(self._expire, engine)
                    await engine.stop.wait()
                    nursery.cancel_scope.cancel()
        except* OmxError as errors:
            failure = first_named(errors)
            assert failure is not None
            self._note_crash(engine.key, failure)
            engine.failure = failure
        finally:
            engine.stop.set()
            engine.ready.set()
            self._engines.pop(engine.key, None)
            engine.gone.set()
            (self._folder / socket_name).unlink(missing_ok=True)
            self._tell()

    async def _notice_death(self, engine: Engine, process: EngineProcess) -> None:
        await process.died.wait()
        failure = BackendUnavailable(self._backend, f"the process of {engine.name} ended by itself")
        log.warning("%s", failure)
        self._note_crash(engine.key, failure)
        engine.stop.set()

    async def _expire(self, engine: Engine) -> None:
        while True:
            engine.changed = trio.Event()
            if engine.expires_at is None:
                await engine.changed.wait()
                continue
            with trio.move_on_at(engine.expires_at):
                await engine.changed.wait()
                continue
            engine.stop.set()
            return

    async def _end(self, engine: Engine) -> None:
        engine.stop.set()
        await engine.gone.wait()

    def _release(self, engine: Engine) -> None:
        engine.users -= 1
        engine.last_used = trio.current_time()
        if engine.users == 0:
            self._idle(engine)

    def _idle(self, engine: Engine) -> None:
        """Begin the time after which it goes, if nobody uses it."""
        if engine.users:
            return
        stays = engine.keep_alive_s < 0
        engine.expires_at = None if stays else trio.current_time() + engine.keep_alive_s
        engine.changed.set()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until_changed(self) -> None:
        with trio.move_on_after(UNLOAD_TRY_S):
            await self._changed.wait()

    def _note_crash(self, key: EngineKey, failure: OmxError) -> None:
        before = self._crashes.get(key)
        count = before.count + 1 if before else 1
        # The first time at once: a single kill is no pattern.
        pause = 0.0 if count == 1 else min(BACKOFF_S_MAX, 2.0 ** (count - 2))
        self._crashes[key] = _Crashes(count, trio.current_time() + pause, failure)

    def _check_crashes(self, key: EngineKey) -> None:
        crashes = self._crashes.get(key)
        if crashes is not None and trio.current_time() < crashes.not_before:
            raise crashes.failure.with_traceback(None)


@asynccontextmanager
async def open_engine_pool(
    backend: str, folder: Path, settings: InferenceSettings, budget: int
) -> AsyncIterator[EnginePool]:
    """Keep models in memory for as long as the block is open.

    folder: for sockets; ours alone. budget: bytes for all models together.
    """
    async with trio.open_nursery() as nursery:
        yield EnginePool(backend, folder, settings, budget, nursery)
        nursery.cancel_scope.cancel()


def _same(one: EngineStart, other: EngineStart) -> bool:
    return _with(one, socket="", data_bytes_max=0) == _with(other, socket="", data_bytes_max=0)


def _with(start: EngineStart, *, socket: str, data_bytes_max: int) -> EngineStart:
    return msgspec.structs.replace(start, socket=socket, data_bytes_max=data_bytes_max)

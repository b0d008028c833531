"""How a command reaches a node, and how it ends on Ctrl-C."""

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient, Node, NodeConfig

T = TypeVar("T")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended a command; the text says what is left and how to go on."""


OPEN_FILES_MAX = 65_536
"""Files and connections of a node; systems allow 1,024 at first, and more to who asks."""


def allow_many_files() -> None:
    """Let this process hold as many open files as the system allows it, within reason."""
    import resource
    from contextlib import suppress

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    wanted = OPEN_FILES_MAX if hard == endless else min(hard, OPEN_FILES_MAX)
    if soft != endless and soft < wanted:
        with suppress(OSError, ValueError):  # a system may have a lower limit than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def load(flags: Mapping[str, Any], config_file: str | None) -> "NodeConfig":
    """The config for a command. Raises BadConfig and what reading the file may raise."""
    from ollamamax_p2p import load_config

    return load_config(flags=flags, file=Path(config_file) if config_file else None)


ANSWER_TIMEOUT_S = 5.0
"""A node that is alive answers what it is and holds within milliseconds."""

WORK_TIMEOUT_S = 30.0
"""For what the node writes to disk or asks a peer before it answers."""


def with_node(
    flags: Mapping[str, Any],
    config_file: str | None,
    ask: Callable[["LocalClient"], Awaitable[T]],
    *,
    timeout_s: float = ANSWER_TIMEOUT_S,
    interrupted: str = "interrupted",
) -> T:
    """Ask the running node something. Raises NodeNotRunning if there is none, LocalTrouble if it
    does not answer.
    """
    from ollamamax_p2p import LocalClient

    client = LocalClient.find(load(flags, config_file).data_dir)
    return run(lambda: in_time(client, lambda: ask(client), timeout_s), interrupted=interrupted)


async def in_time(
    client: "LocalClient", work: Callable[[], Awaitable[T]], timeout_s: float = ANSWER_TIMEOUT_S
) -> T:
    """What the node answers within that time. Raises LocalTrouble if it does not."""
    import trio

    from ollamamax_p2p.errors import LocalTrouble

    try:
        with trio.fail_after(timeout_s):
            return await work()
    except trio.TooSlowError:
        raise LocalTrouble(
            f"the node (process {client.pid}) has not answered for {timeout_s:g} s; is it frozen? "
            f"kill -CONT {client.pid} wakes it, kill -9 {client.pid} ends it"
        ) from None


def with_any_node(
    flags: Mapping[str, Any],
    config_file: str | None,
    ask: Callable[["LocalClient | Node"], Awaitable[T]],
) -> T:
    """As `with_node`; where no node runs, one is opened in this process that stays off the
    network.
    """
    config = load(flags, config_file)

    async def work() -> T:
        if idle_flags(flags) and await running_node(config) is not None:
            refuse_without_effect(flags, config)
        async with running_or_own(config, _quiet(config)) as node:
            return await ask(node)

    return run(work)


@asynccontextmanager
async def running_or_own(
    config: "NodeConfig", own: "NodeConfig"
) -> AsyncIterator["LocalClient | Node"]:
    """The node that runs on config's data folder, else one opened here with `own`."""
    client = await running_node(config)
    if client is not None:
        yield client
        return
    from ollamamax_p2p import open_node

    async with open_node(own, brief=True) as node:
        yield node


async def running_node(config: "NodeConfig") -> "LocalClient | None":
    """The node that runs on the data folder and answers, or None."""
    from ollamamax_p2p import LocalClient
    from ollamamax_p2p.errors import NodeNotRunning

    try:
        client = LocalClient.find(config.data_dir)
        await in_time(client, client.status)
    except NodeNotRunning:
        return None
    return client


def run(work: Callable[[], Awaitable[T]], *, interrupted: str = "interrupted") -> T:
    """Run async work. The first Ctrl-C or SIGTERM cancels it and raises Interrupted with that text;
    a second ends the process at once.
    """
    import trio

    result: T = trio.run(_until_signal, work, interrupted)
    return result


async def _until_signal(work: Callable[[], Awaitable[T]], interrupted: str) -> T:
    import trio

    result: list[T] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(_cancel_on_signal, signals, scope, interrupted)
            with scope:
                result.append(await work())
            nursery.cancel_scope.cancel()
    if not result:
        raise Interrupted(interrupted)
    return result[0]


async def _cancel_on_signal(signals: AsyncIterator[int], scope: Any, interrupted: str) -> None:
    async for _ in signals:
        if scope.cancel_called:
            # Closing may take a moment (files, peers); whoever asks twice does not want to wait.
            sys.stderr.write(f"\nError: {interrupted}\n")
            sys.stderr.flush()
            os._exit(130)
        scope.cancel()


def run_until_interrupted(work: Callable[[], Awaitable[T]]) -> T | None:
    """Run one step of a conversation. Ctrl-C cancels it and gives None: the conversation goes on.

    Further ones change nothing, so closing must be bounded in time. Raises Interrupted on SIGTERM.
    """
    import trio

    return trio.run(_until_interrupted, work)


async def _until_interrupted(work: Callable[[], Awaitable[T]]) -> T | None:
    import trio

    result, received = list[T](), list[int]()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def note(scope: trio.CancelScope) -> None:
                async for number in signals:
                    received.append(number)
                    scope.cancel()

            scope = trio.CancelScope()
            nursery.start_soon(note, scope)
            with scope:
                result.append(await work())
            nursery.cancel_scope.cancel()
    if signal.SIGTERM in received:
        raise Interrupted("interrupted")
    return result[0] if result else None


class Stop:
    """How a node that runs in the foreground is asked to stop."""

    def __init__(self) -> None:
        self.ask: Callable[[], None] | None = None
        """The node's own way, once it is open."""


def run_until_asked(work: Callable[[Stop], Awaitable[None]]) -> bool:
    """Run a node: the first signal asks it to stop, a second cancels it, a third ends the process.

    True if it was Ctrl-C that ended it, False for `omx stop` and SIGTERM.
    """
    import trio

    return trio.run(_until_asked, work)


async def _until_asked(work: Callable[[Stop], Awaitable[None]]) -> bool:
    import trio

    stop, received = Stop(), list[int]()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(_stop_on_signal, signals, scope, stop, received)
            with scope:
                await work(stop)
            nursery.cancel_scope.cancel()
    return signal.SIGINT in received


async def _stop_on_signal(
    signals: AsyncIterator[int], scope: Any, stop: Stop, received: list[int]
) -> None:
    async for number in signals:
        received.append(number)
        if scope.cancel_called:
            os._exit(130)
        if stop.ask is not None and len(received) == 1:
            sys.stderr.write("stopping …\n")
            stop.ask()
        else:
            scope.cancel()


def refuse_without_effect(flags: Mapping[str, Any], config: "NodeConfig") -> None:
    """Flags that set up a node are a mistake where one runs already. Raises BadConfig."""
    from ollamamax_p2p.config import FLAGS
    from ollamamax_p2p.errors import BadConfig

    idle = idle_flags(flags)
    if idle:
        raise BadConfig(
            FLAGS[idle[0]],
            f"a node already runs on {config.data_dir} with settings of its own; "
            "leave the flag out, or stop that node first (`omx stop`)",
        )


def idle_flags(flags: Mapping[str, Any]) -> list[str]:
    """Those that only mean something to a node that is yet to start."""
    return [key for key in flags if key != "data_dir"]


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended but that its parent has not asked about yet
    does not.
    """
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True  # another user's, or a system without /proc
    return state != "Z"


def _quiet(config: "NodeConfig") -> "NodeConfig":
    """A node for what concerns this machine's store only."""
    return replace(
        config,
        host=replace(config.host, listen=("/ip4/127.0.0.1/tcp/0",), relay=False),
        discovery=replace(config.discovery, bootstrap=(), mdns=False, dht=False),
    )

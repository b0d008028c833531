"""Pull, push and create as Ollama tells them: a line per state, or the last one alone."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from ollamamax_p2p.api.ollama_framing import NdjsonResponse, StatusError, last_line_only
from ollamamax_p2p.api.shared_pulls import Outcome, Watcher
from ollamamax_p2p.errors import BadInput, ModelNotFound, first_named
from ollamamax_p2p.transfer import PullProgress, PushReport

NO_MANIFEST = "pull model manifest: file does not exist"
"""Nobody has it, and the registry does not know it."""


class ProgressLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ollama's ProgressResponse."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class ProgressAnswer:
    """An ASGI response that tells how a piece of work goes, and ends with it."""

    def __init__(self, work: AbstractAsyncContextManager[Watcher], *, stream: bool) -> None:
        """work: runs while the block is open; leaving it early ends the work."""
        self._work = work
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the work ends or the client goes."""
        async with self._work as watcher:
            lines = _lines(watcher)
            answer = NdjsonResponse(lines) if self._stream else last_line_only(lines)
            await answer(scope, receive, send)


@asynccontextmanager
async def watched(
    work: Callable[[Callable[[PullProgress], None]], Awaitable[Any]],
) -> AsyncIterator[Watcher]:
    """Do a piece of work while the block is open. work: is given what to tell its states to; a
    report that it gives is what the watcher is told at the end.
    """
    watcher = Watcher()

    async def run() -> None:
        outcome: Outcome | None = None
        try:
            result = await work(watcher.offer)
            outcome = result if isinstance(result, PushReport) else None
        except Exception as error:  # noqa: BLE001 - told to whoever watches
            outcome = error
        watcher.finish(outcome)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield watcher
        nursery.cancel_scope.cancel()


async def _lines(watcher: Watcher) -> AsyncIterator[ProgressLine]:
    """Each state once, and `success` at the very end; raises what the work raised."""
    last: ProgressLine | None = None
    over = False
    while not over:
        states, outcome = await watcher.next()
        over = watcher.is_over  # now: more may come, and the end, while the lines are sent
        for line in map(_line, states):
            if line != last and line.status != "success":
                last = line
                yield line
        if isinstance(outcome, BaseException):
            raise _as_told(outcome)
    yield ProgressLine(status="success")


def _as_told(error: BaseException) -> BaseException:
    """Ollama has 400 for what was asked wrongly and 500 for the rest, on these three paths."""
    named = first_named(error)
    if named is None or isinstance(named, BadInput):
        return error
    if isinstance(named, ModelNotFound):
        return StatusError(500, NO_MANIFEST)
    return StatusError(500, str(named))


def _line(state: PullProgress) -> ProgressLine:
    status = state.status
    if state.digest is not None and status == "verifying sha256 digest":
        # Ours verifies blob by blob; Ollama has one such line, when all are there.
        status = f"pulling {state.digest[7:19]}"
    return ProgressLine(
        status=status,
        digest=state.digest or "",
        total=state.total,
        completed=state.completed,
    )

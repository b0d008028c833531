"""A pull or a push as an NDJSON response: a line per state, then the report or an error.

An error before the first state gets its HTTP status; after that the status is 200 and the error is
the last line, as in Ollama's API.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from ollamamax_p2p.api.error_responses import body_of, error_response
from ollamamax_p2p.api.shared_pulls import Outcome, Watcher
from ollamamax_p2p.transfer import PullProgress, PullReport, PushReport

LINE_INTERVAL_S = 0.06
"""States of a fast pull are merged for so long; Ollama's interval, and smooth enough to look at."""


class PullReportLine(msgspec.Struct, frozen=True, kw_only=True):
    """The last line of a pull, or a push, that succeeded."""

    status: str = "success"
    report: PullReport | PushReport


class ReportedResponse:
    """Streams one pull or push to one client. An ASGI application, as every response is."""

    def __init__(self, work: AbstractAsyncContextManager[Watcher]) -> None:
        """work: runs while the block is open; leaving it early gives it up."""
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the work ends or the client goes."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
            try:
                async with self._work as watcher:
                    await self._answer(watcher, scope, receive, send)
            except Exception as error:  # noqa: BLE001 - a bad name, or a fault of ours: answered
                await error_response(error)(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _answer(self, watcher: Watcher, scope: Scope, receive: Receive, send: Send) -> None:
        states, outcome = await watcher.next()
        if not states and isinstance(outcome, BaseException):
            await error_response(outcome)(scope, receive, send)
            return
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for lines in _lines(watcher, states, outcome):
            await send({"type": "http.response.body", "body": lines, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lines(
    watcher: Watcher, states: list[PullProgress], outcome: Outcome | None
) -> AsyncIterator[bytes]:
    while True:
        if states:
            yield b"".join(msgspec.json.encode(state) + b"\n" for state in states)
        if outcome is not None:
            yield _last_line(outcome)
            return
        await trio.sleep(LINE_INTERVAL_S)
        states, outcome = await watcher.next()


def _last_line(outcome: Outcome) -> bytes:
    if isinstance(outcome, BaseException):
        return msgspec.json.encode(body_of(outcome)) + b"\n"
    return msgspec.json.encode(PullReportLine(report=outcome)) + b"\n"


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """The body has been read: what arrives next can only be the client's leaving."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()

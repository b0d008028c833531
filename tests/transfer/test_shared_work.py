"""Work that is done once for several callers: what goes wrong in it is theirs alone."""

import pytest
import trio
import trio.testing

from ollamamax_p2p.errors import NoSources
from ollamamax_p2p.transfer.shared_work import SharedWork


@pytest.mark.parametrize("error", [NoSources("a blob", "nobody"), RecursionError("too deep")])
async def test_whatever_goes_wrong_reaches_every_caller_and_never_the_nursery(error, caplog):
    begun = []
    seen = []

    async def fail() -> None:
        begun.append(None)
        await trio.testing.wait_all_tasks_blocked()
        raise error

    async with trio.open_nursery() as owners:
        work: SharedWork[str, None] = SharedWork(owners)

        async def ask() -> None:
            try:
                await work.run("key", fail)
            except type(error) as caught:
                seen.append(caught)

        async with trio.open_nursery() as callers:
            callers.start_soon(ask)
            callers.start_soon(ask)
    assert len(begun) == 1
    assert seen == [error, error]
    assert ("unexpected" in caplog.text) == isinstance(error, RecursionError)


async def test_work_that_failed_is_begun_anew_by_the_next_caller():
    tries = []

    async def do() -> int:
        tries.append(None)
        if len(tries) == 1:
            raise OverflowError
        return len(tries)

    async with trio.open_nursery() as nursery:
        work: SharedWork[str, int] = SharedWork(nursery)
        with pytest.raises(OverflowError):
            await work.run("key", do)
        assert await work.run("key", do) == 2

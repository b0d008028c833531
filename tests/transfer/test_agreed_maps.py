"""What a fetch does with the chunk map that the cluster has agreed on, and what it tells of it."""

import pytest
import trio

from ollamamax_p2p.content.core.digest import Digest
from tests.transfer.swarm import open_swarm, some_bytes
from tests.transfer.test_liars import DATA, DIGEST, Liar, map_of

pytestmark = pytest.mark.usefixtures("repeatable")

LIES = some_bytes(len(DATA), seed=9)
TRUE_MAP, FALSE_MAP = map_of(DATA, DIGEST), map_of(LIES, DIGEST)


class Agreed:
    """An AgreedMaps that only remembers."""

    def __init__(self, agreed: Digest | None) -> None:
        self.agreed = agreed
        self.told: list[tuple[str, Digest]] = []

    def chunk_map_of(self, blob: Digest) -> Digest | None:
        return self.agreed if blob == DIGEST else None

    def tell_chunk_map(self, blob: Digest, chunk_map: Digest, size: int) -> None:
        assert (blob, size) == (DIGEST, len(DATA))
        self.told.append(("right", chunk_map))

    def tell_wrong_chunk_map(self, blob: Digest, chunk_map: Digest) -> None:
        assert blob == DIGEST
        self.told.append(("wrong", chunk_map))


async def test_one_who_serves_by_the_agreed_map_is_believed_before_any_number_of_others(
    autojump_clock, seed
):
    """Without an agreement the two would be believed first, and cost the whole blob."""
    agreed = Agreed(TRUE_MAP.digest)
    async with open_swarm(seed) as swarm:
        for _ in range(2):
            await swarm.add_evil(Liar(FALSE_MAP, LIES), claims=[DIGEST])
        await swarm.add(holding=[DATA])
        me = await swarm.add(agreed_maps=agreed)
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert (tally.fetched, tally.refetched) == (len(DATA), 0)
    assert agreed.told == [("right", TRUE_MAP.digest)]


async def test_a_map_that_made_the_blob_is_told(autojump_clock, seed):
    agreed = Agreed(None)
    async with open_swarm(seed) as swarm:
        await swarm.add(holding=[DATA])
        me = await swarm.add(agreed_maps=agreed)
        await me.transfer.fetch(DIGEST, len(DATA))
    assert agreed.told == [("right", TRUE_MAP.digest)]


async def test_an_agreed_map_that_does_not_make_the_blob_is_told_and_the_truth_wins(
    autojump_clock, seed
):
    agreed = Agreed(FALSE_MAP.digest)
    async with open_swarm(seed) as swarm:
        liar = await swarm.add_evil(Liar(FALSE_MAP, LIES), claims=[DIGEST])
        await swarm.add(holding=[DATA])
        me = await swarm.add(agreed_maps=agreed)
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert set(tally.banned) == {liar.peer_id}
    assert agreed.told == [("wrong", FALSE_MAP.digest), ("right", TRUE_MAP.digest)]


async def test_an_agreed_map_that_nobody_serves_by_holds_nobody_up(autojump_clock, seed):
    agreed = Agreed(FALSE_MAP.digest)
    async with open_swarm(seed) as swarm:
        await swarm.add(holding=[DATA])
        me = await swarm.add(agreed_maps=agreed)
        with trio.fail_after(120):
            tally = await me.transfer.fetch(DIGEST, len(DATA))
        assert tally.fetched == len(DATA)

"""One wrong clock, and what it does to all."""

import pytest

from ollamamax_p2p.cluster.core.commands import AcquireLease
from ollamamax_p2p.errors import BadInput
from tests.cluster.whole_clusters import open_machines, wall_clock

pytestmark = pytest.mark.usefixtures("repeatable")

YEAR_S = 366 * 24 * 3600


async def test_a_clock_that_ran_ahead_is_mended_by_a_node_whose_clock_is_right(
    autojump_clock, tmp_path
):
    async with open_machines(tmp_path, voters=1, learners=1) as machines:
        right, wrong = machines.all
        wrong.clock_ahead_s = YEAR_S
        later = int(wrong.wall_clock())
        await wrong.up.issue_ticket(b"w" * 16, uses=1, expires_at=later + 60)
        await wrong.up.change(AcquireLease(key="k", holder="h", ttl_s=3000, now=later))
        soon = int(wall_clock()) + 60
        with pytest.raises(BadInput, match="omx cluster set-clock"):
            await right.up.issue_ticket(b"r" * 16, uses=1, expires_at=soon)

        assert await right.up.set_clock() == int(wall_clock())

        assert right.up.state.tickets().alive == 0
        (lease,) = right.up.state.leases().values()
        assert 2900 < lease.expires_at - wall_clock() <= 3000
        await right.up.issue_ticket(b"r" * 16, uses=1, expires_at=soon)

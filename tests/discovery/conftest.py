import pytest

from ollamamax_p2p.testing.determinism import run_on_virtual_clock
from tests.discovery.members import open_swarm

# A mark of the module would come too late for pytest-trio's trio_mode; one of a parameter does not.
ON_VIRTUAL_CLOCK = pytest.param(
    open_swarm, id="virtual", marks=pytest.mark.trio(run=run_on_virtual_clock)
)


@pytest.fixture(params=[ON_VIRTUAL_CLOCK])
async def swarm(request):
    async with request.param() as swarm:
        yield swarm

import pytest

from tests.discovery.members import open_swarm


@pytest.fixture
async def swarm(autojump_clock):
    async with open_swarm() as swarm:
        yield swarm

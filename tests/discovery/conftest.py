"""Tests that use `swarm` run on the virtual clock: `pytestmark = pytest.mark.trio(run=…)`."""

import pytest

from tests.discovery.members import open_swarm


@pytest.fixture
async def swarm():
    async with open_swarm() as swarm:
        yield swarm

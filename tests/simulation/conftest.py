"""Every test in this folder runs on the virtual clock and depends on its seed only."""

import inspect

import pytest

from ollamamax_p2p.testing import run_on_virtual_clock


def pytest_itemcollected(item: pytest.Item) -> None:
    if inspect.iscoroutinefunction(getattr(item, "function", None)):
        item.add_marker(pytest.mark.trio(run=run_on_virtual_clock), append=False)


@pytest.fixture(autouse=True)
def _repeatable(repeatable):
    """See tests/conftest.py."""

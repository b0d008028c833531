"""Makes a trio program repeatable: the same seed, the same order of everything.

Two things in trio are left to chance, on purpose, and would make a failing seed useless:

- the order in which tasks run that are ready at the same time. trio shuffles it with dice of its
  own; like its plug-in for Hypothesis we sort and seed them.
- threads. They finish when the operating system likes, and the virtual clock, which jumps ahead
  when no task is ready, does not wait for them: a stall timeout of 20 s would pass while a thread
  hashes for 2 ms. In a simulation their work is done in place and takes no virtual time.

Python's own chance, the order of a set of strings, is set before the interpreter starts: run with
PYTHONHASHSEED=0, as the command that is printed for a failing seed does. Code that depends on it is
better mended.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import trio
import trio.testing

Result = TypeVar("Result")


def run_simulation(program: Callable[[], Awaitable[Result]], *, seed: int) -> Result:
    """Run a program on the virtual clock, the same way for the same seed."""
    with deterministic(seed):
        return run_on_virtual_clock(program)


def run_on_virtual_clock(
    program: Callable[[], Awaitable[Result]],
    *,
    clock: trio.abc.Clock | None = None,
    instruments: Sequence[trio.abc.Instrument] = (),
) -> Result:
    """trio.run, whose clock jumps to the next deadline whenever no task is ready.

    With pytest-trio: `pytest.mark.trio(run=run_on_virtual_clock)`, where the fixture
    `autojump_clock` will not do because the test itself would have to name it.
    """
    clock = clock or trio.testing.MockClock(autojump_threshold=0)
    return trio.run(program, clock=clock, instruments=instruments)


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Runs of trio inside this block depend on the seed only. Not for real sockets or processes."""
    from trio._core import _run  # these have no public name; trio's Hypothesis plug-in sets both

    scheduler: Any = _run
    dice, sorts, run_in_thread = (
        scheduler._r.getstate(),
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING,
        trio.to_thread.run_sync,
    )
    scheduler._r.seed(seed)
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio.to_thread.run_sync = _run_in_place  # the same to its callers
    try:
        yield
    finally:
        scheduler._r.setstate(dice)
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = sorts
        trio.to_thread.run_sync = run_in_thread


async def _run_in_place(
    sync_fn: Callable[..., Any],
    *args: object,
    thread_name: str | None = None,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> Any:
    """Takes what `trio.to_thread.run_sync` takes; needs no thread and so no limiter."""
    await trio.lowlevel.checkpoint()
    return sync_fn(*args)

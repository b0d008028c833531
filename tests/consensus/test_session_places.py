"""Who may propose next, when more want to than the open sessions have places for."""

import pytest
import trio
import trio.testing

from ollamamax_p2p.consensus.core.sessions import SESSION_WINDOW
from ollamamax_p2p.consensus.session_places import Place, SessionPlaces
from ollamamax_p2p.errors import QuorumLost

OPENING_S = 1.0


def places(sessions_max: int = 2) -> SessionPlaces:
    ids = iter(range(1, 100))

    async def open_session() -> int:
        await trio.sleep(OPENING_S)
        return next(ids)

    return SessionPlaces(sessions_max=sessions_max, open_session=open_session)


async def test_places_are_given_in_the_order_in_which_they_were_asked_for(autojump_clock) -> None:
    count = 3 * SESSION_WINDOW
    sequences: dict[int, int] = {}
    queue = places(sessions_max=1)

    async def take(number: int) -> None:
        place = await queue.take()
        sequences[number] = place.sequence
        await trio.sleep(1)
        queue.give_back(place)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(take, number)
            await trio.testing.wait_all_tasks_blocked()
    assert [sequences[number] for number in range(count)] == list(range(1, count + 1))


async def test_who_asks_again_at_once_stands_behind_those_who_wait(autojump_clock) -> None:
    queue = places(sessions_max=1)
    first = [await queue.take() for _ in range(SESSION_WINDOW)]
    waited: list[Place] = []

    async def wait() -> None:
        waited.append(await queue.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        queue.give_back(first[0])
        with trio.move_on_after(1) as hurried:
            await queue.take()
    assert len(waited) == 1
    assert hurried.cancelled_caught


async def test_as_many_as_fit_go_on_in_the_moment_in_which_a_session_is_open(
    autojump_clock,
) -> None:
    queue = places()
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(2 * SESSION_WINDOW):
            nursery.start_soon(queue.take)
    assert trio.current_time() - begun == 2 * OPENING_S


async def test_an_opening_that_fails_is_one_commands_trouble_and_the_next_tries(
    autojump_clock,
) -> None:
    answers = iter([QuorumLost("nobody"), 7])

    async def open_session() -> int:
        await trio.sleep(OPENING_S)
        answer = next(answers)
        if isinstance(answer, QuorumLost):
            raise answer
        return answer

    queue = SessionPlaces(sessions_max=1, open_session=open_session)
    outcomes: list[int | str] = []

    async def take() -> None:
        try:
            outcomes.append((await queue.take()).session.id)
        except QuorumLost:
            outcomes.append("failed")

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(take)
    assert sorted(map(str, outcomes)) == ["7", "7", "failed"]


@pytest.mark.parametrize("opens", [True, False])
async def test_who_gives_up_waiting_leaves_no_place_taken(autojump_clock, opens: bool) -> None:
    """opens: it is the one that opens the session."""
    queue = places(sessions_max=1)
    held = [] if opens else [await queue.take() for _ in range(SESSION_WINDOW)]
    with trio.move_on_after(OPENING_S / 2):
        await queue.take()
    for place in held:
        queue.give_back(place)
    again = [await queue.take() for _ in range(SESSION_WINDOW)]
    assert len(again) == SESSION_WINDOW


async def test_who_is_given_a_place_and_cancelled_in_the_same_moment_gives_it_back(
    autojump_clock,
) -> None:
    queue = places(sessions_max=1)
    held = [await queue.take() for _ in range(SESSION_WINDOW)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.take)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        queue.give_back(held.pop(0))
    for place in held:
        queue.give_back(place)
    with trio.fail_after(1):
        again = [await queue.take() for _ in range(SESSION_WINDOW)]
    assert len(again) == SESSION_WINDOW

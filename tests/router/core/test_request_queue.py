"""Requests wait in turns: by priority, fair between users, bounded, no longer than they may."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import DeadlineExceeded, QueueFull
from ollamamax_p2p.router.core.request_queue import RequestQueue

FAR = 1e9


def a_queue(*, limit=100, limit_per_user=100, aging_s=1e6) -> RequestQueue:
    return RequestQueue(limit=limit, limit_per_user=limit_per_user, aging_s=aging_s)


def put(
    queue, number, *, user="ann", priority=1, cost=1.0, lane="m", now=0.0, by=FAR, interval_s=None
):
    return queue.put(
        number,
        lane=lane,
        user=user,
        priority=priority,
        cost=cost,
        begin_by=by,
        interval_s=interval_s,
        now=now,
    )


def taken(queue, *, lane="m", now=0.0):
    numbers = []
    while (number := queue.take(lane, now=now)) is not None:
        numbers.append(number)
    return numbers


def test_one_users_requests_go_in_the_order_they_came():
    queue = a_queue()
    for number in (1, 2, 3):
        put(queue, number)
    assert taken(queue) == [1, 2, 3]


def test_users_take_turns_however_many_requests_one_of_them_sends():
    queue = a_queue()
    for number in range(10):
        put(queue, number, user="greedy")
    put(queue, 10, user="modest")
    put(queue, 11, user="modest")
    assert taken(queue)[:4] == [0, 10, 1, 11]


def test_a_user_whose_requests_are_long_has_fewer_of_them_begun():
    queue = a_queue()
    for number in range(4):
        put(queue, number, user="long", cost=30.0)
        put(queue, 10 + number, user="short", cost=10.0)
    assert taken(queue)[:6] == [0, 10, 11, 12, 1, 13]


def test_a_user_who_comes_late_has_no_claim_to_the_time_before():
    queue = a_queue()
    for number in range(6):
        put(queue, number, user="ann")
    assert [queue.take("m", now=0.0) for _ in range(3)] == [0, 1, 2]
    for number in range(10, 13):
        put(queue, number, user="bob")
    assert taken(queue) == [10, 3, 11, 4, 12, 5]


def test_a_higher_priority_goes_first():
    queue = a_queue()
    put(queue, 1, priority=0)
    put(queue, 2, priority=1)
    put(queue, 3, priority=9)  # More than there is counts as the most there is.
    assert taken(queue) == [3, 2, 1]


def test_waiting_lifts_the_priority():
    queue = a_queue(aging_s=10.0)
    put(queue, 1, user="old", priority=0, now=0.0)
    put(queue, 2, user="new", priority=2, now=19.0)
    assert queue.peek("m", now=19.0) == 2
    put(queue, 3, user="newer", priority=2, now=21.0)
    assert queue.peek("m", now=21.0) == 1  # As urgent now, and here before.


def test_who_waits_for_another_model_is_not_held_up():
    queue = a_queue()
    put(queue, 1, lane="busy")
    put(queue, 2, lane="free")
    assert queue.lanes() == ["busy", "free"]
    assert queue.take("free", now=0.0) == 2
    assert queue.lanes() == ["busy"]
    assert queue.peek("free", now=0.0) is None
    assert queue.take("free", now=0.0) is None
    assert queue.count("busy") == 1
    assert queue.count("free") == 0


def test_a_full_queue_refuses_and_says_when_to_come_again():
    queue = a_queue(limit=2)
    put(queue, 1, priority=2)
    put(queue, 2, priority=2)
    with pytest.raises(QueueFull) as refused:
        put(queue, 3, priority=2)
    assert refused.value.retry_after_s == 1.0
    assert len(queue) == 2
    assert 3 not in queue


def test_what_may_wait_finds_the_queue_full_first():
    queue = a_queue(limit=10)
    for number in range(5):
        put(queue, number, user=str(number))
    with pytest.raises(QueueFull):
        put(queue, 100, priority=0)
    for number in range(5, 9):
        put(queue, number, user=str(number))
    with pytest.raises(QueueFull):
        put(queue, 101, priority=1)
    put(queue, 102, priority=2)


def test_nobody_fills_the_queue_alone():
    queue = a_queue(limit_per_user=2)
    put(queue, 1)
    put(queue, 2)
    with pytest.raises(QueueFull):
        put(queue, 3)
    put(queue, 4, user="bob")


def test_when_to_come_again_grows_with_what_waits():
    queue = a_queue(limit=10)
    for number in range(10):
        put(queue, number, priority=2, interval_s=4.0)
    with pytest.raises(QueueFull) as refused:
        put(queue, 10, priority=2)
    assert refused.value.retry_after_s == 20.0


def test_a_place_tells_how_many_are_before_and_how_long_that_takes():
    queue = a_queue()
    assert put(queue, 1).eta_s is None
    put(queue, 2, user="bob")
    put(queue, 3)
    assert queue.place(3, now=0.0).position == 3
    assert {number: place.position for number, place in queue.places(now=0.0).items()} == {
        1: 1,
        2: 2,
        3: 3,
    }
    assert queue.place(4, now=0.0) is None


def test_how_long_it_takes_is_measured():
    queue = a_queue()
    for number in range(6):
        put(queue, number, interval_s=100.0)
    queue.take("m", now=10.0)
    assert queue.place(5, now=10.0).eta_s == 500.0
    queue.take("m", now=12.0)  # Two seconds after the one before.
    assert queue.place(5, now=12.0).eta_s == pytest.approx(4 * (100 + 0.2 * (2 - 100)))


def test_the_first_measured_interval_counts_whole_where_nothing_was_guessed():
    queue = a_queue()
    for number in range(4):
        put(queue, number)
    queue.take("m", now=10.0)
    queue.take("m", now=13.0)
    assert queue.place(3, now=13.0).eta_s == 6.0


def test_what_cannot_be_begun_in_time_is_refused_at_once():
    queue = a_queue()
    put(queue, 1, interval_s=10.0)
    with pytest.raises(DeadlineExceeded):
        put(queue, 2, by=15.0)
    with pytest.raises(DeadlineExceeded):
        put(queue, 3, by=0.0)
    assert len(queue) == 1
    put(queue, 4, by=25.0)


def test_who_waited_too_long_waits_no_more():
    queue = a_queue()
    assert queue.first_deadline() is None
    put(queue, 1, by=5.0)
    put(queue, 2, by=9.0)
    assert queue.first_deadline() == 5.0
    assert queue.expire(now=4.9) == []
    assert queue.expire(now=5.0) == [1]
    assert taken(queue) == [2]


def test_who_leaves_is_forgotten_and_makes_room():
    queue = a_queue(limit_per_user=2)
    put(queue, 1)
    put(queue, 2)
    assert queue.remove(1)
    assert not queue.remove(1)
    put(queue, 3)
    assert taken(queue) == [2, 3]


def test_debts_of_users_that_came_once_are_bounded():
    queue = a_queue(limit=2, limit_per_user=2)
    put(queue, 0, user="stays")
    for number in range(1, 50):
        put(queue, number, user=f"user {number}", priority=2)
        assert queue.take("m", now=0.0) == number
    assert len(queue._lanes["m"].virtual) <= 8


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "take", "remove", "wait"]),
        st.integers(0, 4),
        st.integers(0, 2),
        st.floats(0.5, 50.0),
    ),
    max_size=120,
)


@settings(deadline=None)
@given(ACTIONS)
def test_the_bounds_hold_and_a_place_is_what_is_taken_whatever_happens(actions):
    queue = a_queue(limit=12, limit_per_user=6, aging_s=30.0)
    now, waiting = 0.0, {}
    for number, (action, user, priority, amount) in enumerate(actions):
        if action == "put":
            try:
                put(queue, number, user=f"u{user}", priority=priority, cost=amount, now=now)
                waiting[number] = f"u{user}"
            except QueueFull:
                assert len(waiting) >= 6 or list(waiting.values()).count(f"u{user}") >= 6
        elif action == "take":
            places = queue.places(now=now)
            first = queue.take("m", now=now)
            assert (first is None) == (not waiting)
            if first is not None:
                assert places[first].position == 1
                del waiting[first]
        elif action == "remove" and waiting:
            gone = sorted(waiting)[user % len(waiting)]
            assert queue.remove(gone)
            del waiting[gone]
        else:
            now += amount
        assert len(queue) == len(waiting) <= 12
        positions = sorted(place.position for place in queue.places(now=now).values())
        assert positions == list(range(1, len(waiting) + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1.0, 20.0), min_size=2, max_size=6),
    st.integers(10, 60),
    st.integers(0, 2**32),
)
def test_users_who_always_want_something_get_the_same_amount_of_work(costs, takes, seed):
    """In start-time fair queueing, the work done for two of them differs by one request of each."""
    rng = random.Random(seed)
    queue = a_queue(limit=10_000, limit_per_user=10_000)
    owner = {}
    for user in range(len(costs)):
        for _ in range(takes + 1):
            number = len(owner)
            cost = costs[user] * rng.uniform(0.5, 1.0)
            owner[number] = (user, cost)
            put(queue, number, user=f"u{user}", cost=cost)
    done = [0.0] * len(costs)
    for _ in range(takes):
        user, cost = owner[queue.take("m", now=0.0)]
        done[user] += cost
    for one in range(len(costs)):
        for other in range(len(costs)):
            assert done[one] - done[other] <= costs[one] + costs[other] + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 4))
def test_the_lowest_priority_is_served_though_higher_ones_never_end(flood, users):
    """Once it has waited for two steps of aging, each user that was served pays before it."""
    queue = a_queue(limit=1_000, limit_per_user=1_000, aging_s=5.0)
    put(queue, 0, user="patient", priority=0)
    now, number = 0.0, 0
    while queue.peek("m", now=now) != 0:
        for user in range(users):
            number += 1
            put(queue, number, user=f"u{user}", priority=flood[number % len(flood)], now=now)
        queue.take("m", now=now)
        now += 1.0
        assert now <= 5.0 * 2 + users + 1

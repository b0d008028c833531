"""What a leader lets go to a follower before it hears back."""

from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.consensus.core.progress import Inflights, Progress, StateType


def test_a_window_is_full_by_count_or_by_bytes() -> None:
    window = Inflights(2, 10)
    window.add(1, 10)
    assert window.is_full
    window.free_up_to(1)
    window.add(2, 1)
    window.add(3, 1)
    assert window.is_full
    window.reset()
    assert not window.is_full


def test_one_message_larger_than_the_window_is_let_through() -> None:
    window = Inflights(5, 10)
    window.add(1, 1000)
    assert window.is_full
    assert len(window) == 1


@given(
    st.integers(1, 5),
    st.integers(0, 40),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40),
)
def test_a_window_counts_as_a_list_would(
    count: int, limit: int, steps: list[tuple[bool, int]]
) -> None:
    window, model, index = Inflights(count, limit), list[tuple[int, int]](), 0
    for adds, number in steps:
        if not adds:
            window.free_up_to(index - number)
            model = [each for each in model if each[0] > index - number]
        elif not window.is_full:
            index += 1
            window.add(index, number)
            model.append((index, number))
        assert len(window) == len(model)
        full = len(model) >= count or (limit > 0 and sum(size for _, size in model) >= limit)
        assert window.is_full == full


def progress(**fields: object) -> Progress:
    made = Progress(match=3, next=9, inflights=Inflights(2))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_failed_probe_goes_back_to_the_hint_but_never_behind_what_matches() -> None:
    assert not progress().maybe_decrease_to(5, 4)  # An old answer: 8 was asked about.
    probe = progress(msg_app_flow_paused=True)
    assert probe.maybe_decrease_to(8, 5)
    assert (probe.next, probe.is_paused) == (6, False)
    probe = progress()
    assert probe.maybe_decrease_to(8, 0)
    assert probe.next == 4


def test_a_replicating_follower_that_refuses_is_probed_from_what_matches() -> None:
    follower = progress(state=StateType.REPLICATE, sent_commit=7)
    assert not follower.maybe_decrease_to(3, 0)
    assert follower.maybe_decrease_to(6, 5)
    assert (follower.next, follower.sent_commit) == (4, 3)


def test_a_copy_changes_alone() -> None:
    original = progress(state=StateType.REPLICATE, recent_active=True, pending_snapshot=4)
    copy = original.copied()
    assert str(copy) == str(original)
    copy.is_learner = True
    assert "learner" not in str(original)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=40))
def test_what_matches_is_always_before_what_is_sent_next(steps: list[tuple[int, int]]) -> None:
    each = Progress(match=0, next=5, inflights=Inflights(3))
    for what, number in steps:
        if what == 0:
            each.maybe_update(number)
        elif what == 1:
            each.maybe_decrease_to(each.next - 1, number)
        elif what == 2:
            each.become_probe()
        elif what == 3:
            each.become_replicate()
        elif what == 4 and number > each.match:
            each.become_snapshot(number)
        elif what == 5 and not each.is_paused:
            each.sent_entries(number, number)
        assert each.match < each.next

"""The chooser, driven as the shell drives it: from a request's arrival to its end."""

import random

import pytest

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    CannotResume,
    DeadlineExceeded,
    ModelNotFound,
    NoCandidate,
    NotSupported,
    OmxError,
    PeerGone,
    QueueFull,
)
from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import Usage
from ollamamax_p2p.router.core import choosing
from ollamamax_p2p.router.core.candidate import PrefixPoint, RequestFacts
from ollamamax_p2p.router.core.choosing import Choice, Chooser, Refuse, Wait
from ollamamax_p2p.router.core.load_table import (
    AgedReport,
    BackendLoad,
    BackendModels,
    LoadNews,
    LoadReport,
    LoadTable,
    ModelSpeed,
    ModelsReport,
)
from ollamamax_p2p.router.settings import RouterSettings

GONE = BackendUnavailable("ollama", "it was killed")


class Desk:
    """A chooser, its table, and a clock."""

    def __init__(self, **settings) -> None:
        self.now = 0.0
        self.settings = RouterSettings(**settings)
        self.table = LoadTable(peer="me", epoch=1, settings=self.settings)
        self.chooser = Chooser(self.settings, self.table, rng=random.Random(1))
        self.sequence: dict[str, int] = {}
        self.requests = 0

    def hear(
        self,
        peer,
        *,
        model="m:1b",
        size=10**9,
        slots=2,
        busy=0,
        queued=0,
        loaded=True,
        loading=False,
        speed=None,
        capabilities=("completion", "tools"),
        can_resume=True,
        digest="sha256:1",
        age_s=0.0,
        memory_free=2**34,
        backends=True,
        also_loaded=(),
        **facts,
    ) -> None:
        """A node tells of itself, with its one model."""
        self.sequence[peer] = self.sequence.get(peer, 0) + 1
        in_memory = (
            LoadedModel(name=model, slots=slots, busy=busy, loading=loading),
        ) * loaded + tuple(LoadedModel(name=each) for each in also_loaded)
        engine = BackendLoad(
            name="ollama",
            slots=slots,
            queued=queued,
            loaded=in_memory,
            speeds=(speed,) if speed else (),
        )
        report = LoadReport(
            peer=peer,
            epoch=1,
            sequence=self.sequence[peer],
            models_version=1,
            memory_free=memory_free,
            memory_total=2**36,
            backends=(engine,) * backends,
            **facts,
        )
        news = LoadNews(reports=(AgedReport(report=report, age_s=age_s),))
        self.table.hear(peer, news, now=self.now)
        servable = ServableModel(
            name=model,
            size=size,
            capabilities=capabilities,
            can_resume=can_resume,
            digest=digest,
        )
        page = ModelsReport(
            peer=peer,
            epoch=1,
            version=1,
            backends=(BackendModels(name="ollama", models=(servable,)),),
        )
        self.table.hear(peer, page, now=self.now)

    def request(self, **facts) -> RequestFacts:
        self.requests += 1
        defaults = {"model": "m:1b", "prompt_tokens": 100, "needs": ("completion",)}
        return RequestFacts(id=self.requests, **(defaults | facts))

    def choose(self, **facts) -> Choice | Wait | Refuse:
        return self.chooser.choose(self.request(**facts), now=self.now)

    def chosen(self, **facts) -> Choice:
        outcome = self.choose(**facts)
        assert isinstance(outcome, Choice), outcome
        return outcome

    def refused(self, **facts) -> OmxError:
        outcome = self.choose(**facts)
        assert isinstance(outcome, Refuse), outcome
        return outcome.error

    def failed(self, choice, error=GONE):
        return self.chooser.failed(choice.attempt, error, now=self.now)

    def answered(self, choice, *, first_s=0.1, rest_s=0.5, usage=None) -> None:
        self.now += first_s
        self.chooser.first_part(choice.attempt, now=self.now)
        self.now += rest_s
        self.chooser.ended(choice.attempt, usage=usage, now=self.now)

    def due(self):
        return self.chooser.due(now=self.now)

    def nothing_is_left(self) -> bool:
        kept = self.chooser
        return not (kept._calls or kept._attempts or kept._loading or len(kept._queue))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def peer_of(choice: Choice) -> str:
    return choice.candidate.key.peer


# -- who is asked ------------------------------------------------------------------------------


def test_a_request_goes_to_who_can_answer_it_and_nothing_of_it_is_left(desk):
    desk.hear("a")
    choice = desk.chosen()
    assert peer_of(choice) == "a"
    assert (choice.after_s, choice.resumes, choice.queued_s) == (0.0, False, 0.0)
    assert choice.first_part_within_s == desk.settings.first_part_timeout_s
    desk.answered(choice, usage=Usage(prompt_tokens=100, completion_tokens=20))
    assert desk.nothing_is_left()


def test_who_cannot_be_asked_is_told_why(desk):
    assert isinstance(desk.refused(), ModelNotFound)
    desk.hear("a", draining=True)
    assert "being drained" in str(desk.refused())
    desk.hear("b", backends=False)
    assert "being drained" in str(desk.refused())
    assert isinstance(desk.refused(needs=("embedding",), kind="embed"), NotSupported)
    assert '"m:1b" does not support embed' in str(desk.refused(needs=("embedding",)))
    assert isinstance(desk.refused(strategy="best"), BadRequest)
    assert desk.nothing_is_left()


def test_what_a_model_cannot_do_is_told_in_ollamas_words():
    desk = Desk()
    desk.hear("a", capabilities=("embedding",))
    assert str(desk.refused(kind="chat")) == '"m:1b" does not support chat'
    assert str(desk.refused(kind="generate")) == '"m:1b" does not support generate'
    desk.hear("b", model="n:1b", capabilities=("completion",))
    wanted = {"model": "n:1b", "needs": ("completion", "tools")}
    assert str(desk.refused(**wanted)) == '"n:1b" does not support tools'
    desk.hear("c", model="n:1b", capabilities=("tools",))
    assert isinstance(desk.refused(**wanted), NotSupported)  # One can this, another that.
    desk.hear("d", model="n:1b", capabilities=())
    assert peer_of(desk.chosen(**wanted)) == "d"  # It tells nothing, so it is asked.


def test_the_strategy_is_the_requests_or_else_that_of_its_kind():
    desk = Desk(strategy_embed="round_robin", strategy_chat="least_outstanding")
    for peer in "abc":
        desk.hear(peer, capabilities=("completion", "embedding"), slots=9)
    embeds = [peer_of(desk.chosen(kind="embed", needs=("embedding",))) for _ in range(3)]
    assert embeds == list("abc")
    assert [peer_of(desk.chosen(strategy="round_robin")) for _ in range(3)] == list("abc")
    busiest = [peer_of(desk.chosen()) for _ in range(3)]
    assert sorted(busiest) == list("abc")


def test_what_was_sent_from_here_counts_at_once_and_not_twice(desk):
    desk.hear("a", slots=4)
    first = desk.chosen()
    desk.chosen()
    (candidate,) = desk.chooser.candidates("m:1b", now=desk.now)
    assert (candidate.outstanding, candidate.others) == (2, 0)
    desk.now = 1.0
    desk.hear("a", slots=4, busy=3)  # Two of them are ours.
    (candidate,) = desk.chooser.candidates("m:1b", now=desk.now)
    assert (candidate.outstanding, candidate.others) == (2, 1)
    desk.now = 2.0
    desk.chooser.cancelled(first.attempt, now=desk.now)
    (candidate,) = desk.chooser.candidates("m:1b", now=desk.now)
    assert (candidate.outstanding, candidate.others) == (1, 1)
    desk.now = 3.0
    desk.hear("a", slots=4, busy=2)
    (candidate,) = desk.chooser.candidates("m:1b", now=desk.now)
    assert (candidate.outstanding, candidate.others) == (1, 1)


def test_who_is_dead_or_suspect_is_known():
    desk = Desk(stale_s=10.0, dead_s=30.0)
    desk.hear("a")
    desk.now = 11.0
    assert desk.chooser.candidates("m:1b", now=desk.now)[0].suspect
    desk.hear("b")
    assert peer_of(desk.chosen()) == "b"
    desk.table._nodes["b"].made_at = -100.0
    desk.table._nodes["a"].made_at = -100.0
    assert "not heard of" in str(desk.refused())


def test_this_nodes_own_engine_is_a_candidate_like_any():
    desk = Desk(dead_s=10.0)
    desk.table.tell(
        node="here",
        draining=False,
        memory_free=0,
        memory_total=0,
        accelerator="gpu",
        backends=[BackendLoad(name="ollama", slots=2)],
        models=[BackendModels(name="ollama", models=(ServableModel(name="m:1b"),))],
        now=0.0,
    )
    desk.now = 100.0
    choice = desk.chosen()
    assert choice.candidate.is_local
    assert not choice.candidate.suspect
    assert choice.candidate.fits  # Its memory is not known.
    usage = Usage(prompt_tokens=1_000, prompt_ns=500_000_000, completion_tokens=51)
    desk.answered(choice, first_s=2.0, rest_s=1.0, usage=usage)
    (speed,) = desk.chooser.speeds("ollama")
    assert speed == ModelSpeed(model="m:1b", ttft_s=1.5, prefill_tps=2_000.0, decode_tps=51.0)
    assert desk.chooser.speeds("other") == ()


def test_claims_are_taken_within_reason(desk):
    absurd = ModelSpeed(model="m:1b", ttft_s=1e11, prefill_tps=1e11, decode_tps=1e11, load_s=1e11)
    desk.hear("a", slots=60_000, speed=absurd)
    (candidate,) = desk.chooser.candidates("m:1b", now=desk.now)
    assert candidate.slots == choosing.SLOTS_MAX
    assert (candidate.ttft_s, candidate.prefill_tps) == (60.0, 1e6)
    assert (candidate.decode_tps, candidate.load_s) == (1e4, 3_600.0)


def test_a_node_that_lies_about_its_load_does_not_win_for_ever():
    desk = Desk(strategy_chat="least_outstanding", hedge=False)
    got = {"liar": 0, "honest": 0}
    for _ in range(60):
        desk.hear("liar", slots=1_000)
        desk.hear("honest", slots=2, busy=1)
        choice = desk.chosen()
        got[peer_of(choice)] += 1
        desk.answered(choice, first_s=20.0 if peer_of(choice) == "liar" else 0.1)
    assert got["honest"] > 30


def test_of_very_many_holders_the_warm_ones_and_some_others_are_looked_at(desk):
    for number in range(100):
        desk.hear(f"p{number:03d}", slots=4)
    desk.table.tell(
        node="here",
        draining=False,
        memory_free=2**34,
        memory_total=2**36,
        accelerator="",
        backends=[BackendLoad(name="ollama")],
        models=[BackendModels(name="ollama", models=(ServableModel(name="m:1b"),))],
        now=0.0,
    )
    prompt = {"prefix": (PrefixPoint(5, 90),), "root": 5, "session": "s"}
    choice = desk.chosen(**prompt, strategy="session_affinity")
    desk.answered(choice)
    seen = desk.chooser._considered(desk.table.holders("m:1b"), desk.request(**prompt), desk.now)
    assert len(seen) <= choosing.HOLDERS_MAX
    assert peer_of(choice) in {each.peer for each in seen}
    assert "me" in {each.peer for each in seen}
    again = desk.chosen(**prompt, strategy="session_affinity")
    assert peer_of(again) == peer_of(choice)
    first = {peer_of(desk.chosen(root=77, strategy="prefix_affinity")) for _ in range(3)}
    assert len(first) == 1  # The ring's first are always among those looked at.


# -- loading -----------------------------------------------------------------------------------


def test_a_model_that_nobody_has_in_memory_is_loaded_where_it_fits_best():
    desk = Desk(strategy_chat="least_outstanding")
    desk.hear("huge", loaded=False, memory_free=2**35)
    desk.hear("snug", loaded=False, memory_free=2**31)
    desk.hear("small", loaded=False, memory_free=2**28)
    choice = desk.chosen()
    assert peer_of(choice) == "snug"
    assert choice.first_part_within_s == desk.settings.load_timeout_s
    assert choice.hedge_after_s is None
    # The next one goes where it is being loaded already.
    assert peer_of(desk.chosen()) == "snug"


def test_two_models_are_not_loaded_into_the_same_memory(desk):
    desk.hear("a", loaded=False, memory_free=2**31, size=10**9)
    choice = desk.chosen()
    servable = ServableModel(name="n:1b", size=10**9)
    desk.table._learn_models(
        desk.table.node("a"),
        (),
        (BackendModels(name="ollama", models=(servable, ServableModel(name="m:1b", size=10**9))),),
    )
    (other,) = desk.chooser.candidates("n:1b", now=desk.now)
    assert not other.fits
    (same,) = desk.chooser.candidates("m:1b", now=desk.now)
    assert same.fits
    desk.table.node("a").__dict__.pop("loaded", None)
    desk.hear("a", loaded=True, loading=True, memory_free=2**31)  # It counts that itself now.
    desk.table._learn_models(
        desk.table.node("a"), (), (BackendModels(name="ollama", models=(servable,)),)
    )
    (other,) = desk.chooser.candidates("n:1b", now=desk.now)
    assert other.fits
    desk.answered(choice)
    assert desk.nothing_is_left()


def test_a_model_is_loaded_a_second_time_only_if_the_wait_is_longer_than_that():
    desk = Desk(strategy_chat="least_outstanding", ahead_per_slot=0.0)
    fast = ModelSpeed(model="m:1b", prefill_tps=1e5, decode_tps=1_000.0)
    desk.hear("warm", slots=1, busy=1, speed=fast)
    slow_to_load = ModelSpeed(model="m:1b", load_s=2.0)
    desk.hear("cold", loaded=False, speed=slow_to_load)
    for _ in range(3):
        assert isinstance(desk.choose(), Wait)
    assert desk.due() == []
    for _ in range(9):
        assert isinstance(desk.choose(), Wait)
    assert {peer_of(each) for each in desk.due()} == {"cold"}


def test_a_cold_candidate_that_will_be_done_sooner_is_taken_though_a_warm_one_has_no_room():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("warm", slots=1, busy=1, speed=ModelSpeed(model="m:1b", decode_tps=0.5))
    desk.hear("cold", loaded=False, speed=ModelSpeed(model="m:1b", decode_tps=100.0, load_s=1.0))
    assert peer_of(desk.chosen()) == "cold"


def test_nothing_is_loaded_on_demand_where_that_is_not_wanted():
    desk = Desk(load_on_demand=False)
    desk.hear("a", loaded=False)
    assert "not have it in memory" in str(desk.refused())
    desk.hear("b", loaded=True, loading=True)
    assert peer_of(desk.chosen()) == "b"


# -- waiting -----------------------------------------------------------------------------------


def test_who_finds_no_room_waits_and_goes_when_there_is_some():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("a", slots=1)
    first = desk.chosen()
    assert desk.chooser.next_wake(now=desk.now) is None
    waiting = desk.choose()
    assert isinstance(waiting, Wait)
    assert waiting.place.position == 1
    assert waiting.place.eta_s > 0
    assert desk.due() == []
    assert desk.chooser.place(2, now=desk.now) == waiting.place
    assert desk.chooser.places(now=desk.now) == {2: waiting.place}
    assert desk.chooser.next_wake(now=desk.now) == desk.now + choosing.WAKE_S
    desk.answered(first, first_s=1.0, rest_s=2.0)
    (second,) = desk.due()
    assert (second.request.id, second.queued_s) == (2, 3.0)
    assert desk.chooser.place(2, now=desk.now) is None


def test_nobody_overtakes_who_waits_for_the_same():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("a", slots=1)
    first = desk.chosen()
    assert isinstance(desk.choose(), Wait)
    desk.chooser.cancelled(first.attempt, now=desk.now)
    assert isinstance(desk.choose(), Wait)
    assert [each.request.id for each in desk.due()] == [2]


def test_who_waits_for_another_model_is_not_held_up():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("a", slots=1)
    desk.hear("b", model="n:1b", slots=1)
    desk.chosen()
    assert isinstance(desk.choose(), Wait)
    assert peer_of(desk.chosen(model="n:1b")) == "b"


def test_who_leaves_the_queue_is_forgotten():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("a", slots=1)
    choice = desk.chosen()
    desk.choose()
    desk.chooser.leave(2)
    desk.chooser.leave(2)
    desk.chooser.cancelled(choice.attempt, now=desk.now)
    assert desk.due() == []
    assert desk.nothing_is_left()


def test_a_full_queue_refuses():
    desk = Desk(ahead_per_slot=0.0, queue_max=2, queue_per_user_max=9)
    desk.hear("a", slots=1)
    desk.chosen()
    assert isinstance(desk.choose(priority=2), Wait)
    assert isinstance(desk.choose(priority=2), Wait)
    assert isinstance(desk.refused(priority=2), QueueFull)


def test_who_cannot_be_begun_in_time_is_refused():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("a", slots=1)
    desk.now = 10.0
    assert isinstance(desk.refused(begin_by=10.0), DeadlineExceeded)
    desk.chosen()
    assert isinstance(desk.choose(begin_by=1_000.0), Wait)
    desk.now = 1_000.0
    (late,) = desk.due()
    assert isinstance(late.error, DeadlineExceeded)
    assert late.request.id == 3


def test_who_waits_for_a_model_that_is_gone_is_told():
    desk = Desk(ahead_per_slot=0.0)
    desk.hear("a", slots=1)
    desk.chosen()
    assert isinstance(desk.choose(), Wait)
    desk.table.forget("a", now=desk.now)
    (refused,) = desk.due()
    assert isinstance(refused.error, ModelNotFound)


# -- failures ----------------------------------------------------------------------------------


def test_a_failure_is_tried_elsewhere(desk):
    desk.hear("a")
    desk.hear("b")
    first = desk.chosen()
    second = desk.failed(first)
    assert {peer_of(first), peer_of(second)} == {"a", "b"}
    assert not second.resumes
    assert second.after_s == 0.0
    desk.answered(second)
    assert desk.nothing_is_left()


def test_the_callers_own_fault_is_told_at_once(desk):
    desk.hear("a")
    desk.hear("b")
    refused = desk.failed(desk.chosen(), BadRequest("no"))
    assert isinstance(refused.error, BadRequest)
    assert desk.nothing_is_left()


def test_where_there_is_no_other_the_same_is_tried_again_after_a_while(desk):
    desk.hear("a")
    choice = desk.chosen()
    waits = []
    for _ in range(2):
        choice = desk.failed(choice)
        waits.append(choice.after_s)
        desk.now += choice.after_s
    assert waits[0] == choosing.SAME_AGAIN_S
    assert waits[1] > waits[0]


def test_a_request_is_not_tried_for_ever():
    desk = Desk(attempts_max=3)
    for peer in "abcde":
        desk.hear(peer)
    choice = desk.failed(desk.failed(desk.chosen()))
    assert isinstance(choice, Choice)
    refused = desk.failed(choice)
    assert refused.error is GONE
    assert desk.nothing_is_left()


def test_retries_have_a_budget():
    desk = Desk(retry_burst=2, retry_ratio=0.0, retry_per_s=0.0, breaker_failures_min=10**6)
    for peer in "abcd":
        desk.hear(peer, slots=50)
    outcomes = [desk.failed(desk.chosen()) for _ in range(4)]
    assert [type(each) for each in outcomes] == [Choice, Choice, Refuse, Refuse]


def test_who_asks_seldom_is_retried_however_often_nodes_die():
    # Found by killing nodes: each death took a retry, and a request gave a fifth of one.
    desk = Desk(breaker_failures_min=10**6)
    for _ in range(100):
        desk.now += 2.0
        for peer in "ab":
            desk.hear(peer)
        elsewhere = desk.failed(desk.chosen())
        assert isinstance(elsewhere, Choice)
        desk.answered(elsewhere)


def test_a_request_whose_time_is_over_is_not_tried_again(desk):
    desk.hear("a")
    desk.hear("b")
    choice = desk.chosen(begin_by=5.0)
    desk.now = 6.0
    assert desk.failed(choice).error is GONE


def test_when_nobody_is_left_the_error_is_told(desk):
    desk.hear("a")
    choice = desk.chosen()
    desk.table.forget("a", now=desk.now)
    assert desk.failed(choice).error is GONE


def test_who_has_the_model_no_more_is_not_asked_for_it(desk):
    desk.hear("a")
    desk.hear("b")
    first = desk.chosen()
    second = desk.failed(first, ModelNotFound("m:1b"))
    assert peer_of(second) != peer_of(first)
    for _ in range(3):
        assert peer_of(desk.chosen()) != peer_of(first)
    refused = desk.failed(second, ModelNotFound("m:1b"))
    assert isinstance(refused.error, ModelNotFound)
    assert isinstance(desk.refused(), NoCandidate)
    desk.now += choosing.ABSENT_S
    desk.chosen()


def test_who_fails_too_often_is_left_alone_and_probed():
    desk = Desk(retry_burst=1_000, hedge=False)
    desk.hear("bad", speed=ModelSpeed(model="m:1b", decode_tps=1_000.0))
    desk.hear("good", slots=50, speed=ModelSpeed(model="m:1b", decode_tps=5.0))
    for _ in range(desk.settings.breaker_failures_min):
        choice = desk.chosen()
        assert peer_of(choice) == "bad"
        desk.answered(desk.failed(choice))
    assert peer_of(desk.chosen()) == "good"
    desk.now += desk.settings.breaker_backoff_s
    probe = desk.chosen()
    assert peer_of(probe) == "bad"
    assert peer_of(desk.chosen()) == "good"
    desk.answered(probe)
    assert peer_of(desk.chosen()) == "bad"


def test_requests_wait_for_a_breaker_that_will_let_one_through_soon():
    desk = Desk(attempts_max=1)
    desk.hear("a", slots=9)
    for _ in range(3):
        desk.failed(desk.chosen())
    assert isinstance(desk.refused(begin_by=desk.now + 0.5), NoCandidate)
    assert isinstance(desk.choose(), Wait)
    assert desk.due() == []
    desk.now += 2.0
    (probe,) = desk.due()
    desk.failed(probe)
    desk.now += 4.0
    desk.failed(desk.chosen())
    assert isinstance(desk.refused(), NoCandidate)  # For eight seconds now: too long to wait.


def test_who_is_full_is_not_blamed(desk):
    desk.hear("a", slots=9)
    for _ in range(5):
        desk.failed(desk.chosen(), QueueFull(3, 1.0))
    desk.chosen()


# -- an answer that moves ----------------------------------------------------------------------


def begun(desk, **facts) -> Choice:
    choice = desk.chosen(**facts)
    desk.chooser.first_part(choice.attempt, now=desk.now)
    return choice


def test_an_answer_that_broke_off_goes_on_where_the_same_model_is(desk):
    desk.hear("a")
    first = begun(desk)
    desk.hear("no resume", can_resume=False)
    desk.hear("other digest", digest="sha256:2")
    desk.hear("right", slots=1, busy=1)
    second = desk.failed(first, PeerGone("a"))
    assert peer_of(second) == "right"
    assert second.resumes
    assert second.hedge_after_s is None
    desk.answered(second, usage=Usage(completion_tokens=50))
    assert desk.nothing_is_left()


def test_how_fast_an_answer_from_elsewhere_was_written_is_not_measured(desk):
    desk.hear("a")
    first = begun(desk)
    desk.hear("b")
    second = desk.failed(first)
    desk.answered(second, usage=Usage(completion_tokens=5_000))
    assert desk.chooser._measured.of(second.candidate.key).decode_tps.count == 0


def test_an_answer_that_cannot_move_breaks_off_honestly(desk):
    desk.hear("a")
    desk.hear("b")
    error = desk.failed(begun(desk, can_move=False)).error
    assert isinstance(error, CannotResume)
    assert "cannot go on elsewhere" in str(error)


def test_an_answer_with_which_nobody_can_go_on_breaks_off_honestly(desk):
    desk.hear("a", can_resume=False)
    desk.hear("b", can_resume=False)
    error = desk.failed(begun(desk)).error
    assert isinstance(error, CannotResume)
    assert "it was killed" in str(error)


def test_an_engine_that_says_it_cannot_go_on_is_not_asked_again(desk):
    for peer in "abc":
        desk.hear(peer)
    second = desk.failed(begun(desk))
    third = desk.failed(second, CannotResume("no"))
    assert peer_of(third) != peer_of(second)
    # Of the three, only the first may be asked again.
    assert peer_of(desk.failed(third, CannotResume("no"))) not in (peer_of(second), peer_of(third))


def test_where_all_are_late_they_get_as_many_as_they_have_slots(desk):
    desk.hear("a", slots=8)
    for first_s in (0.003,) * 40 + (5.0,) * 4:
        desk.answered(desk.chosen(prompt_tokens=0), first_s=first_s)
    desk.hear("a", slots=8)
    choices = [desk.chosen(prompt_tokens=0) for _ in range(8)]
    assert {each.candidate.capacity for each in choices} == {1}
    assert isinstance(desk.choose(prompt_tokens=0), Wait)
    desk.hear("b", slots=1, busy=1)  # one that was never late has room again soon
    assert [peer_of(each) for each in desk.due() if isinstance(each, Choice)] == ["b"]
    desk.hear("b", slots=1, busy=2)
    desk.answered(choices[0])
    assert isinstance(desk.choose(prompt_tokens=0), Wait)


# -- hedging -----------------------------------------------------------------------------------


def warmed_up(**settings) -> Desk:
    """Enough is measured to know what is late."""
    desk = Desk(hedge_samples_min=5, **settings)
    for peer in "ab":
        desk.hear(peer, slots=4)
    for _ in range(40):
        desk.answered(desk.chosen(prompt_tokens=0), first_s=0.2)
    for peer in "ab":
        desk.hear(peer, slots=4)
    return desk


def test_a_second_candidate_is_asked_when_the_first_is_late_and_who_is_first_wins():
    desk = warmed_up()
    first = desk.chosen(prompt_tokens=0)
    assert 0.2 <= first.hedge_after_s < 2.0
    desk.now += first.hedge_after_s
    second = desk.chooser.hedge(first.attempt, now=desk.now)
    assert peer_of(second) != peer_of(first)
    assert second.hedge_after_s is None
    assert desk.chooser.hedge(first.attempt, now=desk.now) is None  # Not a third.
    desk.chooser.first_part(second.attempt, now=desk.now)
    desk.chooser.cancelled(first.attempt, now=desk.now)
    desk.chooser.ended(second.attempt, now=desk.now)
    assert desk.nothing_is_left()


def test_if_one_of_the_two_fails_the_other_goes_on():
    desk = warmed_up()
    first = desk.chosen(prompt_tokens=0)
    second = desk.chooser.hedge(first.attempt, now=desk.now)
    assert desk.failed(first) is None
    desk.answered(second)
    assert desk.nothing_is_left()


def test_if_both_are_given_up_nothing_is_left():
    desk = warmed_up()
    first = desk.chosen(prompt_tokens=0)
    second = desk.chooser.hedge(first.attempt, now=desk.now)
    desk.chooser.cancelled(first.attempt, now=desk.now)
    desk.chooser.cancelled(second.attempt, now=desk.now)
    assert desk.nothing_is_left()


def test_who_answered_already_is_not_hedged():
    desk = warmed_up()
    first = desk.chosen(prompt_tokens=0)
    desk.chooser.first_part(first.attempt, now=desk.now)
    assert desk.chooser.hedge(first.attempt, now=desk.now) is None
    desk.chooser.ended(first.attempt, now=desk.now)
    assert desk.chooser.hedge(first.attempt, now=desk.now) is None


def test_hedges_have_a_budget():
    desk = warmed_up(hedge_ratio=0.05)
    hedged = 0
    for _ in range(200):
        first = desk.chosen(prompt_tokens=0)
        second = desk.chooser.hedge(first.attempt, now=desk.now)
        hedged += second is not None
        desk.chooser.cancelled(first.attempt, now=desk.now)
        if second is not None:
            desk.chooser.cancelled(second.attempt, now=desk.now)
    assert 8 <= hedged <= 0.05 * 240 + choosing.HEDGE_BURST


def test_nobody_is_hedged_to_who_is_not_free():
    desk = warmed_up()
    first = desk.chosen(prompt_tokens=0)
    for peer in "ab":
        desk.hear(peer, slots=4, busy=4)
    assert desk.chooser.hedge(first.attempt, now=desk.now) is None


def test_hedging_can_be_turned_off_and_needs_to_know_what_is_late():
    desk = warmed_up(hedge=False)
    assert desk.chosen(prompt_tokens=0).hedge_after_s is None
    fresh = Desk()
    fresh.hear("a")
    assert fresh.chosen().hedge_after_s is None


# -- bounds ------------------------------------------------------------------------------------


def test_what_is_remembered_of_candidates_is_bounded(monkeypatch):
    monkeypatch.setattr(choosing, "BREAKERS_MAX", 3)
    desk = Desk(attempts_max=1)
    for number in range(8):
        desk.hear(f"p{number}", model=f"m{number}")
        desk.failed(desk.chosen(model=f"m{number}"), ModelNotFound("m"))
    kept = desk.chooser
    assert len(kept._breakers) <= 3
    assert len(kept._absent) <= 3
    assert len(kept._ours) <= 4


# -- a story -----------------------------------------------------------------------------------


@pytest.mark.seeds(4)
def test_every_request_ends_whatever_the_candidates_do(rng):
    """A thousand requests to nodes that fail, hang, answer and come and go at random."""
    desk = Desk(hedge_samples_min=5, queue_max=40)
    running: list[Choice] = []
    asked = ended = 0

    def act(outcome) -> None:
        nonlocal ended
        if isinstance(outcome, Choice):
            running.append(outcome)
        elif isinstance(outcome, Refuse):
            ended += 1

    for _ in range(4_000):
        desk.now += rng.expovariate(20)
        if rng.random() < 0.1 or not desk.sequence:
            desk.hear(
                rng.choice("abcdef"),
                slots=rng.randrange(1, 4),
                busy=rng.randrange(4),
                loaded=rng.random() < 0.8,
                draining=rng.random() < 0.1,
            )
        if asked < 1_000 and rng.random() < 0.5:
            asked += 1
            act(desk.choose(user=rng.choice("xyz"), priority=rng.randrange(3)))
        if running:
            choice = running.pop(rng.randrange(len(running)))
            attempt = desk.chooser._attempts[choice.attempt]
            dice = rng.random()
            if dice < 0.25:
                act(desk.failed(choice, rng.choice([GONE, BackendFailed("x", "500")])))
            elif dice < 0.3:
                others = len(attempt.call.attempts) - 1
                desk.chooser.cancelled(choice.attempt, now=desk.now)
                ended += not others
            elif dice < 0.4 and attempt.first_at is None:
                running.append(choice)
                if (second := desk.chooser.hedge(choice.attempt, now=desk.now)) is not None:
                    running.append(second)
            elif attempt.first_at is None:
                for other in list(attempt.call.attempts):
                    if other != choice.attempt:
                        running[:] = [each for each in running if each.attempt != other]
                        desk.chooser.cancelled(other, now=desk.now)
                desk.chooser.first_part(choice.attempt, now=desk.now)
                running.append(choice)
            else:
                desk.chooser.ended(choice.attempt, now=desk.now)
                ended += 1
        for outcome in desk.due():
            act(outcome)
    while running or len(desk.chooser._queue):
        desk.now += 1.0
        desk.hear("a", slots=50)
        for choice in running:
            desk.chooser.cancelled(choice.attempt, now=desk.now)
        ended += len({choice.request.id for choice in running})
        running.clear()
        for outcome in desk.due():
            act(outcome)
    assert ended == asked == 1_000
    assert desk.nothing_is_left()
    assert all(not ours.running for ours in desk.chooser._ours.values())

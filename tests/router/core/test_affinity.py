"""What was sent where is remembered for a while, and not without bound."""

from ollamamax_p2p.router.core import affinity
from ollamamax_p2p.router.core.affinity import Affinity
from ollamamax_p2p.router.core.candidate import CandidateKey, PrefixPoint, RequestFacts


def key(name: str) -> CandidateKey:
    return CandidateKey(name, "ollama", "m")


def a_request(hashes, *, model="m", session="") -> RequestFacts:
    points = tuple(PrefixPoint(each, 100 * at) for at, each in enumerate(hashes, 1))
    return RequestFacts(id=1, model=model, prefix=points, session=session)


def an_affinity(**bounds) -> Affinity:
    return Affinity(**({"ttl_s": 60.0, "entries_max": 100} | bounds))


def test_the_next_turn_finds_who_answered_the_last():
    known = an_affinity()
    known.sent(a_request([1, 2, 3]), key("a"), now=0.0)
    assert known.warm_tokens(a_request([1, 2, 3, 4, 5]), now=1.0) == {key("a"): 300}


def test_prompts_that_begin_alike_find_what_they_share():
    known = an_affinity()
    known.sent(a_request(range(1, 10)), key("a"), now=0.0)
    known.sent(a_request([1, 2]), key("b"), now=0.0)
    fork = a_request([1, 2, 3, 70, 80])
    assert known.warm_tokens(fork, now=1.0) == {key("a"): 300, key("b"): 200}
    assert known.warm_tokens(a_request([9, 8]), now=1.0) == {key("a"): 100}
    assert known.warm_tokens(a_request([70, 80]), now=1.0) == {}


def test_another_model_has_another_cache():
    known = an_affinity()
    known.sent(a_request([1]), key("a"), now=0.0)
    assert known.warm_tokens(a_request([1], model="n"), now=0.0) == {}


def test_what_is_warm_cools():
    known = an_affinity()
    known.sent(a_request([1], session="s"), key("a"), now=0.0)
    assert known.warm_tokens(a_request([1]), now=60.0) == {key("a"): 100}
    assert known.warm_tokens(a_request([1]), now=60.1) == {}
    assert known.of_session(a_request([], session="s"), now=60.0) == key("a")
    assert known.of_session(a_request([], session="s"), now=60.1) is None


def test_a_session_is_where_it_was_sent_last():
    known = an_affinity()
    known.sent(a_request([], session="s"), key("a"), now=0.0)
    known.sent(a_request([], session="s"), key("b"), now=1.0)
    assert known.of_session(a_request([], session="s"), now=2.0) == key("b")
    assert known.of_session(a_request([], session="t"), now=2.0) is None
    assert known.of_session(a_request([]), now=2.0) is None


def test_who_failed_has_nothing_warm_any_more():
    known = an_affinity()
    known.sent(a_request([1]), key("a"), now=0.0)
    known.forget(key("a"), now=5.0)
    assert known.warm_tokens(a_request([1]), now=6.0) == {}
    known.sent(a_request([1]), key("a"), now=7.0)
    assert known.warm_tokens(a_request([1]), now=8.0) == {key("a"): 100}


def test_everything_is_bounded(monkeypatch):
    monkeypatch.setattr(affinity, "COLD_MAX", 2)
    known = an_affinity(entries_max=5)
    for number in range(20):
        known.sent(a_request([number], session=f"s{number}"), key("a"), now=0.0)
        known.sent(a_request([7]), key(f"p{number}"), now=0.0)
        known.forget(key(f"p{number}"), now=-1.0)
    assert len(known._prefixes) == len(known._sessions) == 5
    assert len(known._prefixes["m", 7]) == affinity.PLACES_MAX
    assert len(known._cold) == 2

"""What a download decides: fed with events, looked at by its intentions."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import PeerMisbehaved
from ollamamax_p2p.transfer import TransferSettings
from ollamamax_p2p.transfer.core.download import (
    ASKED_MAX,
    CHOKED_S_MAX,
    Arrival,
    Ask,
    Claim,
    Download,
    Drop,
    Leave,
    present_chunks,
)

MiB = 1024 * 1024
KiB = 1024


def begin(count=8, *, length=MiB, present=(), seed=0, **changes):
    return Download(
        [length] * count,
        present=present,
        settings=TransferSettings(**changes),
        rng=random.Random(seed),
    )


def deliver(download, source, chunk, *, now=0.0, length=MiB):
    """A whole, right chunk."""
    assert download.part_arrived(source, chunk, 0, length, now=now) is Arrival.WHOLE
    download.chunk_verified(source, chunk, now=now)


def asked_of(intentions, source):
    return [i.chunk for i in intentions if isinstance(i, Ask) and i.source == source]


def test_two_chunks_are_asked_of_a_source_that_is_not_known_yet():
    download = begin()
    download.source_added("a", now=0)
    assert len(asked_of(download.decide(now=0), "a")) == 2
    assert download.decide(now=0) == []
    assert download.active_sources() == 1


def test_what_is_here_is_not_asked_for():
    download = begin(3, present=[0, 1])
    download.source_added("a", now=0)
    assert download.decide(now=0) == [Ask("a", 2)]
    assert download.verified_bytes == 2 * MiB
    deliver(download, "a", 2)
    assert download.complete
    assert download.settle() == ({"a": MiB}, 0)
    assert download.settle() == ({}, 0)


def test_the_rarest_chunk_goes_first():
    download = begin(6, present=[4, 5])
    for name, has in (("a", [0, 1, 2, 3]), ("b", [0, 1, 2]), ("c", [0, 1]), ("d", [0])):
        download.source_added(name, has=has, choked=name != "a", now=0)
    for _ in range(2):  # the first few are random; let them pass
        for chunk in asked_of(download.decide(now=0), "a"):
            deliver(download, "a", chunk)
    fresh = begin(40, seed=3)
    fresh.source_added("a", has=range(40), now=0)
    fresh.source_added("b", has=range(39), choked=True, now=0)
    fetched = []
    for _ in range(4):
        for chunk in asked_of(fresh.decide(now=0), "a"):
            deliver(fresh, "a", chunk)
            fetched.append(chunk)
    assert 39 in fetched
    assert download.complete


def test_more_is_asked_of_a_source_that_is_fast_and_far():
    download = begin(64)
    download.source_added("a", round_trip_s=0.1, now=0)
    download.decide(now=0)
    now = 0.1
    for _ in range(20):
        chunks = list(download.outstanding("a"))
        now += 0.02
        deliver(download, "a", chunks[0], now=now)
        download.decide(now=now)
    assert len(download.outstanding("a")) == 8  # requests_in_flight_bytes


def test_small_chunks_are_not_asked_for_without_end():
    download = begin(1_000, length=1)
    download.source_added("a", round_trip_s=10.0, now=0)
    download.decide(now=0)
    now = 10.0
    for _ in range(400):
        now += 0.001
        deliver(download, "a", next(iter(download.outstanding("a"))), now=now, length=1)
        download.decide(now=now)
        now += 0.000_001
    assert len(download.outstanding("a")) == ASKED_MAX


def test_all_sources_together_are_bounded():
    download = begin(64, in_flight_bytes_max=3 * MiB)
    for name in "abcd":
        download.source_added(name, now=0)
    assert len(download.decide(now=0)) == 3


def test_one_chunk_is_asked_for_however_large():
    download = begin(3, length=16 * MiB, in_flight_bytes_max=MiB)
    download.source_added("a", now=0)
    assert len(download.decide(now=0)) == 1


def test_a_seed_is_spared_what_others_have():
    download = begin(8)
    download.source_added("seed", now=0)
    download.source_added("part", has=[0, 1, 2], now=0)
    intentions = download.decide(now=0)
    assert set(asked_of(intentions, "part")) <= {0, 1, 2}
    assert set(asked_of(intentions, "seed")) <= {3, 4, 5, 6, 7}


def test_a_seed_is_left_idle_when_others_send_the_rest_soon():
    download = begin(3)
    download.source_added("seed", now=0)
    download.source_added("part", has=[0, 1, 2], now=0)
    intentions = download.decide(now=0)
    assert len(asked_of(intentions, "part")) == 2
    assert asked_of(intentions, "seed") == []


def test_a_seed_helps_when_others_are_slow():
    download = begin(16)
    download.source_added("seed", now=0)
    download.source_added("part", has=range(16), now=0)
    assert len(asked_of(download.decide(now=0), "seed")) >= 1


def test_what_a_partial_holder_gets_is_not_asked_of_the_seed_any_more():
    download = begin(8)
    download.source_added("seed", now=0)
    first, second = asked_of(download.decide(now=0), "seed")
    download.source_added("part", has=[], now=0)
    download.source_has("part", [first, second])
    intentions = download.decide(now=0)
    assert Drop("seed", second) in intentions
    assert Ask("part", second) in intentions
    assert Drop("seed", first) not in intentions  # it is being sent
    assert download.part_arrived("seed", second, 0, MiB, now=1) is Arrival.STRAY


def test_those_who_fetch_from_one_seed_ask_it_for_different_chunks():
    asked = {}
    for own in "abcd":
        download = Download(
            [MiB] * 40, present=[], settings=TransferSettings(), rng=random.Random(1), own=own
        )
        download.source_added("seed", now=0)
        for other in set("abcd") - {own}:
            download.source_added(other, has=[], choked=True, now=0)
        asked[own] = []
        for _ in range(10):
            [chunk] = asked_of(download.decide(now=0), "seed")
            deliver(download, "seed", chunk)
            asked[own].append(chunk)
    assert sorted(chunk for chunks in asked.values() for chunk in chunks) == list(range(40))


def test_who_has_done_its_own_part_takes_of_the_others():
    download = Download(
        [MiB] * 4, present=[0, 2], settings=TransferSettings(), rng=random.Random(1), own="a"
    )
    download.source_added("seed", now=0)
    download.source_added("b", has=[], now=0)
    assert asked_of(download.decide(now=0), "seed")[0] in (1, 3)
    rarer = Download(
        [MiB] * 4, present=[], settings=TransferSettings(), rng=random.Random(1), own="a"
    )
    rarer.source_added("b", has=[0, 2], choked=True, now=0)
    rarer.source_added("seed", now=0)
    assert asked_of(rarer.decide(now=0), "seed")[0] in (1, 3)


def test_a_choked_holder_is_no_reason_to_spare_a_seed():
    download = begin(2)
    download.source_added("seed", now=0)
    asked = asked_of(download.decide(now=0), "seed")
    download.source_added("part", has=[], choked=True, now=0)
    download.source_has("part", asked)
    assert download.decide(now=0) == []


def test_a_second_source_is_asked_only_when_all_is_asked_for_and_the_first_is_late():
    download = begin(3, length=MiB)
    download.source_added("slow", now=0)
    assert len(download.decide(now=0)) == 2
    download.source_added("fast", now=0)
    last = asked_of(download.decide(now=0), "fast")
    assert len(last) == 1  # what nobody was asked for, and no more
    deliver(download, "fast", last[0], now=0.1)
    assert download.decide(now=0.1) == []  # not late yet
    [again] = download.decide(now=5.0)
    assert again.source == "fast"
    assert again.chunk in download.outstanding("slow")
    deliver(download, "fast", again.chunk, now=5.2)
    assert Drop("slow", again.chunk) in download.decide(now=5.2)
    assert download.part_arrived("slow", again.chunk, 0, MiB, now=6) is Arrival.STRAY
    assert download.settle() == ({"fast": 2 * MiB}, MiB)


def test_a_chunk_that_two_deliver_at_once_is_counted_once():
    download = begin(1)
    download.source_added("slow", now=0)
    download.decide(now=0)
    download.source_added("fast", now=0)
    download.decide(now=5)
    assert download.part_arrived("slow", 0, 0, MiB, now=6) is Arrival.WHOLE
    assert download.part_arrived("fast", 0, 0, MiB, now=6) is Arrival.WHOLE
    download.chunk_verified("fast", 0, now=6)
    assert download.decide(now=6) == []
    download.chunk_verified("slow", 0, now=6)
    assert download.settle() == ({"fast": MiB}, MiB)


def test_a_chunk_that_is_being_verified_is_not_late():
    download = begin(1)
    download.source_added("a", now=0)
    download.decide(now=0)
    download.source_added("b", now=0)
    assert download.part_arrived("a", 0, 0, MiB, now=1) is Arrival.WHOLE
    assert download.decide(now=100) == []
    download.tick(now=100)
    assert download.decide(now=100) == []


def test_a_peer_that_goes_quiet_loses_its_chunks():
    download = begin(4)
    download.source_added("quiet", now=0)
    lost = asked_of(download.decide(now=0), "quiet")
    download.source_added("other", now=0)
    download.decide(now=1)
    download.tick(now=19.9)
    assert all(isinstance(i, Ask) for i in download.decide(now=19.9))
    download.part_arrived("other", next(iter(download.outstanding("other"))), 0, 64 * KiB, now=19)
    download.tick(now=20.0)
    intentions = download.decide(now=20.0)
    assert {Drop("quiet", chunk) for chunk in lost} <= set(intentions)


def test_a_source_that_stalled_is_trusted_with_one_chunk_until_it_sends_again():
    download = begin(8, stall_strikes=3)
    download.source_added("a", now=0)
    download.decide(now=0)
    download.tick(now=20)
    again = asked_of(download.decide(now=20), "a")
    assert len(again) == 1
    assert download.part_arrived("a", again[0], 0, MiB, now=21) is Arrival.WHOLE
    download.chunk_verified("a", again[0], now=21)
    assert len(asked_of(download.decide(now=21), "a")) == 2


def test_a_source_that_stalls_too_often_is_left():
    download = begin(8, stall_strikes=2)
    download.source_added("a", now=0)
    download.decide(now=0)
    download.tick(now=20)
    download.decide(now=20)
    download.tick(now=40)
    assert Leave("a", "it fell silent 2 times") in download.decide(now=40)
    assert download.sources() == set()
    assert not download.can_go_on()


def test_a_source_that_chokes_for_ever_is_left():
    download = begin(8)
    download.source_added("a", choked=True, now=0)
    download.tick(now=CHOKED_S_MAX - 1)
    assert download.decide(now=CHOKED_S_MAX - 1) == []
    assert download.can_go_on()
    download.tick(now=CHOKED_S_MAX)
    assert [type(i) for i in download.decide(now=CHOKED_S_MAX)] == [Leave]


def test_a_choke_takes_the_requests_and_an_unchoke_allows_them_again():
    download = begin(2)
    download.source_added("a", now=0)
    first, second = asked_of(download.decide(now=0), "a")
    assert download.part_arrived("a", first, 0, MiB, now=1) is Arrival.WHOLE
    download.choked("a", now=1)
    assert list(download.outstanding("a")) == [first]  # whole, and being verified
    download.chunk_verified("a", first, now=1)
    assert download.decide(now=1) == []
    download.unchoked("a", now=2)
    assert download.decide(now=2) == [Ask("a", second)]
    # What was sent before the choke and what is sent after it are both let in, once each.
    assert download.part_arrived("a", second, 0, MiB, now=3) is Arrival.WHOLE
    assert download.part_arrived("a", second, 0, MiB // 2, now=3) is Arrival.STRAY
    assert download.part_arrived("a", second, MiB // 2, MiB // 2, now=3) is Arrival.STRAY
    with pytest.raises(PeerMisbehaved):
        download.part_arrived("a", second, 0, MiB, now=3)


def test_a_source_that_is_gone_is_replaced_and_what_it_began_is_lost():
    download = begin(2)
    download.source_added("a", now=0)
    chunk = asked_of(download.decide(now=0), "a")[0]
    assert download.part_arrived("a", chunk, 0, MiB // 2, now=1) is Arrival.MORE
    download.source_removed("a")
    download.source_removed("a")
    assert download.settle() == ({}, MiB // 2)
    assert download.part_arrived("a", chunk, MiB // 2, MiB // 2, now=1) is Arrival.STRAY
    download.source_added("b", has=[0, 1], now=1)
    assert sorted(asked_of(download.decide(now=1), "b")) == [0, 1]


def test_a_chunk_that_was_whole_when_its_source_went_counts():
    download = begin(1)
    download.source_added("a", now=0)
    download.decide(now=0)
    download.part_arrived("a", 0, 0, MiB, now=1)
    download.source_removed("a")
    download.chunk_verified("a", 0, now=1)
    assert download.complete
    assert download.settle() == ({"a": MiB}, 0)


def test_who_sends_a_wrong_chunk_is_never_asked_again():
    download = begin(4)
    download.source_added("liar", now=0)
    chunk = asked_of(download.decide(now=0), "liar")[0]
    download.part_arrived("liar", chunk, 0, MiB, now=1)
    download.chunk_wrong("liar", chunk)
    download.source_added("liar", now=1)
    assert download.decide(now=1) == []
    assert download.settle() == ({}, MiB)


@pytest.mark.parametrize(
    ("chunk", "offset", "length"),
    [(3, 0, MiB), (0, 0, MiB + 1), (0, 5, MiB - 5), (0, 0, 1000)],
    ids=["another chunk", "too long", "not in order", "in drops"],
)
def test_bytes_that_were_not_asked_for_are_misbehaviour(chunk, offset, length):
    download = begin(4, present=[1, 2, 3])
    download.source_added("a", now=0)
    assert download.decide(now=0) == [Ask("a", 0)]
    with pytest.raises(PeerMisbehaved):
        download.part_arrived("a", chunk, offset, length, now=1)


def test_a_chunk_that_there_is_not_is_misbehaviour():
    download = begin(4)
    download.source_added("a", has=[], now=0)
    with pytest.raises(PeerMisbehaved):
        download.source_has("a", [4])


def test_what_is_told_of_a_stranger_is_nothing():
    download = begin(4)
    download.source_has("nobody", [1])
    download.choked("nobody", now=0)
    download.unchoked("nobody", now=0)
    assert download.outstanding("nobody") == ()
    assert download.part_arrived("nobody", 0, 0, MiB, now=0) is Arrival.STRAY
    assert not download.can_go_on()


def test_sources_without_anything_new_cannot_go_on():
    download = begin(4, present=[0, 1])
    download.source_added("a", has=[0, 1], now=0)
    assert download.decide(now=0) == []
    assert download.decide(now=0) == []
    assert not download.can_go_on()
    download.source_has("a", [1, 2])
    assert download.can_go_on()
    assert download.decide(now=0) == [Ask("a", 2)]
    assert download.can_go_on()


def test_an_origin_claims_runs_of_what_no_peer_has():
    download = begin(40)
    download.source_added("part", has=[5], now=0)
    download.source_added("origin 0", kind="origin", now=0)
    download.source_added("origin 1", kind="origin", now=0)
    claims = [i for i in download.decide(now=0) if isinstance(i, Claim)]
    claimed = [c for claim in claims for c in range(claim.first, claim.first + claim.count)]
    assert len(claims) == 2
    assert len(set(claimed)) == len(claimed)
    assert 5 not in claimed
    assert all(claim.count <= 32 for claim in claims)
    assert download.decide(now=0) == []


def test_an_origin_is_not_asked_while_a_seed_serves():
    download = begin(4)
    download.source_added("seed", now=0)
    download.source_added("origin 0", kind="origin", now=0)
    assert asked_of(download.decide(now=0), "origin 0") == []
    download.choked("seed", now=1)
    assert download.decide(now=1) == [Claim("origin 0", 0, 4)]
    download.tick(now=1_000)
    assert Claim not in map(type, download.decide(now=1_000))


def test_an_origin_may_send_in_drops():
    download = begin(1)
    download.source_added("origin 0", kind="origin", now=0)
    download.decide(now=0)
    assert download.part_arrived("origin 0", 0, 0, 10, now=1) is Arrival.MORE
    assert download.part_arrived("origin 0", 0, 10, MiB - 10, now=1) is Arrival.WHOLE
    download.chunk_verified("origin 0", 0, now=1)
    assert download.complete
    assert (list(download.lengths), list(download.offsets)) == ([MiB], [0, MiB])


def test_of_a_request_taken_back_twice_both_answers_may_come():
    download = begin(1)
    download.source_added("a", now=0)
    for now in (0, 1):
        assert download.decide(now=now) == [Ask("a", 0)]
        download.choked("a", now=now)
        download.unchoked("a", now=now)
    for _ in range(2):
        assert download.part_arrived("a", 0, 0, MiB, now=2) is Arrival.STRAY
    with pytest.raises(PeerMisbehaved):
        download.part_arrived("a", 0, 0, MiB, now=2)
    assert download.settle() == ({}, 2 * MiB)


@given(
    lengths=st.lists(st.integers(1, 20), max_size=20),
    cuts=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), max_size=6),
)
def test_a_chunk_is_present_if_no_byte_of_it_is_missing(lengths, cuts):
    size = sum(lengths)
    gone = {byte for start, count in cuts for byte in range(start, min(start + count, size))}
    missing = []
    for byte in sorted(gone):
        if missing and missing[-1][1] == byte:
            missing[-1] = (missing[-1][0], byte + 1)
        else:
            missing.append((byte, byte + 1))
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    expected = [
        i
        for i, (start, length) in enumerate(zip(offsets, lengths, strict=True))
        if not gone & set(range(start, start + length))
    ]
    assert list(present_chunks(offsets, lengths, missing)) == expected


# -- what always holds -------------------------------------------------------------------------


class World:
    """Sources that behave as a seed decides: honest ones, liars, silent ones, leavers."""

    def __init__(self, data):
        self.rng = random.Random(data.draw(st.integers(0, 2**32)))
        self.lengths = [
            data.draw(st.sampled_from([1, 70_000, MiB, 5 * MiB]))
            for _ in range(data.draw(st.integers(1, 24)))
        ]
        self.settings = TransferSettings(
            requests_in_flight_bytes=data.draw(st.sampled_from([MiB, 8 * MiB])),
            in_flight_bytes_max=data.draw(st.sampled_from([4 * MiB, 64 * MiB])),
        )
        count = len(self.lengths)
        self.kinds = {
            f"{kind}{n}": kind
            for kind in ("honest", "liar", "silent", "leaver", "choker")
            for n in range(data.draw(st.integers(0, 3)))
        }
        self.kinds["honest last"] = "honest"
        self.has = {
            name: (
                set(range(count))
                if self.rng.random() < 0.3
                else {c for c in range(count) if self.rng.random() < 0.5}
            )
            for name in self.kinds
        }
        honest = set().union(*(self.has[n] for n, kind in self.kinds.items() if kind == "honest"))
        self.has["honest last"] |= set(range(count)) - honest
        self.download = Download(
            self.lengths,
            present=[c for c in range(count) if self.rng.random() < 0.1],
            settings=self.settings,
            rng=self.rng,
        )
        self.now = 0.0
        self.banned = set()
        self.asked = {name: {} for name in self.kinds}
        self.choked = set()

    def run(self):
        for name in self.kinds:
            whole = len(self.has[name]) == len(self.lengths)
            has = None if whole else sorted(self.has[name])
            self.download.source_added(name, has=has, now=self.now)
        for _ in range(5_000):
            if self.download.complete:
                return
            self.now += self.rng.choice([0.01, 0.3, 2.0])
            self.something_happens()
            self.download.tick(now=self.now)
            self.check(self.download.decide(now=self.now))
        raise AssertionError("it does not finish")

    def check(self, intentions):
        for intention in intentions:
            match intention:
                case Ask(source, chunk):
                    assert source not in self.banned
                    assert source not in self.choked
                    assert chunk in self.has[source]
                    assert chunk not in self.download.verified
                    assert chunk not in self.asked[source]
                    self.asked[source][chunk] = 0
                case Drop(source, chunk):
                    self.asked[source].pop(chunk, None)
                case Leave(source, _):
                    assert self.kinds[source] != "honest"
                    self.asked[source].clear()
        in_flight = 0
        for name, asked in self.asked.items():
            outstanding = sum(self.lengths[chunk] for chunk in asked)
            in_flight += outstanding
            assert len(asked) <= 1 or outstanding <= self.settings.requests_in_flight_bytes
            if self.kinds[name] == "honest":
                assert set(asked) == set(self.download.outstanding(name))
        chunks = [c for asked in self.asked.values() for c in asked]
        assert len(chunks) == 1 or in_flight <= self.settings.in_flight_bytes_max
        assert all(chunks.count(c) <= 2 for c in chunks)

    def something_happens(self):
        for name, kind in self.kinds.items():
            if kind == "leaver" and self.rng.random() < 0.02:
                self.download.source_removed(name)
                self.asked[name].clear()
            elif kind == "choker" and self.rng.random() < 0.1:
                self.turn(name)
            elif kind != "silent" and self.asked[name]:
                self.send(name, kind)

    def turn(self, name):
        if name in self.choked:
            self.choked.discard(name)
            self.download.unchoked(name, now=self.now)
        elif name in self.download.sources():
            self.choked.add(name)
            self.asked[name].clear()
            self.download.choked(name, now=self.now)

    def send(self, name, kind):
        chunk = next(iter(self.asked[name]))
        at = self.asked[name][chunk]
        length = min(512 * KiB, self.lengths[chunk] - at)
        arrival = self.download.part_arrived(name, chunk, at, length, now=self.now)
        self.asked[name][chunk] += length
        if arrival is Arrival.WHOLE:
            del self.asked[name][chunk]
            if kind == "liar":
                self.banned.add(name)
                self.asked[name].clear()
                self.download.chunk_wrong(name, chunk)
            else:
                self.download.chunk_verified(name, chunk, now=self.now)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_sources_do_a_download_finishes_within_its_limits(data):
    World(data).run()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), sources=st.integers(1, 6), count=st.integers(1, 40))
def test_no_chunk_is_asked_for_twice_while_another_has_not_been_asked_for(seed, sources, count):
    rng = random.Random(seed)
    download = begin(count, seed=seed)
    holdings = {f"s{n}": {c for c in range(count) if rng.random() < 0.7} for n in range(sources)}
    holdings["all"] = set(range(count))
    for name, has in holdings.items():
        download.source_added(name, has=None if name == "all" else has, now=0)
    unasked, now = set(range(count)), 0.0
    while not download.complete:
        for intention in download.decide(now=now):
            if isinstance(intention, Ask):
                if intention.chunk not in unasked:
                    assert not unasked
                unasked.discard(intention.chunk)
            else:
                assert isinstance(intention, Drop)
                if all(intention.chunk not in download.outstanding(s) for s in holdings):
                    unasked |= {intention.chunk} - download.verified
        busy = [name for name in holdings if download.outstanding(name)]
        now += 1.0
        if busy:
            name = rng.choice(busy)
            deliver(download, name, next(iter(download.outstanding(name))), now=now)

from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.discovery.core.announcements import Announcements
from ollamamax_p2p.discovery.core.provider_messages import PAGE_DIGESTS
from ollamamax_p2p.identity import peer_id_of

A, B = peer_id_of(bytes(32)), peer_id_of(bytes([1]) * 32)
BLOBS = [digest_of(number.to_bytes(2, "big")) for number in range(2_500)]


class Listener:
    """What a peer knows, having been told the pages."""

    def __init__(self, peer) -> None:
        self.peer = peer
        self.knows: set = set()
        self.pages = 0

    def catch_up(self, journal: Announcements) -> None:
        while page := journal.next_page(self.peer):
            assert len(page.held) + len(page.released) <= PAGE_DIGESTS
            self.knows = set() if page.fresh else self.knows
            self.knows |= set(page.held)
            self.knows -= set(page.released)
            self.pages += 1
            journal.told(self.peer, page)


def test_a_new_peer_is_told_everything_in_pages():
    journal, peer = Announcements(), Listener(A)
    journal.hold(BLOBS)
    peer.catch_up(journal)
    assert peer.knows == set(BLOBS)
    assert peer.pages == 3
    assert not journal.is_behind(A)


def test_a_peer_that_was_told_hears_only_what_changed():
    journal = Announcements()
    journal.hold(BLOBS[:10])
    Listener(A).catch_up(journal)
    journal.hold([BLOBS[3], BLOBS[11]])
    journal.release([BLOBS[5], BLOBS[99]])
    page = journal.next_page(A)
    assert (page.fresh, page.held, page.released) == (False, [BLOBS[11]], [BLOBS[5]])


def test_a_peer_that_holds_nothing_says_so_once():
    journal = Announcements()
    page = journal.next_page(A)
    assert page.fresh
    assert page.held == page.released == []
    journal.told(A, page)
    assert journal.next_page(A) is None


def test_a_page_is_offered_until_it_was_noted():
    journal = Announcements()
    journal.hold(BLOBS[:2])
    assert journal.next_page(A) == journal.next_page(A)


def test_a_renewal_tells_everything_again_but_never_afresh():
    journal, peer = Announcements(), Listener(A)
    journal.hold(BLOBS[:5])
    peer.catch_up(journal)
    journal.renew()
    page = journal.next_page(A)
    assert not page.fresh
    assert page.held == BLOBS[:5]


def test_a_renewal_forgets_a_withdrawal_only_when_every_peer_knows_it():
    journal, slow, quick = Announcements(), Listener(A), Listener(B)
    journal.hold(BLOBS[:2])
    slow.catch_up(journal)
    quick.catch_up(journal)
    journal.release([BLOBS[0]])
    quick.catch_up(journal)
    journal.renew()
    slow.catch_up(journal)
    assert slow.knows == {BLOBS[1]}
    journal.renew()
    assert journal.next_page(B).released == []


def test_a_peer_that_left_and_came_back_as_a_new_process_is_told_everything():
    journal = Announcements()
    journal.hold(BLOBS[:2])
    page = journal.next_page(A)
    journal.forget(A)  # it is gone before its answer is read
    journal.told(A, page)
    assert journal.next_page(A).fresh


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "release", "renew", "a", "b", "lose a"]),
        st.lists(st.integers(0, 30), max_size=6),
    )
)


@given(STEPS)
def test_whatever_happens_a_peer_that_catches_up_knows_exactly_what_is_held(steps):
    journal, a, b, held = Announcements(), Listener(A), Listener(B), set()
    for what, numbers in steps:
        blobs = [BLOBS[number] for number in numbers]
        if what == "hold":
            journal.hold(blobs)
            held |= set(blobs)
        elif what == "release":
            journal.release(blobs)
            held -= set(blobs)
        elif what == "renew":
            journal.renew()
        elif what == "lose a":
            journal.forget(A)  # it remembers what it was told
        else:
            {"a": a, "b": b}[what].catch_up(journal)
    for peer in (a, b):
        peer.catch_up(journal)
        assert peer.knows == held
        assert not journal.is_behind(peer.peer)
    assert {blob for blob in BLOBS if journal.holds(blob)} == held

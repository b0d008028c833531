import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.discovery.core.address_book import (
    ADDRESSES_MAX,
    BOOTSTRAP_RETRY_S_MAX,
    RETRY_S_MAX,
    AddressBook,
    is_local,
)
from ollamamax_p2p.identity import Address, PeerId, parse_address, peer_id_of

PEERS = [peer_id_of(bytes([number]) * 32) for number in range(64)]
ME = PEERS[63]


def at(peer: int | PeerId, transport: str = "/ip4/1.2.3.4/tcp/4011") -> Address:
    return parse_address(f"{transport}/p2p/{PEERS[peer] if isinstance(peer, int) else peer}")


def book(*, target: int = 8, peers_max: int = 100) -> AddressBook:
    return AddressBook(ME, target=target, rng=random.Random(1), peers_max=peers_max)


def dialled(book: AddressBook, *, connected=(), dialling=(), room: int = 64, now: float = 0.0):
    offered = book.to_dial(connected=connected, dialling=dialling, room=room, now=now)
    return [addresses[0].peer for addresses in offered]


def test_sources_are_tried_in_the_order_of_their_worth():
    it = book()
    for peer, source in enumerate(["dht", "told", "mdns", "remembered", "bootstrap"]):
        it.add([at(peer)], source, expires=math.inf)
    it.add([at(5)], "a source of tomorrow", expires=math.inf)
    assert dialled(it) == [PEERS[number] for number in (4, 3, 2, 1, 0, 5)]


def test_a_peer_counts_by_its_best_source():
    it = book()
    it.add([at(0)], "mdns", expires=math.inf)
    it.add([at(1)], "dht", expires=math.inf)
    it.add([at(1)], "bootstrap", expires=math.inf)
    it.add([at(1)], "dht", expires=math.inf)
    assert dialled(it) == [PEERS[1], PEERS[0]]


def test_peers_and_addresses_on_this_network_come_first():
    it = book()
    it.add([at(0)], "told", expires=math.inf)
    it.add([at(1), at(1, "/ip4/192.168.1.5/tcp/4011")], "told", expires=math.inf)
    offered = it.to_dial(connected=(), dialling=(), room=9, now=0)
    assert offered == [(at(1, "/ip4/192.168.1.5/tcp/4011"), at(1)), (at(0),)]


def test_among_equals_the_one_reached_last_comes_first():
    it = book()
    for peer in range(3):
        it.add([at(peer)], "told", expires=math.inf)
    it.reached(PEERS[0], now=5)
    it.reached(PEERS[2], now=9)
    assert dialled(it, now=10) == [PEERS[2], PEERS[0], PEERS[1]]
    assert it.reached_peers() == [(PEERS[2], 9), (PEERS[0], 5)]


def test_nobody_is_dialled_beyond_the_target_except_bootstrap_peers():
    it = book(target=2)
    for peer in range(3):
        it.add([at(peer)], "told", expires=math.inf)
    assert len(dialled(it)) == 2
    assert len(dialled(it, dialling=[PEERS[0]])) == 1
    assert dialled(it, connected=[PEERS[0], PEERS[1]]) == []
    it.add([at(9)], "bootstrap", expires=math.inf)
    assert dialled(it, connected=[PEERS[0], PEERS[1]]) == [PEERS[9]]


def test_no_more_are_offered_than_there_is_room_for():
    it = book()
    for peer in range(5):
        it.add([at(peer)], "bootstrap", expires=math.inf)
    assert len(dialled(it, room=2)) == 2
    assert dialled(it, room=0) == []
    assert dialled(it, room=-1) == []


def test_a_connected_or_dialled_peer_is_not_dialled():
    it = book()
    it.add([at(0), at(1), at(2)], "told", expires=math.inf)
    assert dialled(it, connected=[PEERS[0]], dialling=[PEERS[1]]) == [PEERS[2]]


def test_this_node_is_never_in_its_own_book():
    it = book()
    it.add([at(ME)], "dht", expires=math.inf)
    assert len(it) == 0


def test_a_peer_that_fails_waits_longer_each_time_and_one_success_forgives():
    it = book()
    it.add([at(0)], "told", expires=math.inf)
    now, pauses = 0.0, []
    for _ in range(40):
        it.failed(PEERS[0], now=now)
        low, high = now, now + RETRY_S_MAX
        while high - low > 0.01:
            middle = (low + high) / 2
            low, high = (low, middle) if dialled(it, now=middle) else (middle, high)
        pauses.append(high - now)
        now = high
    assert 1 <= pauses[0] <= 2.01
    assert all(RETRY_S_MAX / 2 <= pause <= RETRY_S_MAX + 0.01 for pause in pauses[10:])
    it.reached(PEERS[0], now=now)
    it.failed(PEERS[0], now=now)
    assert dialled(it, now=now + 2.01) == [PEERS[0]]


def test_a_peer_of_another_swarm_is_left_alone_for_long_at_once():
    it = book()
    it.add([at(0)], "mdns", expires=math.inf)
    it.failed(PEERS[0], hopeless=True, now=0)
    assert dialled(it, now=RETRY_S_MAX / 2 - 1) == []
    assert dialled(it, now=RETRY_S_MAX) == [PEERS[0]]


def test_a_bootstrap_peer_is_never_left_alone_for_long():
    it = book()
    it.add([at(0)], "bootstrap", expires=math.inf)
    for _ in range(30):
        it.failed(PEERS[0], hopeless=True, now=0)
    assert dialled(it, now=BOOTSTRAP_RETRY_S_MAX) == [PEERS[0]]


def test_news_of_an_unknown_peer_changes_nothing():
    it = book()
    it.reached(PEERS[0], now=0)
    it.failed(PEERS[0], now=0)
    assert it.peers() == []
    assert it.addresses_of(PEERS[0]) == ()


def test_what_expires_is_forgotten_unless_it_was_found_again():
    it = book()
    it.add([at(0), at(1)], "mdns", expires=10)
    it.add([at(1)], "dht", expires=5)
    it.add([at(1)], "mdns", expires=20)
    assert dialled(it, now=9) != []
    assert dialled(it, now=10) == [PEERS[1]]
    assert it.peers() == [PEERS[1]]


def test_one_peer_cannot_fill_the_book_with_addresses():
    it = book()
    many = [at(0, f"/ip4/1.2.3.{number}/tcp/4011") for number in range(50)]
    it.add(many, "dht", expires=math.inf)
    assert it.addresses_of(PEERS[0]) == tuple(reversed(many[-ADDRESSES_MAX:]))


def test_a_full_book_drops_its_worst_peer():
    it = book(peers_max=2)
    it.add([at(0)], "dht", expires=math.inf)
    it.add([at(1)], "bootstrap", expires=math.inf)
    it.add([at(2)], "mdns", expires=math.inf)
    assert it.peers() == [PEERS[1], PEERS[2]]


@pytest.mark.parametrize(
    ("transport", "local"),
    [
        ("/ip4/127.0.0.1/tcp/1", True),
        ("/ip4/10.1.2.3/tcp/1", True),
        ("/ip4/169.254.1.1/tcp/1", True),
        ("/ip6/fe80::1/tcp/1", True),
        ("/ip6/fd00::1/tcp/1/ws", True),
        ("/ip4/8.8.8.8/tcp/1", False),
        ("/ip6/2600::1/tcp/1", False),
        ("/dns4/nas.example/tcp/1", False),
        (f"/ip4/10.1.2.3/tcp/1/p2p/{PEERS[5]}/p2p-circuit", False),
    ],
)
def test_what_counts_as_on_this_network(transport, local):
    assert is_local(at(0, transport)) == local


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(0, 40),
            st.sampled_from(["bootstrap", "mdns", "dht", "told", "remembered"]),
            st.floats(0, 2_000),
        ),
        st.tuples(st.just("fail"), st.integers(0, 40), st.booleans(), st.just(0.0)),
        st.tuples(st.just("reach"), st.integers(0, 40), st.just(0), st.just(0.0)),
        st.tuples(st.just("wait"), st.integers(0, 40), st.just(0), st.floats(0, 700)),
    ),
    max_size=60,
)


@given(STEPS, st.sets(st.integers(0, 40)))
def test_whatever_happens_only_usable_peers_are_offered_once_each(steps, connected):
    it, now, linked = book(target=8, peers_max=20), 0.0, {PEERS[number] for number in connected}
    for what, number, detail, seconds in steps:
        if what == "add":
            it.add([at(number)], detail, expires=now + seconds)
        elif what == "fail":
            it.failed(PEERS[number], hopeless=detail, now=now)
        elif what == "reach":
            it.reached(PEERS[number], now=now)
        else:
            now += seconds
        assert len(it) <= 20
    offered = it.to_dial(connected=linked, dialling=(), room=8, now=now)
    peers = [addresses[0].peer for addresses in offered]
    assert len(peers) == len(set(peers)) <= 8
    assert not linked & set(peers)
    assert all(len({address.peer for address in addresses}) == 1 for addresses in offered)

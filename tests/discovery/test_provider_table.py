import math

from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.discovery.core.provider_messages import LIFETIME_S_MAX
from ollamamax_p2p.discovery.core.provider_table import ProviderTable
from ollamamax_p2p.identity import parse_address, peer_id_of

PEERS = [peer_id_of(bytes([number]) * 32) for number in range(8)]
BLOBS = [digest_of(bytes([number])) for number in range(64)]


def tell(table, peer, held=(), released=(), *, fresh=False, lifetime_s=100.0, addresses=(), now=0):
    table.tell(
        PEERS[peer],
        [BLOBS[number] for number in held],
        [BLOBS[number] for number in released],
        addresses=addresses,
        lifetime_s=lifetime_s,
        fresh=fresh,
        now=now,
    )


def holders(table, blob, *, connected=(), now=0.0):
    found = table.holders(BLOBS[blob], connected=[PEERS[number] for number in connected], now=now)
    return [PEERS.index(holding.peer) for holding in found]


def test_a_connected_holder_comes_before_a_fresher_one_that_left():
    table = ProviderTable()
    tell(table, 0, [0], now=0)
    tell(table, 1, [0], now=5)
    tell(table, 2, [0], now=9)
    assert holders(table, 0, connected=[0], now=10) == [0, 2, 1]


def test_an_announcement_that_is_not_renewed_is_forgotten():
    table = ProviderTable()
    tell(table, 0, [0, 1], now=0)
    tell(table, 0, [0], now=60)
    assert holders(table, 1, now=99) == [0]
    assert holders(table, 1, now=100) == []
    table.expire(150)
    assert holders(table, 0, now=150) == [0]
    assert len(table) == 1


def test_nobody_is_believed_for_ever():
    table = ProviderTable()
    tell(table, 0, [0], lifetime_s=math.inf)
    assert holders(table, 0, now=LIFETIME_S_MAX) == []
    tell(table, 0, [1], lifetime_s=-5)
    assert holders(table, 1, now=0) == []


def test_what_is_released_is_held_no_more_by_that_peer_only():
    table = ProviderTable()
    tell(table, 0, [0])
    tell(table, 1, [0])
    tell(table, 0, released=[0, 3])
    assert holders(table, 0) == [1]


def test_a_fresh_page_replaces_all_that_the_peer_told_before():
    table = ProviderTable()
    tell(table, 0, [0, 1])
    tell(table, 1, [0])
    tell(table, 0, [2], fresh=True)
    assert [holders(table, blob) for blob in range(3)] == [[1], [], [0]]


def test_addresses_of_another_peer_are_not_taken():
    table = ProviderTable()
    mine = parse_address(f"/ip4/10.0.0.1/tcp/1/p2p/{PEERS[0]}")
    tell(table, 0, [0], addresses=(mine, parse_address(f"/ip4/10.0.0.1/tcp/1/p2p/{PEERS[1]}")))
    assert table.holders(BLOBS[0], connected=(), now=0)[0].addresses == (mine,)


def test_a_peer_that_tells_too_much_loses_its_own_oldest_records():
    table = ProviderTable(per_peer_max=3)
    tell(table, 1, [0])
    tell(table, 0, [0, 1, 2])
    tell(table, 0, [0])  # renewed: now the newest
    tell(table, 0, [3])
    assert [holders(table, blob) for blob in range(4)] == [[0, 1], [], [0], [0]]


def test_a_flood_pushes_out_the_flooder_and_nobody_else():
    table = ProviderTable(records_max=10)
    tell(table, 1, [60, 61])
    tell(table, 2, [60])
    tell(table, 0, range(40))
    assert len(table) == 10
    assert holders(table, 60) == [1, 2]
    assert holders(table, 61) == [1]
    assert [blob for blob in range(40) if holders(table, blob)] == list(range(33, 40))


def test_a_full_table_makes_room_by_dropping_what_has_expired():
    table = ProviderTable(records_max=4)
    tell(table, 0, [0, 1, 2, 3], lifetime_s=10)
    tell(table, 1, [5], now=11)
    assert len(table) == 1


class CountedSearches(ProviderTable):
    searches = 0

    def expire(self, now):
        self.searches += 1
        super().expire(now)


def test_a_full_table_is_not_searched_for_each_record_that_is_told():
    table = CountedSearches(records_max=32)
    tell(table, 0, range(32), lifetime_s=0)
    for _ in range(3):
        tell(table, 1, range(64), lifetime_s=0, now=0.5)
    assert table.searches == 1
    tell(table, 1, range(64), lifetime_s=0, now=1.5)
    assert table.searches == 2
    assert len(table) == 32


def test_the_peer_with_the_most_records_is_known_whatever_was_dropped_before():
    table = ProviderTable(records_max=6)
    tell(table, 0, [0, 1, 2])
    tell(table, 1, [10, 11])
    tell(table, 0, released=[0, 1])
    tell(table, 2, [20, 21, 22])
    tell(table, 3, [30, 31])  # two have to go: peer 2 has most, then peer 1 has as many
    assert holders(table, 20) == []
    assert holders(table, 2) == [0]
    assert len(table) == 6


TELLS = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.lists(st.integers(0, 63), max_size=20),
        st.lists(st.integers(0, 63), max_size=5),
        st.booleans(),
        st.floats(-10, 1e6),
    ),
    max_size=40,
)


@given(TELLS)
def test_the_table_stays_bounded_and_counts_right_whatever_peers_tell(tells):
    table = ProviderTable(per_peer_max=6, records_max=20)
    now = 0.0
    for peer, held, released, fresh, lifetime_s in tells:
        now += 3
        tell(table, peer, held, released, fresh=fresh, lifetime_s=lifetime_s, now=now)
        assert len(table) <= 20
        counts = [len(records) for records in table._expiry.values()]
        assert table._largest == max(counts, default=0)
    table.expire(now)
    alive = [holders(table, blob, now=now) for blob in range(64)]
    assert len(table) == sum(map(len, alive))
    assert all(sum(peer in each for each in alive) <= 6 for peer in range(8))
    for peer in range(8):
        table.forget(PEERS[peer])
    assert len(table) == 0

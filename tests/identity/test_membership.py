"""What a swarm is made of: kept by this user alone, never shown, true after a crash."""

import base64
import os
import random
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import (
    BadConfig,
    BadTicket,
    KeyExposed,
    StoreDamaged,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.identity import Grant, Membership, parse_address, peer_id_of

PEERS = [peer_id_of(number.to_bytes(32, "big")) for number in range(20)]
ADDRESSES = [parse_address(f"/ip4/192.0.2.7/tcp/4011/p2p/{PEERS[0]}")]
NOW = 1_800_000_000.5


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "data" / "swarm"


def issue(membership: Membership, *, uses: int = 1, lifetime_s: int = 3600, now: float = NOW):
    return membership.issue(ADDRESSES, uses=uses, lifetime_s=lifetime_s, now=now)


def test_a_node_that_is_in_no_swarm_has_no_membership(path):
    assert Membership.load(path) is None


def test_a_swarm_is_the_same_after_a_restart(path):
    made = Membership.create(path)
    loaded = Membership.load(path)
    assert loaded.swarm_id == made.swarm_id
    assert loaded.swarm_key == made.swarm_key
    assert loaded.grant() == made.grant()
    assert loaded.credential(PEERS[1]) == made.credential(PEERS[1])
    assert loaded.mdns_fingerprint() == made.mdns_fingerprint()


def test_its_file_is_for_this_user_only(path):
    os.umask(os.umask(0))  # whatever the mask is, the mode is exact
    membership = Membership.create(path)
    issue(membership)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o640)
    with pytest.raises(KeyExposed, match="chmod 600"):
        Membership.load(path)


def test_every_swarm_has_secrets_of_its_own():
    one, two = Membership.create(None), Membership.create(None)
    assert len({one.swarm_id, two.swarm_id, one.swarm_key, two.swarm_key}) == 4
    assert one.grant().member_key != two.grant().member_key
    assert one.mdns_fingerprint() != two.mdns_fingerprint()


def test_a_ticket_makes_another_node_a_member_after_which_both_know_each_other(tmp_path):
    founder = Membership.create(tmp_path / "one")
    ticket = issue(founder)
    grant = founder.redeem(ticket.secret, PEERS[1], now=NOW)
    member = Membership.join(tmp_path / "two", ticket, grant)
    assert member.swarm_key == founder.swarm_key
    assert founder.is_credential(PEERS[1], member.credential(PEERS[1]))
    assert member.is_credential(PEERS[0], founder.credential(PEERS[0]))
    assert Membership.load(tmp_path / "two").credential(PEERS[1]) == member.credential(PEERS[1])


def test_a_node_knows_whether_it_has_admitted_anybody(path):
    membership = Membership.create(path)
    ticket = issue(membership)
    assert not membership.has_admitted
    membership.redeem(ticket.secret, PEERS[1], now=NOW)
    assert membership.has_admitted
    assert Membership.load(path).has_admitted


def test_a_credential_proves_one_peer_of_one_swarm():
    one, two = Membership.create(None), Membership.create(None)
    credential = one.credential(PEERS[1])
    assert one.is_credential(PEERS[1], credential)
    assert not one.is_credential(PEERS[2], credential)
    assert not two.is_credential(PEERS[1], credential)
    for wrong in (b"", credential[:-1], credential + b"\0", bytes(32)):
        assert not one.is_credential(PEERS[1], wrong)


def test_knowing_all_that_a_ticket_carries_is_not_knowing_the_member_key():
    founder = Membership.create(None)
    ticket = issue(founder)
    pretender = Membership.join(None, ticket, Grant(ticket.swarm_id, ticket.swarm_key))
    assert not founder.is_credential(PEERS[1], pretender.credential(PEERS[1]))


def test_the_issuer_keeps_only_a_hash_of_the_secret(path):
    membership = Membership.create(path)
    ticket = issue(membership)
    data = path.read_bytes()
    assert base64.b64encode(ticket.secret) not in data
    assert base64.b64encode(ticket.secret)[:20] not in data
    assert ticket.secret not in data
    assert ticket.secret.hex().encode() not in data


def test_a_ticket_is_used_by_as_many_peers_as_it_says_and_survives_restarts(path):
    membership = Membership.create(path)
    secret = issue(membership, uses=3).secret
    for peer in PEERS[1:4]:
        Membership.load(path).redeem(secret, peer, now=NOW)
    with pytest.raises(TicketUsedUp, match="3 of 3"):
        Membership.load(path).redeem(secret, PEERS[4], now=NOW)
    Membership.load(path).redeem(secret, PEERS[2], now=NOW)  # its answer was lost


def test_a_grant_is_on_disk_before_it_is_given(path):
    membership = Membership.create(path)
    secret = issue(membership).secret
    path.parent.rename(path.parent.with_name("gone"))
    path.parent.write_text("in the way of the folder")
    with pytest.raises(StoreDamaged):
        membership.redeem(secret, PEERS[1], now=NOW)
    path.parent.unlink()
    path.parent.with_name("gone").rename(path.parent)
    # Nobody used it, so another may.
    membership.redeem(secret, PEERS[2], now=NOW)
    with pytest.raises(TicketUsedUp):
        Membership.load(path).redeem(secret, PEERS[3], now=NOW)


def test_peers_that_redeem_at_once_do_not_share_a_use(path):
    membership = Membership.create(path)
    secret = issue(membership, uses=5).secret
    granted, refused = [], []

    def redeem(peer) -> None:
        try:
            membership.redeem(secret, peer, now=NOW)
            granted.append(peer)
        except TicketUsedUp:
            refused.append(peer)

    threads = [threading.Thread(target=redeem, args=[peer]) for peer in PEERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(granted), len(refused)) == (5, 15)


@pytest.mark.parametrize("after_s", [3600, 3601, 10**7])
def test_an_expired_ticket_says_when_it_expired(after_s):
    membership = Membership.create(None)
    secret = issue(membership).secret
    with pytest.raises(TicketExpired, match="2027-01-15T09:00:00Z"):
        membership.redeem(secret, PEERS[1], now=NOW + after_s)


def test_a_ticket_lives_until_the_second_it_names():
    membership = Membership.create(None)
    secret = issue(membership).secret
    membership.redeem(secret, PEERS[1], now=NOW + 3599)


def test_a_clock_set_back_does_not_revive_a_ticket_even_over_a_restart(path):
    membership = Membership.create(path)
    secret = issue(membership).secret
    with pytest.raises(TicketExpired):
        membership.redeem(secret, PEERS[1], now=NOW + 4000)
    for survivor in (membership, Membership.load(path)):
        with pytest.raises(TicketExpired):
            survivor.redeem(secret, PEERS[1], now=NOW)


def test_a_ticket_is_refused_while_the_clock_reads_earlier_than_its_making():
    membership = Membership.create(None)
    secret = issue(membership).secret
    with pytest.raises(TicketExpired):
        membership.redeem(secret, PEERS[1], now=0.0)
    membership.redeem(secret, PEERS[1], now=NOW - 30)  # NTP mended a drift


def test_a_clock_that_jumped_ahead_and_back_harms_no_later_ticket():
    membership = Membership.create(None)
    old = issue(membership).secret
    issue(membership, now=NOW + 10**8)
    with pytest.raises(TicketExpired):
        membership.redeem(old, PEERS[1], now=NOW)
    later = issue(membership)
    assert later.expires_at == int(NOW) + 3600
    membership.redeem(later.secret, PEERS[1], now=NOW + 1)
    with pytest.raises(TicketExpired):
        membership.redeem(later.secret, PEERS[1], now=NOW + 3600)


def test_withdrawn_tickets_are_unknown_and_members_stay_members():
    membership = Membership.create(None)
    used, live, dead = issue(membership), issue(membership), issue(membership, lifetime_s=1)
    membership.redeem(used.secret, PEERS[1], now=NOW)
    membership.redeem(live.secret, PEERS[1], now=NOW)
    another = issue(membership, now=NOW + 5)
    assert membership.withdraw() == 1
    for ticket in (used, live, dead, another):
        with pytest.raises(TicketUnknown):
            membership.redeem(ticket.secret, PEERS[2], now=NOW)
    assert membership.is_credential(PEERS[1], membership.credential(PEERS[1]))


def test_dead_tickets_make_room_and_living_ones_do_not():
    membership = Membership.create(None)
    first = issue(membership, lifetime_s=1)
    living = [issue(membership, now=NOW + 2) for _ in range(256)]
    with pytest.raises(TicketUnknown):  # it gave its place away
        membership.redeem(first.secret, PEERS[1], now=NOW + 3)
    with pytest.raises(BadConfig, match="withdraw"):
        issue(membership, now=NOW + 3)
    membership.redeem(living[7].secret, PEERS[1], now=NOW + 3)
    issue(membership, now=NOW + 3)
    membership.redeem(living[8].secret, PEERS[1], now=NOW + 3)


@pytest.mark.parametrize(
    "wrong", [{"uses": 0}, {"uses": 257}, {"lifetime_s": 0}, {"lifetime_s": 40_000_000}]
)
def test_uses_and_lifetime_have_bounds(wrong):
    with pytest.raises(BadConfig, match="out of range"):
        issue(Membership.create(None), **wrong)


def test_a_node_joins_no_second_swarm_before_it_left_the_first(path):
    membership = Membership.create(path)
    before = path.read_bytes()
    for join in (Membership.create, lambda path: Membership.join_open(path, bytes(16))):
        with pytest.raises(BadConfig, match="omx leave"):
            join(path)
    assert path.read_bytes() == before
    membership.leave()
    assert not path.exists()
    Membership.create(path)


def test_another_swarm_takes_the_place_of_this_one_in_one_step_or_not_at_all(path):
    membership, other = Membership.create(path), Membership.create(None)
    moved_away = path.parent.rename(path.parent.with_name("away"))
    path.parent.write_text("a file where the folder should be")
    with pytest.raises(StoreDamaged):
        membership.replaced_by(other)
    assert Membership.load(moved_away / path.name).swarm_id == membership.swarm_id
    path.parent.unlink()
    moved_away.rename(path.parent)
    replacement = membership.replaced_by(other)
    assert Membership.load(path).grant() == replacement.grant() == other.grant()
    issue(replacement)  # and it is saved where the old one was
    assert list(path.parent.iterdir()) == [path]


def test_a_grant_of_another_swarm_is_not_taken():
    one, two = Membership.create(None), Membership.create(None)
    with pytest.raises(ValueError, match="another swarm"):
        Membership.join(None, issue(one), two.grant())


def test_an_open_swarm_has_no_key_and_is_all_in_its_id(path):
    founder = Membership.create(path, open_swarm=True)
    assert founder.is_open
    assert founder.swarm_key is None
    guest = Membership.join_open(None, founder.swarm_id)
    assert founder.is_credential(PEERS[1], guest.credential(PEERS[1]))
    assert Membership.load(path).is_open


@pytest.mark.parametrize(
    "data",
    [b"\0", b"{}", b"[" * 100_000, b'{"version":2}', b"null", b'{"version":1,"swarm_id":"AA=="}'],
)
def test_a_damaged_record_says_so_and_does_not_quote_itself(path, data):
    Membership.create(path)
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match="not the record of a swarm") as caught:
        Membership.load(path)
    assert caught.value.__cause__ is None
    assert path.read_bytes() == data


def test_half_a_record_is_damaged_at_every_length(path):
    issue(Membership.create(path))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreDamaged):
            Membership.load(path)


def test_nothing_shows_the_keys(path):
    membership = Membership.create(path)
    grant = membership.grant()
    shown = repr([membership, grant, membership._saved]) + str(membership) + str(grant)
    for secret in (membership.swarm_key, grant.member_key):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.sampled_from(["issue", "redeem", "jump"]), st.integers(0, 9)), max_size=40
    ),
)
def test_whatever_happens_no_ticket_is_used_more_often_or_longer_than_it_says(seed, steps):
    """Clock jumps included: a secret that was refused as expired is never taken again."""
    rng = random.Random(seed)
    membership = Membership.create(None, token_bytes=rng.randbytes)
    now = NOW
    issued, users, over = [], {}, set()
    for step, number in steps:
        if step == "jump":
            now = max(0.0, now + rng.choice([-10_000, -100, 1, 50, 100, 10_000]))
        elif step == "issue":
            issued.append(issue(membership, uses=1 + number % 3, lifetime_s=100, now=now))
            users[issued[-1].secret] = (1 + number % 3, set())
        elif issued:
            ticket, peer = rng.choice(issued), PEERS[number]
            uses, theirs = users[ticket.secret]
            try:
                membership.redeem(ticket.secret, peer, now=now)
                theirs.add(peer)
                assert ticket.secret not in over
                assert len(theirs) <= uses
                assert now < ticket.expires_at
            except TicketExpired:
                if now >= ticket.expires_at:
                    over.add(ticket.secret)
            except BadTicket:
                pass

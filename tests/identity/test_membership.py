"""What a swarm is made of: kept by this user alone, never shown, true after a crash."""

import os
import stat
from pathlib import Path

import pytest

from ollamamax_p2p.errors import BadConfig, KeyExposed, StoreDamaged
from ollamamax_p2p.identity import Membership, Ticket, parse_address, peer_id_of

PEERS = [peer_id_of(number.to_bytes(32, "big")) for number in range(20)]
ADDRESSES = [parse_address(f"/ip4/192.0.2.7/tcp/4011/p2p/{PEERS[0]}")]
NOW = 1_800_000_000.5


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "data" / "swarm"


def ticket_of(membership: Membership, *, uses: int = 1, lifetime_s: int = 3600) -> Ticket:
    return membership.new_ticket(ADDRESSES, uses=uses, lifetime_s=lifetime_s, now=NOW)


def test_a_node_that_is_in_no_swarm_has_no_membership(path):
    assert Membership.load(path) is None


def test_a_swarm_is_the_same_after_a_restart(path):
    made = Membership.create(path)
    loaded = Membership.load(path)
    assert loaded.swarm_id == made.swarm_id
    assert loaded.swarm_key == made.swarm_key
    assert loaded.mdns_fingerprint() == made.mdns_fingerprint()


def test_its_file_is_for_this_user_only(path):
    os.umask(os.umask(0))  # whatever the mask is, the mode is exact
    Membership.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o640)
    with pytest.raises(KeyExposed, match="chmod 600"):
        Membership.load(path)


def test_every_swarm_has_secrets_of_its_own():
    one, two = Membership.create(None), Membership.create(None)
    assert len({one.swarm_id, two.swarm_id, one.swarm_key, two.swarm_key}) == 4
    assert ticket_of(one).secret != ticket_of(one).secret
    assert one.mdns_fingerprint() != two.mdns_fingerprint()


@pytest.mark.parametrize(
    "wrong", [{"uses": 0}, {"uses": 257}, {"lifetime_s": 0}, {"lifetime_s": 40_000_000}]
)
def test_uses_and_lifetime_have_bounds(wrong):
    with pytest.raises(BadConfig, match="out of range"):
        ticket_of(Membership.create(None), **wrong)


def test_a_ticket_carries_what_it_takes_to_knock(tmp_path):
    founder = Membership.create(tmp_path / "one")
    ticket = ticket_of(founder, lifetime_s=60)
    assert ticket.expires_at == int(NOW) + 60
    member = Membership.join(tmp_path / "two", ticket)
    assert (member.swarm_id, member.swarm_key) == (founder.swarm_id, founder.swarm_key)
    loaded = Membership.load(tmp_path / "two")
    assert loaded is not None
    assert loaded.swarm_key == founder.swarm_key


def test_a_swarm_keeps_its_id_when_its_key_is_changed(path):
    before = Membership.create(path)
    after = before.with_swarm_key(b"k" * 32)
    loaded = Membership.load(path)
    assert loaded is not None
    assert after.swarm_id == loaded.swarm_id == before.swarm_id
    assert after.swarm_key == loaded.swarm_key == b"k" * 32
    assert after.mdns_fingerprint() == before.mdns_fingerprint()


def test_a_record_made_in_memory_is_kept_in_a_file_once(path):
    made = Membership.create(None)
    kept = made.kept_at(path)
    loaded = Membership.load(path)
    assert loaded is not None
    assert kept.swarm_key == loaded.swarm_key == made.swarm_key
    with pytest.raises(BadConfig, match="omx leave"):
        made.kept_at(path)


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
    assert Membership.load(path).swarm_key == replacement.swarm_key == other.swarm_key
    replacement.with_swarm_key(bytes(32))  # and it is saved where the old one was
    assert list(path.parent.iterdir()) == [path]


def test_an_open_swarm_has_no_key_and_is_all_in_its_id(path):
    founder = Membership.create(path, open_swarm=True)
    assert founder.is_open
    assert founder.swarm_key is None
    guest = Membership.join_open(None, founder.swarm_id)
    assert guest.is_open
    assert guest.mdns_fingerprint() == founder.mdns_fingerprint()
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
    Membership.create(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreDamaged):
            Membership.load(path)


def test_nothing_shows_the_keys(path):
    membership = Membership.create(path)
    ticket = ticket_of(membership)
    shown = repr([membership, ticket, membership._saved]) + str(membership) + str(ticket)
    for secret in (membership.swarm_key, ticket.secret):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown

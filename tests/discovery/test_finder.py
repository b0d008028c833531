"""Members that find each other, lose each other and remember each other."""

import json

import pytest
import trio

from ollamamax_p2p.discovery import forget_remembered_peers
from ollamamax_p2p.discovery.finder import TARGET_CONNECTIONS
from ollamamax_p2p.discovery.remembered_peers import (
    FILE_NAME,
    FORGOTTEN_AFTER_S,
    RememberedPeer,
    load_remembered,
    save_remembered,
)
from ollamamax_p2p.errors import BadConfig
from ollamamax_p2p.host import HostSettings, open_connections
from ollamamax_p2p.identity import Membership, parse_address, peer_id_of

NOW = 1_700_000_000.0


def seed_of(*members) -> tuple[str, ...]:
    return tuple(str(member.host.addresses[0]) for member in members)


async def test_one_bootstrap_peer_is_enough_to_meet_everybody(swarm):
    first = await swarm.add_with_discovery()
    others = [await swarm.add_with_discovery(bootstrap=seed_of(first)) for _ in range(7)]
    await trio.sleep(60)
    for member in (first, *others):
        assert len(member.linked()) == 7


async def test_a_bootstrap_peer_that_was_away_is_found_when_it_is_back(swarm):
    first = await swarm.add_with_discovery()
    swarm.network.kill(first.host)
    other = await swarm.add_with_discovery(bootstrap=seed_of(first))
    await trio.sleep(300)
    assert other.linked() == set()
    swarm.network.revive(first.host)
    await trio.sleep(61)
    assert other.linked() == {first.peer}


async def test_a_lost_connection_is_made_again(swarm):
    first = await swarm.add_with_discovery()
    other = await swarm.add_with_discovery(bootstrap=seed_of(first))
    await trio.sleep(2)
    swarm.network.drop(first.host, other.host)
    await trio.sleep(5)
    assert other.linked() == {first.peer}


async def test_a_node_does_not_dial_beyond_its_target(swarm):
    crowd = [await swarm.add() for _ in range(TARGET_CONNECTIONS + 8)]
    newcomer = await swarm.add_with_discovery()
    for member in crowd:
        newcomer.discovery.learn(member.host.addresses)
    await trio.sleep(60)
    assert len(newcomer.linked()) == TARGET_CONNECTIONS
    assert len(newcomer.discovery.known_peers()) == len(crowd)


async def test_members_of_another_swarm_that_were_found_are_not_linked(swarm):
    outsider = await swarm.add(Membership.create(None))
    member = await swarm.add_with_discovery(bootstrap=seed_of(outsider))
    await trio.sleep(120)
    assert member.linked() == set()


async def test_a_bootstrap_address_that_cannot_be_used_is_named(swarm):
    host = swarm.network.add_host("hasty")
    from ollamamax_p2p.discovery import DiscoverySettings, open_discovery

    async with open_connections(
        host,
        swarm.membership,
        HostSettings(),
        rng=None,
        feed=None,
        agent="test",
        wall_clock=trio.current_time,
    ) as connections:
        with pytest.raises(BadConfig, match=r"bootstrap: .*192\.0\.2\.7"):
            async with open_discovery(
                host,
                connections,
                "f00d",
                DiscoverySettings(mdns=False, bootstrap=("/ip4/192.0.2.7/tcp/4011",)),
                data_dir=None,
                rng=None,
                feed=None,
                wall_clock=trio.current_time,
            ):
                pass


# -- across restarts -------------------------------------------------------------------------

PEERS = [peer_id_of(bytes([number]) * 32) for number in range(256)]
SWARM = "0123456789abcdef"


def remembered(number: int, seen_at: float = NOW) -> RememberedPeer:
    return RememberedPeer([f"/ip4/10.0.0.{number}/tcp/4011/p2p/{PEERS[number]}"], seen_at)


def test_remembered_peers_survive_a_restart(tmp_path):
    save_remembered(tmp_path, SWARM, [remembered(1), remembered(2)])
    loaded = load_remembered(tmp_path, SWARM, peers_max=10, now=NOW)
    assert [each[0].peer for each in loaded] == [PEERS[1], PEERS[2]]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_no_more_are_taken_than_the_setting_allows(tmp_path):
    save_remembered(tmp_path, SWARM, [remembered(number) for number in range(20)])
    assert len(load_remembered(tmp_path, SWARM, peers_max=5, now=NOW)) == 5


def test_peers_of_another_swarm_are_not_used(tmp_path):
    save_remembered(tmp_path, SWARM, [remembered(1)])
    assert load_remembered(tmp_path, "another", peers_max=10, now=NOW) == []


def test_peers_not_seen_for_a_month_are_forgotten(tmp_path):
    save_remembered(tmp_path, SWARM, [remembered(1, NOW - FORGOTTEN_AFTER_S), remembered(2)])
    loaded = load_remembered(tmp_path, SWARM, peers_max=10, now=NOW)
    assert [each[0].peer for each in loaded] == [PEERS[2]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "swarm": "", "peers": []}',
        b'{"version": 1, "swarm": "", "peers": [{"addresses": 7, "seen_at": 0}]}',
        b"[" * 100_000,
        b" " * (8 * 1024 * 1024 + 1),
    ],
    ids=["empty", "cut", "binary", "list", "newer", "wrong type", "deep", "huge"],
)
def test_a_damaged_file_is_set_aside_with_a_warning(tmp_path, caplog, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    assert load_remembered(tmp_path, SWARM, peers_max=10, now=NOW) == []
    assert "set aside" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME + ".damaged"]
    save_remembered(tmp_path, SWARM, [remembered(1)])
    assert load_remembered(tmp_path, SWARM, peers_max=10, now=NOW) != []


def test_an_address_in_the_file_that_cannot_be_used_is_passed_over(tmp_path):
    peers = [{"addresses": ["rm -rf"], "seen_at": NOW}]
    peers.append({"addresses": ["x", *remembered(3).addresses], "seen_at": NOW})
    (tmp_path / FILE_NAME).write_text(json.dumps({"version": 1, "swarm": SWARM, "peers": peers}))
    loaded = load_remembered(tmp_path, SWARM, peers_max=10, now=NOW)
    assert loaded == [(parse_address(remembered(3).addresses[0]),)]


def test_forgetting_removes_the_file_and_is_no_error_without_one(tmp_path):
    save_remembered(tmp_path, SWARM, [remembered(1)])
    forget_remembered_peers(tmp_path)
    forget_remembered_peers(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_restarted_node_dials_those_it_remembers(swarm, tmp_path):
    friend = await swarm.add_with_discovery()
    save_remembered(
        tmp_path,
        swarm.membership.mdns_fingerprint(),
        [RememberedPeer(list(seed_of(friend)), NOW)],
    )
    node = await swarm.add_with_discovery(
        data_dir=tmp_path, wall_clock=lambda: NOW + trio.current_time()
    )
    await trio.sleep(3)
    assert node.linked() == {friend.peer}


async def test_a_node_remembers_those_it_was_linked_with(swarm, tmp_path):
    friend = await swarm.add_with_discovery()
    node = await swarm.add_with_discovery(
        bootstrap=seed_of(friend), data_dir=tmp_path, wall_clock=lambda: NOW + trio.current_time()
    )
    await trio.sleep(61)
    # The disk's thread takes real time, of which the virtual clock knows nothing.
    with trio.fail_after(100_000):
        while not (tmp_path / FILE_NAME).exists():  # noqa: ASYNC110 - no event
            await trio.sleep(1)
    assert node.linked() == {friend.peer}
    loaded = load_remembered(
        tmp_path, swarm.membership.mdns_fingerprint(), peers_max=10, now=NOW + 60
    )
    assert [each[0].peer for each in loaded] == [friend.peer]

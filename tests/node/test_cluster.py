"""What nodes agree on, over real libp2p: who is a member, who votes, what names and blobs are."""

import math
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from ollamamax_p2p import Node
from ollamamax_p2p.cluster import cluster_folder
from ollamamax_p2p.errors import (
    BadConfig,
    BadInput,
    BadTicket,
    NetworkTrouble,
    NotAdmitted,
    NotFound,
    StoreDamaged,
    TicketUsedUp,
)
from ollamamax_p2p.host import HostSettings, open_libp2p_host
from ollamamax_p2p.identity import format_ticket, parse_ticket, peer_id_of
from ollamamax_p2p.node import forget_swarm
from tests.node.nodes import heard, model_file, node_at, until, until_peers

pytestmark = pytest.mark.network

BUDGET_S = 60


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(120):
        yield


def named_node(folder: Path, **flags):
    return node_at(folder, name=folder.name, **flags)


async def ticket_of(node: Node, uses: int = 1) -> str:
    return (await node.invite(uses=uses)).ticket


async def status_is(node: Node, condition) -> None:
    """Wait until the node's cluster status is so."""
    with trio.fail_after(BUDGET_S):
        while not condition(await node.cluster_status()):  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.05)


def voters(status) -> set[str]:
    return {each.name for each in status.members if each.role in ("leader", "voter")}


@asynccontextmanager
async def three_voters(folder: Path) -> AsyncIterator[tuple[Node, Node, Node]]:
    """a, b and c, all of which vote; a leads."""
    async with (
        named_node(folder / "a") as a,
        named_node(folder / "b") as b,
        named_node(folder / "c") as c,
    ):
        await a.set_cluster_setting("stability_s", "0")
        ticket = await ticket_of(a, uses=2)
        for node in (b, c):
            await node.join([ticket])
        await status_is(a, lambda status: voters(status) == {"a", "b", "c"})
        yield a, b, c


async def test_a_node_founds_a_cluster_of_one_and_is_its_leader_again_after_a_restart(tmp_path):
    async with named_node(tmp_path / "a") as a:
        first = await a.cluster_status()
        assert (first.role, first.leader, first.has_quorum) == ("leader", a.peer_id, True)
        assert [member.name for member in first.members] == ["a"]
    async with named_node(tmp_path / "a") as a:
        await status_is(a, lambda status: status.leader == a.peer_id)
        again = await a.cluster_status()
        assert again.term > first.term
        assert [member.raft_id for member in again.members] == [1]


async def test_who_joins_by_a_ticket_learns_what_is_agreed(tmp_path):
    async with named_node(tmp_path / "a") as a:
        async with named_node(tmp_path / "b") as b:
            await a.set_cluster_setting("copies_default", "3")
            await b.join([await ticket_of(a)])
            await status_is(b, lambda status: len(status.members) == 2)
            await status_is(b, lambda status: status.role == "learner")
            seen = await b.cluster_status()
            assert seen.leader == a.peer_id
            assert seen.settings["copies_default"] == 3
            lines = {member.name: member for member in seen.members}
            assert lines["b"].lag == 0  # which only the leader knows, and tells
            assert lines["b"].last_contact_s is not None
        async with named_node(tmp_path / "b") as b:
            await status_is(b, lambda status: status.leader == a.peer_id)


async def test_three_nodes_vote_and_a_lost_leader_is_replaced(tmp_path):
    async with three_voters(tmp_path) as (a, b, c):
        await a.transfer_leader("b")
        await status_is(c, lambda status: status.leader == b.peer_id)
        await c.transfer_leader(c.peer_id)  # asked of one that does not lead: passed on
        await status_is(a, lambda status: status.leader == c.peer_id)
        with pytest.raises(NotFound):
            await a.transfer_leader("nobody")

        async def same_state() -> bool:
            seen = [await node.cluster_status() for node in (a, b, c)]
            return len({(each.state_index, each.state_hash) for each in seen}) == 1

        with trio.fail_after(BUDGET_S):
            while not await same_state():  # noqa: ASYNC110 - the log may be growing
                await trio.sleep(0.05)


async def test_without_a_quorum_reads_and_transfers_go_on_and_changes_say_why_not(tmp_path):
    async with named_node(tmp_path / "c") as c, named_node(tmp_path / "d") as d:
        async with named_node(tmp_path / "a") as a, named_node(tmp_path / "b") as b:
            await a.set_cluster_setting("stability_s", "0")
            await a.set_cluster_setting("voters_max", "3")
            ticket = await ticket_of(a, uses=3)
            for node in (b, c, d):
                await node.join([ticket])
            await status_is(a, lambda status: len(voters(status)) == 3)
            await a.import_model(model_file(tmp_path / "m.safetensors"), "tiny")
            await c.pull("tiny")
            await until_peers(d, a, b, c)
        await status_is(c, lambda status: not status.has_quorum)
        with pytest.raises(NetworkTrouble, match="cannot agree"):
            await c.invite()
        with pytest.raises(NetworkTrouble):
            await c.set_cluster_setting("copies_default", "4")
        assert [model.name for model in await c.models()] == ["tiny:latest"]
        assert (await d.pull("tiny")).sources[0].name == c.peer_id
        made = await c.import_model(model_file(tmp_path / "n.safetensors", seed=2), "other")
        assert "has not agreed on it" in made.note
        assert (await d.pull("other")).bytes_fetched


async def test_a_member_that_is_removed_loses_access_at_once_and_is_told(tmp_path):
    async with (
        named_node(tmp_path / "a") as a,
        named_node(tmp_path / "b") as b,
        named_node(tmp_path / "c") as c,
    ):
        ticket = await ticket_of(a, uses=2)
        await b.join([ticket])
        await c.join([ticket])
        for node in (a, b, c):
            await status_is(node, lambda status: len(status.members) == 3)
        await a.import_model(model_file(tmp_path / "m.safetensors"), "tiny")
        await status_is(a, lambda status: len(status.members) == 3)
        async with heard(b) as events:
            await b.expel("c")
            await until(lambda: any(event.kind == "cluster.removed" for event in events))
        for node in (a, b):
            await status_is(
                node, lambda status: c.peer_id not in {each.peer_id for each in status.members}
            )
            await until(lambda node=node: c.peer_id not in linked_to(node))
        with pytest.raises(NotAdmitted):
            await c._now.connections.reach(a.addresses)
        with pytest.raises(BadInput, match="omx leave"):
            await a.expel(a.peer_id)
        # With a new ticket it may come back, as somebody else in the log.
        before = await a.cluster_status()
        await c.leave()
        await c.join([await ticket_of(b)])
        await status_is(a, lambda status: len(status.members) == 3)
        (line,) = [m for m in (await a.cluster_status()).members if m.peer_id == c.peer_id]
        assert line.raft_id > max(each.raft_id for each in before.members)


def linked_to(node: Node) -> set[str]:
    return {status.peer for status in node._now.connections.peers()}


async def test_a_ticket_for_one_is_used_once_whoever_is_asked_and_however_fast(tmp_path):
    async with (
        named_node(tmp_path / "a") as a,
        named_node(tmp_path / "b") as b,
        named_node(tmp_path / "c") as c,
        named_node(tmp_path / "d") as d,
    ):
        await b.join([await ticket_of(a)])
        await status_is(b, lambda status: status.leader == a.peer_id)
        ticket = parse_ticket(await ticket_of(a))
        at_b = format_ticket(replace(ticket, addresses=b.addresses))
        outcomes: dict[str, Exception | None] = {}

        async def join(node: Node, text: str) -> None:
            try:
                await node.join([text])
                outcomes[node.config.name] = None
            except TicketUsedUp as error:
                outcomes[node.config.name] = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, c, format_ticket(ticket))
            nursery.start_soon(join, d, at_b)
        assert sorted(outcomes) == ["c", "d"]
        assert list(outcomes.values()).count(None) == 1
        assert len((await a.cluster_status()).members) == 3


async def test_a_bad_ticket_writes_nothing_to_the_log(tmp_path):
    async with named_node(tmp_path / "a") as a, named_node(tmp_path / "b") as b:
        good = parse_ticket(await ticket_of(a))
        await b.join([await ticket_of(a)])
        await status_is(b, lambda status: len(status.members) == 2)
        cluster = a._now.cluster
        used = await ticket_of(a)
        await cluster.redeem(parse_ticket(used).secret, good.addresses[0].peer, "a")  # a member
        before = await settled(a)
        for number in range(50):
            with pytest.raises(BadTicket):
                await cluster.redeem(number.to_bytes(16, "big"), peer_id_of(bytes(32)), "x")
        assert (await a.cluster_status()).committed - before < 10


async def settled(node: Node) -> int:
    """The node's commit index, once nothing is told in the background any more."""
    await trio.sleep(5)
    return (await node.cluster_status()).committed


async def test_who_was_removed_while_it_was_away_comes_back_by_a_ticket(tmp_path):
    """It cannot hear of its removal, because nobody speaks to it any more."""
    async with named_node(tmp_path / "a") as a:
        async with named_node(tmp_path / "b") as b:
            await b.join([await ticket_of(a)])
            await status_is(b, lambda status: len(status.members) == 2)
        await a.expel("b")
        async with named_node(tmp_path / "b") as b:
            assert a.peer_id not in linked_to(b)
            await b.join([await ticket_of(a)])
            await status_is(b, lambda status: status.leader == a.peer_id)
            await status_is(a, lambda status: len(status.members) == 2)


async def test_a_withdrawn_ticket_is_good_nowhere(tmp_path):
    async with named_node(tmp_path / "a") as a, named_node(tmp_path / "b") as b:
        ticket = await ticket_of(a)
        assert (await a.cluster_status()).tickets == 1
        assert await a.withdraw_tickets() == 1
        with pytest.raises(BadInput, match="ticket"):
            await b.join([ticket])


async def test_the_leader_leaves_and_hands_on_what_it_had(tmp_path):
    async with named_node(tmp_path / "b") as b:
        async with named_node(tmp_path / "a") as a:
            await a.set_cluster_setting("stability_s", "0")
            await b.join([await ticket_of(a)])
            await status_is(b, lambda status: len(status.members) == 2)
            assert await a.leave() == "left"
            assert len((await a.cluster_status()).members) == 1
        await status_is(b, lambda status: status.leader == b.peer_id)
        assert [each.name for each in (await b.cluster_status()).members] == ["b"]
        assert (await b.cluster_status()).has_quorum


async def test_a_new_swarm_key_shuts_out_who_only_knew_the_old_one(tmp_path):
    async with named_node(tmp_path / "a") as a, named_node(tmp_path / "b") as b:
        async with named_node(tmp_path / "c") as c:
            ticket = await ticket_of(a, uses=5)
            await b.join([ticket])
            await c.join([ticket])
            await status_is(a, lambda status: len(status.members) == 3)
            away = c.peer_id
        old_key = parse_ticket(ticket).swarm_key
        await until(lambda: away not in linked_to(a))
        # Until the leader counts it as away: it was heard a moment ago.
        await status_is(a, lambda status: silence_s(status, away) > 4)
        with pytest.raises(BadInput, match="new ticket"):
            await a.rotate_swarm_key()
        # On a busy machine another may have been silent for as long.
        assert "c" in [each.partition(" ")[0] for each in await a.rotate_swarm_key(force=True)]
        await status_key(a, old_key)
        await status_key(b, old_key)
        await until_peers(a, b)
        assert (await a.cluster_status()).swarm_key_generation == 2
        # The ticket of before is withdrawn, and its key opens nothing.
        settings = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
        async with open_libp2p_host(bytes(32), settings, swarm_key=old_key) as stranger:
            with pytest.raises(NetworkTrouble):
                await stranger.connect(a.addresses)
        async with named_node(tmp_path / "c") as c:
            before = {m.peer_id for m in (await a.cluster_status()).members}
            await c.join([await ticket_of(a)])
            await until(lambda: c.peer_id in linked_to(a))
            await status_is(c, lambda status: status.leader == a.peer_id)
            assert {m.peer_id for m in (await a.cluster_status()).members} == before


def silence_s(status, peer: str) -> float:
    (line,) = [each for each in status.members if each.peer_id == peer]
    return math.inf if line.last_contact_s is None else line.last_contact_s


async def status_key(node: Node, old: bytes | None) -> None:
    """Wait until the node runs behind another key than this."""
    with trio.fail_after(BUDGET_S):
        while node._membership.swarm_key == old or node._session is None:  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_a_name_means_the_same_everywhere_once_it_is_agreed(tmp_path):
    async with (
        named_node(tmp_path / "a") as a,
        named_node(tmp_path / "b") as b,
        named_node(tmp_path / "c") as c,
    ):
        ticket = await ticket_of(a, uses=2)
        await b.join([ticket])
        await c.join([ticket])
        await a.import_model(model_file(tmp_path / "1", seed=1), "tiny")
        first = await b.pull("tiny")
        # Two of three hold the first version; what its owner agreed on last counts all the same.
        newer = await a.import_model(model_file(tmp_path / "2", seed=2), "tiny")
        assert newer.note == ""
        second = await c.pull("tiny")
        assert second.manifest_digest == newer.digest != first.manifest_digest
        assert (await b.pull("tiny")).manifest_digest == newer.digest


async def test_the_chunk_map_of_a_verified_blob_is_agreed_and_its_holders_are_known(tmp_path):
    async with named_node(tmp_path / "a") as a, named_node(tmp_path / "b") as b:
        await b.join([await ticket_of(a)])
        await a.import_model(model_file(tmp_path / "m.safetensors"), "tiny")
        await b.pull("tiny")
        weights = (await a.show("tiny")).layers[1].digest
        state = a._now.cluster.state
        await until(lambda: state.chunk_map_of(weights) is not None)
        (digest, _) = state.chunk_map_of(weights)
        assert digest == (await a._store.chunk_map(weights)).digest
        await until(lambda: set(state.holders(weights)) == {a.peer_id, b.peer_id})
        await b.remove("tiny")
        await until(lambda: state.holders(weights) == [a.peer_id])


async def test_who_has_lost_its_log_does_not_vote_under_its_old_name(tmp_path):
    async with named_node(tmp_path / "a") as a:
        swarm_id = bytes.fromhex((await a.status()).swarm_id)
        config = a.config
    shutil.rmtree(cluster_folder(config.data_dir, swarm_id) / "log")
    shutil.rmtree(cluster_folder(config.data_dir, swarm_id) / "state")
    with pytest.raises(StoreDamaged, match="omx leave --force"):
        async with named_node(tmp_path / "a"):
            pass
    assert forget_swarm(config)
    assert not forget_swarm(config)
    async with named_node(tmp_path / "a") as a:
        assert (await a.status()).swarm_id != swarm_id.hex()


async def test_in_an_open_swarm_only_a_ticket_makes_a_member_of_the_cluster(tmp_path):
    async with (
        named_node(tmp_path / "a", open_swarm=True) as a,
        named_node(tmp_path / "b", open_swarm=True) as b,
        named_node(tmp_path / "c", open_swarm=True) as c,
    ):
        await b.join([str(a.addresses[0])])
        assert (await b.status()).cluster is None
        with pytest.raises(BadConfig, match="ticket"):
            await b.invite()
        with pytest.raises(BadInput, match="open"):
            await a.rotate_swarm_key()
        await c.join([await ticket_of(a)])
        await status_is(c, lambda status: status.leader == a.peer_id)
        await a.import_model(model_file(tmp_path / "m.safetensors"), "tiny")
        assert (await b.pull("tiny")).bytes_fetched
        # Who was in the swarm by an address may become a member later.
        await b.join([await ticket_of(a)])
        await status_is(b, lambda status: len(status.members) == 3)
        await a.expel("c")
        await status_is(a, lambda status: len(status.members) == 2)

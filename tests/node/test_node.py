"""Whole nodes: found, join, pull, leave, restart. Real libp2p on loopback."""

import hashlib
import os
import socket

import pytest
import trio

from ollamamax_p2p.cluster.core.commands import IssueTicket
from ollamamax_p2p.errors import (
    BadConfig,
    DataDirInUse,
    ModelNotFound,
    NetworkTrouble,
    NoSources,
    NotAdmitted,
    OmxError,
    OriginTrouble,
    PeerUnreachable,
    PortInUse,
    SwarmChanging,
    TicketExpired,
    TicketMistyped,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.identity import format_ticket, parse_ticket
from ollamamax_p2p.node import wall_clock
from tests.node.nodes import (
    MiB,
    heard,
    model_file,
    node_at,
    peer_ids,
    tree_of,
    until,
    until_peers,
)

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(60):
        yield


async def ticket_of(node, **terms):
    return (await node.invite(**terms)).ticket


async def swarm_of(node):
    return (await node.status()).swarm_id


async def joined(node, other):
    await node.join([await ticket_of(other)])
    await until_peers(other, node)


# -- alone -------------------------------------------------------------------------------------


async def test_a_new_node_founds_a_private_swarm_of_its_own(tmp_path):
    async with node_at(tmp_path / "a") as node:
        status = await node.status()
        assert (status.peer_id, status.open_swarm, status.peer_count) == (node.peer_id, False, 0)
        assert len(bytes.fromhex(status.swarm_id)) == 16
        assert status.addresses == (str(node.addresses[0]),)
        assert status.store.writable
        assert await node.leave() == "not in a swarm"
        assert await swarm_of(node) == status.swarm_id


async def test_a_second_node_on_the_same_folder_is_refused_with_the_first_ones_pid(tmp_path):
    async with node_at(tmp_path / "a"):
        with pytest.raises(DataDirInUse, match=rf"\(process {os.getpid()}\)"):
            async with node_at(tmp_path / "a"):
                pass
    async with node_at(tmp_path / "a"):  # and let in once that has ended
        pass


async def test_models_are_imported_created_copied_shown_and_removed(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    async with node_at(tmp_path / "a") as node:
        made = await node.import_model(file, "tiny")
        assert made.name == "tiny:latest"
        created = await node.create_model("talk", "FROM tiny\nSYSTEM Be brief.", tmp_path)
        await node.copy("tiny", "other:v1")
        names = {model.name for model in await node.models()}
        assert names == {"tiny:latest", "talk:latest", "other:v1"}
        assert created.digest != made.digest
        shown = await node.show("talk")
        assert shown.system == "Be brief."
        assert len(shown.layers) == 3
        weights = tree_of(tmp_path / "a" / "models" / "blobs")
        await node.remove("tiny")
        await node.remove("talk")
        # "other:v1" still needs its weights and its config; what only "talk" had is gone.
        assert len(tree_of(tmp_path / "a" / "models" / "blobs")) == len(weights) - 2
        await node.remove("other:v1")
        assert tree_of(tmp_path / "a" / "models" / "blobs") == {}
        for failing in (node.show("tiny"), node.remove("tiny"), node.copy("tiny", "x")):
            with pytest.raises(ModelNotFound):
                await failing


# -- together ----------------------------------------------------------------------------------


async def test_a_model_goes_from_the_inviter_to_the_invited_and_back(tmp_path):
    file = model_file(tmp_path / "m.safetensors", size=3 * MiB)
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        here = await a.import_model(file, "tiny")
        before = await swarm_of(b)
        report = await b.join([await ticket_of(a)])
        assert report.peers == (a.peer_id,)
        assert report.swarm_id == await swarm_of(a) == await swarm_of(b) != before
        assert await peer_ids(b) == {a.peer_id}
        pulled = await b.pull("tiny")
        assert [(share.kind, share.name) for share in pulled.sources] == [("peer", a.peer_id)]
        assert pulled.bytes_fetched == pulled.bytes_total == here.size
        assert pulled.manifest_digest == here.digest
        again = await b.pull("tiny")
        assert again.bytes_fetched == 0
        stores = [tree_of(tmp_path / name / "models") for name in "ab"]
        assert stores[0] == stores[1]

        await b.import_model(model_file(tmp_path / "n.safetensors", seed=2), "back")
        assert (await a.pull("back")).sources[0].name == b.peer_id


async def test_events_tell_of_peers_and_pulls(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        await a.import_model(file, "tiny")
        async with heard(b) as events:
            await b.join([await ticket_of(a)])
            await b.pull("tiny")
            with pytest.raises(ModelNotFound):
                await b.pull("nothing")
            await until(lambda: any(event.kind == "pull.failed" for event in events))
        told = [
            (event.kind, event.facts)
            for event in events
            if event.kind != "pull.progress" and not event.kind.startswith("cluster.")
        ]
        assert {"cluster.member", "cluster.leader"} <= {event.kind for event in events}
        assert [kind for kind, _ in told] == [
            "peer.connected",
            "pull.started",
            "pull.finished",
            "pull.started",
            "pull.failed",
        ]
        assert told[0][1]["peer"] == a.peer_id
        assert told[2][1]["model"] == "tiny:latest"
        assert told[4][1]["error"] == "model_not_found"


async def test_what_is_removed_is_announced_no_more(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        await joined(b, a)
        await a.import_model(file, "tiny")
        weights = (await a.show("tiny")).layers[1].digest

        async def until_found_at(*holders):
            find = b._now.discovery.providers.find
            while list(await find(weights)) != list(holders):  # noqa: ASYNC110 - told to nobody
                await trio.sleep(0.02)

        await until_found_at(a.peer_id)
        await a.remove("tiny")
        await until_found_at()
        with pytest.raises(ModelNotFound):
            await b.pull("tiny")


async def test_who_leaves_is_alone_keeps_its_models_and_may_join_again(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        await a.import_model(file, "tiny")
        await joined(b, a)
        await b.pull("tiny")
        swarm = await swarm_of(a)
        async with heard(a) as events:
            assert await b.leave() == "left"
            await until_peers(a)
            await until(lambda: events)
        # It may knock once more, to hear that it is out.
        assert [event.kind for event in events][:2] == ["cluster.removed", "peer.lost"]
        assert await peer_ids(b) == set()
        assert await swarm_of(b) != swarm
        assert [model.name for model in await b.models()] == ["tiny:latest"]
        await joined(b, a)
        assert await swarm_of(b) == swarm


async def test_a_restart_remembers_swarm_and_peers(tmp_path):
    async with node_at(tmp_path / "a") as a:
        async with node_at(tmp_path / "b") as b:
            await joined(b, a)
            swarm, peer_id = await swarm_of(b), b.peer_id
        async with node_at(tmp_path / "b") as b:
            assert (await swarm_of(b), b.peer_id) == (swarm, peer_id)
            await until_peers(b, a)  # without anybody's help
            await until_peers(a, b)


async def test_two_pulls_of_one_model_share_the_bytes(tmp_path):
    file = model_file(tmp_path / "m.safetensors", size=8 * MiB)
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        size = (await a.import_model(file, "tiny")).size
        await joined(b, a)
        reports = []

        async def pull(name):
            reports.append(await b.pull(name))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, "tiny")
            nursery.start_soon(pull, "Tiny:latest")
        assert [report.bytes_fetched for report in reports] == [size, size]
        assert a.bytes_uploaded == size


async def test_a_pull_that_is_cancelled_resumes_with_what_it_had(tmp_path):
    file = model_file(tmp_path / "m.safetensors", size=24 * MiB)
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        size = (await a.import_model(file, "tiny")).size
        await joined(b, a)
        had = 0
        with trio.CancelScope() as scope:

            def cancel_soon(progress):
                nonlocal had
                if progress.digest and progress.total > MiB and progress.completed > 2 * MiB:
                    had = progress.completed
                    scope.cancel()

            await b.pull("tiny", on_progress=cancel_soon)
        assert scope.cancelled_caught, "it was over too soon to be cancelled"
        status = await b.status()
        await until(lambda: not b._now.transfer.pulls())
        assert (status.store.model_count, await b.models()) == (0, ())
        report = await b.pull("tiny")
        assert report.bytes_fetched <= size - had


async def test_a_pull_ends_when_its_node_leaves_and_resumes_when_it_is_back(tmp_path):
    file = model_file(tmp_path / "m.safetensors", size=24 * MiB)
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        size = (await a.import_model(file, "tiny")).size
        await joined(b, a)
        begun = trio.Event()

        def note(progress):
            if MiB < progress.completed < progress.total:
                begun.set()

        async def leave():
            await begun.wait()
            assert await b.leave() == "left"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(NoSources, match="the same pull resumes it"):
                await b.pull("tiny", on_progress=note)
        await joined(b, a)
        assert (await b.pull("tiny")).bytes_fetched < size


async def test_a_node_that_is_asked_while_it_joins_answers_or_says_so(tmp_path):
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        ticket = await ticket_of(a)
        refusals = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.join, [ticket])
            while not refusals:
                try:
                    await b.status()
                except SwarmChanging as error:
                    refusals.append(str(error))
                await trio.lowlevel.checkpoint()
            await b.models()  # what needs no swarm is answered
        assert "try again" in refusals[0]
        assert await peer_ids(b) == {a.peer_id}


# -- ways not to join --------------------------------------------------------------------------


async def test_a_node_with_peers_does_not_change_its_swarm(tmp_path):
    async with (
        node_at(tmp_path / "a") as a,
        node_at(tmp_path / "b") as b,
        node_at(tmp_path / "c") as c,
    ):
        await joined(b, a)
        swarm = await swarm_of(a)
        foreign = await ticket_of(c)
        for node in (a, b):
            with pytest.raises(BadConfig, match="leave it first"):
                await node.join([foreign])
            with pytest.raises(NetworkTrouble):
                await node.join([str(c.addresses[0])])
            assert await swarm_of(node) == swarm
        assert await peer_ids(a) == {b.peer_id}
        assert await peer_ids(c) == set()


async def test_a_ticket_of_its_own_swarm_only_connects(tmp_path):
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        await joined(b, a)
        swarm = await swarm_of(a)
        # Issued by b, which a is connected to; and a's own, read back by itself.
        report = await a.join([await ticket_of(b)])
        assert (report.swarm_id, report.peers) == (swarm, (b.peer_id,))
        with pytest.raises(PeerUnreachable, match="this node itself"):
            await a.join([await ticket_of(a)])
        assert await peer_ids(a) == {b.peer_id}


async def bad_tickets(issuer, other):
    """Each kind with the error that names it."""
    used = await ticket_of(issuer, uses=1)
    await joined_by(other, used)
    # Good for a second, a minute ago by the cluster's clock; nobody needs to wait.
    over = issuer._membership.new_ticket(
        issuer.addresses, uses=1, lifetime_s=1, now=wall_clock() - 60
    )
    await issuer._now.cluster.change(
        IssueTicket(
            secret_hash=hashlib.sha256(over.secret).digest(),
            uses=1,
            expires_at=over.expires_at,
            issued_at=over.expires_at - 1,
        )
    )
    expired = format_ticket(over)
    good = await ticket_of(issuer)
    foreign = parse_ticket(good)
    unknown = type(foreign)(
        foreign.swarm_id, foreign.addresses, bytes(16), foreign.expires_at, foreign.swarm_key
    )
    return {
        used: TicketUsedUp,
        expired: TicketExpired,
        good[:-5] + ("a" if good[-5] != "a" else "b") + good[-4:]: TicketMistyped,
        "omx1": TicketMistyped,
        format_ticket(unknown): TicketUnknown,
    }


async def joined_by(node, ticket):
    await node.join([ticket])


async def test_a_bad_ticket_is_named_and_leaves_the_node_as_it_was(tmp_path):
    async with (
        node_at(tmp_path / "a") as issuer,
        node_at(tmp_path / "b") as member,
        node_at(tmp_path / "c") as node,
    ):
        await node.import_model(model_file(tmp_path / "m.safetensors"), "mine")
        swarm = await swarm_of(node)
        for ticket, error in (await bad_tickets(issuer, member)).items():
            with pytest.raises(error) as caught:
                await node.join([ticket])
            assert "\n" not in str(caught.value)
            assert await swarm_of(node) == swarm
            assert await peer_ids(node) == set()
            assert [model.name for model in await node.models()] == ["mine:latest"]
        # The session that is open again is a whole one: others can join, and it can still join.
        async with node_at(tmp_path / "d") as guest:
            await guest.join([await ticket_of(node)])
            assert (await guest.pull("mine")).bytes_fetched > 100_000
    async with node_at(tmp_path / "c") as node:
        assert await swarm_of(node) == swarm


async def test_an_issuer_that_is_gone_is_named_and_the_ticket_works_later(tmp_path):
    async with node_at(tmp_path / "a") as issuer, node_at(tmp_path / "b") as node:
        ticket = await ticket_of(issuer)
        port = issuer.addresses[0].transport
        swarm = await swarm_of(issuer)
        alone = await swarm_of(node)
    async with node_at(tmp_path / "b") as node:
        with pytest.raises(PeerUnreachable, match="refused"):
            await node.join([ticket])
        assert await swarm_of(node) == alone
        async with node_at(tmp_path / "a", **{"host.listen": [port]}):
            await node.join([ticket])
            assert await swarm_of(node) == swarm


async def test_a_port_that_answers_nothing_does_not_hold_a_join_for_ever(tmp_path):
    async with node_at(tmp_path / "a") as issuer:
        ticket = parse_ticket(await ticket_of(issuer))
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener[0].socket.getsockname()[1]
    address = type(ticket.addresses[0])(f"/ip4/127.0.0.1/tcp/{port}", ticket.addresses[0].peer)
    mute = type(ticket)(
        ticket.swarm_id, (address,), ticket.secret, ticket.expires_at, ticket.swarm_key
    )
    async with node_at(tmp_path / "b", **{"host.dial_timeout_s": 1.0}) as node:
        swarm = await swarm_of(node)
        with pytest.raises(PeerUnreachable, match="within 1 s"):
            await node.join([format_ticket(mute)])
        assert await swarm_of(node) == swarm
    await listener[0].aclose()


# -- by address --------------------------------------------------------------------------------


async def test_a_private_swarm_is_not_entered_by_address(tmp_path):
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        swarm = await swarm_of(b)
        with pytest.raises((PeerUnreachable, NotAdmitted)) as caught:
            await b.join([str(a.addresses[0])])
        assert "\n" not in str(caught.value)
        assert "ticket" in str(caught.value)
        assert await swarm_of(b) == swarm
        assert await peer_ids(a) == set()
        await joined(b, a)  # and with a ticket it works


async def test_an_open_swarm_is_entered_by_address(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    async with node_at(tmp_path / "a", open_swarm=True) as a, node_at(tmp_path / "b") as b:
        await a.import_model(file, "tiny")
        report = await b.join([str(a.addresses[0])])
        assert report.swarm_id == await swarm_of(a) == await swarm_of(b)
        assert (await b.status()).open_swarm
        assert (await b.pull("tiny")).sources[0].name == a.peer_id


async def test_addresses_that_cannot_be_read_are_refused_before_anything_moves(tmp_path):
    async with node_at(tmp_path / "a") as node:
        session = node._now
        for wrong in (["/ip4/127.0.0.1/tcp/1"], ["/nonsense"], [], ["nonsense"]):
            with pytest.raises(OmxError):
                await node.join(wrong)
        assert node._now is session


async def test_of_several_peers_the_first_that_answers_is_the_way_in(tmp_path):
    async with (
        node_at(tmp_path / "a", open_swarm=True) as a,
        node_at(tmp_path / "gone") as gone,
        node_at(tmp_path / "b") as b,
    ):
        addresses = [str(gone.addresses[0]), str(a.addresses[0])]
        report = await b.join(addresses)
        assert report.peers == (a.peer_id,)


async def test_a_bootstrap_peer_that_was_never_met_does_not_bar_a_join(tmp_path):
    async with node_at(tmp_path / "a") as a:
        hoped_for = str(a.addresses[0])
        flags = {"discovery.bootstrap": [hoped_for]}
        async with node_at(tmp_path / "b", **flags) as b:
            await until(b._now.discovery.known_peers)
            await joined(b, a)
            swarm = await swarm_of(a)
    async with node_at(tmp_path / "c") as c, node_at(tmp_path / "b", **flags) as b:
        # Once it was met, though, this is a swarm to be left on purpose only.
        with pytest.raises(BadConfig, match="leave it first"):
            await b.join([await ticket_of(c)])
        assert await swarm_of(b) == swarm


async def test_of_two_joins_at_once_one_wins_and_the_other_is_told(tmp_path):
    async with (
        node_at(tmp_path / "a") as a,
        node_at(tmp_path / "b") as b,
        node_at(tmp_path / "c") as c,
    ):
        outcomes = []

        async def join(ticket):
            try:
                outcomes.append((await c.join([ticket])).swarm_id)
            except OmxError as error:
                outcomes.append(type(error))

        tickets = [await ticket_of(a), await ticket_of(b)]
        async with trio.open_nursery() as nursery:
            for ticket in tickets:
                nursery.start_soon(join, ticket)
        assert BadConfig in outcomes
        assert await swarm_of(c) in outcomes


# -- what comes out of open_node ---------------------------------------------------------------


async def test_one_error_comes_out_of_the_block_as_it_is(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        async with node_at(tmp_path / "a"):
            raise KeyError("mine")
    with pytest.raises(ModelNotFound):
        async with node_at(tmp_path / "a") as node, trio.open_nursery() as nursery:
            nursery.start_soon(node.show, "none")


async def test_several_errors_come_out_as_a_group(tmp_path):
    with pytest.raises(ExceptionGroup) as caught:
        async with node_at(tmp_path / "a"):
            raise ExceptionGroup("mine", [KeyError(1), KeyError(2)])
    assert caught.group_contains(KeyError, match="2")


async def test_a_node_that_is_cancelled_ends_without_an_error(tmp_path):
    with trio.CancelScope() as scope:
        async with node_at(tmp_path / "a"):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_taken_port_is_named_without_a_group(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse):
            async with node_at(tmp_path / "a", **{"host.listen": [f"/ip4/127.0.0.1/tcp/{port}"]}):
                pass


async def test_a_ticket_and_a_path_may_be_plain_text(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "b") as b:
        assert (await a.import_model(str(file), "tiny")).name == "tiny:latest"
        assert (await b.join(await ticket_of(a))).peers == (a.peer_id,)
        with pytest.raises(BadConfig, match="not both"):
            await b.join([await ticket_of(a), str(a.addresses[0])])


async def test_an_origin_that_fails_a_node_without_peers_is_not_all_that_is_said(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        registry = f"127.0.0.1:{unused.getsockname()[1]}"
        origin = {
            "origin.enabled": True,
            "origin.allow_private": [registry],
            "origin.tries": 1,
        }
        async with node_at(tmp_path / "a", **origin) as node:
            with pytest.raises(OriginTrouble, match="no member of the swarm is connected"):
                await node.pull(f"{registry}/library/none", insecure=True)

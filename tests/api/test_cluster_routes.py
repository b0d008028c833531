"""What the API tells and does about the cluster."""

import json
from dataclasses import replace

import pytest

from ollamamax_p2p.errors import BadInput, PeerNotFound
from tests.api.ram_node import OTHER_PEER, PEER, THIRD_PEER, THREE_MEMBERS, cluster_status

pytestmark = pytest.mark.network


def roles(served):
    return {each.name: (each.role, each.wish) for each in served.node.cluster.members}


async def test_the_clusters_status_crosses_whole(served):
    assert await served.client.cluster_status() == cluster_status()
    assert (await served.client.status()).cluster == cluster_status()


async def test_a_status_with_nothing_known_crosses_too(served):
    unheard = replace(THREE_MEMBERS[1], lag=None, last_contact_s=None)
    served.node.cluster = cluster_status(
        (unheard,), leader="", has_quorum=False, last_contact_s=None
    )
    assert await served.client.cluster_status() == served.node.cluster


async def test_roles_are_given_and_left_to_autopilot(served):
    await served.client.set_role("bob", "learner")
    assert roles(served)["bob"] == ("learner", "learner")
    await served.client.set_role(OTHER_PEER, "voter")
    assert roles(served)["bob"] == ("voter", "voter")
    await served.client.set_role("bob", "auto")
    assert roles(served)["bob"] == ("voter", "auto")


async def test_another_leads_and_a_member_goes(served):
    await served.client.transfer_leader("carol")
    assert served.node.cluster.leader == THIRD_PEER
    await served.client.expel("ram")
    assert PEER not in {each.peer_id for each in served.node.cluster.members}


async def test_a_snapshot_tells_its_last_index(served):
    assert await served.client.snapshot() == 120
    assert served.node.cluster.snapshot == 120


async def test_a_new_key_names_who_is_away(served):
    assert await served.client.rotate_swarm_key() == ()
    away = replace(THREE_MEMBERS[1], last_contact_s=None)
    served.node.cluster = replace(served.node.cluster, members=(THREE_MEMBERS[0], away))
    with pytest.raises(BadInput, match="cannot be reached"):
        await served.client.rotate_swarm_key()
    assert await served.client.rotate_swarm_key(force=True) == ("bob",)
    assert served.node.cluster.swarm_key_generation == 3


async def test_a_shared_setting_and_the_tickets(served):
    await served.client.set_cluster_setting("voters_max", "3")
    assert served.node.cluster.settings["voters_max"] == 3
    assert await served.client.withdraw_tickets() == 2
    assert await served.client.withdraw_tickets() == 0


async def test_the_clock_is_set_and_the_tickets_go(served):
    assert await served.client.set_clock() == 1_800_000_000
    assert await served.client.withdraw_tickets() == 0


async def test_errors_about_members_cross_as_their_class(served):
    with pytest.raises(PeerNotFound, match="dave"):
        await served.client.expel("dave")
    with pytest.raises(BadInput, match="no such setting"):
        await served.client.set_cluster_setting("nope", "1")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("role", b'{"peer":"bob","role":"king"}'),
        ("role", b'{"peer":"bob"}'),
        ("remove", b'{"peer":""}'),
        ("transfer-leader", b"{}"),
        ("rotate-key", b'{"force":"yes"}'),
        ("set", b'{"key":"voters_max","value":3}'),
    ],
)
async def test_a_body_that_says_too_little_changes_nothing(served, path, body):
    status, _, answer = await served.raw("POST", f"/omx/v1/cluster/{path}", body)
    assert (status, json.loads(answer)["code"]) == (400, "bad_input")
    assert served.node.cluster == cluster_status()

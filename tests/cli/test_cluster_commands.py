"""omx cluster: what it asks of a node, and what it waits for."""

import json
from dataclasses import replace

import pytest

from ollamamax_p2p.errors import BadInput, NetworkTrouble, NotFound, code
from omx_cli.cluster_commands import find_member, give_role
from omx_cli.output import short_peer
from tests.api.ram_node import (
    OTHER_PEER,
    PEER,
    THIRD_PEER,
    THREE_MEMBERS,
    RamNode,
    cluster_status,
    member,
)

# -- who is meant


@pytest.mark.parametrize(
    "text", ["bob", "bo", OTHER_PEER, OTHER_PEER[:12], f"12D3KooW…{OTHER_PEER[-6:]}"]
)
def test_a_member_is_named_as_people_and_tables_do(text):
    assert find_member(THREE_MEMBERS, text).peer_id == OTHER_PEER


def test_a_whole_name_wins_over_beginnings():
    members = (*THREE_MEMBERS, member("12D3KooWx", "bobby", 4))
    assert find_member(members, "bob").name == "bob"


def test_what_fits_several_or_none_is_refused_with_what_to_do():
    with pytest.raises(BadInput, match="'12D3' fits 3 members; give more of the peer id"):
        find_member(THREE_MEMBERS, "12D3")
    for text in ("dave", ""):
        with pytest.raises(NotFound, match="`omx cluster members` lists them all"):
            find_member(THREE_MEMBERS, text)


# -- a role, until it is in force


async def give(node, text, role, *, no_wait=False, as_json=False):
    await give_role(node, text, role, no_wait, as_json)


async def test_a_promotion_ends_when_the_member_votes(autojump_clock, capsys):
    learner = replace(THREE_MEMBERS[1], role="learner")
    node = RamNode(cluster=cluster_status((THREE_MEMBERS[0], learner, THREE_MEMBERS[2])))
    await give(node, "bob", "voter")
    told = capsys.readouterr()
    assert told.out == "bob votes (after 0 s); voters now: ram, bob, carol\n"
    assert told.err == "agreed; bob votes once it has kept up for 10 s …\n"


async def test_a_demotion_that_is_so_already_says_nothing_else(autojump_clock, capsys):
    node = RamNode(
        cluster=cluster_status((*THREE_MEMBERS[:2], replace(THREE_MEMBERS[2], role="learner")))
    )
    await give(node, "carol", "learner", as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out) == {"peer_id": THIRD_PEER, "wish": "learner", "in_force": True}
    assert told.err == ""


@pytest.mark.parametrize(
    ("changes", "quorum", "why"),
    [
        ({"last_contact_s": 80.0}, True, "bob does not answer; it will vote once it is back"),
        ({}, True, "voters are an odd number and at most 5, and now 2"),
        ({}, False, "too few voters answer"),
    ],
)
async def test_a_promotion_that_does_not_come_says_why(
    autojump_clock, capsys, changes, quorum, why
):
    learner = replace(THREE_MEMBERS[1], role="learner", **changes)
    status = cluster_status((THREE_MEMBERS[0], learner, THREE_MEMBERS[2]), has_quorum=quorum)
    node = RamNode(cluster=status, obeys=False)
    with pytest.raises(NetworkTrouble, match=f"is to be a voter, but not so yet: {why}"):
        await give(node, "bob", "voter")
    assert node.cluster.members[1].wish == "voter"  # agreed all the same


async def test_the_last_voter_keeps_its_vote(autojump_clock):
    node = RamNode(cluster=cluster_status(THREE_MEMBERS[:1]))
    with pytest.raises(NetworkTrouble, match="somebody must vote"):
        await give(node, "ram", "learner")


async def test_who_does_not_wait_is_told_that_it_is_agreed(autojump_clock, capsys):
    node = RamNode(obeys=False)
    await give(node, "bob", "learner", no_wait=True)
    assert capsys.readouterr().out.startswith("agreed: bob is to be a learner; ")


# -- as a process


@pytest.mark.network
async def test_the_cluster_is_shown_on_both_kinds_of_paper(served, omx):
    shown = (await omx("cluster", "status")).out.splitlines()
    assert shown[0] == "quorum: 3 of 3 voters answer; one may fail"
    assert shown[-2].split()[:3] == ["bob", short_peer(OTHER_PEER), "voter"]
    found = json.loads((await omx("cluster", "status", "--json")).out)
    assert (found["leader"], found["term"], len(found["members"])) == (PEER, 4, 3)
    listed = json.loads((await omx("cluster", "members", "--json")).out)["members"]
    assert [each["peer_id"] for each in listed] == [PEER, OTHER_PEER, THIRD_PEER]
    assert "cluster    ram leads, term 4, 3 of 3 voters answer" in (await omx("status")).out


@pytest.mark.network
async def test_the_cluster_is_changed_by_commands(served, omx):
    assert (await omx("cluster", "demote", "bob")).out == (
        "bob has no vote (after 0 s); voters now: ram, carol\n"
    )
    assert (await omx("cluster", "auto", "bob")).out == "autopilot decides about bob\n"
    assert (await omx("cluster", "transfer-leader", "carol")).out == (
        "carol leads now, in term 5\n"
    )
    removed = await omx("cluster", "remove", "bob", "--json")
    assert (json.loads(removed.out), removed.err) == ({"removed": OTHER_PEER}, "")
    assert "up to index 120" in (await omx("cluster", "snapshot")).out
    assert (await omx("cluster", "set", "voters_max", "3")).out == "voters_max = 3\n"
    assert (await omx("cluster", "set")).out.splitlines()[1] == "autopilot      true"
    ended = await omx("cluster", "promote", "dave", "--json")
    assert (ended.code, json.loads(ended.err)["code"]) == (3, code(NotFound))


@pytest.mark.network
async def test_a_new_key_and_withdrawn_tickets_end_old_ways_in(served, omx):
    assert (await omx("invite", "--withdraw")).out == "withdrew 2 tickets\n"
    assert json.loads((await omx("invite", "--withdraw", "--json")).out) == {"withdrawn": 0}
    away = replace(THREE_MEMBERS[1], last_contact_s=None)
    served.node.cluster = cluster_status((THREE_MEMBERS[0], away))
    assert (await omx("cluster", "rotate-key")).code == 2
    ended = await omx("cluster", "rotate-key", "--force")
    assert ended.out.splitlines()[-1] == "away, needs a new ticket to come back: bob"


@pytest.mark.network
async def test_the_clusters_clock_is_set_right(served, omx):
    ended = await omx("cluster", "set-clock")
    assert ended.out.splitlines()[0] == "the cluster's clock reads 2027-01-15T08:00:00Z now"
    assert json.loads((await omx("cluster", "set-clock", "--json")).out) == {"clock": 1_800_000_000}


@pytest.mark.network
async def test_what_the_cluster_has_not_agreed_on_is_noted(served, omx, tmp_path):
    served.node.note = "the cluster has not agreed on it"
    (tmp_path / "Modelfile").write_text("FROM tiny")
    for line in (("import", "a.gguf", "tiny"), ("create", "made"), ("cp", "tiny", "other")):
        ended = await omx(*line)
        assert (ended.code, ended.err) == (0, "Note: the cluster has not agreed on it\n")


@pytest.mark.network
async def test_what_is_left_to_do_after_leaving_is_said(served, omx):
    served.node.leave_outcome = "left, but the cluster does not know it"
    assert (await omx("leave")).out == "left, but the cluster does not know it\n"

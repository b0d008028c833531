"""What people read about a cluster."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omx_cli.cluster_view import cluster_line, members_table, quorum_text, status_text
from omx_cli.output import fitting_table
from tests.api.ram_node import (
    OTHER_PEER,
    PEER,
    THIRD_PEER,
    THREE_MEMBERS,
    cluster_status,
    member,
)


def voters(count, silent=0):
    """So many voters, the first of which leads; the last ones have not been heard of."""
    followers = [
        member(f"peer{at}", f"n{at}", at, last_contact_s=99.0 if at > count - silent else 0.1)
        for at in range(2, count + 1)
    ]
    return (THREE_MEMBERS[0], *followers)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (voters(3), "quorum: 3 of 3 voters answer; one may fail"),
        (voters(3, silent=1), "quorum: 2 of 3 voters answer; none may fail"),
        (voters(5), "quorum: 5 of 5 voters answer; two may fail"),
        (voters(5, silent=1), "quorum: 4 of 5 voters answer; one may fail"),
        (voters(1), "quorum: 1 of 1 voter answers; none may fail"),
    ],
)
def test_a_sentence_tells_how_many_voters_may_fail(members, text):
    assert quorum_text(cluster_status(members)) == text


def test_two_members_are_told_that_a_third_helps():
    members = (THREE_MEMBERS[0], replace(THREE_MEMBERS[1], role="learner"))
    assert quorum_text(cluster_status(members)) == (
        "quorum: 1 of 1 voter answers; none may fail, with a third member one may"
    )


def test_a_lost_quorum_says_what_stops_what_goes_on_and_who_is_there():
    # Seen from a follower: without a leader nobody tells how far the others are.
    members = tuple(
        replace(each, role="voter", lag=None, last_contact_s=None) for each in THREE_MEMBERS
    )
    status = cluster_status(members, role="candidate", leader="", has_quorum=False)
    alone = quorum_text(status)
    assert alone.startswith("NO QUORUM: nothing new can be agreed on; reads and transfers go on; ")
    assert "docs/runbooks/lost-quorum.md" in alone
    assert alone.endswith("(from here 1 of 3 voters can be reached, 2 must answer)")
    assert quorum_text(status, {OTHER_PEER}).endswith(
        "(from here 2 of 3 voters can be reached, 2 must answer, and they have no leader yet)"
    )
    shown = status_text(status, {OTHER_PEER}, 200).splitlines()
    assert [line.rpartition("    ")[2] for line in shown[-3:]] == [
        "this node",
        "connected here",
        "not connected",
    ]
    assert cluster_line(status).startswith("NO QUORUM")


def test_a_leader_that_does_not_tell_is_not_taken_for_silence():
    members = (
        THREE_MEMBERS[0],
        *(replace(each, lag=None, last_contact_s=None) for each in THREE_MEMBERS[1:]),
    )
    text = quorum_text(cluster_status(members))
    assert text == "quorum: there is a leader; it has not said how many of 3 voters answer"


def test_of_a_member_that_the_leader_never_heard_nothing_is_invented():
    silent = replace(THREE_MEMBERS[2], lag=120, last_contact_s=None)
    status = cluster_status((*THREE_MEMBERS[:2], silent))
    assert quorum_text(status) == "quorum: 2 of 3 voters answer; none may fail"
    assert status_text(status, (), 200).splitlines()[-1].split()[-2:] == ["-", "never"]


def test_a_newcomer_and_a_removed_node_are_told_what_they_are():
    new = cluster_status((), role="follower", leader="", last_contact_s=None, has_quorum=False)
    assert quorum_text(new).startswith("NO QUORUM yet: this node has just joined")
    learning = cluster_status((), role="learner", leader=OTHER_PEER)
    assert quorum_text(learning).startswith("this node has just joined")
    removed = cluster_status(THREE_MEMBERS[1:], role="removed", leader=OTHER_PEER)
    assert quorum_text(removed).startswith("REMOVED: this node is a member of the cluster no more")
    assert cluster_line(removed).startswith("REMOVED")
    for status in (new, learning, removed):
        assert status_text(status, (), 80)


def test_the_status_shows_leader_term_roles_lag_and_contact():
    lines = status_text(cluster_status(), (), 200).splitlines()
    facts = dict(line.strip().split("    ", 1) for line in lines[2:] if line.startswith("  "))
    assert facts["leader"].strip() == "ram (this node)"
    assert facts["term"].strip() == "4"
    assert facts["committed"].strip() == "120, applied 120"
    assert lines[-4:] == [
        "NAME     PEER               ROLE      REGION    LAG    LAST CONTACT",
        "ram      12D3KooW…x6nXTN    leader    -         0      -",
        "bob      12D3KooW…HhKust    voter     attic     3      0.1 s ago",
        "carol    12D3KooW…hLU2fT    voter     -         0      0.1 s ago",
    ]
    assert "TROUBLE" not in facts
    troubled = cluster_status(trouble="the disk is full", changing=True)
    assert "TROUBLE" in status_text(troubled, (), 200)


def test_members_of_one_name_are_told_apart():
    twins = tuple(replace(each, name="pi") for each in THREE_MEMBERS)
    assert cluster_line(cluster_status(twins)).startswith("pi (12D3KooW…x6nXTN) leads, term 4, 3")


def test_peer_ids_that_end_alike_are_shown_longer():
    other = "12D3KooW" + "A" * 38 + PEER[-6:]
    text = status_text(cluster_status((*THREE_MEMBERS, member(other, "twin", 4))), (), 200)
    assert f"12D3KooW…{PEER[-10:]} " in text
    assert f"12D3KooW…AAAA{PEER[-6:]} " in text


def test_what_a_member_is_to_become_is_said():
    waiting = replace(THREE_MEMBERS[1], role="learner", wish="voter")
    told = replace(THREE_MEMBERS[2], wish="voter")
    status = cluster_status((THREE_MEMBERS[0], waiting, told))
    assert "learner, to be voter" in status_text(status, (), 200)
    table = members_table(status, 200)
    assert table.splitlines()[2].split("    ")[2] == "told to"
    assert THIRD_PEER in table
    never = replace(THREE_MEMBERS[1], role="learner", may_vote=False)
    assert " may not " in members_table(cluster_status((never,)), 200)


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_a_narrow_terminal_is_not_overrun(columns):
    status = cluster_status(
        (*THREE_MEMBERS, member("12D3KooW" + "A" * 44, "a-name-that-is-long" * 3, 4))
    )
    lines = status_text(status, (), columns).splitlines()
    table = lines[lines.index("", 3) + 1 :]
    assert all(len(line) <= columns for line in table)
    assert all(len(line) <= columns for line in lines[: lines.index("")])
    assert table[0].startswith("NAME")
    assert table[0].endswith("LAST CONTACT")
    assert "ROLE" in table[0]


ROWS = st.lists(st.tuples(st.text("ab", min_size=1, max_size=30), st.text("c", max_size=9)))


@given(ROWS, st.integers(20, 60))
def test_a_table_fits_where_cutting_names_is_enough(rows, columns):
    text = fitting_table(["NAME", "X"], [list(row) for row in rows], columns, [])
    assert all(len(line) <= columns for line in text.splitlines())
    assert len(text.splitlines()) == len(rows) + 1


def test_a_table_that_cannot_fit_loses_no_name_for_nothing():
    shown = fitting_table(["NAME", "PEER"], [["alice", PEER]], 40, [])
    assert shown.splitlines()[1] == f"alice  {PEER}"

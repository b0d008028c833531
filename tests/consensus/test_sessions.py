"""The table of sessions, and a client's side of it."""

import pytest

from ollamamax_p2p.consensus.core.sessions import (
    SEQUENCE_FORGOTTEN,
    SESSION_ENDED,
    SESSION_WINDOW,
    SESSIONS_MAX,
    Proposal,
    SessionPool,
    SessionTable,
    decode_proposal,
    encode_proposal,
)


def applied(table: SessionTable, sequence: int, index: int = 10, session: int = 1) -> bytes:
    return table.once(session, sequence, index, lambda: b"%d" % index)


def test_a_proposal_survives_its_encoding_and_nothing_else_is_one():
    proposal = Proposal(1, 2, b"request", b"data")
    assert decode_proposal(encode_proposal(proposal)) == proposal
    for wrong in (b"", b"\xc1", encode_proposal(Proposal(1, 2, b"x" * 17, b""))):
        with pytest.raises(ValueError):  # noqa: PT011 - msgspec decides the words
            decode_proposal(wrong)


def test_a_command_that_comes_twice_is_applied_once_and_answered_alike():
    table = SessionTable()
    assert int.from_bytes(table.open(1), "big") == 1
    assert applied(table, 1, index=10) == b"10"
    assert applied(table, 1, index=11) == b"10"


def test_commands_of_one_window_may_come_in_any_order():
    table = SessionTable()
    table.open(1)
    for sequence in reversed(range(1, SESSION_WINDOW + 1)):
        assert applied(table, sequence, index=sequence) == b"%d" % sequence
    assert len(table.rows[1].results) == SESSION_WINDOW


def test_a_command_older_than_the_window_is_not_applied():
    table = SessionTable()
    table.open(1)
    applied(table, SESSION_WINDOW + 1)
    assert applied(table, 1) == SEQUENCE_FORGOTTEN
    assert applied(table, 2, index=12) == b"12"


def test_the_session_used_longest_ago_ends_first():
    table = SessionTable()
    for index in range(1, SESSIONS_MAX + 1):
        table.open(index)
    applied(table, 1, session=1)
    table.open(SESSIONS_MAX + 1)
    assert applied(table, 1, session=2) == SESSION_ENDED
    assert applied(table, 2, index=7, session=1) == b"7"
    assert len(table.rows) == SESSIONS_MAX


def test_a_client_begins_no_command_that_would_make_an_unfinished_one_forgotten():
    pool = SessionPool(sessions_max=1)
    assert pool.with_room() is None
    session = pool.add(5)
    assert not pool.may_grow
    first = session.begin()
    for _ in range(SESSION_WINDOW - 1):
        session.finish(session.begin())
    assert pool.with_room() is None
    session.finish(first)
    assert pool.with_room() is session
    pool.end(session)
    pool.end(session)
    assert pool.may_grow

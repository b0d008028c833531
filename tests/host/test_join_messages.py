"""Whatever a stranger sends to the join protocol, only the documented errors come of it."""

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import (
    MalformedMessage,
    NotAdmitted,
    OmxError,
    PeerUnreachable,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
)
from ollamamax_p2p.host import ROSTER_MAX
from ollamamax_p2p.host.join_messages import (
    MESSAGE_BYTES_MAX,
    Granted,
    Redeem,
    Refused,
    Welcome,
    answerer_codec,
    dialler_codec,
    error_of,
    refusal_of,
)
from ollamamax_p2p.identity import peer_id_of

PEER = peer_id_of(bytes(32))

FIELDS = [
    "is", "swarm_id", "secret", "agent", "addresses", "peers", "raft_id", "roster", "votes",
    "reason", "expires_at", "uses", "nonce", "leaving",
]  # fmt: skip
TAGS = ["hello", "redeem", "welcome", "granted", "refused", "ping", "pong", "goodbye"]

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.binary(max_size=40),
    st.text(max_size=40),
    st.sampled_from(TAGS),
    st.lists(st.text(max_size=10), max_size=5),
    st.floats(),
)
near_messages = st.dictionaries(st.sampled_from(FIELDS), plain, max_size=8)


@settings(max_examples=10_000, deadline=None)
@given(st.one_of(st.binary(max_size=200), near_messages.map(msgpack.packb)))
def test_anything_is_a_message_or_malformed(data):
    for codec in (dialler_codec, answerer_codec):
        try:
            message = codec.decode(data)
        except MalformedMessage:
            continue
        assert codec.decode(codec.encode(message)) == message


@settings(max_examples=10_000, deadline=None)
@given(st.text(max_size=40), st.integers(0, 2**53 - 1), st.integers(0, 2**31 - 1))
def test_every_refusal_is_an_error_of_one_line(reason, expires_at, uses):
    error = error_of(Refused(reason=reason, expires_at=expires_at, uses=uses), PEER)
    assert isinstance(error, OmxError)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "error", [TicketExpired("2026-11-22T21:35:00Z"), TicketUsedUp(3), TicketUnknown()]
)
def test_a_tickets_refusal_means_the_same_on_the_other_side(error):
    there = error_of(answerer_codec.decode(answerer_codec.encode(refusal_of(error))), PEER)
    assert type(there) is type(error)
    assert str(there) == str(error)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("not_a_member", NotAdmitted),
        ("other_swarm", NotAdmitted),
        ("full", PeerUnreachable),
        ("busy", PeerUnreachable),
        ("trouble", PeerUnreachable),
        ("no_quorum", PeerUnreachable),
        ("of a newer version", NotAdmitted),
    ],
)
def test_other_refusals_say_why(reason, kind):
    assert isinstance(error_of(Refused(reason=reason), PEER), kind)


def test_the_largest_messages_fit_their_frame():
    addresses = ["x" * 512] * 16
    welcome = Welcome(
        swarm_id=bytes(16),
        agent="x" * 128,
        addresses=addresses,
        peers=addresses * 4,
    )
    assert len(answerer_codec.encode(welcome)) < MESSAGE_BYTES_MAX
    granted = Granted(
        swarm_id=bytes(16),
        peers=addresses * 4,
        raft_id=2**62,
        roster=((str(PEER), 2**62),) * ROSTER_MAX,
    )
    assert len(answerer_codec.encode(granted)) < MESSAGE_BYTES_MAX


def test_a_message_that_carries_a_secret_does_not_show_it():
    redeem = Redeem(swarm_id=bytes(16), secret=b"so very secret!!")
    assert "so very" not in f"{redeem!r} {redeem}"
    assert msgspec.structs.asdict(redeem)["secret"] == b"so very secret!!"

"""What members ask of their leader: whatever arrives, only the documented error comes of it."""

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.cluster.core.messages import (
    REPLICA_LINES_MAX,
    ReplicaLine,
    Replicas,
    answers_codec,
    requests_codec,
)
from ollamamax_p2p.errors import MalformedMessage

TAGS = ["transfer_leader", "transferred", "look_at_replicas", "replicas"]
plain = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**64 - 1),
    st.text(max_size=20),
    st.sampled_from(TAGS),
    st.floats(),
    st.lists(st.lists(st.one_of(st.integers(0, 2**63), st.text(max_size=20)), max_size=5)),
)
near_messages = st.dictionaries(st.sampled_from(["is", "raft_id", "lines"]), plain, max_size=4)


@settings(max_examples=10_000, deadline=None)
@given(st.one_of(st.binary(max_size=200), near_messages.map(msgpack.packb)))
def test_anything_is_a_message_or_malformed(data):
    for codec in (requests_codec, answers_codec):
        try:
            message = codec.decode(data)
        except MalformedMessage:
            continue
        assert codec.decode(codec.encode(message)) == message


def test_the_largest_answer_fits():
    line = ReplicaLine(2**62, 2**62, "replicate", 1e9)
    whole = Replicas(lines=(line,) * REPLICA_LINES_MAX)
    assert answers_codec.decode(answers_codec.encode(whole)) == whole

"""Messages: what is none is malformed, whoever made it and however large it says it is."""

import tracemalloc
from typing import Annotated

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from ollamamax_p2p.errors import MalformedMessage
from ollamamax_p2p.wire import Codec, Message


class Order(Message, tag="order", frozen=True):
    number: Annotated[int, Meta(ge=0, lt=2**32)]
    names: Annotated[list[Annotated[str, Meta(max_length=8)]], Meta(max_length=4)]
    data: Annotated[bytes, Meta(max_length=16)] = b""


class Stop(Message, tag="stop", frozen=True):
    pass


codec: Codec[Order | Stop] = Codec(Order | Stop, max_bytes=4_096)

orders = st.builds(
    Order,
    number=st.integers(0, 2**32 - 1),
    names=st.lists(st.text(max_size=8), max_size=4),
    data=st.binary(max_size=16),
)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9),
    st.binary(max_size=20),
)  # fmt: skip
near_messages = st.fixed_dictionaries(
    {"is": st.sampled_from(["order", "stop", "halt", 1, None])},
    optional={
        "number": scalars,
        "names": scalars | st.lists(scalars, max_size=5),
        "data": scalars,
        "news": scalars,
    },
)


@given(orders)
def test_a_message_comes_back_as_it_was(order):
    assert codec.decode(codec.encode(order)) == order


@settings(max_examples=10_000, deadline=None)
@given(st.binary(max_size=100) | near_messages.map(msgpack.packb))
def test_anything_is_a_message_within_its_bounds_or_malformed(data):
    try:
        message = codec.decode(data)
    except MalformedMessage:
        return
    if isinstance(message, Order):
        assert 0 <= message.number < 2**32
        assert len(message.names) <= 4
        assert all(len(name) <= 8 for name in message.names)
        assert len(message.data) <= 16
    assert codec.decode(codec.encode(message)) == message


HOSTILE = {
    "an array of 2**32": b"\xdd\xff\xff\xff\xff",
    "a map of 2**32": b"\xdf\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "an extension of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
    "a field of 2**32": b"\x82\xa2is\xa5order\xa5names\xdd\xff\xff\xff\xff",
    "arrays of the size they claim, nested": b"\xdc\x0f\xff" * 1_300,
    "arrays nested deeply": b"\x91" * 4_000,
    "maps nested deeply": b"\x81\xa1a" * 1_300,
    "a field nested deeply": b"\x82\xa2is\xa5order\xa5names" + b"\x91" * 3_900 + b"\xc0",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "nothing": b"",
    "two messages": codec.encode(Stop()) * 2,
    "a key that is no text": b"\x81\x01\x02",
    "a key that cannot be hashed": b"\x81\x90\x02",
    "text that is none": b"\x81\xa2is\xa1\xff",
    "an infinite number": b"\x82\xa2is\xa5order\xa6number\xcb\x7f\xf0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_message_is_malformed_and_takes_no_memory(data):
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            codec.decode(data)
        # A thousand times what it sent is still harmless; 2**32 pointers would be 32 GB.
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_a_message_over_the_limit_is_refused_unread():
    with pytest.raises(MalformedMessage, match="4097 bytes, the limit is 4096"):
        codec.decode(bytes(4_097))


def test_an_own_message_over_the_limit_is_our_own_fault():
    small: Codec[Order] = Codec(Order, max_bytes=20)
    with pytest.raises(ValueError, match="limit 20"):
        small.encode(Order(number=1, names=["abc"]))


def test_fields_of_a_newer_peer_are_ignored_and_its_messages_refused():
    assert codec.decode(msgpack.packb({"is": "stop", "why": "new"})) == Stop()
    with pytest.raises(MalformedMessage):
        codec.decode(msgpack.packb({"is": "pause"}))


@pytest.mark.parametrize("names", [["a"] * 5, ["a" * 9], "a", [1], None, {}])
def test_every_bound_is_checked(names):
    with pytest.raises(MalformedMessage, match="names"):
        codec.decode(msgpack.packb({"is": "order", "number": 1, "names": names}))


def test_what_is_wrong_is_told_on_one_line():
    with pytest.raises(MalformedMessage) as caught:
        codec.decode(msgpack.packb({"is": "a\nb\x1b[2J"}))
    assert str(caught.value).isprintable()

"""Peer ids and addresses from outside: validated, or refused by name."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import BadAddress, BadPeerId
from ollamamax_p2p.identity import (
    parse_address,
    parse_peer_id,
    parse_transport,
    peer_id_of,
    public_key_of,
)

PEER = peer_id_of(bytes(range(32)))


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_its_public_key(public_key):
    peer = peer_id_of(public_key)
    assert peer.startswith("12D3KooW")
    assert parse_peer_id(peer) == peer
    assert public_key_of(peer) == public_key


def test_one_peer_id_and_its_key():
    assert parse_peer_id(PEER) == PEER
    assert public_key_of(PEER) == bytes(range(32))


def test_a_key_of_another_length_has_no_peer_id():
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        peer_id_of(bytes(31))


@pytest.mark.parametrize("text", ["", "0" * 52, "1" * 52, PEER[:-1], PEER + "x"])
def test_what_is_no_peer_id_is_refused(text):
    with pytest.raises(BadPeerId):
        parse_peer_id(text)


def test_an_address_says_where_and_who():
    address = parse_address(f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}")
    assert (address.transport, address.peer) == ("/ip4/192.0.2.7/tcp/4001", PEER)
    assert str(address) == f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"
    with pytest.raises(BadAddress, match="does not end"):
        parse_address("/ip4/192.0.2.7/tcp/4001")
    with pytest.raises(BadAddress, match="longer"):
        parse_address("/ip4/192.0.2.7" * 1_000)


@settings(max_examples=10_000, deadline=None)
@given(st.text(max_size=60) | st.text(min_size=44, max_size=44).map("12D3KooW".__add__))
def test_any_text_is_a_peer_id_or_bad(text):
    with suppress(BadPeerId):
        assert parse_peer_id(text) == text


parts = st.sampled_from(
    ["", "ip4", "ip6", "dns4", "tcp", "udp", "ws", "p2p", "p2p-circuit", "192.0.2.7", "::1",
     "4011", "70000", "-1", "é", "\x00", PEER, "a" * 300, "unix", "http-path"]
)  # fmt: skip


@settings(max_examples=10_000, deadline=None)
@given(st.text(max_size=60) | st.lists(parts, max_size=9).map("/".join))
def test_any_text_is_an_address_or_bad(text):
    for candidate in (text, f"{text}/p2p/{PEER}"):
        with suppress(BadAddress, BadPeerId):
            address = parse_address(candidate)
            assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/192.0.2.7/tcp/4011",
        "/ip6/2001:db8::7/tcp/4011",
        "/dns4/gpu.example.org/tcp/443/wss",
        "/ip4/192.0.2.7/tcp/4011/ws",
    ],
)
def test_what_can_be_dialled_is_taken(text):
    assert parse_transport(text) == text
    assert str(parse_address(f"{text}/p2p/{PEER}")) == f"{text}/p2p/{PEER}"


@pytest.mark.parametrize("text", ["/ip4/192.0.2.7/udp/4011", "/tcp/4011", "", "/unix/a", "x" * 600])
def test_what_cannot_be_dialled_says_why(text):
    with pytest.raises(BadAddress):
        parse_transport(text)


@pytest.mark.parametrize("text", ["\x1b[2J", "/ip4/\x1b[2J/tcp/1", "/dns4/" + "a" * 400 + "/tcp/1"])
def test_a_bad_address_is_shown_on_one_harmless_line(text):
    with pytest.raises(BadAddress) as caught:
        parse_transport(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200

"""Tickets survive people, and what did not survive them says so."""

import hashlib
import string
import textwrap
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import TicketMistyped
from ollamamax_p2p.identity import Ticket, format_ticket, parse_address, parse_ticket, peer_id_of
from ollamamax_p2p.identity.tickets import EXPIRES_AT_MAX, TICKET_CHARS_MAX, _base32

PEERS = [peer_id_of(hashlib.sha256(bytes([number])).digest()) for number in range(4)]
TRANSPORTS = [
    "/ip4/192.0.2.7/tcp/4011",
    "/ip6/2001:db8::7/tcp/4011",
    "/dns4/gpu.example.org/tcp/443/wss",
    f"/ip4/198.51.100.1/tcp/4011/p2p/{PEERS[3]}/p2p-circuit",
]

addresses = st.builds(
    lambda transport, peer: parse_address(f"{transport}/p2p/{peer}"),
    st.sampled_from(TRANSPORTS),
    st.sampled_from(PEERS),
)
tickets = st.builds(
    Ticket,
    swarm_id=st.binary(min_size=16, max_size=16),
    addresses=st.lists(addresses, min_size=1, max_size=16).map(tuple),
    secret=st.binary(min_size=16, max_size=16),
    expires_at=st.integers(0, EXPIRES_AT_MAX),
    swarm_key=st.none() | st.binary(min_size=32, max_size=32),
)

EXAMPLE = Ticket(
    swarm_id=bytes(range(16)),
    addresses=(parse_address(f"{TRANSPORTS[0]}/p2p/{PEERS[0]}"),),
    secret=bytes(range(16, 32)),
    expires_at=1_800_000_000,
    swarm_key=bytes(range(32, 64)),
)
TEXT = format_ticket(EXAMPLE)


def sealed(packed: bytes, version: str = "1") -> str:
    """A ticket with a right checksum, whatever is in it."""
    checksum = hashlib.sha256(f"omx{version}".encode() + packed).digest()[:4]
    return f"omx{version}" + _base32(packed + checksum)


@given(tickets)
def test_a_ticket_comes_back_as_it_was(ticket):
    text = format_ticket(ticket)
    assert parse_ticket(text) == ticket
    assert len(text) <= TICKET_CHARS_MAX


def test_a_usual_ticket_is_one_word_that_fits_four_lines():
    assert set(TEXT) <= set(string.ascii_lowercase + string.digits)
    assert len(TEXT) < 320


def test_the_layout_of_a_ticket_stays_as_it_is():
    """Tickets made by an older version must be readable: a change takes the next version."""
    assert parse_ticket(MADE_BY_0_1_0) == EXAMPLE
    assert TEXT == MADE_BY_0_1_0


MADE_BY_0_1_0 = (
    "omx1sxcbaaabaibqibiga4eascqlbqgq4d6ecaibceqtcqkrmfyydenbwha5dyp4422j2iamiibaeerc"
    "gjbfeytsqkjkfmwc2lrpgaytemzugu3doobzhi5typj6h6izfrbany2axhh7wn5jrhffittlw6akfr4j"
    "ahj7wm3tq5ufcgrqmf5puaozdnzpnfydilzrhezc4mbogixdol3umnyc6nbqgey2vkq2na"
)


@pytest.mark.parametrize(
    "pasted",
    [
        f"  {TEXT}\n",
        "\n".join(textwrap.wrap(TEXT, 40)),
        "\r\n    ".join(textwrap.wrap(TEXT, 72)),
        TEXT.upper(),
        "\u200b".join(textwrap.wrap(TEXT, 30)),
        f"\ufeff{TEXT}",
    ],
)
def test_a_ticket_survives_what_pasting_does_to_it(pasted):
    assert parse_ticket(pasted) == EXAMPLE


@settings(max_examples=2_000, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.sampled_from(string.ascii_lowercase + string.digits))
def test_one_wrong_character_is_noticed(place, letter):
    if TEXT[place] != letter:
        with pytest.raises(TicketMistyped):
            parse_ticket(TEXT[:place] + letter + TEXT[place + 1 :])


@pytest.mark.parametrize("length", range(len(TEXT)))
def test_a_ticket_that_was_cut_is_noticed(length):
    with pytest.raises(TicketMistyped):
        parse_ticket(TEXT[:length])


def test_two_swapped_characters_are_noticed():
    place = next(i for i in range(20, 60) if TEXT[i] != TEXT[i + 1])
    swapped = TEXT[:place] + TEXT[place + 1] + TEXT[place] + TEXT[place + 2 :]
    with pytest.raises(TicketMistyped, match="wrong or missing"):
        parse_ticket(swapped)


@pytest.mark.parametrize("version", ["2", "9", "x"])
def test_a_ticket_of_another_version_says_so(version):
    with pytest.raises(TicketMistyped, match="version"):
        parse_ticket(sealed(b"whatever is in it then", version))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with omx1"),
        ("omx", "begins with omx1"),
        ("/ip4/192.0.2.7/tcp/4011", "begins with omx1"),
        ("omx1", "wrong or missing"),
        ("omx1" + "a" * 5_000, "longer than 4096"),
        ("omx1" + "a" * 1_000_000, "1,000,004 characters"),
        (TEXT + "!", "character that no ticket has"),
    ],
)
def test_what_is_wrong_with_a_ticket_is_told(text, words):
    with pytest.raises(TicketMistyped, match=words):
        parse_ticket(text)


@settings(max_examples=10_000, deadline=None)
@given(st.text(max_size=300) | st.text("abcdefghijklmnopqrstuvwxyz234567 \n").map("omx1".__add__))
def test_any_text_is_a_ticket_or_mistyped(text):
    with pytest.raises(TicketMistyped):
        parse_ticket(text)


# A right ticket's fields with some replaced: what only a hand-made one can contain.
whole_body = [bytes(16), bytes(16), 0, None, [[bytes(32), [TRANSPORTS[0]]]]]
replacements = st.dictionaries(
    st.integers(0, 4),
    st.sampled_from(
        [None, -1, 2**64 - 1, EXPIRES_AT_MAX + 1, b"", bytes(17), bytes(32), "x", [], [[]], {}]
    )
    | st.lists(st.tuples(st.just(bytes(32)), st.lists(st.text(max_size=9), max_size=2)), max_size=2)
    | st.binary(max_size=34),
    max_size=2,
)
near_bodies = replacements.map(
    lambda new: [new.get(place, old) for place, old in enumerate(whole_body)]
)


@settings(max_examples=10_000, deadline=None)
@given(st.binary(max_size=200) | near_bodies.map(msgpack.packb))
def test_any_contents_under_a_right_checksum_are_a_ticket_or_mistyped(packed):
    try:
        ticket = parse_ticket(sealed(packed))
    except TicketMistyped:
        return
    assert parse_ticket(format_ticket(ticket)) == ticket


@pytest.mark.parametrize(
    "packed",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 2_000],
)
def test_a_hostile_length_in_a_ticket_takes_no_memory(packed):
    tracemalloc.start()
    try:
        with pytest.raises(TicketMistyped):
            parse_ticket(sealed(packed))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [0, 17])
def test_a_ticket_carries_one_to_sixteen_addresses(count):
    with pytest.raises(ValueError, match="1 to 16"):
        format_ticket(Ticket(bytes(16), EXAMPLE.addresses * count, bytes(16), 0, None))


def test_seventeen_addresses_of_several_peers_are_too_many_to_read():
    peers = [[bytes(32), [TRANSPORTS[0]] * 9], [bytes(32), [TRANSPORTS[0]] * 8]]
    with pytest.raises(TicketMistyped):
        parse_ticket(sealed(msgpack.packb([bytes(16), bytes(16), 0, None, peers])))


def test_addresses_too_long_for_a_ticket_are_refused():
    long = parse_address(f"/dns4/{'.'.join(['a' * 60] * 4)}/tcp/1/p2p/{PEERS[0]}")
    with pytest.raises(ValueError, match="limit 4096"):
        format_ticket(Ticket(bytes(16), (long,) * 16, bytes(16), 0, None))


def test_a_ticket_never_shows_its_secrets():
    for shown in (repr(EXAMPLE), str(EXAMPLE), f"{[EXAMPLE]}"):
        assert EXAMPLE.secret.hex() not in shown
        assert repr(EXAMPLE.secret) not in shown
        assert repr(EXAMPLE.swarm_key) not in shown
    wrong = TEXT[:-1] + ("a" if TEXT[-1] != "a" else "b")
    with pytest.raises(TicketMistyped) as caught:
        parse_ticket(wrong)
    assert TEXT[4:40] not in str(caught.value)
    assert caught.value.__cause__ is None

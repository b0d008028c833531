"""What arrives from outside as bytes: TXT records, provider messages, the remembered peers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.discovery.core.mdns_records import (
    STRING_BYTES_MAX,
    TXT_BYTES_MAX,
    addresses_in,
    fingerprint_in,
    service_type,
    txt_of,
)
from ollamamax_p2p.discovery.core.provider_messages import (
    ADDRESSES_MAX,
    HOLDERS_MAX,
    PAGE_DIGESTS,
    Ask,
    AskPeers,
    Holder,
    Holders,
    Noted,
    Tell,
    addresses_of_one_peer,
    answer_codec,
    digests_of,
    hashes_of,
    request_codec,
)
from ollamamax_p2p.errors import MalformedMessage
from ollamamax_p2p.identity import parse_address, peer_id_of

PEERS = [peer_id_of(bytes([number]) * 32) for number in range(3)]
HERE = parse_address(f"/ip4/192.168.1.5/tcp/4011/p2p/{PEERS[0]}")
THERE = parse_address(f"/ip6/fd00::7/tcp/4011/p2p/{PEERS[0]}")
STRANGE = parse_address(f"/ip4/192.168.1.6/tcp/4011/p2p/{PEERS[1]}")


def string(text: bytes) -> bytes:
    return bytes([len(text)]) + text


# -- TXT records -----------------------------------------------------------------------------


def test_addresses_survive_the_txt_record():
    assert addresses_in(txt_of([HERE, THERE])) == (HERE, THERE)


def test_each_address_is_a_string_of_its_own_and_all_fit_a_packet():
    many = [
        parse_address(f"/dns4/{'a' * 60}.{'b' * 60}{number}.example/tcp/4011/p2p/{PEERS[0]}")
        for number in range(20)
    ]
    txt = txt_of(many)
    assert len(txt) <= TXT_BYTES_MAX
    assert addresses_in(txt) == tuple(many[: len(addresses_in(txt))])
    assert len(addresses_in(txt)) >= 4


def test_an_address_too_long_for_a_string_is_left_out_and_the_others_are_told():
    long = parse_address(
        f"/dns4/{'.'.join(['a' * 60] * 3)}/tcp/1/p2p/{PEERS[1]}/p2p-circuit/p2p/{PEERS[0]}"
    )
    assert len(str(long)) > STRING_BYTES_MAX
    assert addresses_in(txt_of([long, HERE])) == (HERE,)


def test_only_one_peer_is_taken_from_a_record():
    assert addresses_in(txt_of([HERE, STRANGE])) == (HERE,)


def test_what_is_not_an_address_is_passed_over():
    txt = string(b"id=7") + string(b"dnsaddr=/ip4/1.2.3.4/tcp/1") + string(b"dnsaddr=\xff\xfe")
    assert addresses_in(txt + string(b"") + txt_of([HERE])) == (HERE,)


def test_keys_are_read_in_any_case():
    assert addresses_in(string(b"DNSAddr=" + str(HERE).encode())) == (HERE,)


def test_a_string_that_is_cut_short_ends_the_record():
    assert addresses_in(txt_of([HERE]) + b"\xff" + b"dnsaddr=") == (HERE,)


@settings(max_examples=10_000, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=600),
        st.lists(
            st.one_of(
                st.binary(max_size=255),
                st.text(max_size=60).map(lambda text: b"dnsaddr=" + text.encode()[:200]),
                st.sampled_from([HERE, THERE, STRANGE]).map(
                    lambda a: b"dnsaddr=%b" % str(a).encode()
                ),
            ).map(string),
            max_size=20,
        ).map(b"".join),
    )
)
def test_any_txt_record_gives_at_most_eight_addresses_of_one_peer(txt):
    found = addresses_in(txt)
    assert len(found) <= ADDRESSES_MAX
    assert len({address.peer for address in found}) <= 1
    assert all(parse_address(str(address)) == address for address in found)


@settings(max_examples=1_000, deadline=None)
@given(st.lists(st.sampled_from([HERE, THERE]), unique=True))
def test_what_we_write_we_read(addresses):
    assert addresses_in(txt_of(addresses)) == tuple(addresses)


def test_a_private_swarm_has_a_service_name_of_its_own():
    assert service_type(None) == "_p2p._udp.local."
    assert service_type("0123456789abcdef") == "_p2p-0123456789abcdef._udp.local."
    assert fingerprint_in(service_type("0123456789abcdef")) == "0123456789abcdef"
    assert fingerprint_in("_p2p._udp.local.") is None
    assert fingerprint_in("_http._tcp.local.") is None


@pytest.mark.parametrize("bad", ["", "A", "a b", "a" * 33, "a.b"])
def test_a_fingerprint_that_would_break_the_name_is_refused(bad):
    with pytest.raises(ValueError, match="fingerprint"):
        service_type(bad)


# -- provider messages -----------------------------------------------------------------------


def test_the_largest_messages_fit_their_limits():
    digests = [digest_of(number.to_bytes(2, "big")) for number in range(PAGE_DIGESTS)]
    hashes = hashes_of(digests)
    address = "/dns4/" + "a" * 440 + "/tcp/4011/p2p/" + PEERS[0]
    assert len(address) == 512
    tell = Tell(
        fresh=True,
        held=hashes,
        released=hashes,
        addresses=[address] * ADDRESSES_MAX,
        lifetime_s=1.0,
    )
    assert request_codec.decode(request_codec.encode(tell)) == tell
    holders = Holders(holders=[Holder(addresses=[address] * ADDRESSES_MAX)] * HOLDERS_MAX)
    assert answer_codec.decode(answer_codec.encode(holders)) == holders
    assert digests_of(hashes) == digests


def test_addresses_of_several_peers_count_for_the_first():
    assert addresses_of_one_peer(["nonsense", str(HERE), str(STRANGE), str(THERE)]) == (HERE, THERE)
    assert addresses_of_one_peer([]) == ()


REQUESTS = st.one_of(
    st.builds(Ask, digest=st.binary(min_size=32, max_size=32)),
    st.builds(
        Tell,
        fresh=st.booleans(),
        held=st.lists(st.binary(min_size=32, max_size=32), max_size=4),
        released=st.lists(st.binary(min_size=32, max_size=32), max_size=4),
        addresses=st.lists(st.text(max_size=20), max_size=3),
        lifetime_s=st.floats(0, 1_000),
    ),
)


@settings(max_examples=10_000, deadline=None)
@given(st.one_of(st.binary(max_size=200), REQUESTS.map(request_codec.encode)), st.data())
def test_any_bytes_are_a_request_or_malformed(data, draw):
    if data and draw.draw(st.booleans()):
        cut = draw.draw(st.integers(0, len(data) - 1))
        data = data[:cut] + draw.draw(st.binary(max_size=4)) + data[cut + 1 :]
    try:
        request = request_codec.decode(data)
    except MalformedMessage:
        return
    assert isinstance(request, Ask | AskPeers | Tell)
    for texts in (request.addresses,) if isinstance(request, Tell) else ():
        addresses_of_one_peer(texts)


@settings(max_examples=10_000, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            Holders,
            holders=st.lists(
                st.builds(Holder, addresses=st.lists(st.text(max_size=20), min_size=1, max_size=3)),
                max_size=3,
            ),
        ).map(answer_codec.encode),
    ),
    st.integers(0, 199),
    st.integers(0, 255),
)
def test_any_bytes_are_an_answer_or_malformed(data, place, byte):
    data = data[:place] + bytes([byte]) + data[place + 1 :]
    try:
        answer = answer_codec.decode(data)
    except MalformedMessage:
        return
    assert isinstance(answer, Holders | Noted)

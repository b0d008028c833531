"""Which URLs and addresses a registry may lead us to; which proxy on the way."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.errors import OriginUnavailable
from ollamamax_p2p.transfer.http_client import Proxies
from ollamamax_p2p.transfer.outbound_addresses import (
    ADDRESSES_MAX,
    host_listed,
    is_public,
    parse_url,
    usable_addresses,
)

NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.251",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:c0a8:101::1",
    "2001:db8::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::fb",
    "not an address",
    "127.1",
    "0177.0.0.1",
    "",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_on_the_internet_are_known(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_on_the_internet_are_known(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_inside_an_ipv6_address_is_judged_alike(address):
    number = int(address)
    assert is_public(f"::ffff:{address}") == is_public(str(address))
    assert is_public(str(ipaddress.IPv6Address((0x64FF9B << 96) | number))) == is_public(
        str(address)
    )


def test_only_public_addresses_are_used():
    found = usable_addresses("a.test", 443, ["10.0.0.1", "1.1.1.1", "::1"], allow_private=())
    assert found == ["1.1.1.1"]


def test_a_host_that_is_listed_may_be_anywhere():
    for listed in ("A.test", "a.test:443"):
        found = usable_addresses("a.test", 443, ["10.0.0.1"], allow_private=(listed,))
        assert found == ["10.0.0.1"]
    for other in ("a.test:80", "b.test", "test", "10.0.0.1", ""):
        with pytest.raises(OriginUnavailable):
            usable_addresses("a.test", 443, ["10.0.0.1"], allow_private=(other,))


def test_a_name_with_very_many_addresses_is_not_tried_for_ever():
    many = [f"1.1.1.{n}" for n in range(100)]
    assert len(usable_addresses("a.test", 443, many, allow_private=())) == ADDRESSES_MAX


def test_an_ipv6_host_is_listed_with_or_without_brackets():
    assert host_listed("::1", 5000, ("[::1]:5000",))
    assert host_listed("::1", 5000, ("::1",))
    assert host_listed("::1", 5000, ("[::1]",))
    assert not host_listed("::1", 5000, ("[::1]:5001",))


# -- URLs ----------------------------------------------------------------------------------


def test_a_url_is_taken_apart_once():
    url = parse_url("HTTPS://Registry.Example:8443/v2/a?x=1&y=2#there")
    assert (url.scheme, url.host, url.port) == ("https", "registry.example", 8443)
    assert url.target == "/v2/a?x=1&y=2"
    assert url.authority == "registry.example:8443"
    assert str(url) == "https://registry.example:8443/v2/a"
    assert "x=1" not in repr(url)
    assert parse_url("http://[::1]:80").full == "http://[::1]/"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/v2/",
        "registry.example/v2/",
        "ftp://registry.example/",
        "javascript:alert(1)",
        "http://",
        "http://user@registry.example/",
        "http://user:password@registry.example/",
        "http://registry.example\\@evil.example/",
        "http://registry.example:0/",
        "http://registry.example:70000/",
        "http://registry.example:x/",
        "http://regis try.example/",
        "http://registry.example/\r\nX: y",
        "http://registry.example/\x00",
        "http://régistry.example/",
        "http://[::1/",
        "http://[v1.x]/",
        "http://-/",
        "http://a/" + "x" * 9_000,
    ],
)
def test_what_is_no_plain_url_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_url(text)


@given(st.text(max_size=60) | st.text(alphabet="htps:/@[]\\.?#%a1 ", max_size=40))
def test_any_text_is_a_url_with_a_usable_host_or_refused(text):
    base = parse_url("https://registry.example/v2/a/")
    for given_base in (None, base):
        try:
            url = parse_url(text, base=given_base)
        except ValueError:
            continue
        assert url.scheme in ("http", "https")
        assert url.host
        assert not set(url.host) & set("@/\\?# ")
        assert 0 < url.port < 65_536
        assert url.target.startswith("/")
        assert parse_url(url.full) == url


# -- proxies -------------------------------------------------------------------------------


def _proxy_for(url: str, no_proxy: str = "") -> str | None:
    environ = {"HTTPS_PROXY": "http://s", "http_proxy": "http://p", "NO_PROXY": no_proxy}
    return Proxies.of(environ).for_url(parse_url(url))


def test_each_scheme_has_its_proxy():
    assert _proxy_for("https://a.example/") == "http://s"
    assert _proxy_for("http://a.example/") == "http://p"
    assert Proxies.of({}).for_url(parse_url("http://a.example/")) is None


def test_this_machine_is_never_asked_for_through_a_proxy():
    for host in ("localhost", "x.localhost", "127.0.0.1", "127.1.2.3", "[::1]"):
        assert _proxy_for(f"http://{host}:5000/") is None


@pytest.mark.parametrize(
    ("rule", "url"),
    [
        ("*", "https://a.example/"),
        ("a.example", "https://a.example/"),
        ("A.Example", "https://a.example/"),
        ("a.example", "https://deep.a.example/"),
        (".a.example", "https://deep.a.example/"),
        ("*.a.example", "https://deep.a.example/"),
        ("a.example:8443", "https://a.example:8443/"),
        ("10.0.0.0/8", "http://10.1.2.3/"),
        ("10.1.2.3", "http://10.1.2.3:5000/"),
        ("x, 10.1.2.3:5000 ,y", "http://10.1.2.3:5000/"),
        ("fd00::/8", "http://[fd00::1]/"),
    ],
)
def test_no_proxy_covers(rule, url):
    assert _proxy_for(url, rule) is None


@pytest.mark.parametrize(
    ("rule", "url"),
    [
        ("", "https://a.example/"),
        ("example.com", "https://notexample.com/"),
        ("a.example:8443", "https://a.example/"),
        ("10.0.0.0/8", "http://11.1.2.3/"),
        ("10.0.0.0/8", "http://ten.example/"),
        ("deep.a.example", "https://a.example/"),
    ],
)
def test_no_proxy_does_not_cover(rule, url):
    assert _proxy_for(url, rule) is not None

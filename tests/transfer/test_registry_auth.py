"""Challenges, and who may see which proof."""

import base64
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import OriginRefused, OriginUnavailable
from ollamamax_p2p.transfer.outbound_addresses import parse_url
from ollamamax_p2p.transfer.registry_auth import (
    Challenge,
    SigningKey,
    may_see_proof,
    names,
    parse_challenges,
    read_token,
    token_requests,
)
from ollamamax_p2p.transfer.registry_requests import Retries, TryAgain
from ollamamax_p2p.transfer.settings import OriginSettings

REGISTRY = parse_url("https://registry.example/v2/")
KEY = SigningKey(b"p" * 32, lambda message: b"s" * 64)
LOGIN = "me:hunter2"


# -- challenges ----------------------------------------------------------------------------


def test_a_challenge_is_read_as_registries_write_it():
    assert parse_challenges(
        ['Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push"']
    ) == [
        Challenge(
            "bearer",
            {
                "realm": "https://auth.example/token",
                "service": "reg",
                "scope": "repository:a/b:pull,push",
            },
        )
    ]


def test_many_challenges_are_read_from_one_header_and_from_many():
    one = parse_challenges(['Basic realm="a, b", Bearer realm=https://x/t , scope="s"'])
    many = parse_challenges(['Basic realm="a, b"', 'BEARER Realm = "https://x/t",scope=s'])
    assert one == many
    assert [each.scheme for each in one] == ["basic", "bearer"]
    assert one[0].parameters == {"realm": "a, b"}


def test_a_quoted_quote_does_not_end_a_parameter():
    (challenge,) = parse_challenges([r'Basic realm="the \"best\" \\ registry", charset="UTF-8"'])
    assert challenge.parameters == {"realm": 'the "best" \\ registry', "charset": "UTF-8"}


def test_the_first_of_two_parameters_of_one_name_counts():
    (challenge,) = parse_challenges(['Bearer realm="https://a/",realm="https://b/"'])
    assert challenge.parameters["realm"] == "https://a/"


@settings(max_examples=500)
@given(st.lists(st.text(max_size=200) | st.text(alphabet='Bearz=", \\realm\t', max_size=200)))
def test_any_header_is_read_without_trouble(headers):
    for challenge in parse_challenges(headers):
        assert challenge.scheme == challenge.scheme.lower()


def test_a_very_long_header_is_left_out():
    assert parse_challenges(['Basic realm="' + "a" * 10_000 + '"']) == []


# -- whom to trust with proof -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "realm", "expected"),
    [
        ("https://registry.example/", "https://registry.example/token", True),
        ("https://registry.example/", "https://REGISTRY.example:443/token", True),
        ("https://registry.example/", "http://registry.example/token", False),
        ("https://registry.example/", "https://registry.example:8443/token", False),
        ("https://registry.example/", "https://registry.example.evil.test/", False),
        ("https://registry.example/", "https://evil.test/registry.example", False),
        ("https://registry.example/", "https://sub.registry.example/", False),
        ("http://localhost:5000/", "http://localhost:5000/token", True),
        ("http://localhost:5000/", "http://localhost:5001/token", False),
        ("http://localhost:5000/", "http://127.0.0.1:5000/token", False),
        ("https://listed.example/", "https://tokens.example/", True),
        ("https://listed.example/", "https://tokens.example:444/", False),
        ("https://listed.example/", "http://tokens.example/", False),
        ("https://listed.example:444/", "https://tokens.example/", False),
        ("https://ported.example/", "https://tokens.example:444/", True),
        ("https://ported.example/", "https://tokens.example/", False),
    ],
)
def test_proof_goes_to_the_registrys_own_host_or_a_listed_one(registry, realm, expected):
    listed = {"listed.example": "tokens.example", "ported.example": "tokens.example:444"}
    assert expected is may_see_proof(
        parse_url(realm), registry=parse_url(registry), token_hosts=listed
    )


@pytest.mark.parametrize(
    ("registry", "realm"),
    [
        ("https://hf.co/v2/", "https://huggingface.co/v2/token"),
        ("https://registry.ollama.ai/v2/", "https://ollama.com/token"),
    ],
)
def test_registries_whose_tokens_come_from_their_other_name_work_unconfigured(registry, realm):
    """Stock Ollama refuses both: its issues 15661 and 17361."""
    hosts = OriginSettings().token_hosts
    assert may_see_proof(parse_url(realm), registry=parse_url(registry), token_hosts=hosts)
    assert not may_see_proof(parse_url(realm), registry=REGISTRY, token_hosts=hosts)
    # Whoever does not want that says so.
    own = {parse_url(registry).host: "other.example"}
    assert not may_see_proof(parse_url(realm), registry=parse_url(registry), token_hosts=own)


def test_an_entry_of_the_settings_means_one_port():
    assert names("registry.example", parse_url("https://registry.example/"))
    assert names("Registry.Example:443", parse_url("https://registry.example/"))
    assert names("registry.example:5000", parse_url("http://registry.example:5000/"))
    assert not names("registry.example", parse_url("https://registry.example:5000/"))


def _asked(realm: str, *, credentials: str | None = None, key: SigningKey | None = KEY):
    return token_requests(
        Challenge("bearer", {"realm": realm, "service": "s t", "scope": "one two"}),
        registry=REGISTRY,
        credentials=credentials,
        key=key,
        token_hosts={},
        timestamp=1_700_000_000,
        nonce=bytes(16),
    )


def test_a_realm_of_the_same_host_is_asked_signed_then_anonymously():
    signed, anonymous = _asked("https://registry.example/token?a=b")
    query = "a=b&nonce=AAAAAAAAAAAAAAAAAAAAAA&scope=one&scope=two&service=s%20t&ts=1700000000"
    assert signed.url.full == f"https://registry.example/token?{query}"
    public, signature = signed.headers["Authorization"].split(":")
    assert base64.b64decode(public).endswith(b"\x00\x00\x00\x20" + b"p" * 32)
    assert base64.b64decode(signature) == b"s" * 64
    assert anonymous.headers == {}
    assert anonymous.url.target == "/token?a=b&service=s%20t&scope=one&scope=two"


def test_a_realm_elsewhere_is_asked_anonymously_or_not_at_all():
    (anonymous,) = _asked("https://elsewhere.example/token")
    assert anonymous.headers == {}
    with pytest.raises(OriginRefused, match=r"origin\.token_hosts"):
        _asked("https://elsewhere.example/token", credentials=LOGIN)
    with pytest.raises(OriginRefused, match="without https"):
        _asked("http://elsewhere.example/token")


def test_a_password_goes_before_a_signature():
    (request,) = _asked("https://registry.example/token", credentials=LOGIN)
    assert request.headers["Authorization"].startswith("Basic ")
    assert "Basic" not in repr(request)


@given(st.text(max_size=80))
def test_any_realm_is_asked_or_refused(realm):
    try:
        for request in _asked(realm):
            assert request.url.scheme == "https"
    except OriginRefused:
        pass


@given(st.binary(max_size=300))
def test_any_token_answer_gives_a_token_that_fits_a_header_or_is_refused(body):
    try:
        token = read_token(body, url=REGISTRY)
    except OriginUnavailable:
        return
    assert token.isascii()
    assert token.isprintable()
    assert " " not in token


def test_a_token_answer_in_json_without_end_is_not_understood():
    deep = b'{"x":' + b"[" * 4_000 + b"]" * 4_000 + b"}"
    with pytest.raises(OriginUnavailable, match="not understood"):
        read_token(deep, url=REGISTRY)


# -- retries ---------------------------------------------------------------------------------


def _waits(
    seed: int, tries: int = 8, backoff_first_s: float = 0.5, backoff_max_s: float = 10.0
) -> list[float]:
    retries = Retries(
        OriginSettings(tries=tries, backoff_first_s=backoff_first_s, backoff_max_s=backoff_max_s),
        random.Random(seed),
    )
    trouble = TryAgain(REGISTRY, "answered 503")
    return [retries.wait_s(trouble) for _ in range(tries - 1)]


def test_waits_double_up_to_a_bound_give_or_take_half():
    waits = _waits(1, backoff_first_s=1.0, backoff_max_s=10.0)
    for wait, middle in zip(waits, (1, 2, 4, 8, 10, 10, 10), strict=True):
        assert middle * 0.5 <= wait <= middle * 1.5


def test_waits_follow_from_the_seed():
    assert _waits(1) == _waits(1)
    assert _waits(1) != _waits(2)


def test_after_the_last_try_the_origin_is_unavailable():
    retries = Retries(OriginSettings(tries=2), random.Random(1))
    retries.wait_s(TryAgain(REGISTRY, "answered 503"))
    with pytest.raises(OriginUnavailable, match=r"registry.example/v2/: answered 503 \(tried 2"):
        retries.wait_s(TryAgain(REGISTRY, "answered 503"))


def test_a_pause_that_the_registry_asks_for_is_kept_within_a_bound():
    retries = Retries(OriginSettings(retry_after_max_s=60), random.Random(1))
    assert retries.wait_s(TryAgain(REGISTRY, "answered 429", 59.0)) == 59.0
    with pytest.raises(OriginUnavailable, match="wait 61 s"):
        retries.wait_s(TryAgain(REGISTRY, "answered 429", 61.0))

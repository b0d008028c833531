import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.digest import digest_of, parse_digest
from ollamamax_p2p.content.core.go_json import go_float, go_json
from ollamamax_p2p.content.core.manifest import (
    CONFIG_TYPE,
    LAYER_COUNT_MAX,
    LICENSE_TYPE,
    MANIFEST_BYTES_MAX,
    MODEL_TYPE,
    TEMPLATE_TYPE,
    Layer,
    build_manifest,
    parse_manifest,
)
from ollamamax_p2p.errors import MalformedMessage
from tests.content.model_files import check_one_line

VECTORS = Path(__file__).parent.parent / "vectors" / "ollama"
CONFIG = parse_digest("sha256:ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356")
WEIGHTS = parse_digest("sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4")
TEMPLATE = parse_digest("sha256:3e02c8a0b9c3b1c7b0e9a0b6c6f5d9b4d7dbd0bf2b2d8b6bb7d7e6a0d5a5f1c2")


def document(**changes) -> bytes:
    read = json.loads((VECTORS / "tiny.manifest.json").read_bytes())
    return json.dumps(read | changes).encode()


def test_a_manifest_is_written_byte_for_byte_as_ollama_writes_it():
    built = build_manifest(
        Layer(CONFIG_TYPE, CONFIG, 3),
        [Layer(MODEL_TYPE, WEIGHTS, 5), Layer(TEMPLATE_TYPE, TEMPLATE, 13, source="llama3.2:1b")],
    )
    raw = (VECTORS / "tiny.manifest.json").read_bytes()
    assert built.raw == raw
    assert parse_manifest(raw) == built
    assert built.digest == digest_of(raw)


def test_a_registrys_manifest_is_kept_as_it_came():
    raw = (VECTORS / "registry.manifest.json").read_bytes()
    manifest = parse_manifest(raw)
    assert manifest.raw == raw
    assert manifest.config.digest == CONFIG
    assert manifest.layers_of(LICENSE_TYPE) == (Layer(LICENSE_TYPE, WEIGHTS, 5),)
    assert manifest.blobs() == ((WEIGHTS, 5), (CONFIG, 3))
    assert manifest.size == 8


def test_the_config_is_pulled_last():
    config, layer = Layer(CONFIG_TYPE, CONFIG, 3), Layer(MODEL_TYPE, WEIGHTS, 5)
    assert build_manifest(config, [layer]).blobs() == ((WEIGHTS, 5), (CONFIG, 3))


def test_a_manifest_without_layers_is_one():
    assert parse_manifest(document(layers=None)).layers == ()


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not a manifest"),
        (b"[]", "not a manifest"),
        (b'{"schemaVersion":2}', "not a manifest"),
        (b"[" * 100_000, "not a manifest"),
        (b'{"config":"\xff"}', "not a manifest"),
        (b" " * (MANIFEST_BYTES_MAX + 1), "at most"),
        (document(schemaVersion=1), "schema 1"),
        (document(config={"digest": "sha256:../../x", "size": 1}), "invalid digest"),
        (document(config={"digest": CONFIG, "size": -1}), "not a manifest"),
        (document(config={"digest": CONFIG, "size": 2**60}), "not a manifest"),
        (document(config={"digest": CONFIG, "size": 1.5}), "not a manifest"),
        (document(layers=[{"digest": CONFIG, "size": 4}]), "two sizes"),
        (
            document(layers=[{"digest": WEIGHTS, "size": 4}] * (LAYER_COUNT_MAX + 1)),
            "not a manifest",
        ),
        (document(layers=[{"digest": WEIGHTS, "size": 4, "name": "n" * 2000}]), "not a manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(raw, problem):
    with pytest.raises(MalformedMessage, match=problem):
        parse_manifest(raw)


odd_values = st.sampled_from(
    [None, True, -1, 1.5, 2**70, "", "\ud800", [], {}, [[[1]]], "x" * 2000]
)
layers = st.fixed_dictionaries(
    {
        "digest": st.sampled_from([WEIGHTS, CONFIG, "sha256:" + "0" * 63]) | odd_values,
        "size": st.integers(-3, 2**64),
    },
    optional={"mediaType": st.text(max_size=20), "from": odd_values, "name": odd_values},
)
manifests = st.fixed_dictionaries(
    {"schemaVersion": st.sampled_from([1, 2]), "config": layers | odd_values},
    optional={"layers": st.lists(layers, max_size=3) | odd_values, "mediaType": odd_values},
)
TINY = (VECTORS / "tiny.manifest.json").read_bytes()
damaged = st.builds(
    lambda at, noise: TINY[:at] + noise + TINY[at + len(noise) :],
    st.integers(0, len(TINY)),
    st.binary(max_size=8),
)


@settings(max_examples=10_000, deadline=None)
@given(st.binary() | damaged | manifests.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_given_a_manifest_is_read_or_refused(raw):
    try:
        manifest = parse_manifest(raw)
    except MalformedMessage as error:
        check_one_line(error)
        return
    assert manifest.raw == raw
    rebuilt = build_manifest(manifest.config, manifest.layers)
    assert parse_manifest(rebuilt.raw).blobs() == manifest.blobs()


# -- Go's JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None, "x"]}, '{"b":1,"a":[true,null,"x"]}'),
        (
            '<|im_start|> & \u2028\u2029 \u00e9 "\\\n\b',
            '"\\u003c|im_start|\\u003e \\u0026 \\u2028\\u2029 é \\"\\\\\\n\\b"',
        ),
        ("\ud800", '"\\ufffd"'),
        (0.7, "0.7"),
        (1.0, "1"),
        (-0.0, "-0"),
        (0.0, "0"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (1.5e-7, "1.5e-7"),
        (-2e-9, "-2e-9"),
        (1e-6, "0.000001"),
        (0.1, "0.1"),
    ],
)
def test_json_is_written_as_go_writes_it(value, text):
    assert go_json(value) == text.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match="JSON has no"):
        go_json(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_read_back_as_itself(value):
    assert float(go_float(value)) == value

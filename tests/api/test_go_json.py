"""Bytes that Go's encoding/json would write. The expectations come from Go's documentation and from
Ollama's answers, not from what we write.
"""

import json
import math
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.api import go_json


class Line(msgspec.Struct, omit_defaults=True):
    model: str
    done: bool
    reason: str = ""
    count: int = 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"error": "model 'x' not found"}, b'{"error":"model \'x\' not found"}'),
        ({"a": "<b>&\u2028\u2029"}, rb'{"a":"\u003cb\u003e\u0026\u2028\u2029"}'),
        ({"<": 1}, rb'{"\u003c":1}'),
        ({"a": 'quote " back \\ nul \x00 \x7f'}, b'{"a":"quote \\" back \\\\ nul \\u0000 \x7f"}'),
        ({"a": "größer ☃ 🦙"}, '{"a":"größer ☃ 🦙"}'.encode()),
        ([1.0, 0.5, -2.0, 100.0, 1e6], b"[1,0.5,-2,100,1000000]"),
        ([0.000001, 0.0000001, 1.5e-9], b"[0.000001,1e-7,1.5e-9]"),
        ([1e16, 1e20], b"[10000000000000000,100000000000000000000]"),
        ([1e21, 1.23e22, -1e300], b"[1e+21,1.23e+22,-1e+300]"),
        ([0.0, -0.0], b"[0,-0]"),
        ([2**53, -7], b"[9007199254740992,-7]"),
        ({"text": "1.0 and 1e9", "number": 1.0}, b'{"text":"1.0 and 1e9","number":1}'),
        ({"text": 'a "1.0" \\', "number": 2.0}, b'{"text":"a \\"1.0\\" \\\\","number":2}'),
        ([math.nan, math.inf], b"[null,null]"),
        (Line("m", False), b'{"model":"m","done":false}'),
        (Line("m", True, "stop", 3), b'{"model":"m","done":true,"reason":"stop","count":3}'),
        ({}, b"{}"),
        (None, b"null"),
    ],
)  # fmt: skip
def test_bytes_are_those_that_go_writes(value, expected):
    assert go_json.encode(value) == expected


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(_PLAIN)
def test_what_is_written_reads_back_the_same(value):
    written = go_json.encode(value)
    assert _with_floats(json.loads(written)) == _with_floats(value)
    assert not any(byte in written for byte in (b"<", b">", b"&", "\u2028".encode()))


def _with_floats(value):
    """JSON does not tell 1 from 1.0."""
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if isinstance(value, dict):
        return {key: _with_floats(each) for key, each in value.items()}
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_keeps_its_value_in_few_digits(value):
    short = go_json.float32(value)
    assert struct.pack("<f", short) == struct.pack("<f", value)
    assert len(repr(short).replace("-", "").replace(".", "").partition("e")[0].strip("0")) <= 9


def test_the_shortest_digits_of_a_float32_are_taken():
    assert go_json.float32(0.10000000149011612) == 0.1
    assert go_json.float32(0.3333333432674408) == 0.33333334


def test_a_map_has_its_keys_sorted():
    assert go_json.encode({"b": 1, "a": {"d": 1, "c": 2}}, sort_keys=True) == (
        b'{"a":{"c":2,"d":1},"b":1}'
    )

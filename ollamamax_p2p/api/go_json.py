"""JSON as Go's encoding/json writes it, byte for byte: Ollama's clients compare and cut bytes.

Where msgspec differs: Go escapes `<`, `>`, `&` and the two line separators of Unicode in every
string (json.Marshal is safe inside HTML), writes a float that is whole without `.0`, and goes over
to an exponent below 1e-6 and from 1e21 on.
"""

import re
import struct
from decimal import Decimal
from typing import Any

import msgspec

_ENCODER = msgspec.json.Encoder()
_SORTING_ENCODER = msgspec.json.Encoder(order="deterministic")

_ESCAPES = (
    (b"<", rb"\u003c"),
    (b">", rb"\u003e"),
    (b"&", rb"\u0026"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)
# In JSON these bytes occur inside strings only, so that they can be replaced blindly.

_FLOAT_SOMEWHERE = re.compile(rb"\d(?:\.\d|e)")
_STRING_OR_NUMBER = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:e-?\d+)?')


def encode(value: Any, *, floats: bool = True, sort_keys: bool = False) -> bytes:
    """Compact JSON of structs, dataclasses, dicts and plain values; keys in declared order.

    floats: False promises that the value has none, which saves looking for them (a time of day
    looks like one).
    sort_keys: of dicts, as Go does for a map.
    Raises TypeError for what JSON cannot carry. NaN and the infinities become null (Go refuses
    them; a stream that has begun must not end by one).
    """
    data = (_SORTING_ENCODER if sort_keys else _ENCODER).encode(value)
    for found, escaped in _ESCAPES:
        if found in data:
            data = data.replace(found, escaped)
    if floats and _FLOAT_SOMEWHERE.search(data):
        data = _STRING_OR_NUMBER.sub(_as_go_writes, data)
    return data


def float32(value: float) -> float:
    """The float whose shortest decimal is that of the nearest float32: what Go writes for an
    element of a []float32, such as an embedding, and half as long.
    """
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in (7, 8, 9):  # 9 always do; most float32 take 8
        short = float(f"{single:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == single:
            return short
    return float(single)


def _as_go_writes(found: re.Match[bytes]) -> bytes:
    token = found[0]
    if token[0] == 0x22 or (b"." not in token and b"e" not in token):  # 0x22: a string
        return token
    value = float(token)
    if value == 0:
        return b"-0" if token[0] == 0x2D else b"0"
    if 1e-6 <= abs(value) < 1e21:
        plain = format(Decimal(token.decode()), "f")
        return (plain.rstrip("0").rstrip(".") if "." in plain else plain).encode()
    digits, _, exponent = format(Decimal(token.decode()).normalize(), "e").partition("e")
    return f"{digits}e{int(exponent):+d}".encode()

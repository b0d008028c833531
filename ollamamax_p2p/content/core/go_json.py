"""JSON as Go's encoding/json writes it, so that what we create has the bytes, and so the digest,
that Ollama would have given it: no spaces, `<`, `>`, `&` and the two Unicode line separators
escaped, floats in their shortest form without a trailing `.0`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias

Json: TypeAlias = (
    "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"  # recursive
)

_ESCAPED = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
_TO_ESCAPE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def go_json(value: "Json") -> bytes:
    """One value, compact. Object keys keep their order: Go writes a struct's fields as declared
    and a map's keys sorted, so sort them where Ollama has a map.

    Raises ValueError for NaN and infinity, as Go refuses them.
    """
    return _text(value).encode()


def _text(value: "Json") -> str:
    if isinstance(value, str):
        return _string(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return go_float(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_string(k)}:{_text(v)}" for k, v in value.items()) + "}"
    return "[" + ",".join(map(_text, value)) + "]"


def _string(text: str) -> str:
    # A lone surrogate is no character; Go writes the replacement character, escaped.
    return _TO_ESCAPE.sub(
        lambda match: _ESCAPED.get(match[0], "\\ufffd"), json.dumps(text, ensure_ascii=False)
    )


def go_float(value: float) -> str:
    """The shortest digits that give this double again; an exponent only below 1e-6 or from 1e21."""
    if not math.isfinite(value):
        raise ValueError(f"JSON has no {value}")
    if value == 0:
        return "-0" if math.copysign(1, value) < 0 else "0"
    number = Decimal(repr(value))
    if 1e-6 <= abs(value) < 1e21:
        text = format(number, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    sign, digits, _ = number.normalize().as_tuple()
    mantissa = "".join(map(str, digits))
    mantissa = mantissa[0] + ("." + mantissa[1:] if mantissa[1:] else "")
    exponent = number.adjusted()
    return f"{'-' if sign else ''}{mantissa}e{'+' if exponent > 0 else '-'}{abs(exponent)}"

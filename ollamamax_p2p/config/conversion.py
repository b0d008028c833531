"""Text and TOML values into the types that settings declare. Says what was expected, not where."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


class Unusable(ValueError):
    """A value is not of the wanted type; the text says what was expected."""


def from_text(text: str, wanted: Any) -> Any:
    """A value from the environment or a flag. Lists are separated by commas, tables written as
    `key=value,key=value`. Raises Unusable.
    """
    origin = get_origin(wanted)
    if origin is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if origin is not None and _is_mapping(origin):
        return dict(_pair(part) for part in text.split(",") if part.strip())
    if wanted is bool:
        return _truth(text)
    if wanted in (int, float):
        return _number(text, wanted)
    return from_toml(text, wanted)


def from_toml(value: Any, wanted: Any) -> Any:
    """A value as tomllib gave it. Raises Unusable."""
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        return _from_union(value, wanted)
    if origin is Literal:
        return _one_of(value, get_args(wanted))
    if origin is tuple:
        return _texts(value)
    if origin is not None and _is_mapping(origin):
        return _table(value)
    if wanted is Path and isinstance(value, str):
        return _path(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise Unusable(f"expected {_called(wanted)}, not {_shown(value)}")
    return value


def _from_union(value: Any, wanted: Any) -> Any:
    """Optional values: whichever member takes it."""
    for member in (each for each in get_args(wanted) if each is not NoneType):
        try:
            return from_text(value, member) if isinstance(value, str) else from_toml(value, member)
        except Unusable as error:
            last = error
    raise last


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise Unusable(f"expected one of {', '.join(map(str, allowed))}, not {_shown(value)}")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise Unusable(f"expected a list of texts, not {_shown(value)}")
    wrong = next((each for each in value if not isinstance(each, str)), None)
    if wrong is not None:
        raise Unusable(f"expected a list of texts, but {_shown(wrong)} is in it")
    return tuple(value)


def _table(value: Any) -> dict[str, str]:
    """The value is not repeated in errors: it may be a password."""
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise Unusable("expected a table of texts")
    return dict(value)


def _pair(part: str) -> tuple[str, str]:
    key, separator, value = part.strip().partition("=")
    if not separator or not key:
        raise Unusable("expected key=value, separated by commas")
    return key.strip(), value


def _truth(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise Unusable(f"expected true or false, not {_shown(text)}")
    return word in _TRUE


def _number(text: str, wanted: type[int] | type[float]) -> int | float:
    try:
        return wanted(text.strip().replace("_", ""))
    except ValueError:
        raise Unusable(f"expected {_called(wanted)}, not {_shown(text)}") from None


def _path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise Unusable("expected a path")
    return Path(text)


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _called(wanted: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
    }
    return names.get(wanted, str(wanted))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"

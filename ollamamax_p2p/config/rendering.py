"""Showing settings: the effective value of each with its source, and their reference page."""

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from ollamamax_p2p.cluster.core.agreed_settings import SETTINGS as AGREED_SETTINGS
from ollamamax_p2p.cluster.core.agreed_settings import Setting as AgreedSetting
from ollamamax_p2p.config.catalogue import (
    FLAGS,
    INVERTED_VARIABLES,
    OTHER_PROGRAMS_VARIABLES,
    SHORT_VARIABLES,
    Setting,
    all_settings,
)
from ollamamax_p2p.config.loading import LoadedConfig
from ollamamax_p2p.config.node_config import NodeConfig

MASK = "(set, not shown)"


@dataclass(frozen=True, slots=True)
class SettingValue:
    """One line of `omx config show`."""

    key: str
    value: Any
    """Plain data that JSON can carry; secrets masked."""
    source: str


def effective(loaded: LoadedConfig) -> list[SettingValue]:
    """Every setting as it is in force."""
    values = loaded.config.values()
    return [
        SettingValue(key, _plain(setting, values[key]), loaded.sources[key])
        for key, setting in all_settings().items()
    ]


def _plain(setting: Setting, value: Any) -> Any:
    if setting.is_secret:
        # Which hosts have a password is worth knowing; what it is, nobody needs to see.
        return {key: MASK for key in value} if isinstance(value, Mapping) else MASK
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


# -- docs/reference/settings.md ----------------------------------------------------------------

_HEAD = """\
# Settings

<!-- Written by `python -m ollamamax_p2p.config.rendering`; do not edit. -->

A value is taken from, weakest first: its default, the file, the environment, a flag. The file is
the one that `--config` or `OMX_CONFIG` names, else `config.toml` in the data folder. Lists in the
environment are separated by commas, tables written as `key=value,key=value`. An unknown key in the
file, or an unknown variable that begins with `OMX_`, is an error. `omx config show` prints what is
in force and where it came from.
"""


_AGREED_HEAD = """\
## What the whole cluster shares

These are agreed on by the cluster and stand in no file. `omx cluster set` lists them, `omx cluster
set KEY VALUE` changes one, for all nodes at once.

| setting | default | values | meaning |
|---|---|---|---|
"""


def reference_page() -> str:
    """The page, from the settings' own code and docstrings."""
    texts = _docstrings()
    parts = [_HEAD]
    section = None
    for key, setting in all_settings().items():
        if setting.section != section:
            section = setting.section
            parts.append(f"## [{section}]\n" if section else "## Top of the file\n")
        parts.append(_entry(setting, texts[key]))
    rows = [_agreed_row(key, setting) for key, setting in AGREED_SETTINGS.items()]
    parts.append(_AGREED_HEAD + "".join(rows))
    return "\n".join(parts)


def _agreed_row(key: str, setting: AgreedSetting) -> str:
    choices = setting.choices
    if choices is None:
        values = "true, false"
    elif isinstance(choices, range):
        values = f"{choices[0]:,} to {choices[-1]:,}"
    else:
        values = ", ".join(map(str, choices))
    return f"| `{key}` | {str(setting.default).lower()} | {values} | {setting.meaning} |\n"


def _entry(setting: Setting, text: str) -> str:
    return (
        f"### {setting.key}\n\n{text}\n\n"
        f"- default: `{_default_text(setting)}`\n"
        f"- set by: {', '.join(f'`{name}`' for name in _names(setting))}\n"
    )


def _names(setting: Setting) -> list[str]:
    others = (SHORT_VARIABLES, INVERTED_VARIABLES, OTHER_PROGRAMS_VARIABLES, FLAGS)
    return [setting.variable, *(table[setting.key] for table in others if setting.key in table)]


def _default_text(setting: Setting) -> str:
    if setting.key == "name":
        return "the host name"
    value = setting.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        return str(value)
    is_plain = not isinstance(value, tuple | Mapping) and value != ""
    return str(value) if is_plain else json.dumps(_plain(setting, value))


def _docstrings() -> dict[str, str]:
    """The text below each field, by key; Python does not keep it, so it is read from the source."""
    found = _docstrings_of(NodeConfig, "")
    for part, kind in get_type_hints(NodeConfig).items():
        if is_dataclass(kind):
            found |= _docstrings_of(kind, f"{part}.")
    return found


def _docstrings_of(cls: Any, prefix: str) -> dict[str, str]:
    names = {part.name for part in fields(cls)}
    body = _class_body(cls)
    found = {}
    for field, text in pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if field.target.id in names and isinstance(text, ast.Expr):
            found[prefix + field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _class_body(cls: Any) -> list[ast.stmt]:
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))  # type: ignore[arg-type]  # never None here
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return next(node.body for node in classes if node.name == cls.__name__)


if __name__ == "__main__":
    Path("docs/reference/settings.md").write_text(reference_page())

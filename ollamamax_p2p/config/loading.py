"""Loading: defaults < file < environment < flags. An unknown key is an error that names the nearest
known one.

The file is the one given, else `$OMX_CONFIG`, else `config.toml` in the data folder if it is there.
"""

import difflib
import errno
import os
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollamamax_p2p.config.catalogue import (
    FLAGS,
    INVERTED_VARIABLES,
    OTHER_PROGRAMS_VARIABLES,
    OTHER_VARIABLES,
    Setting,
    all_settings,
    sections,
    variable_names,
)
from ollamamax_p2p.config.checks import value_problem
from ollamamax_p2p.config.conversion import Unusable, from_text, from_toml
from ollamamax_p2p.config.node_config import NodeConfig
from ollamamax_p2p.config.ollama_variables import READERS
from ollamamax_p2p.errors import AccessRefused, BadConfig, KeyExposed

CONFIG_FILE_NAME = "config.toml"

CONFIG_BYTES_MAX = 1_000_000
"""Far more than every setting with a comment; a larger file is some other file."""


@dataclass(frozen=True, slots=True)
class _Given:
    """A value for a setting and where it was found."""

    value: Any
    where: str


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config and where each of its values came from."""

    config: NodeConfig
    sources: Mapping[str, str]
    """By key: `default`, a file, a variable or a flag."""
    file: Path | None
    """The file that was read, if there was one."""


def load_config(
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> NodeConfig:
    """The config that this machine's file, its environment and the flags make. Raises BadConfig,
    AccessRefused, KeyExposed.

    flags: values by key (`{"content.models": "/srv/models"}`), text or already typed; None counts
    as not given.
    environment: os.environ unless given.
    file: read instead of `$OMX_CONFIG` or the data folder's config.toml; must exist.
    """
    return load(flags=flags, environment=environment, file=file).config


def load(
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> LoadedConfig:
    """As `load_config`, with the source of every value."""
    variables = os.environ if environment is None else environment
    given_by_flag = _from_flags(flags or {})
    given_by_variable = _from_environment(variables)
    above_file = given_by_variable | given_by_flag
    path, must_exist = _file_to_read(file, variables, above_file)
    given_by_file = _from_file(path, must_exist) if path else {}
    if given_by_file and not must_exist:
        _refuse_circular_data_dir(given_by_file)
    given = _from_other_programs(variables) | given_by_file | above_file
    return LoadedConfig(
        config=_assembled(given),
        sources={key: given[key].where if key in given else "default" for key in all_settings()},
        file=path if given_by_file or must_exist else None,
    )


# -- where values are found --------------------------------------------------------------------


def _from_flags(flags: Mapping[str, Any]) -> dict[str, _Given]:
    found = {}
    for key, value in flags.items():
        if key not in all_settings():
            raise BadConfig(f"flag for {key}", f"no such setting{_nearest(key, all_settings())}")
        if value is not None:
            where = FLAGS.get(key, key)
            found[key] = _converted(all_settings()[key], value, where)
    return found


def _from_environment(variables: Mapping[str, str]) -> dict[str, _Given]:
    """Raises BadConfig for an unknown OMX_ variable. The short name of a setting wins."""
    names = variable_names()
    for variable in sorted(variables):
        known = [*names, *OTHER_VARIABLES]
        if variable.startswith("OMX_") and variable not in known:
            raise BadConfig(variable, f"no such setting{_nearest(variable, known)}")
    found = {}
    for variable, key in names.items():
        if variables.get(variable):  # empty counts as not set, as shells write it
            found[key] = _from_variable(variable, variables[variable], all_settings()[key])
    return found


def _from_variable(variable: str, text: str, setting: Setting) -> _Given:
    given = _converted(setting, text, variable)
    if INVERTED_VARIABLES.get(setting.key) == variable:
        return _Given(not given.value, variable)
    return given


def _from_other_programs(variables: Mapping[str, str]) -> dict[str, _Given]:
    found = {}
    for key, variable in OTHER_PROGRAMS_VARIABLES.items():
        text: str | None = variables.get(variable, "").strip("\"' ")
        if text and variable in READERS:
            text = READERS[variable](text)
        if text:
            found[key] = _converted(all_settings()[key], text, variable)
    return found


def _file_to_read(
    file: Path | None, variables: Mapping[str, str], above_file: Mapping[str, _Given]
) -> tuple[Path | None, bool]:
    """Which file, and whether it must exist."""
    if file is not None:
        return Path(file).expanduser(), True
    if variables.get("OMX_CONFIG"):
        return Path(variables["OMX_CONFIG"]).expanduser(), True
    data_dir = above_file["data_dir"].value if "data_dir" in above_file else NodeConfig().data_dir
    return Path(data_dir).expanduser() / CONFIG_FILE_NAME, False


def _from_file(path: Path, must_exist: bool) -> dict[str, _Given]:
    text = _read(path, must_exist)
    if text is None:
        return {}
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(str(path), f"not TOML: {error}") from None
    given = dict(_entries(document, path))
    _refuse_exposed_secrets(given, path)
    return given


def _read(path: Path, must_exist: bool) -> str | None:
    try:
        data = read_regular_file(path, CONFIG_BYTES_MAX + 1)
    except NotADirectoryError:
        problem = f"{path.parent} is a file, not a folder"
        raise BadConfig(str(path) if must_exist else "--data-dir", problem) from None
    except FileNotFoundError:
        if must_exist:
            raise BadConfig(str(path), "there is no such file") from None
        return None
    except PermissionError:
        raise AccessRefused(str(path), "read") from None
    except OSError as error:
        raise BadConfig(str(path), f"cannot be read ({error.strerror})") from None
    if len(data) > CONFIG_BYTES_MAX:
        raise BadConfig(str(path), f"larger than {CONFIG_BYTES_MAX:,} bytes; is it a config file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadConfig(str(path), f"not UTF-8 at byte {error.start}") from None


def read_regular_file(path: Path, bytes_max: int) -> bytes:
    """The first bytes of a file that somebody named. Raises OSError, also for what is no regular
    file: to open a FIFO would wait for its writer for ever. /dev/null is an empty file.
    """
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and str(path) != os.devnull:
            problem = "Is a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise OSError(errno.EINVAL, problem, str(path))
        return file.read(bytes_max)


def _entries(document: Mapping[str, Any], path: Path) -> Iterator[tuple[str, _Given]]:
    for name, value in document.items():
        if name in sections() and isinstance(value, dict):
            for inner, each in value.items():
                yield _entry(f"{name}.{inner}", each, path, f"{path}: [{name}] {inner}")
        else:
            yield _entry(name, value, path, f"{path}: {name}")


def _entry(key: str, value: Any, path: Path, where: str) -> tuple[str, _Given]:
    setting = all_settings().get(key)
    if setting is None:
        raise BadConfig(where, f"no such setting{_nearest_key(key)}")
    given = _converted(setting, value, where, as_text=False)
    if isinstance(given.value, Path):
        given = _Given(path.parent / given.value.expanduser(), where)
    return key, given


# -- what is found -----------------------------------------------------------------------------


def _converted(setting: Setting, value: Any, where: str, *, as_text: bool = True) -> _Given:
    """The value in its setting's type and range, or BadConfig with the place.

    as_text: a text may stand for a number or a list, as it must in variables and flags.
    """
    convert = from_text if as_text and isinstance(value, str) else from_toml
    try:
        typed = value if isinstance(value, Path) else convert(value, setting.type)
    except Unusable as error:
        raise BadConfig(where, str(error)) from None
    problem = value_problem(setting.key, typed)
    if problem:
        raise BadConfig(where, problem)
    return _Given(typed, where)


def _assembled(given: Mapping[str, _Given]) -> NodeConfig:
    """A NodeConfig of what was given; what was not keeps its default."""
    parts: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, each in given.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else parts)[name] = each.value
    plain = NodeConfig()
    for section, values in nested.items():
        parts[section] = type(getattr(plain, section))(**values)
    try:
        return NodeConfig(**parts)
    except BadConfig as error:  # settings that do not fit each other: say where they were set
        place = given[error.where].where if error.where in given else error.where
        raise BadConfig(place, error.problem) from None


def _refuse_circular_data_dir(given: Mapping[str, _Given]) -> None:
    if "data_dir" in given:
        raise BadConfig(
            given["data_dir"].where,
            "the file is found through the data folder, so it cannot move it; "
            "use --data-dir or OMX_DATA_DIR",
        )


def _refuse_exposed_secrets(given: Mapping[str, _Given], path: Path) -> None:
    secret = any(setting.is_secret and key in given for key, setting in all_settings().items())
    mode = path.stat().st_mode & 0o777
    if secret and mode & 0o077:
        raise KeyExposed(str(path), mode)


def _nearest_key(key: str) -> str:
    """The nearest setting, or the same name in another table."""
    name = key.rpartition(".")[2]
    elsewhere = [each.key for each in all_settings().values() if each.field == name]
    if elsewhere:
        section, _, field = elsewhere[0].rpartition(".")
        return f"; did you mean {field} in [{section}]?" if section else f"; did you mean {field}?"
    return _nearest(key, [*all_settings(), *sections()])


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return "; see `omx config show` for all of them"

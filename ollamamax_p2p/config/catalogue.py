"""Every setting as data: its key, type, and names in files, the environment and flags."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, get_type_hints

from ollamamax_p2p.config.node_config import NodeConfig

SHORT_VARIABLES: Mapping[str, str] = {
    "content.models": "OMX_MODELS",
    "api.listen": "OMX_API",
    "host.listen": "OMX_LISTEN",
    "discovery.bootstrap": "OMX_BOOTSTRAP",
}
"""Names for what is set most often, beside `OMX_<SECTION>_<FIELD>`."""

INVERTED_VARIABLES: Mapping[str, str] = {"discovery.mdns": "OMX_NO_MDNS"}
"""Switches that turn a setting off."""

OTHER_PROGRAMS_VARIABLES: Mapping[str, str] = {
    "content.models": "OLLAMA_MODELS",
    "origin.connections": "OLLAMA_MAX_TRANSFER_STREAMS",
    "api.ollama_listen": "OLLAMA_HOST",
    "api.origins": "OLLAMA_ORIGINS",
    "inference.slots": "OLLAMA_NUM_PARALLEL",
    "inference.context_length": "OLLAMA_CONTEXT_LENGTH",
    "inference.keep_alive_s": "OLLAMA_KEEP_ALIVE",
    "inference.load_timeout_s": "OLLAMA_LOAD_TIMEOUT",
    "router.queue_max": "OLLAMA_MAX_QUEUE",
}
"""Asked last: what the user has told Ollama already."""

OTHER_VARIABLES = ("OMX_CONFIG", "OMX_DEBUG", "OMX_LOG")
"""Ours, but no settings: where the file is, whether errors show their traceback, whose logs are
shown.
"""

FLAGS: Mapping[str, str] = {
    "data_dir": "--data-dir",
    "name": "--name",
    "open_swarm": "--open",
    "content.models": "--models",
    "api.listen": "--api",
    "host.listen": "--listen",
    "discovery.bootstrap": "--bootstrap",
    "discovery.mdns": "--no-mdns",
    "cluster.region": "--region",
    "cluster.voter": "--voter",
    "api.ollama_listen": "--ollama-port",
}
"""The flags that `omx` has for settings."""

SECRETS = frozenset({"origin.credentials", "inference.openai_keys"})
"""Never shown."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting."""

    key: str
    """Its path in NodeConfig: `transfer.upload_slots`."""
    type: Any
    default: Any

    @property
    def section(self) -> str:
        """The TOML table it stands in; "" for the top."""
        return self.key.rpartition(".")[0]

    @property
    def field(self) -> str:
        """Its name in that table."""
        return self.key.rpartition(".")[2]

    @property
    def variable(self) -> str:
        """Its environment variable: `OMX_TRANSFER_UPLOAD_SLOTS`."""
        return "OMX_" + self.key.replace(".", "_").upper()

    @property
    def is_secret(self) -> bool:
        """Whether its value must not be shown."""
        return self.key in SECRETS


@lru_cache(maxsize=1)
def all_settings() -> Mapping[str, Setting]:
    """Every setting by key, in the order of NodeConfig."""
    hints = get_type_hints(NodeConfig)
    found: dict[str, Setting] = {}
    for part in fields(NodeConfig):
        section = hints[part.name]
        if not is_dataclass(section):
            found[part.name] = Setting(part.name, section, _default(part))
            continue
        inner = get_type_hints(section)
        for each in fields(section):
            key = f"{part.name}.{each.name}"
            found[key] = Setting(key, inner[each.name], _default(each))
    return found


def sections() -> list[str]:
    """The TOML tables there are."""
    return list(dict.fromkeys(each.section for each in all_settings().values() if each.section))


def variable_names() -> Mapping[str, str]:
    """Every environment variable that sets something, with the key it sets; long names first."""
    names = {setting.variable: key for key, setting in all_settings().items()}
    for short in (SHORT_VARIABLES, INVERTED_VARIABLES):
        names |= {variable: key for key, variable in short.items()}
    return names


def _default(part: "Field[Any]") -> Any:
    if part.default is not MISSING:
        return part.default
    assert part.default_factory is not MISSING, f"setting {part.name} has no default"
    return part.default_factory()

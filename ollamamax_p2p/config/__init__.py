"""What an operator sets: one frozen NodeConfig, loaded from defaults, file, environment and flags.
Opens nothing and starts nothing. Start at `node_config`, then `loading`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ollamamax_p2p.config.catalogue import FLAGS, Setting, all_settings
    from ollamamax_p2p.config.loading import LoadedConfig, load, load_config, read_regular_file
    from ollamamax_p2p.config.node_config import NodeConfig
    from ollamamax_p2p.config.rendering import SettingValue, effective

_HOMES = {
    "FLAGS": "catalogue",
    "LoadedConfig": "loading",
    "NodeConfig": "node_config",
    "Setting": "catalogue",
    "SettingValue": "rendering",
    "all_settings": "catalogue",
    "effective": "rendering",
    "load": "loading",
    "load_config": "loading",
    "read_regular_file": "loading",
}

__all__ = [
    "FLAGS",
    "LoadedConfig",
    "NodeConfig",
    "Setting",
    "SettingValue",
    "all_settings",
    "effective",
    "load",
    "load_config",
    "read_regular_file",
]


def __getattr__(name: str) -> Any:
    """Load a name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

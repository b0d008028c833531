"""NodeConfig: everything that an operator can set, made of each package's own settings."""

import socket
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from ollamamax_p2p.api import ApiSettings
from ollamamax_p2p.cluster import ClusterSettings
from ollamamax_p2p.config.checks import NAME_CHARS_MAX, first_problem
from ollamamax_p2p.config.conversion import Unusable, from_toml
from ollamamax_p2p.consensus import ConsensusSettings
from ollamamax_p2p.content import ContentSettings
from ollamamax_p2p.discovery import DiscoverySettings
from ollamamax_p2p.errors import BadConfig
from ollamamax_p2p.host import HostSettings
from ollamamax_p2p.inference import InferenceSettings
from ollamamax_p2p.router import RouterSettings
from ollamamax_p2p.transfer import OriginSettings, TransferSettings


def _host_name() -> str:
    return socket.gethostname()[:NAME_CHARS_MAX] or "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """All settings of one node. Raises BadConfig for a value that cannot be used; `~` is expanded.

    A setting's key is its path in here: `transfer.upload_slots`.
    """

    data_dir: Path = Path("~/.omx")
    """The node's own folder: key, swarm, API token, chunk maps, config.toml. Not the models."""

    name: str = field(default_factory=_host_name)
    """What peers are shown; the machine's host name unless set. 64 characters at most."""

    open_swarm: bool = False
    """Make a swarm without a key, which everybody may connect to; for public models."""

    host: HostSettings = field(default_factory=HostSettings)
    content: ContentSettings = field(default_factory=ContentSettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    origin: OriginSettings = field(default_factory=OriginSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    consensus: ConsensusSettings = field(default_factory=ConsensusSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    api: ApiSettings = field(default_factory=ApiSettings)

    def __post_init__(self) -> None:
        self._check_types()
        # Frozen, so by the back door: a path with ~ in it must not reach the file system.
        models = replace(self.content, models=_absolute(self.content.models))
        object.__setattr__(self, "data_dir", _absolute(self.data_dir))
        object.__setattr__(self, "content", models)
        found = first_problem(self.values())
        if found:
            raise BadConfig(*found)

    def _check_types(self) -> None:
        """A value of another type would be found far from here, by whoever uses it first."""
        for part in fields(self):
            if part.name in _SECTIONS and not isinstance(
                getattr(self, part.name), _SECTIONS[part.name]
            ):
                raise BadConfig(part.name, f"expected {_SECTIONS[part.name].__name__}")
        for key, value in self.values().items():
            try:
                if not isinstance(value, Path):
                    from_toml(value, _types()[key])
            except Unusable as error:
                raise BadConfig(key, str(error)) from None

    def values(self) -> dict[str, Any]:
        """Every setting's value by key, in the order of the fields."""
        found: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if not is_dataclass(value):
                found[part.name] = value
                continue
            inner = {each.name: getattr(value, each.name) for each in fields(value)}
            found |= {f"{part.name}.{name}": each for name, each in inner.items()}
        return found


_SECTIONS: dict[str, type] = {
    "host": HostSettings,
    "content": ContentSettings,
    "discovery": DiscoverySettings,
    "transfer": TransferSettings,
    "origin": OriginSettings,
    "cluster": ClusterSettings,
    "consensus": ConsensusSettings,
    "inference": InferenceSettings,
    "router": RouterSettings,
    "api": ApiSettings,
}


@lru_cache(maxsize=1)
def _types() -> dict[str, Any]:
    """Every setting's declared type by key."""
    found = dict(get_type_hints(NodeConfig))
    for name, section in _SECTIONS.items():
        found |= {f"{name}.{key}": each for key, each in get_type_hints(section).items()}
    return found


def _absolute(path: Path) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # no home folder is known
        raise BadConfig(str(path), f"cannot be expanded ({error}); give a whole path") from None

"""What an operator sets about moving blobs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

MiB = 1024 * 1024

KNOWN_TOKEN_HOSTS: Mapping[str, str] = MappingProxyType(
    {
        # Both registries hand out tokens under their other name; stock Ollama's strict rule
        # refuses that (its issues 15661 and 17361).
        "registry.ollama.ai": "ollama.com",
        "hf.co": "huggingface.co",
    }
)
"""Registries whose token service is known to live on another host of the same owner; an entry of
`OriginSettings.token_hosts` takes precedence.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings:
    """How this node downloads and serves blobs."""

    upload_slots: int = 8
    """How many peers are served at once; the rest wait their turn, fairly."""

    upload_rotation_s: float = 10.0
    """A waiting peer gets the slot of the one that has had its slot longest after this time."""

    sources_max: int = 16
    """Peers asked at once for one blob; more did not fill a link any faster in simulation."""

    requests_in_flight_bytes: int = 8 * MiB
    """Most that is asked of one peer and not yet there: this bounds memory and what a kill -9
    loses.
    """

    in_flight_bytes_max: int = 64 * MiB
    """The same over all peers of one download, so that many peers with large chunks do not cost
    memory without end.
    """

    stall_timeout_s: float = 20.0
    """A source that sends nothing for this long loses its requests to another."""

    stall_strikes: int = 3
    """A source that stalled this often is left alone for the rest of the download."""

    find_interval_s: float = 5.0
    """How often new sources are looked for while a download runs."""

    give_up_after_s: float = 60.0
    """A download with no source at all for this long ends with NoSources; what is there is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginSettings:
    """How registries on the internet are used."""

    enabled: bool = True
    """Ask an origin for what no peer holds."""

    insecure: tuple[str, ...] = ()
    """host[:port] of registries that may be spoken to by plain http."""

    allow_private: tuple[str, ...] = ()
    """host[:port] of registries that may resolve to a private or loopback address."""

    connections: int = 4
    """Ranges fetched at once from one origin; more is rude and, past the link's rate, useless."""

    # Kept out of repr(), so that no log and no traceback of a caller shows a password.
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """user:password by registry host[:port]; sent to that host and its `token_hosts` only, and
    never shown.
    """

    token_hosts: Mapping[str, str] = field(default_factory=dict)
    """By registry host[:port]: the other host[:port] whose token service may be sent its
    credentials and this node's signature. A registry's own host needs no entry; those of
    registry.ollama.ai and hf.co are known.
    """

    answer_timeout_s: float = 30.0
    """From a request to the end of its answer's head: name look-up, connection, TLS, waiting."""

    stall_timeout_s: float = 20.0
    """An answer that brings nothing for this long is given up and asked for again."""

    slowest_bytes_per_s: int = 1024
    """An answer slower than this over stall_timeout_s counts as stalled: a drip would otherwise
    hold a range for days.
    """

    tries: int = 5
    """How often a manifest or a range is asked for before the origin counts as unavailable."""

    backoff_first_s: float = 0.5
    """Wait before the second try; doubles with each, give or take half."""

    backoff_max_s: float = 10.0
    """Longest wait between tries, unless the registry asks for more."""

    retry_after_max_s: float = 60.0
    """A registry that asks for a longer pause than this is given up at once."""

    redirects_max: int = 5
    """Redirects followed for one request; Ollama's registry and hf.co need one or two."""

"""What an operator sets about moving blobs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MiB = 1024 * 1024


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

    credentials: Mapping[str, str] = field(default_factory=dict)
    """user:password by registry host; sent to that host only and never shown."""

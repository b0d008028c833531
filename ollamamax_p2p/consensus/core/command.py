"""Command: one committed entry as a state machine sees it."""

import msgspec

from ollamamax_p2p.consensus.core.messages import ConfState


class Command(msgspec.Struct, frozen=True, gc=False):
    """One committed entry."""

    index: int
    term: int
    data: bytes
    """Empty if it is only a change of configuration, or a leader's first entry."""
    session: int = 0
    """See `sessions`: the state machine keeps the table, in the same transaction."""
    sequence: int = 0
    opens_session: bool = False
    conf_state: ConfState | None = None
    """Set if the entry changed the configuration: the one in force from here on."""

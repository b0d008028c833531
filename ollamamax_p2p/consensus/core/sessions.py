"""Exactly once: a command that is proposed twice is applied once.

A client opens a session with a committed command; its id is that entry's index, so nobody chooses
it and none is ever used again. Each further command carries the id and a sequence number that grows
by one. The table of sessions is a part of the replicated state: a command whose number has been
seen is not applied again, its remembered result is given instead. Source: Ongaro's thesis, 6.3.

Unlike there, a session may have SESSION_WINDOW commands on their way at once, in any order: that
many results are remembered. A client therefore begins number n only when all up to n minus the
window are finished; `SessionPool` sees to it, and takes a second session where one is too narrow.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

SESSIONS_MAX = 1_024
"""Open at once; the one that was used longest ago ends when one more is opened."""

SESSION_WINDOW = 64
"""Commands of one session whose results are remembered."""

SESSION_ENDED = b"\xff\x00session ended"
"""The result of a command whose session is not in the table (any more): it was not applied now."""

SEQUENCE_FORGOTTEN = b"\xff\x00sequence forgotten"
"""The result of a command so old that nobody knows any more whether it was applied."""


class Proposal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the data of a normal entry is: a command and whose it is."""

    session: Annotated[int, Meta(ge=0)]
    """The client's session; 0: none, then the command may be applied twice if it is proposed
    twice. A proposal without data opens a session: its result is the id, 8 bytes big-endian."""
    sequence: Annotated[int, Meta(ge=0)]
    """1 for the first command of a session."""
    request: Annotated[bytes, Meta(max_length=16)]
    """By which the replica that proposed it finds who waits; tells the state machine nothing."""
    data: bytes


_decoder = msgspec.msgpack.Decoder(Proposal)
_encoder = msgspec.msgpack.Encoder()


def encode_proposal(proposal: Proposal) -> bytes:
    """As an entry's data."""
    return _encoder.encode(proposal)


def decode_proposal(data: bytes) -> Proposal:
    """Raises ValueError (msgspec's) if it is none: every replica refuses it alike."""
    return _decoder.decode(data)


# -- the replicated side -----------------------------------------------------------------------


class SessionRow(msgspec.Struct, array_like=True):
    """One session, as a snapshot holds it."""

    used: int
    """The index of its last command."""
    forgotten: int = 0
    """Sequence numbers up to this are answered no more."""
    results: dict[int, bytes] = {}  # msgspec copies it for each row


class SessionTable:
    """The sessions of a state machine that lives in RAM. Everything follows from its calls."""

    def __init__(self, rows: dict[int, SessionRow] | None = None) -> None:
        self.rows = {} if rows is None else rows
        """By session id; the one used longest ago comes first."""

    def open(self, index: int) -> bytes:
        """A new session at this entry: its id, 8 bytes big-endian."""
        if len(self.rows) >= SESSIONS_MAX:
            del self.rows[next(iter(self.rows))]
        self.rows[index] = SessionRow(index)
        return index.to_bytes(8, "big")

    def once(self, session: int, sequence: int, index: int, apply: Callable[[], bytes]) -> bytes:
        """The remembered result of a command, or that of applying it now."""
        row = self.rows.pop(session, None)
        if row is None:
            return SESSION_ENDED
        self.rows[session] = row  # behind all others
        row.used = index
        if sequence <= row.forgotten:
            return SEQUENCE_FORGOTTEN
        if sequence not in row.results:
            row.results[sequence] = apply()
            self._forget(row, sequence - SESSION_WINDOW)
        return row.results[sequence]

    def _forget(self, row: SessionRow, up_to: int) -> None:
        if up_to > row.forgotten:
            row.forgotten = up_to
            for old in [number for number in row.results if number <= up_to]:
                del row.results[old]


# -- the client's side -------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class ClientSession:
    """One open session as its client sees it."""

    id: int
    next_sequence: int = 1
    unfinished: dict[int, None] = field(default_factory=dict)
    """Sequence numbers, ascending."""
    ended: bool = False

    @property
    def has_room(self) -> bool:
        """Whether one more command can begin without making the oldest unfinished forgotten."""
        oldest = next(iter(self.unfinished), self.next_sequence)
        return self.next_sequence - oldest < SESSION_WINDOW

    def begin(self) -> int:
        """The sequence number for one more command."""
        sequence = self.next_sequence
        self.next_sequence += 1
        self.unfinished[sequence] = None
        return sequence

    def finish(self, sequence: int) -> None:
        """It was answered, or nobody waits for it any more."""
        self.unfinished.pop(sequence, None)


class SessionPool:
    """The sessions of one client that has many commands on their way. Not for several threads."""

    def __init__(self, *, sessions_max: int) -> None:
        """sessions_max: each is good for SESSION_WINDOW commands at once."""
        self._sessions: list[ClientSession] = []
        self._max = sessions_max

    def with_room(self) -> ClientSession | None:
        """The first session that can take a command: so few are used that the table forgets none
        that somebody needs.
        """
        return next((each for each in self._sessions if each.has_room), None)

    @property
    def may_grow(self) -> bool:
        """Whether one more may be opened."""
        return len(self._sessions) < self._max

    def add(self, session_id: int) -> ClientSession:
        """A session that has been opened."""
        session = ClientSession(session_id)
        self._sessions.append(session)
        return session

    def end(self, session: ClientSession) -> None:
        """The table does not know it any more."""
        if not session.ended:
            session.ended = True
            self._sessions.remove(session)

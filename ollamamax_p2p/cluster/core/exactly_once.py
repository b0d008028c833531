"""Sessions: a command that comes twice is carried out once, and answered alike.

Each session remembers the results of its last 64 sequence numbers, so a client may have that many
commands on their way at once and in any order. Source: Ongaro's thesis, 6.3.
"""

from collections.abc import Callable

from msgspec.structs import replace

from ollamamax_p2p.cluster.core.commands import Result, encode_result, refused
from ollamamax_p2p.cluster.core.rows import LIMITS, RememberedResult, Session, Tables
from ollamamax_p2p.consensus.core.sessions import SESSIONS_MAX

RESULTS_PER_SESSION = LIMITS[RememberedResult] // SESSIONS_MAX

_SEQUENCE_MAX = 2**62


def open_session(index: int, tables: Tables) -> bytes:
    """A new session; its id, which is the entry's index, as 8 bytes. The one unused for longest
    ends if there are too many.
    """
    if tables.count(Session) >= SESSIONS_MAX:
        _, oldest = min((row.used, key) for key, row in tables.items(Session))
        tables.delete(Session, oldest)
        for key, _ in tables.items(RememberedResult, f"{oldest}/"):
            tables.delete(RememberedResult, key)
    tables.put(_number(index), Session(used=index))
    return index.to_bytes(8, "big")


def once(
    session: int, sequence: int, index: int, tables: Tables, carry_out: Callable[[], Result]
) -> bytes:
    """The result of a session's command: remembered, or of carrying it out now."""
    row = tables.get(Session, _number(session))
    if row is None:
        return encode_result(refused("session_ended", "the session has ended; open a new one"))
    if not row.forgotten < sequence <= _SEQUENCE_MAX:
        return encode_result(
            refused("sequence", "this command of the session was answered too long ago")
        )
    key = f"{_number(session)}/{_number(sequence)}"
    known = tables.get(RememberedResult, key)
    if known is not None:
        tables.put(_number(session), replace(row, used=index))
        return known.result
    result = encode_result(carry_out())
    tables.put(key, RememberedResult(result))
    forgotten = max(row.forgotten, sequence - RESULTS_PER_SESSION)
    last = min(forgotten, row.forgotten + RESULTS_PER_SESSION)
    for old in range(row.forgotten + 1, last + 1):
        tables.delete(RememberedResult, f"{_number(session)}/{_number(old)}")
    tables.put(_number(session), Session(used=index, forgotten=forgotten))
    return result


def _number(value: int) -> str:
    return f"{value:020d}"

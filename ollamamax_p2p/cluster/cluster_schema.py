"""The database's tables, and what makes a database one of ours.

One table per kind of row, key and row as text (JSON, so that the sqlite3 program can be asked:
`select key, row ->> 'manifest' from tag`), and one row of facts about the whole. A snapshot is such
a database too, and comes from another member: nothing in it is believed before it has been checked.
"""

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec

from ollamamax_p2p.cluster.core.rows import (
    AgreedSetting,
    ChunkMapOf,
    Clock,
    Copies,
    Holding,
    HoldingCount,
    IssuedTicket,
    Lease,
    Member,
    Pinned,
    R,
    RememberedResult,
    Row,
    Session,
    Swarm,
    Tag,
)
from ollamamax_p2p.consensus.core.messages import ConfState
from ollamamax_p2p.content.durable_files import free_bytes
from ollamamax_p2p.errors import (
    AccessRefused,
    LocalTrouble,
    StoreDamaged,
    StoreFull,
    StoreReadOnly,
)

SCHEMA_VERSION = 1
APPLICATION_ID = 0x6F6D7831
"""`omx1`: by which `file` and people tell what this database is."""

TABLES: dict[type[Row], str] = {
    Swarm: "swarm",
    Clock: "clock",
    Member: "member",
    IssuedTicket: "ticket",
    Tag: "tag",
    ChunkMapOf: "chunk_map",
    Holding: "holding",
    HoldingCount: "holding_count",
    Copies: "copies",
    Pinned: "pinned",
    Lease: "lease",
    AgreedSetting: "setting",
    Session: "session",
    RememberedResult: "remembered_result",
}

OF_PEER_CHARS = 53
"""A peer id and "/": what stands before the digest or name in the keys of Holding and Pinned."""

_FACTS = """CREATE TABLE facts (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    applied_index INTEGER NOT NULL,
    applied_term INTEGER NOT NULL,
    conf_state BLOB NOT NULL,
    rows_hash BLOB NOT NULL,
    durable_index INTEGER NOT NULL
) STRICT"""

_SCHEMA = [
    _FACTS,
    *(
        f"CREATE TABLE {name} (key TEXT PRIMARY KEY, row TEXT NOT NULL) STRICT, WITHOUT ROWID"
        for name in TABLES.values()
    ),
    *(
        f"CREATE INDEX {name}_by_thing ON {name} (substr(key, {OF_PEER_CHARS + 1}))"
        for name in ("holding", "pinned")
    ),
]

MEND = "restore it from a backup, or remove this node from the cluster and join anew"
"""What to do about a database that can't be read. Not: delete it, and let a snapshot come. The log
may begin behind a snapshot that went with it, and a cluster of one would lose everything.
"""

_LITTLE_BYTES = 1024 * 1024
"""Free room with which SQLite can't be expected to get on."""

_decoders = {kind: msgspec.json.Decoder(kind) for kind in TABLES}
_conf_states = msgspec.msgpack.Decoder(ConfState)


class Facts(msgspec.Struct, frozen=True):
    """The one row about the whole."""

    applied_index: int = 0
    applied_term: int = 0
    conf_state: ConfState = ConfState()
    rows_hash: int = 0
    """The sum of all rows' hashes, mod 2**256: in whatever order they came."""


# -- rows --------------------------------------------------------------------------------------


def encode_row(row: Row) -> str:
    """Its one encoding."""
    return msgspec.json.encode(row).decode()


def row_hash(table: str, key: str, text: str) -> int:
    """256 bits."""
    return int.from_bytes(hashlib.sha256(f"{table}\0{key}\0{text}".encode()).digest(), "big")


def decode_row(kind: type[R], text: str) -> R:
    """Raises ValueError."""
    return cast("R", _decoders[kind].decode(text))


def all_rows(connection: sqlite3.Connection, kind: type[Row]) -> Iterator[tuple[str, str]]:
    """Keys and texts, ascending by key."""
    return connection.execute(f"SELECT key, row FROM {TABLES[kind]} ORDER BY key")


# -- facts -------------------------------------------------------------------------------------


def read_facts(connection: sqlite3.Connection) -> Facts:
    """Raises ValueError or TypeError if they are not sensible."""
    rows = connection.execute(
        "SELECT applied_index, applied_term, conf_state, rows_hash FROM facts"
    ).fetchall()
    if len(rows) != 1:
        raise ValueError("it lacks its facts")
    index, term, conf_state, rows_hash = rows[0]
    if index < 0 or term < 0 or len(rows_hash) != 32:
        raise ValueError("its facts make no sense")
    return Facts(index, term, _conf_states.decode(conf_state), int.from_bytes(rows_hash, "big"))


def write_facts(connection: sqlite3.Connection, facts: Facts) -> None:
    """In the transaction that is open."""
    connection.execute(
        "UPDATE facts SET applied_index = ?, applied_term = ?, conf_state = ?, rows_hash = ?",
        (
            facts.applied_index,
            facts.applied_term,
            msgspec.msgpack.encode(facts.conf_state),
            facts.rows_hash.to_bytes(32, "big"),
        ),
    )


# -- databases ---------------------------------------------------------------------------------


def create(connection: sqlite3.Connection) -> None:
    """Make an empty database ours, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute(
        "INSERT INTO facts VALUES (1, 0, 0, ?, ?, 0)",
        (msgspec.msgpack.encode(ConfState()), bytes(32)),
    )
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def is_new(connection: sqlite3.Connection) -> bool:
    """Whether nothing was ever made in it."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    count = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(version == 0 and count == 0)


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """That it is ours, whole, and holds nothing else: no trigger, no view, no other index. Raises
    StoreDamaged.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreDamaged(
            str(path),
            f"written by a newer omx (schema {version}, this one reads {SCHEMA_VERSION}); "
            "upgrade omx on this node",
        )
    found = {
        sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
    }
    if version != SCHEMA_VERSION or found != set(_SCHEMA):
        raise StoreDamaged(str(path), f"not a database of the agreed state; {MEND}")
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise StoreDamaged(str(path), f"the database is damaged; {MEND}")


def size_of(connection: sqlite3.Connection) -> int:
    """How long its file should be, in bytes."""
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    return int(pages * connection.execute("PRAGMA page_size").fetchone()[0])


def connect(path: Path, *, cache_bytes: int) -> sqlite3.Connection:
    """To a file that may be missing, with nothing in it trusted; made readable by this user only.

    Threads may take turns with it.
    """
    # Made before SQLite does, so that there is no moment in which others could open it; the files
    # that SQLite puts beside it get the same mode.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    _harden(connection, cache_bytes)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    # What one big batch made of SQLite's own log is given back to the disk.
    connection.execute(f"PRAGMA journal_size_limit = {16 * 1024 * 1024}")
    return connection


def connect_read_only(path: Path) -> sqlite3.Connection:
    """To a finished file that nobody writes: no lock, no journal is looked at."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro&immutable=1",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
    )
    _harden(connection, 2 * 1024 * 1024)
    return connection


def _harden(connection: sqlite3.Connection, cache_bytes: int) -> None:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute(f"PRAGMA cache_size = -{cache_bytes // 1024}")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 1)  # VACUUM INTO takes one
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 16 * 1024 * 1024)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about the disk into the LocalTrouble that names them."""
    try:
        yield
    except sqlite3.Error as error:
        raise _named(error, path) from error


def _named(error: sqlite3.Error, path: Path) -> LocalTrouble:
    # The low byte is the kind; above it are details.
    kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    free = free_bytes(path.parent)
    if kind == sqlite3.SQLITE_IOERR and free < _LITTLE_BYTES:
        # Its shared memory is a file too, and does not say so when there is no room for it.
        kind = sqlite3.SQLITE_FULL
    match kind:
        case sqlite3.SQLITE_FULL:
            return StoreFull(str(path.parent), _LITTLE_BYTES, free)
        case sqlite3.SQLITE_READONLY:
            return StoreReadOnly(str(path.parent))
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return AccessRefused(str(path), "open")
        case sqlite3.SQLITE_IOERR:
            return StoreDamaged(str(path), "the disk reports an error; check it")
        case _:
            return StoreDamaged(
                str(path),
                f"the database cannot be read ({error}); {MEND}",
            )

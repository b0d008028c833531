"""ClusterState: what the cluster has agreed on, kept in SQLite; consensus's StateMachine.

The rules are in `core.rules`; here is where their rows live and how they outlive a power cut.

**Durability.** A batch is one transaction, `applied_index` and the configuration included, in WAL
mode with synchronous=NORMAL: a power cut may take the last transactions away, never a part of one
and never one in between. Why that is enough: only entries that are durable in this node's Raft log
are applied (the replica sees to it), so the database is never ahead of the log; and whatever it
loses is applied again from the log, beginning behind `applied_index`. That would fail if the log
had dropped those entries. It drops none that no snapshot covers, and before `make_snapshot` returns
the database is durable up to the index of the snapshot. What a snapshot installs is durable before
the log begins anew behind it.

**Reads** see what has been applied here. Those about members are answered from RAM; the others take
microseconds, but `tags`, `holdings` and `verified_hash` grow with the state: call them in a thread.
"""

import contextlib
import hashlib
import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec

from ollamamax_p2p.cluster import cluster_schema as schema
from ollamamax_p2p.cluster.cluster_schema import Facts, named_errors
from ollamamax_p2p.cluster.core.agreed_settings import AgreedSettings, agreed_settings
from ollamamax_p2p.cluster.core.commands import encode_result
from ollamamax_p2p.cluster.core.exactly_once import once, open_session
from ollamamax_p2p.cluster.core.rows import (
    LIMITS,
    AgreedSetting,
    ChunkMapOf,
    Clock,
    Copies,
    IssuedTicket,
    Lease,
    Member,
    R,
    Row,
    Session,
    Swarm,
    Tag,
)
from ollamamax_p2p.cluster.core.rules import Place, carry_out
from ollamamax_p2p.cluster.settings import ClusterStateSettings
from ollamamax_p2p.cluster.state_snapshots import (
    Offer,
    PartialSnapshot,
    StateSnapshots,
    StoredSnapshot,
)
from ollamamax_p2p.consensus import Command
from ollamamax_p2p.consensus.core.messages import ConfState, SnapshotMetadata
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.content.durable_files import make_folder, translated
from ollamamax_p2p.errors import StoreDamaged
from ollamamax_p2p.identity import PeerId

_DATABASE = "state.db"
_HASH_SPACE = 2**256

_IN_RAM: tuple[type[Row], ...] = (
    Swarm,
    Clock,
    Member,
    IssuedTicket,
    Lease,
    AgreedSetting,
    Session,
)
"""Kinds of which there are few and that are asked for all the time."""


@dataclass(frozen=True, slots=True)
class TicketsSummary:
    """What may be told of the tickets: never which."""

    alive: int
    uses_left: int
    next_expiry: int | None
    """Unix seconds; None if none is alive."""


class _SqlTables:
    """`core.rows.Tables` over a connection, with what was changed since the last flush in RAM.

    Within one transaction: `flush` writes the changes, `reload` forgets them.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def reload(self, rows_hash: int) -> None:
        """Begin anew from what the database holds."""
        self.rows_hash = rows_hash
        self.changed: set[type[Row]] = set(schema.TABLES)
        self._waiting: dict[type[Row], dict[str, str | None]] = {k: {} for k in schema.TABLES}
        self._counts = {kind: self._count(name) for kind, name in schema.TABLES.items()}
        self._cached = {kind: self._load(kind) for kind in _IN_RAM}

    def _count(self, name: str) -> int:
        return int(self._connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0])

    def _load(self, kind: type[Row]) -> dict[str, Row]:
        rows = schema.all_rows(self._connection, kind)
        return {key: schema.decode_row(kind, text) for key, text in rows}

    def cached(self, kind: type[R]) -> dict[str, R]:
        """All rows of a kind that is kept in RAM, to be copied by who keeps them."""
        return cast("dict[str, R]", self._cached[kind])

    def get(self, kind: type[R], key: str) -> R | None:
        """None if there is none."""
        if kind in self._cached:
            return self.cached(kind).get(key)
        text = self._text(kind, key)
        return None if text is None else schema.decode_row(kind, text)

    def put(self, key: str, row: Row) -> None:
        """Add or replace it."""
        self._replace(type(row), key, schema.encode_row(row))
        if type(row) in self._cached:
            self._cached[type(row)][key] = row

    def delete(self, kind: type[Row], key: str) -> None:
        """Remove it if it is there."""
        self._replace(kind, key, None)
        if kind in self._cached:
            self._cached[kind].pop(key, None)

    def count(self, kind: type[Row]) -> int:
        """How many there are."""
        return self._counts[kind]

    def items(self, kind: type[R], prefix: str = "") -> list[tuple[str, R]]:
        """Those whose key begins so, ascending by key."""
        if kind in self._cached:
            rows = self.cached(kind)
            return [(key, rows[key]) for key in sorted(rows) if key.startswith(prefix)]
        self.flush()
        # Every key is below its prefix followed by the greatest character of all.
        found = self._connection.execute(
            f"SELECT key, row FROM {schema.TABLES[kind]} WHERE key >= ? AND key < ? ORDER BY key",
            (prefix, prefix + "\U0010ffff"),
        )
        return [(key, schema.decode_row(kind, text)) for key, text in found]

    def flush(self) -> None:
        """Write what was changed."""
        for kind, changes in self._waiting.items():
            if not changes:
                continue
            table = schema.TABLES[kind]
            gone = [(key,) for key, text in changes.items() if text is None]
            here = [(key, text) for key, text in changes.items() if text is not None]
            self._connection.executemany(f"DELETE FROM {table} WHERE key = ?", gone)
            self._connection.executemany(
                f"INSERT INTO {table} VALUES (?, ?) "
                "ON CONFLICT (key) DO UPDATE SET row = excluded.row",
                here,
            )
            changes.clear()

    def _text(self, kind: type[Row], key: str) -> str | None:
        waiting = self._waiting[kind]
        if key in waiting:
            return waiting[key]
        row = self._connection.execute(
            f"SELECT row FROM {schema.TABLES[kind]} WHERE key = ?",
            (key,),
        ).fetchone()
        return None if row is None else str(row[0])

    def _before(self, kind: type[Row], key: str) -> str | None:
        if kind in self._cached:
            row = self._cached[kind].get(key)
            return None if row is None else schema.encode_row(row)
        return self._text(kind, key)

    def _replace(self, kind: type[Row], key: str, text: str | None) -> None:
        table, before = schema.TABLES[kind], self._before(kind, key)
        if before == text:
            return
        change = 0
        if before is not None:
            change -= schema.row_hash(table, key, before)
            self._counts[kind] -= 1
        if text is not None:
            change += schema.row_hash(table, key, text)
            self._counts[kind] += 1
        self.rows_hash = (self.rows_hash + change) % _HASH_SPACE
        self._waiting[kind][key] = text
        self.changed.add(kind)


@dataclass(frozen=True, slots=True)
class _View:
    """What is asked of RAM, by any thread; replaced as a whole."""

    members: Mapping[PeerId, Member] = field(default_factory=dict)
    peers: frozenset[PeerId] = frozenset()
    raft_ids: Mapping[int, PeerId] = field(default_factory=dict)
    leases: Mapping[str, Lease] = field(default_factory=dict)
    tickets: tuple[IssuedTicket, ...] = ()
    swarm: Swarm | None = None
    clock: int = 0
    settings: AgreedSettings = AgreedSettings()  # noqa: RUF009 - it is frozen


class ClusterState:
    """The agreed state on this node. Made by `open_cluster_state`.

    The methods of StateMachine block: call them in a thread. Those that write take turns, but for
    `make_snapshot`, which holds up nobody for longer than one disk write. Reads: by any thread at
    any time.
    """

    def __init__(self, folder: Path, settings: ClusterStateSettings) -> None:
        self._path = folder / _DATABASE
        self._settings = settings
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._version = 0
        self._view = _View()
        self._snapshots = StateSnapshots(folder / "snapshots", settings)
        with named_errors(self._path), translated(self._path, "open"):
            self._connection = self._opened()
            self._reader = schema.connect(self._path, cache_bytes=settings.page_cache_bytes)
            self._reader.execute("PRAGMA query_only = ON")
        self._finish_install()

    def _opened(self) -> sqlite3.Connection:
        connection = schema.connect(self._path, cache_bytes=self._settings.page_cache_bytes)
        try:
            if schema.is_new(connection):
                schema.create(connection)
            schema.check_schema(connection, self._path)
            page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
            pages = self._settings.database_bytes_max // page_bytes
            connection.execute(f"PRAGMA max_page_count = {pages}")
            self._tables = _SqlTables(connection)
            self._take(schema.read_facts(connection))
        except (ValueError, TypeError) as error:
            connection.close()
            raise StoreDamaged(str(self._path), f"{error}; {schema.MEND}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _take(self, facts: Facts) -> None:
        """Be as the database says, in RAM too."""
        self.applied_index = facts.applied_index
        self.applied_term = facts.applied_term
        self.conf_state = facts.conf_state
        self._tables.reload(facts.rows_hash)
        self._show()

    # -- the state machine ---------------------------------------------------------------------

    applied_index: int
    """The last command in the state."""
    applied_term: int
    """That command's term."""
    conf_state: ConfState
    """The configuration after it."""

    def apply(self, commands: Sequence[Command]) -> list[bytes]:
        """Apply them in order and in one transaction; one result each (`decode_result`), b"" for
        one without data that opens no session.

        Raises StoreFull or StoreDamaged: nothing has been applied then. ValueError if the commands
        are not behind what is applied: a bug of the caller's.
        """
        with self._writing:
            return self._apply(commands) if commands else []

    def _apply(self, commands: Sequence[Command]) -> list[bytes]:
        indexes = [self.applied_index, *(command.index for command in commands)]
        if any(later <= earlier for earlier, later in itertools.pairwise(indexes)):
            raise ValueError(f"entries up to {self.applied_index} have been applied")
        with self._transaction():
            conf_state, results = self.conf_state, []
            for command in commands:
                results.append(self._apply_one(command, conf_state))
                conf_state = command.conf_state or conf_state
            last = commands[-1]
            facts = Facts(last.index, last.term, conf_state, self._tables.rows_hash)
            self._tables.flush()
            schema.write_facts(self._connection, facts)
        self.applied_index, self.applied_term = last.index, last.term
        self.conf_state = conf_state
        self._show()
        return results

    def _apply_one(self, command: Command, conf_state: ConfState) -> bytes:
        if command.opens_session:
            return open_session(command.index, self._tables)
        if not command.data:
            return b""
        place = Place(command.index, conf_state)
        if not command.session:
            return encode_result(carry_out(command.data, place, self._tables))
        return once(
            command.session,
            command.sequence,
            command.index,
            self._tables,
            lambda: carry_out(command.data, place, self._tables),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or nothing, in RAM too."""
        rows_hash = self._tables.rows_hash
        try:
            with named_errors(self._path):
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
        except BaseException:
            with named_errors(self._path):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                self._tables.reload(rows_hash)
            raise

    def state_hash(self) -> bytes:
        """32 bytes that are equal on two replicas exactly if their states are: rows, clock,
        sessions and configuration. The rows' part is kept up to date, so this is cheap.
        """
        return self.hash_at()[1]

    def hash_at(self) -> tuple[int, bytes]:
        """An index, and the state's hash behind it: for comparing replicas, at any time."""
        return self._hash_at

    def verified_hash(self) -> bytes:
        """The same, computed from every row; to check this node's disk and our own arithmetic."""
        with self._long_read() as connection:
            total = sum(
                schema.row_hash(table, key, text)
                for kind, table in schema.TABLES.items()
                for key, text in schema.all_rows(connection, kind)
            )
        return _state_hash(total % _HASH_SPACE, self.conf_state)

    # -- snapshots -----------------------------------------------------------------------------

    def make_snapshot(self, term: int) -> SnapshotMetadata:
        """Write the state at `applied_index`, whose entry has this term, beside it, durable, and
        keep the newest two. If commands are applied meanwhile, it may be of one of them: see what
        is returned.

        Raises StoreFull; ValueError if the term is another.
        """
        if term != self.applied_term:
            raise ValueError(f"the entry at {self.applied_index} has term {self.applied_term}")
        metadata = self._snapshots.make(self._copy_to)
        # The log will drop what this covers, so the database must be able to do without.
        self._make_durable()
        return metadata

    def _copy_to(self, path: Path) -> SnapshotMetadata:
        # VACUUM INTO, not the backup API: the copy has no free pages, in which rows that were
        # removed (secrets too) would travel on.
        with self._long_read() as connection, named_errors(path):
            connection.execute("VACUUM INTO ?", (str(path),))
        with named_errors(path), contextlib.closing(schema.connect_read_only(path)) as copy:
            return _metadata(schema.read_facts(copy))

    @contextlib.contextmanager
    def _long_read(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, so that nobody's short read waits for this one."""
        with named_errors(self._path), translated(self._path, "open"):
            connection = schema.connect(self._path, cache_bytes=self._settings.page_cache_bytes)
            with contextlib.closing(connection):
                yield connection

    def _make_durable(self) -> None:
        """What is applied survives a power cut from here on."""
        with self._writing, self._durably(), self._transaction():
            self._connection.execute("UPDATE facts SET durable_index = ?", (self.applied_index,))

    @contextlib.contextmanager
    def _durably(self) -> Iterator[None]:
        """A transaction within waits for the disk; so do, as they stand before it in the same file,
        all that were committed earlier.
        """
        with named_errors(self._path):
            self._connection.execute("PRAGMA synchronous = FULL")
            try:
                yield
            finally:
                self._connection.execute("PRAGMA synchronous = NORMAL")

    def newest_snapshot(self) -> SnapshotMetadata | None:
        """The newest one that `open_snapshot` can open."""
        return self._snapshots.newest()

    def open_snapshot(self, metadata: SnapshotMetadata) -> StoredSnapshot:
        """Raises BlobNotFound if it is gone; then a newer one exists."""
        return self._snapshots.open(metadata)

    def receive_snapshot(
        self, metadata: SnapshotMetadata, size: int, sha256: bytes
    ) -> PartialSnapshot:
        """Begin or resume receiving. Raises MalformedMessage if it is offered as too long."""
        return self._snapshots.receive(metadata, size, sha256)

    def install_snapshot(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> None:
        """Become what was received, durably: all of it or nothing, also when the power goes.

        One that is not ahead of what is applied by now is thrown away, and that is all. Raises
        StoreDamaged if what was received is not it; it is thrown away then too.
        """
        with self._writing:
            if metadata.index > self.applied_index:
                self._install_received(metadata, size, sha256)
            else:
                self._snapshots.give_up()

    def _install_received(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> None:
        offer = Offer(metadata, size, sha256)
        try:
            if not self._snapshots.is_whole(offer):
                raise StoreDamaged(str(self._snapshots.partial), "not the snapshot that was sent")
            # Whoever opens this folder next may need it, to begin the log anew behind it.
            self._snapshots.sync_received()
            self._install(self._snapshots.partial, metadata)
        except StoreDamaged:
            self._snapshots.give_up()
            raise
        self._snapshots.keep_received(offer)

    def _install(self, path: Path, metadata: SnapshotMetadata) -> None:
        """Copy row by row, each checked, in one transaction: then nothing of a hostile file is ever
        run, there is never a second database, and the transaction makes it all or nothing.
        """
        with named_errors(path), contextlib.closing(schema.connect_read_only(path)) as source:
            schema.check_schema(source, path)
            if schema.size_of(source) != path.stat().st_size:
                raise StoreDamaged(str(path), "not a whole snapshot")
            try:
                facts = schema.read_facts(source)
                if (found := _metadata(facts)) != metadata:
                    raise ValueError(f"it is of index {found.index}, term {found.term}")
                with self._durably(), self._transaction():
                    total = sum(
                        self._copy_table(source, kind, table)
                        for kind, table in schema.TABLES.items()
                    )
                    if total % _HASH_SPACE != facts.rows_hash:
                        raise ValueError("its hash is not that of its rows")
                    schema.write_facts(self._connection, facts)
            except (ValueError, TypeError) as error:
                raise StoreDamaged(str(path), f"not a snapshot of the state: {error}") from error
        self._take(facts)

    def _copy_table(self, source: sqlite3.Connection, kind: type[Row], table: str) -> int:
        """The sum of its rows' hashes. Raises ValueError for a row that no command makes."""
        total = 0

        def checked() -> Iterator[tuple[str, str]]:
            nonlocal total
            for count, (key, text) in enumerate(schema.all_rows(source, kind), 1):
                # Encoding it again finds a second spelling of the same row, and so a second hash.
                if count > LIMITS[kind] or schema.encode_row(schema.decode_row(kind, text)) != text:
                    raise ValueError(f"a row of {table} breaks its bounds")
                total += schema.row_hash(table, key, text)
                yield key, text

        self._connection.execute(f"DELETE FROM {table}")
        self._connection.executemany(f"INSERT INTO {table} VALUES (?, ?)", checked())
        return total

    def _finish_install(self) -> None:
        """After a power cut between the installing of a snapshot and its being kept: keep it."""
        begun = self._snapshots.begun()
        if begun is not None and begun.metadata.index == self.applied_index:
            if self._snapshots.is_whole(begun):
                self._snapshots.keep_received(begun)
            else:
                self._snapshots.give_up()

    def close(self) -> None:
        """Give the files back; never raises."""
        with self._reading, contextlib.suppress(sqlite3.Error):
            self._reader.close()
            self._connection.close()

    # -- following it --------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Grows with every batch that is applied or installed."""
        return self._version

    def on_applied(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call the listener after every batch, in the thread that applied it; it must neither wait
        nor raise. Returns what ends that.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _show(self) -> None:
        """Let readers see what was just committed."""
        if self._tables.changed:
            self._view = self._made_view()
            self._tables.changed.clear()
        self._hash_at = self.applied_index, _state_hash(self._tables.rows_hash, self.conf_state)
        self._version += 1
        for listener in tuple(self._listeners):
            listener()

    def _made_view(self) -> _View:
        tables, changed, old = self._tables, self._tables.changed, self._view
        members, peers, raft_ids = old.members, old.peers, old.raft_ids
        if Member in changed:
            members = cast("dict[PeerId, Member]", dict(tables.cached(Member)))
            raft_ids = {member.raft_id: peer for peer, member in members.items()}
            peers = frozenset(members)
        clock = tables.cached(Clock).get("")
        settings = {key: row.value for key, row in tables.cached(AgreedSetting).items()}
        return _View(
            members=members,
            peers=peers,
            raft_ids=raft_ids,
            leases=dict(tables.cached(Lease)) if Lease in changed else old.leases,
            tickets=(
                tuple(tables.cached(IssuedTicket).values())
                if IssuedTicket in changed
                else old.tickets
            ),
            swarm=tables.cached(Swarm).get(""),
            clock=clock.now if clock else 0,
            settings=agreed_settings(settings),
        )

    # -- reads: members, from RAM --------------------------------------------------------------

    def members(self) -> Mapping[PeerId, Member]:
        """All members; this mapping never changes, the next call may give another."""
        return self._view.members

    def member(self, peer: PeerId) -> Member | None:
        """What is agreed about a peer; None if it is no member."""
        return self._view.members.get(peer)

    def member_ids(self) -> frozenset[PeerId]:
        """Whom the gate lets in."""
        return self._view.peers

    def peer_of(self, raft_id: int) -> PeerId | None:
        """Whose Raft id this is; None if nobody's any more."""
        return self._view.raft_ids.get(raft_id)

    def raft_id_of(self, peer: PeerId) -> int | None:
        """A member's Raft id."""
        member = self._view.members.get(peer)
        return member.raft_id if member else None

    def settings(self) -> AgreedSettings:
        """The cluster's settings."""
        return self._view.settings

    def swarm_id(self) -> bytes | None:
        """16 bytes; None before the cluster has been founded."""
        return self._view.swarm.swarm_id if self._view.swarm else None

    def swarm_keys(self) -> tuple[bytes, ...]:
        """The present pre-shared key, then the one before if that is still good; secret. Empty for
        an open swarm.
        """
        swarm = self._view.swarm
        keys = (swarm.swarm_key, swarm.swarm_key_before) if swarm else ()
        return tuple(key for key in keys if key is not None)

    def swarm_key_generation(self) -> int:
        """Which key is in force: 1 is the first; 0 before the cluster has been founded."""
        return self._view.swarm.key_generation if self._view.swarm else 0

    def leases(self) -> Mapping[str, Lease]:
        """Those that the log has not ended; some may be over by now."""
        return self._view.leases

    def leases_due(self, now: int) -> bool:
        """Whether an ExpireLeases would end one."""
        return any(lease.expires_at <= now for lease in self._view.leases.values())

    def clock(self) -> int:
        """The greatest time that a command carried, Unix seconds."""
        return self._view.clock

    def ticket(self, secret_hash: bytes) -> IssuedTicket | None:
        """The ticket with this hash of a secret; None if none was issued, or it was forgotten."""
        return self._read(IssuedTicket, secret_hash.hex())

    def tickets(self) -> TicketsSummary:
        """How many invitations are open."""
        view = self._view
        alive = [ticket for ticket in view.tickets if not ticket.is_dead(view.clock)]
        return TicketsSummary(
            len(alive),
            sum(ticket.uses - ticket.used for ticket in alive),
            min((ticket.expires_at for ticket in alive), default=None),
        )

    # -- reads: the catalogue, from the database -------------------------------------------------

    def tag(self, name: ModelName) -> Digest | None:
        """The manifest that a name means; None if nothing was agreed."""
        row = self._read(Tag, name.key)
        return Digest(row.manifest) if row else None

    def tags(self) -> list[tuple[str, Digest]]:
        """Every name in full, as it was spelt, and its manifest; ascending."""
        with self._long_read() as connection:
            rows = [schema.decode_row(Tag, text) for _, text in schema.all_rows(connection, Tag)]
        return [(row.name, Digest(row.manifest)) for row in rows]

    def chunk_map_of(self, blob: Digest) -> tuple[Digest, int] | None:
        """The digest of the map by which a blob is verified, and the blob's size."""
        row = self._read(ChunkMapOf, blob)
        return (Digest(row.chunk_map), row.size) if row else None

    def holders(self, blob: Digest) -> list[PeerId]:
        """Members that said they hold it; a hint, some may not any more."""
        return self._of_peers("holding", blob)

    def holdings(self, peer: PeerId) -> list[Digest]:
        """What a member said that it holds."""
        return [Digest(thing) for thing in self._things_of("holding", peer)]

    def copies(self, name: ModelName) -> int | None:
        """The copies wished for; None if the default holds."""
        row = self._read(Copies, name.key)
        return row.copies if row else None

    def pins(self, name: ModelName) -> list[PeerId]:
        """Members that a model is pinned to."""
        return self._of_peers("pinned", name.key)

    def pins_of(self, peer: PeerId) -> list[str]:
        """Names in full and lower case of what is pinned to a member."""
        return self._things_of("pinned", peer)

    def _read(self, kind: type[R], key: str) -> R | None:
        with self._reading, named_errors(self._path):
            found = self._reader.execute(
                f"SELECT row FROM {schema.TABLES[kind]} WHERE key = ?",
                (key,),
            ).fetchone()
        return None if found is None else schema.decode_row(kind, found[0])

    def _things_of(self, table: str, peer: PeerId) -> list[str]:
        with self._reading, named_errors(self._path):
            found = self._reader.execute(
                f"SELECT substr(key, {schema.OF_PEER_CHARS + 1}) FROM {table} "
                "WHERE key >= ? AND key < ? ORDER BY key",
                (f"{peer}/", f"{peer}/\U0010ffff"),
            ).fetchall()
        return [thing for (thing,) in found]

    def _of_peers(self, table: str, thing: str) -> list[PeerId]:
        with self._reading, named_errors(self._path):
            found = self._reader.execute(
                f"SELECT key FROM {table} "
                f"WHERE substr(key, {schema.OF_PEER_CHARS + 1}) = ? ORDER BY key",
                (thing,),
            ).fetchall()
        return [PeerId(key[: schema.OF_PEER_CHARS - 1]) for (key,) in found]


def open_cluster_state(folder: Path, settings: ClusterStateSettings | None = None) -> ClusterState:
    """The agreed state in a folder, made (0700) if it is missing.

    Blocking. Raises StoreDamaged (also for a database of a newer omx) or another LocalTrouble.
    """
    make_folder(folder, 0o700)
    return ClusterState(folder, settings or ClusterStateSettings())


def _metadata(facts: Facts) -> SnapshotMetadata:
    return SnapshotMetadata(facts.applied_index, facts.applied_term, facts.conf_state)


def _state_hash(rows_hash: int, conf_state: ConfState) -> bytes:
    whole = rows_hash.to_bytes(32, "big") + msgspec.msgpack.encode(conf_state)
    return hashlib.sha256(whole).digest()

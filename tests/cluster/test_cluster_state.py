"""The agreed state on disk: batches, restarts, snapshots, and files that lie."""

import dataclasses
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollamamax_p2p.cluster import ClusterState, ClusterStateSettings, open_cluster_state
from ollamamax_p2p.cluster import cluster_schema as schema
from ollamamax_p2p.cluster.core.commands import (
    AcquireLease,
    AdmitMember,
    Done,
    Holds,
    IssueTicket,
    Pin,
    RedeemTicket,
    RemoveMember,
    RotateSwarmKey,
    SetChunkMap,
    SetCopies,
    SetSetting,
    SetTag,
    WithdrawTickets,
)
from ollamamax_p2p.consensus import Command, StateMachine
from ollamamax_p2p.consensus.core.messages import ConfState, SnapshotMetadata
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import (
    AccessRefused,
    BlobNotFound,
    MalformedMessage,
    StoreDamaged,
    StoreFull,
    StoreReadOnly,
)
from tests.cluster.agreed import (
    FOUND,
    KEY,
    T0,
    digest,
    in_log,
    name,
    peer,
    results,
    secret_hash,
)

STORY = [
    FOUND,
    AdmitMember(peer=peer(1), name="one", region="b", may_vote=True),
    IssueTicket(secret_hash=secret_hash(1), uses=2, issued_at=T0, expires_at=T0 + 60),
    RedeemTicket(secret_hash=secret_hash(1), peer=peer(2), now=T0 + 1, name="two"),
    SetTag(name="llama3", manifest=digest(1)),
    SetChunkMap(blob=digest(2), chunk_map=digest(3), size=77),
    Holds(peer=peer(1), added=(digest(2), digest(4))),
    Holds(peer=peer(2), added=(digest(2),)),
    SetCopies(name="llama3", copies=3),
    Pin(name="llama3", peer=peer(1)),
    AcquireLease(key="scheduler", holder="one", ttl_s=30, now=T0 + 2),
    SetSetting(key="voters_max", value=3),
    RotateSwarmKey(generation=1, key=b"n" * 32),
]
LLAMA = parse_model_name("llama3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a"


@pytest.fixture
def state(folder: Path) -> Iterator[ClusterState]:
    with_story = open_cluster_state(folder)
    with_story.apply(in_log(STORY))
    yield with_story
    with_story.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[ClusterState]:
    empty = open_cluster_state(tmp_path / "b")
    yield empty
    empty.close()


def tags(first: int, count: int) -> list[Command]:
    commands = [SetTag(name=name(each), manifest=digest(each)) for each in range(count)]
    return in_log(commands, first)


def send(source: ClusterState, metadata: SnapshotMetadata, target: ClusterState) -> None:
    reader = source.open_snapshot(metadata)
    writer = target.receive_snapshot(metadata, reader.size, reader.sha256)
    while piece := reader.read(writer.received, 4_096):
        writer.write(piece)
    writer.close()
    reader.close()
    target.install_snapshot(metadata, reader.size, reader.sha256)


# -- reading -----------------------------------------------------------------------------------


def test_it_is_a_state_machine(state):
    machine: StateMachine = state
    assert machine.applied_index == len(STORY)


def test_everything_that_was_agreed_can_be_read(state):
    assert state.member_ids() == {peer(0), peer(1), peer(2)}
    assert state.members().keys() == state.member_ids()
    assert state.member(peer(1)).region == "b"
    assert state.member(peer(9)) is None
    assert [state.raft_id_of(peer(each)) for each in (0, 1, 2, 9)] == [1, 2, 4, None]
    assert [state.peer_of(each) for each in (1, 2, 3)] == [peer(0), peer(1), None]
    assert state.tag(LLAMA) == digest(1)
    assert state.tag(parse_model_name("x")) is None
    assert state.tags() == [("registry.ollama.ai/library/llama3:latest", digest(1))]
    assert state.chunk_map_of(digest(2)) == (digest(3), 77)
    assert state.chunk_map_of(digest(9)) is None
    assert state.holders(digest(2)) == sorted([peer(1), peer(2)])
    assert state.holdings(peer(1)) == sorted([digest(2), digest(4)])
    assert (state.copies(LLAMA), state.copies(parse_model_name("x"))) == (3, None)
    assert state.pins(LLAMA) == [peer(1)]
    assert state.pins_of(peer(1)) == [LLAMA.key]
    assert state.leases()["scheduler"].holder == "one"
    assert [state.leases_due(T0 + 32), state.leases_due(T0 + 31)] == [True, False]
    assert state.clock() == T0 + 2
    assert dataclasses.astuple(state.tickets()) == (1, 1, T0 + 60)
    assert state.settings().voters_max == 3
    assert state.swarm_id() == bytes(16)
    assert state.swarm_keys() == (b"n" * 32, KEY)
    assert state.swarm_key_generation() == 2


def test_before_the_founding_there_is_nothing_to_read(other):
    assert other.member_ids() == frozenset()
    assert (other.swarm_id(), other.swarm_keys(), other.swarm_key_generation()) == (None, (), 0)
    assert dataclasses.astuple(other.tickets()) == (0, 0, None)
    assert (other.applied_index, other.conf_state) == (0, ConfState())
    assert other.state_hash() == other.verified_hash()


def test_listeners_hear_of_a_batch_once_it_can_be_read(state):
    seen: list[tuple[int, frozenset[str]]] = []
    version = state.version
    stop = state.on_applied(lambda: seen.append((state.version, state.member_ids())))
    state.apply(in_log([RemoveMember(peer=peer(2))], 14))
    stop()
    state.apply(in_log([AdmitMember(peer=peer(2), name="again")], 15))
    assert seen == [(version + 1, frozenset({peer(0), peer(1)}))]
    assert state.raft_id_of(peer(2)) == 15


# -- applying ----------------------------------------------------------------------------------


def test_a_restart_finds_what_was_applied(state, folder):
    conf_state = ConfState(voters=(1,), learners=(2,))
    state.apply([Command(index=20, term=3, data=b"", conf_state=conf_state)])
    before = (state.state_hash(), state.members(), state.tags())
    state.close()
    again = open_cluster_state(folder)
    assert (again.state_hash(), again.members(), again.tags()) == before
    assert (again.applied_index, again.applied_term, again.conf_state) == (20, 3, conf_state)
    assert again.hash_at() == (20, before[0])
    assert again.state_hash() == again.verified_hash()
    again.close()


def test_a_configuration_holds_from_its_entry_on_within_a_batch(state):
    voting = ConfState(voters=(1, 2))
    remove = in_log([RemoveMember(peer=peer(1))], 14)
    change = Command(index=15, term=1, data=b"", conf_state=ConfState(voters=(1,)))
    state.apply([Command(index=13 + 1, term=1, data=b"", conf_state=voting)])
    first, nothing, second = state.apply(
        [
            Command(index=15, term=1, data=remove[0].data),
            Command(index=16, term=1, data=b"", conf_state=change.conf_state),
            Command(index=17, term=1, data=remove[0].data),
        ]
    )
    assert results([first])[0].reason == "votes"
    assert nothing == b""
    assert results([second]) == [Done(2)]


def test_what_a_batch_added_is_seen_by_the_rest_of_the_batch(state):
    commands = [
        Holds(peer=peer(1), added=(digest(7),)),
        Pin(name="x", peer=peer(1)),
        RemoveMember(peer=peer(1)),
    ]
    state.apply(in_log(commands, 14))
    assert (state.holders(digest(7)), state.pins(parse_model_name("x"))) == ([], [])
    assert state.holders(digest(2)) == [peer(2)]


def test_a_command_that_was_applied_is_not_applied_again(state):
    with pytest.raises(ValueError, match="up to 13"):
        state.apply(tags(13, 1))
    with pytest.raises(ValueError, match="up to 13"):
        state.apply([*tags(15, 1), *tags(14, 1)])
    assert state.apply([]) == []


def test_a_full_disk_takes_back_the_whole_batch_and_the_rest_goes_on(folder):
    small = ClusterStateSettings(database_bytes_max=400 * 1024)
    state = open_cluster_state(folder, small)
    state.apply(in_log(STORY))
    before = (state.state_hash(), state.version, state.members())
    with pytest.raises(StoreFull):
        state.apply(tags(14, 5_000))
    assert (state.state_hash(), state.version, state.members()) == before
    assert state.applied_index == len(STORY)
    assert state.state_hash() == state.verified_hash()
    state.apply(tags(14, 3))
    assert len(state.tags()) == 4
    assert state.state_hash() == state.verified_hash()
    state.close()


def test_sessions_outlive_a_restart(state, folder):
    (opened,) = state.apply([Command(index=14, term=1, data=b"", opens_session=True)])
    assert opened == (14).to_bytes(8, "big")
    take = in_log([WithdrawTickets()], 15)[0].data
    (first,) = state.apply([Command(index=15, term=1, data=take, session=14, sequence=1)])
    state.close()
    again = open_cluster_state(folder)
    (second,) = again.apply([Command(index=16, term=1, data=take, session=14, sequence=1)])
    assert results([first, second]) == [Done(1), Done(1)]
    again.close()


def test_only_this_user_can_read_it(state, folder):
    state.make_snapshot(1)
    for path in [folder, *folder.rglob("*")]:
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


# -- a database that is not as it should be ------------------------------------------------------


def changed(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "state.db", isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("PRAGMA user_version = 2", "written by a newer omx"),
        ("CREATE VIEW x AS SELECT 1", "not a database of the agreed state"),
        ("DROP TABLE tag", "not a database of the agreed state"),
        ("DELETE FROM facts", "lacks its facts"),
        ("UPDATE facts SET rows_hash = x'00'", "make no sense"),
        ("UPDATE facts SET conf_state = x'ff'", "restore it from a backup"),
        ("UPDATE member SET row = '{}'", "restore it from a backup"),
    ],
)
def test_a_database_that_is_not_ours_is_named_and_left_alone(state, folder, statement, problem):
    state.close()
    changed(folder, statement)
    with pytest.raises(StoreDamaged, match=problem):
        open_cluster_state(folder)


def test_a_damaged_page_is_noticed_when_it_is_opened(state, folder):
    state.apply(tags(14, 2_000))
    state.close()
    path = folder / "state.db"
    data = bytearray(path.read_bytes())
    data[8 * 4_096 : 60 * 4_096] = os.urandom(52 * 4_096)
    path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        open_cluster_state(folder)


def test_what_is_no_database_is_named(folder):
    folder.mkdir()
    (folder / "state.db").write_bytes(b"x" * 8_192)
    with pytest.raises(StoreDamaged):
        open_cluster_state(folder)


# -- snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_makes_another_node_the_same(state, other):
    state.apply([Command(index=14, term=2, data=b"", conf_state=ConfState(voters=(1,)))])
    metadata = state.make_snapshot(2)
    assert metadata == SnapshotMetadata(14, 2, ConfState(voters=(1,)))
    assert state.newest_snapshot() == metadata
    state.apply(tags(15, 3))  # a snapshot does not follow
    other.apply(in_log([FOUND, AdmitMember(peer=peer(5), name="other")]))
    send(state, metadata, other)
    assert (other.applied_index, other.applied_term) == (14, 2)
    assert other.member_ids() == state.member_ids()
    assert other.newest_snapshot() == metadata
    other.apply(tags(15, 3))
    assert other.state_hash() == state.state_hash() == other.verified_hash()


def test_the_newest_two_are_kept_and_one_that_is_read_stays_readable(state):
    made = [state.make_snapshot(1)]
    reader = state.open_snapshot(made[0])
    for index in (14, 15):
        state.apply(tags(index, 1))
        made.append(state.make_snapshot(1))
    assert state.newest_snapshot() == made[2]
    state.open_snapshot(made[1]).close()
    with pytest.raises(BlobNotFound):
        state.open_snapshot(made[0])
    assert len(reader.read(0, 10**9)) == reader.size
    assert reader.read(reader.size, 10) == b""
    reader.close()
    reader.close()


def test_the_same_snapshot_is_made_once(state, folder):
    metadata = state.make_snapshot(1)
    (path,) = (folder / "snapshots").glob("*.db")
    before = path.stat().st_ino
    assert state.make_snapshot(1) == metadata
    assert path.stat().st_ino == before


def test_receiving_goes_on_after_a_restart(state, other, tmp_path):
    metadata = state.make_snapshot(1)
    reader = state.open_snapshot(metadata)
    offer = (metadata, reader.size, reader.sha256)
    writer = other.receive_snapshot(*offer)
    writer.write(reader.read(0, 10_000))
    writer.close()
    other.close()
    again = open_cluster_state(tmp_path / "b")
    writer = again.receive_snapshot(*offer)
    assert writer.received == 10_000
    writer.write(reader.read(10_000, reader.size))
    writer.close()
    again.install_snapshot(*offer)
    assert again.state_hash() == state.state_hash()
    again.close()


def test_another_snapshot_is_received_from_its_beginning(state, other):
    first = other.receive_snapshot(SnapshotMetadata(5, 1), 100, bytes(32))
    first.write(b"x" * 50)
    first.close()
    second = other.receive_snapshot(SnapshotMetadata(6, 1), 100, bytes(32))
    assert second.received == 0
    with pytest.raises(MalformedMessage):
        second.write(b"x" * 101)
    second.close()


@pytest.mark.parametrize("size", [0, -1, 2**40])
def test_a_snapshot_of_an_absurd_size_is_not_received(other, size):
    with pytest.raises(MalformedMessage):
        other.receive_snapshot(SnapshotMetadata(5, 1), size, bytes(32))


def offered(target: ClusterState, data: bytes, metadata: SnapshotMetadata) -> None:
    """Receive these bytes, honestly hashed, and install them."""
    sha256 = bytes.fromhex(digest_of(data)[7:])
    writer = target.receive_snapshot(metadata, len(data), sha256)
    writer.write(data)
    writer.close()
    target.install_snapshot(metadata, len(data), sha256)


def snapshot_bytes(state: ClusterState, metadata: SnapshotMetadata) -> bytes:
    reader = state.open_snapshot(metadata)
    data = reader.read(0, reader.size)
    reader.close()
    return data


def altered(data: bytes, path: Path, *statements: str) -> bytes:
    path.write_bytes(data)
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER x AFTER INSERT ON tag BEGIN DELETE FROM member; END",
        "CREATE VIEW x AS SELECT * FROM tag",
        "DROP INDEX holding_by_thing",
        "PRAGMA user_version = 2",
        "UPDATE facts SET applied_index = 99",
        "UPDATE facts SET applied_term = 99",
        "UPDATE facts SET conf_state = x'959102909090c2'",
        "UPDATE facts SET rows_hash = zeroblob(32)",
        "UPDATE facts SET rows_hash = zeroblob(31)",
        "DELETE FROM facts",
        "DELETE FROM member",
        "UPDATE member SET row = 'x'",
        "UPDATE member SET row = row || ' '",
        "UPDATE tag SET key = key || 'x'",
        "INSERT INTO clock VALUES ('second', '{\"now\":1}')",
        "INSERT INTO holding VALUES (printf('%.20000000c', 'x'), '{}')",
    ],
)
def test_a_hostile_snapshot_changes_nothing_and_is_thrown_away(state, other, tmp_path, statement):
    metadata = state.make_snapshot(1)
    good = snapshot_bytes(state, metadata)
    other.apply(in_log([FOUND, AdmitMember(peer=peer(5), name="other")]))
    before = other.state_hash()
    bad = altered(good, tmp_path / "bad.db", statement)
    with pytest.raises(StoreDamaged):
        offered(other, bad, metadata)
    assert other.state_hash() == before == other.verified_hash()
    assert other.member_ids() == {peer(0), peer(5)}
    assert other.newest_snapshot() is None
    # It begins anew, and the honest one is taken.
    offered(other, good, metadata)
    assert other.state_hash() == state.state_hash()


def test_a_row_that_is_spelt_otherwise_is_refused_though_its_hash_is_right(state, other, tmp_path):
    """Else two replicas could hold equal rows and have unequal hashes for ever."""
    metadata = state.make_snapshot(1)
    path = tmp_path / "respelt.db"
    path.write_bytes(snapshot_bytes(state, metadata))
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE clock SET row = row || ' '")
    total = sum(
        schema.row_hash(table, key, text)
        for kind, table in schema.TABLES.items()
        for key, text in schema.all_rows(connection, kind)
    )
    connection.execute("UPDATE facts SET rows_hash = ?", ((total % 2**256).to_bytes(32, "big"),))
    connection.close()
    with pytest.raises(StoreDamaged, match="a row of clock"):
        offered(other, path.read_bytes(), metadata)


def test_garbage_and_every_kind_of_truncation_are_refused(state, other):
    metadata = state.make_snapshot(1)
    good = snapshot_bytes(state, metadata)
    for data in (b"x", os.urandom(20_000), good[:-1], good[:4_096], good[:50], good + b"x"):
        with pytest.raises(StoreDamaged):
            offered(other, data, metadata)
    assert other.applied_index == 0


def test_what_was_sent_must_be_what_was_offered(state, other):
    metadata = state.make_snapshot(1)
    good = snapshot_bytes(state, metadata)
    writer = other.receive_snapshot(metadata, len(good), bytes(32))
    writer.write(good)
    writer.close()
    with pytest.raises(StoreDamaged):
        other.install_snapshot(metadata, len(good), bytes(32))
    with pytest.raises(StoreDamaged):
        other.install_snapshot(metadata, len(good), bytes(32))
    assert other.applied_index == 0


def test_a_snapshot_that_was_overtaken_changes_nothing(state, other):
    metadata = state.make_snapshot(1)
    reader = state.open_snapshot(metadata)
    writer = other.receive_snapshot(metadata, reader.size, reader.sha256)
    writer.write(reader.read(0, reader.size))
    writer.close()
    other.apply([*in_log(STORY), *tags(14, 1)])
    before = other.state_hash()
    other.install_snapshot(metadata, reader.size, reader.sha256)
    assert (other.applied_index, other.state_hash()) == (14, before)
    assert other.receive_snapshot(metadata, reader.size, reader.sha256).received == 0
    reader.close()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_a_crash_in_the_middle_of_installing_leaves_all_of_the_old_or_all_of_the_new(
    state, other, tmp_path, part
):
    state.apply(tags(14, 50))
    other.apply(in_log([FOUND, AdmitMember(peer=peer(5), name="other")]))
    before, log = other.hash_at(), tmp_path / "b" / "state.db-wal"
    old_bytes = log.stat().st_size
    send(state, state.make_snapshot(1), other)
    crashed = tmp_path / "crashed"
    shutil.copytree(tmp_path / "b", crashed)
    (crashed / "state.db-shm").unlink()
    new_bytes = log.stat().st_size - old_bytes
    os.truncate(crashed / "state.db-wal", old_bytes + int(new_bytes * part))
    survivor = open_cluster_state(crashed)
    assert survivor.hash_at() == (state.hash_at() if part == 1 else before)
    assert survivor.state_hash() == survivor.verified_hash()
    survivor.close()


def test_a_snapshot_needs_the_term_of_its_entry(state):
    with pytest.raises(ValueError, match="has term 1"):
        state.make_snapshot(2)


def test_snapshots_that_are_made_while_commands_are_applied_are_whole(state, tmp_path):
    hashes = {state.applied_index: state.state_hash()}
    made: list[SnapshotMetadata] = []
    done = threading.Event()

    def make() -> None:
        while not done.is_set():
            made.append(state.make_snapshot(1))

    maker = threading.Thread(target=make)
    maker.start()
    while len(made) < 4 or len(hashes) < 100:
        state.apply(tags(state.applied_index + 1, 10))
        hashes[state.applied_index] = state.state_hash()
    done.set()
    maker.join()
    for metadata in made[-2:]:
        target = open_cluster_state(tmp_path / str(metadata.index))
        send(state, metadata, target)
        assert target.state_hash() == hashes[metadata.index] == target.verified_hash()
        target.close()


def test_a_power_cut_between_installing_and_keeping_is_mended(state, other, tmp_path):
    metadata = state.make_snapshot(1)
    reader = state.open_snapshot(metadata)
    writer = other.receive_snapshot(metadata, reader.size, reader.sha256)
    writer.write(reader.read(0, reader.size))
    writer.close()
    receiving = tmp_path / "b" / "snapshots" / "receiving"
    shutil.copytree(receiving, tmp_path / "as-it-was")
    other.install_snapshot(metadata, reader.size, reader.sha256)
    other.close()
    for path in (tmp_path / "b" / "snapshots").glob("*-*"):
        path.unlink()
    shutil.copytree(tmp_path / "as-it-was", receiving, dirs_exist_ok=True)
    again = open_cluster_state(tmp_path / "b")
    assert again.newest_snapshot() == metadata
    again.close()
    # The same with the bytes gone: it is simply not there.
    for path in (tmp_path / "b" / "snapshots").glob("*-*"):
        path.unlink()
    shutil.copytree(tmp_path / "as-it-was", receiving, dirs_exist_ok=True)
    (receiving / "partial.db").unlink()
    again = open_cluster_state(tmp_path / "b")
    assert again.newest_snapshot() is None
    again.close()


def test_a_crash_in_the_middle_of_keeping_what_was_installed_is_mended(state, other, tmp_path):
    metadata = state.make_snapshot(1)
    send(state, metadata, other)
    other.close()
    # As between the two steps: the bytes have their name, and nothing says yet that they are whole.
    snapshots = tmp_path / "b" / "snapshots"
    (made,) = snapshots.glob("*-*.meta")
    made.rename(snapshots / "receiving" / "offer")
    again = open_cluster_state(tmp_path / "b")
    assert again.newest_snapshot() == metadata
    again.open_snapshot(metadata).close()
    again.close()


def test_a_snapshot_holds_nothing_of_what_was_removed(state, tmp_path):
    secret = "ab" * 20
    state.apply(in_log([AdmitMember(peer=peer(7), name=secret)], 14))
    state.apply(in_log([RemoveMember(peer=peer(7))], 15))
    assert secret.encode() not in snapshot_bytes(state, state.make_snapshot(1))


def test_what_a_crash_left_while_a_snapshot_was_made_is_cleared_away(state, folder):
    metadata = state.make_snapshot(1)
    state.close()
    snapshots = folder / "snapshots"
    stem = next(snapshots.glob("*.db")).stem
    for left in (f"{stem}.new", f"{stem}.meta.new", "0" * 20 + "-" + "0" * 20 + ".db"):
        (snapshots / left).write_bytes(b"half")
    again = open_cluster_state(folder)
    assert {path.name for path in snapshots.iterdir()} == {
        f"{stem}.db", f"{stem}.meta", "receiving",
    }  # fmt: skip
    assert again.newest_snapshot() == metadata
    again.close()


def test_a_snapshot_s_description_that_cannot_be_read_is_named(state, folder):
    state.make_snapshot(1)
    next((folder / "snapshots").glob("*.meta")).write_bytes(b"\xc1")
    with pytest.raises(StoreDamaged, match="description"):
        state.newest_snapshot()


def test_what_is_here_of_a_snapshot_and_is_too_long_is_thrown_away(other, tmp_path):
    offer = (SnapshotMetadata(5, 1), 100, bytes(32))
    writer = other.receive_snapshot(*offer)
    writer.write(b"x" * 50)
    writer.close()
    writer.close()
    (tmp_path / "b" / "snapshots" / "receiving" / "partial.db").write_bytes(b"x" * 101)
    again = other.receive_snapshot(*offer)
    assert again.received == 0
    again.close()


def test_a_snapshot_whose_bytes_are_gone_is_not_there(state, folder):
    metadata = state.make_snapshot(1)
    next((folder / "snapshots").glob("*.db")).unlink()
    assert state.newest_snapshot() is None
    with pytest.raises(BlobNotFound):
        state.open_snapshot(metadata)
    assert state.make_snapshot(1) == metadata
    state.open_snapshot(metadata).close()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_FULL, StoreFull),
        (sqlite3.SQLITE_READONLY_DBMOVED, StoreReadOnly),
        (sqlite3.SQLITE_CANTOPEN, AccessRefused),
        (sqlite3.SQLITE_IOERR_FSYNC, StoreDamaged),
        (sqlite3.SQLITE_CORRUPT_INDEX, StoreDamaged),
    ],
)
def test_what_sqlite_reports_is_named(tmp_path, code, expected):
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode = code
    with pytest.raises(expected, match=str(tmp_path)), schema.named_errors(tmp_path / "state.db"):
        raise error


def test_readers_in_other_threads_see_whole_batches_only(state):
    """Each batch moves both tags; a reader that saw half of one would find them apart."""
    apart: list[tuple[str, str]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found = dict(state.tags())
            if found.get(name(1)) != found.get(name(2)):
                apart.append((found[name(1)], found[name(2)]))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(150):
        commands = [
            SetTag(name=name(each), manifest=digest(number), expected="*") for each in (1, 2)
        ]
        state.apply(in_log(commands, state.applied_index + 1))
        if number % 50 == 0:
            state.make_snapshot(1)
    done.set()
    reader.join()
    assert apart == []


def test_holders_and_pins_are_found_by_an_index(state):
    connection = sqlite3.connect(state._path)
    for table in ("holding", "pinned"):
        (plan,) = connection.execute(
            f"EXPLAIN QUERY PLAN SELECT key FROM {table} "
            f"WHERE substr(key, {schema.OF_PEER_CHARS + 1}) = 'x'"
        ).fetchall()
        assert f"{table}_by_thing" in plan[3]
    connection.close()

"""Replicas that apply the same log are the same, however it is cut, interrupted and restored."""

import itertools
import random
import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamamax_p2p.cluster import ClusterState, open_cluster_state
from ollamamax_p2p.cluster import cluster_schema as schema
from ollamamax_p2p.cluster.core import commands as c
from ollamamax_p2p.cluster.core.rows import Row
from ollamamax_p2p.consensus import Command
from ollamamax_p2p.consensus.core.messages import ConfState
from tests.cluster.agreed import (
    FOUND,
    KEY,
    Agreed,
    digest,
    founded,
    name,
    peer,
    secret_hash,
    whole,
)

PEERS = st.integers(0, 4).map(peer)
DIGESTS = st.integers(0, 4).map(digest)
NAMES = st.sampled_from([name(1), name(2), "llama3", "LLAMA3:latest", "../bad", "x/y/z:1"])
TIMES = st.integers(0, 200)
SECRETS = st.integers(0, 2).map(secret_hash)
WORDS = st.sampled_from(["a", "b", "ü"])
TOKENS = st.integers(1, 60)
SOME = st.lists(DIGESTS, max_size=4).map(tuple)

COMMANDS = st.one_of(
    st.just(FOUND),
    st.builds(c.AdmitMember, peer=PEERS, name=WORDS, region=st.sampled_from(["", "a"])),
    st.builds(c.RemoveMember, peer=PEERS),
    st.builds(
        c.UpdateMember, peer=PEERS, name=WORDS | st.none(), may_vote=st.booleans() | st.none()
    ),
    st.builds(
        c.IssueTicket,
        secret_hash=SECRETS,
        uses=st.integers(1, 2),
        issued_at=TIMES,
        expires_at=TIMES,
    ),
    st.builds(c.RedeemTicket, secret_hash=SECRETS, peer=PEERS, now=TIMES, name=WORDS),
    st.builds(c.WithdrawTickets, secret_hash=SECRETS | st.none()),
    st.builds(c.SetClock, now=TIMES),
    st.builds(c.RotateSwarmKey, generation=st.integers(1, 3), key=st.just(KEY)),
    st.builds(c.ForgetOldSwarmKey, generation=st.integers(1, 3)),
    st.builds(
        c.SetTag,
        name=NAMES,
        manifest=DIGESTS,
        expected=st.none() | DIGESTS | st.just(c.ANY),
    ),
    st.builds(c.RemoveTag, name=NAMES, expected=DIGESTS | st.just(c.ANY)),
    st.builds(c.SetChunkMap, blob=DIGESTS, chunk_map=DIGESTS, size=st.integers(0, 1)),
    st.builds(c.ForgetChunkMap, blob=DIGESTS, chunk_map=DIGESTS),
    st.builds(c.Holds, peer=PEERS, added=SOME, dropped=SOME),
    st.builds(c.SetCopies, name=NAMES, copies=st.none() | st.integers(0, 2)),
    st.builds(c.Pin, name=NAMES, peer=PEERS),
    st.builds(c.Unpin, name=NAMES, peer=PEERS),
    st.builds(c.AcquireLease, key=WORDS, holder=WORDS, ttl_s=st.integers(1, 50), now=TIMES),
    st.builds(c.RenewLease, key=WORDS, token=TOKENS, ttl_s=st.integers(1, 50), now=TIMES),
    st.builds(c.ReleaseLease, key=WORDS, token=TOKENS),
    st.builds(c.ExpireLeases, now=TIMES),
    st.builds(
        c.SetSetting,
        key=st.sampled_from(["voters_max", "autopilot", "colour"]),
        value=st.booleans() | st.integers(0, 5),
    ),
)
VALID = COMMANDS.map(c.encode_command)
MALFORMED = st.one_of(
    st.binary(max_size=40),
    # A good command with one byte changed: mostly refused, sometimes another good one.
    st.builds(
        lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :],
        VALID,
        st.integers(0, 10_000),
        st.integers(0, 255),
    ),
    st.builds(
        lambda value: b"\x01" + msgspec.msgpack.encode(value),
        st.recursive(
            st.none() | st.integers().filter(lambda n: -(2**63) <= n < 2**64) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=5,
        ),
    ),
)
CONF_STATES = st.builds(
    lambda voters: ConfState(voters=tuple(sorted(voters))), st.sets(st.integers(1, 6), min_size=1)
)


@st.composite
def logs(draw: st.DrawFn) -> list[Command]:
    """Founded, then anything; sessions too, with repetitions."""
    entries = [Command(index=1, term=1, data=c.encode_command(FOUND))]
    sessions = [99]
    for index in range(2, draw(st.integers(2, 40))):
        kind = draw(st.integers(0, 9))
        term = 1 + index // 10
        if kind == 0:
            entries.append(
                Command(index=index, term=term, data=b"", conf_state=draw(CONF_STATES | st.none()))
            )
        elif kind == 1:
            entries.append(Command(index=index, term=term, data=b"", opens_session=True))
            sessions.append(index)
        else:
            data = draw(MALFORMED if kind == 2 else VALID)
            mine = draw(st.sampled_from(sessions)) if kind < 5 else 0
            sequence = draw(st.integers(0, 5)) if mine else 0
            entries.append(
                Command(index=index, term=term, data=data, session=mine, sequence=sequence)
            )
    return entries


def rows_of(state: ClusterState) -> dict[type[Row], dict[str, Row]]:
    found = {
        kind: {
            key: schema.decode_row(kind, text) for key, text in schema.all_rows(state._reader, kind)
        }
        for kind in schema.TABLES
    }
    return {kind: rows for kind, rows in found.items() if rows}


def batches(log: list[Command], dice: random.Random) -> list[list[Command]]:
    cuts = sorted({0, len(log), *(dice.randrange(len(log)) for _ in range(dice.randrange(6)))})
    return [log[start:end] for start, end in itertools.pairwise(cuts)]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(log=logs(), seed=st.integers(0, 2**32))
def test_batches_restarts_and_snapshots_change_nothing(log, seed):
    dice = random.Random(seed)
    naive = Agreed()
    naive.conf_state = ConfState()
    expected = [naive.apply(command) for command in log]
    with tempfile.TemporaryDirectory() as folder:
        one = open_cluster_state(Path(folder, "one"))
        assert one.apply(log) == expected
        assert rows_of(one) == whole(naive.tables)
        assert one.conf_state == naive.conf_state
        home = Path(folder, "other")
        other = open_cluster_state(home)
        results = []
        for number, batch in enumerate(batches(log, dice)):
            results += other.apply(batch)
            assert other.state_hash() == other.verified_hash()
            if dice.random() < 0.3:
                other.close()
                other = open_cluster_state(home)
            if dice.random() < 0.3:
                home = Path(folder, f"restored{number}")
                third = open_cluster_state(home)
                _restore(other, third)
                assert third.state_hash() == other.state_hash()
                other.close()
                other = third
        assert results == expected
        assert other.state_hash() == one.state_hash() == one.verified_hash()
        assert rows_of(other) == rows_of(one)
        assert other.members() == one.members()
        one.close()
        other.close()


def _restore(source: ClusterState, target: ClusterState) -> None:
    metadata = source.make_snapshot(source.applied_term)
    reader = source.open_snapshot(metadata)
    writer = target.receive_snapshot(metadata, reader.size, reader.sha256)
    writer.write(reader.read(0, reader.size))
    writer.close()
    reader.close()
    target.install_snapshot(metadata, writer.received, reader.sha256)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(log=logs(), seed=st.integers(0, 2**32))
def test_a_crash_loses_at_most_whole_batches_and_the_log_brings_them_back(log, seed):
    """The files as they are at any moment, with any end of SQLite's own log missing or torn."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        state = open_cluster_state(Path(folder, "state"))
        hashes = {0: state.state_hash()}
        torn: list[Path] = []
        for number, batch in enumerate(batches(log, dice)):
            state.apply(batch)
            hashes[state.applied_index] = state.state_hash()
            copy = Path(folder, f"crash{number}")
            shutil.copytree(Path(folder, "state"), copy)
            _tear(copy / "state.db-wal", dice)
            torn.append(copy)
        for copy in torn:
            survivor = open_cluster_state(copy)
            assert hashes[survivor.applied_index] == survivor.state_hash()
            assert survivor.state_hash() == survivor.verified_hash()
            survivor.apply([each for each in log if each.index > survivor.applied_index])
            assert survivor.state_hash() == state.state_hash()
            survivor.close()
        state.close()


def _tear(path: Path, dice: random.Random) -> None:
    """Leave a beginning of it, perhaps with rubbish where the rest was."""
    data = path.read_bytes()
    if not data:
        return
    keep = dice.randrange(len(data) + 1)
    rubbish = dice.randbytes(len(data) - keep) if dice.random() < 0.5 else b""
    path.write_bytes(data[:keep] + rubbish)
    # Only a hint for processes that are alive; after a crash SQLite makes it anew.
    path.with_name("state.db-shm").unlink(missing_ok=True)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | st.builds(lambda rest: b"\x01" + rest, st.binary()))
def test_no_bytes_make_the_rules_raise(data):
    agreed = founded()
    result = agreed.do(data)
    assert c.decode_result(c.encode_result(result)) == result

"""Replicas that talk to each other, on the virtual clock."""

import random
from dataclasses import replace

import pytest
import trio

from ollamamax_p2p.consensus.core.messages import ConfChangeType, ConfChangeV2, MessageType
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.replica import bootstrap_log, open_replica
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import (
    HistoryGone,
    LogDamaged,
    LogSyncFailed,
    NotLeader,
    OutcomeUnknown,
    ProposalDropped,
    QuorumLost,
    StoreFull,
)
from ollamamax_p2p.testing.key_value import (
    Acquire,
    Append,
    Get,
    KeyValue,
    Put,
    decode_result,
    encode_request,
)
from tests.consensus.replicas import DELAY_S, adds, append_all, ask, open_cluster

SETTINGS = ConsensusSettings()
SMALL = replace(SETTINGS, snapshot_entries=20, trailing_entries=5)
ELECTION_S = SETTINGS.election_ticks * SETTINGS.tick_s


async def test_a_command_proposed_on_any_replica_is_applied_on_all(autojump_clock):
    async with open_cluster() as cluster:
        await cluster.leader()
        for raft_id, member in cluster.members.items():
            assert (await ask(member.up, Put(f"from{raft_id}", b"x"))).ok
        await cluster.settled()
        assert len({each.state.state_hash() for each in cluster.members.values()}) == 1
        assert cluster.members[2].state.keys() == ["from1", "from2", "from3"]


async def test_thousands_of_commands_at_once_are_applied_once_each(autojump_clock):
    async with open_cluster() as cluster:
        follower = cluster.members[(await cluster.leader()).raft_id % 3 + 1]
        done = []

        async def one(number: int) -> None:
            done.append(await ask(follower.up, Append("log", b"%d," % number)))

        async with trio.open_nursery() as nursery:
            for number in range(2500):
                nursery.start_soon(one, number)
        values = (follower.state.get("log") or b"").rstrip(b",").split(b",")
        assert len(done) == 2500
        assert sorted(map(int, values)) == list(range(2500))


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_applied_twice_or_lost_while_leaders_and_messages_are(
    autojump_clock, repeatable, seed
):
    rng = random.Random(seed)
    async with open_cluster(seed=seed) as cluster:
        await cluster.leader()
        cluster.lose = lambda _: rng.random() < 0.2
        finished = trio.Event()

        async def write(raft_id: int) -> None:
            values = (b"%d/%d," % (raft_id, number) for number in range(15))
            await append_all(cluster.members[raft_id].up, "log", values)

        async def trouble() -> None:
            while not finished.is_set():
                await trio.sleep(rng.uniform(0.2, 2))
                cluster.isolate(rng.choice([1, 2, 3]))
                await trio.sleep(rng.uniform(0.2, 2))
                cluster.heal()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trouble)
            async with trio.open_nursery() as writers:
                for raft_id in cluster.members:
                    writers.start_soon(write, raft_id)
            finished.set()
        cluster.lose = lambda _: False
        await cluster.settled()
        values = (cluster.members[1].state.get("log") or b"").split(b",")[:-1]
        assert sorted(values) == sorted(b"%d/%d" % (a, b) for a in (1, 2, 3) for b in range(15))
        for raft_id in (1, 2, 3):
            own = [value for value in values if value.startswith(b"%d/" % raft_id)]
            assert own == [b"%d/%d" % (raft_id, number) for number in range(15)]


async def test_a_read_on_a_follower_sees_what_was_answered_before(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        follower = cluster.members[leader.raft_id % 3 + 1]
        for number in range(20):
            await ask(leader.up, Put("key", b"%d" % number))
            await follower.up.read()
            assert follower.state.get("key") == b"%d" % number


async def test_many_reads_at_once_cost_few_messages(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await leader.up.read()
        before = cluster.carried
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(leader.up.read)
        assert cluster.carried - before < 50


async def test_a_leader_that_was_cut_off_answers_no_read(autojump_clock):
    async with open_cluster() as cluster:
        old = await cluster.leader()
        await ask(old.up, Put("key", b"old"))
        cluster.isolate(old.raft_id)
        new = await cluster.leader(without=[old.raft_id])
        await ask(new.up, Put("key", b"new"))
        with pytest.raises(QuorumLost):
            await old.up.read()
        cluster.heal()
        await old.up.read()
        assert old.state.get("key") == b"new"


async def test_a_lease_read_asks_nobody_while_the_lease_holds(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await leader.up.read()
        before = cluster.carried
        for _ in range(100):
            await leader.up.read_lease()
        assert cluster.carried == before
        cluster.isolate(leader.raft_id)
        await trio.sleep(ELECTION_S)
        with pytest.raises(QuorumLost):
            await leader.up.read_lease()


async def test_a_lease_ends_when_the_leadership_is_given_away(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await leader.up.read()
        heir = cluster.members[leader.raft_id % 3 + 1]
        assert leader.up._drive.has_lease(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leader.up.transfer_leader, heir.raft_id)
            await trio.sleep(DELAY_S / 2)
            assert leader.up.leads
            assert not leader.up._drive.has_lease(trio.current_time())
        assert (await cluster.leader()).raft_id == heir.raft_id


async def test_a_stale_read_works_without_a_quorum_as_long_as_it_is_new_enough(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await ask(leader.up, Put("key", b"value"))
        await cluster.settled()
        follower = cluster.members[leader.raft_id % 3 + 1]
        for member in cluster.members.values():
            if member is not follower:
                await member.stop()
        await trio.sleep(2)
        await follower.up.read_stale(3)
        with pytest.raises(QuorumLost, match="last heard"):
            await follower.up.read_stale(1)


async def test_who_has_never_heard_a_leader_answers_no_stale_read(autojump_clock):
    async with open_cluster(count=3) as cluster:
        cluster.isolate(1)
        with pytest.raises(QuorumLost, match="never"):
            await cluster.members[1].up.read_stale(1000)


async def test_without_a_quorum_requests_fail_in_bounded_time(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        for member in cluster.members.values():
            if member is not leader:
                await member.stop()
        began = trio.current_time()
        with pytest.raises(QuorumLost, match="may still take effect"):
            await ask(leader.up, Put("key", b"value"))
        with pytest.raises(QuorumLost):
            await leader.up.read()
        assert trio.current_time() - began < 3 * SETTINGS.quorum_timeout_s
        assert not leader.up.status().has_quorum


async def test_a_command_without_a_session_is_never_proposed_twice(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        follower = cluster.members[leader.raft_id % 3 + 1]
        cluster.lose = lambda message: message.type is MessageType.PROP
        with pytest.raises(OutcomeUnknown):
            await follower.up.propose_unguarded(encode_request(Append("log", b"x")))
        cluster.lose = lambda _: False
        await follower.up.propose_unguarded(encode_request(Append("log", b"y")))
        assert follower.state.get("log") == b"y"


async def test_what_only_a_lost_leader_took_is_known_not_to_be_applied(autojump_clock):
    async with open_cluster() as cluster:
        old = await cluster.leader()
        cluster.isolate(old.raft_id)
        refused = []

        async def propose() -> None:
            try:
                await old.up.propose_unguarded(encode_request(Append("log", b"x")))
            except ProposalDropped as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(propose)
            new = await cluster.leader(without=[old.raft_id])
            await ask(new.up, Append("log", b"y"))
            cluster.heal()
        await cluster.settled()
        assert old.state.get("log") == b"y"
        assert len(refused) == 1


async def test_a_replica_whose_session_was_ended_opens_another(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await ask(leader.up, Append("log", b"1"))
        for member in cluster.members.values():
            member.state._sessions.rows.clear()  # as if a thousand others had come
        await ask(leader.up, Append("log", b"2"))
        assert leader.state.get("log") == b"12"


async def test_a_watch_gives_every_command_from_its_index_on(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        seen = []

        async def watch() -> None:
            async for command in leader.up.watch(1):
                seen.append(command)
                if len(seen) == 10:
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for number in range(10):
                await ask(leader.up, Put("key", b"%d" % number))
        indexes = [command.index for command in seen]
        assert indexes == sorted(set(indexes))
        assert [command.data for command in seen] == [
            encode_request(Put("key", b"%d" % number)) for number in range(10)
        ]


async def test_a_watch_of_what_the_log_let_go_says_so(autojump_clock):
    async with open_cluster(settings=SMALL) as cluster:
        leader = await cluster.leader()
        await append_all(leader.up, "log", [b"x"] * 60)
        assert leader.log.first_index() > 1
        with pytest.raises(HistoryGone):
            async for _ in leader.up.watch(1):
                pass


async def test_a_new_learner_gets_a_snapshot_and_then_the_rest(autojump_clock):
    async with open_cluster(settings=SMALL) as cluster:
        leader = await cluster.leader()
        await append_all(leader.up, "log", [b"x"] * 60)
        learner = await cluster.add(4)
        await leader.up.change_members(adds(4), encode_request(Put("member", b"4")))
        await append_all(leader.up, "log", [b"y"] * 3)
        await cluster.settled(4)
        assert learner.snapshots_fetched == 1
        assert learner.state.get("log") == b"x" * 60 + b"y" * 3
        assert learner.state.get("member") == b"4"
        assert learner.up.status().is_learner
        assert learner.log.first_index() > 1
        [about] = [each for each in leader.up.status().members if each.raft_id == 4]
        assert (about.is_voter, about.state, about.lag) == (False, "replicate", 0)


async def test_a_snapshot_that_could_not_be_fetched_is_offered_again(autojump_clock):
    async with open_cluster(settings=SMALL) as cluster:
        leader = await cluster.leader()
        await append_all(leader.up, "log", [b"x"] * 60)
        learner = await cluster.add(4)
        cluster.cut.add((leader.raft_id, 4))
        await leader.up.change_members(adds(4))
        await trio.sleep(5)
        cluster.cut.clear()
        lost = iter([True, True])
        cluster.lose = lambda message: message.type is MessageType.SNAP and next(lost, False)
        await append_all(leader.up, "log", [b"y"] * 60)
        await cluster.settled(4)
        assert learner.state.state_hash() == leader.state.state_hash()


async def test_members_change_and_a_removed_leader_leads_no_more(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await cluster.add(4)
        await leader.up.change_members(adds(4, ConfChangeType.ADD_NODE))
        await cluster.settled(4)
        assert leader.up.status().voters == (1, 2, 3, 4)
        await leader.up.change_members(adds(leader.raft_id, ConfChangeType.REMOVE_NODE))
        new = await cluster.leader(without=[leader.raft_id])
        assert leader.raft_id not in new.up.status().voters
        assert (await ask(new.up, Put("key", b"value"))).ok


async def test_a_second_change_of_members_is_refused_while_one_is_under_way(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        results = []

        async def change(raft_id: int) -> None:
            try:
                await leader.up.change_members(adds(raft_id))
                results.append("done")
            except ProposalDropped as error:
                results.append(str(error))

        async with trio.open_nursery() as nursery:
            for raft_id in (8, 9):
                nursery.start_soon(change, raft_id)
        assert sorted(result == "done" for result in results) == [False, True]


async def test_only_the_leader_changes_members_or_hands_over(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        follower = cluster.members[leader.raft_id % 3 + 1]
        with pytest.raises(NotLeader, match=f"node {leader.raft_id}"):
            await follower.up.change_members(ConfChangeV2())
        with pytest.raises(NotLeader):
            await follower.up.transfer_leader(follower.raft_id)


async def test_a_token_of_an_older_lease_holder_is_refused(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        given = await ask(leader.up, Acquire("lease", "one"))
        assert not (await ask(leader.up, Acquire("lease", "two"))).ok
        assert (await ask(leader.up, Put("key", b"1", "lease", given.token))).ok
        assert not (await ask(leader.up, Put("key", b"2", "lease", given.token - 1))).ok


class TroubledLog(RamLog):
    """A RamLog whose disk can be full or broken."""

    def __init__(self):
        super().__init__()
        self.full = False
        self.broken = False
        self.writes = 0

    def append(self, entries=(), hard_state=None, *, sync=True):
        if self.full:
            raise StoreFull("the log", 1, 0)
        if self.broken and sync:
            raise LogSyncFailed("the log", "EIO")
        self.writes += 1
        super().append(entries, hard_state, sync=sync)


def troubled_logs() -> dict[int, TroubledLog]:
    return {raft_id: TroubledLog() for raft_id in (1, 2, 3)}


async def test_a_leader_whose_disk_is_full_steps_down_and_comes_back_by_itself(autojump_clock):
    logs = troubled_logs()
    async with open_cluster(logs=logs) as cluster:
        old = await cluster.leader()
        await ask(old.up, Put("key", b"1"))
        logs[old.raft_id].full = True
        began = trio.current_time()
        other = cluster.members[old.raft_id % 3 + 1]
        await ask(other.up, Put("key", b"2"))
        assert trio.current_time() - began < 2 * 2 * ELECTION_S
        assert not old.up.leads
        assert old.up.status().disk_is_full
        with pytest.raises(ProposalDropped, match="disk is full"):
            await ask(old.up, Put("key", b"3"))
        await old.up.read_stale(60)
        logs[old.raft_id].full = False
        await cluster.settled()
        assert (await ask(old.up, Put("key", b"4"))).ok
        assert not old.up.status().disk_is_full
        await cluster.settled()
        assert old.state.state_hash() == other.state.state_hash()


async def test_when_all_disks_are_full_nothing_is_lost_and_all_goes_on_after(autojump_clock):
    logs = troubled_logs()
    async with open_cluster(logs=logs) as cluster:
        leader = await cluster.leader()
        await ask(leader.up, Put("key", b"1"))
        await cluster.settled()
        for log in logs.values():
            log.full = True
        await trio.sleep(30)
        assert [each.state.get("key") for each in cluster.members.values()] == [b"1"] * 3
        for log in logs.values():
            log.full = False
        assert (await ask((await cluster.leader()).up, Get("key"))).value == b"1"


async def test_a_full_disk_of_the_state_machine_is_survived_too(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await ask(leader.up, Put("key", b"0"))
        state, whole = leader.state, leader.state.apply

        def full(_commands):
            raise StoreFull("the state", 1, 0)

        state.apply = full
        with trio.move_on_after(2):
            await ask(leader.up, Put("key", b"1"))
        assert leader.up.status().disk_is_full
        del state.apply
        assert state.apply == whole
        await cluster.settled()
        assert state.get("key") == b"1"


async def test_a_failed_fsync_ends_the_replica_and_loses_nothing_acknowledged(autojump_clock):
    logs = troubled_logs()
    async with open_cluster(logs=logs) as cluster:
        leader = await cluster.leader()
        await ask(leader.up, Put("key", b"1"))
        logs[leader.raft_id].broken = True
        with pytest.raises((QuorumLost, OutcomeUnknown)):
            await ask(leader.up, Put("key", b"2"))
        assert leader.replica is None
        assert isinstance(leader.error, BaseExceptionGroup)
        assert leader.error.subgroup(LogSyncFailed) is not None
        other = await cluster.leader()
        assert other is not leader
        assert (await ask(other.up, Get("key"))).value in (b"1", b"2")


async def test_a_replica_goes_on_where_it_stopped(autojump_clock):
    async with open_cluster(settings=SMALL) as cluster:
        leader = await cluster.leader()
        await append_all(leader.up, "log", [b"x"] * 30)
        for member in cluster.members.values():
            await member.stop()
        for member in cluster.members.values():
            await member.start()
        leader = await cluster.leader()
        await append_all(leader.up, "log", [b"y"] * 3)
        await cluster.settled()
        for member in cluster.members.values():
            assert member.state.get("log") == b"x" * 30 + b"y" * 3


async def test_a_state_that_was_lost_is_made_again_from_the_log(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        await append_all(leader.up, "log", [b"x"] * 30)
        member = cluster.members[leader.raft_id % 3 + 1]
        await member.stop()
        member.state = KeyValue()
        await member.start()
        await cluster.settled(member.raft_id)
        assert member.state.state_hash() == leader.state.state_hash()


async def test_a_log_that_lacks_what_is_applied_is_refused(autojump_clock):
    state = KeyValue()
    log = RamLog()
    bootstrap_log(log, [1])

    async def none(*_):
        raise AssertionError

    arguments = {"settings": SETTINGS, "rng": random.Random(1), "fetch_snapshot": none}
    async with open_replica(1, log, state, None, blocking=False, **arguments) as replica:
        assert decode_result(await replica.propose(encode_request(Put("key", b"1")))).ok
    with pytest.raises(LogDamaged):
        async with open_replica(1, RamLog(), state, None, blocking=False, **arguments):
            pass


async def test_the_status_tells_who_leads_and_who_lags(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        away = cluster.members[leader.raft_id % 3 + 1]
        cluster.isolate(away.raft_id)
        await append_all(leader.up, "log", [b"x"] * 5)
        status = leader.up.status()
        assert (status.role, status.leader, status.has_quorum) == ("leader", leader.raft_id, True)
        lags = {each.raft_id: each.lag for each in status.members}
        assert lags.pop(away.raft_id) >= 5
        assert set(lags.values()) == {0}


async def test_a_request_that_is_cancelled_leaves_nothing_behind(autojump_clock):
    async with open_cluster() as cluster:
        leader = await cluster.leader()
        cluster.isolate(leader.raft_id)
        for _ in range(100):
            with trio.move_on_after(0.01):
                await ask(leader.up, Put("key", b"value"))
        assert leader.up.status().requests_waiting == 0


async def test_the_commit_index_is_written_soon_though_nothing_depends_on_it(autojump_clock):
    async with open_cluster(3) as cluster:
        leader = await cluster.leader()
        await ask(leader.up, Put("name", b"value"))
        await cluster.settled()
        await trio.sleep(0.2)
        for member in cluster.members.values():
            assert member.log.initial_state()[0].commit == member.up.applied_index

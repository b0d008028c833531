"""A cluster that has lost most of its voters for good goes on with the one that is left."""

import contextlib
import shutil
import sys
from pathlib import Path

import pytest
import trio

from ollamamax_p2p.cluster import (
    cluster_state,
    open_cluster_state,
    open_recovery,
    recovery,
    state_snapshots,
)
from ollamamax_p2p.cluster.core.commands import AcquireLease, SetTag
from ollamamax_p2p.consensus import file_log
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import BadInput, NotAdmitted, OmxError, QuorumLost
from tests.cluster.agreed import digest, name
from tests.cluster.whole_clusters import (
    SETTINGS,
    Machine,
    Machines,
    open_machines,
    same_state,
    until,
    voters_of,
)

pytestmark = pytest.mark.usefixtures("repeatable")


def tag(number: int) -> SetTag:
    return SetTag(name=name(number), manifest=digest(number))


def knows(machine: Machine, number: int) -> bool:
    return machine.up.state.tag(parse_model_name(name(number))) == digest(number)


async def lost(machines: Machines, *gone: Machine) -> None:
    for machine in gone:
        await machine.stop()


def recovered(machine: Machine):
    with open_recovery(machine.folder, SETTINGS) as recovery:
        recovery.carry_out()
        return recovery.plan


async def test_the_last_voter_goes_on_alone_with_all_it_had(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=3) as machines:
        one, two, three = machines.all
        await one.up.change(tag(1))
        await same_state(one, two, three)
        token = (await one.up.change(lease(60))).number
        await same_state(one, two, three)
        raft_id = three.up.raft_id
        await lost(machines, one, two)
        with pytest.raises(QuorumLost):
            await three.up.change(tag(2))
        await three.stop()

        plan = recovered(three)

        assert (plan.peer_id, plan.raft_id, plan.voted) == (three.peer, raft_id, True)
        assert {each.peer_id for each in plan.expelled} == {one.peer, two.peer}
        assert plan.learners == ()
        await three.start()
        await until(lambda: three.up.leads)
        assert three.up.raft_id == raft_id
        assert knows(three, 1)
        assert three.up.state.member_ids() == {three.peer}
        assert three.up.state.conf_state.voters == (raft_id,)
        await three.up.change(tag(3))
        # Whoever held it before is fenced off.
        assert (await three.up.change(lease(60))).number > token
        # And nobody's Raft id is used twice.
        assert one.folder.exists()
        shutil.rmtree(one.folder)  # `omx leave --force`
        await machines.admit(one, three)
        assert one.up.raft_id > token
        await same_state(one, three)
        assert knows(one, 3)


def lease(seconds: int) -> AcquireLease:
    return AcquireLease(key="k", holder="h", ttl_s=seconds, now=1_800_000_000)


async def test_a_learner_that_was_ahead_becomes_what_was_recovered(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=3, learners=1) as machines:
        one, two, three, learner = machines.all
        await three.stop()
        await one.up.change(tag(1))
        await until(lambda: knows(learner, 1))
        await lost(machines, one, two)

        plan = recovered(three)

        assert [each.peer_id for each in plan.learners] == [learner.peer]
        await three.start()
        await until(lambda: three.up.leads)
        await three.up.change(tag(2))
        await same_state(three, learner)
        assert knows(learner, 2)
        assert not knows(learner, 1)  # agreed on without the voter that is left: lost, as was said
        assert learner.up.state.member_ids() == {three.peer, learner.peer}
        await learner.stop()
        await three.up.change(tag(4))
        await learner.start()
        await same_state(three, learner)


async def test_an_expelled_voter_that_comes_back_is_refused_and_told(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=3) as machines:
        one, two, three = machines.all
        await lost(machines, one, two)
        await three.stop()
        recovered(three)
        await three.start()
        await until(lambda: three.up.leads)

        await two.start()

        assert two.connections is not None
        assert three.connections is not None
        with pytest.raises(NotAdmitted):
            await two.connections.reach(three.host.addresses)
        with pytest.raises(OmxError):
            await three.connections.reach(two.host.addresses)
        with pytest.raises(QuorumLost):
            await two.up.change(tag(1))
        assert three.up.leads
        assert voters_of(three) == {three.peer}


async def test_what_nobody_else_had_counts_as_agreed_and_that_is_said(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=3) as machines:
        (leader,) = [each for each in machines.all if each.up.leads]
        others = [each for each in machines.all if each is not leader]
        for other in others:
            machines.network.kill(other.host)
        with trio.move_on_after(0.3):
            await leader.up.change(tag(1))
        await until(lambda: not leader.up.has_quorum)
        assert not knows(leader, 1)
        await lost(machines, *others)
        await leader.stop()

        plan = recovered(leader)

        assert plan.unconfirmed >= 1
        await leader.start()
        await until(lambda: leader.up.leads)
        assert knows(leader, 1)


async def test_a_learner_can_be_recovered_when_no_voter_is_left(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=1, learners=1) as machines:
        founder, learner = machines.all
        await founder.up.change(tag(1))
        await same_state(founder, learner)
        await lost(machines, founder)
        await learner.stop()

        plan = recovered(learner)

        assert not plan.voted
        await learner.start()
        await until(lambda: learner.up.leads)
        assert knows(learner, 1)


async def test_tickets_are_withdrawn_because_they_may_have_been_used(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=3) as machines:
        one, two, three = machines.all
        await one.up.issue_ticket(b"s" * 16, uses=3, expires_at=1_800_003_600)
        await same_state(one, two, three)
        await lost(machines, one, two)
        await three.stop()
        assert recovered(three).tickets == 1
        await three.start()
        assert three.up.state.tickets().alive == 0


async def test_nothing_is_recovered_where_nothing_is_lost(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=1) as machines:
        await machines[0].stop()
        with (
            pytest.raises(BadInput, match="only voter already"),
            open_recovery(machines[0].folder, SETTINGS),
        ):
            pass
        await machines[0].start()
        await until(lambda: machines[0].up.leads)


async def test_preparing_and_not_doing_it_changes_nothing(autojump_clock, tmp_path):
    async with open_machines(tmp_path, voters=3) as machines:
        one, two, three = machines.all
        before = three.up.state.state_hash()
        await three.stop()
        with open_recovery(three.folder, SETTINGS):
            pass
        assert not (three.folder / "recovering").exists()
        await three.start()
        assert three.up.state.state_hash() == before
        await until(lambda: three.up.has_quorum)
        await one.up.change(tag(1))
        await same_state(one, two, three)


async def test_a_crash_at_any_moment_leaves_the_old_cluster_or_the_recovered_one(
    autojump_clock, tmp_path
):
    async with open_machines(tmp_path, voters=3) as machines:
        one, two, three = machines.all
        await one.up.change(tag(1))
        await same_state(one, two, three)
        old = three.up.state.state_hash()
        await lost(machines, *machines.all)
        images = images_of_recovering(three.folder, tmp_path / "images")
        with contextlib.closing(open_cluster_state(three.folder / "state")) as state:
            new = state.state_hash()

        found = []
        for image in images:
            # A machine is its folder: the next start finds what the crash left.
            shutil.rmtree(three.folder)
            image.rename(three.folder)
            await three.start()
            await trio.sleep(5)
            found.append(three.up.leads)
            assert knows(three, 1)
            if not three.up.leads:
                assert three.up.state.state_hash() == old
                await three.stop()
                recovered(three)
                await three.start()
            await until(lambda: three.up.leads)
            assert three.up.state.member_ids() == {three.peer}
            await three.stop()
    assert len(found) > 20
    assert found == sorted(found)  # once it is recovered it stays so
    assert found[0] is False
    assert found[-1] is True
    assert old != new


def images_of_recovering(folder: Path, images: Path) -> list[Path]:
    """Recover, and keep a copy of the folder as it was whenever it had changed since the last line
    that was run: what a process would leave that is killed there.
    """
    traced = tuple(
        module.__file__ or "" for module in (recovery, cluster_state, state_snapshots, file_log)
    )
    kept: list[Path] = []
    seen: list[object] = [None]

    def keep() -> None:
        now = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files(folder)]
        if now != seen[0]:
            seen[0] = now
            image = images / f"{len(kept):03}"
            shutil.copytree(folder, image)
            kept.append(image)

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            keep()
        return trace

    with open_recovery(folder, SETTINGS) as prepared:
        keep()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            prepared.carry_out()
        finally:
            sys.settrace(before)
        keep()
    keep()
    return kept


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())

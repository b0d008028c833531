"""Pulling whole models: what a name means, from whom the blobs come, what is told meanwhile."""

import pytest
import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import (
    BadName,
    DigestMismatch,
    ModelNotFound,
    NoSources,
    OriginUnavailable,
    StoreFull,
    StoreReadOnly,
)
from tests.transfer.ram_origin import RamOrigin
from tests.transfer.swarm import MiB, model_of, open_swarm, some_bytes

pytestmark = pytest.mark.usefixtures("repeatable")

WEIGHTS = some_bytes(9 * MiB)
TEMPLATE = b"{{ .Prompt }}"
CONFIG = b'{"model_format":"gguf"}'
MODEL = model_of(WEIGHTS, TEMPLATE, config=CONFIG)
BLOBS = (WEIGHTS, TEMPLATE, CONFIG)
NAME = parse_model_name("some:model")


async def add_holder(swarm, manifest=MODEL, blobs=BLOBS, **options):
    node = await swarm.add(holding=blobs, **options)
    await node.store.put_manifest(NAME, manifest)
    return node


async def test_a_model_comes_from_a_neighbour_and_is_told_as_ollama_tells_it(autojump_clock, seed):
    states = []
    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm, upload_bytes_s=4 * MiB)
        me = await swarm.add()
        with trio.fail_after(60):
            report = await me.transfer.pull("some:model", on_progress=states.append)
        assert (await me.store.manifest(NAME)).raw == MODEL.raw
        assert report.model == "some:model"
        assert report.manifest_digest == MODEL.digest
        assert report.bytes_total == report.bytes_fetched == sum(map(len, BLOBS))
        assert report.bytes_refetched == 0
        assert [(s.name, s.kind, s.bytes) for s in report.sources] == [
            (holder.id, "peer", report.bytes_total)
        ]
    told = list(dict.fromkeys(state.status for state in states))
    pulling = {f"pulling {digest_of(blob)[7:19]}" for blob in BLOBS}
    assert told[0] == "pulling manifest"
    assert pulling <= set(told[1:-3])
    assert told[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    weights = [state for state in states if state.digest == digest_of(WEIGHTS)]
    assert [s.completed for s in weights] == sorted(s.completed for s in weights)
    assert weights[-1].completed == weights[-1].total == len(WEIGHTS)
    assert max(state.active_sources for state in weights) == 1


async def test_what_is_here_already_is_not_fetched(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm)
        me = await swarm.add(holding=[WEIGHTS])
        with trio.fail_after(60):
            report = await me.transfer.pull("some:model")
        assert report.bytes_fetched == len(TEMPLATE) + len(CONFIG)
        assert holder.transfer.bytes_served == report.bytes_fetched


async def test_a_blob_of_a_finished_pull_is_served_to_the_next(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm)
        one = await swarm.add()
        with trio.fail_after(60):
            await one.transfer.pull("some:model")
        two = await swarm.add()
        swarm.network.kill(holder.host)
        with trio.fail_after(60):
            report = await two.transfer.pull("some:model")
        assert {share.name for share in report.sources} == {one.id}


async def test_what_most_members_take_the_name_to_mean_is_pulled(autojump_clock, seed):
    other = model_of(b"another model")
    notes = []
    async with open_swarm(seed) as swarm:
        await add_holder(swarm, other, (b"another model", b"{}"))
        for _ in range(2):
            await add_holder(swarm)
        me = await swarm.add()
        with trio.fail_after(60):
            report = await me.transfer.pull(
                "some:model", on_progress=lambda state: notes.append(state.note)
            )
        assert report.manifest_digest == MODEL.digest
        assert "members differ: 2 of 3 hold this version" in notes


async def test_two_pulls_of_one_model_are_one(autojump_clock, seed):
    told = [], []
    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm, upload_bytes_s=4 * MiB)
        me = await swarm.add()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for states in told:
                    nursery.start_soon(_pull, me, states.append)
                    await trio.sleep(0.5)
                assert me.transfer.pulls() == ("some:model",)
        assert holder.transfer.bytes_served == sum(map(len, BLOBS))
    assert told[0][-1] == told[1][-1]
    assert told[1][-1].status == "success"


async def test_two_callers_in_the_same_moment_are_told_the_same(autojump_clock, seed):
    told = [], []
    async with open_swarm(seed) as swarm:
        await add_holder(swarm)
        me = await swarm.add()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for states in told:
                    nursery.start_soon(_pull, me, states.append)
        assert told[0] == told[1]
        assert me.transfer.pulls() == ()


async def test_a_pull_that_begins_while_the_last_one_is_being_cancelled(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await add_holder(swarm, upload_bytes_s=4 * MiB)
        me = await swarm.add()
        with trio.fail_after(60):
            with trio.move_on_after(1):
                await me.transfer.pull("some:model")
            report = await me.transfer.pull("some:model")
        assert 0 < report.bytes_fetched < report.bytes_total


async def _pull(node, on_progress):
    await node.transfer.pull("some:model", on_progress=on_progress)


async def test_one_of_two_callers_may_leave(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await add_holder(swarm, upload_bytes_s=4 * MiB)
        me = await swarm.add()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pull, me, lambda state: None)
                with trio.move_on_after(1):
                    await me.transfer.pull("some:model")
        assert await me.store.has(digest_of(WEIGHTS))


async def test_a_name_that_nobody_knows(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await swarm.add()
        me = await swarm.add()
        with trio.fail_after(60), pytest.raises(ModelNotFound, match="no:such"):
            await me.transfer.pull("no:such")


async def test_a_model_that_no_neighbour_knows_is_found_further_away(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder, neighbour, seeker = await add_holder(swarm), await swarm.add(), await swarm.add()
        await holder.transfer.announce(NAME)
        await seeker.host.disconnect(holder.id)
        await neighbour.host.disconnect(holder.id)
        swarm.directory.dials = True
        report = await seeker.transfer.pull(NAME)
        assert [share.name for share in report.sources] == [holder.id]


async def test_without_anybody_to_ask_that_is_said(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        alone = await swarm.add()
        with pytest.raises(NoSources, match="no member of the swarm can be reached"):
            await alone.transfer.pull(NAME)


async def test_a_frozen_member_delays_a_pull_by_little(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        _, frozen, seeker = await add_holder(swarm), await swarm.add(), await swarm.add()
        swarm.network.freeze(frozen.host)
        report = await seeker.transfer.pull(NAME)
        assert report.seconds < 2.0


async def test_a_name_that_is_none(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        me = await swarm.add()
        with pytest.raises(BadName):
            await me.transfer.pull("../etc/passwd:x")


async def test_too_little_room_is_said_before_the_first_byte(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm)
        me = await swarm.add(store=RamStore(capacity_bytes=len(WEIGHTS)))
        with trio.fail_after(60), pytest.raises(StoreFull):
            await me.transfer.pull("some:model")
        assert holder.transfer.bytes_served == 0


async def test_a_store_that_cannot_be_written(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await add_holder(swarm)
        me = await swarm.add(store=RamStore(writable=False))
        with trio.fail_after(60), pytest.raises(StoreReadOnly):
            await me.transfer.pull("some:model")


def origin_with_model(**options):
    origin = RamOrigin(*BLOBS, **options)
    origin.manifests[NAME.key] = MODEL
    return origin


async def test_without_peers_the_origin_serves(autojump_clock, seed):
    origin = origin_with_model()
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            report = await me.transfer.pull("some:model")
        assert [(s.name, s.kind) for s in report.sources] == [("registry.ollama.ai", "origin")]
        assert origin.bytes_sent == report.bytes_fetched == report.bytes_total


async def test_what_a_peer_holds_is_not_asked_of_the_origin(autojump_clock, seed):
    origin = origin_with_model()
    async with open_swarm(seed) as swarm:
        await add_holder(swarm)
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            await me.transfer.pull("some:model", from_origin=True)
        assert origin.ranges == 0


async def test_the_origin_takes_over_when_the_peers_are_gone(autojump_clock, seed):
    origin = origin_with_model()
    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm, upload_bytes_s=2 * MiB)
        me = await swarm.add(origin=origin)

        async def kill() -> None:
            await trio.sleep(2)
            swarm.network.kill(holder.host)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill)
                report = await me.transfer.pull("some:model")
        shares = {share.kind: share.bytes for share in report.sources}
        assert shares["peer"] > MiB
        assert shares["origin"] == origin.bytes_sent > MiB
        assert report.bytes_total == sum(shares.values())


async def test_a_peer_that_comes_later_takes_over_from_the_origin(autojump_clock, seed):
    origin = origin_with_model(bytes_s=100_000)
    async with trio.open_nursery() as nursery, open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        done = trio.Event()

        async def pull() -> None:
            await me.transfer.pull("some:model")
            done.set()

        nursery.start_soon(pull)
        await trio.sleep(40)
        assert not await me.store.has(digest_of(WEIGHTS))
        await add_holder(swarm)
        with trio.fail_after(15):
            await done.wait()
        assert origin.bytes_sent < len(WEIGHTS)


async def test_a_broken_range_of_the_origin_is_asked_for_again(autojump_clock, seed):
    origin = origin_with_model()
    origin.failures = 2
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            report = await me.transfer.pull("some:model")
        assert report.bytes_fetched == report.bytes_total
        assert 0 < report.bytes_refetched < 16 * MiB


async def test_an_origin_that_always_fails_ends_the_pull_with_its_error(autojump_clock, seed):
    origin = origin_with_model()
    origin.failures = 1_000
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        with trio.fail_after(60), pytest.raises(OriginUnavailable, match="broke"):
            await me.transfer.pull("some:model")


async def test_an_origin_that_lies_once_is_asked_once_more(autojump_clock, seed):
    origin = origin_with_model()
    origin.lies = 1
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            await me.transfer.pull("some:model")
        assert await me.store.has(digest_of(WEIGHTS))


async def test_an_origin_that_lies_twice_ends_the_pull(autojump_clock, seed):
    origin = origin_with_model()
    origin.lies = 1_000
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        with trio.fail_after(60), pytest.raises(DigestMismatch):
            await me.transfer.pull("some:model")
        with pytest.raises(ModelNotFound):
            await me.store.manifest(NAME)


async def test_events_tell_of_pulls(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        await add_holder(swarm)
        me = await swarm.add()
        async with me.feed.subscribe() as events:
            with trio.fail_after(60):
                await me.transfer.pull("some:model")
                with pytest.raises(ModelNotFound):
                    await me.transfer.pull("no:such")
            kinds = [(await events.__anext__()).kind for _ in range(4)]
        assert kinds == ["pull.started", "pull.finished", "pull.started", "pull.failed"]


# -- a name that gets another version ----------------------------------------------------------

NEXT_WEIGHTS = some_bytes(MiB, seed=2)
NEXT = model_of(NEXT_WEIGHTS, TEMPLATE, config=CONFIG)


async def test_a_newer_version_takes_the_place_of_the_old(autojump_clock, seed):
    origin = origin_with_model()
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        with trio.fail_after(60):
            await me.transfer.pull(NAME)
            origin.blobs[digest_of(NEXT_WEIGHTS)] = NEXT_WEIGHTS
            origin.manifests[NAME.key] = NEXT
            await me.transfer.pull(NAME, from_origin=True)
        assert await me.store.blobs() == sorted(map(digest_of, (NEXT_WEIGHTS, TEMPLATE, CONFIG)))
        announced = {digest for digest, who in swarm.directory.holders.items() if me.id in who}
        assert digest_of(WEIGHTS) not in announced
        assert {digest_of(TEMPLATE), digest_of(NEXT_WEIGHTS)} <= announced


async def test_the_old_versions_blobs_stay_for_another_name_of_them(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        me = await swarm.add(holding=[*BLOBS, NEXT_WEIGHTS])
        other = parse_model_name("other:model")
        await me.transfer.put_manifest(NAME, MODEL)
        await me.transfer.put_manifest(other, MODEL)
        await me.transfer.put_manifest(NAME, NEXT)
        assert await me.store.has(digest_of(WEIGHTS))
        await me.transfer.put_manifest(other, NEXT)
        assert not await me.store.has(digest_of(WEIGHTS))


async def test_the_old_versions_blobs_stay_for_a_pull_that_wants_them(autojump_clock, seed):
    late = some_bytes(2 * MiB, seed=3)
    origin = RamOrigin(late, bytes_s=MiB)
    other = parse_model_name("other:model")
    origin.manifests[other.key] = model_of(WEIGHTS, late, config=CONFIG)
    async with open_swarm(seed) as swarm:
        me = await swarm.add(holding=[*BLOBS, NEXT_WEIGHTS], origin=origin)
        await me.transfer.put_manifest(NAME, MODEL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(me.transfer.pull, other)
            await trio.sleep(1)
            assert me.transfer.pulls() == ("other:model",)
            await me.transfer.put_manifest(NAME, NEXT)
            assert await me.store.has(digest_of(WEIGHTS))
        assert (await me.store.manifest(other)).raw == origin.manifests[other.key].raw


async def test_a_blob_that_is_removed_under_a_pull_is_fetched_again(autojump_clock, seed):
    late = some_bytes(2 * MiB, seed=3)
    origin = RamOrigin(WEIGHTS, late, CONFIG, bytes_s=MiB)
    other = parse_model_name("other:model")
    origin.manifests[other.key] = model_of(WEIGHTS, late, config=CONFIG)
    async with open_swarm(seed) as swarm:
        me = await swarm.add(holding=BLOBS, origin=origin)
        await me.store.put_manifest(NAME, MODEL)
        reports = []

        async def pull() -> None:
            reports.append(await me.transfer.pull(other))

        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pull)
                await trio.sleep(1)
                assert digest_of(WEIGHTS) in await me.store.remove_manifest(NAME)
        assert await me.store.blobs() == sorted(map(digest_of, (WEIGHTS, late, CONFIG)))
        assert reports[0].bytes_fetched == reports[0].bytes_total


async def test_a_begun_blob_counts_by_what_it_misses(autojump_clock, seed):
    class Sparse(RamStore):
        """As on a disk: a begun blob has only the room of the bytes that are there."""

        async def missing_bytes(self, digest):
            return len(WEIGHTS) - MiB if digest == digest_of(WEIGHTS) else None

        async def free_bytes(self):
            return self.free

    async with open_swarm(seed) as swarm:
        holder = await add_holder(swarm)
        me = await swarm.add(store=Sparse())
        needed = len(WEIGHTS) - MiB + len(TEMPLATE) + len(CONFIG)
        me.store.free = needed - 1
        with trio.fail_after(60), pytest.raises(StoreFull):
            await me.transfer.pull(NAME)
        assert holder.transfer.bytes_served == 0
        me.store.free = needed
        with trio.fail_after(60):
            await me.transfer.pull(NAME)


async def test_a_fault_in_a_pull_ends_that_pull_and_nothing_else(autojump_clock, seed):
    class Faulty(RamOrigin):
        async def manifest(self, name, *, insecure=False):
            raise OverflowError("Python int too large to convert to C int")

    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=Faulty())
        async with me.feed.subscribe() as events:
            with trio.fail_after(60), pytest.raises(OverflowError):
                await me.transfer.pull("no:such")
            told = [await events.__anext__() for _ in range(2)]
        assert told[1].kind == "pull.failed"
        assert told[1].facts["error"] == "internal_error"
        await add_holder(swarm)
        with trio.fail_after(60):
            await me.transfer.pull(NAME)


async def test_a_fault_in_a_blobs_fetch_ends_that_pull_and_nothing_else(autojump_clock, seed):
    origin = origin_with_model()
    async with open_swarm(seed) as swarm:
        me = await swarm.add(origin=origin)
        partial = me.store.partial

        async def faulty(digest, size):
            raise RecursionError

        me.store.partial = faulty
        with trio.fail_after(60), pytest.raises(RecursionError):
            await me.transfer.pull(NAME)
        me.store.partial = partial
        with trio.fail_after(60):
            await me.transfer.pull(NAME)

"""Whose word counts when members are asked what a name means."""

from datetime import UTC, datetime

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import MalformedMessage, ModelNotFound, NoSources, PeerMisbehaved
from ollamamax_p2p.transfer.models_exchange import (
    FUTURE_MAX_S,
    AskManifest,
    HeldManifest,
    _answers,
    _questions,
    choose,
)
from tests.transfer.swarm import model_of, open_swarm

NAME = parse_model_name("some:model")
NOW = 1_800_000_000.0
OLD, NEW = model_of(b"old"), model_of(b"new")


def said(manifest, modified_at):
    return HeldManifest(raw=manifest.raw, modified_at=modified_at)


def test_of_two_held_equally_often_the_newer_counts():
    for answers in ([said(OLD, NOW - 9), said(NEW, NOW - 1)], [said(NEW, 5.0), said(OLD, 4.0)]):
        assert choose(NAME, answers, NOW).manifest.raw == NEW.raw


def test_a_date_in_the_far_future_wins_no_tie():
    for manifest, other in ((OLD, NEW), (NEW, OLD)):
        answers = [said(manifest, NOW + FUTURE_MAX_S + 1), said(other, NOW - 1_000.0)]
        assert choose(NAME, answers, NOW).manifest.raw == other.raw


def test_a_clock_that_is_a_little_fast_is_taken_for_now():
    answers = [said(OLD, NOW - 1.0), said(NEW, NOW + 60.0)]
    assert choose(NAME, answers, NOW).manifest.raw == NEW.raw
    larger = max(OLD, NEW, key=lambda manifest: manifest.raw)
    smaller = min(OLD, NEW, key=lambda manifest: manifest.raw)
    tied = [said(smaller, NOW + 60.0), said(larger, NOW)]
    assert choose(NAME, tied, NOW).manifest.raw == larger.raw


async def add_holder(swarm, blob):
    node = await swarm.add(holding=[blob, b"{}"])
    await node.store.put_manifest(NAME, model_of(blob))
    return node


@pytest.mark.usefixtures("repeatable")
class TestInASwarm:
    async def test_the_banned_have_no_say(self, autojump_clock, seed):
        async with open_swarm(seed) as swarm:
            await add_holder(swarm, b"good")
            liars = [await add_holder(swarm, b"evil") for _ in range(3)]
            me = await swarm.add()
            for liar in liars:
                me.transfer.bans.ban(liar.id, PeerMisbehaved(liar.id, "it lied"))
            report = await me.transfer.pull(NAME)
            assert report.manifest_digest == model_of(b"good").digest

    async def test_the_banned_are_not_found_further_away_either(self, autojump_clock, seed):
        async with open_swarm(seed) as swarm:
            liar, _, me = await add_holder(swarm, b"evil"), await swarm.add(), await swarm.add()
            await liar.transfer.announce(NAME)
            me.transfer.bans.ban(liar.id, PeerMisbehaved(liar.id, "it lied"))
            with pytest.raises(ModelNotFound):
                await me.transfer.pull(NAME)

    async def test_members_that_do_not_answer_are_not_members_that_say_no(
        self, autojump_clock, seed
    ):
        async with open_swarm(seed) as swarm:
            frozen, me = await add_holder(swarm, b"good"), await swarm.add()
            swarm.network.freeze(frozen.host)
            with pytest.raises(NoSources, match="no member of the swarm can be reached"):
                await me.transfer.pull(NAME)

    async def test_a_holder_that_is_busy_is_asked_again_although_another_says_no(
        self, autojump_clock, seed
    ):
        async with open_swarm(seed) as swarm:
            busy, _, me = await add_holder(swarm, b"good"), await swarm.add(), await swarm.add()
            swarm.network.freeze(busy.host)

            async def thaw_later() -> None:
                await trio.sleep(6)
                swarm.network.thaw(busy.host)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(thaw_later)
                report = await me.transfer.pull(NAME)
            assert report.manifest_digest == model_of(b"good").digest

    async def test_an_answer_looks_at_no_other_model(self, autojump_clock, seed):
        class Counting(RamStore):
            async def models(self):
                raise AssertionError("one question must not read the whole store")

        when = datetime(2026, 1, 2, tzinfo=UTC)
        store = Counting(now=lambda: when)
        async with open_swarm(seed) as swarm:
            host = await swarm.add_host()
            store.models = RamStore.models.__get__(store)  # opening lists them once, to announce
            holder = await swarm.start(host, holding=[b"good", b"{}"], store=store)
            del store.models
            await holder.store.put_manifest(NAME, model_of(b"good"))
            me = await swarm.add()
            report = await me.transfer.pull(NAME)
            assert report.manifest_digest == model_of(b"good").digest
            assert await store.modified_at(NAME) == when


# -- what is on the wire -----------------------------------------------------------------------

near_messages = st.dictionaries(
    st.sampled_from(["is", "name", "raw", "modified_at"]),
    st.one_of(
        st.sampled_from(["ask_manifest", "held_manifest", "x" * 1_024, "x" * 1_025]),
        st.text(max_size=20),
        st.binary(max_size=40),
        st.floats(),
        st.integers(-(2**63), 2**64 - 1),
        st.none(),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    max_size=4,
)


@settings(max_examples=10_000, deadline=None)
@given(st.binary(max_size=200) | near_messages.map(msgpack.packb))
def test_any_bytes_are_a_question_or_an_answer_about_a_name_or_malformed(data):
    for codec, kind in ((_questions, AskManifest), (_answers, HeldManifest)):
        try:
            message = codec.decode(data)
        except MalformedMessage:
            continue
        assert isinstance(message, kind)
        if isinstance(message, AskManifest):
            assert len(message.name) <= 1_024
        else:
            assert 0 <= message.modified_at <= 1e11

"""The providers protocol between honest, silent and lying members, and at the door."""

import pytest
import trio

from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.discovery.core.provider_messages import (
    Ask,
    Holder,
    Holders,
    Noted,
    Tell,
    answer_codec,
    request_codec,
)
from ollamamax_p2p.discovery.swarm_providers import ASK_DEADLINE_S, REACH_DEADLINE_S
from ollamamax_p2p.errors import NotAdmitted
from ollamamax_p2p.host import open_requests
from ollamamax_p2p.identity import Membership
from ollamamax_p2p.wire import protocol_ids

BLOB = digest_of(b"a blob")
TOLD_S = 3
"""By then what was announced has been told, on an idle simulated network."""


async def test_what_is_withdrawn_is_not_found_any_more(swarm):
    holder, seeker = await swarm.add_with_providers(), await swarm.add_with_providers()
    await seeker.link(holder)
    await holder.providers.announce([BLOB])
    await trio.sleep(TOLD_S)
    await holder.providers.withdraw([BLOB])
    await trio.sleep(TOLD_S)
    assert await seeker.providers.find(BLOB) == []


async def test_a_withdrawal_while_apart_is_known_after_meeting_again(swarm):
    holder, seeker = await swarm.add_with_providers(), await swarm.add_with_providers()
    await seeker.link(holder)
    await holder.providers.announce([BLOB])
    await trio.sleep(TOLD_S)
    swarm.network.drop(holder.host, seeker.host)
    await trio.sleep(1)
    await holder.providers.withdraw([BLOB])
    await seeker.link(holder)
    await trio.sleep(TOLD_S)
    assert await seeker.providers.find(BLOB) == []


async def test_a_holder_that_was_lost_is_dialled_again_at_the_address_it_told(swarm):
    holder, seeker = await swarm.add_with_providers(), await swarm.add_with_providers()
    await seeker.link(holder)
    await holder.providers.announce([BLOB])
    await trio.sleep(TOLD_S)
    swarm.network.drop(holder.host, seeker.host)
    await trio.sleep(1)
    assert seeker.linked() == set()
    assert await seeker.providers.find(BLOB) == [holder.peer]


async def test_a_holder_that_is_gone_for_good_is_not_found(swarm):
    holder, seeker = await swarm.add_with_providers(), await swarm.add_with_providers()
    await seeker.link(holder)
    await holder.providers.announce([BLOB])
    await trio.sleep(TOLD_S)
    swarm.network.kill(holder.host)
    await trio.sleep(1)
    with trio.fail_after(ASK_DEADLINE_S + REACH_DEADLINE_S + 1):
        assert await seeker.providers.find(BLOB) == []


async def test_an_announcement_is_renewed_for_as_long_as_it_holds(swarm):
    times = {"announce_interval_s": 20, "announce_lifetime_s": 60}
    holder = await swarm.add_with_providers(**times)
    seeker = await swarm.add_with_providers(**times)
    await seeker.link(holder)
    await holder.providers.announce([BLOB])
    await trio.sleep(300)
    assert await seeker.providers.find(BLOB) == [holder.peer]


async def test_an_announcement_that_is_not_renewed_expires(swarm):
    seeker = await swarm.add_with_providers()
    async with teller(swarm, seeker) as requests:
        await requests.ask(seeker.peer, tell(held=[BLOB], lifetime_s=60))
        assert await seeker.providers.find(BLOB) != []
        await trio.sleep(61)
        assert await seeker.providers.find(BLOB) == []


async def test_a_thousand_blobs_and_more_are_told_in_pages(swarm):
    holder, seeker = await swarm.add_with_providers(), await swarm.add_with_providers()
    blobs = [digest_of(number.to_bytes(4, "big")) for number in range(5_000)]
    await holder.providers.announce(blobs)
    await seeker.link(holder)
    await trio.sleep(TOLD_S)
    for blob in (blobs[0], blobs[1_024], blobs[-1]):
        assert await seeker.providers.find(blob) == [holder.peer]


async def test_a_peer_speaks_for_itself_only(swarm):
    seeker, victim = await swarm.add_with_providers(), await swarm.add_with_providers()
    await seeker.link(victim)
    async with teller(swarm, seeker) as requests:
        await requests.ask(
            seeker.peer, tell(held=[BLOB], addresses=[str(victim.host.addresses[0])])
        )
        found = await seeker.providers.find(BLOB)
    assert victim.peer not in found
    assert len(found) == 1


async def test_a_rumour_ends_after_one_step(swarm):
    """A holder is known to those it told and to whom they tell, and no further unless reached."""
    liar, middle, seeker = [await swarm.add_with_providers() for _ in range(3)]

    await middle.link(liar)
    await seeker.link(middle)
    ghost = f"/ip4/10.9.9.9/tcp/4011/p2p/{swarm.network.add_host('ghost').peer_id}"

    async def lie(peer, request):
        return Holders(holders=[Holder(addresses=[ghost])]) if isinstance(request, Ask) else Noted()

    async with requests_of(liar, lie):
        await trio.sleep(TOLD_S)
        assert await middle.providers.find(BLOB) == []
        answer = await middle.providers.answer(seeker.peer, Ask(digest=raw_hash(BLOB)))
    assert answer == Holders(holders=[])


async def test_a_neighbour_that_never_answers_costs_no_more_than_the_deadline(swarm):
    seeker, silent = await swarm.add_with_providers(), await swarm.add_with_providers()
    await seeker.link(silent)

    async def never(peer, request):
        await trio.sleep_forever()

    async with requests_of(silent, never):
        with trio.fail_after(ASK_DEADLINE_S + REACH_DEADLINE_S + 1):
            assert await seeker.providers.find(BLOB) == []


async def test_a_silent_neighbour_delays_a_find_by_half_a_second_if_a_holder_is_known(swarm):
    seeker, silent = await swarm.add_with_providers(), await swarm.add_with_providers()
    holder = await swarm.add_with_providers()
    await seeker.link(silent)
    await seeker.link(holder)
    await holder.providers.announce([BLOB])
    await trio.sleep(TOLD_S)

    async def never(peer, request):
        await trio.sleep_forever()

    async with requests_of(silent, never):
        with trio.fail_after(0.7):
            assert await seeker.providers.find(BLOB) == [holder.peer]


async def test_a_neighbour_that_names_a_stranger_gains_it_nothing(swarm):
    """The named peer is dialled, fails to prove that it is a member, and is not a holder."""
    seeker, liar = await swarm.add_with_providers(), await swarm.add_with_providers()
    outsider = await swarm.add(Membership.create(None))
    await seeker.link(liar)
    address = str(outsider.host.addresses[0])

    async def lie(peer, request):
        return (
            Holders(holders=[Holder(addresses=[address])]) if isinstance(request, Ask) else Noted()
        )

    async with requests_of(liar, lie):
        assert await seeker.providers.find(BLOB) == []
    assert outsider.peer not in seeker.linked()


async def test_a_stranger_that_is_connected_gets_no_provider_record(swarm):
    holder = await swarm.add_with_providers()
    await holder.providers.announce([BLOB])
    stranger = swarm.network.add_host("stranger")
    await stranger.connect(holder.host.addresses)
    stranger.admit(holder.peer)
    async with open_requests(
        stranger,
        protocol_ids.PROVIDERS,
        requests=request_codec,
        answers=answer_codec,
        answer=None,
    ) as requests:
        with pytest.raises(NotAdmitted):
            await requests.ask(holder.peer, Ask(digest=raw_hash(BLOB)))


async def test_a_stranger_that_is_connected_is_told_nothing(swarm):
    holder = await swarm.add_with_providers()
    stranger, heard = swarm.network.add_host("stranger"), []
    stranger.admit(holder.peer)

    async def listen(stream):
        heard.append(await stream.receive_some())

    stranger.set_handler(protocol_ids.PROVIDERS, listen, for_strangers=True)
    await stranger.connect(holder.host.addresses)
    await holder.providers.announce([BLOB])
    await trio.sleep(8)
    assert heard == []


async def test_a_member_that_cannot_note_is_tried_again_and_then_knows(swarm):
    holder, deaf = await swarm.add_with_providers(), await swarm.add()
    await holder.providers.announce([BLOB])
    await holder.link(deaf)  # has no providers protocol yet
    await trio.sleep(10)
    heard = []

    async def note(peer, request):
        heard.append(request)
        return Noted()

    async with requests_of(deaf, note):
        await trio.sleep(40)
    assert [request.held for request in heard] == [[raw_hash(BLOB)]]


def tell(*, held, addresses=(), lifetime_s=1_000.0) -> Tell:
    return Tell(
        fresh=False,
        held=[raw_hash(digest) for digest in held],
        released=[],
        addresses=list(addresses),
        lifetime_s=lifetime_s,
    )


def requests_of(member, answer):
    """Answers in place of the member's own."""
    return open_requests(
        member.host,
        protocol_ids.PROVIDERS,
        requests=request_codec,
        answers=answer_codec,
        answer=answer,
    )


class teller:
    """A linked member that tells what the test wants, and nothing by itself."""

    def __init__(self, swarm, to) -> None:
        self._swarm, self._to = swarm, to

    async def __aenter__(self):
        member = await self._swarm.add()
        await member.link(self._to)

        async def note(peer, request):
            return Noted() if isinstance(request, Tell) else Holders(holders=[])

        self._requests = requests_of(member, note)
        return await self._requests.__aenter__()

    async def __aexit__(self, *exc):
        return await self._requests.__aexit__(*exc)

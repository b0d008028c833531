"""The simulated network itself: time, fairness, faults, and that a seed repeats a run."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
import trio
import trio.testing

from ollamamax_p2p.errors import MalformedMessage, PeerGone, PeerUnreachable
from ollamamax_p2p.host import (
    ByteStream,
    LinkConditions,
    PeerEvent,
    SimulatedHost,
    SimulatedNetwork,
    open_simulated_network,
)
from ollamamax_p2p.testing.determinism import run_simulation

MB = 1_000_000
SINK = "/test/sink/1"
ECHO = "/test/echo/1"


@pytest.fixture
async def network(rng):
    async with open_simulated_network(rng=rng) as network:
        yield network


async def sink(stream: ByteStream) -> None:
    """Read all, then say how much it was."""
    size = 0
    while data := await stream.receive_some():
        size += len(data)
    await stream.send_all(str(size).encode())


async def echo(stream: ByteStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def add_host(network: SimulatedNetwork, name: str, **rates: float) -> SimulatedHost:
    host = network.add_host(name, **rates)
    host.set_handler(SINK, sink, for_strangers=True)
    host.set_handler(ECHO, echo, for_strangers=True)
    return host


async def seconds_to_send(source: SimulatedHost, target: SimulatedHost, size: int) -> float:
    """From the first byte until the target has said that it has all of them."""
    await source.connect(target.addresses)
    stream = await source.open_stream(target.peer_id, SINK)
    start = trio.current_time()
    await stream.send_all(bytes(size))
    await stream.send_eof()
    assert await stream.receive_some() == str(size).encode()
    return trio.current_time() - start


# -- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", ["upload", "download", "link"])
async def test_bytes_take_the_time_of_the_narrowest_rate(autojump_clock, network, narrow):
    source, target = add_host(network, "source"), add_host(network, "target")
    if narrow == "upload":
        network.set_rates(source, upload_bytes_s=10 * MB)
    elif narrow == "download":
        network.set_rates(target, download_bytes_s=10 * MB)
    else:
        network.set_link(source, target, LinkConditions(bandwidth_bytes_s=10 * MB))
    assert await seconds_to_send(source, target, 100 * MB) == pytest.approx(10, rel=0.01)


async def test_a_window_bounds_the_rate_over_a_long_way(autojump_clock, network):
    source, target = add_host(network, "source"), add_host(network, "target")
    network.set_link(
        source, target, LinkConditions(latency_s=0.05, jitter_s=0, window_bytes=1_000_000)
    )
    # A window per round trip of 0.1 s: 10 MB/s, whatever the link could carry.
    assert await seconds_to_send(source, target, 50 * MB) == pytest.approx(5, rel=0.1)


async def test_streams_share_an_upload_fairly(autojump_clock, network):
    source = add_host(network, "source", upload_bytes_s=10 * MB)
    targets = [add_host(network, f"target {n}") for n in range(4)]
    seconds = []

    async def send(target: SimulatedHost) -> None:
        seconds.append(await seconds_to_send(source, target, 10 * MB))

    async with trio.open_nursery() as nursery:
        for target in targets:
            nursery.start_soon(send, target)
    assert min(seconds) == pytest.approx(4, rel=0.05)
    assert max(seconds) == pytest.approx(4, rel=0.05)


async def test_a_small_message_does_not_wait_behind_a_big_stream(autojump_clock, network):
    source = add_host(network, "source", upload_bytes_s=10 * MB)
    target = add_host(network, "target")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(seconds_to_send, source, target, 100 * MB)
        await trio.sleep(1)
        stream = await source.open_stream(target.peer_id, ECHO)
        start = trio.current_time()
        await stream.send_all(b"ping")
        await stream.receive_some()
        # One segment of the other stream at most: 64 KiB at 10 MB/s.
        assert trio.current_time() - start < 0.02
        nursery.cancel_scope.cancel()


async def test_a_receiver_shares_its_download_between_senders(autojump_clock, network):
    target = add_host(network, "target", download_bytes_s=10 * MB)
    sources = [add_host(network, f"source {n}") for n in range(5)]
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for source in sources:
            nursery.start_soon(seconds_to_send, source, target, 4 * MB)
    assert trio.current_time() - start == pytest.approx(2, rel=0.05)


async def test_with_a_tick_messages_arrive_at_its_multiples_and_not_a_tick_later(
    autojump_clock, network
):
    here, there = add_host(network, "here"), add_host(network, "there")
    network.set_link(here, there, LinkConditions(latency_s=0.01, jitter_s=0, tick_s=0.01))
    await here.connect(there.addresses)
    stream = await here.open_stream(there.peer_id, ECHO)
    for _ in range(100):
        start = trio.current_time()
        await stream.send_all(b".")
        await stream.receive_some()
        assert trio.current_time() - start == pytest.approx(0.02)


async def test_bytes_are_counted_at_both_hosts(autojump_clock, network):
    source, target = add_host(network, "source"), add_host(network, "target")
    await seconds_to_send(source, target, 3 * MB)
    assert source.bytes_sent == target.bytes_received == 3 * MB


# -- faults ------------------------------------------------------------------------------------


async def test_a_killed_host_is_gone_for_its_peers_and_refuses_dials(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    stream = await here.open_stream(there.peer_id, ECHO)
    async with here.watch() as events:
        network.kill(there)
        assert await anext(events) == PeerEvent(there.peer_id, "disconnected")
    with pytest.raises(PeerGone):
        await stream.receive_some()
    with pytest.raises(PeerUnreachable, match="refused"):
        await here.connect(there.addresses)
    with pytest.raises(PeerUnreachable, match="down"):
        await there.connect(here.addresses)


async def test_a_revived_host_can_be_dialled_again(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    network.kill(there)
    await trio.sleep(1)
    network.revive(there)
    assert await seconds_to_send(here, there, 1000) < 1


async def test_a_host_killed_in_the_middle_of_a_send_raises_peer_gone_in_the_sender(
    autojump_clock, network
):
    here, there = add_host(network, "here", upload_bytes_s=1 * MB), add_host(network, "there")

    async def send() -> None:
        with pytest.raises(PeerGone):
            await seconds_to_send(here, there, 100 * MB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(10)
        network.kill(there)
    assert trio.current_time() < 100


async def test_a_frozen_host_reads_nothing_and_keeps_its_connections(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    stream = await here.open_stream(there.peer_id, ECHO)
    network.freeze(there)
    with trio.move_on_after(60) as scope:
        await stream.send_all(bytes(1 * MB))
    assert scope.cancelled_caught, "the window is full and nobody reads"
    assert here.connections()
    assert there.connections()
    with pytest.raises(PeerUnreachable, match="no answer"):
        await add_host(network, "third").connect(there.addresses)


async def test_a_thawed_host_goes_on_where_it_was(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    stream = await here.open_stream(there.peer_id, ECHO)
    network.freeze(there)
    await stream.send_all(b"are you there?")
    with trio.move_on_after(60):
        await stream.receive_some()
    network.thaw(there)
    assert await stream.receive_some() == b"are you there?"


async def test_a_partition_holds_everything_back_until_it_heals(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    stream = await here.open_stream(there.peer_id, ECHO)
    network.partition([here], [there])
    await stream.send_all(b"hello")
    with trio.move_on_after(60) as scope:
        await stream.receive_some()
    assert scope.cancelled_caught
    network.heal()
    assert await stream.receive_some() == b"hello"


async def test_one_of_two_partitions_heals_alone(autojump_clock, network):
    one, two, three = (add_host(network, name) for name in ("one", "two", "three"))
    first = network.partition([one])
    network.partition([three], [two])
    network.heal(first)
    assert await seconds_to_send(one, two, 1000) < 1
    with pytest.raises(PeerUnreachable, match="no answer"):
        await three.connect(two.addresses)
    network.heal()
    assert await seconds_to_send(three, two, 1000) < 1


async def test_a_connection_that_one_side_gave_up_during_a_partition_ends_on_both(
    autojump_clock, network
):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    network.partition([here])
    await here.disconnect(there.peer_id)
    await trio.sleep(60)
    assert there.connections(), "nobody could tell it"
    network.heal()
    await trio.sleep(1)
    assert not there.connections()


async def test_connections_are_lost_by_themselves_as_often_as_asked(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    network.set_link(here, there, LinkConditions(connection_life_s_mean=100))
    lives = []
    for _ in range(200):
        async with here.watch() as events:
            start = trio.current_time()
            await here.connect(there.addresses)
            while (await anext(events)).change != "disconnected":
                pass
            lives.append(trio.current_time() - start)
        await trio.sleep(1)
    assert sum(lives) / len(lives) == pytest.approx(100, rel=0.25)


async def test_a_dropped_connection_is_lost_on_both_sides_at_once(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    await here.connect(there.addresses)
    network.drop(here, there)
    assert here.connections() == there.connections() == ()


async def test_a_cancelled_dial_leaves_no_connection_behind(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    network.set_link(here, there, LinkConditions(latency_s=1, jitter_s=0))
    for given_s in (0.5, 1.5, 2.5, 3.5):
        with trio.move_on_after(given_s):
            await here.connect(there.addresses)
        await trio.sleep(10)
        assert here.connections() == there.connections() == ()


async def test_a_reader_of_events_that_lags_by_1024_is_ended(autojump_clock, network):
    here, there = add_host(network, "here"), add_host(network, "there")
    async with here.watch() as events:
        for _ in range(513):
            await here.connect(there.addresses)
            await here.disconnect(there.peer_id)
            await trio.sleep(0.1)
        seen = 0
        with pytest.raises(PeerGone, match="fell behind"):  # noqa: PT012 - it ends in the middle
            async for _ in events:
                seen += 1
    assert seen == 1024


async def test_an_error_that_is_not_a_peers_travels_up(autojump_clock, rng):
    async def broken(stream: ByteStream) -> None:
        raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012 - at the end of the block
        async with open_simulated_network(rng=rng) as network:
            here, there = add_host(network, "here"), add_host(network, "there")
            there.set_handler("/broken", broken, for_strangers=True)
            await here.connect(there.addresses)
            await here.open_stream(there.peer_id, "/broken")
            await trio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError)


# -- the seed ----------------------------------------------------------------------------------


def trace_of_a_busy_run(seed: int) -> str:
    """Twenty hosts that connect, talk, are lost and come back; a digest of all that happened."""
    lines: list[str] = []
    rng = random.Random(seed)

    async def talk(network: SimulatedNetwork, host: SimulatedHost, others, dice) -> None:
        for turn in range(10):
            other = dice.choice(others)
            try:
                if other is not host:
                    seconds = await seconds_to_send(host, other, dice.randrange(1, 300_000))
                    lines.append(f"{host.name} {turn} {seconds}")
            except (PeerGone, PeerUnreachable) as error:
                lines.append(f"{host.name} {turn} {error}")
            await trio.sleep(dice.random())

    async def trouble(network: SimulatedNetwork, hosts) -> None:
        for _ in range(5):
            await trio.sleep(1)
            victim = rng.choice(hosts)
            network.kill(victim)
            cut = network.partition(rng.sample(hosts, 3))
            await trio.sleep(1)
            network.revive(victim)
            network.heal(cut)

    async def main() -> None:
        conditions = LinkConditions(connection_life_s_mean=20)
        async with open_simulated_network(
            rng=rng, conditions=conditions, trace=lines.append
        ) as network:
            hosts = [add_host(network, f"host {n}", upload_bytes_s=1 * MB) for n in range(20)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trouble, network, hosts)
                for host in hosts:
                    nursery.start_soon(talk, network, host, hosts, random.Random(host.name))

    run_simulation(main, seed=seed)
    assert len(lines) > 500
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_same_seed_gives_the_same_run():
    assert trace_of_a_busy_run(1) == trace_of_a_busy_run(1) != trace_of_a_busy_run(2)


def test_a_run_does_not_depend_on_how_python_orders_sets_of_strings():
    program = "import test_simulated_network as t; print(t.trace_of_a_busy_run(1))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(seen) == 1


# -- size --------------------------------------------------------------------------------------


async def test_a_hundred_hosts_move_a_hundred_megabytes_over_thousands_of_streams(
    autojump_clock, network
):
    hosts = [add_host(network, f"host {n}", upload_bytes_s=10 * MB) for n in range(100)]

    async def talk(host: SimulatedHost, number: int) -> None:
        for step in range(1, 21):
            await seconds_to_send(host, hosts[(number + step) % 100], 50_000)

    async with trio.open_nursery() as nursery:
        for number, host in enumerate(hosts):
            nursery.start_soon(talk, host, number)
    assert sum(host.bytes_sent for host in hosts) > 100 * MB


async def test_a_peers_errors_do_not_reach_the_network(autojump_clock, network, caplog):
    here, there = add_host(network, "here"), add_host(network, "there")

    async def fail(stream: ByteStream) -> None:
        async with trio.open_nursery():  # wraps it in a group, as handlers with tasks do
            raise MalformedMessage(stream.peer, "nonsense")

    there.set_handler("/fail", fail, for_strangers=True)
    await here.connect(there.addresses)
    stream = await here.open_stream(there.peer_id, "/fail")
    with pytest.raises(PeerGone):
        await stream.receive_some()
    assert "nonsense" in caplog.text
    assert here.peer_id in caplog.text

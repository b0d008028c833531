"""What every StateMachine must do. Another implementation adds itself to MACHINES."""

import hashlib
from collections.abc import Callable

import pytest

from ollamamax_p2p.consensus.core.command import Command
from ollamamax_p2p.consensus.core.messages import ConfState, SnapshotMetadata
from ollamamax_p2p.consensus.state_machine import StateMachine
from ollamamax_p2p.errors import BlobNotFound, StoreDamaged
from ollamamax_p2p.testing.key_value import Append, KeyValue, encode_request

VOTERS = ConfState(voters=(1, 2, 3))
MACHINES: dict[str, tuple[Callable[[], StateMachine], bytes]] = {
    "key_value": (KeyValue, encode_request(Append("log", b"x"))),
}
"""How to make one, and a command that changes its state each time it is applied."""


@pytest.fixture(params=MACHINES)
def machines(request: pytest.FixtureRequest):
    make, command = MACHINES[request.param]
    made = []

    def new() -> StateMachine:
        made.append(make())
        return made[-1]

    new.command = command
    yield new
    for machine in made:
        machine.close()


def commands(machines, first: int, count: int) -> list[Command]:
    return [Command(index, 1, machines.command) for index in range(first, first + count)]


def begun(machines) -> StateMachine:
    machine = machines()
    machine.apply([Command(1, 1, b"", conf_state=VOTERS), *commands(machines, 2, 3)])
    return machine


def received(to: StateMachine, reader, *, spoiled: bool = False) -> tuple[int, bytes]:
    writer = to.receive_snapshot(reader.metadata, reader.size, reader.sha256)
    while data := reader.read(writer.received, 7):
        writer.write(data[::-1] if spoiled and writer.received == 0 else data)
    writer.close()
    return reader.size, reader.sha256


def test_it_remembers_what_is_applied_and_the_configuration(machines):
    machine = begun(machines)
    assert (machine.applied_index, machine.conf_state) == (4, VOTERS)


def test_equal_commands_give_equal_states_however_they_are_batched(machines):
    one, two = begun(machines), machines()
    for command in [Command(1, 1, b"", conf_state=VOTERS), *commands(machines, 2, 3)]:
        two.apply([command])
    assert one.state_hash() == two.state_hash()
    assert len(one.state_hash()) == 32
    two.apply(commands(machines, 5, 1))
    assert one.state_hash() != two.state_hash()


def test_nonsense_is_refused_by_a_result_and_alike(machines):
    one, two = begun(machines), begun(machines)
    nonsense = [Command(5, 1, b"\xc1nonsense"), Command(6, 1, b"x" * 1000)]
    assert one.apply(nonsense) == two.apply(nonsense)
    assert one.state_hash() == two.state_hash()


def test_a_command_of_a_session_is_applied_once(machines):
    machine = begun(machines)
    [session] = machine.apply([Command(5, 1, b"", opens_session=True)])
    number = int.from_bytes(session, "big")
    assert number == 5
    again = [Command(index, 1, machines.command, number, 1) for index in (6, 7)]
    first, second = machine.apply(again)
    assert first == second


def test_a_snapshot_makes_another_equal_and_is_then_its_newest(machines):
    one, two = begun(machines), machines()
    metadata = one.make_snapshot(1)
    assert metadata == SnapshotMetadata(4, 1, VOTERS)
    assert one.newest_snapshot() == metadata
    reader = one.open_snapshot(metadata)
    one.apply(commands(machines, 5, 1))  # which the reader does not see
    size, sha256 = received(two, reader)
    reader.close()
    two.install_snapshot(metadata, size, sha256)
    assert (two.applied_index, two.conf_state) == (4, VOTERS)
    assert two.newest_snapshot() == metadata  # by it a restart finds that the log lies behind
    two.apply(commands(machines, 5, 1))
    assert one.state_hash() == two.state_hash()


def test_what_is_not_the_snapshot_is_not_installed_and_thrown_away(machines):
    one, two = begun(machines), machines()
    before = two.state_hash()
    metadata = one.make_snapshot(1)
    reader = one.open_snapshot(metadata)
    size, sha256 = received(two, reader, spoiled=True)
    with pytest.raises(StoreDamaged):
        two.install_snapshot(metadata, size, sha256)
    assert (two.applied_index, two.state_hash()) == (0, before)
    two.install_snapshot(metadata, *received(two, reader))
    assert two.applied_index == 4


def test_receiving_goes_on_where_it_stopped_but_not_with_another_snapshot(machines):
    one, two = begun(machines), machines()
    metadata = one.make_snapshot(1)
    reader = one.open_snapshot(metadata)
    writer = two.receive_snapshot(metadata, reader.size, reader.sha256)
    writer.write(reader.read(0, 5))
    writer.close()
    assert two.receive_snapshot(metadata, reader.size, reader.sha256).received == 5
    other = hashlib.sha256(b"other").digest()
    assert two.receive_snapshot(metadata, reader.size, other).received == 0


def test_it_keeps_two_snapshots_and_takes_no_step_back(machines):
    machine = begun(machines)
    made = [machine.make_snapshot(1)]
    for index in (5, 6):
        machine.apply(commands(machines, index, 1))
        made.append(machine.make_snapshot(1))
    with pytest.raises(BlobNotFound):
        machine.open_snapshot(made[0])
    machine.open_snapshot(made[1]).close()
    with pytest.raises(ValueError, match="applied"):
        machine.install_snapshot(made[0], 1, bytes(32))
    with pytest.raises(ValueError, match="applied"):
        machine.apply(commands(machines, 6, 1))

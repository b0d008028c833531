"""A second, naive keeper of the agreed state, in RAM, and short ways to say commands."""

import hashlib

from ollamamax_p2p.cluster.core.commands import (
    AnyCommand,
    Done,
    FoundCluster,
    Refused,
    Result,
    decode_result,
    encode_command,
    encode_result,
)
from ollamamax_p2p.cluster.core.exactly_once import once, open_session
from ollamamax_p2p.cluster.core.rows import Row
from ollamamax_p2p.cluster.core.rules import Place, carry_out
from ollamamax_p2p.consensus import Command
from ollamamax_p2p.consensus.core.messages import ConfState
from ollamamax_p2p.identity import PeerId, peer_id_of
from ollamamax_p2p.testing.agreed_members import RamTables

KEY = b"k" * 32
T0 = 1_800_000_000


def peer(number: int) -> PeerId:
    return peer_id_of(hashlib.sha256(b"peer %d" % number).digest())


def digest(number: int) -> str:
    return "sha256:" + hashlib.sha256(b"%d" % number).hexdigest()


def secret_hash(number: int) -> bytes:
    return hashlib.sha256(b"secret %d" % number).digest()


def name(number: int) -> str:
    return f"registry.ollama.ai/library/m{number}:latest"


FOUND = FoundCluster(
    swarm_id=bytes(16), swarm_key=KEY, peer=peer(0), name="first", may_vote=True, region="a"
)


class Agreed:
    """Commands in, results out; the rules over RamTables."""

    def __init__(self) -> None:
        self.tables = RamTables()
        self.index = 0
        self.conf_state = ConfState(voters=(1,))

    def do(self, command: AnyCommand | bytes) -> Result:
        data = command if isinstance(command, bytes) else encode_command(command)
        self.index += 1
        return carry_out(data, Place(self.index, self.conf_state), self.tables)

    def done(self, command: AnyCommand) -> Done:
        result = self.do(command)
        assert isinstance(result, Done), result
        return result

    def refused(self, command: AnyCommand | bytes) -> Refused:
        before = whole(self.tables)
        before = {kind: dict(rows) for kind, rows in before.items()}
        result = self.do(command)
        assert isinstance(result, Refused), result
        after = whole(self.tables)
        # The clock alone may have moved.
        for kind in before | after:
            if kind.__name__ != "Clock":
                assert before.get(kind) == after.get(kind)
        return result

    def apply(self, command: Command) -> bytes:
        """What ClusterState does, written a second time."""
        conf_state, tables = self.conf_state, self.tables
        place = Place(command.index, conf_state)
        if command.conf_state is not None:
            self.conf_state = command.conf_state
        if command.opens_session:
            return open_session(command.index, tables)
        if not command.data:
            return b""

        def now() -> Result:
            return carry_out(command.data, place, tables)

        if command.session:
            return once(command.session, command.sequence, command.index, tables, now)
        return encode_result(now())


def whole(tables: RamTables) -> dict[type[Row], dict[str, Row]]:
    return {kind: rows for kind, rows in tables.rows.items() if rows}


def founded() -> Agreed:
    agreed = Agreed()
    agreed.done(FOUND)
    return agreed


def in_log(commands: list[AnyCommand], first: int = 1, term: int = 1) -> list[Command]:
    return [
        Command(index=first + offset, term=term, data=encode_command(command))
        for offset, command in enumerate(commands)
    ]


def results(encoded: list[bytes]) -> list[Result]:
    return [decode_result(each) for each in encoded]

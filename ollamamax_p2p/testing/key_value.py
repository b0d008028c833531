"""KeyValue: the smallest state machine that is worth agreeing on. It lives in RAM.

    put, get, compare_and_set, append, delete      bytes under names
    acquire, release                               leases, each with a fencing token

A lease is held until it is released by whoever knows its token: no clock decides here, so a holder
that died is told apart by whoever proposes the release. Its token, the index of the entry that gave
it, grows from holder to holder, and a `put` that names a lease and an old token is refused: that,
not the lease, is what keeps a paused holder from writing (Kleppmann, How to do distributed locking,
2016).
"""

import hashlib
from collections.abc import Sequence

import msgspec

from ollamamax_p2p.consensus.core.command import Command
from ollamamax_p2p.consensus.core.messages import ConfState, SnapshotMetadata
from ollamamax_p2p.consensus.core.sessions import SessionRow, SessionTable
from ollamamax_p2p.errors import BlobNotFound, StoreDamaged

SNAPSHOTS_KEPT = 2


class Get(msgspec.Struct, frozen=True, tag="get", array_like=True):
    """Read through the log; the result's value."""

    key: str


class Put(msgspec.Struct, frozen=True, tag="put", array_like=True):
    """Write; refused if it names a lease and the token is not the holder's."""

    key: str
    value: bytes
    lease: str = ""
    token: int = 0


class CompareAndSet(msgspec.Struct, frozen=True, tag="cas", array_like=True):
    """Write if the value is the expected one; None: if there is none."""

    key: str
    expected: bytes | None
    value: bytes


class Append(msgspec.Struct, frozen=True, tag="append", array_like=True):
    """Write behind what is there; the result's value is the whole."""

    key: str
    value: bytes


class Delete(msgspec.Struct, frozen=True, tag="delete", array_like=True):
    """Remove; the result's value is what was there."""

    key: str


class Acquire(msgspec.Struct, frozen=True, tag="acquire", array_like=True):
    """Take a lease if it is free; the result's token."""

    lease: str
    holder: str


class Release(msgspec.Struct, frozen=True, tag="release", array_like=True):
    """Free a lease, if this is its token."""

    lease: str
    token: int


Request = Get | Put | CompareAndSet | Append | Delete | Acquire | Release


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What a command gives."""

    ok: bool
    value: bytes | None = None
    token: int = 0
    """Of the lease's holder."""


class _Lease(msgspec.Struct, frozen=True, array_like=True):
    holder: str
    token: int


class _State(msgspec.Struct, array_like=True):
    """All of it, as a snapshot holds it."""

    applied_index: int = 0
    applied_term: int = 0
    conf_state: ConfState = ConfState()
    values: dict[str, bytes] = msgspec.field(default_factory=dict)
    leases: dict[str, _Lease] = msgspec.field(default_factory=dict)
    sessions: list[tuple[int, SessionRow]] = msgspec.field(default_factory=list)
    """In the order of their last use, which decides who ends."""


_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_result_decoder = msgspec.msgpack.Decoder(Result)
_state_decoder = msgspec.msgpack.Decoder(_State)
_REFUSED = _encoder.encode(Result(False))


def encode_request(request: Request) -> bytes:
    """As a command's data."""
    return _encoder.encode(request)


def decode_result(data: bytes) -> Result:
    """What `apply` gave. Raises ValueError for a session's error (`core.sessions`)."""
    return _result_decoder.decode(data)


class KeyValue:
    """A StateMachine; see the head. Deterministic, and not for several threads at once."""

    def __init__(self, saved: bytes | None = None) -> None:
        """saved: what `save` gave, to begin from there."""
        self._load(_State() if saved is None else _state_decoder.decode(saved))
        self._snapshots: dict[SnapshotMetadata, bytes] = {}
        self._offer: tuple[SnapshotMetadata, int, bytes] | None = None
        self._received = bytearray()

    def _load(self, state: _State) -> None:
        self.applied_index = state.applied_index
        self.applied_term = state.applied_term
        self.conf_state = state.conf_state
        self._values = state.values
        self._leases = state.leases
        self._sessions = SessionTable(dict(state.sessions))

    def save(self) -> bytes:
        """The whole state. Equal on all replicas: dicts keep the order of what was applied."""
        return _encoder.encode(
            _State(
                self.applied_index,
                self.applied_term,
                self.conf_state,
                self._values,
                self._leases,
                list(self._sessions.rows.items()),
            )
        )

    # -- reading

    def get(self, key: str) -> bytes | None:
        """What is applied here; not linearizable by itself."""
        return self._values.get(key)

    def keys(self) -> list[str]:
        """Ascending."""
        return sorted(self._values)

    def lease_token(self, lease: str) -> int:
        """The holder's; 0 if it is free."""
        held = self._leases.get(lease)
        return 0 if held is None else held.token

    # -- the StateMachine

    def apply(self, commands: Sequence[Command]) -> list[bytes]:
        """See StateMachine."""
        return [self._apply_one(command) for command in commands]

    def _apply_one(self, command: Command) -> bytes:
        if command.index <= self.applied_index:
            raise ValueError(f"entries up to {self.applied_index} have been applied")
        self.applied_index, self.applied_term = command.index, command.term
        self.conf_state = command.conf_state or self.conf_state
        if command.opens_session:
            return self._sessions.open(command.index)
        if not command.data:
            return b""
        if not command.session:
            return self._carry_out(command)
        return self._sessions.once(
            command.session, command.sequence, command.index, lambda: self._carry_out(command)
        )

    def _carry_out(self, command: Command) -> bytes:
        try:
            request = _request_decoder.decode(command.data)
        except ValueError:
            return _REFUSED
        return _encoder.encode(self._done(request, command.index))

    def _done(self, request: Request, index: int) -> Result:
        match request:
            case Get(key):
                return Result(True, self._values.get(key))
            case Put(key, value, lease, token):
                if lease and self.lease_token(lease) != token:
                    return Result(False, token=self.lease_token(lease))
                self._values[key] = value
                return Result(True, value)
            case CompareAndSet(key, expected, value):
                found = self._values.get(key)
                if found != expected:
                    return Result(False, found)
                self._values[key] = value
                return Result(True, value)
            case Append(key, value):
                self._values[key] = self._values.get(key, b"") + value
                return Result(True, self._values[key])
            case Delete(key):
                return Result(True, self._values.pop(key, None))
            case Acquire(lease, holder):
                return self._acquire(lease, holder, index)
            case Release(lease, token):
                free = self.lease_token(lease) == token
                if free:
                    self._leases.pop(lease, None)
                return Result(free)

    def _acquire(self, lease: str, holder: str, index: int) -> Result:
        held = self._leases.get(lease)
        if held is not None:
            return Result(False, held.holder.encode(), held.token)
        self._leases[lease] = _Lease(holder, index)
        return Result(True, holder.encode(), index)

    def state_hash(self) -> bytes:
        """See StateMachine."""
        return hashlib.sha256(self.save()).digest()

    # -- snapshots

    def make_snapshot(self, term: int) -> SnapshotMetadata:
        """See StateMachine."""
        metadata = SnapshotMetadata(self.applied_index, term, self.conf_state)
        self._keep(metadata, self.save())
        return metadata

    def _keep(self, metadata: SnapshotMetadata, data: bytes) -> None:
        self._snapshots[metadata] = data
        for old in sorted(self._snapshots, key=lambda each: each.index)[:-SNAPSHOTS_KEPT]:
            del self._snapshots[old]

    def newest_snapshot(self) -> SnapshotMetadata | None:
        """See StateMachine."""
        return max(self._snapshots, key=lambda each: each.index, default=None)

    def open_snapshot(self, metadata: SnapshotMetadata) -> "RamSnapshotReader":
        """See StateMachine."""
        data = self._snapshots.get(metadata)
        if data is None:
            raise BlobNotFound(f"snapshot at {metadata.index}")
        return RamSnapshotReader(metadata, data)

    def receive_snapshot(
        self, metadata: SnapshotMetadata, size: int, sha256: bytes
    ) -> "RamSnapshotWriter":
        """See StateMachine."""
        if self._offer != (metadata, size, sha256):
            self._offer, self._received = (metadata, size, sha256), bytearray()
        return RamSnapshotWriter(self._received)

    def install_snapshot(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> None:
        """See StateMachine. Raises ValueError if it is not ahead of what is applied."""
        if metadata.index <= self.applied_index:
            raise ValueError(f"entries up to {self.applied_index} have been applied")
        data = bytes(self._received)
        offered, self._offer, self._received = self._offer, None, bytearray()
        whole = len(data) == size and hashlib.sha256(data).digest() == sha256
        if offered != (metadata, size, sha256) or not whole:
            raise StoreDamaged("the received snapshot", "not the snapshot that was sent")
        try:
            state = _state_decoder.decode(data)
        except ValueError as error:
            raise StoreDamaged("the received snapshot", f"no key-value state: {error}") from error
        if (state.applied_index, state.conf_state) != (metadata.index, metadata.conf_state):
            raise StoreDamaged("the received snapshot", "it is of another index than it says")
        self._load(state)
        self._keep(metadata, data)

    def close(self) -> None:
        """Nothing to give back."""


class RamSnapshotReader:
    """A SnapshotReader over bytes."""

    def __init__(self, metadata: SnapshotMetadata, data: bytes) -> None:
        self.metadata = metadata
        self.size = len(data)
        self.sha256 = hashlib.sha256(data).digest()
        self._data = data

    def read(self, offset: int, count: int) -> bytes:
        """See SnapshotReader."""
        return self._data[offset : offset + count]

    def close(self) -> None:
        """Nothing to give back."""


class RamSnapshotWriter:
    """A SnapshotWriter into a buffer that outlives it."""

    def __init__(self, buffer: bytearray) -> None:
        self._buffer = buffer

    @property
    def received(self) -> int:
        """See SnapshotWriter."""
        return len(self._buffer)

    def write(self, data: bytes) -> None:
        """See SnapshotWriter."""
        self._buffer += data

    def close(self) -> None:
        """Nothing to give back."""

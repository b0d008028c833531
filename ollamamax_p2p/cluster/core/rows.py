"""What the agreed state consists of: rows in tables, each named by a key.

A row's bounds are checked again when it is read, so that no snapshot brings in what no command
could. `Tables` is all that the rules see of where rows are kept.
"""

from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from ollamamax_p2p.cluster.core.commands import (
    COPIES_MAX,
    USES_MAX,
    Addresses,
    DigestText,
    Holder,
    LeaseKey,
    ModelText,
    NodeName,
    Peer,
    Region,
    RoleWish,
    SettingValue,
    SwarmKey,
    Time,
    Token,
)

Index = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Row(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What every row derives from. Only integers, texts, truth values and bytes: each has one
    encoding, by which the state's hash is made.
    """


class Swarm(Row, frozen=True):
    """Facts of which there is one. Key: ""."""

    swarm_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    key_generation: Annotated[int, Meta(ge=1, le=2**31)] = 1
    swarm_key: SwarmKey | None = None
    swarm_key_before: SwarmKey | None = None

    def __repr__(self) -> str:
        """Without the keys."""
        return f"Swarm({self.swarm_id.hex()}, key_generation={self.key_generation})"


class Clock(Row, frozen=True):
    """The greatest time seen. Key: ""."""

    now: Time


class Member(Row, frozen=True):
    """A peer that belongs to the cluster. Key: its peer id."""

    raft_id: Token
    """Never used again after its removal: it is the index of the entry that admitted it."""
    peer: Peer
    name: NodeName
    region: Region = ""
    may_vote: bool = False
    role: RoleWish = "auto"
    joined_index: Index = 0
    addresses: Addresses = ()
    ticket: Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*\Z")] = ""
    """By which it came: the hash of its secret in hex; "" if without."""


class IssuedTicket(Row, frozen=True):
    """A ticket that is honoured. Key: the hash of its secret, in hex."""

    uses: Annotated[int, Meta(ge=1, le=USES_MAX)]
    issued_at: Time
    expires_at: Time
    index: Index
    """Of the command, for their order."""
    used: Annotated[int, Meta(ge=0, le=USES_MAX)] = 0

    def is_dead(self, clock: int) -> bool:
        """Whether nobody can redeem it any more."""
        return clock >= self.expires_at or self.used >= self.uses


class Tag(Row, frozen=True):
    """What a model name means. Key: the name in full and in lower case."""

    name: ModelText
    """In full, upper and lower case as it was spelt."""
    manifest: DigestText
    index: Index
    """Of the command that said so last."""


class ChunkMapOf(Row, frozen=True):
    """By what a blob is verified. Key: the blob's digest."""

    chunk_map: DigestText
    size: Annotated[int, Meta(ge=0, le=2**50)]


class Holding(Row, frozen=True):
    """A member said that it holds a blob. Key: its peer id, "/", the digest."""


class HoldingCount(Row, frozen=True):
    """How many Holdings a member has. Key: its peer id."""

    count: Index


class Copies(Row, frozen=True):
    """On how many nodes a model should be. Key: like Tag's."""

    copies: Annotated[int, Meta(ge=0, le=COPIES_MAX)]


class Pinned(Row, frozen=True):
    """A model should be on a member. Key: its peer id, "/", a key like Tag's."""


class Lease(Row, frozen=True):
    """Somebody holds something until then. Key: as given."""

    key: LeaseKey
    holder: Holder
    token: Token
    expires_at: Annotated[int, Meta(ge=0, le=2**40)]


class AgreedSetting(Row, frozen=True):
    """A setting that was changed. Key: its name."""

    value: SettingValue


class Session(Row, frozen=True):
    """A client whose commands are applied once. Key: its id, 20 digits."""

    used: Index
    """The entry that used it last."""
    forgotten: Index = 0
    """Sequence numbers up to here have no remembered result any more."""


class RememberedResult(Row, frozen=True):
    """Key: session and sequence, 20 digits each, "/" between."""

    result: Annotated[bytes, Meta(max_length=2_048)]


LIMITS: dict[type[Row], int] = {
    Swarm: 1,
    Clock: 1,
    # Every connection and every announcement is per member; simulated up to this many.
    Member: 10_000,
    # Dead ones go first; more living invitations than that nobody keeps in mind.
    IssuedTicket: 1_024,
    # 250 bytes each: 25 MB. Ollama's whole library has some ten thousand.
    Tag: 100_000,
    # Two layers of every tag are worth one; the rest are too small for several chunks.
    ChunkMapOf: 200_000,
    # 200 bytes each: 80 MB at most. Hints only: who does not find room is found by asking.
    Holding: 400_000,
    HoldingCount: 10_000,
    Copies: 100_000,
    Pinned: 100_000,
    # One per thing that one node does for all: far fewer than members.
    Lease: 10_000,
    AgreedSetting: 64,
    # consensus.core.sessions has the first; the second is as many for each.
    Session: 1_024,
    RememberedResult: 1_024 * 64,
}
"""How many rows each table may have: the whole state stays below 200 MB, a snapshot too."""

HOLDINGS_PER_MEMBER = 8_192
"""A node's fair part: a thousand models of eight blobs."""

R = TypeVar("R", bound=Row)


class Tables(Protocol):
    """The state as the rules see it; one value per row and key."""

    def get(self, kind: type[R], key: str) -> R | None:
        """None if there is none."""

    def put(self, key: str, row: Row) -> None:
        """Add or replace it."""

    def delete(self, kind: type[Row], key: str) -> None:
        """Remove it if it is there."""

    def count(self, kind: type[Row]) -> int:
        """How many there are."""

    def items(self, kind: type[R], prefix: str = "") -> list[tuple[str, R]]:
        """Those whose key begins so, ascending by key."""


def has_room(tables: Tables, kind: type[Row], key: str) -> bool:
    """Whether one more of the kind, or another value of this one, may be put."""
    return tables.count(kind) < LIMITS[kind] or tables.get(kind, key) is not None

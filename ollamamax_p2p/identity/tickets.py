"""Tickets: an invitation to a swarm as one pasteable word.

`omx1` and then base32 in lower case: letters and digits only, so that a double click selects it,
chat programs leave it alone and it can be read out. Inside: the fields as MessagePack and four
bytes of SHA-256 over all before them, so that a mistyped ticket is told from a refused one without
asking anybody. docs/protocols/join.md has the layout.

The ticket is as secret as a password until it is used up: it carries the swarm's pre-shared key and
the one-time secret. Its expiry is told for people only; the issuer's clock decides.
"""

import base64
import binascii
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgpack
import msgspec
from msgspec import Meta

from ollamamax_p2p.errors import BadAddress, BadPeerId, TicketMistyped
from ollamamax_p2p.identity.core.addresses import ADDRESS_CHARS_MAX, Address, parse_address
from ollamamax_p2p.identity.core.peer_id import peer_id_of, public_key_of

TICKET_CHARS_MAX = 4_096
TICKET_ADDRESSES_MAX = 16
SWARM_ID_BYTES = 16
SECRET_BYTES = 16
SWARM_KEY_BYTES = 32
EXPIRES_AT_MAX = 253_402_300_799
"""The end of the year 9999: the last second that ISO 8601 and Python's datetime can name."""

_SCHEME = "omx"
_VERSION = "1"
_CHECKSUM_BYTES = 4
# 4: one mistyped ticket in four thousand million passes, and then meets the issuer's refusal.
_PASTED_CHARS_MAX = 4 * TICKET_CHARS_MAX
# Wrapped text with indentation; longer ones are refused before they are touched.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
# Zero-width space, word joiner, byte order mark, soft hyphen: what web pages put into long words.


@dataclass(frozen=True, slots=True)
class Ticket:
    """An invitation. `format_ticket` checks the bounds."""

    swarm_id: bytes
    """16 bytes, public."""
    addresses: tuple[Address, ...]
    """Where its issuer can be dialled, best first; 1 to 16."""
    secret: bytes
    """16 bytes that the issuer knows by their hash."""
    expires_at: int
    """Unix seconds."""
    swarm_key: bytes | None
    """The swarm's 32-byte pre-shared key; None for an open swarm."""

    def __repr__(self) -> str:
        """Without the secrets, so that they reach no log and no traceback."""
        return (
            f"Ticket(swarm_id={self.swarm_id.hex()}, addresses={len(self.addresses)}, "
            f"expires_at={self.expires_at}, secret=…)"
        )


class _Peer(msgspec.Struct, array_like=True, frozen=True):
    """Addresses of one peer: its id takes 32 bytes once instead of 52 characters in each."""

    public_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    transports: Annotated[
        list[Annotated[str, Meta(max_length=ADDRESS_CHARS_MAX)]],
        Meta(min_length=1, max_length=TICKET_ADDRESSES_MAX),
    ]


class _Body(msgspec.Struct, array_like=True, frozen=True):
    swarm_id: Annotated[bytes, Meta(min_length=SWARM_ID_BYTES, max_length=SWARM_ID_BYTES)]
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    expires_at: Annotated[int, Meta(ge=0, le=EXPIRES_AT_MAX)]
    swarm_key: Annotated[bytes, Meta(min_length=SWARM_KEY_BYTES, max_length=SWARM_KEY_BYTES)] | None
    peers: Annotated[list[_Peer], Meta(min_length=1, max_length=TICKET_ADDRESSES_MAX)]


def format_ticket(ticket: Ticket) -> str:
    """The ticket as text. Raises ValueError if it has no, too many or too long addresses, or a
    field of a wrong length.
    """
    if not 1 <= len(ticket.addresses) <= TICKET_ADDRESSES_MAX:
        raise ValueError(f"a ticket carries 1 to {TICKET_ADDRESSES_MAX} addresses")
    body = _Body(
        ticket.swarm_id,
        ticket.secret,
        ticket.expires_at,
        ticket.swarm_key,
        [
            _Peer(public_key_of(peer), [address.transport for address in same])
            for peer, same in itertools.groupby(ticket.addresses, key=lambda known: known.peer)
        ],
    )
    packed = msgspec.msgpack.encode(body)
    _checked(packed)
    text = _SCHEME + _VERSION + _base32(packed + _checksum(packed))
    if len(text) > TICKET_CHARS_MAX:
        raise ValueError(f"the ticket takes {len(text)} characters, limit {TICKET_CHARS_MAX}")
    return text


def parse_ticket(text: str) -> Ticket:
    """Read a ticket that somebody pasted: spaces and line breaks in it are ignored, case too.

    Raises TicketMistyped, which says what is wrong and never repeats the text.
    """
    if len(text) > _PASTED_CHARS_MAX:
        raise TicketMistyped(
            f"it has {len(text):,} characters, a ticket at most {TICKET_CHARS_MAX}"
        )
    word = "".join(text.translate(_INVISIBLE).split()).lower()
    if not word.startswith(_SCHEME) or len(word) <= len(_SCHEME):
        raise TicketMistyped(f"a ticket begins with {_SCHEME}{_VERSION}")
    if len(word) > TICKET_CHARS_MAX:
        raise TicketMistyped(f"it is longer than {TICKET_CHARS_MAX} characters")
    if word[len(_SCHEME)] != _VERSION:
        raise TicketMistyped(
            f"its version is not {_VERSION}, the only one that this omx reads; "
            "if it is right, a newer omx reads it"
        )
    sealed = _from_base32(word[len(_SCHEME) + len(_VERSION) :])
    packed, checksum = sealed[:-_CHECKSUM_BYTES], sealed[-_CHECKSUM_BYTES:]
    if checksum != _checksum(packed):
        raise TicketMistyped("a character is wrong or missing")
    try:
        return _ticket_of(_checked(packed))
    except (ValueError, msgpack.UnpackException, RecursionError, BadAddress, BadPeerId):
        # What they say may quote the bytes, and those are secret.
        raise TicketMistyped("its checksum is right but its contents are not a ticket's") from None


def _checked(packed: bytes) -> _Body:
    # In two steps, as in wire.codec: msgpack lets no container be longer than its bytes, msgspec
    # checks types and bounds.
    plain = msgpack.unpackb(packed, max_ext_len=0, strict_map_key=True)
    body = msgspec.convert(plain, _Body)
    if sum(len(peer.transports) for peer in body.peers) > TICKET_ADDRESSES_MAX:
        raise ValueError("too many addresses")
    return body


def _ticket_of(body: _Body) -> Ticket:
    return Ticket(
        body.swarm_id, _addresses(body.peers), body.secret, body.expires_at, body.swarm_key
    )


def _addresses(peers: Sequence[_Peer]) -> tuple[Address, ...]:
    return tuple(
        parse_address(f"{transport}/p2p/{peer_id_of(peer.public_key)}")
        for peer in peers
        for transport in peer.transports
    )


def _checksum(packed: bytes) -> bytes:
    tagged = f"{_SCHEME}{_VERSION}".encode() + packed
    return hashlib.sha256(tagged).digest()[:_CHECKSUM_BYTES]


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _from_base32(text: str) -> bytes:
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raise TicketMistyped("it has a character that no ticket has, or lacks some") from None
    # Only one spelling is right, else the last character could be wrong unnoticed.
    if _base32(data) != text:
        raise TicketMistyped("a character is wrong or missing")
    return data

"""The providers protocol's messages (`/omx/providers/1`): each request has one answer.

A node tells every peer that it is connected to what it holds (`Tell`, in pages), and asks a few of
them who else holds a blob (`Ask`). What a peer tells of itself is first-hand, because the stream is
authenticated; what it answers about others is hearsay, good for an address to try and for nothing
else.
"""

from typing import Annotated

from msgspec import Meta

from ollamamax_p2p.content.core.digest import Digest, digest_of_hash, raw_hash
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.identity.core.addresses import ADDRESS_CHARS_MAX, Address, parse_address
from ollamamax_p2p.wire import Codec, Message

PAGE_DIGESTS = 1_024
"""Digests in one Tell: 34 bytes each, 35 KB a page; a node of 300 blobs tells them in one."""

HOLDERS_MAX = 32
"""Holders in one answer, and in what `find` gives: a download uses fewer sources than that."""

ADDRESSES_MAX = 8
"""Addresses of one holder: a machine has a few interfaces, each with one or two carriers."""

LIFETIME_S_MAX = 24 * 3_600.0
"""No announcement is believed for longer, whatever its maker asks for."""

RawHash = Annotated[bytes, Meta(min_length=32, max_length=32)]
AddressText = Annotated[str, Meta(max_length=ADDRESS_CHARS_MAX)]
Addresses = Annotated[list[AddressText], Meta(max_length=ADDRESSES_MAX)]


class Tell(Message, tag="tell", frozen=True):
    """What the sender holds, and holds no longer."""

    fresh: bool
    """Forget what I told before: this is the first page of all that I hold."""
    held: Annotated[list[RawHash], Meta(max_length=PAGE_DIGESTS)]
    released: Annotated[list[RawHash], Meta(max_length=PAGE_DIGESTS)]
    addresses: Addresses
    """Where the sender can be dialled, whole multiaddrs; for those who ask the receiver."""
    lifetime_s: Annotated[float, Meta(ge=0.0, le=LIFETIME_S_MAX)]


class Noted(Message, tag="noted", frozen=True):
    """Answer to Tell."""


class Ask(Message, tag="ask", frozen=True):
    """Who holds this blob?"""

    digest: RawHash


class AskPeers(Message, tag="ask_peers", frozen=True):
    """Which members are you connected to? The answer is Holders, drawn at random."""


class Holder(Message, tag="holder", frozen=True):
    """A peer that told the answerer itself that it holds the blob (or is connected to it)."""

    addresses: Annotated[list[AddressText], Meta(min_length=1, max_length=ADDRESSES_MAX)]


class Holders(Message, tag="holders", frozen=True):
    """Answer to Ask, best first, and to AskPeers."""

    holders: Annotated[list[Holder], Meta(max_length=HOLDERS_MAX)]


Request = Tell | Ask | AskPeers
Answer = Noted | Holders

request_codec: Codec[Request] = Codec(Request, max_bytes=96 * 1024)
# Two full lists of digests (70 KB) and the addresses (4 KB) fit.
answer_codec: Codec[Answer] = Codec(Answer, max_bytes=160 * 1024)
# 32 holders with 8 addresses of the greatest length are 131 KB.


def addresses_of_one_peer(texts: list[str]) -> tuple[Address, ...]:
    """The usable ones of addresses that a peer sent, of whichever peer the first of them names.

    Unusable ones are left out without complaint: a newer peer may know carriers that we don't.
    """
    found: list[Address] = []
    for text in texts[:ADDRESSES_MAX]:
        try:
            address = parse_address(text)
        except BadInput:
            continue
        if not found or address.peer == found[0].peer:
            found.append(address)
    return tuple(found)


def hashes_of(digests: list[Digest]) -> list[bytes]:
    """As they travel."""
    return [raw_hash(digest) for digest in digests]


def digests_of(hashes: list[bytes]) -> list[Digest]:
    """As they are used."""
    return [digest_of_hash(each) for each in hashes]

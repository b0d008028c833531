"""What a node says and hears by multicast DNS, as the libp2p mDNS specification has it.

Service `_p2p._udp.local.`, or `_p2p-<fingerprint>._udp.local.` in a private swarm; under it a name
of random letters per node, whose TXT record carries one `dnsaddr=<multiaddr>` string per address.
"""

import re
from collections.abc import Sequence

from ollamamax_p2p.discovery.core.provider_messages import ADDRESSES_MAX
from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.identity.core.addresses import Address, parse_address

STRING_BYTES_MAX = 255
"""One character string in a TXT record (RFC 1035, 3.3.14)."""

TXT_BYTES_MAX = 1_000
"""All strings together: with the other records it stays below an Ethernet packet of 1,500."""

TXT_BYTES_READ_MAX = 9_000
"""RFC 6762, section 17: no mDNS packet is longer, so no honest record is."""

_KEY = b"dnsaddr="
_PRIVATE_TYPE = re.compile(r"\A_p2p-([0-9a-z]{1,32})\._udp\.local\.\Z")
_FINGERPRINT = re.compile(r"\A[0-9a-z]{1,32}\Z")


def service_type(fingerprint: str | None) -> str:
    """The service's name on the network; None for an open swarm, which any libp2p node may find.

    fingerprint: 1 to 32 lower-case letters and digits.
    """
    if fingerprint is None:
        return "_p2p._udp.local."
    if not _FINGERPRINT.match(fingerprint):
        raise ValueError(f"not a swarm's fingerprint: {fingerprint!r}")
    return f"_p2p-{fingerprint}._udp.local."


def fingerprint_in(service: str) -> str | None:
    """The fingerprint in a private swarm's service type; None for any other service."""
    match = _PRIVATE_TYPE.match(service)
    return match[1] if match else None


def txt_of(addresses: Sequence[Address]) -> bytes:
    """The TXT record's data: as many of the addresses as fit, in order, one string each.

    One too long for a string (a relayed address may be) is left out: a string can't be continued
    in the next.
    """
    data = b""
    for address in addresses[:ADDRESSES_MAX]:
        text = _KEY + str(address).encode()
        if len(text) <= STRING_BYTES_MAX and len(data) + 1 + len(text) <= TXT_BYTES_MAX:
            data += bytes([len(text)]) + text
    return data


def addresses_in(txt: bytes) -> tuple[Address, ...]:
    """The usable addresses of the one peer that the first of them names; () if there is none.

    Takes any bytes: whatever is not an address is passed over, a string cut short ends the record.
    """
    found: list[Address] = []
    rest = txt[:TXT_BYTES_READ_MAX]
    while rest and len(found) < ADDRESSES_MAX:
        text, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        address = _address(text)
        if address is not None and (not found or address.peer == found[0].peer):
            found.append(address)
    return tuple(dict.fromkeys(found))


def _address(text: bytes) -> Address | None:
    if not text.lower().startswith(_KEY):  # keys are case-insensitive: RFC 6763, section 6.4
        return None
    try:
        return parse_address(text[len(_KEY) :].decode("ascii"))
    except (BadInput, UnicodeDecodeError):
        return None

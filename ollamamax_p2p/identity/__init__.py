"""Who we are and whom we trust: the node key, peer ids, addresses, the swarm's keys, tickets. Opens
no connection.

Start at `membership`: what a swarm is made of and how one becomes a member.
"""

from ollamamax_p2p.identity.core.addresses import Address, parse_address, parse_transport
from ollamamax_p2p.identity.core.peer_id import PeerId, parse_peer_id, peer_id_of, public_key_of
from ollamamax_p2p.identity.keys import NodeKey, key_from_seed, load_or_create_key
from ollamamax_p2p.identity.membership import Membership, iso_time
from ollamamax_p2p.identity.secret_files import read_secret, remove_secret, write_secret
from ollamamax_p2p.identity.tickets import Ticket, format_ticket, parse_ticket

__all__ = [
    "Address",
    "Membership",
    "NodeKey",
    "PeerId",
    "Ticket",
    "format_ticket",
    "iso_time",
    "key_from_seed",
    "load_or_create_key",
    "parse_address",
    "parse_peer_id",
    "parse_ticket",
    "parse_transport",
    "peer_id_of",
    "public_key_of",
    "read_secret",
    "remove_secret",
    "write_secret",
]

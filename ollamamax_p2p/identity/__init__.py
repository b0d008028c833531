"""Who we are and whom we trust: the node key, peer ids, addresses, the swarm's keys, tickets. Opens
no connection.

Start at `membership`: what a swarm is made of and how one becomes a member.
"""

from ollamamax_p2p.identity.addresses import Address, parse_address, parse_transport
from ollamamax_p2p.identity.peer_id import PeerId, parse_peer_id, peer_id_of, public_key_of

__all__ = [
    "Address",
    "PeerId",
    "parse_address",
    "parse_peer_id",
    "parse_transport",
    "peer_id_of",
    "public_key_of",
]

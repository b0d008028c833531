"""Every protocol this library speaks, with its version. A change that old peers would misread takes
the next number.
"""

JOIN = "/omx/join/1"
"""Prove membership or redeem a ticket, then heartbeats. The only door open to a peer that is not a
member.
"""

PROVIDERS = "/omx/providers/1"
"""Who holds which blob: announce, withdraw, ask."""

MODELS = "/omx/models/1"
"""Which manifest a name means here, and the manifest itself."""

TRANSFER = "/omx/transfer/1"
"""Chunks: have, want, chunk, cancel, choke. Also the chunk map, page by page."""

RAFT = "/omx/raft/1"
"""Raft's messages, one way: a hello each way, then batches from who opened the stream."""

RAFT_SNAPSHOT = "/omx/raft-snapshot/1"
"""The bytes of one snapshot of the agreed state, asked for by who needs it."""

CLUSTER = "/omx/cluster/1"
"""What a member asks of the cluster's leader and the log has no place for."""

FORWARD = "/omx/forward/1"
"""Requests to another node's back ends, and the answers as they come."""

LOAD = "/omx/load/1"
"""What nodes tell one another of their models and how busy they are."""

DHT_PREFIX = "/omx"
"""Kademlia's prefix (`/omx/kad/1.0.0`), so that a node never wanders into the public IPFS network.
"""

"""Who was found lying is remembered, within bounds."""

from ollamamax_p2p.errors import PeerMisbehaved
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.transfer.ban_list import BANNED_MAX, BanList


def test_a_crowd_of_liars_does_not_fill_memory():
    bans = BanList(EventFeed(), lambda: 1_800_000_000.0)
    peers = [PeerId(f"12D3KooW{number}") for number in range(BANNED_MAX + 2)]
    for peer in peers:
        bans.ban(peer, PeerMisbehaved(peer, "it lied"))
    assert list(bans.reasons()) == peers[2:]
    assert peers[0] not in bans
    assert peers[-1] in bans

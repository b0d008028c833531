"""What a request tells of itself: how long it is, and where its prompt could be warm already."""

from ollamamax_p2p.inference.core.requests import AnyRequest
from ollamamax_p2p.router.call import Call
from ollamamax_p2p.router.core.candidate import RequestFacts


def facts_of(request: AnyRequest, call: Call, *, id: int, region: str, now: float) -> RequestFacts:
    """id: the caller's number for it; region: of this node; now: when it came."""
    raise NotImplementedError

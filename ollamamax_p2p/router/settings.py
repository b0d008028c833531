"""What an operator sets about who answers a request, and what waits."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal[
    "round_robin",
    "least_outstanding",
    "power_of_two",
    "lowest_expected_time",
    "weighted",
    "session_affinity",
    "prefix_affinity",
    "region_first",
]
"""How to choose among candidates; `core.strategies` tells how each works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How this node sends requests to the nodes that answer them."""

    strategy_chat: Strategy = "lowest_expected_time"
    """For conversations. The winner of benchmarks/bench_policies.py; ADR 9 says by how much."""

    strategy_generate: Strategy = "lowest_expected_time"
    """For single prompts."""

    strategy_embed: Strategy = "lowest_expected_time"
    """For embeddings: short, alike, and nothing of them is kept warm."""

    weight: float = 1.0
    """This node's share under the strategy `weighted`, against the others'; told to them."""

    ahead_per_slot: float = 1.0
    """Requests sent to a candidate beyond its free slots, as a part of its slots, before they wait
    here: enough that an engine never idles for a round trip, little enough that who waits can
    still be sent elsewhere.
    """

    queue_max: int = 1_024
    """Requests that wait on this node at most; then QueueFull. At a request per second they would
    wait for 17 minutes: longer than any client does.
    """

    queue_per_user_max: int = 256
    """Of those, of one user at most: a quarter, so that nobody fills it alone."""

    aging_s: float = 20.0
    """Waiting so long lifts a request by one priority, so that the lowest is served too."""

    deadline_s: float = 600.0
    """A request that names no deadline is refused when it has not begun within this. Clients of
    Ollama wait for ten minutes or so for a model to load.
    """

    first_part_timeout_s: float = 30.0
    """A candidate that gives nothing for this long counts as hanging, if twice what is expected of
    it is less.
    """

    load_timeout_s: float = 300.0
    """The same where the model must be loaded first: 70 GB from a slow disk."""

    next_part_timeout_s: float = 30.0
    """An answer that began and gives nothing for this long has broken off. Slow processors need
    seconds per token for large models.
    """

    attempts_max: int = 4
    """Candidates that one request is sent to, one after the other, before its error is told."""

    retry_ratio: float = 0.2
    """Retries for each request on average: when everything fails, no more than a fifth is added to
    the load. Finagle's default.
    """

    retry_burst: int = 20
    """Retries that may be saved up: one node's death breaks off all it was answering at once."""

    retry_per_s: float = 1.0
    """Retries that each second adds to them: where one client asks now and then, its answer goes on
    elsewhere however often a node dies; a storm is not fed by so few. Finagle allows ten.
    """

    retry_backoff_s: float = 0.05
    """Before the second retry of one request; doubles with each, and is drawn at random from 0 on,
    so that many do not come at once. The first goes elsewhere at once.
    """

    hedge: bool = True
    """Ask a second candidate when the first is unusually late with its first part; who is first
    answers, the other is cancelled.
    """

    hedge_ratio: float = 0.05
    """Second requests for each request on average: work that is thrown away."""

    hedge_samples_min: int = 20
    """First parts that must have been measured before it is known what is late."""

    hedge_after_min_s: float = 0.05
    """Never hedged before: below this, the network's own variation decides."""

    breaker_failures_min: int = 3
    """Fewer failures of late open no breaker."""

    breaker_ratio: float = 0.5
    """Of the requests of late that failed: opens a candidate's breaker."""

    breaker_window_s: float = 30.0
    """What "of late" means."""

    breaker_backoff_s: float = 2.0
    """An open breaker lets a probe through after this; doubles with each probe that fails."""

    breaker_backoff_max_s: float = 60.0
    """The longest that a candidate which came back stays unused."""

    gossip_interval_s: float = 0.5
    """How often this node tells others what is new; how old what it knows is, more or less, times
    the rounds that news needs (2 in 10 nodes, 6 in 1,000).
    """

    gossip_fanout: int = 6
    """Whom it tells each time. With 6, news reaches a thousand nodes in 6 rounds or so."""

    gossip_repeats: int = 2
    """How many rounds it tells the same, before it takes it for known: 6 · 2 times in all, which
    one node in 100,000 misses by chance (e to the -12).
    """

    heartbeat_s: float = 5.0
    """A report is told at least this often, though nothing changed."""

    stale_s: float = 15.0
    """Whoever was not heard of for this long is chosen only when nobody else is there: three
    heartbeats.
    """

    dead_s: float = 60.0
    """Whoever was not heard of for this long is forgotten."""

    nodes_max: int = 4_096
    """Nodes that are kept in mind."""

    table_bytes_max: int = 64 * 1024 * 1024
    """What all their reports may take, encoded: 4,096 nodes with some 70 models each."""

    affinity_ttl_s: float = 600.0
    """How long a conversation's prompt is taken to be warm where it was answered, and a session
    stays where it is. Engines keep it until they need the room.
    """

    affinity_entries_max: int = 50_000
    """Prefixes that are remembered, and sessions: 5,000 conversations; some 20 MB."""

    bounded_load: float = 1.25
    """prefix_affinity gives no candidate more than this times its fair share. Source: Mirrokni,
    Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2017, which uses 1.25 too.
    """

    load_on_demand: bool = True
    """Whether a model that nobody has in memory is loaded by the request that wants it."""

    pull_on_demand: bool = False
    """Whether a model that nobody holds is pulled by the request that wants it. Off: a typing
    mistake should not fill a disk.
    """

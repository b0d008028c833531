"""Transport: carries Raft's messages to other members, or drops them. Raft repairs what is dropped;
what it can't stand is a transport that makes it wait.
"""

from collections.abc import Iterable
from typing import Protocol

from ollamamax_p2p.consensus.core.messages import Message


class Transport(Protocol):
    """One replica's way to the others. What arrives is handed to the replica by who opens it."""

    def send(self, messages: Iterable[Message]) -> None:
        """Queue each for its receiver; never waits. One whose receiver's queue is full, or who
        can't be reached, is dropped and reported to the replica (`report_unreachable`).
        """

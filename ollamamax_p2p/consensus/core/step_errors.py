"""Why a message was not taken: it is a peer's fault, or stale. For whoever feeds the core.

The texts of the first two are the field's; transcripts compare them.
"""


class StepRefused(ValueError):
    """A message was not taken, and the log, votes and configuration are as before."""


class LocalMessageRefused(StepRefused):
    """A message that only a node itself may give itself came from elsewhere."""

    def __init__(self) -> None:
        super().__init__("raft: cannot step raft local message")


class UnknownPeerRefused(StepRefused):
    """An answer came from a node that is not, or no longer, in the configuration."""

    def __init__(self) -> None:
        super().__init__("raft: cannot step as peer not found")


class MalformedStep(StepRefused):
    """No correct node sends this message."""

    def __init__(self, from_: int, problem: str) -> None:
        """from_: who says to have sent it."""
        super().__init__(f"raft: node {from_:x} sent {problem}")
        self.from_, self.problem = from_, problem

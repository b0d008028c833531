"""Where the core says what it does, for people and for the conformance transcripts."""

from typing import Protocol


class Logger(Protocol):
    """One line each, without a time."""

    def debug(self, line: str) -> None:
        """A step of the algorithm."""

    def info(self, line: str) -> None:
        """A change of state."""

    def warning(self, line: str) -> None:
        """Something an operator may want to know."""

    def error(self, line: str) -> None:
        """Something that should not happen."""


class NoLogger:
    """Says nothing."""

    def debug(self, line: str) -> None:
        """Dropped."""

    info = warning = error = debug

"""llama.cpp's own completion stream as pieces: whole text, and the tokens that are that text.

The server holds text back while a character is incomplete or a stop sequence may have begun. In the
second case it names each token as it comes; in the first it names only the last one, and the count
tells how many are missing. So tokens are held until their text comes, and a gap is said: the caller
fills it by tokenizing the text, if that ends in the tokens that are known.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ollamamax_p2p.inference.core.requests import (
    LOGPROBS_MAX,
    TOKENS_MAX,
    Count,
    Logprob,
    TopLogprob,
)

Tokens = Annotated[tuple[int, ...], Meta(max_length=TOKENS_MAX)]


class TopProbability(msgspec.Struct, frozen=True):
    """One that could have come."""

    token: str = ""
    logprob: float | None = None
    bytes: tuple[int, ...] | None = None


class TokenProbability(msgspec.Struct, frozen=True):
    """A token that came, as llama.cpp and OpenAI tell it."""

    token: str = ""
    logprob: float | None = None
    bytes: tuple[int, ...] | None = None
    top_logprobs: Annotated[tuple[TopProbability, ...], Meta(max_length=4 * LOGPROBS_MAX)] = ()


class Timings(msgspec.Struct, frozen=True):
    """How long it took."""

    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


class CompletionChunk(msgspec.Struct, frozen=True):
    """One event of the stream, as far as it is used."""

    content: str = ""
    tokens: Tokens = ()
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: Count = 0
    tokens_evaluated: Count = 0
    timings: Timings = Timings()
    completion_probabilities: tuple[TokenProbability, ...] = ()
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, and what is known of its tokens."""

    text: str
    known: tuple[int, ...]
    """The last of its tokens, in order."""
    count: int
    """How many it has."""
    logprobs: tuple[Logprob, ...] = ()

    def tokens(self, tokenized: tuple[int, ...] = ()) -> tuple[int, ...]:
        """All its tokens, () if they cannot be known.

        tokenized: the text's usual tokens, needed where `known` is not all.
        """
        if len(self.known) == self.count:
            return self.known
        usual = len(tokenized) == self.count and tokenized[-len(self.known) :] == self.known
        return tokenized if usual and self.known else ()


@dataclass(slots=True)
class CompletionPieces:
    """Turns chunks into pieces."""

    predicted: int = 0
    """Tokens so far, those without text included."""
    _known: tuple[int, ...] = ()
    _count: int = 0
    _logprobs: list[Logprob] = field(default_factory=list)

    def feed(self, chunk: CompletionChunk) -> Piece | None:
        """A piece, if the chunk brings text."""
        new = chunk.tokens_predicted - self.predicted
        if new <= 0:
            return None  # it tells how far the prompt is read, with a token that is none
        self.predicted = chunk.tokens_predicted
        self._count += new
        self._known += chunk.tokens
        self._logprobs += (as_logprob(each) for each in chunk.completion_probabilities)
        if not chunk.content:
            return None
        piece = Piece(chunk.content, self._known, self._count, tuple(self._logprobs))
        self._known, self._count, self._logprobs = (), 0, []
        return piece


def as_logprob(given: TokenProbability) -> Logprob:
    """As our messages have it."""
    return Logprob(
        token=given.token,
        logprob=_finite(given.logprob),
        bytes=given.bytes or (),
        top_logprobs=tuple(
            TopLogprob(token=top.token, logprob=_finite(top.logprob), bytes=top.bytes or ())
            for top in given.top_logprobs
        ),
    )


def _finite(value: float | None) -> float:
    """JSON has no infinity: an impossible token comes as null."""
    return -1e9 if value is None else value

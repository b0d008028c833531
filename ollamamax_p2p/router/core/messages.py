"""What forwarding says on the wire: `/omx/forward/1`, docs/protocols/request-forwarding.md.

One long-lived stream per asking peer carries many calls at once. A call's request and the batches
of what is answered are cut into pieces of PIECE_BYTES at most, so that a long one does not hold up
the others.

    asker → answerer    open(number, size, credit, terms), piece(number, data) until size bytes are
                        sent; credit(number, size) as the answer is taken; cancel(number)
    answerer → asker    news(number, data, more): events, MessagePack, cut where `more` says so;
                        over(number) or failed(number, code, message); alive while calls are open
"""

from typing import Annotated

from msgspec import Meta

from ollamamax_p2p.inference.core.requests import (
    REQUEST_BYTES_MAX,
    ChatRequest,
    Delta,
    Embeddings,
    EmbedRequest,
    Finish,
    GenerateRequest,
    Name,
    Options,
)
from ollamamax_p2p.wire import Codec, Message

PIECE_BYTES = 48 * 1024
"""Of one request or answer at a time; a frame's other fields fit beside it in 64 KiB."""

CREDIT_BYTES = 256 * 1024
"""Of an answer on its way and not taken yet. More than a round trip's worth of any text."""

EVENTS_BYTES_MAX = 64 * 1024 * 1024
"""One batch of events: the vectors of 4,096 texts, 2,048 numbers each, fit."""

FRAME_BYTES_MAX = 64 * 1024
FAILURE_CHARS_MAX = 500

Number = Annotated[int, Meta(ge=0, lt=2**53)]
Size = Annotated[int, Meta(ge=0, lt=2**31)]


class LoadRequest(Message, tag="load", frozen=True, kw_only=True, omit_defaults=True):
    """Have a model in memory."""

    model: Name
    keep_alive_s: float | None = None
    options: Options = Options()


class UnloadRequest(Message, tag="unload", frozen=True):
    """Have a model out of memory."""

    model: Name


class DrainRequest(Message, tag="drain", frozen=True, kw_only=True):
    """Begin no new answers, or begin again."""

    draining: bool


class ShowRequest(Message, tag="show", frozen=True, kw_only=True):
    """What a model is made of."""

    model: Name
    verbose: bool = False


class Begun(Message, tag="begun", frozen=True, kw_only=True):
    """A back end works on it."""

    backend: Annotated[str, Meta(max_length=64)]


class Done(Message, tag="done", frozen=True):
    """A request that has no other answer has been fulfilled."""


class Shown(Message, tag="shown", frozen=True, kw_only=True):
    """What a model is made of, as JSON."""

    body: bytes


AnyAsk = (
    GenerateRequest
    | ChatRequest
    | EmbedRequest
    | LoadRequest
    | UnloadRequest
    | ShowRequest
    | DrainRequest
)
Event = Begun | Delta | Finish | Embeddings | Done | Shown


class Terms(Message, tag="terms", frozen=True, kw_only=True, omit_defaults=True):
    """How a request is to be treated."""

    backend: Annotated[str, Meta(max_length=64)] = ""
    """Which of the node's; "": any that has the model."""
    user: Annotated[str, Meta(max_length=256)] = ""
    priority: Annotated[int, Meta(ge=0, le=2)] = 1
    deadline_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    """How long it may take from now until it is begun."""


class Open(Message, tag="open", frozen=True, kw_only=True):
    """Asker: here comes a request of so many bytes."""

    number: Number
    size: Annotated[int, Meta(ge=1, le=REQUEST_BYTES_MAX)]
    terms: Terms


class Piece(Message, tag="piece", frozen=True, kw_only=True):
    """Asker: the next bytes of it."""

    number: Number
    data: Annotated[bytes, Meta(min_length=1, max_length=PIECE_BYTES)]


class Credit(Message, tag="credit", frozen=True, kw_only=True):
    """Asker: so many more bytes may be sent."""

    number: Number
    size: Size


class Cancel(Message, tag="cancel", frozen=True, kw_only=True):
    """Asker: the answer is not wanted any more; some of it may still arrive."""

    number: Number


class News(Message, tag="news", frozen=True, kw_only=True):
    """Answerer: events, or a part of their encoding."""

    number: Number
    data: Annotated[bytes, Meta(max_length=PIECE_BYTES)]
    more: bool = False


class Over(Message, tag="over", frozen=True, kw_only=True):
    """Answerer: that was all."""

    number: Number


class Failed(Message, tag="failed", frozen=True, kw_only=True):
    """Answerer: it came to nothing, or to nothing more."""

    number: Number
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=FAILURE_CHARS_MAX)]
    retry_after_s: float = 0.0


class Alive(Message, tag="alive", frozen=True):
    """Answerer: the calls that are open here are being worked on."""


FromAsker = Open | Piece | Credit | Cancel
FromAnswerer = News | Over | Failed | Alive

asker_codec: Codec[FromAsker] = Codec(FromAsker, max_bytes=FRAME_BYTES_MAX)
answerer_codec: Codec[FromAnswerer] = Codec(FromAnswerer, max_bytes=FRAME_BYTES_MAX)
request_codec: Codec[AnyAsk] = Codec(AnyAsk, max_bytes=REQUEST_BYTES_MAX)
events_codec: Codec[tuple[Event, ...]] = Codec(tuple[Event, ...], max_bytes=EVENTS_BYTES_MAX)

"""What a request tells of itself: how long it is, and where its prompt could be warm already.

A conversation is hashed from its beginning on, and the hash noted at points: after every message,
and within long ones every BLOCK_BYTES. The next turn begins with all that this one had, so it has
this turn's last point among its own, and whoever answered this turn is found by it. (Hashing only
the first message finds no conversation again: sglang's issue 26263.)
"""

import hashlib
from collections.abc import Iterator

import msgspec

from ollamamax_p2p.inference.core.requests import (
    AnyRequest,
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
)
from ollamamax_p2p.router.call import Call
from ollamamax_p2p.router.core.candidate import Kind, PrefixPoint, RequestFacts

BLOCK_BYTES = 2_048
"""Some 500 tokens: reading so many takes as long as a poor choice costs."""

BLOCKS_PER_PIECE = 16
"""Points within one message: a message and its answer add 34 at most, fewer than POINTS_LAST, so
that the last turn's end is always among this turn's.
"""

POINTS_FIRST = 16
POINTS_LAST = 48
"""Of more points, those in the middle are left out."""

HASHED_BYTES_MAX = 4 * 1024 * 1024
"""Of one request: 4 ms on the event loop. What comes after is not told apart."""

BYTES_PER_TOKEN = 4
"""English has 4 letters per token or so, Chinese 3 bytes per character and token."""

IMAGE_TOKENS = 768
"""What a picture takes in common models: 576 (LLaVA) to 1,600."""

OUTPUT_TOKENS = 256
"""Expected of an answer that nothing limits."""


def facts_of(request: AnyRequest, call: Call, *, id: int, region: str, now: float) -> RequestFacts:
    """id: the caller's number for it; region: of this node; now: when it came."""
    prefix, root = _points(request)
    return RequestFacts(
        id=id,
        model=request.model,
        kind=_kind(request),
        prompt_tokens=prefix[-1].tokens if prefix else _input_tokens(request),
        output_tokens=_output_tokens(request),
        prefix=prefix,
        root=root,
        session=call.session,
        region=region,
        priority=call.priority,
        user=call.user,
        strategy=call.strategy,
        needs=_needs(request),
        can_move=_can_move(request),
        begin_by=now + call.deadline_s if call.deadline_s is not None else None,
    )


def _kind(request: AnyRequest) -> Kind:
    if isinstance(request, ChatRequest):
        return "chat"
    return "embed" if isinstance(request, EmbedRequest) else "generate"


def _input_tokens(request: AnyRequest) -> int:
    inputs = request.inputs if isinstance(request, EmbedRequest) else ()
    return sum(len(text.encode("utf-8", "replace")) for text in inputs) // BYTES_PER_TOKEN


def _output_tokens(request: AnyRequest) -> int:
    if isinstance(request, EmbedRequest):
        return 0
    limit = request.options.num_predict
    return OUTPUT_TOKENS if limit is None or limit < 0 else min(limit, OUTPUT_TOKENS)


def _needs(request: AnyRequest) -> tuple[str, ...]:
    """What the model must be able to do. Pictures are left to the engine to refuse."""
    if isinstance(request, EmbedRequest):
        return ()  # any model embeds, as in Ollama; an engine that cannot says so
    needs = ["completion"]
    if isinstance(request, ChatRequest) and request.tools:
        needs.append("tools")
    if isinstance(request, GenerateRequest) and request.suffix:
        needs.append("insert")
    if request.think:
        needs.append("thinking")
    return tuple(needs)


def _can_move(request: AnyRequest) -> bool:
    """An engine that goes on with a text midway knows neither which part of a tool call nor where
    in a grammar it is.
    """
    if isinstance(request, EmbedRequest) or request.format:
        return False
    return not (isinstance(request, ChatRequest) and request.tools)


def _points(request: AnyRequest) -> tuple[tuple[PrefixPoint, ...], int]:
    """Where the prompt could be cut; and the hash of what a conversation never loses."""
    hashed = hashlib.blake2b(digest_size=8)
    points: list[PrefixPoint] = []
    root, left, taken = 0, HASHED_BYTES_MAX, 0
    for piece, tokens, is_user in _pieces(request):
        start = 0
        for end in _cuts(len(piece)):
            hashed.update(piece[start : start + min(end - start, left)])
            left -= min(end - start, left)
            so_far = taken + tokens * end // len(piece)
            points.append(PrefixPoint(int.from_bytes(hashed.digest(), "big"), so_far))
            start = end
        taken += tokens
        if is_user and not root:
            root = points[-1].hash
    if len(points) > POINTS_FIRST + POINTS_LAST:
        points = points[:POINTS_FIRST] + points[-POINTS_LAST:]
    return tuple(points), root or (points[-1].hash if points else 0)


def _cuts(length: int) -> list[int]:
    """After each block, but not after too many; and at the end."""
    within = range(BLOCK_BYTES, length, BLOCK_BYTES)
    return [*within[:BLOCKS_PER_PIECE], length]


def _pieces(request: AnyRequest) -> Iterator[tuple[bytes, int, bool]]:
    """What is read, in the order in which templates render it; what it takes in tokens; whether it
    is a user's. None is empty.
    """
    if isinstance(request, EmbedRequest):
        return
    if isinstance(request, ChatRequest):
        if request.tools:
            piece = msgspec.json.encode(request.tools)
            yield piece, len(piece) // BYTES_PER_TOKEN, False
        for message in request.messages:
            piece = _written(message)
            tokens = len(piece) // BYTES_PER_TOKEN + IMAGE_TOKENS * len(message.images)
            yield piece + _pictures(message.images), tokens, message.role == "user"
        return
    if request.context:
        yield msgspec.msgpack.encode(request.context), len(request.context), False
    head = f"{request.system or ''}\0{request.template or ''}\0".encode("utf-8", "replace")
    if len(head) > 2:
        yield head, len(head) // BYTES_PER_TOKEN, False
    piece = request.prompt.encode("utf-8", "replace") + _pictures(request.images)
    if piece:
        tokens = len(request.prompt) // BYTES_PER_TOKEN + IMAGE_TOKENS * len(request.images)
        yield piece, tokens, True


def _written(message: ChatMessage) -> bytes:
    calls = msgspec.json.encode(message.tool_calls).decode() if message.tool_calls else ""
    # What an answer thought is left out by most templates once it is history.
    text = f"{message.role}\0{message.content}\0{calls}{message.tool_name}\0"
    return text.encode("utf-8", "replace")


def _pictures(images: tuple[bytes, ...]) -> bytes:
    """Told apart by length and beginning."""
    return b"".join(
        hashlib.blake2b(b"%d:" % len(image) + image[:65_536], digest_size=16).digest()
        for image in images
    )

"""Requests, the parts of an answer, and usage: the same for every back end, and on the wire.

The words are Ollama's where Ollama has one. A request names a model and says what is wanted; who
answers is the router's to choose. An answer is a sequence of `Delta`s and one `Finish`.

A request that goes on on another engine carries a `Resume`: what the client has already. The
engine then gives only what follows, without a gap and without a repetition.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ollamamax_p2p.wire import Message

REQUEST_BYTES_MAX = 32 * 1024 * 1024
"""Of one encoded request, pictures and all."""

NAME_CHARS_MAX = 400
MESSAGES_MAX = 100_000
IMAGES_MAX = 64
TOOLS_MAX = 1_024
STOPS_MAX = 256
LOGPROBS_MAX = 20
INPUTS_MAX = 4_096
TOKENS_MAX = 1_048_576
"""The longest context that anybody has."""

Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Tokens = Annotated[tuple[int, ...], Meta(max_length=TOKENS_MAX)]


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample and how to run; None leaves it to the model, then to the engine.

    Names, meanings and defaults are those of Ollama's `options` (num_predict -1: no limit).
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    seed: int | None = None
    num_predict: int | None = None
    draft_num_predict: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    temperature: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: Annotated[tuple[str, ...], Meta(max_length=STOPS_MAX)] | None = None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model wants called."""

    name: str
    arguments: dict[str, Any]
    id: str = ""
    index: int = 0


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(max_length=64)]
    """system, user, assistant or tool."""
    content: str = ""
    thinking: str = ""
    images: Annotated[tuple[bytes, ...], Meta(max_length=IMAGES_MAX)] = ()
    """Encoded pictures (PNG, JPEG, WebP)."""
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=TOOLS_MAX)] = ()
    tool_name: str = ""
    """In a message of role tool: whose result this is."""
    tool_call_id: str = ""


class Resume(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the client has of the answer already."""

    text: str = ""
    thinking: str = ""
    tokens: Tokens = ()
    """The ids of that text's tokens, as the same model gave them; () where they are not known, and
    the text is tokenized again."""
    completion_tokens: Count = 0
    """How many of `num_predict` are used up."""


class _Request(Message, frozen=True, kw_only=True, omit_defaults=True):
    model: Name
    options: Options = Options()
    keep_alive_s: float | None = None
    """How long the model stays in memory afterwards; 0: not at all, negative: for ever, None: as
    long as the engine is set to."""


class _TextRequest(_Request, frozen=True, kw_only=True, omit_defaults=True):
    format: Literal["", "json"] | dict[str, Any] = ""
    """json: any JSON object; a dict: JSON of this JSON schema."""
    think: bool | Annotated[str, Meta(max_length=16)] | None = None
    """A bool, or low, medium, high, max; None: as the model does by itself."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] = 0
    truncate: bool | None = None
    """False: a prompt longer than the context is an error; else its beginning is left out."""
    shift: bool | None = None
    """False: an answer that meets the end of the context ends there."""
    resume: Resume | None = None


class GenerateRequest(_TextRequest, tag="generate", frozen=True, kw_only=True, omit_defaults=True):
    """Continue a prompt."""

    prompt: str = ""
    suffix: str = ""
    """What comes after the gap to be filled."""
    system: str | None = None
    """Instead of the model's own."""
    template: str | None = None
    """Instead of the model's own, in Go's template language."""
    raw: bool = False
    """The prompt goes to the model as it is, without template and system."""
    images: Annotated[tuple[bytes, ...], Meta(max_length=IMAGES_MAX)] = ()
    context: Tokens = ()
    """Tokens of an earlier answer to go on from (Ollama's deprecated field)."""


class ChatRequest(_TextRequest, tag="chat", frozen=True, kw_only=True, omit_defaults=True):
    """Answer a conversation."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=MESSAGES_MAX)]
    tools: Annotated[tuple[dict[str, Any], ...], Meta(max_length=TOOLS_MAX)] = ()
    """Functions that the model may ask for, each as OpenAI and Ollama write them."""


class EmbedRequest(_Request, tag="embed", frozen=True, kw_only=True, omit_defaults=True):
    """Give vectors for texts."""

    inputs: Annotated[tuple[str, ...], Meta(max_length=INPUTS_MAX)]
    truncate: bool = True
    dimensions: Annotated[int, Meta(ge=0, le=1_048_576)] = 0
    """Keep only so many, normalised again; 0: all."""


TextRequest = GenerateRequest | ChatRequest
AnyRequest = GenerateRequest | ChatRequest | EmbedRequest


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that could have come, and how likely it was."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()


class Logprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that came, how likely it was, and which were likely instead."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top_logprobs: tuple[TopLogprob, ...] = ()


class Delta(Message, tag="delta", frozen=True, kw_only=True, omit_defaults=True):
    """One streamed bit of an answer: whole characters only."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    tokens: Tokens = ()
    """The ids behind `text` and `thinking`, where the engine tells them; with them the answer can
    go on elsewhere exactly."""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer took. Times in nanoseconds, as Ollama tells them."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    """Of the whole answer, also where a part of it came before a Resume."""
    load_ns: Count = 0
    prompt_ns: Count = 0
    completion_ns: Count = 0
    total_ns: Count = 0


class Finish(Message, tag="finish", frozen=True, kw_only=True, omit_defaults=True):
    """The end of an answer."""

    reason: Annotated[str, Meta(max_length=32)]
    """stop, length; load and unload for a request that only did that."""
    usage: Usage = Usage()
    context: Tokens = ()
    """Prompt and answer as tokens, for GenerateRequest.context of the next; () if unknown."""


Part = Delta | Finish


class Embeddings(Message, tag="embeddings", frozen=True, kw_only=True):
    """A vector for each input, of Euclidean length 1."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: Count = 0
    load_ns: Count = 0
    total_ns: Count = 0

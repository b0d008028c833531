"""Wrong types in every field of every body: always a documented error of its dialect, in a line."""

import json

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamamax_p2p.api import (
    anthropic_routes,
    ollama_requests,
    openai_requests,
    openai_responses,
)
from ollamamax_p2p.inference.core.requests import AnyRequest
from tests.api.asgi import open_asgi
from tests.api.ram_inference import AT_ONCE, RamInference, scripted

MESSAGE = {"role": "user", "content": "hi"}
ENDPOINTS = {
    "/api/generate": (ollama_requests.GenerateBody, {"model": "tiny", "prompt": "hi"}),
    "/api/chat": (ollama_requests.ChatBody, {"model": "tiny", "messages": [MESSAGE]}),
    "/api/embed": (ollama_requests.EmbedBody, {"model": "tiny", "input": "hi"}),
    "/api/embeddings": (ollama_requests.EmbeddingsBody, {"model": "tiny", "prompt": "hi"}),
    "/v1/chat/completions": (
        openai_requests.ChatCompletionBody,
        {"model": "tiny", "messages": [MESSAGE]},
    ),
    "/v1/completions": (openai_requests.CompletionBody, {"model": "tiny", "prompt": "hi"}),
    "/v1/embeddings": (openai_requests.EmbeddingBody, {"model": "tiny", "input": "hi"}),
    "/v1/responses": (openai_responses.ResponsesBody, {"model": "tiny", "input": "hi"}),
    "/v1/messages": (
        anthropic_routes.MessagesBody,
        {"model": "tiny", "max_tokens": 9, "messages": [MESSAGE]},
    ),
}
ALLOWED = {200, 400, 404}

NESTED = [
    "role",
    "content",
    "type",
    "text",
    "function",
    "name",
    "arguments",
    "tool_calls",
    "images",
    "image_url",
    "url",
    "source",
    "data",
    "stop",
    "num_ctx",
    "seed",
    "top_p",
    "schema",
    "json_schema",
    "effort",
    "input_schema",
    "id",
    "input",
    "output",
    "format",
]
"""Names of fields that some body has further in."""

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "tiny", "json", "low", "5m", "-1", "data:image/png;base64,aGk="])
    | st.text(max_size=6)
)
_ANY = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NESTED),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def _fields(body: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(body)]


def _changed(path: str) -> st.SearchStrategy[dict]:
    """A good body with some of its fields, those of its struct, replaced by anything."""
    body, good = ENDPOINTS[path]
    return st.dictionaries(st.sampled_from(_fields(body)), _ANY, min_size=1, max_size=3).map(
        lambda change: good | change
    )


@pytest.mark.parametrize("path", ENDPOINTS)
def test_no_value_of_any_field_is_a_fault_of_ours(path, caplog):
    @given(body=_changed(path))
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    def check(body):
        reply = trio.run(_post, path, json.dumps(body).encode(), clock=_clock())
        assert reply.status in ALLOWED, (body, reply.body)
        if reply.status != 200:
            _check_error(path, reply)

    check()
    assert not caplog.records, "nothing is logged as unexpected"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_each_field_takes_no_value_of_another_kind(path, caplog):
    """Every field once with every kind of value, so that no luck is needed."""
    body, good = ENDPOINTS[path]
    values = [None, True, 7, -1, 2**70, 1.5, "", "\ud83d\ude00", [], [1], [{}], {}, {"a": [None]}]

    async def story():
        async with open_asgi(_inference()) as client:
            for field in _fields(body):
                for value in values:
                    reply = await client.post(path, good | {field: value})
                    assert reply.status in ALLOWED, (field, value, reply.body)
                    if reply.status != 200:
                        _check_error(path, reply)
            for request in client.inference.seen:
                _check_sendable(request)

    trio.run(story, clock=_clock())
    assert not caplog.records


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"7", b'"x"', b"{", b'{"model":"\xff"}'])
def test_what_is_no_object_is_refused(path, raw):
    reply = trio.run(_post, path, raw, clock=_clock())
    assert reply.status == 400
    _check_error(path, reply)


def _inference() -> RamInference:
    return RamInference((scripted(**AT_ONCE),))


def _clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


async def _post(path: str, raw: bytes):
    async with open_asgi(_inference()) as client:
        reply = await client.post(path, raw)
        for request in client.inference.seen:
            _check_sendable(request)
        return reply


def _check_sendable(request) -> None:
    """Another node, which checks every bound, would take it for what it is."""
    coded = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(coded, type=AnyRequest) == request


def _check_error(path: str, reply) -> None:
    found = reply.json()
    text = found["error"] if path.startswith("/api/") else found["error"]["message"]
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    assert "internal error" not in text
    assert len(text) < 2_000

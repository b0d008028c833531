"""What a request tells of itself, and that a conversation is known again by its next turn."""

import pytest

from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Options,
    ToolCall,
)
from ollamamax_p2p.router.call import Call
from ollamamax_p2p.router.core import request_facts
from ollamamax_p2p.router.core.request_facts import (
    BLOCK_BYTES,
    BLOCKS_PER_PIECE,
    POINTS_FIRST,
    POINTS_LAST,
    facts_of,
)


def facts(request, **call):
    return facts_of(request, Call(**call), id=7, region="here", now=100.0)


def chat(*contents, **more) -> ChatRequest:
    roles = ("user", "assistant")
    messages = tuple(
        ChatMessage(role=roles[at % 2], content=content) for at, content in enumerate(contents)
    )
    return ChatRequest(model="m", messages=messages, **more)


def hashes(request) -> list[int]:
    return [point.hash for point in facts(request).prefix]


def test_what_the_caller_said_is_taken_over():
    found = facts(
        chat("hello"), user="ann", priority=2, session="s", strategy="weighted", deadline_s=5.0
    )
    assert (found.id, found.model, found.kind, found.region) == (7, "m", "chat", "here")
    assert (found.user, found.priority, found.session) == ("ann", 2, "s")
    assert (found.strategy, found.begin_by) == ("weighted", 105.0)
    assert facts(chat("hello")).begin_by is None


def test_the_next_turn_begins_with_all_of_this_one():
    long = "a long document " * 4_000
    turn = ["question", "answer " * 3_000, long]
    next_turn = [*turn, "answer " * 9_000, "and now?"]
    assert hashes(chat(*turn))[-1] in hashes(chat(*next_turn))


def test_a_long_conversation_is_known_again_too():
    messages = [f"message {number}" for number in range(1_001)]
    found = hashes(chat(*messages))
    assert len(found) == POINTS_FIRST + POINTS_LAST
    assert found[-1] in hashes(chat(*messages, "answer", "question"))


def test_conversations_that_differ_anywhere_are_told_apart():
    base = hashes(chat("one", "two", "three"))
    other = hashes(chat("one", "two!", "three"))
    assert base[0] == other[0]
    assert not set(base[1:]) & set(other)


@pytest.mark.parametrize(
    "message",
    [
        ChatMessage(role="assistant", content="x"),
        ChatMessage(role="user", content="x", images=(b"picture",)),
        ChatMessage(role="user", content="x", images=(b"another",)),
        ChatMessage(role="user", content="x", tool_calls=(ToolCall(name="f", arguments={}),)),
        ChatMessage(role="user", content="x", tool_name="f"),
    ],
)
def test_all_that_a_model_reads_counts(message):
    plain = ChatRequest(model="m", messages=(ChatMessage(role="user", content="x"),))
    other = ChatRequest(model="m", messages=(message,))
    assert hashes(plain) != hashes(other)


def test_thoughts_of_earlier_turns_do_not_count():
    def with_thought(thinking):
        return ChatRequest(
            model="m", messages=(ChatMessage(role="assistant", content="x", thinking=thinking),)
        )

    assert hashes(with_thought("hm")) == hashes(with_thought(""))


def test_tools_come_before_everything():
    assert not set(hashes(chat("x", tools=({"name": "f"},)))) & set(hashes(chat("x")))


def test_what_a_conversation_never_loses_is_all_up_to_its_first_question():
    system = ChatMessage(role="system", content="be kind")
    first = ChatMessage(role="user", content="hello")
    more = ChatMessage(role="user", content="and?")
    short = ChatRequest(model="m", messages=(system, first))
    long = ChatRequest(model="m", messages=(system, first, more))
    assert facts(short).root == facts(long).root == hashes(short)[1]
    assert facts(ChatRequest(model="m", messages=(system, more))).root != facts(short).root
    assert facts(ChatRequest(model="m", messages=(system,))).root == hashes(short)[0]


def test_prompts_are_measured():
    assert facts(chat("x" * 4_000)).prompt_tokens == pytest.approx(1_000, abs=3)
    picture = ChatMessage(role="user", images=(b"p",))
    found = facts(ChatRequest(model="m", messages=(picture,)))
    assert found.prompt_tokens == pytest.approx(request_facts.IMAGE_TOKENS, abs=3)
    found = facts(GenerateRequest(model="m", prompt="x" * 400, context=(1, 2, 3)))
    assert found.prompt_tokens == 103
    found = facts(EmbedRequest(model="m", inputs=("x" * 400, "y" * 400)))
    assert (found.kind, found.prompt_tokens, found.output_tokens) == ("embed", 200, 0)


def test_a_prompt_is_cut_into_blocks():
    prompt = "".join(chr(97 + number % 26) for number in range(BLOCK_BYTES * 3 + 10))
    found = facts(GenerateRequest(model="m", prompt=prompt)).prefix
    assert [point.tokens for point in found] == [511, 1_023, 1_535, 1_538]
    longer = facts(GenerateRequest(model="m", prompt=prompt + "more" * 100)).prefix
    assert [point.hash for point in longer][:3] == [point.hash for point in found][:3]
    huge = facts(GenerateRequest(model="m", prompt="x" * BLOCK_BYTES * 50)).prefix
    assert len(huge) == BLOCKS_PER_PIECE + 1


def test_a_prompt_without_end_is_hashed_only_so_far(monkeypatch):
    monkeypatch.setattr(request_facts, "HASHED_BYTES_MAX", 10)
    assert hashes(chat("0123456789", "a")) == hashes(chat("0123456789", "b"))


def test_system_and_template_of_a_generate_request_come_before_its_prompt():
    plain = GenerateRequest(model="m", prompt="x")
    assert len(facts(plain).prefix) == 1
    with_system = GenerateRequest(model="m", prompt="x", system="be kind")
    assert len(facts(with_system).prefix) == 2
    with_template = GenerateRequest(model="m", prompt="x", template="be kind")
    assert hashes(with_template) != hashes(with_system)


def test_a_request_that_only_loads_has_no_prompt():
    found = facts(GenerateRequest(model="m"))
    assert (found.prefix, found.root, found.prompt_tokens, found.kind) == ((), 0, 0, "generate")


@pytest.mark.parametrize(("limit", "expected"), [(None, 256), (-1, 256), (10, 10), (9_999, 256)])
def test_an_answer_is_no_longer_than_it_may_be(limit, expected):
    request = GenerateRequest(model="m", prompt="x", options=Options(num_predict=limit))
    assert facts(request).output_tokens == expected


@pytest.mark.parametrize(
    ("request_", "needs", "can_move"),
    [
        (chat("x"), ("completion",), True),
        (chat("x", tools=({"name": "f"},)), ("completion", "tools"), False),
        (chat("x", think=True), ("completion", "thinking"), True),
        (chat("x", think=False), ("completion",), True),
        (chat("x", format="json"), ("completion",), False),
        (GenerateRequest(model="m", prompt="x", suffix="y"), ("completion", "insert"), True),
        (GenerateRequest(model="m", prompt="x", format={"type": "object"}), ("completion",), False),
        (EmbedRequest(model="m", inputs=("x",)), (), False),
    ],
)
def test_what_it_needs_and_whether_it_may_go_on_elsewhere(request_, needs, can_move):
    found = facts(request_)
    assert found.needs == needs
    assert found.can_move is can_move


def test_text_that_is_no_valid_unicode_does_no_harm():
    assert facts(chat("\ud800 broken")).prompt_tokens > 0
    assert facts(EmbedRequest(model="m", inputs=("\ud800",))).prompt_tokens == 0

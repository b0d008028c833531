"""What decides and reads, without an engine: every branch by example."""

import random

import msgspec
import pytest

from ollamamax_p2p.content.core.gguf import GgufHeader
from ollamamax_p2p.inference.core.completion_pieces import (
    CompletionChunk,
    CompletionPieces,
    Piece,
    TokenProbability,
    TopProbability,
)
from ollamamax_p2p.inference.core.lines import LineSplitter, LineTooLong, event_data
from ollamamax_p2p.inference.core.memory import (
    PROCESS_BYTES,
    DoesNotFit,
    InMemory,
    models_to_unload,
    needed_bytes,
)
from ollamamax_p2p.inference.core.ollama_messages import (
    Line,
    Shown,
    guessed_capabilities,
    request_body,
)
from ollamamax_p2p.inference.core.openai_chat import (
    ARGUMENTS_CHARS_MAX,
    AnswerChunk,
    AnswerChunks,
    openai_messages,
    openai_options,
    response_format,
)
from ollamamax_p2p.inference.core.requests import (
    ChatMessage,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Options,
    ToolCall,
)
from ollamamax_p2p.inference.core.sampling import merged, sampling_fields, tokens_left
from ollamamax_p2p.inference.core.thinking import ThinkingSplitter
from ollamamax_p2p.inference.core.vectors import shortened

# -- lines ---------------------------------------------------------------------------------------


def test_lines_are_the_same_however_they_arrive(rng: random.Random):
    whole = b"one\r\n\ntwo \xe2\x98\x83\nthree"
    expected = [b"one", b"", b"two \xe2\x98\x83", b"three"]
    for _ in range(50):
        splitter, lines, rest = LineSplitter(max_bytes=20), [], whole
        while rest:
            size = rng.randint(1, 5)
            lines += splitter.feed(rest[:size])
            rest = rest[size:]
        assert lines + splitter.end() == expected
        assert splitter.end() == []


def test_a_line_without_an_end_is_refused():
    with pytest.raises(LineTooLong):
        LineSplitter(max_bytes=3).feed(b"four")
    with pytest.raises(LineTooLong):
        LineSplitter(max_bytes=3).feed(b"four\n")


def test_only_data_lines_carry_data():
    assert event_data(b"data: {}") == b"{}"
    assert event_data(b"data:{}") == b"{}"
    assert event_data(b"event: x") is None
    assert event_data(b": ping") is None


# -- pieces --------------------------------------------------------------------------------------


def fed(*chunks: CompletionChunk) -> list[Piece]:
    pieces = CompletionPieces()
    return [piece for chunk in chunks if (piece := pieces.feed(chunk)) is not None]


def test_tokens_wait_for_their_text():
    (piece,) = fed(
        CompletionChunk(tokens=(0,), tokens_predicted=0),  # how far the prompt is read
        CompletionChunk(content="", tokens=(5,), tokens_predicted=1),
        CompletionChunk(content="ab", tokens=(6,), tokens_predicted=2),
    )
    assert piece.tokens() == (5, 6)


def test_a_gap_is_filled_only_by_what_ends_in_the_known_tokens():
    (piece,) = fed(CompletionChunk(content="雪", tokens=(120,), tokens_predicted=2))
    assert piece.tokens() == ()
    assert piece.tokens((7, 120)) == (7, 120)
    assert piece.tokens((7, 121)) == ()
    assert piece.tokens((7, 7, 120)) == ()
    assert Piece("x", (), 1).tokens((1,)) == ()


def test_probabilities_come_with_the_piece():
    top = TopProbability("b", None, None)
    token = TokenProbability("a", -0.5, (97,), (top,))
    (piece,) = fed(
        CompletionChunk(content="a", tokens_predicted=1, completion_probabilities=(token,))
    )
    (given,) = piece.logprobs
    assert (given.token, given.logprob, given.bytes) == ("a", -0.5, (97,))
    assert given.top_logprobs[0].logprob == -1e9


# -- thinking ------------------------------------------------------------------------------------


def split(text: str, *, inside: bool = False, size: int = 1) -> tuple[str, str]:
    splitter = ThinkingSplitter(inside=inside)
    parts = [splitter.feed(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(splitter.end())
    assert not splitter.holds
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_thinking_is_what_stands_between_its_marks(size: int):
    assert split("<think>\na < b\n</think>\n\nYes.", size=size) == ("a < b", "Yes.")
    assert split("\n <think>x</think>y", size=size) == ("x", "y")
    assert split("hm </th </think> ok", inside=True, size=size) == ("hm </th", "ok")
    assert split("<thin air", size=size) == ("", "<thin air")
    assert split("No.", size=size) == ("", "No.")
    assert split("<th", size=size) == ("", "<th")
    assert split("<think>never </thi", size=size) == ("never </thi", "")
    assert split(" \n", inside=True, size=size) == ("", "")
    splitter = ThinkingSplitter(inside=True, begun=True)
    assert splitter.feed(" more") == (" more", "")


# -- OpenAI --------------------------------------------------------------------------------------


def chunk(**fields) -> AnswerChunk:
    return msgspec.convert(fields, AnswerChunk)


def choice(**fields) -> AnswerChunk:
    return chunk(choices=[fields])


def test_an_answer_is_read_from_chunks():
    answer = AnswerChunks()
    assert answer.feed(choice(delta={"role": "assistant", "content": None})) is None
    assert answer.feed(choice(delta={"reasoning_content": "hm"})).thinking == "hm"
    assert answer.feed(choice(delta={"reasoning": "hm"})).thinking == "hm"
    assert answer.feed(choice(text="raw")).text == "raw"
    probable = {"content": [{"token": "a", "logprob": -1.0}]}
    assert answer.feed(choice(delta={"content": "a"}, logprobs=probable)).logprobs[0].token == "a"
    old = {"tokens": ["a", "b"], "token_logprobs": [-1.0, None], "top_logprobs": [{"c": -2.0}]}
    first, second = answer.feed(choice(text="ab", logprobs=old)).logprobs
    assert (first.top_logprobs[0].token, second.top_logprobs) == ("c", ())
    assert answer.feed(choice(delta={}, logprobs={})) is None
    assert answer.feed(chunk(usage={"prompt_tokens": 3}, timings={"prompt_ms": 2.0})) is None
    assert answer.usage.prompt_tokens == 3
    assert answer.timings.prompt_ms == 2.0
    assert answer.reason == ""
    answer.feed(choice(finish_reason="length"))
    assert answer.reason == "length"
    answer.feed(choice(finish_reason="tool_calls"))
    assert answer.reason == "stop"
    assert answer.delta_count == 5


def test_tool_calls_are_put_together_and_bounded():
    answer = AnswerChunks()
    for index, part in ((1, "{}"), (0, '{"a":'), (0, "1}")):
        call = {"index": index, "id": f"c{index}", "function": {"arguments": part}}
        answer.feed(choice(delta={"tool_calls": [call]}))
    assert [(call.id, call.arguments) for call in answer.tool_calls()] == [
        ("c0", {"a": 1}),
        ("c1", {}),
    ]
    huge = {"function": {"name": "x" * (ARGUMENTS_CHARS_MAX + 1)}}
    with pytest.raises(ValueError, match="too long"):
        answer.feed(choice(delta={"tool_calls": [huge]}))
    for wrong in ("{", "[]", "[" * 100_000):
        answer = AnswerChunks()
        answer.feed(choice(delta={"tool_calls": [{"function": {"arguments": wrong}}]}))
        with pytest.raises(ValueError, match="JSON"):
            answer.tool_calls()


def test_messages_are_written_as_openai_has_them():
    call = ToolCall(name="now", arguments={"x": 1})
    plain, seen, asked, told = openai_messages(
        [
            ChatMessage(role="user", content="Hi"),
            ChatMessage(role="user", content="?", images=(b"\xff\xd8", b"BM")),
            ChatMessage(role="assistant", thinking="hm", tool_calls=(call,)),
            ChatMessage(role="tool", content="1", tool_name="now"),
        ]
    )
    assert plain == {"role": "user", "content": "Hi"}
    text, first, second = seen["content"]
    assert text == {"type": "text", "text": "?"}
    assert first["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert second["image_url"]["url"].startswith("data:image/png;base64,")
    assert asked["reasoning_content"] == "hm"
    assert asked["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"x":1}'}
    assert (told["tool_call_id"], told["name"]) == ("now", "now")
    (unnamed,) = openai_messages([ChatMessage(role="tool", tool_call_id="c1")])
    assert unnamed == {"role": "tool", "content": "", "tool_call_id": "c1"}
    (picture,) = openai_messages([ChatMessage(role="user", images=(b"RIFF",))])
    assert len(picture["content"]) == 1


def test_options_are_written_as_openai_has_them():
    assert openai_options(Options()) == {}
    assert openai_options(Options(num_predict=-1, stop=("x",))) == {"stop": ["x"]}
    assert openai_options(Options(num_predict=5, repeat_penalty=1.5)) == {
        "max_tokens": 5,
        "repetition_penalty": 1.5,
    }
    ask = GenerateRequest(model="m", format="json")
    assert response_format(ask) == {"response_format": {"type": "json_object"}}
    schema = response_format(GenerateRequest(model="m", format={"type": "string"}))
    assert schema["response_format"]["json_schema"]["schema"] == {"type": "string"}
    assert response_format(GenerateRequest(model="m")) == {}


# -- Ollama --------------------------------------------------------------------------------------


def test_requests_are_written_as_ollama_has_them():
    assert request_body(EmbedRequest(model="m", inputs=("a",), dimensions=2)) == {
        "model": "m",
        "input": ["a"],
        "truncate": True,
        "dimensions": 2,
    }
    assert request_body(EmbedRequest(model="m", inputs=())) == {
        "model": "m",
        "input": [],
        "truncate": True,
    }
    call = ToolCall(name="now", arguments={}, id="c", index=1)
    message = ChatMessage(
        role="assistant", thinking="hm", images=(b"x",), tool_calls=(call,), tool_name="t"
    )
    body = request_body(
        ChatRequest(
            model="m",
            messages=(message,),
            tools=({"type": "function"},),
            options=Options(stop=("a",), seed=1),
            keep_alive_s=0.0,
            format="json",
            think="low",
            logprobs=True,
        )
    )
    assert body["options"] == {"stop": ["a"], "seed": 1}
    assert (body["keep_alive"], body["format"], body["think"]) == (0.0, "json", "low")
    assert (body["logprobs"], body["top_logprobs"], body["stream"]) == (True, 0, True)
    assert body["tools"] == [{"type": "function"}]
    assert body["messages"] == [
        {
            "role": "assistant",
            "content": "",
            "thinking": "hm",
            "tool_name": "t",
            "images": ["eA=="],
            "tool_calls": [{"id": "c", "function": {"index": 1, "name": "now", "arguments": {}}}],
        }
    ]
    assert request_body(ChatRequest(model="m", messages=())) == {
        "model": "m",
        "stream": True,
        "messages": [],
    }
    plain = ChatMessage(role="user", content="Hi")
    assert request_body(ChatRequest(model="m", messages=(plain,)))["messages"] == [
        {"role": "user", "content": "Hi"}
    ]
    assert request_body(GenerateRequest(model="m", prompt="p")) == {
        "model": "m",
        "stream": True,
        "prompt": "p",
    }
    assert request_body(
        GenerateRequest(
            model="m", prompt="p", suffix="s", raw=True, system="", images=(b"x",), context=(1,)
        )
    ) == {
        "model": "m",
        "stream": True,
        "prompt": "p",
        "suffix": "s",
        "raw": True,
        "system": "",
        "images": ["eA=="],
        "context": [1],
    }


def test_lines_are_read_as_ollama_writes_them():
    line = msgspec.convert({"response": "a", "thinking": "b", "done": False}, Line)
    assert (line.delta().text, line.delta().thinking) == ("a", "b")
    called = {"message": {"tool_calls": [{"function": {"name": "now"}}]}}
    (call,) = msgspec.convert(called, Line).delta().tool_calls
    assert (call.name, call.arguments) == ("now", {})
    last = msgspec.convert({"done": True, "eval_count": 3, "prompt_eval_count": 5}, Line)
    assert last.delta() is None
    finish = last.finish(earlier_tokens=2, prompt_tokens_less=2)
    assert (finish.reason, finish.context) == ("stop", ())
    assert (finish.usage.completion_tokens, finish.usage.prompt_tokens) == (5, 3)


def test_what_an_old_ollama_does_not_say_is_in_the_template():
    able = guessed_capabilities(Shown(template="{{ .Tools }}{{ .Suffix }}"))
    assert able == ("completion", "tools", "insert")
    assert guessed_capabilities(Shown(model_info={"bert.pooling_type": 1})) == ("embedding",)


# -- options, vectors, memory --------------------------------------------------------------------


def test_a_request_counts_before_the_model_and_the_model_before_the_defaults():
    model = {"top_k": 7, "temperature": "0.5", "stop": ["x"], "seed": "no number", "odd": 1}
    options = merged(Options(temperature=0.1), model)
    assert (options.temperature, options.top_k, options.stop) == (0.1, 7, ("x",))
    assert (options.seed, options.top_p) == (-1, 0.9)
    fields = sampling_fields(options)
    assert (fields["stop"], fields["n_keep"], fields["min_p"]) == (["x"], 4, 0.0)
    assert merged(Options(), {"top_k": None}).top_k == 40


def test_tokens_are_counted_over_the_whole_answer():
    assert tokens_left(Options(num_predict=5), 3, 100) == 2
    assert tokens_left(Options(num_predict=5), 9, 100) == 0
    assert tokens_left(Options(num_predict=-1), 1, 100) == 999
    assert tokens_left(Options(), 0, 100) == 1_000


def test_a_vector_is_shortened_to_length_one():
    assert shortened([3.0, 4.0, 9.0], 2) == (0.6, 0.8)
    assert shortened([0.0, 2.0], 0) == (0.0, 1.0)
    assert shortened([0.0], 0) == (0.0,)


def test_a_model_needs_weights_cache_and_what_every_process_takes():
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.embedding_length": 576,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": (3, 2, "odd"),
        "llama.vocab_size": 1_000,
    }
    header = GgufHeader(3, metadata, (), alignment=32, data_offset=0)
    needed = needed_bytes(header, 98_000_000, context=512, slots=2, batch=100)
    cache = 30 * 3 * 128 * 2 * 512 * 2
    assert needed == 98_000_000 + cache + 400_000 + PROCESS_BYTES
    unknown = GgufHeader(3, {}, (), alignment=32, data_offset=0)
    assert needed_bytes(unknown, 5, context=512, slots=1, batch=1) == 5 + PROCESS_BYTES


def test_the_longest_unused_idle_models_go_and_no_more_of_them_than_needed():
    def model(key: str, last_used: float, *, idle: bool = True) -> InMemory:
        return InMemory(key, 10, last_used, idle)

    old, new, busy = model("old", 1), model("new", 2), model("busy", 0, idle=False)
    assert models_to_unload([old, new, busy], 10, 40) == []
    assert models_to_unload([new, old, busy], 10, 30) == ["old"]
    assert models_to_unload([new, old, busy], 20, 30) == ["old", "new"]
    assert models_to_unload([new, old, busy], 25, 30) is None
    with pytest.raises(DoesNotFit):
        models_to_unload([], 31, 30)

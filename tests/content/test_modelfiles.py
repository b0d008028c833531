import struct
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.modelfile import (
    MODELFILE_BYTES_MAX,
    Message,
    Origin,
    as_float32,
    go_quoted,
    human_number,
    parse_modelfile,
    render_modelfile,
    render_parameters,
)
from ollamamax_p2p.errors import BadModelFile
from tests.content.model_files import check_one_line

WHOLE = '''# a comment
FROM ./model.gguf
from mmproj.gguf

TEMPLATE """{{ if .System }}<|system|>
{{ .System }}{{ end }}
{{ .Prompt }}"""
System  "You are "terse"."
PARAMETER temperature 0.7
PARAMETER   num_ctx   4096
PARAMETER stop <|im_end|>
PARAMETER stop "User: "
PARAMETER use_mmap false
PARAMETER mirostat 2
LICENSE MIT
license """
Second
"""
MESSAGE user Hello there
MESSAGE assistant """Hi,
you."""
ADAPTER ./lora.gguf
RENDERER qwen3
PARSER qwen3
REQUIRES v0.14.0
'''


def test_a_modelfile_is_read():
    read = parse_modelfile(WHOLE)
    assert read.origins == (Origin("./model.gguf", 2), Origin("mmproj.gguf", 3))
    assert read.adapters == (Origin("./lora.gguf", 22),)
    assert read.template == "{{ if .System }}<|system|>\n{{ .System }}{{ end }}\n{{ .Prompt }}"
    assert read.system == 'You are "terse".'
    assert read.parameters == {
        "temperature": 0.7,
        "num_ctx": 4096,
        "stop": ["<|im_end|>", "User: "],
        "use_mmap": False,
    }
    assert read.ignored == ("mirostat",)
    assert read.licenses == ("MIT", "\nSecond\n")
    assert read.messages == (Message("user", "Hello there"), Message("assistant", "Hi,\nyou."))
    assert (read.renderer, read.parser, read.requires) == ("qwen3", "qwen3", "0.14.0")


@pytest.mark.parametrize(
    "encoded",
    [
        b"FROM x\r\nSYSTEM \xc3\xa9",
        b"\xef\xbb\xbfFROM x\nSYSTEM \xc3\xa9",
        "\ufeffFROM x\rSYSTEM é".encode("utf-16-le"),
        "\ufeffFROM x\nSYSTEM é",
    ],
)
def test_a_modelfile_is_read_in_the_encodings_that_editors_write(encoded):
    read = parse_modelfile(encoded)
    assert (read.origins[0].text, read.system) == ("x", "é")


def test_the_last_template_counts_and_licenses_add_up():
    read = parse_modelfile("FROM x\nTEMPLATE a\nTEMPLATE b\nLICENSE c\nLICENSE d")
    assert (read.template, read.licenses) == ("b", ("c", "d"))


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ('"quoted"', "quoted"),
        ('""', ""),
        ('""""""', ""),
        ('"""a"b"""', 'a"b'),
        ('"two\nlines"', "two\nlines"),
        ('"""  spaces stay  \n  here  """', "  spaces stay  \n  here  "),
        ('"\n"', "\n"),
        ('un"quoted"', 'un"quoted"'),
        ("   trimmed \t", "trimmed"),
        ("in\u200bvis\0ible", "invisible"),
        ("# no comment", "# no comment"),
        ('"""never "quite" closed"\n"""', 'never "quite" closed"\n'),
    ],
)
def test_values_are_unquoted_as_ollama_does(value, read):
    assert parse_modelfile(f"FROM x\nSYSTEM {value}\n").system == read


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", None, "no FROM"),
        ("SYSTEM x", None, "no FROM"),
        ("FROM x\nBUILD y", 2, "unknown command 'BUILD'"),
        ("FROM", 1, "FROM has no value"),
        ("FROM x\nFROM: y", 2, "unknown command"),
        ("FROM x\nParameter", 2, "PARAMETER has no value"),
        ("FROM x\nPARAMETER top_k", 2, "needs two values"),
        ("FROM x\nPARAMETER top_k many", 2, "must be an integer"),
        ("FROM x\nPARAMETER top_k 1.5", 2, "must be an integer"),
        ("FROM x\nPARAMETER temperature hot", 2, "must be a number"),
        ("FROM x\nPARAMETER temperature nan", 2, "must be a number"),
        ("FROM x\nPARAMETER temperature 1e400", 2, "out of range"),
        ("FROM x\nPARAMETER temperature 1e300", 2, "out of range"),
        ("FROM x\nPARAMETER use_mmap maybe", 2, "must be true or false"),
        ("FROM x\n\n# c\nPARAMETER wings 2", 4, "unknown parameter 'wings'"),
        ("FROM x\nMESSAGE robot hi", 2, "unknown role 'robot'"),
        ("FROM x\nMESSAGE user", 2, "needs two values"),
        ('FROM x\nSYSTEM """open\nand on', 2, "not closed"),
        ('FROM x\nSYSTEM "open', 2, "not closed"),
        ("FROM x\nREQUIRES soon", 2, "no version"),
        ("FROM x" + " " * MODELFILE_BYTES_MAX, None, "longer than"),
    ],
)
def test_a_bad_modelfile_is_refused_with_the_line(text, line, problem):
    with pytest.raises(BadModelFile, match=problem) as caught:
        parse_modelfile(text)
    assert caught.value.where == (f"Modelfile, line {line}" if line else "Modelfile")


@settings(max_examples=10_000, deadline=None)
@given(
    st.text()
    | st.binary()
    | st.lists(
        st.sampled_from(
            [
                "FROM x",
                "\n",
                '"',
                '"""',
                " ",
                "PARAMETER stop a",
                "PARAMETER num_ctx 2",
                "SYSTEM ",
                "MESSAGE user ",
                "TEMPLATE",
                "#",
                "\r\n",
                "\t",
                "REQUIRES 1",
                "LICENSE ",
                "\ufeff",
            ]
        ),
        max_size=20,
    ).map("".join)
)
def test_whatever_is_given_a_modelfile_is_read_or_refused(text):
    try:
        read = parse_modelfile(text)
    except BadModelFile as error:
        check_one_line(error)
        return
    assert read.origins


plain = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S"]) | st.sampled_from(' "')
)
texts = st.lists(plain, min_size=1, max_size=3).map("\n".join).filter(lambda t: '"""' not in t)
numbers = st.floats(-100, 100, width=32).map(as_float32)


@settings(max_examples=500, deadline=None)
@given(
    template=texts,
    system=texts,
    licenses=st.lists(texts, max_size=2),
    messages=st.lists(
        st.builds(Message, st.sampled_from(["user", "assistant"]), texts), max_size=2
    ),
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.lists(texts, min_size=1, max_size=3),
            "temperature": numbers,
            "num_ctx": st.integers(-(10**9), 10**9),
            "use_mmap": st.booleans(),
        },
    ),
)
def test_a_rendered_modelfile_is_read_back(template, system, licenses, messages, parameters):
    text = render_modelfile(
        origins=["/a/model"],
        template=template,
        system=system,
        licenses=licenses,
        messages=messages,
        parameters=parameters,
    )
    read = parse_modelfile(text)
    assert (read.template, read.system) == (template, system)
    assert (list(read.licenses), list(read.messages)) == (licenses, messages)
    assert read.parameters == parameters


def test_a_modelfile_is_written_as_ollama_shows_it():
    text = render_modelfile(
        origins=["/m/blobs/sha256-1", "/m/blobs/sha256-2"],
        adapters=["/m/blobs/sha256-3"],
        template="{{ .Prompt }}",
        system="Be\nbrief",
        parameters={"temperature": 1.0, "stop": ["<|im_end|>", "User: "], "num_ctx": 4096},
        licenses=['say "yes"\n'],
        messages=[Message("user", "hi")],
        parser="p",
    )
    assert text == (
        "FROM /m/blobs/sha256-1\nFROM /m/blobs/sha256-2\nADAPTER /m/blobs/sha256-3\n"
        'TEMPLATE {{ .Prompt }}\nSYSTEM "Be\nbrief"\nPARSER p\nPARAMETER num_ctx 4096\n'
        'PARAMETER stop <|im_end|>\nPARAMETER stop "User: "\nPARAMETER temperature 1\n'
        'LICENSE """say "yes"\n"""\nMESSAGE user hi\n'
    )


def test_parameters_are_shown_in_columns():
    shown = render_parameters({"top_p": 0.9, "stop": ["<|a|>", "\n"], "use_mmap": True})
    assert shown == (
        'stop                           "<|a|>"\n'
        'stop                           "\\n"\n'
        "top_p                          0.9\n"
        "use_mmap                       true"
    )


def test_text_is_quoted_as_go_does():
    assert go_quoted('a"\\\n\t\0é\u200b\U000e0001') == '"a\\"\\\\\\n\\t\\x00é\\u200b\\U000e0001"'


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (134_515_008, "134.52M"), (8_030_261_312, "8.0B"), (7 * 10**9, "7B"), (3 * 10**6, "3M"),
        (999_999, "1000K"), (1_500, "2K"), (999, "999"), (0, "0"),
    ],
)  # fmt: skip
def test_weights_are_counted_as_people_do(count, text):
    assert human_number(count) == text


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_number_of_32_bits_is_written_as_short_as_it_can_be(value):
    short = as_float32(value)
    assert struct.pack("<f", short) == struct.pack("<f", value)
    assert digit_count(short) <= digit_count(value)


def digit_count(value: float) -> int:
    return len(Decimal(repr(value)).normalize().as_tuple().digits)

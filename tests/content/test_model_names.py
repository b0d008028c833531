import os
import string
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.errors import BadName
from tests.content.model_files import check_one_line

HUB, LIBRARY = "registry.ollama.ai", "library"


@pytest.mark.parametrize(
    ("text", "parts", "shown"),
    [
        ("llama3.2", (HUB, LIBRARY, "llama3.2", "latest"), "llama3.2:latest"),
        ("llama3.2:1b", (HUB, LIBRARY, "llama3.2", "1b"), "llama3.2:1b"),
        ("mike/Coder:Q4_0", (HUB, "mike", "Coder", "Q4_0"), "mike/Coder:Q4_0"),
        (
            "hf.co/bartowski/SmolLM2-GGUF:Q4_K_M",
            ("hf.co", "bartowski", "SmolLM2-GGUF", "Q4_K_M"),
            "hf.co/bartowski/SmolLM2-GGUF:Q4_K_M",
        ),
        (
            "localhost:5000/library/tiny",
            ("localhost:5000", LIBRARY, "tiny", "latest"),
            "localhost:5000/library/tiny:latest",
        ),
        ("http://box:80/a/b:c", ("box:80", "a", "b", "c"), "box:80/a/b:c"),
        ("https://box/a/b", ("box", "a", "b", "latest"), "box/a/b:latest"),
        (
            "Registry.Ollama.AI/Library/x",
            ("Registry.Ollama.AI", "Library", "x", "latest"),
            "x:latest",
        ),
        ("_/_", (HUB, "_", "_", "latest"), "_/_:latest"),
        ("a" * 80, (HUB, LIBRARY, "a" * 80, "latest"), "a" * 80 + ":latest"),
    ],
)
def test_names_are_read_and_shown_as_ollama_does(text, parts, shown):
    name = parse_model_name(text)
    assert name.parts == parts
    assert str(name) == shown
    assert name.full() == f"{parts[0]}/{parts[1]}/{parts[2]}:{parts[3]}"
    assert parse_model_name(str(name)).matches(name)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "empty"),
        (":tag", "model is empty"),
        ("model:", "tag is empty"),
        ("/model", "namespace is empty"),
        ("host//model", "namespace is empty"),
        ("namespace/", "model is empty"),
        ("/namespace/model", "host is empty"),
        ("http:///namespace/model", "host is empty"),
        ("ftp://host/a/b", "unknown scheme 'ftp'"),
        ("a/b/c/d", "its host"),
        ("name space/model", "its namespace"),
        ("name.space/model", "its namespace"),
        ("..", "its model"),
        ("../../etc/passwd", "its host"),
        ("host/../model", "its namespace"),
        ("model:..", "its tag"),
        (".hidden", "its model"),
        ("-rf", "its model"),
        ("a:b:c", "its model"),
        ("namespace:x/model", "its namespace"),
        ("mod\u00e9l", "its model"),
        ("model\n", "its model"),
        ("a" * 81, "longer than 80"),
        ("a" * 351 + "/b/c", "longer than 350"),
        ("x" * 100_000, "longer than"),
        ("mo\0del", "its model"),
        ("a\\b", "its model"),
    ],
)
def test_a_bad_name_is_refused_with_the_rule_it_breaks(text, rule):
    with pytest.raises(BadName, match=rule):
        parse_model_name(text)


def test_case_is_kept_but_does_not_matter():
    one, two = parse_model_name("Mike/Coder:V1"), parse_model_name("mike/coder:v1")
    assert one != two
    assert one.matches(two)
    assert one.key == two.key
    assert not one.matches(parse_model_name("mike/coder:v2"))


def test_a_name_made_from_parts_is_checked_as_strictly():
    with pytest.raises(BadName):
        ModelName("host", "..", "model", "tag")


@settings(max_examples=10_000, deadline=None)
@given(st.text() | st.text(string.ascii_letters + "0/:._-~\\ \0", max_size=400))
def test_whatever_is_given_a_name_is_refused_or_stays_below_its_folder(text):
    try:
        name = parse_model_name(text)
    except BadName as error:
        check_one_line(error)
        return
    root = PurePosixPath("/models/manifests")
    joined = os.path.normpath(root.joinpath(*name.parts))
    assert PurePosixPath(joined).parts[:3] == root.parts
    assert PurePosixPath(joined).parts[3:] == name.parts
    assert parse_model_name(name.full()) == name

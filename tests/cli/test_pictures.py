"""Pictures that a prompt names by their paths."""

import os

import pytest

from ollamamax_p2p.errors import BadInput
from omx_cli.pictures import PICTURE_BYTES_MAX, illustrated

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20
JPEG = b"\xff\xd8\xff\xe0" + b"\0" * 20
WEBP = b"RIFF\x24\0\0\0WEBPVP8 "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b c.JPG").write_bytes(JPEG)
    (tmp_path / "d.webp").write_bytes(WEBP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "text", "pictures"),
    [
        ("what is ./a.png?", "what is ?", [PNG]),
        ("{folder}/a.png describe it", "describe it", [PNG]),
        ("~/d.webp", "", [WEBP]),
        ("compare ./a.png and './b c.JPG'.", "compare  and .", [PNG, JPEG]),
        (r"see ./b\ c.JPG", "see", [JPEG]),
        ("file://{folder}/b%20c.JPG", "", [JPEG]),
    ],
)
def test_pictures_are_read_and_taken_out_of_the_text(folder, prompt, text, pictures):
    found = illustrated(prompt.format(folder=folder))
    assert (found.text, list(found.pictures)) == (text, pictures)
    assert len(found.paths) == len(pictures)


@pytest.mark.parametrize(
    "prompt",
    [
        "  rename a.png please ",
        "./none.png",
        "/api/a.png/b",
        "http://x/a.png",
        "./" + "x" * 5000 + ".png",
        "what is 1./2.?",
        "./a\0.png",
    ],
)
def test_what_names_no_file_stays_a_part_of_the_text(folder, prompt):
    found = illustrated(prompt)
    assert (found.text, found.pictures) == (prompt, ())


def test_what_cannot_be_sent_is_named(folder):
    (folder / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match=r"text\.png: neither PNG, JPEG nor WebP"):
        illustrated("./text.png")
    with open(folder / "big.png", "wb") as file:
        file.write(PNG)
        os.truncate(file.fileno(), PICTURE_BYTES_MAX + 1)
    with pytest.raises(BadInput, match=r"big\.png: larger than 12 MB"):
        illustrated("./big.png")

"""Byte for byte what Ollama answers: every exchange in tests/vectors/ollama-api."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from ollamamax_p2p import errors
from ollamamax_p2p.errors import CannotResume
from ollamamax_p2p.inference.core.requests import Part
from tests.api.asgi import open_asgi
from tests.api.ram_inference import RamInference

FOLDER = Path(__file__).parent.parent / "vectors" / "ollama-api"
FILES = ("generate", "chat", "embed-and-ps", "openai", "anthropic")
PLACEHOLDERS = {
    "«time»": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{0,8}[1-9])?Z",
    "«n»": r"\d+",
    "«call»": "[a-z0-9]{8}",
    "«hex»": "[0-9a-f]+",
}


def _exchanges():
    return [
        pytest.param(each, id=f"{name}: {each['name']}")
        for name in FILES
        for each in json.loads((FOLDER / f"{name}.json").read_text())
    ]


@pytest.mark.parametrize("exchange", _exchanges())
async def test_the_answer_is_ollamas_byte_for_byte(autojump_clock, exchange):
    async with open_asgi(_inference(exchange.get("given", {}))) as client:
        body = exchange.get("body")
        raw = body.encode() if isinstance(body, str) else body
        reply = await client.ask(
            exchange["method"], exchange["path"], raw, headers=exchange.get("headers")
        )
    assert (reply.status, reply.headers["content-type"]) == (
        exchange["status"],
        exchange["content_type"],
    )
    for name, value in exchange.get("also", {}).items():
        assert reply.headers[name] == value
    assert _pattern(exchange["answer"]).fullmatch(reply.body.decode()), reply.body.decode()


def _inference(given: dict) -> RamInference:
    parts = [msgspec.convert(part, Part) for part in given.get("parts", ())]
    if "breaks" in given:
        parts.append(CannotResume(given["breaks"]))
    error = None
    if "raises" in given:
        name, *arguments = given["raises"]
        error = getattr(errors, name)(*arguments)
    return RamInference(parts=parts or None, error=error)


def _pattern(answer: str) -> re.Pattern[str]:
    pieces = re.split("(«[a-z]+»)", answer)
    return re.compile("".join(PLACEHOLDERS.get(piece, re.escape(piece)) for piece in pieces))

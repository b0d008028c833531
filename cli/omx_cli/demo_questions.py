"""The demo's second half: questions to a node that holds no model, and one node fewer midway."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2

QUESTION = "Tell me in a few sentences how bees make honey."
TOKENS_MAX = 96
ANSWER_TIMEOUT_S = 300.0
# The first question loads the model: seconds, or a minute on a machine that is busy.


class AskingFailed(Exception):
    """A question was not answered; the message says what came instead."""


@dataclass(slots=True)
class Told:
    """An answer, and how it came."""

    node: str = ""
    """Who began it."""
    text: str = ""
    tokens: int = 0
    moved: int = 0
    """How often it went on at another node."""
    seconds: float = 0.0
    longest_pause_s: float = 0.0
    """Between two parts of it."""
    deltas: int = field(default=0, repr=False)


async def ask(api: str, model: str, on_delta: Callable[[Told, str], None]) -> Told:
    """Ask the node at host:port as any client of Ollama would, always the likeliest token, so that
    the same question has the same answer. Raises AskingFailed.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "options": {"temperature": 0, "seed": 1, "num_predict": TOKENS_MAX},
    }
    told = Told()
    began = last = time.perf_counter()
    try:
        async with (
            httpx2.AsyncClient(timeout=ANSWER_TIMEOUT_S, trust_env=False) as client,
            client.stream("POST", f"http://{api}/api/chat", json=body) as answer,
        ):
            told.node = answer.headers.get("omx-node", "")
            async for line in answer.aiter_lines():
                part = json.loads(line)
                if "error" in part:
                    raise AskingFailed(part["error"])
                now = time.perf_counter()
                if told.deltas:
                    told.longest_pause_s = max(told.longest_pause_s, now - last)
                last = now
                if part["done"]:
                    told.tokens = part.get("eval_count", 0)
                    told.moved = part.get("omx_moved", 0)
                    break
                words = part["message"]["content"]
                told.text += words
                told.deltas += 1
                on_delta(told, words)
    except (httpx2.HTTPError, json.JSONDecodeError) as error:
        raise AskingFailed(f"{type(error).__name__}: {error}") from error
    told.seconds = time.perf_counter() - began
    return told

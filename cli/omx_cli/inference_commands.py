"""omx run | ps | load | embed, and what `omx stop MODEL` does."""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import (
    human_age,
    human_bytes,
    printable,
    say,
    say_json,
    short_digest,
    table,
    tell,
    terminal_columns,
)

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient, RunningModel
    from omx_cli.asking import Manner

LOAD_TIMEOUT_S = 310.0
"""The engine gives up before: it has 300 s for a large model on a slow disk."""

PROMPT_BYTES_MAX = 12 * 1024 * 1024
"""Of stdin: a request of 16 MiB may carry it, quoted as JSON."""

TEXTS_AT_ONCE = 64
"""Of stdin, to be embedded: a batch for the engine, and a bound for us."""

KeepAlive = Annotated[
    str | None,
    typer.Option(
        "--keepalive",
        metavar="TIME",
        help="How long the model stays in memory afterwards: 10m, 0s, -1s for ever.",
    ),
]


def run(
    model: options.ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...",
            help="What is asked; stdin, where it is no terminal, comes behind it. Neither: a "
            "conversation.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Tell how long it took.")] = False,
    answer_format: Annotated[
        str,
        typer.Option(
            "--format", metavar="json|SCHEMA", help="Answer in JSON, or JSON of a JSON schema."
        ),
    ] = "",
    think: Annotated[
        str | None,
        typer.Option(
            metavar="true|false|low|medium|high|max",
            help="Think before answering, or do not; --think alone is true.",
        ),
    ] = None,
    hide_thinking: Annotated[
        bool, typer.Option("--hidethinking", help="Show the answer only.")
    ] = False,
    keep_alive: KeepAlive = None,
    no_word_wrap: Annotated[
        bool, typer.Option("--nowordwrap", help="Do not break lines between words.")
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="If it must be pulled: speak plain http to its registry."),
    ] = False,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Ask a model of the swarm; the node best placed answers. Pulls one that nobody has."""
    from omx_cli.asking import Manner
    from omx_cli.own_node import node_for_a_while
    from omx_cli.running import load as load_config

    manner = Manner(
        format=_format(answer_format),
        think=_think(think),
        keep_alive=_keep_alive(keep_alive),
        verbose=verbose,
        hide_thinking=hide_thinking,
        wrap=not no_word_wrap,
        as_json=as_json,
    )
    asked = " ".join(prompt or ())
    piped = _piped_text()
    talks = not asked and piped is None
    if talks and (as_json or not sys.stdout.isatty()):
        raise typer.BadParameter("give a PROMPT; a conversation needs a terminal")
    settings = load_config(node_flags(data_dir=data_dir, models=models), config)
    with node_for_a_while(settings, _tell_if_seen) as client:
        if talks:
            _talk(client, model, manner, insecure, settings.data_dir)
        else:
            _ask_once(client, model, asked, piped or "", manner, insecure)


def _talk(
    client: "LocalClient", model: str, manner: "Manner", insecure: bool, data_dir: Any
) -> None:
    from omx_cli.asking import capabilities_of, only_embeds
    from omx_cli.conversation import Conversation
    from omx_cli.line_reader import open_line_reader
    from omx_cli.running import run as run_async

    capabilities = run_async(
        lambda: capabilities_of(client, model, insecure=insecure, as_json=False),
        interrupted=PULL_INTERRUPTED,
    )
    if only_embeds(capabilities):
        raise typer.BadParameter(f"{model} only gives vectors; give it a PROMPT, or `omx embed`")
    keeps_history = not os.environ.get("OLLAMA_NOHISTORY")
    with open_line_reader(data_dir / "history", keeps_history=keeps_history) as reader:
        Conversation(client, model, manner, capabilities, reader, insecure).run()


PULL_INTERRUPTED = "interrupted; what was fetched is kept, the same command resumes"


def _ask_once(
    client: "LocalClient", model: str, asked: str, piped: str, manner: "Manner", insecure: bool
) -> None:
    from omx_cli.asking import ask, capabilities_of, encoded, only_embeds, refuse_pictures
    from omx_cli.pictures import illustrated
    from omx_cli.running import run as run_async

    capabilities = run_async(
        lambda: capabilities_of(client, model, insecure=insecure, as_json=manner.as_json),
        interrupted=PULL_INTERRUPTED,
    )
    found = illustrated(asked)  # not what is piped: a document may name any file
    text = "\n".join(part for part in (found.text, piped) if part)
    if only_embeds(capabilities):
        run_async(lambda: _embed(client, model, [text], 0, manner.keep_alive, manner.as_json))
        return
    refuse_pictures(model, found.paths, capabilities)
    body = manner.body(model) | {"prompt": text}
    if found.pictures:
        body["images"] = encoded(found.pictures)
    run_async(lambda: ask(client, "generate", body, manner.view()))


def _tell_if_seen(text: str) -> None:
    if sys.stderr.isatty():
        tell(text)


def _piped_text() -> str | None:
    """What stdin has, where it is no terminal. Raises BadInput for what is no text, or too long."""
    from ollamamax_p2p.errors import BadInput

    if sys.stdin is None or sys.stdin.isatty():
        return None
    raw = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
    if len(raw) > PROMPT_BYTES_MAX:
        raise BadInput(f"stdin: more than {PROMPT_BYTES_MAX:,} bytes, which no request carries")
    return _decoded(raw)


def _decoded(raw: bytes) -> str:
    from ollamamax_p2p.errors import BadInput

    try:
        return raw.decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"stdin: not UTF-8 at byte {error.start}; not a text?") from None


def _format(given: str) -> Any:
    if given in ("", "json"):
        return given
    import json

    try:
        schema = json.loads(given)
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise typer.BadParameter(f"--format: {given[:40]!r} is neither json nor a JSON schema")
    return schema


def _think(given: str | None) -> bool | str | None:
    from omx_cli.asking import THINKING_EFFORTS

    if given is None or given in THINKING_EFFORTS:
        return given
    if given not in ("true", "false"):
        efforts = ", ".join(THINKING_EFFORTS)
        raise typer.BadParameter(f"--think: {given[:40]!r} is not true, false, {efforts}")
    return given == "true"


def _keep_alive(given: str | None) -> float | str | None:
    """A number is seconds; the node reads the rest, as it does for every client."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


# -- models in memory --------------------------------------------------------------------------


def ps(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only names that begin so.")] = "",
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """List the models in memory, on every node of the swarm."""
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        running = await client.running_models()
        found = [each for each in running if each.model.name.lower().startswith(prefix.lower())]
        if as_json:
            say_json({"models": found})
        else:
            head = ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL", "NODE"]
            say(table(head, [running_row(each) for each in found]))

    with_node(node_flags(data_dir=data_dir), config, ask)


def running_row(running: "RunningModel") -> list[str]:
    """A line of `omx ps`."""
    from datetime import UTC, datetime

    model, server = running.model, running.server
    until = "Forever"
    if model.expires_at is not None:
        expires = datetime.fromtimestamp(model.expires_at, UTC)
        left = human_age(expires, datetime.now(UTC))
        until = left if left.endswith(" from now") else "Stopping..."
    return [
        model.name,
        short_digest(model.digest),
        human_bytes(model.size),
        processor_text(model.size, model.size_vram),
        str(model.context_length),
        until,
        server.node,
    ]


def processor_text(size: int, size_vram: int) -> str:
    """Where a model's bytes are, in Ollama's words: `100% GPU`, `48%/52% CPU/GPU`."""
    if size_vram > size or (size == 0 and size_vram):
        return "Unknown"
    if size_vram == 0:
        return "100% CPU"
    if size_vram == size:
        return "100% GPU"
    on_cpu = round((size - size_vram) / size * 100)
    return f"{on_cpu}%/{100 - on_cpu}% CPU/GPU"


def load(
    model: options.ModelArgument,
    keep_alive: KeepAlive = None,
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Have a model in memory, on the node where it fits best."""
    from omx_cli.running import with_node

    async def ask(client: "LocalClient") -> None:
        server = await client.load(model, keep_alive=_keep_alive(keep_alive))
        if as_json:
            say_json({"loaded": model, "node": server.node, "backend": server.backend})
        else:
            say(f"loaded '{model}' on {server.node} ({server.backend})")

    with_node(node_flags(data_dir=data_dir), config, ask, timeout_s=LOAD_TIMEOUT_S)


async def stop_model(client: "LocalClient", model: str, as_json: bool) -> None:
    """Have a model out of memory on every node. Raises NotFound in Ollama's words."""
    from ollamamax_p2p.errors import ModelNotFound, restored

    try:
        await client.unload(model)
    except ModelNotFound:
        raise restored("model_not_found", f'couldn\'t find model "{model}" to stop') from None
    if as_json:
        say_json({"stopped": model})
    else:
        say(f"stopped '{model}'")


# -- vectors -----------------------------------------------------------------------------------


def embed(
    model: options.ModelArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT...", help="Without: each line of stdin.", show_default=False),
    ] = None,
    dimensions: Annotated[
        int, typer.Option(min=0, metavar="N", help="Only so many numbers; 0: all.")
    ] = 0,
    keep_alive: KeepAlive = None,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Give a vector for each text: a line of numbers, cut to the width of a terminal."""
    from omx_cli.own_node import node_for_a_while
    from omx_cli.running import load as load_config
    from omx_cli.running import run as run_async

    if not texts and sys.stdin.isatty():
        raise typer.BadParameter("give a TEXT, or texts on stdin, one a line")
    settings = load_config(node_flags(data_dir=data_dir, models=models), config)
    with node_for_a_while(settings, _tell_if_seen) as client:
        # A loop for each: a read of stdin that waits must end with Ctrl-C.
        for batch in [texts] if texts else _batches():
            run_async(
                partial(_embed, client, model, batch, dimensions, _keep_alive(keep_alive), as_json)
            )


async def _embed(
    client: "LocalClient",
    model: str,
    texts: Sequence[str],
    dimensions: int,
    keep_alive: float | str | None,
    as_json: bool,
) -> None:
    found, server = await client.embed(model, texts, dimensions=dimensions, keep_alive=keep_alive)
    if as_json:
        say_json({"model": model, "node": server.node, "embeddings": found.vectors})
        return
    columns = terminal_columns()
    for vector in found.vectors:
        say(vector_text(vector, columns))
    sys.stdout.flush()


def vector_text(vector: Sequence[float], columns: int) -> str:
    """`[0.1,-0.2,…]`; cut, and told how long it is, where it would not fit."""
    text = "[" + ",".join(f"{number:.9g}" for number in vector) + "]"
    if len(text) <= columns:
        return text
    tail = f"… ({len(vector)} numbers)"
    return text[: max(columns - len(tail), 1)] + tail


def _batches() -> Iterator[list[str]]:
    """Lines of stdin, empty ones left out, as they come. Raises BadInput for what is no text."""
    batch = list[str]()
    for raw in sys.stdin.buffer:
        line = printable(_decoded(raw))
        if line.strip():
            batch.append(line)
        if len(batch) >= TEXTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch

"""omx pull | push | import | create | list | show | cp | rm."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import (
    fields,
    human_age,
    human_bytes,
    say,
    say_json,
    short_digest,
    table,
    tell,
)

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient, ModelDetails, ModelInfo, Node, ShowAnswer
    from ollamamax_p2p.errors import BadModelFile, OmxError

MODELFILE_BYTES_MAX = 3_000_000
"""Below what the API takes; several licences fit."""


def pull(
    model: options.ModelArgument,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Speak plain http to this model's registry.")
    ] = False,
    from_origin: Annotated[
        bool,
        typer.Option("--from-origin", help="Ask the registry, not the peers, what the name means."),
    ] = False,
    name: options.NodeName = None,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    api: options.Api = None,
    listen: options.Listen = None,
    bootstrap: options.Bootstrap = None,
    no_mdns: options.NoMdns = False,
    open_swarm: options.Open = False,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Fetch a model from whoever in the swarm has it, else from its registry."""
    from omx_cli.progress import open_view, report_line
    from omx_cli.running import (
        load,
        refuse_without_effect,
        run,
        running_node,
        running_or_own,
    )

    flags = node_flags(
        data_dir=data_dir,
        name=name,
        models=models,
        api=api,
        listen=listen,
        bootstrap=bootstrap,
        no_mdns=no_mdns,
        open_swarm=open_swarm,
    )
    settings = load(flags, config)

    async def work() -> None:
        if flags and await running_node(settings) is not None:
            refuse_without_effect(flags, settings)
        async with running_or_own(settings, settings) as node, open_view(as_json) as view:
            report = await node.pull(
                model, from_origin=from_origin, insecure=insecure, on_progress=view.show
            )
        if as_json:
            say_json({"status": "success", "report": report})
        else:
            say(report_line(report))

    run(work, interrupted="interrupted; what was fetched is kept, the same command resumes")


def push(
    model: options.ModelArgument,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Speak plain http to this model's registry.")
    ] = False,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Give a model of this machine to the registry that its name names."""
    from omx_cli.progress import open_view, push_line
    from omx_cli.running import with_any_node

    async def ask(node: "LocalClient | Node") -> None:
        async with open_view(as_json) as view:
            report = await node.push(model, insecure=insecure, on_progress=view.show)
        if as_json:
            say_json({"status": "success", "report": report})
        else:
            say(push_line(report))

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def import_file(
    file: Annotated[str, typer.Argument(metavar="FILE", show_default=False)],
    model: options.ModelArgument,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Make a GGUF or safetensors file a model. The file stays as and where it is."""
    from omx_cli.running import with_any_node

    if not file:
        raise typer.BadParameter("FILE is empty; name a GGUF or safetensors file")
    path = Path(file).absolute()

    async def ask(node: "LocalClient | Node") -> None:
        _say_made(await node.import_model(path, model), as_json)

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def create(
    model: options.ModelArgument,
    file: Annotated[
        str, typer.Option("--file", "-f", metavar="FILE", help="The Modelfile; - is stdin.")
    ] = "Modelfile",
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Make a model from a Modelfile."""
    from ollamamax_p2p.errors import BadModelFile
    from omx_cli.running import with_any_node

    text = _read_modelfile(file)
    base_dir = Path.cwd() if file == "-" else Path(file).absolute().parent

    async def ask(node: "LocalClient | Node") -> None:
        try:
            made = await node.create_model(model, text, base_dir)
        except BadModelFile as error:
            raise _of_file(error, "stdin" if file == "-" else file) from None
        _say_made(made, as_json)

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def list_models(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only names that begin so.")] = "",
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """List the models of this machine."""
    from omx_cli.running import with_any_node

    async def ask(node: "LocalClient | Node") -> None:
        found = [
            each for each in await node.models() if each.name.lower().startswith(prefix.lower())
        ]
        if as_json:
            say_json({"models": found})
        else:
            say(models_table(found))

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def show(
    model: options.ModelArgument,
    license: Annotated[bool, typer.Option("--license", help="Only its license.")] = False,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Only its Modelfile.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Only its parameters.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Only its template.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Only its system message.")] = False,
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Show what a model is."""
    from omx_cli.running import with_any_node

    wanted = {
        "license": license,
        "modelfile": modelfile,
        "parameters": parameters,
        "template": template,
        "system": system,
    }
    parts = [part for part, is_wanted in wanted.items() if is_wanted]
    if len(parts) > 1:
        flags = ", ".join(f"--{part}" for part in wanted)
        raise typer.BadParameter(f"only one of {flags} can be given")

    async def ask(node: "LocalClient | Node") -> None:
        details = await node.show(model)
        if as_json:
            say_json(details)
        else:
            say(getattr(details, parts[0]) if parts else _details_text(details))

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", show_default=False)],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", show_default=False)],
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Give a model a second name."""
    from omx_cli.running import with_any_node

    async def ask(node: "LocalClient | Node") -> None:
        made = await node.copy(source, destination)
        if as_json:
            say_json({"copied": source, "to": destination, "note": made.note})
        else:
            say(f"copied '{source}' to '{destination}'")
        _tell_note(made)

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def rm(
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", show_default=False)],
    data_dir: options.DataDir = None,
    models: options.Models = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Remove models, and the blobs that no other model needs."""
    from omx_cli.running import with_any_node

    async def ask(node: "LocalClient | Node") -> None:
        for model in names:
            await node.remove(model)
            if as_json:
                say_json({"deleted": model})
            else:
                say(f"deleted '{model}'")

    with_any_node(node_flags(data_dir=data_dir, models=models), config, ask)


def models_table(models: "Sequence[ModelInfo]") -> str:
    """What `omx list` shows."""
    return table(["NAME", "ID", "SIZE", "MODIFIED"], [_model_row(each) for each in models])


def _model_row(model: "ModelInfo") -> list[str]:
    from datetime import UTC, datetime

    age = human_age(model.modified_at, datetime.now(UTC))
    return [model.name, short_digest(model.digest), human_bytes(model.size), age]


def _say_made(model: "ModelInfo", as_json: bool) -> None:
    if as_json:
        say_json(model)
    else:
        say(f"{model.name}: {human_bytes(model.size)}, id {short_digest(model.digest)}")
    _tell_note(model)


def _tell_note(model: "ModelInfo") -> None:
    if model.note:
        tell(f"Note: {model.note}")


def _details_text(details: "ModelDetails") -> str:
    """Sections without borders, as Ollama's: a heading by two spaces, its lines by four."""
    model = [
        ("architecture", details.architecture),
        ("parameters", details.parameter_size),
        ("context length", str(details.context_length or "")),
        ("embedding length", str(details.embedding_length or "")),
        ("quantization", details.quantization),
        ("format", details.format),
        ("size", human_bytes(details.size) if details.size else ""),
    ]
    sections = [
        ("Model", fields([pair for pair in model if pair[1]], "    ")),
        ("Capabilities", _indented("\n".join(details.capabilities))),
        ("Parameters", _indented(details.parameters)),
        ("System", _indented(details.system)),
        ("License", _indented("\n".join(details.license.strip().splitlines()[:2]))),
    ]
    return "\n".join(f"  {title}\n{text}\n" for title, text in sections if text)


def shown_text(name: str, shown: "ShowAnswer") -> str:
    """The same of a model that may be on another node."""
    from datetime import UTC, datetime

    from ollamamax_p2p import ModelDetails

    details, info = shown.details, shown.model_info
    architecture = str(info.get("general.architecture", "") or details.family)
    return _details_text(
        ModelDetails(
            name=name,
            digest="",
            size=0,
            modified_at=datetime.fromtimestamp(0, UTC),  # not shown
            format=details.format,
            architecture=architecture,
            parameter_size=details.parameter_size,
            quantization=details.quantization_level,
            context_length=int(info.get(f"{architecture}.context_length", 0)),
            embedding_length=int(info.get(f"{architecture}.embedding_length", 0)),
            capabilities=shown.capabilities,
            license=shown.license,
            parameters=shown.parameters,
            system=shown.system,
        )
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())


def _of_file(error: "BadModelFile", file: str) -> "OmxError":
    """The same error, with the file's own name where the library, which has only its text, says
    Modelfile.
    """
    from ollamamax_p2p.errors import code, restored

    text = str(error)
    is_about_it = text.startswith(("Modelfile:", "Modelfile, line "))
    return restored(code(error), file + text.removeprefix("Modelfile")) if is_about_it else error


def _read_modelfile(file: str) -> str:
    """Raises BadModelFile, AccessRefused."""
    from ollamamax_p2p.config import read_regular_file
    from ollamamax_p2p.errors import AccessRefused, BadModelFile

    try:
        if file == "-":
            return sys.stdin.read(MODELFILE_BYTES_MAX)
        data = read_regular_file(Path(file), MODELFILE_BYTES_MAX + 1)
    except PermissionError:
        raise AccessRefused(file, "read") from None
    except OSError as error:
        raise BadModelFile(file, f"{error.strerror}; name it with -f") from None
    if len(data) > MODELFILE_BYTES_MAX:
        raise BadModelFile(file, f"larger than {MODELFILE_BYTES_MAX:,} bytes; not a Modelfile?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadModelFile(file, f"not UTF-8 at byte {error.start}; not a Modelfile?") from None

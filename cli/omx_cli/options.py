"""The options that several commands share, each described once."""

from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DataDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The node's own folder (default ~/.omx)."),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="Read settings from this file.")
]
Models = Annotated[
    str | None, typer.Option(metavar="DIR", help="The model store (default ~/.ollama/models).")
]
Api = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where the API listens (127.0.0.1:11435).")
]
Listen = Annotated[
    list[str] | None, typer.Option(metavar="MULTIADDR", help="Listen here; may be repeated.")
]
Bootstrap = Annotated[
    list[str] | None, typer.Option(metavar="MULTIADDR", help="Dial this peer; may be repeated.")
]
NoMdns = Annotated[bool, typer.Option("--no-mdns", help="Do not look for peers by multicast DNS.")]
Open = Annotated[bool, typer.Option("--open", help="A swarm without a key: everybody may connect.")]
NodeName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="What peers are shown.")
]
Region = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Where it stands; voters are spread over regions."),
]
Voter = Annotated[
    str | None,
    typer.Option(metavar="auto|yes|no", help="Whether it may vote (auto: unless on a battery)."),
]
OllamaPort = Annotated[
    int | None,
    typer.Option(
        "--ollama-port",
        metavar="PORT",
        min=1,
        max=65_535,
        help="Answer as Ollama here too, if it is free (Ollama's own is 11434).",
    ),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", show_default=False)]


def node_flags(
    *,
    data_dir: str | None = None,
    name: str | None = None,
    models: str | None = None,
    api: str | None = None,
    listen: list[str] | None = None,
    bootstrap: list[str] | None = None,
    no_mdns: bool = False,
    open_swarm: bool = False,
    region: str | None = None,
    voter: str | None = None,
    ollama_port: int | None = None,
) -> dict[str, Any]:
    """The flags that were given, by the key of the setting they set."""
    given = {
        "data_dir": data_dir,
        "name": name,
        "content.models": models,
        "api.listen": api,
        "host.listen": tuple(listen) if listen else None,
        "discovery.bootstrap": tuple(bootstrap) if bootstrap else None,
        "discovery.mdns": False if no_mdns else None,
        "open_swarm": True if open_swarm else None,
        "cluster.region": region,
        "cluster.voter": voter,
        "api.ollama_listen": f"127.0.0.1:{ollama_port}" if ollama_port else None,
    }
    return {key: value for key, value in given.items() if value is not None}

"""omx config show | check."""

from pathlib import Path
from typing import Annotated, Any

import typer

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import say, say_json, table

app = typer.Typer(help="Show and check settings.", no_args_is_help=True, rich_markup_mode=None)


@app.command("show")
def show(
    data_dir: options.DataDir = None,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Print every setting that is in force, and where it came from. Secrets are masked."""
    from ollamamax_p2p.config import effective, load

    file = Path(config) if config else None
    loaded = load(flags=node_flags(data_dir=data_dir), file=file)
    values = effective(loaded)
    if as_json:
        settings = {each.key: {"value": each.value, "source": each.source} for each in values}
        say_json({"file": str(loaded.file) if loaded.file else None, "settings": settings})
        return
    rows = [[each.key, _shown(each.value), each.source] for each in values]
    say(table(["SETTING", "VALUE", "SOURCE"], rows))


@app.command("check")
def check(
    file: Annotated[str | None, typer.Argument(metavar="FILE", show_default=False)] = None,
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
) -> None:
    """Check a config file (default: the one in force) together with the environment."""
    from ollamamax_p2p.config import load

    loaded = load(flags=node_flags(data_dir=data_dir), file=Path(file) if file else None)
    checked = str(loaded.file) if loaded.file else None
    if as_json:
        say_json({"ok": True, "file": checked})
    else:
        say(f"{checked or 'no config file'}: ok")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(each)}" for key, each in value.items()) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value)

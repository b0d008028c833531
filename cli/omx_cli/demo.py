"""omx demo: three nodes on this machine, one real model."""

from pathlib import Path
from typing import Annotated

import typer

from omx_cli import options


def demo(
    model: Annotated[
        Path, typer.Option(help="A GGUF file, or a folder that holds one.", show_default=False)
    ],
    as_json: options.Json = False,
) -> int:
    """Start three nodes here, share a model among them, kill one halfway."""
    from rich.console import Console

    from omx_cli.running import run
    from omx_cli.three_nodes import DemoFailed, run_demo

    try:
        return run(lambda: run_demo(model, as_json=as_json, console=Console()))
    except* DemoFailed as failed:
        raise typer.BadParameter(str(failed.exceptions[0])) from None

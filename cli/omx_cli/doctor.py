"""omx doctor: what is wrong with this machine, and the mend."""

from typing import TYPE_CHECKING

from omx_cli import options
from omx_cli.options import node_flags
from omx_cli.output import say, say_json

if TYPE_CHECKING:
    from ollamamax_p2p import Finding

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "unknown": "?   "}


def doctor(
    data_dir: options.DataDir = None,
    models: options.Models = None,
    api: options.Api = None,
    listen: options.Listen = None,
    no_mdns: options.NoMdns = False,
    config: options.ConfigFile = None,
    as_json: options.Json = False,
) -> int:
    """Examine this machine; ends with 4 if something must be mended."""
    from ollamamax_p2p import examine_machine
    from omx_cli.running import idle_flags, load, refuse_without_effect, run, running_node

    flags = node_flags(data_dir=data_dir, models=models, api=api, listen=listen, no_mdns=no_mdns)
    settings = load(flags, config)

    async def work() -> "list[Finding]":
        if idle_flags(flags) and await running_node(settings) is not None:
            refuse_without_effect(flags, settings)
        return await examine_machine(
            data_dir=settings.data_dir,
            content=settings.content,
            host=settings.host,
            discovery=settings.discovery,
            origin=settings.origin,
            api=settings.api,
        )

    findings = run(work)
    if as_json:
        say_json({"findings": findings})
    else:
        for finding in findings:
            _say(finding)
    return 4 if any(finding.verdict == "fail" for finding in findings) else 0


def _say(finding: "Finding") -> None:
    say(f"{_MARKS[finding.verdict]}  {finding.check}: {finding.text}")
    if finding.mend:
        say(f"      → {finding.mend}")

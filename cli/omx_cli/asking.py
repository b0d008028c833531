"""One question to a model of the swarm, and what must be so before it can be asked."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from omx_cli.answer_view import AnswerView

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient

THINKING_EFFORTS = ("low", "medium", "high", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a model is asked and its answers are shown; what flags and `/set` say."""

    options: Mapping[str, Any] = field(default_factory=dict)
    format: str | Mapping[str, Any] = ""
    think: bool | str | None = None
    keep_alive: float | str | None = None
    verbose: bool = False
    hide_thinking: bool = False
    wrap: bool = True
    as_json: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """What every request has."""
        given = {
            "options": dict(self.options),
            "format": self.format,
            "think": self.think,
            "keep_alive": self.keep_alive,
        }
        return {"model": model} | {key: each for key, each in given.items() if each not in ("", {})}

    def view(self) -> AnswerView:
        """For one answer."""
        return AnswerView(
            wrap=self.wrap and not self.format,
            verbose=self.verbose,
            hide_thinking=self.hide_thinking,
            as_json=self.as_json,
        )

    def load_only(self) -> "Manner":
        """The same, to load the model and ask nothing."""
        return replace(self, format="", think=None)


async def ask(
    client: "LocalClient",
    kind: Literal["chat", "generate"],
    body: Mapping[str, Any],
    view: AnswerView,
) -> None:
    """Show an answer as it comes. Cancelling stops its engine; `view` has what came until then.

    Raises what the node says was wrong, in a group of one.
    """
    import trio

    try:
        async with client.connect() as requests, trio.open_nursery() as nursery:
            nursery.start_soon(view.keep_turning)
            async with requests.ask(kind, body) as frames:
                async for frame in frames:
                    view.show(frame)
            nursery.cancel_scope.cancel()
    finally:
        view.end()


async def capabilities_of(
    client: "LocalClient", model: str, *, insecure: bool, as_json: bool
) -> tuple[str, ...]:
    """What a model can do, () if it does not say; one that nobody in the swarm has is pulled first,
    with its progress shown. Raises BadInput for what is no name, and what a pull raises.
    """
    from ollamamax_p2p.errors import ModelNotFound
    from omx_cli.progress import open_view
    from omx_cli.running import WORK_TIMEOUT_S, in_time

    try:
        shown = await in_time(client, lambda: client.show_model(model), WORK_TIMEOUT_S)
    except ModelNotFound:
        found = await in_time(client, lambda: client.capabilities(model), WORK_TIMEOUT_S)
        if found is not None:  # an engine's, which shows no more of it
            return found
        async with open_view(as_json) as view:
            await client.pull(model, insecure=insecure, on_progress=view.show)
        shown = await in_time(client, lambda: client.show_model(model), WORK_TIMEOUT_S)
    return shown.capabilities


def only_embeds(capabilities: Sequence[str]) -> bool:
    """Whether a model gives vectors and no text."""
    return "embedding" in capabilities and "completion" not in capabilities


def refuse_pictures(model: str, paths: Sequence[str], capabilities: Sequence[str]) -> None:
    """Raises BadInput where pictures are given to a model that takes none, as far as it says."""
    from ollamamax_p2p.errors import BadInput

    if paths and capabilities and "vision" not in capabilities:
        names = " and ".join(paths)
        raise BadInput(f'"{model}" takes no pictures; leave {names} out, or ask another model')


def encoded(pictures: Sequence[bytes]) -> list[str]:
    """Pictures as a request carries them."""
    return [base64.b64encode(each).decode() for each in pictures]

"""`omx run` on a terminal: a conversation, and the commands that begin with a slash.

Each question is an event loop of its own; in between the main thread reads lines, so that Ctrl-C
ends what it is meant to end: an answer, a line, and only then the conversation.
"""

import os
import secrets
import shlex
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omx_cli.answer_view import dimmed
from omx_cli.asking import (
    THINKING_EFFORTS,
    Manner,
    ask,
    capabilities_of,
    encoded,
    only_embeds,
    refuse_pictures,
)
from omx_cli.line_reader import Ended, LineReader, unquoted
from omx_cli.output import fields, printable, say, tell
from omx_cli.pictures import illustrated

if TYPE_CHECKING:
    from ollamamax_p2p import LocalClient, ShowAnswer

T = TypeVar("T")

PARAMETERS: Mapping[str, tuple[type, str]] = {
    "temperature": (float, "how freely it chooses; 0: always the likeliest"),
    "top_k": (int, "choose among so many tokens"),
    "top_p": (float, "choose among the likeliest that together have this probability"),
    "min_p": (float, "leave out what is less likely than this part of the likeliest"),
    "typical_p": (float, "choose among what is as surprising as usual"),
    "seed": (int, "the same one gives the same answer"),
    "num_ctx": (int, "tokens of context"),
    "num_predict": (int, "tokens of an answer at most; -1: no limit"),
    "repeat_penalty": (float, "how much repetitions are avoided"),
    "repeat_last_n": (int, "how far back repetitions are looked for"),
    "presence_penalty": (float, "how much what was said already is avoided"),
    "frequency_penalty": (float, "the more, the oftener it was said"),
    "num_gpu": (int, "layers on the accelerator"),
    "num_thread": (int, "threads on processors"),
    "stop": (str, "end the answer before one of these texts; several may follow"),
}

HELP = """\
/set ...          change how it answers; /set alone lists what there is
/show ...         show what the model is; /show alone lists what there is
/load MODEL       go on with another model, from the beginning
/save NAME        make a model of this one, its settings and what was said
/list             list the models of this machine
/clear            forget what was said
/bye              leave; Ctrl-D too
/?, /help         this

Ctrl-C stops an answer. \"\"\" begins and ends a text of several lines.
Paths to PNG, JPEG or WebP pictures in a question are sent, where the model takes them."""

SET_HELP = """\
/set parameter NAME VALUE   alone: list them
/set system TEXT            what the model is told before everything
/set format json            answer in JSON; /set noformat ends it
/set think [low|medium|high|max]   think before answering; /set nothink does not
/set verbose                how long answers take; /set quiet hides it
/set wordwrap               break lines between words; /set nowordwrap does not
/set history                keep what is written for the arrow keys; /set nohistory does not"""

SHOW_HELP = """\
/show info        what it is
/show license     its license
/show modelfile   its Modelfile
/show parameters  its parameters, and what was set here
/show system      what it is told before everything
/show template    its template"""


@dataclass
class Conversation:
    """One run of `omx run MODEL`."""

    client: "LocalClient"
    model: str
    manner: Manner
    capabilities: tuple[str, ...]
    reader: LineReader
    insecure: bool = False
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    """By it the router knows the conversation again."""

    def run(self) -> None:
        """Until it is left. Raises Interrupted on SIGTERM."""
        hint = f"{printable(self.model)}: ask something; /? lists commands, /bye leaves"
        sys.stdout.write(dimmed(hint, sys.stdout) + "\n")
        self._try(self._load)
        while (line := self.reader.read()) is not Ended.LEFT:
            text = "" if isinstance(line, Ended) else line.strip()
            if text in ("/bye", "/exit"):
                return
            if text:
                self._take(text)

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in _COMMANDS:
            self._try(lambda: _COMMANDS[word](self, rest.strip()))
        elif line.startswith("/") and not _is_path(line):
            tell(f"there is no command {word[:40]}; /? lists them")
        else:
            self._try(lambda: self._ask(unquoted(line)))

    def _try(self, step: Callable[[], None]) -> None:
        """What goes wrong is told in one line, and the conversation goes on."""
        from ollamamax_p2p.errors import OmxError, first_named

        try:
            step()
        except (OmxError, ExceptionGroup) as error:
            named = first_named(error)
            if named is None:
                raise
            tell(f"Error: {named}")

    def _do(self, work: Callable[[], Awaitable[T]]) -> T | None:
        from omx_cli.running import run_until_interrupted

        return run_until_interrupted(work)

    # -- questions

    def _load(self) -> None:
        view = replace(self.manner, verbose=False).load_only().view()
        body = self._body() | {"messages": []}
        self._do(lambda: ask(self.client, "chat", body, view))

    def _body(self) -> dict[str, Any]:
        return self.manner.body(self.model) | {"omx": {"session": self.session}}

    def _ask(self, text: str) -> None:
        found = illustrated(text)
        refuse_pictures(self.model, found.paths, self.capabilities)
        for path in found.paths:
            tell(f"added {path}")
        message: dict[str, Any] = {"role": "user", "content": found.text}
        if found.pictures:
            message["images"] = encoded(found.pictures)
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = self._body() | {"messages": [*system, *self.messages, message]}
        view = self.manner.view()
        try:
            self._do(lambda: ask(self.client, "chat", body, view))
        finally:
            if view.text:  # also of an answer that was stopped: it is on the screen
                answered = {"role": "assistant", "content": view.text}
                self.messages += [message, answered]
        say()
        sys.stdout.flush()

    # -- commands

    def _help(self, rest: str) -> None:
        say({"set": SET_HELP, "show": SHOW_HELP}.get(rest.removeprefix("/"), HELP))

    def _clear(self, rest: str) -> None:
        self.messages.clear()
        self.session = secrets.token_hex(8)
        say("forgot what was said")

    def _load_other(self, rest: str) -> None:
        if not rest:
            say("/load MODEL")
            return
        found = self._do(
            lambda: capabilities_of(self.client, rest, insecure=self.insecure, as_json=False)
        )
        if found is None:
            return
        if only_embeds(found):
            tell(f'"{rest}" only gives vectors; `omx embed {rest}` asks for them')
            return
        before, self.model = self.model, rest
        try:
            self._load()
        except BaseException:
            self.model = before
            raise
        self.capabilities, self.system = found, ""
        self.messages.clear()

    def _save(self, rest: str) -> None:
        if not rest:
            say("/save NAME")
            return
        text = self._modelfile()
        made = self._do(lambda: self.client.create_model(rest, text, Path.cwd()))
        if made is not None:
            say(f"made {made.name}")
            if made.note:
                tell(f"Note: {made.note}")

    def _modelfile(self) -> str:
        lines = [f"FROM {self.model}"]
        if self.system:
            lines.append(f"SYSTEM {_quoted(self.system)}")
        for name, value in self.manner.options.items():
            values = value if isinstance(value, list) else [value]
            lines += [f"PARAMETER {name} {_parameter(each)}" for each in values]
        for message in self.messages:
            lines.append(f"MESSAGE {message['role']} {_quoted(message['content'])}")
        return "\n".join(lines) + "\n"

    def _list(self, rest: str) -> None:
        from omx_cli.model_commands import models_table

        found = self._do(self.client.models)
        if found is not None:
            say(models_table(found))

    def _set(self, rest: str) -> None:
        word, _, value = rest.partition(" ")
        value = value.strip()
        simple: dict[str, tuple[dict[str, Any], str]] = {
            "verbose": ({"verbose": True}, "tells how long answers take"),
            "quiet": ({"verbose": False}, "does not tell how long answers take"),
            "wordwrap": ({"wrap": True}, "breaks lines between words"),
            "nowordwrap": ({"wrap": False}, "breaks no lines"),
            "noformat": ({"format": ""}, "answers in any format"),
            "nothink": ({"think": False}, "answers without thinking"),
        }
        if word in simple:
            changes, told = simple[word]
            self.manner = replace(self.manner, **changes)
            say(told)
        elif word in ("history", "nohistory"):
            self.reader.keeps_history = word == "history"
            say("keeps what is written" if self.reader.keeps_history else "keeps nothing")
        elif word == "format" and value == "json":
            self.manner = replace(self.manner, format="json")
            say("answers in JSON")
        elif word == "think" and value in ("", *THINKING_EFFORTS):
            self.manner = replace(self.manner, think=value or True)
            say("thinks before it answers")
        elif word == "system" and value:
            self.system = unquoted(value)
            say("set the system message")
        elif word == "parameter":
            self._set_parameter(value)
        else:
            say(SET_HELP)

    def _set_parameter(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            say(fields([(name, why) for name, (_, why) in PARAMETERS.items()]))
            return
        parsed = parameter(name, value.strip())
        self.manner = replace(self.manner, options={**self.manner.options, name: parsed})
        say(f"set {name} to {value.strip()}")

    def _show(self, rest: str) -> None:
        from omx_cli.model_commands import shown_text

        if rest not in ("info", "license", "modelfile", "parameters", "system", "template"):
            say(SHOW_HELP)
            return
        shown = self._do(lambda: self.client.show_model(self.model))
        if shown is None:
            return
        if rest == "info":
            say(shown_text(self.model, shown))
        elif rest == "parameters":
            say(self._parameters_text(shown))
        elif rest == "system" and self.system:
            say(self.system)
        else:
            say(getattr(shown, rest).strip() or f"the model has no {rest}")

    def _parameters_text(self, shown: "ShowAnswer") -> str:
        parts = []
        if shown.parameters:
            parts.append("of the model:\n" + shown.parameters)
        if self.manner.options:
            own = [(name, str(value)) for name, value in self.manner.options.items()]
            parts.append("set here:\n" + fields(own, ""))
        return "\n\n".join(parts) or "the model has no parameters, and none is set here"


_COMMANDS: Mapping[str, Callable[[Conversation, str], None]] = {
    "/?": Conversation._help,
    "/help": Conversation._help,
    "/set": Conversation._set,
    "/show": Conversation._show,
    "/clear": Conversation._clear,
    "/load": Conversation._load_other,
    "/save": Conversation._save,
    "/list": Conversation._list,
}


def parameter(name: str, value: str) -> Any:
    """The value of a parameter as a request carries it. Raises BadInput."""
    from ollamamax_p2p.errors import BadInput

    if name not in PARAMETERS:
        raise BadInput(f"there is no parameter {name[:40]!r}; /set parameter lists them")
    kind, _ = PARAMETERS[name]
    if not value:
        raise BadInput(f"/set parameter {name} VALUE")
    if kind is str:
        try:
            return shlex.split(value)
        except ValueError as error:
            raise BadInput(f"{name}: {error}") from None
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise BadInput(f"{name} must be {what}, not {value[:40]!r}") from None


def _is_path(line: str) -> bool:
    """Whether a line that begins with a slash begins with a path, as a dropped picture does."""
    return bool(illustrated_paths(line)) or os.path.exists(line.split()[0])


def illustrated_paths(line: str) -> tuple[str, ...]:
    """Pictures that a line names; one that cannot be read is one too, and told when it is asked."""
    from ollamamax_p2p.errors import BadInput

    try:
        return illustrated(line).paths
    except BadInput:
        return (line,)


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _parameter(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)

"""Bodies of the store half of Ollama's API. As in Go: null is absent, other fields are ignored."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ollamamax_p2p.content import CreationRequest
from ollamamax_p2p.content.core.modelfile import Message
from ollamamax_p2p.errors import BadInput

MESSAGES_MAX = 100_000
FILES_MAX = 10_000
"""More than a model has; `CreationRequest` says how many those may be."""


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    pass


class ModelRequest(_Body, frozen=True):
    """Names a model, by the new field or by the old one."""

    model: str | None = None
    name: str | None = None

    @property
    def named(self) -> str:
        """What is named; "" for nothing."""
        return self.model or self.name or ""


class TransferRequest(ModelRequest, frozen=True):
    """pull and push. User and password are read and not used, as by Ollama."""

    insecure: bool | None = None
    username: str | None = None
    password: str | None = None
    stream: bool | None = None


class ShowRequest(ModelRequest, frozen=True):
    """show."""

    system: str | None = None
    template: str | None = None
    verbose: bool | None = None
    options: dict[str, Any] | None = None


class CopyRequest(_Body, frozen=True):
    """copy."""

    source: str | None = None
    destination: str | None = None


class MessageBody(_Body, frozen=True):
    """One message that a model begins with."""

    role: str | None = None
    content: str | None = None


Files = Annotated[dict[str, str | None], Meta(max_length=FILES_MAX)]


class CreateRequest(ModelRequest, frozen=True):
    """create."""

    stream: bool | None = None
    quantize: str | None = None
    quantization: str | None = None
    from_: str | None = msgspec.field(name="from", default=None)
    files: Files | None = None
    adapters: Files | None = None
    draft_files: Files | None = None
    draft_quantize: str | None = None
    template: str | None = None
    license: Any = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: Annotated[list[MessageBody], Meta(max_length=MESSAGES_MAX)] | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    remote_host: str | None = None
    info: dict[str, Any] | None = None

    def asked(self) -> CreationRequest:
        """What is asked for, in one shape. Raises BadInput."""
        if self.remote_host:
            raise BadInput("this node runs no remote models")
        return CreationRequest(
            origin=self.from_ or "",
            files=None if self.files is None else _digests(self.files),
            adapters=_digests(self.adapters or {}),
            draft_files=_digests(self.draft_files or {}),
            template=self.template or "",
            system=self.system or "",
            licenses=_licenses(self.license),
            parameters=self.parameters or {},
            messages=tuple(Message(m.role or "", m.content or "") for m in self.messages or ()),
            renderer=self.renderer or "",
            parser=self.parser or "",
            requires=self.requires or "",
            info=self.info or {},
            quantize=self.quantize or self.quantization or self.draft_quantize or "",
        )


def _digests(files: dict[str, str | None]) -> dict[str, str]:
    return {path: digest or "" for path, digest in files.items()}


def _licenses(given: Any) -> tuple[str, ...]:
    """One text, or several; an empty one is none."""
    if given is None or isinstance(given, str):
        return (given,) if given else ()
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        return tuple(given)
    raise BadInput("license must be a string or an array of strings")

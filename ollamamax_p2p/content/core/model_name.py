"""Model names by Ollama's grammar: `[scheme://][host/][namespace/]model[:tag]`."""

import re
from dataclasses import dataclass

from ollamamax_p2p.errors import BadName

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

HOST_CHARS_MAX = 350
PART_CHARS_MAX = 80
_TEXT_CHARS_MAX = len("https://") + HOST_CHARS_MAX + 3 * PART_CHARS_MAX + 3

# The first character can be neither "." nor "-", so no part is ever "..", hidden, or an option.
_RULES = {
    "host": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*"), HOST_CHARS_MAX, "_ - . :"),
    "namespace": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*"), PART_CHARS_MAX, "_ -"),
    "model": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*"), PART_CHARS_MAX, "_ - ."),
    "tag": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*"), PART_CHARS_MAX, "_ - ."),
}


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """A whole, valid name, safe to join to a path. Made by `parse_model_name`, or from four parts
    that are checked as strictly (BadName).

    Case is kept, as Ollama keeps it; `matches` is how names are compared.
    """

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        for kind, part in zip(_RULES, self.parts, strict=True):
            _check(kind, part, "/".join(self.parts))

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model, tag: also the path of its manifest below `manifests/`."""
        return (self.host, self.namespace, self.model, self.tag)

    def matches(self, other: "ModelName") -> bool:
        """Whether both name the same model: upper and lower case are the same."""
        return self.key == other.key

    @property
    def key(self) -> str:
        """The same for every spelling of a name; for dictionaries."""
        return self.full().lower()

    def full(self) -> str:
        """`host/namespace/model:tag`, nothing left out."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def __str__(self) -> str:
        """The shortest form that Ollama shows: without the default host and namespace, always with
        the tag.
        """
        short = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{short}"
        return short if self.namespace.lower() == DEFAULT_NAMESPACE else f"{self.namespace}/{short}"


def parse_model_name(text: str) -> ModelName:
    """Read a name as Ollama reads it and fill in what is left out.

    The scheme (http or https) is checked and dropped; which of the two a registry speaks is a
    setting, not a part of the name. Raises BadName, saying which rule is broken.
    """
    if len(text) > _TEXT_CHARS_MAX:
        raise BadName(text, f"longer than {_TEXT_CHARS_MAX} characters")
    if not text:
        raise BadName(text, "it is empty")
    rest, tag = _split_tag(text)
    rest, slash, model = rest.rpartition("/")
    if not slash:
        return _named(text, None, None, model, tag)
    rest, slash, namespace = rest.rpartition("/")
    if not slash:
        return _named(text, None, namespace, model, tag)
    return _named(text, _without_scheme(rest, text), namespace, model, tag)


def _split_tag(text: str) -> tuple[str, str | None]:
    """A colon begins the tag only behind the last slash; before it, it belongs to a host's port."""
    if text.rfind(":") > text.rfind("/"):
        rest, _, tag = text.rpartition(":")
        return rest, tag
    return text, None


def _without_scheme(host: str, text: str) -> str:
    scheme, marker, rest = host.partition("://")
    if not marker:
        return host
    if scheme not in ("http", "https"):
        raise BadName(text, f"unknown scheme {scheme!r}; it may be http or https")
    return rest


def _named(
    text: str, host: str | None, namespace: str | None, model: str, tag: str | None
) -> ModelName:
    """None is left out and filled in; an empty part was promised by its separator and is wrong."""
    parts = (
        DEFAULT_HOST if host is None else host,
        DEFAULT_NAMESPACE if namespace is None else namespace,
        model,
        DEFAULT_TAG if tag is None else tag,
    )
    for kind, part in zip(_RULES, parts, strict=True):
        _check(kind, part, text)
    return ModelName(*parts)


def _check(kind: str, part: str, text: str) -> None:
    pattern, limit, signs = _RULES[kind]
    if not part:
        raise BadName(text, f"its {kind} is empty")
    if len(part) > limit:
        raise BadName(text, f"its {kind} is longer than {limit} characters")
    if pattern.fullmatch(part) is None:
        raise BadName(
            text, f"its {kind} may have letters, digits and {signs}, and begins with none but _"
        )

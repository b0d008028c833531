"""Request bodies, field for field, and how they are read: bounded, typed, nothing unknown."""

from typing import Annotated, TypeVar

import msgspec
import trio
from starlette.requests import Request

from ollamamax_p2p.cluster import RoleWish
from ollamamax_p2p.errors import BadInput

BODY_BYTES_MAX = 4 * 1024 * 1024
"""The largest is a Modelfile with several licences in it; those have some 100 kB each."""

BODY_TIMEOUT_S = 30.0
"""A body comes from this machine: one that is not there by then is not coming."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]

T = TypeVar("T")


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModelBody(_Body, frozen=True):
    """Names one model."""

    model: Name


class DrainBody(_Body, frozen=True):
    """Which node begins no new answers, or begins again."""

    node: Name
    draining: bool


class CopyBody(_Body, frozen=True):
    """Gives a model a second name."""

    source: Name
    destination: Name


class PullBody(_Body, frozen=True):
    """Asks for a model."""

    model: Name
    from_origin: bool = False
    insecure: bool = False


class PushBody(_Body, frozen=True):
    """Gives a model to its registry."""

    model: Name
    insecure: bool = False


class ImportBody(_Body, frozen=True):
    """Makes a file a model."""

    path: PathText
    """Absolute: the node's working folder is not the client's."""
    model: Name


class CreateBody(_Body, frozen=True):
    """Makes a model from a Modelfile."""

    model: Name
    modelfile: str
    base_dir: PathText
    """Absolute; relative paths in the Modelfile count from here."""


class InviteBody(_Body, frozen=True):
    """Asks for a ticket."""

    uses: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    expires_s: Annotated[float, msgspec.Meta(ge=1, le=366 * 86_400)] = 86_400.0


class JoinBody(_Body, frozen=True):
    """Says where to join."""

    to: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=16_384)], ...],
        msgspec.Meta(min_length=1, max_length=64),
    ]
    """A ticket, or multiaddrs."""


class MemberBody(_Body, frozen=True):
    """Names one member of the cluster."""

    peer: Name
    """Its peer id, its name, or a beginning of either that fits one member only."""


class RoleBody(_Body, frozen=True):
    """Says what a member shall be."""

    peer: Name
    role: RoleWish


class RotateKeyBody(_Body, frozen=True):
    """Asks for a new swarm key."""

    force: bool = False
    """Also if some members cannot be reached now, and will need a new ticket."""


class ClusterSettingBody(_Body, frozen=True):
    """Changes a setting that the whole cluster shares."""

    key: Name
    value: Name
    """As a person writes it: `5`, `true`."""


class BodyTooLarge(Exception):
    """More than BODY_BYTES_MAX; answered by 413."""


async def read_body(request: Request, wanted: type[T]) -> T:
    """The request's JSON as a typed value. Raises BadInput or BodyTooLarge."""
    raw = await _read_bytes(request)
    if not raw.strip():
        raise BadInput("missing request body")
    try:
        return msgspec.json.decode(raw, type=wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"request body: {error}") from None


async def _read_bytes(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > BODY_BYTES_MAX:
        raise BodyTooLarge
    raw = bytearray()
    with trio.move_on_after(BODY_TIMEOUT_S) as scope:
        async for part in request.stream():
            raw += part
            if len(raw) > BODY_BYTES_MAX:
                raise BodyTooLarge
    if scope.cancelled_caught:
        raise BadInput(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s")
    return bytes(raw)

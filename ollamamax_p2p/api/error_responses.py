"""Error class -> HTTP status and body, one table."""

import logging
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from ollamamax_p2p import errors
from ollamamax_p2p.errors import OmxError

_log = logging.getLogger(__name__)

STATUS: Mapping[type[OmxError], int] = {
    errors.OmxError: 500,
    errors.BadInput: 400,
    errors.NotFound: 404,
    errors.LocalTrouble: 500,
    errors.StoreFull: 507,
    errors.StoreReadOnly: 409,
    errors.DataDirInUse: 409,
    errors.NetworkTrouble: 502,
    errors.DeadlineExceeded: 504,
    errors.PeerMisbehaved: 502,
    errors.DigestMismatch: 502,
}
"""A class that is not listed has the status of the nearest one above it in the tree."""

INTERNAL_ERROR = "internal_error"
"""The code of a fault of ours; the log has the traceback."""


def status_of(error: type[OmxError] | OmxError) -> int:
    """The HTTP status that tells this error."""
    cls = error if isinstance(error, type) else type(error)
    return next(STATUS[each] for each in cls.__mro__ if each in STATUS)


class ErrorBody(msgspec.Struct, frozen=True):
    """`{"error": …, "code": …}`: every answer that is not a success, also as a stream's last
    line.
    """

    error: str
    code: str


def body_of(error: BaseException) -> ErrorBody:
    """What a client is told. What is not ours to name is logged, and told without its text."""
    named = errors.first_named(error)
    if named is not None:
        return ErrorBody(str(named), errors.code(named))
    _log.error("a request failed unexpectedly", exc_info=error)
    problem = f"{type(error).__name__}; this is a fault of omx, its log has the details"
    return ErrorBody(f"internal error: {problem}", INTERNAL_ERROR)


def error_response(error: BaseException) -> Response:
    """The whole answer for an error."""
    named = errors.first_named(error)
    return plain_error(status_of(named) if named else 500, body_of(error))


def plain_error(status: int, body: ErrorBody) -> Response:
    """An answer with this status and body."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")

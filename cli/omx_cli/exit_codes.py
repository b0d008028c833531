"""Error class -> exit code, one table.

| code | meaning |
|---|---|
| 0 | done |
| 1 | unexpected; a fault of omx |
| 2 | bad input: arguments, settings, names, tickets, model files |
| 3 | not found |
| 4 | this machine needs mending: disk, permissions, ports, no node running |
| 5 | the network, a peer or a registry did not do its part; try again |
| 6 | a peer misbehaved, or bytes are not what their name says |
| 130 | interrupted by Ctrl-C |
"""

from ollamamax_p2p import errors

UNEXPECTED = 1
USAGE = 2
LOCAL = 4
INTERRUPTED = 130

EXIT_CODES: dict[type[errors.OmxError], int] = {
    errors.OmxError: UNEXPECTED,
    errors.BadInput: USAGE,
    errors.NotFound: 3,
    errors.LocalTrouble: LOCAL,
    errors.NetworkTrouble: 5,
    errors.PeerMisbehaved: 6,
    errors.DigestMismatch: 6,
}
"""A class that is not listed has the code of the nearest one above it in the tree."""


def exit_code(error: type[errors.OmxError] | errors.OmxError) -> int:
    """How a command ends that fails with this error."""
    cls = error if isinstance(error, type) else type(error)
    return next(EXIT_CODES[each] for each in cls.__mro__ if each in EXIT_CODES)

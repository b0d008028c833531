"""Every error the library raises, as one tree.

    OmxError
    ├── BadInput                     the caller's fault; nothing was started
    │   ├── BadConfig                a setting: file, environment or flag
    │   ├── BadName                  not a model name
    │   ├── BadDigest                not a sha256 digest
    │   ├── BadPeerId                not a peer id
    │   ├── BadAddress               not a multiaddr that can be dialled
    │   ├── BadModelFile             not a readable GGUF, safetensors or Modelfile
    │   ├── BadRequest               an engine does not take a request as it is
    │   │   └── ContextExceeded      it is longer than the model's context
    │   ├── NotSupported             a model cannot do what is asked of it
    │   └── BadTicket                a ticket that will not be honoured
    │       ├── TicketMistyped       its checksum or shape is wrong
    │       ├── TicketExpired        its time is over
    │       ├── TicketUsedUp         it has been redeemed as often as it may
    │       └── TicketUnknown        its issuer never issued it, or withdrew it
    ├── NotFound
    │   ├── ModelNotFound            no manifest of that name
    │   ├── BlobNotFound             no blob of that digest
    │   ├── PeerNotFound             no address is known for that peer
    │   └── HistoryGone              commands that are no longer kept one by one
    ├── LocalTrouble                 this machine must be mended first
    │   ├── StoreFull                not enough room on the disk
    │   ├── StoreReadOnly            the model store cannot be written
    │   ├── StoreDamaged             what is on disk is not what was written
    │   │   └── LogDamaged           an acknowledged part of the Raft log cannot be read
    │   ├── LogSyncFailed            the disk lost a write; the process must end
    │   ├── AccessRefused            the operating system said no to a path
    │   ├── KeyExposed               a secret file that others can read
    │   ├── PortInUse                an address that another program holds
    │   ├── DataDirInUse             another node runs on the same data folder
    │   └── NodeNotRunning           no node answers on this machine
    ├── NetworkTrouble               may work when tried again
    │   ├── PeerUnreachable          no address of a peer answered
    │   ├── PeerGone                 the connection ended or fell silent
    │   ├── NotAdmitted              the peer does not take us for a member
    │   ├── SwarmChanging            this node is between two swarms, or two keys of one
    │   ├── DeadlineExceeded         it took longer than it was given
    │   ├── NoSources                nobody who can be reached holds the rest
    │   ├── NotLeader                another replica leads, or none is known
    │   ├── QuorumLost               too few voters answer to agree on anything
    │   ├── ProposalDropped          a command was not taken, and is not in the log
    │   ├── OutcomeUnknown           a command may have been applied, or may yet be
    │   ├── BackendUnavailable       an engine does not answer, or ended meanwhile
    │   ├── BackendFailed            an engine answered with a fault of its own
    │   ├── CannotResume             nobody can go on with an answer that broke off
    │   ├── QueueFull                too many requests wait already
    │   ├── NoCandidate              no node that could answer can be reached now
    │   └── OriginTrouble            a registry could not be used
    │       ├── OriginUnavailable    it did not answer, or not sensibly
    │       └── OriginRefused        it answered no
    ├── PeerMisbehaved               a peer broke the protocol; it is named
    │   ├── MalformedMessage         bytes that are not one of the protocol's messages
    │   ├── FrameTooLarge            a frame longer than the protocol allows
    │   ├── WrongChunk               bytes that do not match the chunk map
    │   └── WrongMap                 a chunk map that does not match its blob
    └── DigestMismatch               bytes that are not what their name says

Each carries the facts as attributes; `str()` is one line: what, where, what to do. `code()` gives
the stable snake_case name by which the HTTP API and the CLI know the class.
"""

import re

_TICKET = re.compile(r"omx1[a-z2-7]{20,}", re.IGNORECASE)
# A ticket is as secret as a password, and errors are logged, pasted and sent over the API.


class OmxError(Exception):
    """Something this library names; never raised itself."""

    def __str__(self) -> str:
        """One line, whatever the facts contain."""
        return _TICKET.sub("omx1…", " ".join(super().__str__().split()))


def code(error: type[OmxError] | OmxError) -> str:
    """The stable name of an error class, as the API and `--json` print it: `ticket_expired`."""
    name = error.__name__ if isinstance(error, type) else type(error).__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def by_code(name: str) -> type[OmxError] | None:
    """The class that `code` names, or None if this version knows no such class."""
    return {code(cls): cls for cls in _all_below(OmxError)}.get(name)


def restored(name: str, message: str) -> OmxError:
    """An error that crossed the HTTP API, as its class again; an unknown name gives a plain
    OmxError.

    Only the message survives the crossing, not the attributes.
    """
    cls = by_code(name) or OmxError
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    return error


def first_named(error: BaseException) -> OmxError | None:
    """The OmxError that an exception is or, for a group, that comes first in it; for borders, which
    tell one error. None if there is none.
    """
    if isinstance(error, BaseExceptionGroup):
        found = (first_named(each) for each in error.exceptions)
        return next((each for each in found if each is not None), None)
    return error if isinstance(error, OmxError) else None


def looks_like_ticket(text: str) -> bool:
    """Whether a text is, or may have been meant as, a ticket; it must not be shown then."""
    return re.sub(r"[^0-9A-Za-z]", "", text).lower().startswith("omx1")


def _all_below(cls: type[OmxError]) -> list[type[OmxError]]:
    below = cls.__subclasses__()
    return below + [deeper for child in below for deeper in _all_below(child)]


# -- the caller's fault ------------------------------------------------------------------------


class BadInput(OmxError):
    """Something given to us cannot be used; nothing was started."""


class BadConfig(BadInput):
    """A setting cannot be used."""

    def __init__(self, where: str, problem: str) -> None:
        """where: the file, variable or flag; problem: what is wrong and what to write instead."""
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class BadName(BadInput):
    """A string is not a model name."""

    def __init__(self, text: str, problem: str) -> None:
        """text: what was given; problem: which rule it breaks."""
        super().__init__(f"invalid model name {_shown(text)}: {problem}")
        self.text = text


class BadDigest(BadInput):
    """A string is not a sha256 digest."""

    def __init__(self, text: str) -> None:
        """text: what was given."""
        super().__init__(f"invalid digest {_shown(text)}: expected sha256:<64 hex digits>")
        self.text = text


class BadPeerId(BadInput):
    """A string is not the id of an Ed25519 peer."""

    def __init__(self, text: str) -> None:
        """text: what was given."""
        super().__init__(f"invalid peer id {_shown(text)}: expected one that starts with 12D3KooW")
        self.text = text


class BadAddress(BadInput):
    """A string is not a multiaddr that can be dialled."""

    def __init__(self, text: str, problem: str) -> None:
        """text: what was given; problem: what is wrong with it."""
        super().__init__(f"invalid address {_shown(text)}: {problem}")
        self.text = text


class BadModelFile(BadInput):
    """A file is not a model that can be read."""

    def __init__(self, where: str, problem: str) -> None:
        """where: path and, if known, byte offset or line; problem: what is wrong."""
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class BadRequest(BadInput):
    """An engine, or the router before it, does not take a request as it is."""


class ContextExceeded(BadRequest):
    """What is given is longer than the model's context."""

    def __init__(self) -> None:
        """Nothing else is to be told; the words are Ollama's."""
        super().__init__("the input length exceeds the context length")


class NotSupported(BadInput):
    """A model cannot do what is asked of it."""

    def __init__(self, model: str, what: str) -> None:
        """model: as the user wrote it; what: the capability, "chat"; the words are Ollama's."""
        super().__init__(f'"{model}" does not support {what}')
        self.model, self.what = model, what


class BadTicket(BadInput):
    """A ticket will not be honoured."""


class TicketMistyped(BadTicket):
    """A ticket's shape or checksum is wrong."""

    def __init__(self, problem: str) -> None:
        """problem: what about it is wrong."""
        super().__init__(f"this is not a whole ticket: {problem}; copy it again from `omx invite`")


class TicketExpired(BadTicket):
    """A ticket's time is over."""

    def __init__(self, expired_at: str) -> None:
        """expired_at: when, as ISO 8601 in UTC."""
        super().__init__(f"the ticket expired at {expired_at}; ask for a new one (`omx invite`)")
        self.expired_at = expired_at


class TicketUsedUp(BadTicket):
    """A ticket has been redeemed as often as it may."""

    def __init__(self, uses: int) -> None:
        """uses: how often it could be redeemed."""
        super().__init__(
            f"the ticket has been used {uses} of {uses} times; ask for a new one (`omx invite`)"
        )
        self.uses = uses


class TicketUnknown(BadTicket):
    """The node that was asked never issued this ticket, or has withdrawn it."""

    def __init__(self) -> None:
        super().__init__(
            "the ticket is not known to the node that was asked: "
            "it was withdrawn, or belongs to another swarm; ask for a new one (`omx invite`)"
        )


# -- not there ---------------------------------------------------------------------------------


class NotFound(OmxError):
    """What was asked for is not there."""


class ModelNotFound(NotFound):
    """No manifest has that name."""

    def __init__(self, name: str) -> None:
        """name: the model as the user wrote it."""
        super().__init__(f"model '{name}' not found")
        self.name = name


class BlobNotFound(NotFound):
    """No blob has that digest."""

    def __init__(self, digest: str) -> None:
        """digest: sha256:<hex>."""
        super().__init__(f"blob {digest} is not in the store")
        self.digest = digest


class PeerNotFound(NotFound):
    """No address is known for a peer."""

    def __init__(self, peer: str) -> None:
        """peer: its id."""
        super().__init__(f"no address is known for peer {peer}")
        self.peer = peer


class HistoryGone(NotFound):
    """Commands that somebody wants to follow are no longer kept one by one."""

    def __init__(self, index: int, first: int) -> None:
        """index: the one wanted; first: the first that is kept."""
        super().__init__(
            f"the commands from {index} on are not kept, the first is {first}; "
            "read the state and follow from there"
        )
        self.index, self.first = index, first


# -- this machine ------------------------------------------------------------------------------


class LocalTrouble(OmxError):
    """This machine must be mended before it can work."""


class StoreFull(LocalTrouble):
    """There is not enough room on the disk."""

    def __init__(self, path: str, needed: int, free: int) -> None:
        """path: the store's folder; needed, free: bytes."""
        super().__init__(
            f"not enough room in {path}: {needed:,} bytes are needed, {free:,} are free; "
            "free some space and run the same command again, it resumes"
        )
        self.path, self.needed, self.free = path, needed, free


class StoreReadOnly(LocalTrouble):
    """The model store cannot be written."""

    def __init__(self, path: str) -> None:
        """path: the store's folder."""
        super().__init__(
            f"the model store {path} is read-only; give another with --models, or make it writable"
        )
        self.path = path


class StoreDamaged(LocalTrouble):
    """What is on disk is not what was written there."""

    def __init__(self, path: str, problem: str) -> None:
        """path: the file; problem: what is wrong with it and what to do."""
        super().__init__(f"{path}: {problem}")
        self.path = path


class LogDamaged(StoreDamaged):
    """Something that was acknowledged cannot be read back from the Raft log; it is never cut off.

    The runbook is docs/runbooks/damaged-wal.md.
    """


class LogSyncFailed(LocalTrouble):
    """A write could not be made durable, and nobody knows how much of it was.

    Never tried again: after a failed fsync the system may call lost pages clean. The process ends,
    and reads back at its next start what is really there.
    """

    def __init__(self, path: str, problem: str) -> None:
        """path: the file; problem: what the operating system said."""
        super().__init__(f"cannot make {path} durable: {problem}; check the disk, then start again")
        self.path = path


class AccessRefused(LocalTrouble):
    """The operating system refused access to a path."""

    def __init__(self, path: str, doing: str) -> None:
        """path: the file or folder; doing: what was tried, as a verb: "write"."""
        super().__init__(f"cannot {doing} {path}: permission denied; check its owner and mode")
        self.path = path


class KeyExposed(LocalTrouble):
    """A secret file can be read by other users."""

    def __init__(self, path: str, mode: int) -> None:
        """path: the file; mode: its permission bits."""
        super().__init__(
            f"{path} can be read by other users (mode {mode:04o}); run: chmod 600 '{path}'"
        )
        self.path, self.mode = path, mode


class PortInUse(LocalTrouble):
    """Another program holds an address that we are to listen on."""

    def __init__(self, address: str, setting: str) -> None:
        """address: host:port or multiaddr; setting: the flag that changes it, e.g. "--api"."""
        super().__init__(
            f"{address} is already in use by another program; "
            f"stop it or choose another with {setting}"
        )
        self.address = address


class DataDirInUse(LocalTrouble):
    """Another node runs on the same data folder."""

    def __init__(self, path: str, pid: int | None) -> None:
        """path: the folder; pid: the other process, if known."""
        who = f" (process {pid})" if pid else ""
        super().__init__(
            f"a node already runs on {path}{who}; stop it (`omx stop`) or give another --data-dir"
        )
        self.path, self.pid = path, pid


class NodeNotRunning(LocalTrouble):
    """No node answers on this machine."""

    def __init__(self, where: str) -> None:
        """where: the data folder or API address that was tried."""
        super().__init__(f"no node is running on {where}; start one with `omx up`")


# -- the network -------------------------------------------------------------------------------


class NetworkTrouble(OmxError):
    """The network or the other side failed; the same may work when tried again."""


class PeerUnreachable(NetworkTrouble):
    """No address of a peer answered as it should."""

    def __init__(self, peer: str, problem: str) -> None:
        """peer: its id or address; problem: what happened."""
        super().__init__(f"cannot reach {peer}: {problem}")
        self.peer, self.problem = peer, problem


class PeerGone(NetworkTrouble):
    """A connection ended or fell silent."""

    def __init__(self, peer: str, problem: str = "the connection ended") -> None:
        """peer: its id; problem: what happened."""
        super().__init__(f"lost peer {peer}: {problem}")
        self.peer = peer


class NotAdmitted(NetworkTrouble):
    """A peer does not take us for a member of its swarm."""

    def __init__(self, peer: str, problem: str) -> None:
        """peer: its id; problem: its reason."""
        super().__init__(
            f"peer {peer} does not admit this node: {problem}; join with a ticket (`omx join`)"
        )
        self.peer = peer


class SwarmChanging(NetworkTrouble):
    """This node is in no swarm for the moment."""

    def __init__(self) -> None:
        """Nothing else is to be told."""
        super().__init__(
            "this node is just joining or leaving a swarm, or changing its key; try again"
        )


class DeadlineExceeded(NetworkTrouble):
    """Something took longer than it was given."""

    def __init__(self, what: str, seconds: float) -> None:
        """what: what was waited for; seconds: how long it was given."""
        super().__init__(f"{what} did not finish within {seconds:g} s")


class NoSources(NetworkTrouble):
    """Nobody who can be reached holds what is missing."""

    def __init__(self, what: str, problem: str) -> None:
        """what: model or blob; problem: who was asked, and that what is there is kept."""
        super().__init__(f"no source for {what}: {problem}")
        self.what = what


class NotLeader(NetworkTrouble):
    """Only the leader can do this, and it is another replica, or none is known."""

    def __init__(self, leader: str) -> None:
        """leader: who leads, as far as is known; "" if nobody is known to."""
        where = f"{leader} is" if leader else "none is known now, try again in a second"
        super().__init__(f"this node does not lead the cluster; {where}")
        self.leader = leader


class QuorumLost(NetworkTrouble):
    """Too few voters answer, so that nothing can be agreed on."""

    def __init__(self, problem: str) -> None:
        """problem: how many of how many voters answer, as far as is known."""
        super().__init__(
            f"the cluster cannot agree on anything now: {problem}; start the missing voters, "
            "or see `omx cluster status`"
        )


class ProposalDropped(NetworkTrouble):
    """A command was not taken: it is not in the log and will not be, so it may be tried again."""

    def __init__(self, reason: str) -> None:
        """reason: what it met."""
        super().__init__(f"the command was not taken: {reason}; nothing has changed, try again")


class OutcomeUnknown(NetworkTrouble):
    """A command may have been applied, may yet be, or may be lost: look before trying again."""

    def __init__(self, reason: str) -> None:
        """reason: why nobody knows."""
        super().__init__(
            f"nobody knows whether the command takes effect: {reason}; look, then try again"
        )
        self.reason = reason


class BackendUnavailable(NetworkTrouble):
    """An engine does not answer, or ended meanwhile."""

    def __init__(self, backend: str, problem: str) -> None:
        """backend: its name; problem: what happened, and what to do."""
        super().__init__(f"back end {backend} is not available: {problem}")
        self.backend = backend


class BackendFailed(NetworkTrouble):
    """An engine answered with a fault of its own."""

    def __init__(self, backend: str, problem: str) -> None:
        """backend: its name; problem: what it said."""
        super().__init__(f"back end {backend} failed: {problem}")
        self.backend = backend


class CannotResume(NetworkTrouble):
    """An answer broke off midway and nobody can go on with it."""

    def __init__(self, problem: str) -> None:
        """problem: what broke it off, and why nobody can."""
        super().__init__(f"the answer broke off: {problem}; ask again")


class QueueFull(NetworkTrouble):
    """Too many requests wait already."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        """limit: how many may wait; retry_after_s: when to try again."""
        super().__init__(
            f"{limit} requests are waiting already; try again in {retry_after_s:.0f} s"
        )
        self.limit, self.retry_after_s = limit, retry_after_s


class NoCandidate(NetworkTrouble):
    """The model is known, but no node that could answer can be reached now."""

    def __init__(self, model: str, problem: str) -> None:
        """model: as the user wrote it; problem: what is wrong with those that hold it."""
        super().__init__(f"nobody can answer for '{model}' now: {problem}")
        self.model = model


class OriginTrouble(NetworkTrouble):
    """A registry could not be used."""


class OriginUnavailable(OriginTrouble):
    """A registry did not answer, or not sensibly."""

    def __init__(self, url: str, problem: str) -> None:
        """url: what was asked, without credentials; problem: what happened."""
        super().__init__(f"{url}: {problem}")
        self.url = url


class OriginRefused(OriginTrouble):
    """A registry answered no."""

    def __init__(self, url: str, problem: str, status: int | None = None) -> None:
        """url: what was asked, without credentials; problem: why; status: of HTTP, if any."""
        super().__init__(f"{url}: {problem}")
        self.url, self.status = url, status


# -- a peer's fault ----------------------------------------------------------------------------


class PeerMisbehaved(OmxError):
    """A peer broke the protocol."""

    def __init__(self, peer: str, problem: str) -> None:
        """peer: its id, or "" where the decoder does not know it yet; problem: what it did."""
        super().__init__(f"peer {peer} misbehaved: {problem}" if peer else problem)
        self.peer, self.problem = peer, problem


class MalformedMessage(PeerMisbehaved):
    """Bytes are not one of the protocol's messages."""


class FrameTooLarge(PeerMisbehaved):
    """A frame is longer than the protocol allows."""


class WrongChunk(PeerMisbehaved):
    """Bytes do not match the chunk map."""


class WrongMap(PeerMisbehaved):
    """A chunk map does not match its blob."""


class DigestMismatch(OmxError):
    """Bytes are not what their name says."""

    def __init__(self, expected: str, actual: str) -> None:
        """expected, actual: sha256:<hex>."""
        super().__init__(f"digest mismatch: expected {expected}, got {actual}")
        self.expected, self.actual = expected, actual


def _shown(text: str, limit: int = 80) -> str:
    """Outside text, quoted, on one line and not longer than a line; a ticket is not repeated."""
    if looks_like_ticket(text):
        return "(a ticket, not shown)"
    return repr(text if len(text) <= limit else text[:limit] + "…")

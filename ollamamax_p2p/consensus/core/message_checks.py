"""What can be seen of a message alone to be wrong, whoever gets it."""

from ollamamax_p2p.consensus.core.config_change import as_v2, decode_conf_change
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    NOBODY,
    ConfChangeV2,
    EntryType,
    Message,
    MessageType,
)
from ollamamax_p2p.consensus.core.step_errors import MalformedStep

NUMBER_MAX = 2**63
"""Terms and indexes are below this; a log that long would take longer to write than there is."""

LOCAL_SENDERS = frozenset({LOCAL_APPEND_THREAD, LOCAL_APPLY_THREAD})

LOCAL_TYPES = frozenset(
    {
        MessageType.HUP,
        MessageType.BEAT,
        MessageType.UNREACHABLE,
        MessageType.SNAP_STATUS,
        MessageType.CHECK_QUORUM,
        MessageType.STORAGE_APPEND,
        MessageType.STORAGE_APPEND_RESP,
        MessageType.STORAGE_APPLY,
        MessageType.STORAGE_APPLY_RESP,
        MessageType.FORGET_LEADER,
    }
)
"""Only the node itself may say these to itself."""

ANSWER_TYPES = frozenset(
    {
        MessageType.APP_RESP,
        MessageType.VOTE_RESP,
        MessageType.HEARTBEAT_RESP,
        MessageType.UNREACHABLE,
        MessageType.READ_INDEX_RESP,
        MessageType.PRE_VOTE_RESP,
        MessageType.STORAGE_APPEND_RESP,
        MessageType.STORAGE_APPLY_RESP,
    }
)
"""Only a member is asked anything."""

_TERM_OPTIONAL = LOCAL_TYPES | {
    MessageType.PROP,
    MessageType.READ_INDEX,
    MessageType.TRANSFER_LEADER,
}


def refuse_malformed(message: Message, *, own_id: int) -> None:
    """Raises MalformedStep if no correct node sends this."""
    problem = _problem(message)
    if problem:
        raise MalformedStep(message.from_ or own_id, problem)


def _problem(message: Message) -> str:
    kind = message.type
    term, log_term, index, commit = message.term, message.log_term, message.index, message.commit
    if not (0 <= term < NUMBER_MAX and 0 <= log_term < NUMBER_MAX):
        return "a term that is out of bounds"
    if not (
        0 <= index < NUMBER_MAX
        and 0 <= commit < NUMBER_MAX
        and 0 <= message.reject_hint < NUMBER_MAX
    ):
        return "an index that is out of bounds"
    if kind is MessageType.APP:
        return _problem_with_append(message)
    if kind is MessageType.PROP:
        return _problem_with_proposal(message)
    if kind is MessageType.READ_INDEX or kind is MessageType.READ_INDEX_RESP:
        if len(message.entries) != 1:
            return f"a read of {len(message.entries)} contexts"
        if kind is MessageType.READ_INDEX:
            return "a read with a term" if term else ""
    if not term and kind not in _TERM_OPTIONAL:
        return f"a {kind.name} without a term"
    if kind is MessageType.SNAP:
        return _problem_with_snapshot(message)
    return ""


def _problem_with_append(message: Message) -> str:
    if not message.term:
        return "an append without a term"
    before, following = message.log_term, message.index + 1
    for entry in message.entries:
        if entry.index != following:
            return f"entry {entry.index} where {following} follows"
        if entry.term < before:
            return f"entry {entry.index}, of term {entry.term} behind one of term {before}"
        before = entry.term
        following += 1
    if following > NUMBER_MAX:
        return "an index that is out of bounds"
    if before > message.term:
        return f"an entry of term {before} in a message of term {message.term}"
    return ""


def _problem_with_proposal(message: Message) -> str:
    if message.term:
        return "a proposal with a term"
    if not message.entries:
        return "a proposal of nothing"
    for entry in message.entries:
        if entry.type is not EntryType.NORMAL:
            try:
                change = as_v2(decode_conf_change(entry))
            except ValueError as error:
                return f"a change of the configuration that cannot be read: {error}"
            if not names_nodes(change):
                return "a change of a node that cannot be"
    return ""


def names_nodes(change: ConfChangeV2) -> bool:
    """Whether all ids in a change can be a node's; NOBODY's change changes nothing."""
    return all(NOBODY <= each.node_id < LOCAL_APPLY_THREAD for each in change.changes)


def _problem_with_snapshot(message: Message) -> str:
    if message.snapshot is None:
        return "no snapshot"
    metadata = message.snapshot.metadata
    if not 0 < metadata.index < NUMBER_MAX:
        return "a snapshot whose index is out of bounds"
    if not 0 < metadata.term <= message.term:
        return f"a snapshot of term {metadata.term} in a message of term {message.term}"
    state = metadata.conf_state
    named = (*state.voters, *state.learners, *state.voters_outgoing, *state.learners_next)
    if not all(NOBODY < node < LOCAL_APPLY_THREAD for node in named):
        return "a snapshot with a node that cannot be"
    return ""

"""States, messages and Readys as the transcripts print them."""

from ollamamax_p2p.consensus.core.config_change import as_v2, decode_conf_change
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    NOBODY,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    Snapshot,
    SoftState,
)
from ollamamax_p2p.consensus.core.names import ENTRY_NAMES, MESSAGE_NAMES, ROLE_NAMES
from ollamamax_p2p.consensus.core.raw_node import Ready

_LETTERS = {
    ConfChangeType.ADD_NODE: "v",
    ConfChangeType.ADD_LEARNER_NODE: "l",
    ConfChangeType.REMOVE_NODE: "r",
    ConfChangeType.UPDATE_NODE: "u",
}


def changes_text(change: ConfChangeV2) -> str:
    """`v1 l2 r3`."""
    return " ".join(f"{_LETTERS[each.type]}{each.node_id}" for each in change.changes)


def _quoted(data: bytes) -> str:
    text = data.decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n") + '"'


def entry_text(entry: Entry) -> str:
    """`1/3 EntryNormal "foo"`."""
    if entry.type is EntryType.NORMAL:
        payload = _quoted(entry.data)
    else:
        payload = changes_text(as_v2(decode_conf_change(entry)))
    return f"{entry.term}/{entry.index} {ENTRY_NAMES[entry.type]} {payload}".rstrip(" ")


def entries_text(entries: list[Entry] | tuple[Entry, ...]) -> str:
    """One line each."""
    return "".join(entry_text(entry) + "\n" for entry in entries)


def hard_state_text(state: HardState) -> str:
    """`Term:1 Vote:1 Commit:2`."""
    vote = f" Vote:{state.vote}" if state.vote else ""
    return f"Term:{state.term}{vote} Commit:{state.commit}"


def soft_state_text(state: SoftState) -> str:
    """`Lead:1 State:StateLeader`."""
    return f"Lead:{state.leader} State:{ROLE_NAMES[state.role]}"


def _ids(ids: tuple[int, ...]) -> str:
    return f"[{' '.join(map(str, ids))}]"


def conf_state_text(state: ConfState) -> str:
    """Voters and learners of both halves."""
    return (
        f"Voters:{_ids(state.voters)} VotersOutgoing:{_ids(state.voters_outgoing)} "
        f"Learners:{_ids(state.learners)} LearnersNext:{_ids(state.learners_next)} "
        f"AutoLeave:{str(state.auto_leave).lower()}"
    )


def snapshot_text(snapshot: Snapshot) -> str:
    """`Index:11 Term:1 ConfState:…`."""
    metadata = snapshot.metadata
    state = conf_state_text(metadata.conf_state)
    return f"Index:{metadata.index} Term:{metadata.term} ConfState:{state}"


def _target(node: int) -> str:
    names = {NOBODY: "None", LOCAL_APPEND_THREAD: "AppendThread", LOCAL_APPLY_THREAD: "ApplyThread"}
    return names.get(node, f"{node:x}")


def message_text(message: Message, indent: str = "") -> str:
    """`1->2 MsgApp Term:1 Log:1/10 Commit:9 Entries:[…]`, on several lines if it is long."""
    words = [
        f"{indent}{_target(message.from_)}->{_target(message.to)} {MESSAGE_NAMES[message.type]} "
        f"Term:{message.term} Log:{message.log_term}/{message.index}"
    ]
    if message.reject:
        words.append(f" Rejected (Hint: {message.reject_hint})")
    if message.commit:
        words.append(f" Commit:{message.commit}")
    if message.vote:
        words.append(f" Vote:{message.vote}")
    if len(message.entries) == 1:
        words.append(f" Entries:[{entry_text(message.entries[0])}]")
    elif message.entries:
        lines = "".join(f"\n{indent}  {entry_text(entry)}" for entry in message.entries)
        words.append(f" Entries:[{lines}\n{indent}]")
    if message.snapshot is not None and message.snapshot.metadata.index:
        words.append(f"\n{indent}  Snapshot: {snapshot_text(message.snapshot)}")
    if message.responses:
        lines = "".join(f"\n{message_text(each, indent + '  ')}" for each in message.responses)
        words.append(f" Responses:[{lines}\n{indent}]")
    return "".join(words)


def ready_text(ready: Ready) -> str:
    """All of a Ready."""
    parts: list[str] = []
    if ready.soft_state is not None:
        parts.append(soft_state_text(ready.soft_state) + "\n")
    if ready.hard_state is not None:
        parts.append(f"HardState {hard_state_text(ready.hard_state)}\n")
    if ready.read_states:
        shown = " ".join(
            f"{{{state.index} [{' '.join(map(str, state.request_ctx))}]}}"
            for state in ready.read_states
        )
        parts.append(f"ReadStates [{shown}]\n")
    if ready.entries:
        parts.append("Entries:\n" + entries_text(ready.entries))
    if ready.snapshot is not None:
        parts.append(f"Snapshot {snapshot_text(ready.snapshot)}\n")
    if ready.committed_entries:
        parts.append("CommittedEntries:\n" + entries_text(ready.committed_entries))
    if ready.messages:
        parts.append("Messages:\n")
        parts += [message_text(message) + "\n" for message in ready.messages]
    if not parts:
        return "<empty Ready>"
    return f"Ready MustSync={str(ready.must_sync).lower()}:\n" + "".join(parts)

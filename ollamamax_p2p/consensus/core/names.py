"""The names by which the field knows messages and roles; in logs, traces and transcripts."""

from ollamamax_p2p.consensus.core.messages import EntryType, MessageType, StateRole

MESSAGE_NAMES = {
    kind: "Msg" + "".join(word.capitalize() for word in kind.name.split("_"))
    for kind in MessageType
}
"""`MsgAppResp`."""

ROLE_NAMES = {
    StateRole.FOLLOWER: "StateFollower",
    StateRole.CANDIDATE: "StateCandidate",
    StateRole.LEADER: "StateLeader",
    StateRole.PRE_CANDIDATE: "StatePreCandidate",
}

ENTRY_NAMES = {
    EntryType.NORMAL: "EntryNormal",
    EntryType.CONF_CHANGE: "EntryConfChange",
    EntryType.CONF_CHANGE_V2: "EntryConfChangeV2",
}

"""Which runner a script needs, by its first command."""

from tests.consensus.interaction import Interaction
from tests.consensus.pure_scripts import ConfigChangeScript, QuorumScript
from tests.consensus.transcript_format import directives

Runner = Interaction | QuorumScript | ConfigChangeScript

_WITHOUT_NODES: dict[str, type[QuorumScript | ConfigChangeScript]] = {
    "committed": QuorumScript,
    "vote": QuorumScript,
    "simple": ConfigChangeScript,
    "enter-joint": ConfigChangeScript,
    "leave-joint": ConfigChangeScript,
}


def drives_nodes(script: str) -> bool:
    """Whether it is more than a pure function's."""
    return next(directives(script)).command not in _WITHOUT_NODES


def runner_for(script: str) -> Runner:
    """A new one."""
    return _WITHOUT_NODES.get(next(directives(script)).command, Interaction)()

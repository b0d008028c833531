"""The scripts that drive no node: quorums, and changes of configurations."""

from ollamamax_p2p.consensus.core.config_change import (
    Changer,
    ConfChangeRefused,
    TrackerConfig,
)
from ollamamax_p2p.consensus.core.progress import ProgressMap, describe_progress
from ollamamax_p2p.consensus.core.quorum import ALL, JointConfig, MajorityConfig
from tests.consensus.interaction import parse_changes
from tests.consensus.transcript_format import Directive


class QuorumScript:
    """`committed` and `vote`, for one set of voters or two."""

    def run(self, directive: Directive) -> str:
        named = directive.named
        joint = "cfgj" in named
        halves = [
            [] if named.get(key) == ("zero",) else [int(each) for each in named.get(key, ())]
            for key in ("cfg", "cfgj")
        ]
        given = named.get("idx", named.get("votes", ()))
        order = list(dict.fromkeys([*halves[0], *halves[1]]))
        known = {node: value for node, value in zip(order, given, strict=True) if value != "_"}
        config: JointConfig | MajorityConfig = MajorityConfig(halves[0])
        if joint:
            config = JointConfig(MajorityConfig(halves[0]), MajorityConfig(halves[1]))
        if directive.command == "vote":
            votes = {node: value == "y" for node, value in known.items()}
            return config.vote_result(votes).value
        if directive.command != "committed":
            return "unknown command"
        indexes = {node: int(value) for node, value in known.items()}
        index = config.committed_index(indexes.get)
        return config.describe(indexes.get) + ("∞" if index == ALL else str(index))


class ConfigChangeScript:
    """`simple`, `enter-joint`, `leave-joint`."""

    def __init__(self) -> None:
        self.config, self.progress = TrackerConfig(), ProgressMap()
        self.last_index = 0

    def run(self, directive: Directive) -> str:
        changer = Changer(self.config, self.progress, last_index=self.last_index, max_inflight=10)
        self.last_index += 1
        changes = parse_changes(directive.input)
        try:
            match directive.command:
                case "simple":
                    result = changer.simple(changes)
                case "enter-joint":
                    auto = directive.named.get("autoleave", ("false",))[0] == "true"
                    result = changer.enter_joint(changes, auto_leave=auto)
                case "leave-joint":
                    result = changer.leave_joint()
                case _:
                    return "unknown command"
        except ConfChangeRefused as error:
            return f"{error}\n"
        self.config, self.progress = result
        return f"{self.config}\n{describe_progress(self.progress.items())}"

"""The settings that the whole cluster shares: a closed table with types, bounds and reasons."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One of them: an integer out of `choices`, or a truth value if there are none."""

    default: int | bool
    choices: range | tuple[int, ...] | None
    meaning: str

    def problem(self, value: int | bool) -> str:
        """What is wrong with a value; "" if nothing is."""
        if self.choices is None:
            return "" if isinstance(value, bool) else "it must be true or false"
        if not isinstance(value, bool) and value in self.choices:
            return ""
        if isinstance(self.choices, range):
            return f"it must be a number from {self.choices[0]:,} to {self.choices[-1]:,}"
        return f"it must be one of {', '.join(map(str, self.choices))}"


_DAY_S = 86_400

SETTINGS: Mapping[str, Setting] = {
    "autopilot": Setting(
        default=True, choices=None, meaning="choose the voters without being asked"
    ),
    "voters_max": Setting(
        default=5, choices=(1, 3, 5), meaning="voters at most; five outlive two losses"
    ),
    "stability_s": Setting(
        default=10, choices=range(_DAY_S + 1), meaning="healthy for this long before it may vote"
    ),
    "catch_up_entries": Setting(
        default=256, choices=range(100_001), meaning="behind the leader by at most this to vote"
    ),
    "dead_after_s": Setting(
        default=60, choices=range(5, _DAY_S + 1), meaning="a voter silent for this long is replaced"
    ),
    "remove_dead_after_s": Setting(
        # 0: a laptop in a drawer is still somebody's, so only an operator may decide.
        default=0,
        choices=range(366 * _DAY_S + 1),
        meaning="a learner silent for this long is expelled; 0: never",
    ),
    "copies_default": Setting(
        default=2,
        choices=range(1, 65),
        meaning="copies of a model about which nobody said more; kept, and not acted on yet",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedSettings:
    """All of them with their present values; `SETTINGS` says what each means."""

    autopilot: bool = True
    voters_max: int = 5
    stability_s: int = 10
    catch_up_entries: int = 256
    dead_after_s: int = 60
    remove_dead_after_s: int = 0
    copies_default: int = 2


def agreed_settings(changed: Mapping[str, Any]) -> AgreedSettings:
    """The present values, of those that were set; the rest have their defaults."""
    return AgreedSettings(**{key: changed.get(key, SETTINGS[key].default) for key in SETTINGS})

"""Simulated swarms, fault schedules and invariants, for our tests and for those of programs that
build on the library. Public, as `trio.testing` is.

Start at `simulated_swarm`; `determinism` tells what makes a run repeatable. Names are resolved on
first use, because a swarm imports nearly everything.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ollamamax_p2p.testing.determinism import (
        deterministic,
        run_on_virtual_clock,
        run_simulation,
    )
    from ollamamax_p2p.testing.faults import Fault, FaultKind, FaultSchedule, Lie
    from ollamamax_p2p.testing.invariants import InvariantBroken, Invariants, PullRecord
    from ollamamax_p2p.testing.lying_source import LyingSource
    from ollamamax_p2p.testing.scripted_backend import Script, ScriptedBackend, whole_answer
    from ollamamax_p2p.testing.simulated_swarm import (
        NodeDied,
        SimulatedModel,
        SimulatedNode,
        SimulatedSwarm,
        SwarmSettings,
        open_simulated_swarm,
        small_steps,
    )

__all__ = [
    "Fault",
    "FaultKind",
    "FaultSchedule",
    "InvariantBroken",
    "Invariants",
    "Lie",
    "LyingSource",
    "NodeDied",
    "PullRecord",
    "Script",
    "ScriptedBackend",
    "SimulatedModel",
    "SimulatedNode",
    "SimulatedSwarm",
    "SwarmSettings",
    "deterministic",
    "open_simulated_swarm",
    "run_on_virtual_clock",
    "run_simulation",
    "small_steps",
    "whole_answer",
]

_HOME = {
    "Fault": "faults",
    "FaultKind": "faults",
    "FaultSchedule": "faults",
    "InvariantBroken": "invariants",
    "Invariants": "invariants",
    "Lie": "faults",
    "LyingSource": "lying_source",
    "NodeDied": "simulated_swarm",
    "PullRecord": "invariants",
    "Script": "scripted_backend",
    "ScriptedBackend": "scripted_backend",
    "SimulatedModel": "simulated_swarm",
    "SimulatedNode": "simulated_swarm",
    "SimulatedSwarm": "simulated_swarm",
    "SwarmSettings": "simulated_swarm",
    "deterministic": "determinism",
    "open_simulated_swarm": "simulated_swarm",
    "run_on_virtual_clock": "determinism",
    "run_simulation": "determinism",
    "small_steps": "simulated_swarm",
    "whole_answer": "scripted_backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

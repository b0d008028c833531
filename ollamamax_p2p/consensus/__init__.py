"""Raft: what a majority has written down is agreed, and stays so.

`core/` decides and touches nothing; around it are the log (`file_log`, `ram_log`), the transport
(`stream_transport`, `snapshot_streams`) and the loop that drives them (`replica`). It knows nothing
of models or clusters: give it a StateMachine. Start reading at `core/raft.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.consensus.core.stable_log import LogReader
from ollamamax_p2p.consensus.log_storage import LogStorage
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.state_machine import (
    Command,
    SnapshotReader,
    SnapshotWriter,
    StateMachine,
)
from ollamamax_p2p.consensus.transport import Transport

if TYPE_CHECKING:
    from ollamamax_p2p.consensus import storage_work
    from ollamamax_p2p.consensus.file_log import FileLog, open_file_log
    from ollamamax_p2p.consensus.log_check import LogReport, check_log
    from ollamamax_p2p.consensus.ram_log import RamLog
    from ollamamax_p2p.consensus.replica import (
        MemberStatus,
        Replica,
        ReplicaStatus,
        bootstrap_log,
        open_replica,
    )
    from ollamamax_p2p.consensus.snapshot_streams import SnapshotStreams, open_snapshot_streams
    from ollamamax_p2p.consensus.stream_transport import StreamTransport, open_stream_transport

__all__ = [
    "Command",
    "ConsensusSettings",
    "FileLog",
    "LogReader",
    "LogReport",
    "LogStorage",
    "MemberStatus",
    "RamLog",
    "Replica",
    "ReplicaStatus",
    "SnapshotReader",
    "SnapshotStreams",
    "SnapshotWriter",
    "StateMachine",
    "StreamTransport",
    "Transport",
    "bootstrap_log",
    "check_log",
    "open_file_log",
    "open_replica",
    "open_snapshot_streams",
    "open_stream_transport",
    "storage_work",
]

_HOME = {
    "FileLog": "file_log",
    "open_file_log": "file_log",
    "LogReport": "log_check",
    "check_log": "log_check",
    "RamLog": "ram_log",
    "MemberStatus": "replica",
    "Replica": "replica",
    "ReplicaStatus": "replica",
    "bootstrap_log": "replica",
    "open_replica": "replica",
    "SnapshotStreams": "snapshot_streams",
    "open_snapshot_streams": "snapshot_streams",
    "StreamTransport": "stream_transport",
    "open_stream_transport": "stream_transport",
}


def __getattr__(name: str) -> Any:
    if name == "storage_work":
        return import_module(f"{__name__}.storage_work")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

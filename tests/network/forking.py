"""Real node processes that start in milliseconds: forked from one that has imported everything.

`python -m tests.network.forking` reads commands as JSON lines and forks a child for each; the child
opens a node, does what the command says and tells it in a file, line by line, with unbuffered
writes, so that what was said before a SIGKILL is there to read.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Child:
    """A node in a process of its own."""

    pid: int
    said: Path

    def lines(self) -> list[dict[str, Any]]:
        """What it has said so far; a line cut off by its end is left out."""
        if not self.said.exists():
            return []
        whole = self.said.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


class Forker:
    """The process that forks. Use as a context manager; its end kills what it forked."""

    def __enter__(self) -> "Forker":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.network.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            text=True,
        )
        self._children: list[Child] = []
        self._asking = threading.Lock()
        return self

    def fork(self, role: str, said: Path, **arguments: Any) -> Child:
        """Start a child. said: a file that does not exist yet."""
        pid = self._ask({"fork": role, "said": str(said), **arguments})
        child = Child(pid, said)
        self._children.append(child)
        return child

    def wait(self, child: Child) -> int:
        """Its exit code, negative for a signal. Blocks; any thread may ask."""
        self._children.remove(child)
        return self._ask({"wait": child.pid})

    def _ask(self, command: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def __exit__(self, *exc: object) -> None:
        for child in list(self._children):
            child.kill()
            self.wait(child)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


# -- inside the forking process ----------------------------------------------------------------


def main() -> None:
    """Read commands until standard input ends."""
    import libp2p  # noqa: F401 - the two seconds that every child is spared

    import ollamamax_p2p.node
    import ollamamax_p2p.transfer  # noqa: F401
    import tests.network.raft_node  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(_child(command))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _child(command: dict[str, Any]) -> int:
    import trio

    from tests.network import raft_node

    roles = {"seed": _seed, "pull": _pull, "raft": raft_node.run}
    descriptor = os.open(command["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(**facts: Any) -> None:
        os.write(descriptor, json.dumps(facts).encode() + b"\n")

    try:
        trio.run(roles[command["fork"]], command, say)
    except BaseException as error:  # noqa: BLE001 - told to the parent, which fails the test
        say(failed=repr(error), trace=traceback.format_exc())
        return 1
    return 0


def _config(command: dict[str, Any]) -> Any:
    from ollamamax_p2p import load_config

    folder = Path(command["folder"])
    return load_config(
        environment={},
        flags={
            "data_dir": str(folder / "data"),
            "content.models": str(folder / "models"),
            "content.reserve_bytes": 0,
            "host.listen": ["/ip4/127.0.0.1/tcp/0"],
            "discovery.mdns": False,
            "origin.enabled": False,
        },
    )


async def _seed(command: dict[str, Any], say: Any) -> None:
    """Import a model, issue a ticket, serve; say how much was uploaded, whenever that changes."""
    import trio

    from ollamamax_p2p import open_node

    async with open_node(_config(command)) as node:
        await node.import_model(Path(command["model"]), command["name"])
        ticket = (await node.invite(uses=command["uses"], expires_s=3600)).ticket
        say(ticket=ticket, peer_id=node.peer_id)
        uploaded = -1
        while True:
            await trio.sleep(0.1)
            if node.bytes_uploaded != uploaded:
                uploaded = node.bytes_uploaded
                say(uploaded=uploaded)


async def _pull(command: dict[str, Any], say: Any) -> None:
    """Join if need be, pull, say every state and the report; then serve on if told to."""
    import trio

    from ollamamax_p2p import PullProgress, open_node

    def tell(progress: PullProgress) -> None:
        say(digest=progress.digest, completed=progress.completed, total=progress.total)

    async with open_node(_config(command)) as node:
        await node.join([command["ticket"]])
        say(joined=True)
        report = await node.pull(command["name"], on_progress=tell)
        say(
            pulled=True,
            fetched=report.bytes_fetched,
            refetched=report.bytes_refetched,
            seconds=report.seconds,
            sources={share.name: share.bytes for share in report.sources},
        )
        if command.get("stay"):
            await trio.sleep_forever()


if __name__ == "__main__":
    main()

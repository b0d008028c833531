"""A node for one command, where none runs: in a thread with an event loop of its own.

A conversation waits for its user in between, in the main thread, where Ctrl-C arrives; the node's
loop must go on meanwhile.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from omx_cli.running import allow_many_files, run, running_node

if TYPE_CHECKING:
    import trio

    from ollamamax_p2p import LocalClient, NodeConfig

CLOSE_TIMEOUT_S = 20.0
"""A node closes its peers, files and engines within seconds."""


@contextmanager
def node_for_a_while(config: "NodeConfig", tell: Callable[[str], None]) -> Iterator["LocalClient"]:
    """The node that runs on config's data folder, else one of our own with its engines, its API on
    a free port of loopback. tell: told that one is opened. Raises what opening a node may raise.
    """
    client = run(lambda: running_node(config))
    if client is not None:
        yield client
        return
    tell("no node is running; opening one for this command …")
    own = _OwnNode(replace(config, api=replace(config.api, listen="127.0.0.1:0", ollama_listen="")))
    try:
        yield own.opened()
    finally:
        own.close()


class _OwnNode:
    """Opened by `opened`; `close` may come at any time after."""

    def __init__(self, config: "NodeConfig") -> None:
        self._config = config
        self._is_open = threading.Event()
        self._trouble: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        # A daemon: a second Ctrl-C while it closes must end the process.
        self._thread = threading.Thread(target=self._run, name="omx-node", daemon=True)

    def opened(self) -> "LocalClient":
        """Returns once it answers."""
        from ollamamax_p2p import LocalClient

        allow_many_files()
        self._thread.start()
        self._is_open.wait()
        if self._trouble is not None:
            raise self._trouble
        return LocalClient.find(self._config.data_dir)

    def close(self) -> None:
        """Returns once it is closed. Raises what ended it, if it ended by itself."""
        if self._token is not None and self._scope is not None and self._thread.is_alive():
            self._token.run_sync_soon(self._scope.cancel)
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        import trio

        try:
            trio.run(self._serve)
        except BaseException as error:  # noqa: BLE001 - the border of the thread
            self._trouble = error
        finally:
            self._is_open.set()

    async def _serve(self) -> None:
        import trio

        from ollamamax_p2p import open_node

        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            async with open_node(self._config, serve_api=True):
                self._is_open.set()
                await trio.sleep_forever()

"""A node of an open swarm, dialled by js-libp2p: the wire is libp2p's, not only our own."""

import json
import os
import shutil
from pathlib import Path

import pytest
import trio

from ollamamax_p2p.discovery.dht import open_dht
from ollamamax_p2p.host import HostSettings, open_libp2p_host

pytestmark = [pytest.mark.network, pytest.mark.counterpart]

HERE = Path(os.environ.get("OMX_JS_DIR", Path(__file__).parent / "js"))
SCRIPT = Path(__file__).parent / "js" / "dial.mjs"


@pytest.fixture(scope="module")
def node_program() -> str:
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node.js: apt install nodejs")
    if not (HERE / "node_modules" / "libp2p").is_dir():
        pytest.skip(f"needs js-libp2p: run `npm ci` in {HERE}")
    return program


class NoNeighbours:
    """Discovery without anybody to know."""

    def peers(self):
        return ()

    async def reach(self, addresses):
        raise AssertionError("nobody to reach")


async def dial_from_js(program: str, address: str) -> dict:
    """What js-libp2p got from the node at the address."""
    script = SCRIPT
    if SCRIPT.parent != HERE:  # modules are looked for beside the script
        script = Path(shutil.copy(SCRIPT, HERE))
    with trio.fail_after(90):
        done = await trio.run_process(
            [program, str(script), address], capture_stdout=True, capture_stderr=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()[-2_000:]
    return json.loads(done.stdout)


async def test_js_libp2p_dials_an_open_node_and_is_answered(node_program):
    settings = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
    async with (
        open_libp2p_host(b"j" * 32, settings, swarm_key=None, admit_all=True) as host,
        open_dht(host, NoNeighbours(), host.libp2p),
    ):
        seen = await dial_from_js(node_program, str(host.addresses[0]))
    assert seen["peer"] == host.peer_id
    assert seen["encryption"] == "/noise"
    assert seen["multiplexer"] == "/yamux/1.0.0"
    assert "/omx/kad/1.0.0" in seen["protocols"]
    assert "/ipfs/ping/1.0.0" in seen["protocols"]
    assert seen["pingMs"] >= 0
    assert host.peer_id in seen["kademlia"]


async def test_js_libp2p_gets_no_answer_from_a_node_that_does_not_admit_it(node_program):
    settings = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_libp2p_host(b"k" * 32, settings, swarm_key=None) as host:
        with pytest.raises(AssertionError, match=r"(?i)protocol"):
            await dial_from_js(node_program, str(host.addresses[0]))

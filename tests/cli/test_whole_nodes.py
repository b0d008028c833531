"""`omx up`, `join` and `pull` with real nodes: whole processes on loopback."""

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from ollamamax_p2p import ClusterStatus, LocalClient
from tests.cli.running_omx import Ended, command, environment
from tests.content.model_files import real_model

pytestmark = pytest.mark.network

OFFLINE = {
    "OMX_ORIGIN_ENABLED": "0",
    "OMX_NO_MDNS": "1",
    "OMX_LISTEN": "/ip4/127.0.0.1/tcp/0",
    "OMX_API": "127.0.0.1:0",
    "OMX_CONTENT_RESERVE_BYTES": "0",
}


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(120):
        yield


def node_environment(data_dir: Path, **more: str) -> dict[str, str]:
    return environment(data_dir, **(OFFLINE | more))


async def omx_on(data_dir: Path, *arguments: str, **more: str) -> Ended:
    done = await trio.run_process(
        command(*arguments),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=node_environment(data_dir, **more),
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def up(data_dir: Path, *arguments: str, **more: str) -> AsyncIterator[tuple]:
    """A node in a process of its own, and what it announced."""
    process = await trio.lowlevel.open_process(
        command(*(arguments or ("up",)), "--json"),
        stdout=-1,
        stderr=-1,
        env=node_environment(data_dir, **more),
    )
    try:
        said = b""
        while not said.endswith(b"\n"):
            part = await process.stdout.receive_some()
            if not part:
                err = b"".join([part async for part in process.stderr])
                raise AssertionError(f"it ended with {await process.wait()}: {err.decode()}")
            said += part
        yield process, json.loads(said)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def gguf(path: Path, weights: int = 500_000) -> Path:
    """A GGUF file with one tensor of random weights."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    metadata = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    tensor = text("blk.0.w") + struct.pack("<IQIQ", 1, weights, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + metadata + tensor
    path.write_bytes(head + bytes(-len(head) % 32) + os.urandom(4 * weights))
    return path


async def test_a_model_imported_on_one_node_is_pulled_on_another(tmp_path):
    seed, other = tmp_path / "seed" / "d", tmp_path / "other" / "d"
    file = gguf(tmp_path / "tiny.gguf")
    async with up(seed) as (_, announced):
        ticket = announced["invitation"]["ticket"]
        assert announced["status"]["open_swarm"] is False
        assert (await omx_on(seed, "import", str(file), "tiny")).code == 0
        async with up(other, "join", ticket) as (_, joined):
            assert joined["status"]["swarm_id"] == announced["status"]["swarm_id"]
            pulled = await omx_on(other, "pull", "tiny", "--json")
            assert pulled.code == 0, pulled.err
            report = json.loads(pulled.out.splitlines()[-1])["report"]
            assert report["bytes_fetched"] == report["bytes_total"] > file.stat().st_size
            assert [s["name"] for s in report["sources"]] == [announced["status"]["peer_id"]]
            listed = json.loads((await omx_on(other, "list", "--json")).out)["models"]
            assert [model["name"] for model in listed] == ["tiny:latest"]
        # The ticket was good for one: a third node is told so.
        ended = await omx_on(tmp_path / "third" / "d", "join", ticket)
        assert ended.code == 2
        assert "has been used 1 of 1 times" in ended.err
        assert ended.err.count("\n") == 1


async def test_without_a_node_commands_open_one_for_themselves(tmp_path):
    data_dir = tmp_path / "d"
    file = gguf(tmp_path / "tiny.gguf", weights=10)
    assert (await omx_on(data_dir, "import", str(file), "tiny")).code == 0
    assert (await omx_on(data_dir, "cp", "tiny", "other")).code == 0
    listed = json.loads((await omx_on(data_dir, "list", "--json")).out)["models"]
    assert {model["name"] for model in listed} == {"tiny:latest", "other:latest"}
    ended = await omx_on(data_dir, "show", "none")
    assert (ended.code, ended.err) == (3, "Error: model 'none:latest' not found\n")


async def test_a_pull_that_nobody_can_serve_ends_with_a_network_error(tmp_path):
    ended = await omx_on(tmp_path / "d", "pull", "none", OMX_TRANSFER_GIVE_UP_AFTER_S="1")
    assert ended.code in (3, 5)
    assert ended.err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
async def test_a_signal_stops_a_node_cleanly(tmp_path, number, code):
    async with up(tmp_path / "d") as (process, _):
        assert (tmp_path / "d" / "node.json").exists()
        process.send_signal(number)
        assert await process.wait() == code
        assert b"".join([part async for part in process.stderr]) == "stopping …\n".encode()
    assert not (tmp_path / "d" / "node.json").exists()


async def test_stop_returns_when_the_node_is_gone(tmp_path):
    async with up(tmp_path / "d") as (process, _):
        assert (await omx_on(tmp_path / "d", "stop")).out == "stopped\n"
        with trio.fail_after(5):
            assert await process.wait() == 0
    assert (await omx_on(tmp_path / "d", "stop")).code == 4


async def test_a_frozen_command_ends_at_the_second_ctrl_c(tmp_path):
    script = (
        "import trio\nfrom omx_cli.running import run\n"
        "async def work():\n"
        "    print('working', flush=True)\n"
        "    try:\n"
        "        await trio.sleep_forever()\n"
        "    finally:\n"
        "        with trio.CancelScope(shield=True):\n"
        "            print('closing', flush=True)\n"
        "            await trio.sleep_forever()\n"
        "run(work, interrupted='interrupted; resume')"
    )
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", script], stdout=-1, stderr=-1, env=node_environment(tmp_path)
    )
    assert await process.stdout.receive_some() == b"working\n"
    process.send_signal(signal.SIGINT)
    assert await process.stdout.receive_some() == b"closing\n"
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    err = b"".join([part async for part in process.stderr])
    assert err == b"\nError: interrupted; resume\n"


async def test_a_node_that_is_frozen_is_not_waited_for(tmp_path):
    async with up(tmp_path / "d") as (process, _):
        process.send_signal(signal.SIGSTOP)
        script = (
            "import sys\nfrom omx_cli import running\nfrom omx_cli.main import run\n"
            "running.with_node.__kwdefaults__['timeout_s'] = 0.5\nsys.exit(run(['status']))"
        )
        done = await trio.run_process(
            [sys.executable, "-c", script],
            env=node_environment(tmp_path / "d"),
            capture_stderr=True,
            check=False,
        )
        pid = process.pid
    assert done.returncode == 4
    assert f"kill -CONT {pid} wakes it, kill -9 {pid} ends it" in done.stderr.decode()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("api-token", ""),
        ("api-token", "damaged"),
        ("api-token", "x" * 43),
        ("node.json", "{}"),
        ("node.json", None),
    ],
)
async def test_a_node_whose_files_are_damaged_is_named(tmp_path, file, text):
    async with up(tmp_path / "d") as (process, _):
        if text is None:
            (tmp_path / "d" / file).unlink()
        else:
            (tmp_path / "d" / file).write_text(text)
        for line in ("status", "list", "stop"):
            ended = await omx_on(tmp_path / "d", line)
            assert ended.code == 4
            assert f"a node (process {process.pid}) runs on " in ended.err
            assert f"its {file} is " in ended.err
            assert f"run: kill {process.pid}, then omx up" in ended.err


async def test_a_store_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for models in (tmp_path / "file", tmp_path / "file" / "below"):
        ended = await omx_on(tmp_path / "d", "list", "--models", str(models))
        assert ended.code == 4
        assert ended.err.startswith(f"Error: {tmp_path / 'file'}: there is a file where a folder")
    if sys.platform == "linux":
        ended = await omx_on(tmp_path / "d", "list", "--models", "/proc/y")
        assert ended.code in (0, 4)  # 0: /proc says itself that it cannot be written
        assert "fault of omx" not in ended.err


async def test_a_taken_data_folder_and_a_taken_port_are_named(tmp_path):
    async with up(tmp_path / "d") as (_, announced):
        ended = await omx_on(tmp_path / "d", "up")
        assert ended.code == 4
        assert "a node already runs on" in ended.err
        api = announced["status"]["api_address"]
        ended = await omx_on(tmp_path / "e", "up", OMX_API=api)
        assert ended.code == 4
        assert f"{api} is already in use" in ended.err
        assert "--api" in ended.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = await omx_on(tmp_path / "e", "up", OMX_LISTEN=f"/ip4/127.0.0.1/tcp/{port}")
    assert ended.code == 4
    assert "--listen" in ended.err
    assert ended.err.count("\n") == 1


async def test_a_node_that_cannot_start_forgets_its_swarm_and_nothing_else(tmp_path):
    data_dir = tmp_path / "d"  # with the models in it, as `environment` has them
    assert (await omx_on(data_dir, "import", str(gguf(tmp_path / "a.gguf", 10)), "tiny")).code == 0
    key = (data_dir / "node-key").read_bytes()
    (place,) = (data_dir / "cluster").glob("*/place")
    place.write_text("damaged")
    ended = await omx_on(data_dir, "up")
    assert (ended.code, ended.err.count("\n")) == (4, 1)
    assert "`omx leave --force` here" in ended.err
    ended = await omx_on(data_dir, "leave", "--force")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("forgot the swarm: ")
    assert not [*(data_dir / "cluster").glob("*")]
    assert (data_dir / "node-key").read_bytes() == key
    assert (data_dir / "store").is_dir()
    assert [*(data_dir / "models" / "manifests").rglob("latest")]


async def until(data_dir: Path, is_so) -> ClusterStatus:
    """The cluster as that node sees it, once it is so."""
    client = LocalClient.find(data_dir)
    while not is_so(seen := await client.cluster_status()):  # noqa: ASYNC110 - it is elsewhere
        await trio.sleep(0.2)
    return seen


def voters(seen: ClusterStatus) -> set[str]:
    return {each.name for each in seen.members if each.role in ("voter", "leader")}


async def test_three_nodes_vote_lose_their_leader_and_expel_it(tmp_path):
    a, b, c = (tmp_path / name / "d" for name in "abc")
    async with AsyncExitStack() as running:
        await running.enter_async_context(up(a, "up", "--name", "a"))
        client = LocalClient.find(a)
        await client.set_cluster_setting("stability_s", "0")
        ticket = (await client.invite(uses=2)).ticket
        b_process, _ = await running.enter_async_context(up(b, "join", ticket, "--name", "b"))
        await running.enter_async_context(
            up(c, "join", ticket, "--name", "c", "--region", "attic", "--voter", "yes")
        )
        seen = await until(a, lambda seen: voters(seen) == {"a", "b", "c"})
        assert {each.name: each.region for each in seen.members}["c"] == "attic"
        assert (await omx_on(c, "cluster", "transfer-leader", "b")).code == 0
        killed = next(each.peer_id for each in seen.members if each.name == "b")
        b_process.kill()
        await until(a, lambda seen: seen.has_quorum and seen.leader not in ("", killed))
        shown = await omx_on(a, "cluster", "status")
        assert shown.out.splitlines()[0].startswith("quorum: ")
        removed = await omx_on(c, "cluster", "remove", "b")
        assert removed.out == "removed b; it has no access any more\n"
        await until(a, lambda seen: {each.name for each in seen.members} == {"a", "c"})


async def test_without_a_node_a_question_opens_one_with_its_engine_and_leaves_nothing(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the embedded engine")
    data_dir = tmp_path / "d"
    settings = {"OMX_INFERENCE_THREADS": "1", "OMX_NAME": "kitchen"}
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(
        f"FROM {real_model()}\nPARAMETER temperature 0\nPARAMETER num_predict 6\n"
        "PARAMETER num_ctx 256\n"
    )
    made = await omx_on(data_dir, "create", "smol", "-f", str(modelfile))
    assert made.code == 0, made.err
    ended = await omx_on(data_dir, "run", "smol", "Name a colour.", "--json", **settings)
    assert ended.code == 0, ended.err
    start, *deltas, done = [json.loads(line) for line in ended.out.splitlines()]
    assert (start["node"], start["backend"]) == ("kitchen", "embedded")
    assert "".join(each["line"]["response"] for each in deltas).strip()
    assert 1 <= done["line"]["eval_count"] <= 6
    assert not (data_dir / "node.json").exists()
    assert (await omx_on(data_dir, "ps")).code == 4, "it is gone with its command"

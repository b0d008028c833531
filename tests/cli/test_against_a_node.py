"""`omx` as a process of its own, talking to a node's API over loopback."""

import json
import os
import pty
import re
import signal
import socket

import pytest
import trio

from ollamamax_p2p.content import CreationRequest
from ollamamax_p2p.errors import DigestMismatch
from ollamamax_p2p.observability import Event
from tests.api.ram_node import OTHER_PEER, PEER, progress
from tests.api.store_node import StoreNode, serving
from tests.cli.running_omx import command, environment
from tests.content.model_files import gguf_file

pytestmark = pytest.mark.network


async def test_list_has_ollamas_columns_and_a_prefix_filter(served, omx, tmp_path):
    for name in ("tiny", "other:7b"):
        await served.client.import_model(tmp_path / "a.gguf", name)
    ended = await omx("list")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert re.fullmatch(r"NAME {10,}ID {10,}SIZE {2,}MODIFIED", lines[0])
    assert re.fullmatch(r"tiny:latest {4}abababababab {4}7 B {5}\d+ \w+ ago", lines[1])
    assert [line.split()[0] for line in (await omx("ls", "OTH")).out.splitlines()[1:]] == [
        "other:7b"
    ]
    found = json.loads((await omx("list", "--json")).out)
    assert [model["name"] for model in found["models"]] == ["tiny:latest", "other:7b"]


async def test_import_create_show_cp_and_rm(served, omx, tmp_path):
    (tmp_path / "Modelfile").write_text("FROM tiny")
    assert (await omx("import", "a.gguf", "tiny")).out == "tiny:latest: 7 B, id abababababab\n"
    assert (await omx("create", "made")).code == 0
    assert (await omx("create", "piped", "-f", "-", stdin=b"FROM x")).code == 0
    assert (await omx("show", "tiny", "--license")).out == "MIT\n"
    shown = (await omx("show", "tiny")).out
    assert "  Model\n    architecture    llama\n" in shown
    assert json.loads((await omx("show", "tiny", "--json")).out)["template"] == "{{ .Prompt }}"
    assert (await omx("cp", "tiny", "other")).out == "copied 'tiny' to 'other'\n"
    assert (await omx("rm", "tiny", "other")).out == "deleted 'tiny'\ndeleted 'other'\n"
    ended = await omx("rm", "tiny")
    assert (ended.code, ended.err) == (3, "Error: model 'tiny' not found\n")


async def test_push_says_what_it_sent_and_how_it_goes(omx, tmp_path):
    node = StoreNode()
    digest = await node.store.put(gguf_file({"w": bytes(64)}))
    await node.create_from_request("lab/tiny", CreationRequest(files={"a": digest}))
    async with serving(node, tmp_path):
        ended = await omx("push", "lab/tiny")
        assert ended.code == 0
        assert re.fullmatch(r"pushed lab/tiny:latest: \d+ B in 1\.0 s, \d+ B/s\n", ended.out)
        assert ended.err.splitlines()[0] == "retrieving manifest"
        assert re.fullmatch(r"pushing [0-9a-f]{12}: \d+ B", ended.err.splitlines()[1])
        lines = (await omx("push", "lab/tiny", "--json")).out.splitlines()
        assert json.loads(lines[-1])["report"]["model"] == "lab/tiny:latest"
        assert json.loads(lines[0])["status"] == "retrieving manifest"
        ended = await omx("push", "none")
        assert (ended.code, ended.err.splitlines()[-1]) == (
            3,
            "Error: model 'none:latest' not found",
        )


async def test_a_missing_modelfile_is_named(served, omx):
    ended = await omx("create", "made", "-f", "none")
    assert ended.code == 2
    assert ended.err == "Error: none: No such file or directory; name it with -f\n"


async def test_status_peers_invite_and_join(served, omx):
    assert json.loads((await omx("status", "--json")).out)["peer_id"] == PEER
    assert PEER in (await omx("status")).out
    assert json.loads((await omx("peers", "--json")).out)["peers"][0]["peer_id"] == OTHER_PEER
    assert (await omx("peers")).out.splitlines()[1].split()[-1] == "yes"
    assert (await omx("invite", "--uses", "2", "--expires", "1h")).out == "omx1ticket\n"
    assert (await omx("join", "omx1ticket")).out == "joined swarm 5a5a5a5a\n"
    ended = await omx("join", "omx1broken", "--json")
    assert (ended.code, json.loads(ended.err)["code"]) == (2, "ticket_mistyped")
    assert (await omx("leave")).out == "left the swarm\n"


async def test_flags_that_a_running_node_cannot_take_are_refused(served, omx):
    for line in (("pull", "tiny"), ("join", "omx1ticket")):
        ended = await omx(*line, "--models", "/elsewhere")
        assert ended.code == 2
        assert ended.err.startswith("Error: --models: a node already runs on ")
    for line in (("list",), ("show", "tiny"), ("cp", "a", "b"), ("rm", "tiny"), ("doctor",)):
        ended = await omx(*line, "--models", "/elsewhere")
        assert ended.code == 2
        assert ended.err.startswith("Error: --models: a node already runs on ")
    assert served.node.pulls_begun == 0


async def test_errors_of_a_modelfile_name_the_file_that_was_given(served, omx, tmp_path):
    (tmp_path / "My.file").write_text("nothing")
    ended = await omx("create", "made", "-f", "My.file")
    assert (ended.code, ended.err) == (2, "Error: My.file: it has no FROM\n")
    ended = await omx("create", "made", "-f", "-", stdin=b"nothing", OMX_DEBUG="")
    assert (ended.code, ended.err) == (2, "Error: stdin: it has no FROM\n")


async def test_a_fifo_is_no_modelfile(served, omx, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    ended = await omx("create", "made", "-f", "fifo")
    assert (ended.code, ended.err) == (2, "Error: fifo: not a regular file; name it with -f\n")


@pytest.mark.parametrize("line", [("list",), ("list", "--json"), ("--help",)])
@pytest.mark.parametrize(
    ("to", "why"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")]
)
async def test_an_answer_that_cannot_be_written_is_said(served, tmp_path, line, to, why):
    shell = " ".join(command(*line)) + f" {to}"
    done = await trio.run_process(
        ["bash", "-c", shell], env=environment(tmp_path), capture_stderr=True, check=False
    )
    assert done.returncode == 4
    told = done.stderr.decode()
    assert f"cannot write to standard output: {why}" in told
    assert told.count("\n") == 1


async def test_without_stderr_the_exit_code_still_tells(served, tmp_path):
    for to in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        shell = " ".join(command("show", "none")) + f" {to}"
        done = await trio.run_process(
            ["bash", "-c", shell],
            env=environment(tmp_path),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")


async def test_a_pull_into_a_pipe_is_a_line_per_state(served, omx):
    ended = await omx("pull", "tiny")
    assert ended.code == 0
    assert ended.err.splitlines() == ["pulling manifest", "pulling 0123456789ab: 100 B"]
    assert ended.out.splitlines() == [
        "pulled tiny:latest: 100 B in 2.0 s, 50 B/s; 100 B from 12D3KooW…riHhKu"
        "; 0 B fetched twice".replace("riHhKu", OTHER_PEER[-6:]),
    ]


async def test_a_pull_for_programs_is_ndjson(served, omx):
    ended = await omx("pull", "tiny", "--json")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert lines[0]["status"] == "pulling manifest"
    assert lines[-1]["status"] == "success"
    assert lines[-1]["report"]["model"] == "tiny:latest"
    assert ended.err == ""


async def test_a_pull_that_fails_ends_with_its_errors_code(served, omx):
    async def lies(name, tell):
        tell(progress(10))
        raise DigestMismatch("sha256:aa", "sha256:bb")

    served.node.script = lies
    ended = await omx("pull", "tiny", "--json")
    assert ended.code == 6
    assert json.loads(ended.err)["code"] == "digest_mismatch"


async def test_ctrl_c_ends_a_pull_with_130_and_stops_it(served, tmp_path):
    begun = trio.Event()

    async def endless(name, tell):
        tell(progress(1))
        begun.set()
        await trio.sleep_forever()

    served.node.script = endless
    process = await trio.lowlevel.open_process(
        command("pull", "tiny"), stderr=-1, env=environment(tmp_path)
    )
    await begun.wait()
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    err = b"".join([part async for part in process.stderr]).decode()
    last = err.splitlines()[-1]
    assert last == "Error: interrupted; what was fetched is kept, the same command resumes"
    while not served.node.pulls_cancelled:
        await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_pull_on_a_terminal_draws_a_bar(served, tmp_path):
    async def halfway(name, tell):
        tell(progress(50))
        await trio.sleep(0.3)  # real: the process on the other side draws every 0.1 s
        tell(progress(100))

    served.node.script = halfway
    ours, theirs = pty.openpty()
    process = await trio.lowlevel.open_process(
        command("pull", "tiny"),
        stdout=theirs,
        stderr=theirs,
        env=environment(tmp_path, TERM="xterm", COLUMNS="120", LINES="30"),
    )
    os.close(theirs)
    assert await process.wait() == 0
    drawn = b""
    while part := await trio.to_thread.run_sync(read_some, ours):
        drawn += part
    os.close(ours)
    text = drawn.decode()
    assert "pulling 0123456789ab:  50% ▕" in text
    assert "pulling 0123456789ab: 100% ▕████████" in text
    assert "pulled tiny:latest" in text


def read_some(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # what Linux gives at the end of a terminal
        return b""


async def test_events_are_printed_as_they_happen(served, tmp_path):
    process = await trio.lowlevel.open_process(
        command("events", "--json"), stdout=-1, env=environment(tmp_path)
    )
    while not served.node.events._subscriptions:
        await trio.testing.wait_all_tasks_blocked(0.01)
    served.node.events.report(Event(kind="peer.connected", at="now", facts={"peer": OTHER_PEER}))
    assert json.loads(await process.stdout.receive_some()) == {
        "kind": "peer.connected",
        "at": "now",
        "facts": {"peer": OTHER_PEER},
    }
    process.send_signal(signal.SIGTERM)
    await process.wait()


async def test_a_reader_that_leaves_early_is_no_error(served, omx, tmp_path):
    await served.client.import_model(tmp_path / "a.gguf", "tiny")
    line = " ".join(command("list")) + " | true; exit ${PIPESTATUS[0]}"
    done = await trio.run_process(
        ["bash", "-c", line], env=environment(tmp_path), capture_stderr=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


async def test_doctor_asks_the_node_and_finds_nothing_to_mend(served, omx):
    ended = await omx("doctor", "--json", OMX_ORIGIN_ENABLED="0", OMX_CONTENT_RESERVE_BYTES="0")
    findings = {each["check"]: each for each in json.loads(ended.out)["findings"]}
    assert findings["node"]["verdict"] == "ok"
    assert findings["other swarms"]["verdict"] == "ok"
    assert findings["clock"]["verdict"] == "unknown"
    assert findings["secrets"]["verdict"] == "ok"


async def test_doctor_names_the_mends_and_ends_with_4(omx, tmp_path):
    (tmp_path / "node-key").write_text("x")
    (tmp_path / "node-key").chmod(0o644)
    tmp_path.chmod(0o777)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = await omx(
            "doctor",
            OMX_ORIGIN_ENABLED="0",
            OMX_CONTENT_RESERVE_BYTES=str(10**18),
            OMX_API=f"127.0.0.1:{taken.getsockname()[1]}",
            OMX_LISTEN="/ip4/127.0.0.1/tcp/0",
        )
    assert ended.code == 4
    assert "FAIL  secrets: others may read node-key" in ended.out
    assert f"chmod 600 '{tmp_path}/node-key'" in ended.out
    assert f"chmod 700 '{tmp_path}'" in ended.out
    assert "choose another with --api" in ended.out
    assert "FAIL  disk" in ended.out

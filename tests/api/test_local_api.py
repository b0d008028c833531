"""The API over real sockets on loopback, used through LocalClient."""

import fcntl
import json
import os
import socket
import stat

import pytest
import trio

from ollamamax_p2p.api import ApiSettings, LocalClient, open_api
from ollamamax_p2p.content import CreationRequest
from ollamamax_p2p.errors import (
    BadInput,
    BadModelFile,
    BadName,
    LocalTrouble,
    ModelNotFound,
    NodeNotRunning,
    NoSources,
    PortInUse,
    TicketMistyped,
)
from ollamamax_p2p.observability import Event
from ollamamax_p2p.transfer import PullProgress
from tests.api.ram_node import OTHER_PEER, PEER, RamNode, at_once, progress
from tests.api.store_node import StoreNode, serving
from tests.content.model_files import gguf_file

pytestmark = pytest.mark.network


async def test_the_client_sees_what_the_node_sees(served):
    assert await served.client.status() == await served.node.status()
    assert await served.client.peers() == await served.node.peers()
    assert await served.client.models() == ()


async def test_models_are_imported_created_shown_copied_and_removed(served, tmp_path):
    imported = await served.client.import_model(tmp_path / "a.gguf", "tiny")
    assert imported.name == "tiny:latest"
    assert (await served.client.create_model("made", "FROM tiny", tmp_path)).size == 9
    assert (await served.client.show("tiny")).license == "MIT"
    await served.client.copy("tiny", "other")
    await served.client.remove("tiny")
    assert {model.name for model in await served.client.models()} == {"made:latest", "other:latest"}


async def test_invite_join_leave_and_stop_reach_the_node(served):
    invitation = await served.client.invite(uses=3, expires_s=60)
    assert (invitation.ticket, invitation.uses) == ("omx1ticket", 3)
    assert (await served.client.join(["omx1ticket"])).peers == (OTHER_PEER,)
    assert served.node.joined == [("omx1ticket",)]
    assert await served.client.leave() == "left"
    await served.client.stop()
    assert served.node.stop_asked.is_set()


async def test_a_named_error_crosses_as_its_class(served, tmp_path):
    with pytest.raises(ModelNotFound, match="model 'none' not found"):
        await served.client.show("none")
    with pytest.raises(BadModelFile, match="not a GGUF"):
        await served.client.import_model(tmp_path / "a.txt", "tiny")
    with pytest.raises(TicketMistyped, match="checksum"):
        await served.client.join(["omx1broken"])
    with pytest.raises(BadInput, match="uses"):
        await served.client.invite(uses=0, expires_s=60)


async def test_a_fault_of_ours_is_answered_in_one_line_without_its_text(served, monkeypatch):
    async def broken(name):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(served.node, "show", broken)
    status, _, body = await served.raw("POST", "/omx/v1/models/show", b'{"model":"x"}')
    assert status == 500
    assert json.loads(body)["code"] == "internal_error"
    assert b"secret detail" not in body


# -- pulls ------------------------------------------------------------------------------------


async def test_a_pull_streams_its_states_and_ends_with_the_report(served):
    seen = []
    report = await served.client.pull("tiny", on_progress=seen.append)
    assert report.model == "tiny:latest"
    assert report.sources[0].name == OTHER_PEER
    assert seen[0] == PullProgress(status="pulling manifest")
    assert seen[-1] == progress(100)


async def test_an_error_before_the_first_state_has_its_status(served):
    async def nobody(name, tell):
        raise NoSources(name, "nobody holds it")

    served.node.script = nobody
    status, headers, body = await served.raw("POST", "/omx/v1/pull", b'{"model":"tiny"}')
    assert status == 502
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["code"] == "no_sources"


async def test_an_error_in_the_stream_is_its_last_line(served):
    async def breaks_off(name, tell):
        tell(progress(10))
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("as a nursery raises it", [NoSources(name, "everybody left")])

    served.node.script = breaks_off
    status, headers, body = await served.raw("POST", "/omx/v1/pull", b'{"model":"tiny"}')
    assert status == 200
    assert headers["content-type"] == "application/x-ndjson"
    assert json.loads(body.splitlines()[-1])["code"] == "no_sources"
    with pytest.raises(NoSources, match="everybody left"):
        await served.client.pull("tiny")


async def test_a_bad_name_is_refused_before_the_pull_begins(served):
    with pytest.raises(BadName):
        await served.client.pull("a/b/c/d/e")
    assert served.node.pulls_begun == 0


async def test_the_last_client_to_leave_stops_the_pull(served):
    async def endless(name, tell):
        tell(progress(1))
        await trio.sleep_forever()

    served.node.script = endless
    async with trio.open_nursery() as nursery:
        begun = [trio.Event(), trio.Event()]
        scopes = [trio.CancelScope(), trio.CancelScope()]

        async def watch(index, name):
            with scopes[index]:
                await served.client.pull(name, on_progress=lambda _: begun[index].set())

        nursery.start_soon(watch, 0, "tiny")
        await begun[0].wait()
        nursery.start_soon(watch, 1, "TINY:latest")  # the same model, spelt otherwise
        await begun[1].wait()
        assert served.node.pulls_begun == 1
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert served.node.pulls_cancelled == 0
        scopes[1].cancel()
        while not served.node.pulls_cancelled:
            await trio.testing.wait_all_tasks_blocked(0.01)
    served.node.script = at_once
    assert (await served.client.pull("tiny")).model == "tiny:latest"


async def test_a_stopping_node_tells_the_watchers_of_a_pull(tmp_path):
    async def endless(name, tell):
        tell(progress(1))
        await trio.sleep_forever()

    node = RamNode(script=endless)
    raised = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            settings = ApiSettings(listen="127.0.0.1:0")
            async with open_api(node, settings, data_dir=tmp_path, peer_id=PEER):
                begun = trio.Event()

                async def watch():
                    try:
                        client = LocalClient.find(tmp_path)
                        await client.pull("tiny", on_progress=lambda _: begun.set())
                    except LocalTrouble as error:
                        raised.append(str(error))

                nursery.start_soon(watch)
                await begun.wait()
    assert "stopping" in raised[0]


# -- events -----------------------------------------------------------------------------------


async def test_events_arrive_over_websocket(served):
    happened = Event(kind="peer.connected", at="2026-11-22T12:00:00Z", facts={"peer": OTHER_PEER})
    async with served.client.events() as events:
        served.node.events.report(happened)
        assert await anext(events) == happened


async def test_a_client_that_leaves_ends_its_subscription(served):
    async with served.client.events():
        assert len(served.node.events._subscriptions) == 1
    while served.node.events._subscriptions:
        await trio.testing.wait_all_tasks_blocked(0.01)


# -- where the node is ------------------------------------------------------------------------


async def test_the_files_that_lead_to_the_node_are_private_and_go_with_it(tmp_path):
    node = RamNode()
    settings = ApiSettings(listen="127.0.0.1:0")
    async with open_api(node, settings, data_dir=tmp_path, peer_id=PEER) as server:
        found = json.loads((tmp_path / "node.json").read_text())
        assert found == {"pid": os.getpid(), "api": server.address, "peer_id": PEER}
        for name in ("node.json", "api-token"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert not list(tmp_path.iterdir())
    with pytest.raises(NodeNotRunning, match="omx up"):
        LocalClient.find(tmp_path)


async def test_a_node_that_was_killed_counts_as_not_running(tmp_path):
    for name, text in (
        ("node.json", '{"pid":4194999,"api":"127.0.0.1:1","peer_id":"x"}'),
        ("api-token", "t" * 43),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    with pytest.raises(NodeNotRunning):
        LocalClient.find(tmp_path)


@pytest.mark.parametrize(
    ("token", "problem"),
    [(None, "has no API; it starts or stops"), ("damaged", "its api-token is damaged; run: kill ")],
)
async def test_a_held_data_folder_is_a_node_whatever_its_files_say(tmp_path, token, problem):
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    if token is not None:
        text = json.dumps({"pid": os.getpid(), "api": "127.0.0.1:1", "peer_id": "x"})
        for name, content in (("node.json", text), ("api-token", token)):
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o600)
    with pytest.raises(NodeNotRunning):  # a lock that nobody holds is only left behind
        LocalClient.find(tmp_path)
    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LocalTrouble, match=problem) as caught:
            LocalClient.find(tmp_path)
        assert f"a node (process {os.getpid()}) runs on {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("terms", [{"uses": 257}, {"uses": 0}, {"expires_s": 367 * 86_400.0}])
async def test_an_invitation_beyond_its_limits_is_refused(served, terms):
    with pytest.raises(BadInput, match=next(iter(terms))):
        await served.client.invite(**terms)


async def test_an_address_where_nobody_listens_is_not_a_node():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = LocalClient(f"127.0.0.1:{unused.getsockname()[1]}", "t")
        with pytest.raises(NodeNotRunning):
            await client.status()


async def test_another_nodes_token_is_told_apart_from_a_missing_node(served):
    stranger = LocalClient(served.server.address, "wrong")
    with pytest.raises(LocalTrouble, match="another --data-dir"):
        await stranger.status()
    with pytest.raises(LocalTrouble, match="another --data-dir"):
        async with stranger.events():
            pass


async def test_a_port_that_is_taken_is_named(served, tmp_path):
    settings = ApiSettings(listen=served.server.address)
    with pytest.raises(PortInUse, match="--api"):
        async with open_api(RamNode(), settings, data_dir=tmp_path / "b", peer_id=PEER):
            pass


async def test_a_push_reports_like_a_pull_and_its_errors_cross(tmp_path):
    node = StoreNode()
    async with serving(node, tmp_path) as served:
        digest = await node.store.put(gguf_file({"w": bytes(64)}))
        await node.create_from_request("tiny", CreationRequest(files={"a": digest}))
        states = []
        report = await served.client.push("tiny", on_progress=states.append)
        assert (report.model, report.bytes_sent) == ("tiny:latest", report.bytes_total)
        assert [states[0].status, states[-1].status] == ["retrieving manifest", "success"]
        assert list(node.origin.manifests) == ["registry.ollama.ai/library/tiny:latest"]
        with pytest.raises(ModelNotFound):
            await served.client.push("none")
        with pytest.raises(BadName):
            await served.client.push("a b")

"""A machine that is not as it should be: one line each, saying what, where and what to do."""

import hashlib
import json
import random
import socket
from pathlib import Path

import pytest
import trio

from ollamamax_p2p.errors import StoreFull, TicketExpired
from ollamamax_p2p.host import HostSettings, open_connections, open_libp2p_host
from ollamamax_p2p.identity import Membership
from ollamamax_p2p.testing.agreed_members import AgreedMembers
from tests.network.processes import (
    closed_folder,
    error_line,
    fill,
    loopback_only,
    no_network,
    omx,
    read_only,
    small_disk,
    up,
)
from tests.node.nodes import MiB, model_file, node_at, tree_of, until

pytestmark = pytest.mark.network

NAME = "tiny"


@pytest.fixture(autouse=True)
async def deadline():
    with trio.fail_after(150):
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


# -- the disk ----------------------------------------------------------------------------------


@pytest.mark.counterpart
async def test_a_disk_that_fills_up_during_a_pull_is_named_and_the_pull_resumes(tmp_path):
    seed = tmp_path / "seed"
    file = model_file(tmp_path / "m.safetensors", size=96 * MiB)
    with small_disk(tmp_path / "disk", 112 * MiB) as disk:
        async with up(seed) as announced:
            assert (await omx(seed, "import", str(file), NAME)).code == 0
            ticket = announced["invitation"]["ticket"]
            models = {"OMX_MODELS": str(disk / "models")}
            async with up(tmp_path / "puller", "join", ticket, **models):
                async with trio.open_nursery() as nursery:
                    ballast = await nursery.start(_fill_when_bytes_arrive, disk)
                    ended = await omx(tmp_path / "puller", "pull", NAME, **models)
                    nursery.cancel_scope.cancel()
                told = error_line(ended)
                assert ended.code == 4
                assert f"not enough room in {disk / 'models'}" in told
                assert "run the same command again, it resumes" in told
                assert_blobs_are_right(disk / "models")
                assert not list((disk / "models" / "manifests").rglob("latest"))
                ballast[0].unlink()
                ended = await omx(tmp_path / "puller", "pull", NAME, "--json", **models)
                assert ended.code == 0, ended.err
                report = json.loads(ended.out.splitlines()[-1])["report"]
                assert report["bytes_fetched"] < report["bytes_total"] - MiB
        assert_blobs_are_right(disk / "models")
        assert list((disk / "models" / "manifests").rglob("latest"))


def assert_blobs_are_right(models: Path) -> None:
    for blob in (models / "blobs").iterdir():
        assert blob.name == f"sha256-{hashlib.sha256(blob.read_bytes()).hexdigest()}"


async def _fill_when_bytes_arrive(disk: Path, *, task_status) -> None:
    ballast: list[Path] = []
    task_status.started(ballast)
    while _written(disk) < 4 * MiB:  # noqa: ASYNC110 - a file grows in another process
        await trio.sleep(0.005)
    ballast.append(fill(disk))


def _written(disk: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in disk.rglob("sha256-*") if path.is_file())


@pytest.mark.counterpart
async def test_too_little_room_is_said_before_the_first_byte(tmp_path):
    file = model_file(tmp_path / "m.safetensors", size=8 * MiB)
    with small_disk(tmp_path / "disk", 4 * MiB) as disk:
        async with up(tmp_path / "seed") as announced:
            assert (await omx(tmp_path / "seed", "import", str(file), NAME)).code == 0
            ticket = announced["invitation"]["ticket"]
            models = {"OMX_MODELS": str(disk / "models")}
            async with up(tmp_path / "puller", "join", ticket, **models):
                ended = await omx(tmp_path / "puller", "pull", NAME, **models)
                assert (ended.code, _written(disk)) == (4, 0)
                assert f"not enough room in {disk / 'models'}" in error_line(ended)
        ended = await omx(tmp_path / "alone", "import", str(file), NAME, **models)
        assert (ended.code, _written(disk)) == (4, 0)
        assert f"not enough room in {disk / 'models'}" in error_line(ended)


@pytest.mark.counterpart
async def test_a_join_that_cannot_be_saved_leaves_the_old_swarm_on_disk(tmp_path):
    with small_disk(tmp_path / "b", 40 * MiB) as disk:
        async with node_at(tmp_path / "a") as a, node_at(disk) as b:
            swarm, ticket = (await b.status()).swarm_id, (await a.invite()).ticket
            record = (disk / "data" / "swarm").read_bytes()
            ballast = fill(disk)
            with pytest.raises(StoreFull, match="not enough room"):
                await b.join([ticket])
            assert (await b.status()).swarm_id == swarm
            assert (disk / "data" / "swarm").read_bytes() == record
            ballast.unlink()
            report = await b.join([ticket])  # the same one, by the same node
            assert report.swarm_id == (await a.status()).swarm_id


@pytest.mark.counterpart
async def test_a_full_data_folder_is_named_and_does_not_hide_the_models(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    models = {"OMX_MODELS": str(tmp_path / "models")}
    with small_disk(tmp_path / "disk", 24 * MiB) as disk:
        fill(disk)
        ended = await omx(disk / "data", "up", **models)
        assert ended.code == 4
        assert f"not enough room in {disk / 'data'}" in error_line(ended)
        (disk / "ballast").unlink()
        assert (await omx(disk / "data", "import", str(file), NAME, **models)).code == 0
        fill(disk)
        ended = await omx(disk / "data", "up", **models)
        assert ended.code == 4
        assert f"not enough room in {disk / 'data'}" in error_line(ended)
        assert not (disk / "data" / "node.json").exists()
        listed = await omx(disk / "data", "list", **models)
        assert (listed.code, listed.err) == (0, "")
        assert f"{NAME}:latest" in listed.out


@pytest.mark.counterpart
async def test_a_store_that_cannot_be_written_is_named_and_still_served(tmp_path):
    file = model_file(tmp_path / "m.safetensors")
    source = tmp_path / "source"
    made = await omx(tmp_path / "maker", "import", str(file), "old", OMX_MODELS=str(source))
    assert made.code == 0
    (tmp_path / "Modelfile").write_text("FROM old")
    with read_only(source, tmp_path / "models") as models:
        before = tree_of(models)
        store = {"OMX_MODELS": str(models)}
        async with up(tmp_path / "seed", OMX_MODELS=str(tmp_path / "other")) as announced:
            assert (await omx(tmp_path / "seed", "import", str(file), NAME)).code == 0
            ticket = announced["invitation"]["ticket"]
            async with up(tmp_path / "d", "join", ticket, **store):
                for line in (
                    ("pull", NAME),
                    ("import", str(file), "new"),
                    ("create", "new", "-f", str(tmp_path / "Modelfile")),
                    ("cp", "old", "new"),
                    ("rm", "old"),
                ):
                    ended = await omx(tmp_path / "d", *line, **store)
                    assert ended.code == 4, line
                    told = error_line(ended)
                    assert f"{models} is read-only" in told, line
                    assert "--models" in told
                assert "old:latest" in (await omx(tmp_path / "d", "list", **store)).out
            # And with the node's own partial files in a folder that could be written.
            assert (await omx(tmp_path / "d", "pull", NAME, **store)).code == 4
        assert tree_of(models) == before


@pytest.mark.counterpart
async def test_a_data_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "source").mkdir()
    with read_only(tmp_path / "source", tmp_path / "ro") as folder:
        for line in (("up",), ("pull", NAME), ("list",)):
            ended = await omx(folder / "data", *line)
            assert ended.code == 4
            assert f"cannot write {folder / 'data'}" in error_line(ended)


@pytest.mark.counterpart
async def test_a_folder_that_this_user_may_not_enter_is_named(tmp_path):
    """As the store of Ollama's own service is to everybody but its user."""
    data, modelfile = tmp_path / "data", tmp_path / "Modelfile"
    with closed_folder(tmp_path / "closed") as runner:
        file, models = tmp_path / "closed" / "m.gguf", tmp_path / "closed" / "models"
        modelfile.write_text(f"FROM {file}\n")
        for line in (("import", str(file), NAME), ("create", NAME, "-f", str(modelfile))):
            ended = await omx(data, *line, within=runner)
            assert ended.code == 4
            assert f"cannot read {file}: permission denied" in error_line(ended)
        ended = await omx(data, "list", within=runner, OMX_MODELS=str(models))
        assert ended.code == 4
        assert f"cannot use {models}" in error_line(ended)
        ended = await omx(data, "doctor", "--json", within=runner, OMX_MODELS=str(models))
        assert (ended.code, ended.err) == (4, "")
        [found] = [each for each in json.loads(ended.out)["findings"] if each["check"] == "models"]
        assert found["verdict"] == "fail"
        assert found["text"] == f"{models} cannot be reached: permission denied"
        assert "enter every folder above it" in found["mend"]


async def test_a_file_in_the_place_of_the_data_folder_is_named(data):
    data.write_text("not a folder")
    ended = await omx(data, "up")
    assert ended.code == 2
    told = error_line(ended)
    assert str(data) in told
    assert "permission" not in told
    assert data.read_text() == "not a folder"


async def test_a_key_that_others_can_read_is_named_with_the_command_that_mends_it(data):
    assert (await omx(data, "list")).code == 0
    for name in ("node-key", "swarm"):
        (data / name).chmod(0o644)
        ended = await omx(data, "up")
        assert ended.code == 4
        assert f"chmod 600 '{data / name}'" in error_line(ended)
        (data / name).chmod(0o600)
    assert (await omx(data, "list")).code == 0


# -- ports -------------------------------------------------------------------------------------


async def test_a_taken_port_is_named_with_the_flag_that_chooses_another(data):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for setting, value, flag in (
            ("OMX_LISTEN", f"/ip4/127.0.0.1/tcp/{port}", "--listen"),
            ("OMX_LISTEN", f"/ip4/0.0.0.0/tcp/{port}", "--listen"),
            ("OMX_API", f"127.0.0.1:{port}", "--api"),
        ):
            ended = await omx(data, "up", **{setting: value})
            assert ended.code == 4
            told = error_line(ended)
            assert f"{value} is already in use" in told
            assert flag in told
            assert not (data / "node.json").exists()


# -- a node that runs ------------------------------------------------------------------------


async def test_a_running_node_that_is_given_a_bad_ticket_says_so_and_runs_on(tmp_path):
    issuer, node, other = (tmp_path / name for name in ("issuer", "node", "other"))
    async with up(issuer) as announced, up(node) as before:
        ticket = announced["invitation"]["ticket"]
        mistyped = ticket[:-1] + ("a" if ticket[-1] != "a" else "b")
        async with up(other, "join", ticket):
            for bad, said in ((ticket, "has been used 1 of 1 times"), (mistyped, "copy it again")):
                ended = await omx(node, "join", bad)
                assert ended.code == 2
                assert said in error_line(ended)
        ended = await omx(node, "join", announced["status"]["addresses"][0])
        assert ended.code == 5
        assert "its swarm is private: join with a ticket" in error_line(ended)
        status = json.loads((await omx(node, "status", "--json")).out)
        assert status["swarm_id"] == before["status"]["swarm_id"]
        assert (await omx(node, "invite")).code == 0
        assert "Traceback" not in before["stderr"].read_text()


# -- the clock ---------------------------------------------------------------------------------

NOW = 1_790_000_000.0
HOUR = 3_600.0


@pytest.mark.parametrize(
    ("jumps", "good"),
    [
        ([0], True),
        ([-30], True),  # what NTP mends
        ([2 * HOUR], False),
        ([2 * HOUR, 0], False),  # it has been later: the ticket's time does not come back
        ([-2 * HOUR], True),  # a machine that woke without its clock: the cluster knows better
    ],
)
async def test_a_clock_that_jumps_gives_no_ticket_more_time(jumps, good):
    clock = [NOW]
    membership = Membership.create(None)
    settings = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
    members = AgreedMembers(lambda: clock[0])

    def connected(host, membership):
        return open_connections(
            host, membership, settings, rng=random.Random(1), feed=None, agent="test",
            wall_clock=lambda: clock[0], gate=members,
        )  # fmt: skip

    async with (
        open_libp2p_host(b"a" * 32, settings, swarm_key=membership.swarm_key) as issuer,
        connected(issuer, membership),
        open_libp2p_host(b"b" * 32, settings, swarm_key=membership.swarm_key) as guest,
        connected(guest, None) as connections,
    ):
        members.add(issuer.peer_id)
        ticket = membership.new_ticket(issuer.addresses, uses=1, lifetime_s=int(HOUR), now=NOW)
        members.issue(ticket, uses=1)
        for jump in jumps[:-1]:
            clock[0] = NOW + jump
            with pytest.raises(TicketExpired):
                await connections.redeem(ticket)
            await until(lambda: not guest.connections())
        clock[0] = NOW + jumps[-1]
        if good:
            assert (await connections.redeem(ticket)).issuer == issuer.peer_id
        else:
            with pytest.raises(TicketExpired, match=r"expired at 2026-"):
                await connections.redeem(ticket)


# -- the network -------------------------------------------------------------------------------


@pytest.mark.counterpart
async def test_without_any_network_a_pull_says_that_nobody_can_be_asked(data):
    ended = await omx(
        data, "pull", NAME, within=no_network(), OMX_ORIGIN_ENABLED="1", OMX_LISTEN=None,
        OMX_NO_MDNS=None, OMX_ORIGIN_TRIES="2",
    )  # fmt: skip
    told = error_line(ended, besides="multicast DNS does not work")
    assert ended.code == 5
    assert "cannot look up registry.ollama.ai" in told
    assert "check the spelling, the network and the name server" in told
    assert tree_of(data / "models") == {}


@pytest.mark.counterpart
async def test_without_multicast_a_node_says_so_in_a_line_and_runs(data):
    async with up(data, within=no_network(), OMX_NO_MDNS=None, OMX_LISTEN=None) as announced:
        assert announced["status"]["mdns"].startswith("no multicast on this machine")
        assert announced["status"]["peer_id"]
        told = announced["stderr"].read_text()
        assert told.count("multicast DNS does not work") == 1
        assert "join with a ticket, or name peers with --bootstrap" in told
        assert "Traceback" not in told


@pytest.mark.counterpart
async def test_with_nothing_but_loopback_a_node_runs(data):
    async with up(data, within=loopback_only(), OMX_NO_MDNS=None, OMX_LISTEN=None) as announced:
        assert any("/127.0.0.1/" in each for each in announced["status"]["addresses"])
        assert announced["stderr"].read_text() == ""

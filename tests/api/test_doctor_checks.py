"""Each check on a machine made so that it finds something."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trio

from ollamamax_p2p.api import ApiSettings, Finding, doctor_checks, examine_machine
from ollamamax_p2p.content import ContentSettings
from ollamamax_p2p.discovery import DiscoverySettings
from ollamamax_p2p.host import HostSettings
from ollamamax_p2p.transfer import OriginSettings

pytestmark = pytest.mark.network


async def examine(data_dir: Path, clock_origin: str = "http://127.0.0.1:1/", **settings):
    parts = {
        "content": ContentSettings(models=data_dir / "models", reserve_bytes=0),
        "host": HostSettings(listen=("/ip4/127.0.0.1/tcp/0",)),
        "discovery": DiscoverySettings(mdns_interfaces=("127.0.0.1",)),
        "origin": OriginSettings(enabled=clock_origin != ""),
        "api": ApiSettings(listen="127.0.0.1:0"),
    }
    with trio.fail_after(30):
        return await examine_machine(
            data_dir=data_dir, clock_origin=clock_origin, **(parts | settings)
        )


def verdicts(findings: list[Finding], check: str) -> list[str]:
    return [finding.verdict for finding in findings if finding.check == check]


@pytest.fixture
async def clock(nursery):
    """A web server whose Date is off by so many seconds."""

    async def serve(offset_s: float, zone: str = "GMT") -> str:
        async def answer(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=offset_s), usegmt=True)
            date = date.replace("GMT", zone)
            await stream.send_all(f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\n\r\n".encode())
            await stream.aclose()

        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        return f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"

    return serve


async def test_a_healthy_machine_has_nothing_to_mend(tmp_path, clock):
    findings = await examine(tmp_path, await clock(0))
    assert "fail" not in {finding.verdict for finding in findings}
    assert verdicts(findings, "clock") == ["ok"]
    assert all(finding.mend for finding in findings if finding.verdict in ("warn", "fail"))


@pytest.mark.parametrize("zone", ["-0000", "+0000"])
async def test_a_date_in_another_spelling_of_utc_is_understood(tmp_path, clock, zone):
    assert verdicts(await examine(tmp_path, await clock(0, zone)), "clock") == ["ok"]


@pytest.mark.parametrize("offset_s", [-7200, 7200])
async def test_a_clock_that_is_off_by_hours_fails(tmp_path, clock, offset_s):
    findings = await examine(tmp_path, await clock(offset_s))
    [found] = [finding for finding in findings if finding.check == "clock"]
    assert found.verdict == "fail"
    assert ("ahead of" if offset_s < 0 else "behind") in found.text


async def test_without_a_network_the_clock_is_unknown(tmp_path):
    assert verdicts(await examine(tmp_path), "clock") == ["unknown"]


async def test_files_from_the_future_betray_a_clock_set_back(tmp_path):
    import os

    path = tmp_path / "node-key"
    path.write_text("x")
    path.chmod(0o600)
    later = datetime.now(UTC).timestamp() + 86_400
    os.utime(path, (later, later))
    assert "warn" in verdicts(await examine(tmp_path, clock_origin=""), "clock")


async def test_mdns_that_is_off_is_not_tried_and_a_foreign_interface_is_told(tmp_path):
    off = DiscoverySettings(mdns=False)
    assert verdicts(await examine(tmp_path, discovery=off), "mDNS") == ["ok"]
    foreign = DiscoverySettings(mdns_interfaces=("192.0.2.7",))
    assert verdicts(await examine(tmp_path, discovery=foreign), "mDNS") == ["warn"]


async def test_folders_that_cannot_be_made_are_told(tmp_path):
    (tmp_path / "file").touch()
    findings = await examine(tmp_path / "file" / "omx")
    assert verdicts(findings, "data folder") == ["fail"]
    assert verdicts(findings, "models") == ["fail"]


async def test_folders_that_cannot_be_looked_at_are_told(tmp_path):
    beyond = tmp_path / ("x" * 300)  # no file system has such names, and stat() says so
    findings = await examine(beyond / "omx")
    for check in ("data folder", "models"):
        [found] = [finding for finding in findings if finding.check == check]
        assert found.verdict == "fail"
        assert "cannot be reached: file name too long" in found.text
        assert found.mend


def test_an_old_libp2p_is_told_by_number():
    assert doctor_checks._numbers("0.8.0") < (0, 8, 1) <= doctor_checks._numbers("0.10.0")
    assert doctor_checks._numbers("unknown") > (0, 8, 1)

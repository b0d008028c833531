"""How fast a model crosses from one node to another on loopback, and what eight cost their seed.

    python benchmarks/bench_pull.py [--json] [--mebibytes N]

Real node processes with stores on disk, private swarm, every chunk verified. The probes beside it
say what this machine's loopback, disk and hash could do at best; the second figure's bar is 2.5.
"""

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.network.forking import Forker
from tests.network.test_pull_under_fire import NAME, make_model, wait_for

MiB = 1024 * 1024
PULLERS = 8


def loopback_mb_per_s(size: int = 512 * MiB) -> float:
    """One plain TCP connection, 1 MiB writes, one thread each side."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname()) as out:
                data = bytes(MiB)
                for _ in range(size // MiB):
                    out.sendall(data)

        sender = threading.Thread(target=send)
        sender.start()
        with server.accept()[0] as connection:
            begun, buffer = time.perf_counter(), bytearray(MiB)
            while connection.recv_into(buffer):
                pass
            seconds = time.perf_counter() - begun
        sender.join()
    return size / 1e6 / seconds


def fsync_ms(folder: Path, count: int = 50) -> float:
    """One 4 KiB write and fsync."""
    with (folder / "probe").open("wb") as file:
        begun = time.perf_counter()
        for _ in range(count):
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - begun) * 1000 / count


def sha256_mb_per_s(size: int = 256 * MiB) -> float:
    """One thread."""
    data = bytes(size)
    begun = time.perf_counter()
    hashlib.sha256(data).digest()
    return size / 1e6 / (time.perf_counter() - begun)


def pull(folder: Path, mebibytes: int, pullers: int) -> dict[str, float]:
    """Let so many processes pull from one seed at once."""
    model = folder / "model.safetensors"
    size = make_model(model, mebibytes * MiB, seed=mebibytes)
    with Forker() as forker:
        seed = forker.fork(
            "seed", folder / "seed.said", folder=str(folder / "seed"), model=str(model),
            name=NAME, uses=pullers,
        )  # fmt: skip
        ticket = wait_for(seed, "ticket")["ticket"]
        children = [
            forker.fork(
                "pull", folder / f"{i}.said", folder=str(folder / f"p{i}"), ticket=ticket,
                name=NAME, stay=True,
            )
            for i in range(pullers)
        ]  # fmt: skip
        reports = [wait_for(child, "pulled", deadline_s=600) for child in children]
        time.sleep(0.3)  # the seed tells its count ten times a second
        uploaded = max(line["uploaded"] for line in seed.lines() if "uploaded" in line)
    slowest = max(report["seconds"] for report in reports)
    return {
        "mb_per_s": size / 1e6 / slowest,
        "seed_upload_ratio": uploaded / size,
        "refetched_share": sum(report["refetched"] for report in reports) / (size * pullers),
    }


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    parser.add_argument("--mebibytes", type=int, default=200, help="the model's size, at most 255")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        probes = {
            "loopback_mb_per_s": loopback_mb_per_s(),
            "sha256_mb_per_s": sha256_mb_per_s(),
            "fsync_ms": fsync_ms(folder),
        }
        (folder / "one").mkdir()
        (folder / "eight").mkdir()
        one = pull(folder / "one", arguments.mebibytes, 1)
        eight = pull(folder / "eight", 98, PULLERS)
    about = {
        "machine": f"{platform.machine()} x{os.cpu_count()}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "libp2p": version("libp2p"),
        "commit": commit(),
    }
    figures = {
        "one seed to one node, MB/s": one["mb_per_s"],
        "one seed to eight nodes, MB/s at the slowest": eight["mb_per_s"],
        "seed's upload for eight, x the model (bar < 2.5)": eight["seed_upload_ratio"],
        "fetched more than once by the eight, share": eight["refetched_share"],
        **{f"probe: {key}": value for key, value in probes.items()},
    }
    if arguments.json:
        for figure, value in figures.items():
            print(json.dumps({"figure": figure, "value": round(value, 4), **about}))
        return
    print(" · ".join(f"{key} {value}" for key, value in about.items()))
    for figure, value in figures.items():
        print(f"{value:10.2f}  {figure}")


if __name__ == "__main__":
    main()

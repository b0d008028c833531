"""How long `omx --help` takes, beside a bare interpreter. Bar: at most 150 ms more.

python benchmarks/bench_help.py [--json] [--runs N]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

BAR_MS = 150.0
LINES = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "omx --help": [sys.executable, "-m", "omx_cli", "--help"],
    "omx pull --help": [sys.executable, "-m", "omx_cli", "pull", "--help"],
    "omx config show": [sys.executable, "-m", "omx_cli", "config", "show"],
}


def milliseconds(line: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return (time.perf_counter() - begun) * 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    # Turn by turn, so that whatever else the machine does falls on all of them alike.
    taken: dict[str, list[float]] = {name: [] for name in LINES}
    for _ in range(arguments.runs):
        for name, line in LINES.items():
            taken[name].append(milliseconds(line))
    bare = statistics.median(taken["bare interpreter"])
    python = platform.python_version()
    if not arguments.json:
        print(f"{platform.platform(terse=True)}, Python {python}, {arguments.runs} runs, median")
    for name, runs in taken.items():
        median = statistics.median(runs)
        if arguments.json:
            figure = {"what": name, "ms": round(median, 1), "ratio": round(median / bare, 2)}
            print(json.dumps({**figure, "python": python}))
        else:
            print(f"{name:<18}{median:7.0f} ms {median / bare:6.1f} x  +{median - bare:.0f} ms")
    over = statistics.median(taken["omx --help"]) - bare
    if over > BAR_MS:
        sys.exit(f"omx --help takes {over:.0f} ms more than a bare interpreter; bar {BAR_MS:.0f}")


if __name__ == "__main__":
    main()

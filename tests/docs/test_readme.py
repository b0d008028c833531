"""The README's example runs, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.content.model_files import real_model

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()


@pytest.mark.network
def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    settings = {
        "OMX_DATA_DIR": str(tmp_path / "data"),
        "OMX_MODELS": str(tmp_path / "models"),
        "OMX_LISTEN": "/ip4/127.0.0.1/tcp/0",
        "OMX_NO_MDNS": "1",
        "OMX_CONTENT_RESERVE_BYTES": "0",
        "OMX_INFERENCE_THREADS": "1",
        "PATH": "",
    }
    # The model is here before, so that the example needs no swarm and no internet.
    subprocess.run(
        [sys.executable, "-m", "omx_cli", "import", str(real_model()), "smollm2:135m"],
        env=settings,
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", example], env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "0 bytes from 0 sources"
    assert done.stdout.splitlines()[1].startswith("smollm2:135m ")
    assert len("".join(done.stdout.splitlines()[2:]).split()) >= 2, "the model said nothing"


def test_every_command_it_names_exists() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "omx_cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"^  ([a-z]+) ", helped, re.MULTILINE))
    named = set(re.findall(r"^omx ([a-z]+)", README, re.MULTILINE))
    assert named
    assert named <= known


def test_every_file_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (PROJECT / link).exists()] == []

"""A whole node, its store on a disk and a real registry behind it, driven by PyPI's ollama."""

import json
import os
import sys
from pathlib import Path

import pytest
import trio

from ollamamax_p2p import load_config, open_node
from tests.content.model_files import gguf_file
from tests.network.counterparts import docker_registry

pytestmark = [pytest.mark.network, pytest.mark.counterpart]

CLIENT = """
import json, sys
import ollama
host, path, registry = sys.argv[1:]
client = ollama.Client(host=host)
name = registry + "/lab/mine:1"
client.create("mine", files={"m.gguf": client.create_blob(path)}, system="Hi")
client.copy("mine", name)
pushed = [each.status for each in client.push(name, insecure=True, stream=True)]
kept = client.show(name).modelfile
client.delete(name)
client.delete("mine")
empty = [each.model for each in client.list().models]
pulled = [(each.status, each.digest, each.completed) for each in
          client.pull(name, insecure=True, stream=True)]
shown = client.show(name)
client.create("next", from_=name, system="Ho")
try:
    client.pull(registry + "/lab/none:1", insecure=True)
except ollama.ResponseError as error:
    missing = [error.status_code, error.error]
print(json.dumps({"pushed": pushed, "empty": empty, "pulled": pulled,
    "system": "SYSTEM Hi\\n" in shown.modelfile, "same": shown.modelfile == kept,
    "missing": missing,
    "names": [each.model for each in client.list().models]}))
"""


async def test_a_model_is_uploaded_pushed_deleted_and_pulled_again(tmp_path: Path) -> None:
    pytest.importorskip("ollama", reason="needs ollama: pip install ollama")
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_file({"w": bytes(300_000)}, {"llama.context_length": 64}))
    with trio.fail_after(60):
        async with docker_registry(tmp_path) as registry:
            flags = {
                "data_dir": str(tmp_path / "data"),
                "content.models": str(tmp_path / "models"),
                "content.reserve_bytes": 0,
                "host.listen": ["/ip4/127.0.0.1/tcp/0"],
                "discovery.mdns": False,
                "api.listen": "127.0.0.1:0",
                "origin.allow_private": [registry],
            }
            config = load_config(environment={}, flags=flags)
            async with open_node(config, serve_api=True) as node:
                run = await trio.run_process(
                    [
                        sys.executable,
                        "-c",
                        CLIENT,
                        f"http://{node.api_address}",
                        str(file),
                        registry,
                    ],
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                    env={**os.environ, "NO_PROXY": "*"},
                )
                assert run.returncode == 0, run.stderr.decode()
                found = json.loads(run.stdout)
                left = [path.name for path in (tmp_path / "models").rglob("new-*")]
    name = f"{registry}/lab/mine:1"
    assert found["pushed"][0] == "retrieving manifest"
    assert found["pushed"][-2:] == ["pushing manifest", "success"]
    assert found["empty"] == []
    statuses = [status for status, _, _ in found["pulled"]]
    assert statuses[0] == "pulling manifest"
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    assert {status.split()[0] for status in statuses[1:-3]} == {"pulling"}
    assert (found["system"], found["same"]) == (True, True)
    assert found["names"] == ["next:latest", name]
    assert found["missing"] == [500, "pull model manifest: file does not exist"]
    assert left == []

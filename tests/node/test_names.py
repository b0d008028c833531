"""Names on a whole node: given to another model, and asked of nobody."""

import pytest

from ollamamax_p2p.errors import NoSources
from tests.node.nodes import model_file, node_at

pytestmark = pytest.mark.network


async def test_a_name_that_is_given_to_another_model_frees_the_old_ones_room(tmp_path):
    async with node_at(tmp_path) as node:
        old = await node.import_model(model_file(tmp_path / "old.safetensors", seed=1), "old")
        new = await node.import_model(model_file(tmp_path / "new.safetensors", seed=2), "new")
        kept = {layer.digest for layer in (await node.show("new")).layers}
        gone = {layer.digest for layer in (await node.show("old")).layers} - kept
        await node.copy("new", "old")
        assert {model.digest for model in await node.models()} == {new.digest} != {old.digest}
        held = {path.name for path in (tmp_path / "models" / "blobs").iterdir()}
        assert gone
        assert held == {digest.replace(":", "-") for digest in kept}
        await node.copy("old", "old")
        assert {path.name for path in (tmp_path / "models" / "blobs").iterdir()} == held


async def test_without_an_origin_and_without_members_there_is_nobody_to_ask(tmp_path):
    async with node_at(tmp_path) as node:
        for name in ("some:model", "registry.test/a/b:c"):
            with pytest.raises(NoSources, match="no member of the swarm can be reached"):
                await node.pull(name)

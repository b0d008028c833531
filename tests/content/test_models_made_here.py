"""Models made from files and Modelfiles, on the store in memory unless the disk matters."""

import json
import os

import pytest

from ollamamax_p2p.content import (
    ContentSettings,
    RamStore,
    create_model,
    describe_model,
    import_model,
    open_disk_store,
    read_model,
)
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.manifest import (
    ADAPTER_TYPE,
    CONFIG_TYPE,
    DRAFT_TYPE,
    LICENSE_TYPE,
    MESSAGES_TYPE,
    MODEL_TYPE,
    PARAMS_TYPE,
    PROJECTOR_TYPE,
    SYSTEM_TYPE,
    TEMPLATE_TYPE,
    Layer,
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.content.core.modelfile import Message
from ollamamax_p2p.errors import (
    AccessRefused,
    BadModelFile,
    ModelNotFound,
    StoreDamaged,
    StoreReadOnly,
)
from tests.content.model_files import gguf_file, real_model, safetensors_file

NAME = parse_model_name("tiny")
METADATA = {
    "general.name": "Tiny",
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "tokenizer.chat_template": "{% if tools %}<think>{% endif %}",
    "tokenizer.ggml.tokens": ["a", "b"] * 1000,
}
WEIGHTS = {"output.weight": bytes(1500)}


@pytest.fixture
def store():
    return RamStore()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(gguf_file(WEIGHTS, METADATA))
    return tmp_path


async def blob(store, digest) -> bytes:
    async with await store.open(digest) as reader:
        return await reader.read_at(0, reader.size)


async def test_an_imported_gguf_is_a_model_as_ollama_writes_it(store, folder):
    manifest = await import_model(store, folder / "model.gguf", NAME)
    raw = (folder / "model.gguf").read_bytes()
    assert manifest.layers == (Layer(MODEL_TYPE, digest_of(raw), len(raw)),)
    assert (
        await blob(store, manifest.config.digest)
        == (
            '{"model_format":"gguf","model_family":"llama","model_families":["llama"],'
            '"model_type":"2K","file_type":"Q4_K_M","architecture":"amd64","os":"linux",'
            '"rootfs":{"type":"layers","diff_ids":["' + digest_of(raw) + '"]}}\n'
        ).encode()
    )
    assert await store.manifest(NAME) == manifest


async def test_an_imported_safetensors_file_is_a_model_too(store, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file(WEIGHTS))
    await import_model(store, path, NAME)
    described = await describe_model(store, NAME)
    assert (described["format"], described["quantization"]) == ("safetensors", "I8")
    assert described["parameter_size"] == "2K"
    assert (described["architecture"], described["context_length"]) == ("", 0)
    content = await read_model(store, NAME)
    assert content.config["model_families"] is None
    assert content.model_info == {}


MODELFILE = '''FROM ./model.gguf
TEMPLATE """{{ .Tools }}{{ .Prompt }}{{ .Suffix }}"""
SYSTEM You are "small" & <quick>.
PARAMETER temperature 0.7
PARAMETER num_ctx 4096
PARAMETER stop <|im_end|>
LICENSE MIT
MESSAGE user hi
MESSAGE assistant ho
'''


async def test_a_modelfile_becomes_layers(store, folder):
    manifest = await create_model(store, NAME, MODELFILE, folder)
    assert [layer.media_type for layer in manifest.layers] == [
        MODEL_TYPE,
        TEMPLATE_TYPE,
        SYSTEM_TYPE,
        LICENSE_TYPE,
        PARAMS_TYPE,
        MESSAGES_TYPE,
    ]
    texts = [await blob(store, layer.digest) for layer in manifest.layers[1:]]
    assert texts == [
        b"{{ .Tools }}{{ .Prompt }}{{ .Suffix }}",
        b'You are "small" & <quick>.',
        b"MIT",
        b'{"num_ctx":4096,"stop":["\\u003c|im_end|\\u003e"],"temperature":0.7}\n',
        b'[{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}]\n',
    ]
    config = json.loads(await blob(store, manifest.config.digest))
    assert config["rootfs"]["diff_ids"] == [layer.digest for layer in manifest.layers]


async def test_a_model_is_described_as_ollama_shows_it(folder):
    settings = ContentSettings(reserve_bytes=0)
    async with open_disk_store(folder / "models", folder / "side", settings) as store:
        manifest = await create_model(store, NAME, MODELFILE, folder)
        described = await describe_model(store, parse_model_name("TINY"))
        content = await read_model(store, NAME)
    modified_at = described.pop("modified_at")
    assert modified_at.tzinfo is not None
    path = folder / "models/blobs" / manifest.layers[0].digest.replace(":", "-")
    assert described == {
        "name": "tiny:latest",
        "digest": manifest.digest,
        "size": manifest.size,
        "format": "gguf",
        "architecture": "llama",
        "parameter_size": "2K",
        "quantization": "Q4_K_M",
        "context_length": 2048,
        "embedding_length": 64,
        "capabilities": ("completion", "tools", "insert"),
        "license": "MIT",
        "modelfile": '# Modelfile generated by "omx show"\n'
        "# To build a new Modelfile based on this, replace FROM with:\n"
        "# FROM tiny:latest\n\n"
        f"FROM {path}\n"
        "TEMPLATE {{ .Tools }}{{ .Prompt }}{{ .Suffix }}\n"
        'SYSTEM You are "small" & <quick>.\n'
        "PARAMETER num_ctx 4096\nPARAMETER stop <|im_end|>\nPARAMETER temperature 0.7\n"
        "LICENSE MIT\nMESSAGE user hi\nMESSAGE assistant ho\n",
        "parameters": "num_ctx                        4096\n"
        'stop                           "<|im_end|>"\n'
        "temperature                    0.7",
        "template": "{{ .Tools }}{{ .Prompt }}{{ .Suffix }}",
        "system": 'You are "small" & <quick>.',
    }
    assert content.messages == (Message("user", "hi"), Message("assistant", "ho"))
    assert content.model_info["llama.context_length"] == 2048
    assert content.model_info["general.parameter_count"] == 1500
    assert content.model_info["tokenizer.ggml.tokens"] is None
    assert "tokenizer.chat_template" not in content.model_info


async def test_what_show_gives_makes_the_same_model_again(folder):
    settings = ContentSettings(reserve_bytes=0)
    async with open_disk_store(folder / "models", folder / "side", settings) as store:
        first = await create_model(store, NAME, MODELFILE, folder)
        text = (await describe_model(store, NAME))["modelfile"]
        again = await create_model(store, parse_model_name("again"), text, folder / "elsewhere")
    assert again == first


async def test_a_gguf_without_a_template_is_judged_by_its_own(store, folder):
    await import_model(store, folder / "model.gguf", NAME)
    described = await describe_model(store, NAME)
    assert described["capabilities"] == ("completion", "tools", "thinking")
    assert described["template"] == ""
    assert "TEMPLATE {{ .Prompt }}\n" in described["modelfile"]


async def test_a_model_from_a_model_inherits_and_overrides(store, folder):
    await create_model(store, NAME, MODELFILE + "RENDERER old\nREQUIRES 0.9", folder)
    child = parse_model_name("child")
    text = "FROM tiny\nSYSTEM New.\nPARAMETER top_k 5\nLICENSE more\nRENDERER new"
    manifest = await create_model(store, child, text, folder)
    assert {layer.source for layer in manifest.layers} == {"tiny:latest", ""}
    content = await read_model(store, child)
    assert content.system == "New."
    assert content.template == "{{ .Tools }}{{ .Prompt }}{{ .Suffix }}"
    assert content.licenses == ("MIT", "more")
    assert content.parameters == {
        "num_ctx": 4096, "stop": ["<|im_end|>"], "temperature": 0.7, "top_k": 5}  # fmt: skip
    assert content.messages[0] == Message("user", "hi")
    assert (content.config["renderer"], content.config["requires"]) == ("new", "0.9")
    assert content.config["model_family"] == "llama"


async def test_a_model_that_is_not_here_is_asked_for(store, folder):
    asked = []

    async def fetch(name):
        asked.append(str(name))
        await import_model(store, folder / "model.gguf", name)
        return await store.manifest(name)

    manifest = await create_model(store, NAME, "FROM other:1b\nSYSTEM x", folder, fetch)
    assert asked == ["other:1b"]
    assert manifest.layers[0].source == "other:1b"
    with pytest.raises(ModelNotFound, match="absent"):
        await create_model(store, NAME, "FROM absent", folder)


async def test_making_a_model_again_removes_what_only_the_old_one_needed(store, folder):
    await create_model(store, NAME, MODELFILE, folder)
    await create_model(store, NAME, "FROM tiny\nSYSTEM Other.", folder)
    assert not await store.has(digest_of(b'You are "small" & <quick>.'))
    assert await store.has(digest_of(b"MIT"))


@pytest.mark.parametrize(
    ("metadata", "media_type"),
    [
        ({"general.type": "mmproj"}, PROJECTOR_TYPE),
        ({"general.type": "adapter"}, ADAPTER_TYPE),
        ({"general.architecture": "clip", "clip.has_vision_encoder": True}, PROJECTOR_TYPE),
        ({"llama.vision.block_count": 3}, PROJECTOR_TYPE),
        ({"llama.vision.block_count": 3, "llama.block_count": 3}, MODEL_TYPE),
    ],
)
async def test_a_file_is_the_kind_of_layer_that_it_says(store, folder, metadata, media_type):
    (folder / "part.gguf").write_bytes(gguf_file({"w": b"part"}, metadata))
    text = "FROM ./model.gguf\nFROM ./part.gguf"
    manifest = await create_model(store, NAME, text, folder)
    assert [layer.media_type for layer in manifest.layers] == [MODEL_TYPE, media_type]
    seen = media_type == PROJECTOR_TYPE
    assert ("vision" in (await read_model(store, NAME)).capabilities) is seen


async def test_a_model_that_embeds_or_sees_says_so(store, folder):
    embeds = gguf_file(WEIGHTS, {"llama.pooling_type": 1, "llama.block_count": 1})
    sees = gguf_file(WEIGHTS, {"llama.vision.block_count": 1, "llama.block_count": 1})
    for raw, capabilities in ((embeds, ("embedding",)), (sees, ("completion", "vision"))):
        (folder / "other.gguf").write_bytes(raw)
        await import_model(store, folder / "other.gguf", NAME)
        assert (await read_model(store, NAME)).capabilities == capabilities


async def test_adapters_and_drafts_are_layers_of_their_own(store, folder):
    (folder / "lora.gguf").write_bytes(gguf_file({"a": b"lora"}, {"general.type": "adapter"}))
    (folder / "draft.gguf").write_bytes(gguf_file({"a": b"draft"}))
    text = "FROM ./model.gguf\nADAPTER ./lora.gguf\nDRAFT draft.gguf"
    manifest = await create_model(store, NAME, text, folder)
    assert [layer.media_type for layer in manifest.layers[1:]] == [ADAPTER_TYPE, DRAFT_TYPE]
    content = await read_model(store, NAME)
    assert content.config["draft"] == {"model_format": "gguf", "architecture": "llama"}
    assert "ADAPTER " in (await describe_model(store, NAME))["modelfile"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("FROM ./absent.gguf", "there is no file"),
        ("FROM /no/such/model", "there is no file"),
        ("FROM not/a/valid/name", "no file and no model name"),
        ("FROM .", "is a folder"),
        ("FROM ~nobody-of-that-name/x", "home"),
        ('FROM ""', "needs a file"),
        ("FROM ./model.gguf\nADAPTER absent", "there is no file"),
        ("FROM ./model.gguf\nADAPTER ./weights.safetensors", "not a GGUF"),
        ("FROM ./notes.txt", "not a GGUF or safetensors file"),
        ("FROM ./model.gguf\nADAPTER ./model.gguf", "is no adapter"),
        ("FROM ./fifo", "not a regular file"),
        ("FROM ./model.gguf\nADAPTER ./fifo", "not a regular file"),
        ("FROM ./short.gguf", "cut short"),
    ],
)
async def test_a_modelfile_that_names_no_model_leaves_nothing(store, folder, text, problem):
    (folder / "notes.txt").write_text("notes, not a model")
    (folder / "weights.safetensors").write_bytes(safetensors_file(WEIGHTS))
    (folder / "short.gguf").write_bytes((folder / "model.gguf").read_bytes()[:-1])
    os.mkfifo(folder / "fifo")
    with pytest.raises(BadModelFile, match=problem):
        await create_model(store, NAME, text, folder)
    assert await store.models() == []


async def test_a_file_that_is_not_there_is_not_imported(store, folder):
    with pytest.raises(BadModelFile) as caught:
        await import_model(store, folder / "absent", NAME)
    assert str(caught.value) == f"{folder / 'absent'}: there is no such file"


async def test_a_name_that_no_file_can_have_is_no_file(store, folder):
    with pytest.raises(BadModelFile, match="cannot be read: File name too long"):
        await import_model(store, folder / ("x" * 300), NAME)


async def test_what_is_no_file_is_refused_at_once_and_named_once(store, folder):
    os.mkfifo(folder / "fifo")
    for name, problem in (("fifo", "not a regular file"), (".", "is a folder")):
        with pytest.raises(BadModelFile, match=problem) as caught:
            await import_model(store, folder / name, NAME)
        assert str(caught.value).count(str(folder)) == 1


async def test_nothing_is_made_in_a_store_that_may_only_be_read(folder):
    with pytest.raises(StoreReadOnly):
        await import_model(RamStore(writable=False), folder / "model.gguf", NAME)


async def named(store, *layers: Layer, config: bytes = b"{}") -> None:
    manifest = build_manifest(Layer(CONFIG_TYPE, await store.put(config), len(config)), layers)
    await store.put_manifest(NAME, manifest)


async def test_a_model_of_something_else_is_shown_as_far_as_it_goes(store):
    weights = await store.put(b"an engine may know what this is")
    config = b'{"capabilities":["completion"],"context_length":99,"model_family":7}'
    await named(store, Layer(MODEL_TYPE, weights, 31), config=config)
    described = await describe_model(store, NAME)
    assert described["capabilities"] == ("completion",)
    assert (described["context_length"], described["architecture"]) == (99, "")


async def test_a_model_without_weights_is_shown_by_its_name(store):
    await named(store)
    assert "FROM tiny:latest\n" in (await describe_model(store, NAME))["modelfile"]
    with pytest.raises(ModelNotFound):
        await describe_model(store, parse_model_name("absent"))


@pytest.mark.parametrize(
    ("media_type", "data", "problem"),
    [
        (PARAMS_TYPE, b"[1]", "no JSON"),
        (MESSAGES_TYPE, b'{"role":1}', "no messages"),
        (SYSTEM_TYPE, bytes(17 * 1024 * 1024), "bytes"),
    ],
)
async def test_a_damaged_layer_is_named(store, media_type, data, problem):
    digest = await store.put(data)
    await named(store, Layer(media_type, digest, len(data)))
    with pytest.raises(StoreDamaged, match=problem):
        await read_model(store, NAME)


async def test_an_unreadable_file_is_named(store, folder, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises((BadModelFile, AccessRefused), match=r"Permission|permission"):
        await import_model(store, folder / "model.gguf", NAME)


@pytest.mark.counterpart
async def test_a_real_model_is_imported_and_described(tmp_path):
    settings = ContentSettings(reserve_bytes=0)
    path = real_model()
    async with open_disk_store(tmp_path / "models", tmp_path / "side", settings) as store:
        manifest = await import_model(store, path, NAME)
        described = await describe_model(store, NAME)
        chunk_map = await store.chunk_map(manifest.layers[0].digest)
    assert described["parameter_size"] == "134.52M"
    assert (described["architecture"], described["quantization"]) == ("llama", "Q4_1")
    assert described["context_length"] == 8192
    assert "completion" in described["capabilities"]
    assert chunk_map.size == path.stat().st_size
    assert chunk_map.chunk_count < 150

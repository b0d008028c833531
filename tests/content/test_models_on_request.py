"""Models made of what `/api/create` is sent, and what `/api/show` tells of them."""

import json

import msgspec
import pytest

from ollamamax_p2p.content import (
    CreationRequest,
    RamStore,
    ShowAnswer,
    check_creation_request,
    create_from_request,
    create_model,
    describe_for_show,
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
    BadInput,
    ModelNotFound,
    StoreReadOnly,
)
from tests.content.model_files import gguf_file, safetensors_file

NAME, OTHER = parse_model_name("tiny"), parse_model_name("other")
METADATA = {
    "general.name": "Tiny",
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "tokenizer.chat_template": "{{ messages }}",
    "tokenizer.ggml.tokens": ["<s>", "b"] * 1000,
    "tokenizer.ggml.scores": [0.1, 0.5],
}
GGUF = gguf_file({"output.weight": bytes(1500)}, METADATA)
ADAPTER = gguf_file({"a": bytes(32)}, {"general.type": "adapter"})
PROJECTOR = gguf_file({"v": bytes(32)}, {"general.type": "mmproj", "clip.vision.size": 3})


@pytest.fixture
async def store():
    store = RamStore()
    for blob in (GGUF, ADAPTER, PROJECTOR):
        await store.put(blob)
    return store


def files(**named: bytes) -> dict[str, str]:
    return {name.replace("__", "."): digest_of(blob) for name, blob in named.items()}


WHOLE = CreationRequest(
    files=files(tiny__gguf=GGUF),
    template="{{ .Prompt }}",
    system="Be <brief>.",
    licenses=("MIT", "BSD"),
    parameters={"temperature": 0.7, "num_ctx": 4096, "stop": ["a", "b"]},
    messages=(Message("user", "hi"),),
    renderer="qwen3",
    parser="qwen3",
    requires="0.14.0",
)


async def test_a_model_of_an_uploaded_file_has_the_layers_that_ollama_makes(store):
    told = []
    manifest = await create_from_request(store, NAME, WHOLE, tell=told.append)
    kinds = [MODEL_TYPE, TEMPLATE_TYPE, SYSTEM_TYPE, LICENSE_TYPE, LICENSE_TYPE]
    assert [each.media_type for each in manifest.layers] == [*kinds, PARAMS_TYPE, MESSAGES_TYPE]
    assert told == [
        "parsing GGUF",
        f"using existing layer {digest_of(GGUF)}",
        *(f"creating new layer {layer.digest}" for layer in manifest.layers[1:]),
        "writing manifest",
    ]
    again = []
    assert await create_from_request(store, NAME, WHOLE, tell=again.append) == manifest
    assert [line.split()[0] for line in again] == ["parsing", *["using"] * 7, "writing"]


async def test_a_request_and_a_modelfile_make_the_same_model(store, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(GGUF)
    modelfile = (
        "FROM ./tiny.gguf\nTEMPLATE {{ .Prompt }}\nSYSTEM Be <brief>.\nLICENSE MIT\nLICENSE BSD\n"
        "PARAMETER temperature 0.7\nPARAMETER num_ctx 4096\nPARAMETER stop a\nPARAMETER stop b\n"
        "MESSAGE user hi\nRENDERER qwen3\nPARSER qwen3\nREQUIRES 0.14.0\n"
    )
    by_file = await create_model(store, OTHER, modelfile, tmp_path)
    assert await create_from_request(store, NAME, WHOLE) == by_file


async def test_a_model_from_another_keeps_what_is_not_replaced(store):
    await create_from_request(store, NAME, WHOLE)
    request = CreationRequest(
        origin="tiny",
        system="Be long.",
        parameters={"top_k": 3},
        info={
            "model_family": "mine",
            "parameter_size": "1B",
            "context_length": 99.0,
            "capabilities": ["tools"],
        },
    )
    manifest = await create_from_request(store, OTHER, request)
    assert {layer.source for layer in manifest.layers[:3]} == {"tiny:latest"}
    answer = await describe_for_show(store, OTHER)
    assert answer.system == "Be long."
    assert answer.parameters.splitlines()[-1].split() == ["top_k", "3"]
    assert (answer.details.family, answer.details.families) == ("mine", ("mine",))
    assert answer.details.parent_model == "tiny:latest"
    assert answer.renderer == "qwen3"
    assert answer.capabilities == ("tools", "completion")


async def test_who_resolves_a_name_may_fetch_it_first(store):
    async def pulled(name):
        return await create_from_request(store, name, WHOLE)

    request = CreationRequest(origin="else/where:3")
    with pytest.raises(ModelNotFound):
        await create_from_request(store, NAME, request)
    await create_from_request(store, NAME, request, resolve_model=pulled)
    assert len(await store.models()) == 2


async def test_adapters_projectors_and_drafts_become_their_layers(store):
    request = CreationRequest(
        files=files(a__gguf=GGUF, b=PROJECTOR),
        adapters=files(lora__gguf=ADAPTER),
        draft_files=files(draft__gguf=GGUF),
    )
    manifest = await create_from_request(store, NAME, request)
    kinds = [layer.media_type for layer in manifest.layers]
    assert kinds == [MODEL_TYPE, PROJECTOR_TYPE, ADAPTER_TYPE, DRAFT_TYPE]
    answer = await describe_for_show(store, NAME)
    assert answer.projector_info == {
        "clip.vision.size": 3,
        "general.architecture": "llama",
        "general.file_type": 15,
        "general.parameter_count": 32,
        "general.type": "mmproj",
    }
    assert "vision" in answer.capabilities


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (CreationRequest(), "neither 'from' or 'files' was specified"),
        (CreationRequest(files={}), "no files provided to convert"),
        (CreationRequest(origin="a b"), "invalid model name"),
        (CreationRequest(files={"x": digest_of(b"?")}), "blob not found for x"),
        (CreationRequest(origin="", files={"x.safetensors": digest_of(GGUF)}), "safetensors"),
        (CreationRequest(files={"x": "sha256:12"}), "invalid digest format"),
        (CreationRequest(files=files(a=GGUF), quantize="q4_K_M"), "cannot quantize"),
        (CreationRequest(files=files(a=GGUF), adapters=files(a=ADAPTER, b=ADAPTER)), "one adapter"),
        (CreationRequest(files=files(a=GGUF), adapters=files(a=GGUF)), "no adapter"),
        (CreationRequest(files={f"{n}": digest_of(GGUF) for n in range(1025)}), "too many files"),
    ],
)
async def test_what_cannot_be_made_is_said_in_ollamas_words(store, request_, problem):
    with pytest.raises(BadInput, match=problem):
        await create_from_request(store, NAME, request_)
    assert await store.models() == []


@pytest.mark.parametrize(
    "path", ["/etc/x", "../x", "a/../x", "a//x", ".", "", "a\\x", "c:x", "a\0"]
)
def test_a_path_that_leads_elsewhere_is_refused(path):
    with pytest.raises(BadInput, match="file path must be relative"):
        check_creation_request(CreationRequest(files={path: digest_of(GGUF)}))


@pytest.mark.parametrize(
    ("name", "blob", "problem"),
    [
        ("x.gguf", b"PK", "supplied file was not in GGUF format"),
        ("x.bin", b"PK\3\4....", "unknown type"),
        ("x", b"", "unknown type"),
        ("x.gguf", GGUF[:40], "x.gguf"),
        ("x.gguf", b"FUGG" + GGUF[4:], "big-endian"),
        ("x", safetensors_file({"a": b"1"}), "unknown type"),
    ],
)
async def test_a_blob_that_is_no_model_is_refused(store, name, blob, problem):
    digest = await store.put(blob)
    with pytest.raises(BadInput, match=problem):
        await create_from_request(store, NAME, CreationRequest(files={name: digest}))


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"base_name": 1}, 'info field "base_name" must be a string'),
        ({"context_length": "4"}, 'info field "context_length" must be a number'),
        ({"context_length": True}, "must be a number"),
        ({"embedding_length": -1}, "must be a non-negative integer"),
        ({"embedding_length": 1.5}, "must be a non-negative integer"),
        ({"embedding_length": float("inf")}, "must be a non-negative integer"),
        ({"capabilities": "tools"}, "must be an array of strings"),
        ({"capabilities": [1]}, "must be an array of strings"),
    ],
)
async def test_info_of_a_wrong_type_is_refused(store, info, problem):
    request = CreationRequest(files=files(a=GGUF), info=info)
    with pytest.raises(BadInput, match=problem):
        await create_from_request(store, NAME, request)


async def test_a_store_that_may_only_be_read_makes_nothing():
    with pytest.raises(StoreReadOnly):
        await create_from_request(RamStore(writable=False), NAME, WHOLE)


async def test_show_tells_what_the_file_says_and_arrays_only_on_demand(store):
    await create_from_request(store, NAME, WHOLE)
    short = await describe_for_show(store, NAME)
    assert short.model_info == {
        "general.architecture": "llama",
        "general.file_type": 15,
        "general.parameter_count": 1500,
        "llama.attention.layer_norm_rms_epsilon": 1e-05,  # and not 9.999999747378752e-06
        "llama.block_count": 1,
        "llama.context_length": 2048,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.tokens": None,
    }
    assert list(short.model_info) == sorted(short.model_info)
    assert short.modelfile.startswith('# Modelfile generated by "ollama show"\n')
    assert short.license == "MIT\nBSD"
    long = await describe_for_show(store, NAME, verbose=True, system="Else.", options={"seed": 7})
    assert long.model_info["tokenizer.ggml.tokens"] == ["<s>", "b"] * 1000
    assert long.model_info["tokenizer.ggml.scores"] == [0.1, 0.5]
    assert [msgspec.to_builtins(each) for each in long.tensors] == [
        {"name": "output.weight", "type": "I8", "shape": (1500,)}
    ]
    assert long.system == "Else."
    assert "PARAMETER seed 7\n" in long.modelfile
    assert "seed" not in long.parameters


async def test_what_show_tells_comes_whole_through_the_wire(store):
    await create_from_request(store, NAME, WHOLE)
    answer = await describe_for_show(store, NAME, verbose=True)
    sent = msgspec.msgpack.encode(answer)
    assert msgspec.msgpack.decode(sent, type=ShowAnswer) == answer


async def test_a_model_without_gguf_is_shown_all_the_same(store):
    config = json.dumps(
        {"model_families": None, "remote_model": "big", "remote_host": "h"}
    ).encode()
    digest, weights = await store.put(config), await store.put(b"PK")
    layers = [Layer(MODEL_TYPE, weights, 2), Layer(PROJECTOR_TYPE, weights, 2)]
    manifest = build_manifest(Layer(CONFIG_TYPE, digest, len(config)), layers)
    await store.put_manifest(NAME, manifest)
    answer = await describe_for_show(store, NAME, verbose=True)
    assert (answer.model_info, answer.projector_info, answer.tensors) == ({}, {}, ())
    assert (answer.details.families, answer.remote_model) == (None, "big")
    with pytest.raises(ModelNotFound):
        await describe_for_show(store, OTHER)


async def test_numbers_that_json_lacks_are_null(store):
    odd = {"a.nan": float("nan"), "a.inf": float("inf"), "a.list": [float("-inf")]}
    blob = gguf_file({"w": bytes(8)}, odd)
    await store.put(blob)
    await create_from_request(store, NAME, CreationRequest(files=files(a=blob)))
    info = (await describe_for_show(store, NAME, verbose=True)).model_info
    assert (info["a.nan"], info["a.inf"], info["a.list"]) == (None, None, [None])

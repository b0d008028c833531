"""Which value wins, and what is refused, with the place."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.config import NodeConfig, all_settings, effective, load, load_config
from ollamamax_p2p.errors import BadConfig, KeyExposed, OmxError
from ollamamax_p2p.host import HostSettings

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "omx"


@pytest.fixture
def write(data_dir):
    def write(text: str) -> Path:
        data_dir.mkdir(exist_ok=True)
        path = data_dir / "config.toml"
        path.write_text(text)
        return path

    return write


def loaded(data_dir, environment=None, **flags):
    given = {key.replace("__", "."): value for key, value in flags.items()}
    return load(environment={"OMX_DATA_DIR": str(data_dir), **(environment or {})}, flags=given)


def test_without_anything_all_are_defaults(tmp_path):
    found = load(environment={"HOME": str(tmp_path)}, flags={"data_dir": str(tmp_path)})
    assert found.config == NodeConfig(data_dir=tmp_path)
    assert {source for key, source in found.sources.items() if key != "data_dir"} == {"default"}


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(data_dir, write):
    def slots(environment=None, **flags):
        return loaded(data_dir, environment, **flags).config.transfer.upload_slots

    assert slots() == 8
    write("[transfer]\nupload_slots = 1")
    assert slots() == 1
    assert slots({"OMX_TRANSFER_UPLOAD_SLOTS": "2"}) == 2
    assert slots({"OMX_TRANSFER_UPLOAD_SLOTS": "2"}, transfer__upload_slots=3) == 3


def test_every_value_says_where_it_came_from(data_dir, write):
    path = write("[host]\nrelay = false")
    found = loaded(data_dir, {"OMX_API": "127.0.0.1:1"}, content__models="/m")
    assert found.sources["host.relay"] == f"{path}: [host] relay"
    assert found.sources["api.listen"] == "OMX_API"
    assert found.sources["content.models"] == "--models"
    assert found.sources["host.listen"] == "default"
    assert found.file == path


def test_every_setting_can_be_set_by_its_variable(data_dir):
    texts = {
        "data_dir": str(data_dir),
        "name": "box",
        "host.listen": "/ip4/127.0.0.1/tcp/1, /ip4/127.0.0.1/tcp/2/ws",
        "host.announce": "/ip4/192.0.2.1/tcp/1",
        "content.models": "/m",
        "discovery.bootstrap": f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}",
        "discovery.mdns_interfaces": "127.0.0.1,::1",
        "origin.insecure": "reg.local:5000",
        "origin.allow_private": "reg.local:5000",
        "origin.credentials": "reg.local=me:secret,other=you:s=x",
        "origin.token_hosts": "reg.local=auth.local",
        "api.listen": "[::1]:0",
        "inference.openai": "vllm=http://192.0.2.1:8000/v1, lm=http://192.0.2.2/v1",
        "inference.openai_keys": "vllm=sk-1",
        "api.ollama_listen": "0.0.0.0:11434",
        "api.origins": "https://*.example.org",
        "api.hosts": "models.example.org",
    }
    for key, setting in all_settings().items():
        text = texts.get(key, str(setting.default))
        config = load_config(environment={"OMX_DATA_DIR": str(data_dir), setting.variable: text})
        if key not in texts:
            assert config.values()[key] == setting.default
    config = load_config(
        environment={all_settings()[key].variable: text for key, text in texts.items()}
    )
    assert config.host.listen == ("/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2/ws")
    assert config.origin.credentials == {"reg.local": "me:secret", "other": "you:s=x"}
    assert config.origin.token_hosts == {"reg.local": "auth.local"}


def test_short_names_and_switches(data_dir):
    config = loaded(
        data_dir, {"OMX_MODELS": "/m", "OMX_LISTEN": "/ip4/127.0.0.1/tcp/0", "OMX_NO_MDNS": "1"}
    ).config
    assert config.content.models == Path("/m")
    assert config.host.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert config.discovery.mdns is False
    assert loaded(data_dir, {"OMX_NO_MDNS": "0"}).config.discovery.mdns is True


def test_ollamas_models_are_used_where_ours_are_not_set(data_dir, write):
    theirs = {"OLLAMA_MODELS": ' "/theirs" '}
    assert loaded(data_dir, theirs).config.content.models == Path("/theirs")
    assert loaded(data_dir, theirs | {"OMX_MODELS": "/ours"}).config.content.models == Path("/ours")
    write('[content]\nmodels = "store"')
    assert loaded(data_dir, theirs).config.content.models == data_dir / "store"


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("0.0.0.0", "0.0.0.0:11434"),
        ("0.0.0.0:8080", "0.0.0.0:8080"),
        (":8080", "0.0.0.0:8080"),
        ("127.0.0.1:99999", "127.0.0.1:11434"),  # as Ollama: its own port then
        ("127.0.0.1:x", "127.0.0.1:11434"),
        ("localhost", "localhost:11434"),
        ("http://127.0.0.1", "127.0.0.1:80"),
        ("https://127.0.0.1/x", "127.0.0.1:443"),
        ("https://127.0.0.1:5/x", "127.0.0.1:5"),
        ("[::1]", "[::1]:11434"),
        ("[::]:7", "[::]:7"),
        ("::1", "[::1]:11434"),
        ("'0.0.0.0:1'", "0.0.0.0:1"),
        ("/x", "127.0.0.1:11434"),
        ("gpu-box:11434", ""),  # where a client's server is
        ("http://gpu.example.org", ""),
        ("[x]", ""),
    ],
)
def test_ollamas_host_is_where_its_api_is_served(data_dir, text, listen):
    found = loaded(data_dir, {"OLLAMA_HOST": text})
    assert found.config.api.ollama_listen == listen
    assert found.sources["api.ollama_listen"] == ("OLLAMA_HOST" if listen else "default")
    ours = {"OLLAMA_HOST": text, "OMX_API_OLLAMA_LISTEN": "127.0.0.1:1"}
    assert loaded(data_dir, ours).config.api.ollama_listen == "127.0.0.1:1"


def test_ollamas_other_variables_are_read_where_ours_are_not_set(data_dir, write):
    theirs = {"OLLAMA_ORIGINS": "https://a.b, app://*", "OLLAMA_MAX_TRANSFER_STREAMS": "7"}
    found = loaded(data_dir, theirs)
    assert found.config.api.origins == ("https://a.b", "app://*")
    assert found.config.origin.connections == 7
    assert found.sources["api.origins"] == "OLLAMA_ORIGINS"
    for text, connections in (("0", 4), ("999", 64), ("many", 4)):
        streams = {"OLLAMA_MAX_TRANSFER_STREAMS": text}
        assert loaded(data_dir, streams).config.origin.connections == connections
    write('[api]\norigins = ["*"]')
    assert loaded(data_dir, theirs).config.api.origins == ("*",)


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("OLLAMA_KEEP_ALIVE", "10m", "inference.keep_alive_s", 600.0),
        ("OLLAMA_KEEP_ALIVE", "1h0.5m1s", "inference.keep_alive_s", 3631.0),
        ("OLLAMA_KEEP_ALIVE", "3600", "inference.keep_alive_s", 3600.0),
        ("OLLAMA_KEEP_ALIVE", "-1", "inference.keep_alive_s", -1.0),
        ("OLLAMA_KEEP_ALIVE", "-5m", "inference.keep_alive_s", -300.0),
        ("OLLAMA_KEEP_ALIVE", "0", "inference.keep_alive_s", 0.0),
        ("OLLAMA_KEEP_ALIVE", "for ever", "inference.keep_alive_s", 300.0),
        ("OLLAMA_LOAD_TIMEOUT", "90s", "inference.load_timeout_s", 90.0),
        ("OLLAMA_LOAD_TIMEOUT", "0", "inference.load_timeout_s", 30 * 86_400.0),
        ("OLLAMA_LOAD_TIMEOUT", "5 m", "inference.load_timeout_s", 300.0),
        ("OLLAMA_NUM_PARALLEL", "4", "inference.slots", 4),
        ("OLLAMA_NUM_PARALLEL", "0", "inference.slots", 1),
        ("OLLAMA_CONTEXT_LENGTH", "8192", "inference.context_length", 8192),
        ("OLLAMA_MAX_QUEUE", "7", "router.queue_max", 7),
        ("OLLAMA_MAX_QUEUE", "-7", "router.queue_max", 1024),
    ],
)
def test_ollamas_engine_variables_mean_here_what_they_mean_there(
    data_dir, variable, text, key, value
):
    found = loaded(data_dir, {variable: text})
    assert found.config.values()[key] == value
    if found.sources[key] == "default":
        assert value == all_settings()[key].default


def test_an_empty_variable_counts_as_not_set(data_dir):
    assert loaded(data_dir, {"OMX_API": "", "OLLAMA_MODELS": ""}).sources["api.listen"] == "default"


def test_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(environment={})
    assert config.data_dir == tmp_path / ".omx"
    assert config.content.models == tmp_path / ".ollama" / "models"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("uplod_slots = 1", "uplod_slots", "no such setting; did you mean transfer.upload_slots?"),
        ("[transfer]\nuplod_slots = 1", "[transfer] uplod_slots", "did you mean"),
        ("upload_slots = 1", "config.toml: upload_slots", "upload_slots in [transfer]"),
        ("[trasfer]\nupload_slots = 1", "trasfer", "did you mean transfer?"),
        ("transfer = 3", "transfer", "no such setting"),
        ("[transfer]\nupload_slots = '1'", "upload_slots", "expected a whole number, not '1'"),
        ("[transfer]\nupload_slots = true", "upload_slots", "expected a whole number"),
        ("[transfer]\nupload_slots = -1", "upload_slots", "too small"),
        ("[transfer]\nstall_timeout_s = 0", "stall_timeout_s", "between 0 and"),
        ("[transfer]\nstall_timeout_s = inf", "stall_timeout_s", "between 0 and"),
        ("[transfer]\nstall_timeout_s = nan", "stall_timeout_s", "between 0 and"),
        ("[host]\nlisten = '/ip4/1.2.3.4/tcp/1'", "listen", "expected a list"),
        ("[host]\nlisten = [7]", "listen", "7 is in it"),
        ("[host]\nlisten = []", "listen", "at least one"),
        ("[host]\nlisten = ['/udp/1']", "listen", "invalid address"),
        ("[discovery]\nbootstrap = ['/ip4/1.2.3.4/tcp/1']", "bootstrap", "/p2p/"),
        ("[api]\nlisten = '0.0.0.0:11435'", "listen", "not a loopback address"),
        ("[api]\nollama_listen = 'box:1'", "ollama_listen", "not an IP address"),
        ("[api]\nollama_listen = '::1:1'", "ollama_listen", "in brackets"),
        ("[api]\norigins = ['evil.example']", "origins", "scheme://host"),
        ("[api]\norigins = ['https://a.b/']", "origins", "scheme://host"),
        ("[api]\norigins = ['https://*.b*']", "origins", "more than one"),
        ("[api]\nhosts = ['a.b:80']", "hosts", "without a port"),
        ("[api]\nlisten = '127.0.0.1'", "listen", "host:port"),
        ("[api]\nlisten = '127.0.0.1:99999'", "listen", "0 to 65535"),
        ("[api]\nlisten = '::1:1'", "listen", "brackets"),
        ("[api]\nlisten = 'example.org:1'", "listen", "not an IP address"),
        ("[host]\nheartbeat_interval_s = 9.0", "heartbeat_interval_s", "heartbeat_timeout_s"),
        ("name = ''", "name", "1 to 64"),
        ("data_dir = '/elsewhere'", "data_dir", "--data-dir or OMX_DATA_DIR"),
        ("[transfer\nx", "config.toml", "line 1"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_place(data_dir, write, text, place, problem):
    write(text)
    with pytest.raises(BadConfig) as refused:
        loaded(data_dir)
    assert place in refused.value.where
    assert problem in refused.value.problem


def test_an_unknown_variable_of_ours_is_refused_and_a_strangers_ignored(data_dir):
    with pytest.raises(BadConfig, match=r"OMX_UPLOAD_SLOTS: .*OMX_TRANSFER_UPLOAD_SLOTS"):
        loaded(data_dir, {"OMX_UPLOAD_SLOTS": "1"})
    loaded(data_dir, {"NOT_OMX_THING": "1", "OMX_DEBUG": "1", "_OMX_COMPLETE": "x"})


def test_a_bad_variable_and_a_bad_flag_are_named(data_dir):
    with pytest.raises(BadConfig, match="OMX_API: 'x' is not host:port"):
        loaded(data_dir, {"OMX_API": "x"})
    with pytest.raises(BadConfig, match="--api: 'x' is not host:port"):
        loaded(data_dir, api__listen="x")
    with pytest.raises(BadConfig, match="OMX_DISCOVERY_MDNS: expected true or false"):
        loaded(data_dir, {"OMX_DISCOVERY_MDNS": "maybe"})


def test_a_file_that_was_asked_for_must_exist(tmp_path):
    with pytest.raises(BadConfig, match="no such file"):
        load_config(environment={"OMX_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(BadConfig, match="no such file"):
        load_config(environment={}, file=tmp_path / "none.toml")
    with pytest.raises(BadConfig, match="directory"):
        load_config(environment={}, file=tmp_path)


def test_a_named_file_may_move_the_data_folder_relative_to_itself(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("data_dir = 'here'\n")
    assert load_config(environment={}, file=file).data_dir == tmp_path / "here"


def test_a_file_that_is_not_text_is_refused(data_dir, write):
    write("").write_bytes(b"name = '\xff'")
    with pytest.raises(BadConfig, match="not UTF-8 at byte 8"):
        loaded(data_dir)


def test_passwords_that_others_can_read_are_refused(data_dir, write):
    path = write("[origin.credentials]\n'reg.local' = 'me:secret'")
    path.chmod(0o644)
    with pytest.raises(KeyExposed, match="chmod 600"):
        loaded(data_dir)
    path.chmod(0o600)
    found = loaded(data_dir)
    assert found.config.origin.credentials == {"reg.local": "me:secret"}
    assert "secret" not in repr(effective(found))
    assert "reg.local" in repr(effective(found))


def test_a_bad_password_is_not_repeated(data_dir):
    with pytest.raises(BadConfig) as refused:
        loaded(data_dir, {"OMX_ORIGIN_CREDENTIALS": "reg.local=hunter2"})
    assert "hunter2" not in str(refused.value)


def test_a_config_made_in_code_is_checked_too():
    from ollamamax_p2p.api import ApiSettings

    with pytest.raises(BadConfig, match=r"api\.listen"):
        NodeConfig(api=ApiSettings(listen="0.0.0.0:1"))


@given(
    st.dictionaries(
        st.sampled_from([setting.variable for setting in all_settings().values()]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
        max_size=3,
    )
)
def test_no_environment_raises_anything_but_our_errors(environment):
    environment.pop("OMX_DATA_DIR", None)
    with suppress(OmxError):
        load_config(environment={"OMX_DATA_DIR": "/nonexistent/omx", **environment})


@given(st.binary(max_size=200))
def test_no_file_raises_anything_but_our_errors(tmp_path_factory, raw):
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_bytes(raw)
    file.chmod(0o600)
    with suppress(OmxError):
        load_config(environment={}, file=file)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"name": 5}, "name: expected a text, not 5"),
        ({"host": HostSettings(listen="/ip4/127.0.0.1/tcp/0")}, "host.listen: expected a list"),
        ({"host": 5}, "host: expected HostSettings"),
        ({"data_dir": 5}, "data_dir: expected a path"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(given, problem):
    with pytest.raises(BadConfig, match=problem):
        NodeConfig(**given)


def test_a_data_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="is a file, not a folder"):
        load_config(environment={}, flags={"data_dir": str(tmp_path / "file")})

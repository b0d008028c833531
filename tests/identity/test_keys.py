"""The node key and the files that only this user may read."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from ollamamax_p2p.errors import AccessRefused, KeyExposed, StoreDamaged, StoreFull
from ollamamax_p2p.identity import (
    key_from_seed,
    load_or_create_key,
    parse_peer_id,
    public_key_of,
    read_secret,
    remove_secret,
    secret_files,
    write_secret,
)

SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
"""RFC 8032, section 7.1, test 1."""


def test_the_public_key_is_the_one_of_rfc_8032():
    key = key_from_seed(SEED)
    assert key.public == PUBLIC
    assert public_key_of(parse_peer_id(key.peer_id)) == PUBLIC


def test_a_node_is_the_same_after_a_restart(tmp_path):
    path = tmp_path / "data" / "node.key"
    first = load_or_create_key(path)
    assert load_or_create_key(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_two_nodes_differ(tmp_path):
    assert load_or_create_key(tmp_path / "1").seed != load_or_create_key(tmp_path / "2").seed


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o666, 0o644, 0o622])
def test_a_key_that_others_can_reach_is_refused_with_the_mend(tmp_path, mode):
    path = tmp_path / "node.key"
    load_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(KeyExposed, match=f"mode {mode:04o}.*chmod 600"):
        load_or_create_key(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"omx-node-key-1\n",
        b"omx-node-key-1\n" + SEED.hex().encode()[:-2] + b"\n",
        b"omx-node-key-1\n" + SEED.hex().encode() + b"00\n",
        b"omx-node-key-2\n" + SEED.hex().encode() + b"\n",
        SEED,
        SEED.hex().encode(),
        b"\xff" * 80,
    ],
)
def test_a_damaged_key_is_neither_used_nor_replaced_nor_shown(tmp_path, data):
    path = tmp_path / "node.key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(StoreDamaged, match="not a node key") as caught:
        load_or_create_key(path)
    assert SEED.hex()[:16] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert path.read_bytes() == data


def test_an_empty_key_file_says_so(tmp_path):
    path = tmp_path / "node.key"
    path.touch(mode=0o600)
    with pytest.raises(StoreDamaged, match="empty"):
        load_or_create_key(path)


def test_a_key_never_shows_its_seed():
    key = key_from_seed(SEED)
    for shown in (repr(key), str(key), f"{[key]}"):
        assert key.peer_id in shown
        assert SEED.hex() not in shown
        assert repr(SEED)[2:-1] not in shown


def test_a_secret_comes_back_and_can_be_replaced_and_removed(tmp_path):
    path = tmp_path / "a" / "b" / "secret"
    assert read_secret(path) is None
    write_secret(path, b"one")
    write_secret(path, b"two")
    assert read_secret(path) == b"two"
    remove_secret(path)
    remove_secret(path)
    assert read_secret(path) is None
    assert list(path.parent.iterdir()) == []


def test_a_secret_is_never_readable_by_others_not_even_while_it_is_written(tmp_path, monkeypatch):
    modes = []
    replace = Path.replace

    def look(self: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    before = os.umask(0)
    try:
        write_secret(tmp_path / "secret", b"x")
    finally:
        os.umask(before)
    assert modes == [0o600]


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, AccessRefused),
        (errno.EROFS, AccessRefused),
        (errno.EIO, StoreDamaged),
    ],
)
def test_a_write_that_fails_leaves_the_old_secret_and_nothing_else(
    tmp_path, monkeypatch, number, error
):
    path = tmp_path / "secret"
    write_secret(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(secret_files.os, "fsync", fail)
        with pytest.raises(error):
            write_secret(path, b"new")
    assert read_secret(path) == b"old"
    assert list(tmp_path.iterdir()) == [path]


HALF = ".secret.0123456789abcdef"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("way", [remove_secret, lambda path: write_secret(path, b"new")])
def test_what_a_killed_process_left_of_a_secret_goes_with_the_next_step(tmp_path, way, there):
    path, half = tmp_path / "secret", tmp_path / HALF
    if there:
        write_secret(path, b"old")
    half.write_bytes(b"a whole key")
    way(path)
    assert not half.exists()


@pytest.mark.network
def test_a_process_killed_before_the_rename_leaves_a_file_that_is_known_again(tmp_path):
    """The name that `write_secret` really gives, not the one that the other tests write down."""
    path = tmp_path / "secret"
    dying = (
        "import os, sys, signal, pathlib\n"
        "from ollamamax_p2p.identity import write_secret\n"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_secret(pathlib.Path(sys.argv[1]), b'key')\n"
    )
    ended = subprocess.run([sys.executable, "-c", dying, path], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"key"]
    remove_secret(path)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_that_cannot_lose_its_leftovers_is_still_there_to_be_removed(
    tmp_path, monkeypatch
):
    """Else nothing would lead anybody back to the keys in them."""
    path, half = tmp_path / "secret", tmp_path / HALF
    write_secret(path, b"key")
    half.write_bytes(b"a whole key")
    unlink = Path.unlink

    def fail(each: Path, **options: bool) -> None:
        if each == half:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(each, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail)
        with pytest.raises(StoreDamaged):
            remove_secret(path)
    assert path.exists()
    remove_secret(path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_leftovers_of_this_secret_stay(tmp_path):
    path = tmp_path / "secret"
    others = [".secret", ".secret.0123", f"{HALF}0", ".secret.0123456789ABCDEF", ".other" + HALF]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    (tmp_path / HALF).symlink_to(tmp_path / ".secret")
    (tmp_path / f"{HALF[:-1]}0").mkdir()
    living = tmp_path / f"{HALF[:-1]}1"
    living.write_bytes(b"being written")
    before = sorted(tmp_path.iterdir())
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_secret(path, b"x")
        remove_secret(path)
    assert sorted(tmp_path.iterdir()) == before


def test_two_who_write_one_secret_at_once_do_not_take_each_other_for_leftovers(
    tmp_path, monkeypatch
):
    path = tmp_path / "secret"
    replace = Path.replace
    replaced = []

    def meanwhile(temporary: Path, target: Path) -> Path:
        replaced.append(temporary)
        if len(replaced) == 1:
            write_secret(path, b"second")
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    write_secret(path, b"first")
    assert read_secret(path) == b"first"
    assert len(replaced) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_or_a_pipe_in_the_place_of_a_secret_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("folder", "pipe"):
        with pytest.raises(StoreDamaged):
            read_secret(tmp_path / name)
    with pytest.raises(StoreDamaged):
        write_secret(tmp_path / "folder", b"x")
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["folder", "pipe"]


def test_an_absurdly_long_secret_is_refused_without_reading_it_all(tmp_path):
    path = tmp_path / "secret"
    write_secret(path, b"x")
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(StoreDamaged, match="too long"):
        read_secret(path)


def test_a_secret_that_may_not_be_read_names_its_path(tmp_path):
    path = tmp_path / "secret"
    write_secret(path, b"x")
    path.chmod(0)
    with as_nobody(tmp_path), pytest.raises(AccessRefused, match="cannot read"):
        read_secret(path)


@contextmanager
def as_nobody(folder):
    """Root is refused nothing, so be somebody else for a moment; others are refused as they are."""
    if os.geteuid() != 0:
        yield
        return
    for each in (folder, *folder.parents[:3]):
        each.chmod(each.stat().st_mode | 0o011)  # so that the way to the file is open
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)

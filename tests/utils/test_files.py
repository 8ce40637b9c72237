"""Files are whole or not there, and what killed processes left beside them goes."""

from __future__ import annotations

import errno
import io
import os
import signal

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from extemb_core.errors import ConfigError
from extemb_core.utils.files import (
    atomic_write,
    atomic_write_text,
    disk_errors,
    locked_folder,
    make_folder,
    parse_json,
    refuse_foreign,
    remove_left,
    sha256_of_stream,
)


@pytest.mark.parametrize("text", ["{", "", "[" * 99_999, '{"a":' * 99_999, b"\xff"])
def test_what_is_no_json_is_a_value_error_however_deep_it_is(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_folder_is_made_with_those_above_it_or_refused_with_the_remedy(tmp_path, monkeypatch):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b", ConfigError, "name another")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(ConfigError, match=r"file.* cannot be made \(.+\); name another$"):
            make_folder(folder, ConfigError, "name another")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is of a disk mounted to be read
    with pytest.raises(ConfigError, match=r"b may not be written to; name another$"):
        make_folder(tmp_path / "a" / "b", ConfigError, "name another")


def test_a_folder_with_others_files_is_refused_by_the_first_of_them(tmp_path):
    refuse_foreign(tmp_path, [], "a store's", ConfigError)
    with pytest.raises(ConfigError, match=r"holds 'a b', which is not a store's; pass a new or empty folder$"):
        refuse_foreign(tmp_path, ["c", "a b"], "a store's", ConfigError)


def test_the_lock_of_a_folder_keeps_others_out_and_ends_with_its_block(tmp_path, monkeypatch):
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", kept.append)  # as what was forked in the block still has it open
        with locked_folder(tmp_path) as alone, locked_folder(tmp_path) as second:
            assert (alone, second) == (True, False)
    with locked_folder(tmp_path) as alone:
        assert alone
    for handle in kept:
        os.close(handle)


def test_a_file_is_what_was_written_or_what_was_there_before(tmp_path):
    atomic_write_text(tmp_path / "a", "one")

    def fail():
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == ["a"]
    atomic_write_text(tmp_path / "a", "zwölf")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "zwölf"


def test_two_writers_of_one_file_are_not_in_each_others_way(tmp_path):
    with atomic_write(tmp_path / "a") as one:
        one.write_text("one")
        atomic_write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert os.listdir(tmp_path) == ["a"]


def test_what_killed_processes_left_is_removed_when_it_is_old(tmp_path):
    left = [tmp_path / name for name in (".a[1].77.tmp", ".a[1].78.tmp", ".ab.77.tmp")]
    for file in left:
        file.write_text("half")
    for file in (left[0], left[2]):
        os.utime(file, (0, 0))
    atomic_write_text(tmp_path / "a[1]", "one")
    assert sorted(os.listdir(tmp_path)) == [".a[1].78.tmp", ".ab.77.tmp", "a[1]"]


def test_what_safetensors_left_is_removed_too_and_what_may_not_be_stays(tmp_path, monkeypatch):
    files, folder = [".tmpAb12zZ", ".tmp", ".tmpAb12zZ9", "a.tmpAb12zZ"], ".tmpAb12zX"
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / folder).mkdir()  # of another program
    for name in (*files, folder):
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".tmpAb12zY").touch()  # a minute old
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda self: (_ for _ in ()).throw(PermissionError(1, "no")))
        remove_left(tmp_path)
    assert (tmp_path / ".tmpAb12zZ").exists()
    remove_left(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*files[1:], folder, ".tmpAb12zY"])
    remove_left(tmp_path, ".tmpAb12zX", folders=True)
    assert not (tmp_path / folder).exists()


def safetensors(file):
    with disk_errors(file):
        save_file({"x": np.zeros(999)}, file)


@pytest.mark.parametrize("write", [safetensors, lambda file: atomic_write_text(file, "x" * 999)])
def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, write):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "x"))


def test_what_safetensors_says_of_anything_else_stays(tmp_path):
    with pytest.raises(SafetensorError, match="header"), disk_errors(tmp_path / "x"):
        raise SafetensorError("Error while deserializing header: header too small")


def test_the_hash_of_a_stream_is_of_what_is_left_of_it():
    stream = io.BytesIO(b"xxabc")
    stream.seek(2)
    assert sha256_of_stream(stream) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

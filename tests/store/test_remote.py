"""A folder of files written once: the same on this machine and behind a URL."""

from __future__ import annotations

import hashlib
import time

import fsspec
import pytest
from fsspec import AbstractFileSystem

from extemb_core.errors import StoreError, StoreNotFoundError
from extemb_core.store.remote import StorageLocation


@pytest.fixture(params=["path", "url"])
def place(request, tmp_path):
    if request.param == "path":
        return StorageLocation(tmp_path / "new" / "shards")
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return StorageLocation("memory://bucket/shards")


def test_what_is_written_is_there_whole(place):
    assert place.names() == []
    sha256, size = place.write("b.bin", lambda file: file.write_bytes(b"0123456789"))
    assert (sha256, size) == (hashlib.sha256(b"0123456789").hexdigest(), 10)
    place.write_text("a.txt", "four")
    place.write_text("a.txt", "fünf")
    assert place.names() == ["a.txt", "b.bin"]
    assert place.read_text("a.txt") == "fünf"
    assert (place.size("b.bin"), place.size("none")) == (10, None)
    assert place.sha256("b.bin") == sha256
    assert place.sizes() == {"a.txt": 5, "b.bin": 10}
    assert place.read_texts(["a.txt"]) == {"a.txt": "fünf"}
    assert place.read_texts([]) == {}
    assert place.read("b.bin", 2, 5) == b"234"
    with place.open("b.bin") as stream:
        stream.seek(8)
        assert stream.read(10) == b"89"
    for _ in range(2):  # another process may have been first
        place.remove("b.bin")
    assert place.names() == ["a.txt"]


def test_what_was_written_an_hour_ago_is_left(place, monkeypatch):
    place.write_text("a", "words")
    assert [place.is_left(name) for name in ("a", "none")] == [False, False]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert [place.is_left(name) for name in ("a", "none")] == [True, False]
    monkeypatch.setattr(type(place._files), "modified", AbstractFileSystem.modified)  # tells no times
    assert not place.is_left("a")


def test_nothing_is_left_of_a_file_that_could_not_be_filled(place):
    place.write_text("a", "before")

    def fill(file):
        file.write_text("half")
        raise OSError("no space")

    for name in ("a", "b"):
        with pytest.raises(OSError, match="no space"):
            place.write(name, fill)
    assert place.names() == ["a"]
    assert place.read_text("a") == "before"


@pytest.mark.parametrize(
    "refusal", [PermissionError, TimeoutError, ValueError, type("NoCredentials", (Exception,), {})]
)
@pytest.mark.parametrize(
    "call",
    [
        StorageLocation.names,
        StorageLocation.sizes,
        lambda place: place.size("a"),
        lambda place: place.open("a"),
        lambda place: place.sha256("a"),
        lambda place: place.read("a", 0, 1),
        lambda place: place.read_texts(["a"]),
        lambda place: place.is_left("a"),
        lambda place: place.remove("a"),
    ],
)
def test_what_storage_raises_is_our_error_and_names_the_place(place, monkeypatch, call, refusal):
    place.write_text("a", "words")

    def refused(*args, **kwargs):
        raise refusal

    for name in ("ls", "info", "open", "cat_file", "modified", "rm_file"):
        monkeypatch.setattr(type(place._files), name, refused)
    said = (
        rf"^{place}/a?.* could not be (read|removed) \({refusal.__name__}\); check the connection .*, and call again$"
    )
    with pytest.raises(StoreError, match=said) as raised:
        call(place)
    assert type(raised.value) is StoreError


def test_what_is_not_there_is_our_error_too(place):
    for call in (place.open, place.sha256, place.read, place.read_text):
        with pytest.raises(StoreNotFoundError, match=f"^{place}/none does not exist; check the path$"):
            call("none")
    assert place.read_texts(["none"]) == {}  # another process has removed it


def test_a_relative_path_is_understood_from_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StorageLocation("out").absolute() == str(tmp_path / "out")
    assert StorageLocation("memory://bucket").absolute() == "memory://bucket"


def test_what_cannot_be_reached(tmp_path):
    with pytest.raises(StoreError, match="cannot be reached .Protocol not known: nowhere"):
        StorageLocation("nowhere://bucket/a")
    for nothing in (None, 5):
        with pytest.raises(StoreError, match=f"{nothing} cannot be reached"):
            StorageLocation(nothing)
    (tmp_path / "file").write_text("words")
    with pytest.raises(StoreError, match="is a file; pass a folder"):
        StorageLocation(tmp_path / "file").names()
    assert StorageLocation(tmp_path / "file" / "under").names() == []


def test_a_link_is_not_a_file_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("words")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a").symlink_to(tmp_path / "secret")
    place = StorageLocation(tmp_path / "shards")
    assert (place.size("a"), place.sizes(), place.names()) == (None, {}, ["a"])

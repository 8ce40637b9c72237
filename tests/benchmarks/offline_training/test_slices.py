"""Slices: what was cut comes back whole, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

import pytest

from benchmarks.offline_training import slices as slices_module
from benchmarks.offline_training.slices import MANIFEST, SliceError, join_slices, parse_size, write_slices

SIZE = 3000


@pytest.fixture
def content(tmp_path):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    (source / "empty").write_bytes(b"")
    (source / "inside" / "text.txt").write_text("a few words\n")
    state, numbers = 12345, bytearray()
    for _ in range(20_000):  # noise, which does not compress
        state = (1103515245 * state + 12345) % 2**31
        numbers.append(state >> 16 & 255)
    (source / "inside" / "noise").write_bytes(bytes(numbers))
    return source


@pytest.fixture
def slices(content, tmp_path):
    return write_slices(content, [f for f in content.rglob("*") if f.is_file()], tmp_path / "out", SIZE)


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_slices_hold_everything_and_none_is_above_the_size(content, slices, tmp_path):
    assert len(slices) >= 7
    assert all(file.stat().st_size == SIZE for file in slices[:-1])
    assert 0 < slices[-1].stat().st_size <= SIZE
    join_slices(tmp_path / "out", tmp_path / "joined")
    assert files_of(tmp_path / "joined") == files_of(content)


def test_slices_of_an_earlier_call_are_replaced(content, slices, tmp_path):
    write_slices(content, [content / "inside" / "text.txt"], tmp_path / "out", SIZE)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [MANIFEST, f"slice-{len(slices):03d}"]
    write_slices(content, [content / "empty"], tmp_path / "out", SIZE)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [MANIFEST, "slice-000"]


def test_slices_of_an_earlier_call_stay_until_new_ones_are_whole(content, slices, tmp_path, monkeypatch):
    before = files_of(tmp_path / "out")

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(slices_module.json, "dumps", stopped)  # of the manifest, when all slices are written
    with pytest.raises(KeyboardInterrupt):
        write_slices(content, [content / "inside" / "noise"], tmp_path / "out", SIZE)
    monkeypatch.undo()
    assert before.items() <= files_of(tmp_path / "out").items()
    join_slices(tmp_path / "out", tmp_path / "joined")
    assert files_of(tmp_path / "joined") == files_of(content)
    written = write_slices(content, [content / "inside" / "noise"], tmp_path / "out", SIZE)
    assert {file.name for file in written} | {MANIFEST} == files_of(tmp_path / "out").keys()
    join_slices(tmp_path / "out", tmp_path / "again")
    assert files_of(tmp_path / "again").keys() == {"inside/noise"}


@pytest.mark.parametrize("harm", ["missing", "short", "changed"])
def test_a_slice_that_is_not_whole_is_named_and_nothing_is_unpacked(slices, tmp_path, harm):
    file = slices[2]
    data = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    else:
        data[100] ^= 1
        file.write_bytes(data if harm == "changed" else data[:-1])
    with pytest.raises(SliceError, match="slice-002"):
        join_slices(tmp_path / "out", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_manifest_that_is_not_there_or_damaged(slices, tmp_path):
    for content in ([], {"slices": None}, {"slices": [{"name": "slice-000"}]}, {"slices": [{"name": 5, "size": 1}]}):
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(SliceError, match="is damaged"):
            join_slices(tmp_path / "out", tmp_path / "joined")
    (tmp_path / "out" / MANIFEST).write_text("[" * 9999)
    with pytest.raises(SliceError, match="is damaged"):
        join_slices(tmp_path / "out", tmp_path / "joined")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(SliceError, match="does not exist; copy it here"):
        join_slices(tmp_path / "out", tmp_path / "joined")


@pytest.mark.parametrize("harm", ["outside", "link", "link inside", "cut", "noise"])
def test_an_archive_that_is_none_or_leaves_its_folder_is_refused_and_leaves_nothing(tmp_path, harm):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        member = tarfile.TarInfo("../outside" if harm == "outside" else "inside")
        if harm.startswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd" if harm == "link" else "other"
        archive.addfile(member)
    data = {"cut": content.getvalue()[:40], "noise": b"noise" * 99}.get(harm, content.getvalue())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slice-000").write_bytes(data)
    entry = {"name": "slice-000", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({"slices": [entry]}))
    with pytest.raises(SliceError, match="are no archive to unpack .*; do not trust them"):
        join_slices(tmp_path / "out", tmp_path / "joined")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for rights to make links")
def test_what_links_lead_to_travels_as_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "own.txt").write_text("text")
    (source / "hard.txt").hardlink_to(source / "own.txt")
    (source / "soft.txt").symlink_to(source / "own.txt")
    write_slices(source, list(source.iterdir()), tmp_path / "out", SIZE)
    join_slices(tmp_path / "out", tmp_path / "joined")
    joined = sorted((tmp_path / "joined").iterdir())
    assert [(file.name, file.is_symlink(), file.read_text()) for file in joined] == [
        (name, False, "text") for name in ("hard.txt", "own.txt", "soft.txt")
    ]


def test_nothing_is_unpacked_over_what_is_there(slices, tmp_path):
    (tmp_path / "joined").mkdir()
    with pytest.raises(SliceError, match="exists; pass another folder"):
        join_slices(tmp_path / "out", tmp_path / "joined")


@pytest.mark.parametrize(
    ("text", "bytes_"), [("60MiB", 60 * 2**20), ("15 MB", 15_000_000), ("1000", 1000), ("1.5kb", 1500), ("2GiB", 2**31)]
)
def test_a_size_is_parsed_with_its_unit(text, bytes_):
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "much", "0", "-1MB", "5 parsecs"])
def test_what_is_no_size(text):
    with pytest.raises(SliceError, match="is not a size above 0"):
        parse_size(text)

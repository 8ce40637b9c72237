"""`extemb store`: what it says on stdout, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made import FINGERPRINT, compressed
from typer.testing import CliRunner

from extemb_core.cli.main import app
from extemb_core.store.store import EmbeddingStore


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["store", *map(str, args)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with EmbeddingStore.open(tmp_path / "docs.extemb") as store:
        store.put(*(compressed(at) for at in range(5)), compressed("other", fingerprint="77" * 16))
    return tmp_path / "docs.extemb"


def test_stats_print_counts_and_sizes(folder: Path) -> None:
    found = json.loads(run("stats", folder, "--json").stdout)
    assert found["n_documents"] == 6
    assert found["by_fingerprint"] == {FINGERPRINT: 5, "77" * 16: 1}
    shown = run("stats", folder).stdout
    assert f"documents of embedder {FINGERPRINT}" in shown
    assert "300" in shown  # tokens


def test_verify_ends_with_1_when_something_is_damaged(folder: Path) -> None:
    assert run("verify", folder).exit_code == 0
    data = folder / "data.mdb"
    content = bytearray(data.read_bytes())
    content[content.index(compressed(2).embeddings.half().numpy().tobytes())] ^= 1
    data.write_bytes(content)
    result = run("verify", folder)
    assert result.exit_code == 1
    assert f"damaged: {compressed(2).ref}" in result.stdout
    found = json.loads(run("verify", folder, "--json").stdout)
    assert (found["clean"], found["n_documents"], len(found["damaged"])) == (False, 5, 1)


def test_gc_keeps_what_is_named(folder: Path) -> None:
    assert json.loads(run("gc", folder, "--keep", FINGERPRINT, "--json").stdout)["freed_bytes"] > 0
    assert json.loads(run("stats", folder, "--json").stdout)["by_fingerprint"] == {FINGERPRINT: 5}
    assert run("gc", folder, "--keep", "abc").exit_code == 5


def test_export_and_import(folder: Path, tmp_path: Path) -> None:
    found = json.loads(run("export", folder, "--output", tmp_path / "out", "--json").stdout)
    assert found["n_documents"] == 6
    assert json.loads(run("import", tmp_path / "copy", tmp_path / "out", "--json").stdout) == {"n_documents": 6}
    assert json.loads(run("stats", tmp_path / "copy", "--json").stdout)["n_documents"] == 6


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    for command in ("stats", "verify", "gc"):
        result = run(command, tmp_path / "none")
        assert result.exit_code == 3
        assert "has no store in it" in result.output
    assert run("import", tmp_path / "new", tmp_path / "none").exit_code == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["stats"], ["verify"], ["gc"], ["export", "--output", "out"]])
@pytest.mark.parametrize("content", ['{"format": "extemb-store", "version": 99}', '{"format": "of another"}', ""])
def test_what_is_no_store_or_a_newer_one_cannot_be_read(folder: Path, command: list[str], content: str) -> None:
    (folder / "store.json").write_text(content)
    assert run(command[0], folder, *command[1:]).exit_code == 3


def test_a_folder_or_file_of_something_else_is_no_store(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").touch()
    for target in (other, other / "letter.txt"):
        assert run("stats", target).exit_code == 3
        assert run("import", folder, target).exit_code == 3
    run("export", folder, "--output", tmp_path / "out")
    for target in (other, other / "letter.txt"):
        assert run("import", target, tmp_path / "out").exit_code == 3
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 99'))
    assert run("import", tmp_path / "new", tmp_path / "out").exit_code == 3


def test_gc_keeps_several_that_are_named_after_one_flag(folder: Path) -> None:
    both = ["--keep", FINGERPRINT, "77" * 16]
    assert json.loads(run("gc", folder, *both, "--json").stdout)["freed_bytes"] == 0
    assert json.loads(run("stats", folder, "--json").stdout)["n_documents"] == 6

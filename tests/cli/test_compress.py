"""`extemb compress`: one whole file per document, and none that was there is lost."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from command_line import TEXT, Models, interruptible, misused, noted, refused, run
from safetensors import safe_open

from extemb_core.cli.output import ExitCode


def test_compress_writes_what_it_can_read(models: Models, mixed: Path, tmp_path: Path) -> None:
    result = run("compress", mixed, "--output", tmp_path / "out", "--json", *models.options)
    assert result.exit_code == ExitCode.INPUT
    found = json.loads(result.stdout)
    assert [row["source"] for row in found["documents"]] == [str(mixed / "good.txt")]
    assert "latin.txt" in found["not_read"][0]
    assert (tmp_path / "out" / "good.safetensors").is_file()
    noted(result.stderr, mixed)


def test_compress_writes_what_the_embedder_makes(models: Models, novel: Path, tmp_path: Path) -> None:
    import torch

    out = tmp_path / "novel.safetensors"
    result = run("compress", novel, "--output", out, "--ratio", "4", *models.options, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    (row,) = summary["documents"]
    from extemb_core.lm import ExtensibleLM
    from extemb_core.models.compressed import Compressed

    embedder = ExtensibleLM.from_pretrained(models.llm, models.embedder).embedder
    expected = embedder.compress(TEXT, ratio=4)
    with safe_open(out, framework="pt") as file:
        assert list(file.keys()) == ["embeddings"]
        metadata = file.metadata()
    assert torch.equal(Compressed.load(out).embeddings, expected.embeddings)
    assert metadata["ref"] == expected.ref == row["ref"]
    assert metadata["fingerprint"] == expected.fingerprint == summary["fingerprint"]
    assert (metadata["ratio"], metadata["n_tokens"]) == ("4", str(expected.n_tokens))
    assert metadata["chunk_size"] == str(expected.chunk_size)
    assert summary["n_tokens"] == expected.n_tokens
    assert summary["tokens_per_second"] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["novel.safetensors", "novel.txt"]


def test_compress_writes_one_file_per_document(models: Models, tmp_path: Path) -> None:
    for name in ("a/same.txt", "b/same.txt", "c/same.txt", "empty.txt", "other.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("" if "empty" in name else name[0].replace("c", "a"), encoding="utf-8")
    result = run("compress", tmp_path / "in", "--output", tmp_path / "out", *models.options)
    assert result.exit_code == 0, result.output
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert len(names) == 4
    assert "other.safetensors" in names
    assert all(name.startswith("same-") for name in names if name != "other.safetensors")
    assert "nothing: it is empty" in result.stdout
    assert "tokens/s" in result.stderr


def test_compress_shortens_a_name_that_nothing_fits_behind(models: Models, tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / letter).mkdir()
        (tmp_path / letter / f"{'é' * 125}.txt").write_text(letter, encoding="utf-8")
    result = run("compress", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out", *models.options)
    assert result.exit_code == 0, result.output
    assert [file.name[:100] for file in (tmp_path / "out").iterdir()] == ["é" * 100] * 2


def test_compress_overwrites_only_when_told(models: Models, novel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    command = ["compress", novel, "--output", out, *models.options]
    assert "pass --force to overwrite" in misused(*command)
    assert out.read_bytes() == b"precious"
    assert run(*command, "--force").exit_code == 0
    assert out.read_bytes() != b"precious"


def test_compress_refuses_one_file_for_several_documents(models: Models, novel: Path, tmp_path: Path) -> None:
    assert "pass a folder" in misused("compress", novel, novel, "--output", tmp_path / "o.safetensors")
    assert "pass a folder" in misused("compress", novel, "--output", novel)


def test_compress_refuses_a_folder_that_cannot_be_made_before_it_works(novel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in ("file/folder", "file/one.safetensors"):
        message = misused("compress", novel, "--output", tmp_path / output, "--llm", tmp_path / "not loaded")
        assert re.search(r"cannot be made \(.*\); pass another path", message)


def test_compress_leaves_no_part_of_a_file(
    models: Models, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> None:
        self.write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "out"
    message = refused(ExitCode.FAILURE, "compress", novel, "--output", out, *models.options)
    assert "No space left on device); see to the disk" in message
    assert list(out.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_leaves_whole_files_only(models: Models, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(400):
        (source / f"{number:03d}.txt").write_text(f"{number} {TEXT * 4}", encoding="utf-8")
    process = interruptible("compress", source, "--output", out, "--ratio", "2", *models.options)
    process.wait_for(lambda: out.is_dir() and len(list(out.glob("*.safetensors"))) >= 3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED, stderr
    written = sorted(out.iterdir())
    assert 3 <= len(written) < 400
    for file in written:
        with safe_open(file, framework="pt") as opened:
            assert opened.get_tensor("embeddings").shape[1] == 32
    assert stdout == ""
    # Between the rename and the count there is a moment.
    (told,) = re.findall(r"^error: interrupted; (\d+) of 400 documents are written$", stderr, flags=re.MULTILINE)
    assert int(told) in (len(written), len(written) - 1)

"""`extemb index` and `extemb ask --library` with a tiny LLM on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from retrieval_encoder import by_words
from tiny import random_embedder, tiny_llm, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from extemb_core.cli.main import app

pytest.importorskip("faiss")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from extemb_core.library.encoders import CallableEncoder

    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    models = ["--llm", str(tmp_path / "llm"), "--embedder", str(tmp_path / "embedder")]
    tiny_model("llama").save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    random_embedder(tiny_llm()).save_pretrained(tmp_path / "embedder")

    def call(*args: str | Path, with_models: bool = False) -> Any:
        return CliRunner().invoke(app, [*map(str, args), *(models if with_models else [])])

    return call


def test_a_library_is_not_made_for_nothing(run: Any, tmp_path: Path) -> None:
    library = tmp_path / "notes.extemb"
    assert run("index", "add", library, "--documents", tmp_path / "missing.txt", with_models=True).exit_code == 3
    assert not library.exists()
    (tmp_path / "a.txt").write_text("The mill is open.")
    missing = run("index", "add", library, "--documents", tmp_path / "a.txt", "--encoder", tmp_path, with_models=True)
    assert missing.exit_code in (1, 4)  # 1 without the extra
    assert not library.exists()


def test_a_library_that_holds_nothing_is_told_of(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The mill is open.")
    library = tmp_path / "notes.extemb"
    assert run("index", "add", library, "--documents", tmp_path / "a.txt", with_models=True).exit_code == 0
    asking = ("ask", "Is the mill open?", "--library", library, "--max-new-tokens", "2")
    assert "holds no documents" not in run(*asking, with_models=True).stderr
    assert run("index", "remove", library, "a.txt").exit_code == 0
    assert f"nothing was read, for {library} holds no documents" in run(*asking, with_models=True).stderr


def test_a_library_from_the_command_line(run: Any, tmp_path: Path) -> None:
    notes, library = tmp_path / "notes", tmp_path / "notes.extemb"
    notes.mkdir()
    (notes / "mill.txt").write_text("The mill was built in 1820.")
    (notes / "bridge.txt").write_text("The bridge was closed in 1987.")
    added = json.loads(run("index", "add", library, "--documents", notes, "--json", with_models=True).stdout)
    assert (added["added"], added["unchanged"]) == (2, 0)
    for command in (("add", library, "--documents", notes), ("refresh", library)):
        half = run("index", *command, "--llm-dtype", "float8", with_models=True)
        assert "dtype='float8' is not one of" in half.stderr
    again = run("index", "add", library, "--documents", notes, "--llm-dtype", "bfloat16", with_models=True)
    assert "0 documents added, 0 brought up to date, 2 unchanged" in again.output
    found = json.loads(run("index", "search", library, "the bridge", "--json").stdout)["passages"]
    assert found[0]["source"].endswith("bridge.txt")
    assert "bridge.txt:0-30" in run("index", "search", library, "the bridge", "--k", "1").stdout
    assert "lone surrogate" in run("index", "search", library, "the \udcff").stderr
    asked = run("ask", "Is the bridge open?", "--library", library, "--ratio", "2", "--k", "1", "--json",
                "--max-new-tokens", "2", with_models=True)  # fmt: skip
    (entry,) = json.loads(asked.stdout)["context"]
    assert entry["source"].endswith("bridge.txt:0-30")
    assert entry["cached"]
    listed = json.loads(run("index", "stats", library, "--json").stdout)
    assert len(listed["documents"]) == 2
    assert "mill.txt" in run("index", "stats", library).stdout
    assert run("index", "verify", library).exit_code == 0
    source = next(d["source"] for d in listed["documents"] if d["source"].endswith("mill.txt"))
    assert json.loads(run("index", "remove", library, source, "--json").stdout) == {"removed": 1}
    assert len(json.loads(run("index", "stats", library, "--json").stdout)["documents"]) == 1


def test_a_library_of_another_embedder_from_the_command_line(run: Any, tmp_path: Path) -> None:
    notes, library, llm = tmp_path / "mill.txt", tmp_path / "notes.extemb", ["--llm", tmp_path / "llm"]
    notes.write_text("The mill was built in 1820.")
    run("index", "add", library, "--documents", notes, with_models=True)
    stats = ["index", "stats", library, *llm, "--embedder", "untrained"]
    assert json.loads(run(*stats, "--json").stdout)["stale"] == 1
    shown = run(*stats).output
    assert f"index refresh {library} --llm {tmp_path / 'llm'} --embedder untrained" in shown
    assert "stale" not in json.loads(run("index", "stats", library, "--json").stdout)
    asked = run("ask", "When?", "--library", library, *llm, "--embedder", "untrained", "--ratio", "2",
                "--max-new-tokens", "2", "--json")  # fmt: skip
    assert json.loads(asked.stdout)["context"][0]["fidelity"] == 2
    refreshed = run("index", "refresh", library, *llm, "--embedder", "untrained")
    assert "1 documents compressed anew, 0 were up to date" in refreshed.output
    assert json.loads(run(*stats, "--json").stdout)["stale"] == 0
    assert "0 documents were compressed by another embedder" in run(*stats).output
    assert run("index", "refresh", tmp_path / "none", *llm).exit_code == 3
    assert not (tmp_path / "none").exists()
    assert run("index", "stats", library, "--embedder", "untrained").exit_code == 2


def test_a_text_that_was_changed_on_disk_is_found_and_mended(run: Any, tmp_path: Path) -> None:
    library, file = tmp_path / "lib", tmp_path / "fee.txt"
    file.write_text("The fee is 1000 euros, says the contract.")
    add = ("index", "add", library, "--documents", file, "--json")
    run(*add, with_models=True)
    data = (library / "data.mdb").read_bytes()
    (library / "data.mdb").write_bytes(data.replace(b"fee is 1000", b"fee is 9000"))
    verified = run("index", "verify", library)
    assert verified.exit_code == 1
    assert "problem: " in verified.stdout
    assert "the text of 'fee.txt' is not what was written" in verified.stdout
    assert "1 problems" in verified.stderr
    assert run("index", "search", library, "fee").exit_code == 3
    assert json.loads(run(*add, with_models=True).stdout)["updated"] == 1
    assert run("index", "verify", library).exit_code == 0
    assert "The fee is 1000" in run("index", "search", library, "fee").stdout


def test_what_does_not_go_together(run: Any, tmp_path: Path) -> None:
    result = run("ask", "What?", "--library", tmp_path, "--store", tmp_path)
    assert result.exit_code == 2
    assert "a library has its own documents and store" in result.output
    result = run("ask", "What?", "--documents", tmp_path, "--k", "3")
    assert result.exit_code == 2
    assert "--k counts passages of a library" in result.output
    for command in (["search", tmp_path / "none", "a"], ["remove", tmp_path / "none", "a"]):
        assert run("index", *command).exit_code == 3
    assert not (tmp_path / "none").exists()


def test_what_is_not_there_to_remove_is_named(run: Any, tmp_path: Path) -> None:
    library, names = tmp_path / "notes.extemb", ("mill.txt", "bridge.txt", "fee.txt")
    for name in names:
        (tmp_path / name).write_text(f"The mill was built in 1820, says {name}.")
    run("index", "add", library, "--documents", *(tmp_path / name for name in names), with_models=True)
    result = run("index", "remove", library, "mill.txt", "no\nsuch.txt", "mill.txt", "plan.txt")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "1 of 3 were there and are gone" in result.stderr
    assert f"warning: not in the library: no such.txt, plan.txt; `extemb index stats {library}` lists" in result.stderr
    result = run("index", "remove", library, "bridge.txt", "mill.txt", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (3, {"removed": 1, "missing": ["mill.txt"]})
    assert run("index", "remove", library, "fee.txt", "fee.txt").exit_code == 0
    assert json.loads(run("index", "stats", library, "--json").stdout)["documents"] == []


def test_a_folder_is_kept_in_step(run: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "old").mkdir(parents=True)
    library = notes / "lib"
    for name in ("plan.txt", "old/bridge.txt"):
        (notes / name).write_text(f"The mill was built in 1820, says {name}.")
    (notes / "latin.txt").write_bytes(b"M\xfcller")
    (notes / "report.docx").touch()
    command = ["index", "add", library, "--documents", notes]
    result = run(*command, "--json", with_models=True)
    assert result.exit_code == 3
    added = json.loads(result.stdout)
    assert (added["added"], added["gone"], len(added["not_read"])) == (2, [], 1)
    assert "warning: not read" in result.stderr
    assert f"folders: {notes / 'report.docx'}\n" in result.stderr
    (notes / "latin.txt").unlink()
    (notes / "plan.txt").rename(notes / "plan2.txt")
    (notes / "old" / "bridge.txt").unlink()
    result = run(*command, "--json", with_models=True)
    assert (result.exit_code, added := json.loads(result.stdout))[0] == 0
    assert (added["added"], added["unchanged"]) == (1, 0)
    assert sorted(Path(source).name for source in added["gone"]) == ["bridge.txt", "plan.txt"]
    assert f"{library}, {notes / 'report.docx'}" in result.stderr  # the library is none of its documents
    assert "2 files are gone, and still in the library; --prune removes them" in result.stderr
    result = run(*command, "--prune", with_models=True)
    assert "2 files are gone, and removed" in result.stderr
    listed = json.loads(run("index", "stats", library, "--json").stdout)["documents"]
    assert [Path(record["source"]).name for record in listed] == ["plan2.txt"]
    again = run(*command, "--prune", with_models=True)
    assert again.exit_code == 0
    assert "gone" not in again.output
    assert "0 documents added, 0 brought up to date, 1 unchanged" in again.output


def test_what_another_folder_or_python_brought_is_not_gone(run: Any, tmp_path: Path) -> None:
    from extemb_core.cli.index import _gone_from

    (tmp_path / "a").mkdir()
    sources = [str(tmp_path / "a" / "gone.txt"), str(tmp_path / "b" / "gone.txt"), "a title", "ext:12", "notes.txt"]
    assert _gone_from([tmp_path / "a"], sources, tmp_path) == sources[:1]
    assert _gone_from([tmp_path / "a" / "gone.txt"], sources, tmp_path) == []
    assert _gone_from([tmp_path / "a"], ["a/gone.txt"], tmp_path) == ["a/gone.txt"]  # as a library there names it
    assert _gone_from([tmp_path], ["https://example.com/page.html", "a\0b.txt", "a" * 5000 + ".txt"], tmp_path) == []


def test_what_cannot_be_looked_at_is_not_gone(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, library = tmp_path / "notes", tmp_path / "lib"
    (notes / "shut").mkdir(parents=True)
    for name in ("plan.txt", "shut/bridge.txt"):
        (notes / name).write_text(f"The mill was built in 1820, says {name}.")
    command = ("index", "add", library, "--documents", notes, "--prune", "--json")
    run(*command, with_models=True)
    scandir, lstat = os.scandir, os.lstat

    def shut(call: Any) -> Any:
        def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
            if "shut" in str(path).removeprefix(str(notes)) and (call is scandir or str(path).endswith("bridge.txt")):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return refuse

    with monkeypatch.context() as patched:  # as chmod 000 does, but to the owner of all files, who may run the tests
        patched.setattr(os, "scandir", shut(scandir))
        patched.setattr(os, "lstat", shut(lstat))
        result = run(*command, with_models=True)
    assert (result.exit_code, json.loads(result.stdout)["gone"]) == (3, [])
    assert "shut cannot be listed (Permission denied)" in result.stderr
    assert len(json.loads(run("index", "stats", library, "--json").stdout)["documents"]) == 2
    (notes / "shut" / "bridge.txt").unlink()
    assert json.loads(run(*command, with_models=True).stdout)["gone"] == ["notes/shut/bridge.txt"]


@pytest.mark.parametrize(
    "named", [{"title": "bridge.txt"}, {"metadata": {"source": "bridge.txt"}},
              {"title": "A bridge", "metadata": {"source": "bridge.md"}}, {"metadata": {"source": "bridge.html"}}],
)  # fmt: skip
def test_what_python_named_is_not_gone(run: Any, tmp_path: Path, named: dict[str, Any]) -> None:
    from extemb_core import Document, ExtensibleLM, Library

    (home := tmp_path / "home").mkdir()
    (home / "plan.txt").write_text("The mill was built in 1820.")
    with Library(home / "lib", ExtensibleLM.from_pretrained(tmp_path / "llm", tmp_path / "embedder")) as library:
        library.add(Document("The bridge was closed in 1987.", **named))
    added = run("index", "add", home / "lib", "--documents", home, "--prune", "--json", with_models=True)
    assert (json.loads(added.stdout)["added"], json.loads(added.stdout)["gone"]) == (1, [])

"""A library is imported without what it would take along, and the rest of the process does not notice."""

from __future__ import annotations

import json.decoder
import subprocess
import sys

import pytest

from extemb_core.utils.imports import hidden


def test_a_hidden_package_cannot_be_imported_and_is_there_afterwards():
    before = json.decoder
    with hidden("json"):
        for name in ("json", "json.decoder"):
            with pytest.raises(ImportError):
                __import__(name)
    assert json.decoder is before is sys.modules["json.decoder"]


def test_a_package_that_was_not_imported_yet_can_be_afterwards(tmp_path, monkeypatch):
    (tmp_path / "hidden_then_seen.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("hidden_then_seen"), pytest.raises(ImportError):
        __import__("hidden_then_seen")
    assert __import__("hidden_then_seen")


def test_importing_the_word_index_does_not_begin_jax(tmp_path):
    """JAX takes most of a GPU's memory as soon as it computes anything, as bm25s lets it when it is imported."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('jax was imported')")
    run = "import extemb_core.library.bm25"
    subprocess.run([sys.executable, "-c", run], check=True, env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])})

"""Tiny models on disk for all commands, and texts that they read."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TEXT, Models
from tiny import save_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder)
    return Models(folder / "llm", folder / "embedder")


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTEMB_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "200")  # nothing in --help is cut off
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    file = tmp_path / "novel.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with a text, one that cannot be read, and files of types that are not."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.txt").write_text("A clerk was hired.", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"M\xfcller")
    for name in ("report.docx", "README"):
        (folder / name).write_bytes(b"x")
    return folder

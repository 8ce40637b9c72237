"""`extemb export`: the folder and how to serve it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_tiny
from typer.testing import CliRunner

from extemb_core.cli.main import app


@pytest.mark.parametrize(("embedder", "layer", "flag"), [("untrained", 1, "mm"), ("embedder", 0, "prompt")])
def test_it_says_how_the_folder_is_served(embedder: str, layer: int, flag: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    named = embedder if embedder == "untrained" else str(tmp_path / embedder)
    options = ["export", "--llm", str(tmp_path / "llm"), "--embedder", named, "--vllm"]
    result = CliRunner().invoke(app, [*options, str(tmp_path / "served")])
    assert result.exit_code == 0, result.output
    assert f"vllm serve {tmp_path / 'served'} --enable-{flag}-embeds" in result.stderr
    result = CliRunner().invoke(app, [*options, str(tmp_path / "other"), "--json"])
    assert json.loads(result.stdout) | {"fingerprint": ""} == {
        "output": str(tmp_path / "other"), "entry_layer": layer, "fingerprint": "",
    }  # fmt: skip
    result = CliRunner().invoke(app, [*options, str(tmp_path / "served")])
    assert (result.exit_code != 0, "name a new folder" in result.stderr) == (True, True)

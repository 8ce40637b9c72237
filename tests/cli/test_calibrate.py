"""`extemb calibrate`: its table, its JSON, its folder, and one sentence where it cannot go on."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import SENTENCES, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from extemb_core.cli import calibrate as calibrating
from extemb_core.cli.main import app
from extemb_core.cli.output import ExitCode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLM whose window holds a sample, and text to measure."""
    folder = tmp_path_factory.mktemp("calibrate")
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    (folder / "text.txt").write_text("\n".join(f"{at}. {SENTENCES}" for at in range(30)))
    return folder


def run(folder: Path, *args: str | Path) -> Any:
    options = ["calibrate", "--llm", folder / "llm", "--text", folder / "text.txt", "--limit", "2"]
    return CliRunner().invoke(app, [*map(str, options), *map(str, args)], env={"NO_COLOR": "1", "EXTEMB_DEBUG": ""})


def test_a_table_and_the_layer_on_stdout_and_an_embedder_to_ask_with(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(folder, "--output", out, "--layers", "1", "2", "--ratios", "1,2", "4")
    assert result.exit_code == 0, result.output
    lines = [line.split("  ")[0] for line in result.stdout.splitlines()]
    chosen = json.loads((out / "calibration.json").read_text())["summary"]["layer"]
    layers = [f"layer {layer}" + (" (chosen)" if layer == chosen else "") for layer in (1, 2)]
    assert lines[:6] == ["loss of text (n = 2)", "no text", "cut to as many positions", "full text", *layers]
    assert lines[-1].startswith(f"entry layer {chosen}: ")
    assert result.stdout.splitlines()[0].split("  ")[-1].strip() == "minus the best"
    assert f"--embedder {out}" in result.stderr
    asked = CliRunner().invoke(
        app,
        [
            "ask", "What rained?", "--llm", str(folder / "llm"), "--embedder", str(out), "--documents",
            str(folder / "text.txt"), "--ratio", "8", "--max-new-tokens", "2", "--json",
        ],
    )  # fmt: skip
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["context"][0]["fidelity"] == 8


def test_json_is_one_object(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--output", tmp_path / "out", "--ratios", "2", "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["layer"] == found["summary"]["layer"]
    assert (found["output"], list(found["summary"]["tasks"])) == (str(tmp_path / "out"), ["text"])
    assert len(found["fingerprint"]) == 32


def test_interrupted_it_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from extemb_core.evaluation.calibration import CalibrationExperiment

    def measure(self: Any, group: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(CalibrationExperiment, "measure", measure)
    result = run(folder, "--output", tmp_path / "out")
    assert result.exit_code == ExitCode.INTERRUPTED
    assert f"the same command goes on from {tmp_path / 'out'}" in result.stderr


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (ExitCode.SETTINGS, ["--layers", "1", "7"], "layer 7 is beyond the 3 layers"),
        (ExitCode.SETTINGS, ["--ratios", "2", "6"], "ratio=6 is not a power of two"),
        (ExitCode.SETTINGS, ["--weighting", "frequency"], "weighting='frequency' came with 0 files"),
        (ExitCode.INPUT, ["--data", "none.jsonl"], "none.jsonl does not exist"),
        (ExitCode.SETTINGS, ["--output", "{folder}"], "holds 'llm', which is not a calibration's"),
    ],
)
def test_errors_are_one_line(folder: Path, tmp_path: Path, code: int, arguments: list[str], message: str) -> None:
    result = run(folder, "--output", tmp_path / "out", *(word.format(folder=folder) for word in arguments))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_numbers_must_be_numbers(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--output", tmp_path / "out", "--layers", "four").exit_code == ExitCode.USAGE


def test_defaults_are_those_of_the_library() -> None:
    from extemb_core.evaluation.calibration import CalibrationConfig

    fields = {field.name: field.default for field in dataclasses.fields(CalibrationConfig)}
    for name, parameter in inspect.signature(calibrating.calibrate).parameters.items():
        if name in fields and parameter.default not in (None, inspect.Parameter.empty):
            assert parameter.default == fields[name], name
    assert fields["ratios"] == (1, 2, 4, 8)

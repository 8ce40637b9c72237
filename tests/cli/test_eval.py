"""`extemb eval`: records that runs go on from, and one line for what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Models, misused, run

from extemb_core.cli.output import ExitCode


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [
        {"id": str(at), "context": f"Ship {at} is {colour}.", "question": "Which colour?", "answers": [colour]}
        for at, colour in enumerate(("red", "blue", "green"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_eval_ppl_writes_a_record_and_goes_on_from_it(models: Models, novel: Path, tmp_path: Path) -> None:
    out = tmp_path / "ppl.json"
    command = ["eval", "ppl", "--data", novel, *models.options, "--json", out, "--target", "8", "--windows", "3"]
    first = run(*command, "--contexts", "16,32", "--ratios", "2", "8", "--limit", "2")
    assert (first.exit_code, first.stdout) == (0, f"{out}\n"), first.output
    record = json.loads(out.read_text())
    assert (record["kind"], record["n"], record["config"]["contexts"]) == ("ppl", 2, [16, 32])
    arms = ["none", "nearest/2", "nearest/8", "streaming", "extensible/2", "extensible/8", "full"]
    assert list(record["summary"]["32"]["arms"]) == arms
    assert record["provenance"]["command"].split()[0] == "extemb"
    again = run(*command, "--contexts", "16,32", "--ratios", "2", "8")
    assert again.exit_code == 0, again.output
    more = json.loads(out.read_text())
    assert (more["n"], more["parts"]) == (3, 2)
    assert record["samples"][0] in more["samples"]
    message = " ".join(run(*command, "--contexts", "16", "--ratios", "2", "8").stderr.split())
    assert "another contexts ([16, 32], now [16])" in message


def test_eval_qa_without_an_embedder_has_the_controls(models: Models, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "qa.json"
    command = ["eval", "qa", "--data", questions, "--llm", models.llm, "--embedder", "none", "--json", out]
    result = run(*command, "--ratios", "4", "--controls", "truncated")
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert list(record["summary"]["arms"]) == ["none", "truncated/4", "full"]
    assert record["fingerprint"] is None


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (ExitCode.INPUT, ["qa", "--data", "none.jsonl", "--ratios", "4"], "none.jsonl does not exist"),
        (ExitCode.SETTINGS, ["qa", "--data", "{questions}", "--ratios", "3"], "ratio=3 is not one of the ratios"),
        (ExitCode.SETTINGS, ["qa", "--data", "{questions}", "--template", "verse"], "template='verse' is not one of"),
        (
            ExitCode.INPUT,
            ["ppl", "--data", "{questions}", "--ratios", "4", "--target", "8"],
            'line 1: each row must have a "text"',
        ),
        (ExitCode.INPUT, ["qa", "--data", "{novel}", "--ratios", "4"], "is not .jsonl"),
    ],
)
def test_eval_errors(
    models: Models, questions: Path, novel: Path, tmp_path: Path, code: ExitCode, arguments: list[str], message: str
) -> None:
    filled = [word.format(questions=questions, novel=novel) for word in arguments]
    result = run("eval", *filled, *models.options, "--json", tmp_path / "out.json")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out.json").exists()
    assert "are not whole numbers" in misused("eval", "ppl", "--data", "x", "--json", "y", "--ratios", "four")

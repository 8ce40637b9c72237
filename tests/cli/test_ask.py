"""`extemb ask` and `extemb chat`: answers on stdout, what was read on stderr, and bad input before a model loads."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Models, answer_of, ask_about, misused, noted, refused, run
from tiny import SENTENCES, random_embedder, tiny_llm

import extemb_core
from extemb_core.cli import ask as asking
from extemb_core.cli.output import ExitCode


def test_defaults_are_those_of_the_library() -> None:
    from extemb_core.lm import ExtensibleLM
    from extemb_core.models.generation import Sampling

    for command in (asking.ask, asking.chat):
        ours = {name: p.default for name, p in inspect.signature(command).parameters.items()}
        library = inspect.signature(ExtensibleLM.ask).parameters
        assert ours["budget"] == library["budget"].default
        assert ours["ratio"] == library["ratio"].default
        assert ours.get("plan") == library["plan"].default
        for name in ("max_new_tokens", "temperature", "seed"):
            assert ours[name] == getattr(Sampling(), name)


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


# -- documents, settings and weights ---------------------------------------------------------------------------


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


def test_ask_and_chat_read_a_folder_as_far_as_they_can(models: Models, mixed: Path) -> None:
    options = ["--documents", mixed, "--max-new-tokens", "2", "--json", *models.options]
    for command, stdin in ((["ask", "Who?"], None), (["chat"], "Who?\n")):
        result = run(*command, *options, stdin=stdin)
        assert result.exit_code == ExitCode.INPUT
        (entry,) = json.loads(result.stdout)["context"]
        assert entry["source"] == str(mixed / "good.txt")
        noted(result.stderr, mixed)


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


def test_chat_says_what_it_does_not_read_any_more(models: Models) -> None:
    said = "The harbour was full of ships before the fog came in, and nobody counted them. " * 2
    result = run("chat", "--max-new-tokens", "2", *models.options, stdin=f"{said}\n" * 30)
    assert "tokens of the oldest turns are not read any more, for want of positions" in result.stderr
    assert "not read, for want of positions: the oldest turns" not in result.stderr


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

"""Targets: the LLM's own answer where it agrees with a reference, else the reference, and no work twice."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

from extemb_core.errors import ConfigError
from extemb_core.models.generation import Generated
from extemb_core.models.llm import LLM
from extemb_core.questions import read_questions, templates
from extemb_core.training import targets as targets_module
from extemb_core.training.targets import TargetCounts, make_targets


@pytest.fixture
def llm(monkeypatch):
    """Answers every question with a sentence about 1820, and counts the prompts."""
    llm = LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer(), name="tiny")
    llm.asked = []

    def generate(prompts, sampling):
        llm.asked += [llm.decode(prompt) for prompt in prompts]
        return [Generated(text=" in 1820\n", token_ids=[1], finish_reason="stop") for _ in prompts]

    monkeypatch.setattr(llm, "generate", generate)
    return llm


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"id": str(at), "context": f"The mill was built in {year}. " * count, "question": "When?", "answers": [answer]}
        for at, (year, count, answer) in enumerate([(1820, 1, "1820"), (1830, 1, "1830"), (1820, 90, "1820")])
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "questions.jsonl"


def test_the_own_answer_is_the_target_where_it_agrees(llm, questions, tmp_path):
    out = tmp_path / "targets.jsonl"
    counts = make_targets(llm, [questions], out, max_document_tokens=100)
    assert counts == TargetCounts(n=3, own=1, too_long=1)
    assert [row.answers for row in read_questions([out])] == [("in 1820",), ("1830",), ("1820",)]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["target"] for row in rows] == ["own", "reference", "too long"]
    assert rows[0]["references"] == ["1820"]
    assert len(llm.asked) == 2
    assert "The mill was built in 1820." in llm.asked[0]
    assert not out.with_name("targets.jsonl.partial").exists()


def test_an_answer_is_as_long_as_its_own_prompt_allows_whatever_stands_beside_it(llm, tmp_path, monkeypatch):
    context = "The mill was built in 1820."
    rows = [{"id": answer[:3], "context": context, "question": "When?", "answers": [answer]}
            for answer in ("1820", "yes", " ".join(["long"] * 20))]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    longest = []

    def generate(prompts, sampling):
        longest.extend([sampling.max_new_tokens] * len(prompts))
        return [Generated(text=f"of {sampling.max_new_tokens}", token_ids=[1], finish_reason="stop") for _ in prompts]

    monkeypatch.setattr(llm, "generate", generate)
    make_targets(llm, [tmp_path / "questions.jsonl"], tmp_path / "targets.jsonl")
    assert longest == [templates()[name]["max_new_tokens"] for name in ("short", "yes_no", "long")]


def test_a_stopped_run_goes_on(llm, questions, tmp_path, monkeypatch):
    out = tmp_path / "targets.jsonl"
    real = targets_module._rows

    def stopped(*args):
        if len(llm.asked) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(targets_module, "_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_targets(llm, [questions], out, batch_size=1)
    assert not out.exists()
    with (tmp_path / "targets.jsonl.partial").open("a") as stream:
        stream.write('{"id": "half a li')
    monkeypatch.setattr(targets_module, "_rows", real)
    with pytest.raises(ConfigError, match="holds a run with another limit"):
        make_targets(llm, [questions], out, limit=2)
    assert make_targets(llm, [questions], out, batch_size=1).n == 3
    assert len(llm.asked) == 2  # none twice
    assert [question.id for question in read_questions([out])] == ["0", "1", "2"]


def test_rows_are_written_to_jsonl(llm, questions, tmp_path):
    with pytest.raises(ConfigError, match=r"does not end in \.jsonl"):
        make_targets(llm, [questions], tmp_path / "targets.txt")


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"batch_size": -1}, {"limit": 0}, {"limit": -3}, {"max_document_tokens": -5}]
)
def test_numbers_that_cannot_be_are_named(llm, questions, tmp_path, settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}="):
        make_targets(llm, [questions], tmp_path / "targets.jsonl", **settings)
    assert not list(tmp_path.glob("targets*"))

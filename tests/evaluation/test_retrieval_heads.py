"""Heads are ranked by how often they look at the sentence that answers."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tiny import entering, random_embedder, tiny_llm, tool_llm

from extemb_core.context.retrieval_heads import RetrievalHeads
from extemb_core.errors import ConfigError
from extemb_core.evaluation.retrieval_heads import N_HEADS, HeadsExperiment
from extemb_core.evaluation.runs import read_record, run
from extemb_core.evaluation.settings import HeadsConfig
from extemb_core.models.config import ExtensibleEmbedderConfig

SHIPS = [f"Ship number {at} sailed to the port of {at}." for at in range(10)]  # all of one length
TEXT = " ".join(SHIPS)


@pytest.fixture
def make(tmp_path):
    def experiment(rows, llm=None, embedder=None, **settings):
        llm = llm or tool_llm()
        file = tmp_path / "q.jsonl"
        file.write_text("".join(json.dumps({"id": f"a:{at}", **row}) + "\n" for at, row in enumerate(rows)))
        embedder = embedder or entering(llm, ratios=(1, 2, 4, 8), chunk_size=32)
        return HeadsExperiment(HeadsConfig(llm="tiny", data=(str(file),), **settings), llm, embedder)

    return experiment


def row(answer, context=TEXT, question="Where did it sail?"):
    return {"context": context, "question": question, "answers": [answer]}


def test_the_head_that_looks_at_answers_comes_first(make, tmp_path, monkeypatch):
    rows = [row(f"port of {at}", question=f"Which? {at}") for at in (2, 5, 7, 9)]

    def look(self, question, parts):
        """Head 5 looks at the answer, head 6 at it for two of the questions, the others at the beginning."""
        answer, n = int(question.split()[1]), len(parts[0])
        shares = np.full((len(self.heads), n), 0.1 / n)
        at = int((answer + 0.5) / len(SHIPS) * n)
        shares[:, 0] = 0.9
        shares[5, at] = 1.8
        shares[6, at if answer > 6 else 0] = 1.8
        return shares

    monkeypatch.setattr(RetrievalHeads, "look", look)
    summary = run(make(rows), tmp_path / "heads.json", show_progress=False)["summary"]
    assert summary["heads"][:2] == [[1, 1], [1, 2]]
    assert summary["found"] == [1, 0.5, *[0] * (N_HEADS - 2)]
    assert summary["questions"] == 4
    assert summary["found_by_chance"] == pytest.approx(1 / 10)
    ExtensibleEmbedderConfig(entry_layer=1, retrieval_heads=summary["heads"])


def test_a_run_looks_at_every_head_and_leaves_out_what_tells_nothing(make, tmp_path):
    rows = [row("of 3"), row("Atlantis"), row("sailed"), row("of 1", context="Few words.")]
    record = run(make(rows), tmp_path / "heads.json", show_progress=False)
    told = {sample["id"]: sample["holding"] for sample in record["samples"]}
    assert {name.split()[1]: n for name, n in told.items()} == {"a:0": 1, "a:1": 0, "a:2": 0, "a:3": 0}
    assert record["summary"]["questions"] == 1
    assert len(record["summary"]["heads"]) == N_HEADS
    with pytest.raises(ConfigError, match="no answer stands in a few of at least three sentences"):
        run(make(rows[1:2]), tmp_path / "none.json", show_progress=False)


def test_heads_of_no_use_are_not_looked_for(make):
    with pytest.raises(ConfigError, match="enters above layer 0"):
        make([row("of 3")], tiny_llm(), random_embedder(tiny_llm()))
    sliding = tiny_llm("gemma2")
    with pytest.raises(ConfigError, match="does not attend to all of a text alike"):
        make([row("of 3")], sliding, entering(sliding))


def test_the_heads_that_ship_are_those_of_their_record():
    record = read_record(Path(__file__).parents[2] / "benchmarks/results/heads_joint.json")
    shipped = resources.files("extemb_core") / "pretrained/smollm2-135m-joint/config.json"
    assert json.loads(shipped.read_text(encoding="utf-8"))["retrieval_heads"] == record["summary"]["heads"]
    assert record["summary"]["found"][-1] > record["summary"]["found_by_words"]

"""The plan of a run: each objective's share, every sample once a round, and the same again from the seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from extemb_core.models.llm import LLM
from extemb_core.training import batches as batches_module
from extemb_core.training.batches import Batches, Collator, plan_batches
from extemb_core.training.config import TrainingConfig
from extemb_core.training.objectives import QuestionReadings, reconstruction, shuffled
from extemb_core.training.reading_loss import Reading


class Texts:
    """Seven samples of 64 tokens; sample k holds 100 k to 100 k + 63."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"input_ids": np.arange(100 * index, 100 * index + 64)}


class Questions:
    def reading(self, index):
        return Reading(((np.array([index]), "text"), (np.array([1]), "answer")))


@pytest.fixture
def make(llm):
    def batches(objectives, **changes):
        settings = {"n_batches": 50, "batch_size": 2, "seed": 0, "llm": llm, "samples": Texts(), "spans": (4, 16)}
        return Batches(objectives, **(settings | {"questions": Questions()} | changes))

    return batches


def test_objectives_have_their_shares_and_a_batch_has_one(make):
    batches = make({"two_stream": 8, "reconstruction": 1, "questions": 1}, n_batches=2000)
    shares = Counter(batches.objectives)
    assert shares["two_stream"] == pytest.approx(1600, abs=80)
    assert shares["questions"] == pytest.approx(200, abs=50)
    for batch in range(20):
        assert {batches[2 * batch + row]["objective"] for row in range(2)} == {batches.objectives[batch]}


def test_each_sample_comes_once_a_round_in_an_order_of_its_own(make):
    batches = make({"two_stream": 1}, n_batches=7)
    seen = [int(batches[at]["sample"][0]) // 100 for at in range(len(batches))]
    assert len(seen) == 14
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]


def test_the_order_of_a_round_is_drawn_once(make):
    shuffled.cache_clear()
    batches = make({"two_stream": 2, "reconstruction": 1, "recall": 1}, n_batches=28)
    for at in range(len(batches)):
        _ = batches[at]
    assert shuffled.cache_info().misses <= 8  # 56 samples of 7, each objective in rounds of its own


def test_questions_come_in_turn_whatever_stands_between_them(make):
    batches = make({"two_stream": 1, "questions": 1})
    asked = [batches[at]["readings"][0].parts[0][0].item() for at in range(len(batches))
             if batches[at]["objective"] == "questions"]  # fmt: skip
    assert asked == list(range(len(asked)))
    assert len(asked) > 20


def test_the_plan_follows_from_the_seed(make):
    objectives = {"two_stream": 1, "reconstruction": 1}

    def shown(batches):
        items = [batches[at] for at in range(len(batches))]
        return [item["sample"].tolist() if "sample" in item else [r.parts[-1][0].tolist() for r in item["readings"]]
                for item in items]  # fmt: skip

    assert shown(make(objectives)) == shown(make(objectives))
    assert shown(make(objectives)) != shown(make(objectives, seed=1))


def test_spans_to_reconstruct_grow_and_lie_side_by_side(make):
    batches = make({"reconstruction": 1}, n_batches=200)
    lengths = [len(batches[at]["readings"][0].parts[-1][0]) for at in range(len(batches))]
    assert max(lengths[:20]) <= 6
    assert max(lengths[-40:]) >= 14
    assert min(lengths) == 4
    item = batches[len(batches) - 1]["readings"]
    spans = [reading.parts[-1][0].tolist() for reading in item]
    joined = [index for span in spans for index in span]
    assert joined == list(range(joined[0], joined[0] + len(joined)))
    assert len(joined) <= 32 + len(spans[0])


def test_a_reconstruction_is_the_span_compressed_then_asked_for(llm):
    reading = reconstruction(llm, np.arange(5, 15))
    assert [role for _, role in reading.parts] == ["document", "text", "answer"]
    assert reading.parts[0][0].tolist() == reading.parts[2][0].tolist() == list(range(5, 15))
    assert "word for word" in llm.decode(reading.parts[1][0].tolist())


def test_what_is_recalled_is_drawn_anew_for_each_item(make):
    batches = make({"recall": 1}, n_batches=8)
    shown = [[ids.tolist() for ids, _ in batches[at]["readings"][0].parts] for at in range(len(batches))]
    assert shown == [[ids.tolist() for ids, _ in batches[at]["readings"][0].parts] for at in range(len(batches))]
    again = [parts[2:] for parts in shown if parts[0] == shown[0][0]]
    assert len(again) > 1
    assert again[0] != again[1]


def test_ratios_are_drawn_per_sample_and_again_the_same():
    collator = Collator([2, 4, 8], [16, 32], seed=1)
    items = [{"sample": torch.arange(4), "index": at} for at in range(40)]
    batch = collator(items)
    assert {ratio for drawn in batch["ratios"] for ratio in drawn} == {2, 4, 8}
    assert all(len(drawn) == 1 for drawn in batch["ratios"])
    assert collator(items)["ratios"] == batch["ratios"]
    assert {collator(items[at : at + 2])["chunk_size"] for at in range(20)} == {16, 32}
    assert Collator([2, 4, 8], [16], seed=2)(items)["ratios"] != batch["ratios"]
    assert all(drawn in ([2, 4], [2, 8], [4, 8]) for drawn in Collator([2, 4, 8], [16], 1, 2)(items)["ratios"])


def test_two_streams_take_chunks_that_leave_something_to_predict():
    collate = Collator([2], [16, 64], seed=0)
    samples = [
        [{"sample": torch.arange(64), "index": at}, {"sample": torch.arange(17), "index": at}] for at in range(9)
    ]
    assert {collate(items)["chunk_size"] for items in samples} == {16}
    readings = [[{"readings": [], "index": at}] for at in range(9)]
    assert {collate(items)["chunk_size"] for items in readings} == {16, 64}


def test_readings_of_all_items_join_one_batch():
    readings = [Reading(((np.array([at]), "answer"),)) for at in range(3)]
    batch = Collator([2], [16], 0)([{"readings": readings[:2], "index": 0}, {"readings": readings[2:], "index": 1}])
    assert batch["readings"] == readings
    assert batch["ratios"] == [[2]] * 3


def test_a_ratio_named_twice_comes_twice_as_often_and_once_a_sample():
    collate = Collator((2, 4, 4, 8), (16,), seed=0, ratios_per_sample=2)
    drawn = [collate([{"sample": torch.arange(3), "index": at}])["ratios"][0] for at in range(400)]
    assert all(len(set(ratios)) == 2 for ratios in drawn)
    alone = Collator((2, 4, 4), (16,), seed=0)
    counts = [alone([{"sample": torch.arange(3), "index": at}])["ratios"][0][0] for at in range(400)].count(4)
    assert 230 < counts < 300


def test_what_a_run_says_of_its_questions_reaches_them(asked, monkeypatch):
    given = {}
    monkeypatch.setattr(batches_module, "QuestionReadings", lambda *_, **settings: given.update(settings))
    changed = {"most_per_source": 7, "raw_share": 0.11, "mixed_share": 0.12, "focus_share": 0.13, "most_distractors": 5,
               "seed": 3}  # fmt: skip
    plan_batches(replace(asked, **changed), LLM.from_pretrained(asked.llm), 1, (16,))
    assert changed.items() <= given.items()
    settings, taken = ({field.name for field in fields(kind)} for kind in (TrainingConfig, QuestionReadings))
    assert changed.keys() == (settings & taken) - {"questions", "llm"}

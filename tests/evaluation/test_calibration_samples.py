"""What a calibration measures: continuations after each form of their context, and answers as `eval qa` has them."""

from __future__ import annotations

import numpy as np
import pytest
from anchored import scores_of
from tiny import tiny_model, tiny_tokenizer

from extemb_core.evaluation.calibration_samples import Answers, Continuations, arm_losses
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM


@pytest.fixture(scope="module")
def llm():
    """Four layers, and a window that holds a sample."""
    model = tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=4)
    return LLM(model, tiny_tokenizer(), name="tiny")


def test_continuations_are_scored_after_each_form_of_their_context(llm, text):
    ids = llm.encode(text.read_text())
    task = Continuations(llm, [text.read_text()], (1, 2, 4), limit=2)
    reading = task.reading(task.names[1])
    start = int(task.names[1].split(":")[1])
    assert (reading.text == ids[start - 512 : start]).all()
    assert list(reading.controls) == ["none", "truncated/2", "truncated/4", "full"]
    embedder = ExtensibleEmbedder.untrained(llm, 2)
    (losses,) = arm_losses(llm, [reading], {"2": embedder}, (1, 2, 4))
    following = ids[start : start + 128]
    for arm, context in (("none", ids[:0]), ("truncated/4", ids[start - 128 : start]), ("full", reading.text)):
        expected = -np.mean(scores_of(llm, [context, following[:1]], following[1:]))
        assert losses[arm] == pytest.approx(expected, abs=1e-4)
    assert losses["2/1"] == pytest.approx(losses["full"], abs=1e-4)  # one chunk that opens the prompt
    assert losses["2/4"] != pytest.approx(losses["full"], abs=1e-4)


def test_answers_are_measured_as_eval_qa_does(llm, questions):
    from extemb_core.evaluation.qa import QaConfig, QaExperiment

    embedder = ExtensibleEmbedder.untrained(llm, 2)
    task = Answers(llm, [str(questions)], (2, 4))
    ours = dict(
        zip(task.names, arm_losses(llm, list(map(task.reading, task.names)), {"2": embedder}, (2, 4)), strict=True)
    )
    settings = QaConfig(llm="tiny", data=(str(questions),), ratios=(2, 4), controls=("truncated",), generate=False)
    experiment = QaExperiment(settings, llm, embedder)
    for sample in experiment.measure([name for group in experiment.groups() for name in group]):
        for arm, measured in sample["arms"].items():
            assert ours[sample["id"]][arm.replace("extensible", "2")] == pytest.approx(measured["loss"], abs=1e-4), arm

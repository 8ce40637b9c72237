"""A tiny LLM on disk, and runs of text and of questions that begin from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny import SENTENCES, tiny_model, tiny_tokenizer

from extemb_core.training.config import TrainingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny LLM and text to train on."""
    folder = tmp_path_factory.mktemp("train")
    tiny_model("llama").save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    lines = SENTENCES.splitlines()
    rows = [json.dumps({"text": " ".join(lines[at % 6 :] + lines[: at % 6] * (at + 1))}) for at in range(12)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    (folder / "held_out.txt").write_text(SENTENCES)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return TrainingConfig(
        llm=str(folder / "llm"), data=(str(folder / "data.jsonl"),), output=str(tmp_path / "run"),
        embedder={"num_layers": 2, "chunk_size": 16, "ratios": (2, 4)}, sample_length=48, batch_size=2,
        total_tokens=6 * 96, warmup_steps=0, learning_rate=5e-3, connector_lr_factor=2.0, save_steps=3, eval_steps=3,
        logging_steps=1, eval_samples=2, device="cpu",
    )  # fmt: skip


@pytest.fixture
def asked(config, folder, tmp_path):
    """A run on questions, with an LLM whose window holds them."""
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    rows = [
        {"id": f"made:{at}", "context": f"The {place} was built in 18{at}0.",
         "question": f"When was the {place} built?", "answers": [f"18{at}0"]}
        for at, place in enumerate(("harbour", "bridge", "mill", "tower", "market"))
    ]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return replace(config, llm=str(tmp_path / "llm"), data=(), questions=(str(tmp_path / "questions.jsonl"),),
                   objectives={"questions": 1}, eval_data=())  # fmt: skip


@pytest.fixture
def entering(asked, config):
    return replace(
        asked, data=config.data, trained="both", reader_rank=4, mixed_share=0.5, focus_share=0.5, ratios=(1, 2, 4, 8),
        embedder={"entry_layer": 2, "chunk_size": 16, "ratios": (1, 2, 4, 8), "lora_rank": 4,
                  "token_weighting": "frequency"},
        objectives={"questions": 0.4, "recall": 0.2, "reconstruction": 0.2, "two_stream": 0.2},
    )  # fmt: skip

"""Several processes on one device train as one process with as much to a step would."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import SENTENCES, save_tiny

from benchmarks.ending import run as run_script
from benchmarks.offline_training import one_device
from benchmarks.offline_training.one_device import main
from extemb_core.errors import ConfigError, TrainingError, WeightsNotFoundError
from extemb_core.training.config import TrainingConfig
from extemb_core.training.trainable import TrainableModel
from extemb_core.training.trainer import train


@pytest.fixture
def config(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "text.txt").write_text(SENTENCES * 8)
    return TrainingConfig(
        llm=str(tmp_path / "llm"), data=(str(tmp_path / "text.txt"),), output=str(tmp_path / "together"),
        embedder={"entry_layer": 1, "chunk_size": 16, "ratios": (1, 2, 4), "lora_rank": 2}, trained="both",
        reader_rank=2, objectives={"recall": 1}, sample_length=32, batch_size=2, total_tokens=3 * 128, warmup_steps=0,
        learning_rate=5e-3, logging_steps=1, device="cpu", dtype="float32", distillation=0.5,
    )  # fmt: skip


def settings_file(config, tmp_path, name="settings.json"):
    (tmp_path / name).write_text(json.dumps(asdict(config)))
    return str(tmp_path / name)


@pytest.mark.cluster
def test_two_processes_take_the_steps_of_one_that_accumulates_two_batches(config, tmp_path):
    main([settings_file(config, tmp_path), "--processes", "2", "--decay", "1"])
    alone = replace(config, output=str(tmp_path / "alone"), accumulation_steps=2)
    train(alone)
    for file in ("model.safetensors", "reader/adapter_model.safetensors"):
        found, expected = (load_file(tmp_path / run / file) for run in ("together", "alone"))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    rows = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("together", "alone")]  # fmt: skip
    together, expected = [[row for row in run if "loss" in row] for run in rows]
    assert [row["step"] for row in together] == [1, 2, 3]
    for row, other in zip(together, expected, strict=True):
        assert row["tokens"] == other["tokens"]
        assert row["learning_rate"] == pytest.approx(other["learning_rate"])
        assert row["loss_recall"] == pytest.approx(other["loss_recall"], abs=1e-3)


def test_a_training_that_fails_leaves_what_was_saved_last(config, tmp_path, monkeypatch):
    norms = iter([torch.ones(()), torch.ones(()), torch.tensor(float("nan"))])
    monkeypatch.setattr(one_device, "_average_gradients", lambda *_: next(norms))
    monkeypatch.setattr(TrainableModel, "save", lambda _, folder: saved.append(folder))
    saved = []
    try:
        with pytest.raises(TrainingError, match="gradients became nan at step 2"):
            one_device._train(0, [replace(config, save_steps=2, total_tokens=4 * 64)], [0], None, 0.4, str(tmp_path))
    finally:
        torch.distributed.destroy_process_group()
    assert saved == [tmp_path / "together"]


@pytest.mark.cluster
def test_some_processes_read_longer_texts(config, tmp_path):
    longer = replace(config, sample_length=64, batch_size=1, ratios=(2,), seed=1)
    files = [settings_file(config, tmp_path), settings_file(longer, tmp_path, "longer.json")]
    main([*files, "--processes", "1", "1"])
    rows = [json.loads(line) for line in (tmp_path / "together" / "log.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [128, 256, 384]
    assert {"loss_recall", "loss_recall_2", "loss_ratio_2_2"} <= rows[0].keys()
    assert "loss_ratio_4_2" not in {name for row in rows for name in row}
    assert rows[0]["loss"] == pytest.approx((rows[0]["loss_recall"] + rows[0]["loss_recall_2"]) / 2, abs=1e-4)


@pytest.mark.cluster
def test_what_a_process_cannot_do_is_the_error_of_all(config, tmp_path, monkeypatch, capsys):
    file = settings_file(replace(config, llm=str(tmp_path / "none")), tmp_path)
    with pytest.raises(WeightsNotFoundError, match="none does not exist"):
        main([file, "--processes", "2"])
    monkeypatch.setattr("sys.argv", ["one_device", file, "--processes", "1"])
    with pytest.raises(SystemExit, match="2"):
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_what_is_trained_is_the_same_in_all_processes(config, tmp_path):
    files = [settings_file(config, tmp_path), settings_file(replace(config, reader_rank=4), tmp_path, "other.json")]
    with pytest.raises(ConfigError, match=r"other\.json has reader_rank=4 and .*settings\.json has 2; what is"):
        main([*files, "--processes", "1", "1"])
    for processes in (["1"], ["1", "0"]):
        with pytest.raises(ConfigError, match="pass a number from 1 for each of them"):
            main([*files, "--processes", *processes])
    assert not (tmp_path / "together").exists()


@pytest.mark.parametrize("text", ["{", '{"llm": "x"}', "[]", '{"llm": "x", "output": "y", "data": ["z"], "speed": 1}'])
def test_a_file_without_settings_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.json does not hold a training's settings"):
        main([str(tmp_path / "settings.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]

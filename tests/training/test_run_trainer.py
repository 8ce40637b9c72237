"""The Trainer of a run: its gradients, rates and optimiser, and what it logs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_embedder, tiny_llm
from training.outputs import log_of, losses, rates
from transformers import PrinterCallback

from extemb_core.errors import TrainingError
from extemb_core.training import trainable
from extemb_core.training import trainer as trainer_module
from extemb_core.training.batches import Collator
from extemb_core.training.config import OBJECTIVES
from extemb_core.training.run_trainer import RunTrainer
from extemb_core.training.trainable import TrainableModel
from extemb_core.training.trainer import train
from extemb_core.training.two_stream import two_stream_losses


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    real = trainable.two_stream_losses
    calls = []

    def poisoned(*args, **options):
        calls.append(1)
        losses = real(*args, **options)
        return replace(losses, values=losses.values * float("nan")) if len(calls) == 3 else losses

    monkeypatch.setattr(trainable, "two_stream_losses", poisoned)
    with pytest.raises(TrainingError, match="the loss became nan at step 2"):
        train(config)


def small_trainer(config, embedder, **changes):
    config = replace(config, **changes)
    items = [{"sample": torch.arange(at, at + 48), "index": at} for at in range(3, 7)]
    made = RunTrainer(
        model=TrainableModel(embedder.llm, embedder),
        args=trainer_module._arguments(config, embedder.llm, evaluate=False),
        train_dataset=items, data_collator=Collator([4], [16], 0), config=config, eval_collators={},
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def test_accumulated_batches_give_the_gradient_of_one_batch(config, monkeypatch):
    steps = {}
    for name, (batch_size, accumulation) in {"one": (4, 1), "accumulated": (1, 4)}.items():
        embedder = random_embedder(tiny_llm(), num_layers=2)
        run = small_trainer(
            config,
            embedder,
            batch_size=batch_size,
            accumulation_steps=accumulation,
            total_tokens=4 * 48,
            max_grad_norm=1e9,
        )
        seen = steps[name] = {}

        def on_step(self, *args, seen=seen, embedder=embedder, real=torch.optim.AdamW.step, **kwargs):
            seen.update({n: p.grad.clone() for n, p in embedder.named_parameters() if p.grad is not None})
            return real(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", on_step)
            run.train()
    assert steps["one"].keys() == steps["accumulated"].keys() != set()
    for name, grad in steps["one"].items():
        torch.testing.assert_close(steps["accumulated"][name], grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_connector_has_a_learning_rate_of_its_own(config):
    embedder = random_embedder(tiny_llm())
    layers, connector = small_trainer(config, embedder).create_optimizer().param_groups
    assert (layers["lr"], connector["lr"]) == (5e-3, 1e-2)
    assert {id(p) for p in connector["params"]} == {id(p) for p in embedder.connector.parameters()}
    assert len(layers["params"]) + len(connector["params"]) == len(embedder.trainable_state_dict()) - 1


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_frozen_llm_may_run_in_bfloat16_while_what_is_trained_stays_float32(config, monkeypatch, dtype, expected):
    seen = {}

    def loss(embedder, *args, **options):
        seen.update(llm=embedder.llm.dtype, own={p.dtype for p in embedder.parameters() if p.requires_grad},
                    autocast=torch.is_autocast_enabled("cpu"))  # fmt: skip
        return two_stream_losses(embedder, *args, **options)

    monkeypatch.setattr(trainable, "two_stream_losses", loss)
    train(replace(config, dtype=dtype, total_tokens=96))
    assert seen == {"llm": expected, "own": {torch.float32}, "autocast": dtype == "bfloat16"}
    assert all(math.isfinite(loss) for loss in losses(config).values())


def test_a_run_from_another_goes_on_with_its_optimiser_and_not_its_schedule(config, tmp_path):
    first = replace(config, total_tokens=4 * 96, decay_steps=0)
    train(first)
    second = replace(first, start_from=first.output, output=str(tmp_path / "second"), embedder={}, decay_steps=None)
    train(replace(second, total_tokens=2 * 96))
    (kept,) = Path(second.output).glob("checkpoint-2/optimizer.safetensors")
    state = load_file(kept)
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {4 + 2}
    assert rates(second) == [5e-3, 5e-3 / 2]
    bare = replace(second, start_from=str(tmp_path / "bare"), output=str(tmp_path / "third"), total_tokens=2 * 96)
    Path(bare.start_from).mkdir()
    for name in ("config.json", "model.safetensors"):
        (Path(bare.start_from) / name).write_bytes((Path(first.output) / name).read_bytes())
    train(bare)  # without a checkpoint the optimiser begins anew
    assert losses(bare)[1] == pytest.approx(losses(second)[1], abs=1e-5)
    assert losses(bare)[2] != pytest.approx(losses(second)[2], abs=1e-5)


def test_objectives_can_be_mixed(asked, config):
    mixed = replace(asked, data=config.data, objectives=dict.fromkeys(OBJECTIVES, 1), distillation=0.3,
                    ratios_per_sample=2, spans=(4, 8), total_tokens=16 * 96)  # fmt: skip
    train(mixed)
    found = losses(mixed)
    assert list(found) == list(range(1, 17))
    assert all(math.isfinite(loss) for loss in found.values())
    every = replace(mixed, output=mixed.output + "-16", logging_steps=16)
    train(every)
    (row,) = (row for row in log_of(every) if "loss" in row)
    for names in (mixed.objectives, ("ratio_2", "ratio_4")):
        parts = [row[f"loss_{name}"] for name in names]
        assert min(parts) < row["loss"] < max(parts)


def test_the_optimiser_is_kept_by_the_names_in_the_files(entering, monkeypatch, caplog):
    """So that another version of the code, with other modules around the tensors, goes on as well."""
    half = replace(entering, total_tokens=entering.total_tokens // 2, decay_steps=0)
    train(half)
    (kept,) = Path(half.output).glob(f"checkpoint-{half.max_steps}")
    state = load_file(kept / "optimizer.safetensors")
    names = {f"embedder.{name}" for name in load_file(kept / "model.safetensors") if "lora_" in name}
    names |= {f"reader.{name}" for name in load_file(kept / "reader" / "adapter_model.safetensors")}
    assert {name.rpartition("/")[0] for name in state} == names
    assert not [file for file in kept.rglob("*") if file.suffix in (".pt", ".pth", ".bin")]

    class Renamed(TrainableModel):
        def __init__(self, *args):
            super().__init__(*args)
            self.weights_of_the_reader = self.adapted
            del self.adapted

    monkeypatch.setattr(trainable, "TrainableModel", Renamed)
    further = replace(entering, decay_steps=0)
    train(further)
    whole = replace(further, output=further.output + "-whole")
    train(whole)
    assert losses(further) == pytest.approx(losses(whole), abs=1e-5)
    assert "begins anew" not in caplog.text


def test_a_lost_optimiser_begins_anew_and_says_so(entering, caplog):
    half = replace(entering, total_tokens=entering.total_tokens // 2)
    train(half)
    for file in Path(half.output).rglob("optimizer.safetensors"):
        file.unlink()
    train(entering)
    assert "the optimiser begins anew for" in caplog.text


def test_a_damaged_optimiser_is_told(entering):
    train(replace(entering, total_tokens=entering.total_tokens // 2))
    for file in Path(entering.output).rglob("optimizer.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    said = r"checkpoint-\d+ is damaged \(.*optimizer\.safetensors is not .*\); remove it, and the run begins anew"
    with pytest.raises(TrainingError, match=said):
        train(entering)


def test_a_rate_rises_stays_and_falls(config):
    run = replace(config, total_tokens=12 * 96, warmup_steps=3, decay_steps=4, learning_rate=0.01)
    train(run)
    expected = [0.01 * rate for rate in (0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4)]
    assert rates(run) == pytest.approx(expected)


def test_the_first_line_after_a_resume_has_the_rate_of_its_step(config):
    whole = replace(config, total_tokens=6 * 96, warmup_steps=4)
    train(replace(whole, total_tokens=3 * 96, decay_steps=0))
    train(whole)
    assert rates(whole) == pytest.approx([whole.learning_rate * step / 4 for step in (0, 1, 2, 3, 4, 2)])

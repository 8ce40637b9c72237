"""Whole training runs on a tiny LLM: they learn, they resume, they refuse, and they leave nothing else changed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from processes import Process
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import random_embedder, tiny_llm

from extemb_core.context.assembly import assemble_text
from extemb_core.errors import (
    ConfigError,
    DocumentError,
    MismatchError,
    TrainingError,
    WeightsCorruptError,
    WeightsError,
)
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training import trainer as trainer_module
from extemb_core.training.batches import Collator
from extemb_core.training.config import OBJECTIVES, TrainingConfig
from extemb_core.training.objectives import QuestionReadings
from extemb_core.training.trainer import RunTrainer, TrainableModel, last_checkpoint, plan_batches, train
from extemb_core.training.two_stream import two_stream_losses


def log_of(config):
    return [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]


def losses(config):
    return {row["step"]: row["loss"] for row in log_of(config) if "loss" in row}


def rates(config):
    return [row["learning_rate"] for row in log_of(config) if "loss" in row]


def tensors(config):
    return load_file(Path(config.output) / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"llm": "no/such/folder/"}, WeightsError),
        ({"data": ("gone.jsonl",)}, DocumentError),
        ({"data": ("broken.jsonl",)}, DocumentError),
        ({"eval_data": ("broken.jsonl",)}, DocumentError),
        ({"ratios": (3,)}, ConfigError),
        ({"embedder": {"num_layers": 99}}, ConfigError),
        ({"sample_length": 10**6}, ConfigError),
        ({"start_from": "nowhere/"}, WeightsError),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing_but_tokens(config, tmp_path, monkeypatch, changes, error):
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text("{")
    failing = replace(config, output=str(tmp_path / "runs" / "one" / "run"), **changes)
    with pytest.raises(error):
        train(failing)
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and path.suffix != ".lock"]
    tokens = sorted(path.name for path in left)
    assert tokens in ([], ["meta.json", "offsets.npy", "tokens.bin"])
    assert bool(tokens) == (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(error):
        train(replace(failing, output="mine", cache=str(tmp_path / "cache")))
    assert not any((tmp_path / "mine").iterdir())


def test_a_run_that_cannot_begin_takes_no_checkpoint_from_the_last(config):
    train(replace(config, total_tokens=3 * 96))
    with pytest.raises(DocumentError):
        train(replace(config, data=("gone.jsonl",)), resume=False)
    no_chunk = replace(
        config,
        objectives={"reconstruction": 1},
        spans=(4, 8),
        sample_length=16,
        chunk_sizes=(32,),
        eval_data=config.data,
    )
    with pytest.raises(ConfigError, match="sample_length=16 leaves nothing to predict"):
        train(no_chunk, resume=False)
    assert last_checkpoint(Path(config.output)).name == "checkpoint-3"


def test_copies_of_checkpoints_under_other_names_are_left_as_they_are(config):
    train(replace(config, total_tokens=3 * 96))
    output = Path(config.output)
    shutil.copytree(output / "checkpoint-3", output / "checkpoint-3-best")
    (output / "checkpoint-of-run2").mkdir()
    (output / "checkpoint-of-run2" / "notes.txt").write_text("mine")
    others = [output / "checkpoint-3-best", output / "checkpoint-of-run2"]
    copied = {file: file.read_bytes() for folder in others for file in folder.iterdir()}
    assert last_checkpoint(output).name == "checkpoint-3"
    train(replace(config, total_tokens=4 * 96))
    trainer_module._discard_checkpoints(output)  # what a training without resuming begins with
    assert last_checkpoint(output) is None
    assert copied == {file: file.read_bytes() for file in copied}


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_a_run_learns_and_leaves_the_llm_and_the_terminal_alone(
    config, folder, adaptation, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = {name: tensor.clone() for name, tensor in LLM.from_pretrained(folder / "llm").model.state_dict().items()}
    config = replace(
        config, total_tokens=40 * 96, eval_data=(str(folder / "held_out.txt"),), eval_steps=20, save_steps=20,
        embedder={**config.embedder, "adaptation": adaptation},
    )  # fmt: skip
    embedder = train(config).embedder
    assert capfd.readouterr() == ("", "")
    after = embedder.llm.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not embedder.training

    rows = log_of(config)
    seen = losses(config)
    assert list(seen) == list(range(1, 41))
    assert sum(seen[step] for step in range(31, 41)) < sum(seen[step] for step in range(1, 11)) - 1
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 20, 40]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert evaluated[0]["eval_loss"] == pytest.approx((evaluated[0]["eval_ratio_2"] + evaluated[0]["eval_ratio_4"]) / 2)
    assert next(row for row in rows if row["step"] == 10)["tokens"] == 10 * 96

    again = ExtensibleEmbedder.from_pretrained(config.output, llm=embedder.llm)
    assert again.fingerprint == embedder.fingerprint
    names = {file.name for file in Path(config.output).rglob("*")}
    assert "training_args.bin" not in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, tmp_path):
    train(config)
    assert list(losses(config)) == [1, 2, 3, 4, 5, 6]
    broken = replace(config, output=str(tmp_path / "broken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.time, "monotonic", iter(range(0, 1000, 10)).__next__)
        train(replace(broken, max_minutes=0.4, save_steps=100))  # each look at the clock takes ten seconds
    assert list(losses(broken)) == [1, 2, 3]
    # A later checkpoint that was not finished does not count.
    (tmp_path / "broken" / "checkpoint-5").mkdir()
    (tmp_path / "broken" / "checkpoint-5" / "model.safetensors").write_bytes(b"half of")
    train(broken)
    assert losses(broken) == pytest.approx(losses(config), abs=1e-5)
    left, right = tensors(config), tensors(broken)
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-5, rtol=0, msg=name)
    train(broken)  # a finished run has nothing more to do
    assert list(losses(broken)) == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(config, tmp_path):
    train(config)
    killed = replace(config, output=str(tmp_path / "killed"))
    code = (
        "import os, signal, sys, json\n"
        "from extemb_core.training import trainer\n"
        "inner = trainer._RunCallback.on_step_end\n"
        "def on_step_end(self, args, state, control, **kwargs):\n"
        "    if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    inner(self, args, state, control, **kwargs)\n"
        "trainer._RunCallback.on_step_end = on_step_end\n"
        "settings = json.loads(sys.argv[1]); settings['data'] = tuple(settings['data'])\n"
        "trainer.train(trainer.TrainingConfig(**settings))\n"
    )
    values = asdict(killed)
    process = Process(code, json.dumps(values))
    said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    train(killed)
    assert losses(killed) == pytest.approx(losses(config), abs=1e-5)


def test_a_run_killed_twice_while_it_saves_goes_on_from_its_last_whole_checkpoint(config, monkeypatch):
    real = trainer_module._RunCallback.on_save
    for killed_at, run in ((6, config), (5, replace(config, save_steps=5))):

        def on_save(self, args, state, control, killed_at=killed_at, **kwargs):
            if state.global_step == killed_at:
                raise KeyboardInterrupt
            real(self, args, state, control, **kwargs)

        monkeypatch.setattr(trainer_module._RunCallback, "on_save", on_save)
        with pytest.raises(KeyboardInterrupt):
            train(run)
        for folder in Path(config.output).glob("checkpoint-*"):
            hours = int(folder.name.split("-")[1])  # else all are of one second, and go by their numbers
            os.utime(folder, (3600 * hours, 3600 * hours))
        assert last_checkpoint(Path(config.output)).name == "checkpoint-3"


def test_a_run_that_finds_the_disk_full_says_so_and_goes_on_when_there_is_room(config, monkeypatch):
    optimizer = trainer_module.save_file

    def full(tensors, file):
        if "checkpoint-6" in str(file):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        optimizer(tensors, file)

    monkeypatch.setattr(trainer_module, "save_file", full)
    said = r"checkpoint-6/optimizer.safetensors could not be written \(No space left on device\); make room, and "
    with pytest.raises(TrainingError, match=said):
        train(config)
    assert last_checkpoint(Path(config.output)).name == "checkpoint-3"
    monkeypatch.undo()
    train(config)
    assert [row["step"] for row in log_of(config) if "loss" in row] == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_checkpoints_of_another_run_are_refused(config):
    train(replace(config, total_tokens=96))
    with pytest.raises(TrainingError, match="another embedder"):
        train(replace(config, total_tokens=96, embedder={**config.embedder, "connector": "mlp"}))
    # Also when a run that was not to resume has meanwhile written its own settings beside the old checkpoints.
    (Path(config.output) / "training.json").write_text("{}")
    with pytest.raises(TrainingError, match="another trained"):
        train(replace(config, total_tokens=96, trained="both"))


def test_checkpoints_of_the_first_version_name_their_run_in_its_folder(config):
    train(replace(config, total_tokens=96))
    (mark,) = Path(config.output).glob("checkpoint-*/complete.json")
    mark.write_text('{"step": 1}')
    with pytest.raises(TrainingError, match="another trained"):
        train(replace(config, total_tokens=96, trained="both"))
    (Path(config.output) / "training.json").unlink()
    with pytest.raises(TrainingError, match="does not say what run"):
        train(replace(config, total_tokens=96))


def test_a_run_that_begins_anew_is_not_resumed_from_what_was_there(config):
    train(config)
    train(replace(config, total_tokens=3 * 96), resume=False)
    assert trainer_module.last_checkpoint(Path(config.output)).name == "checkpoint-3"


def test_a_run_goes_on_with_other_settings_and_the_log_says_so(config):
    train(replace(config, total_tokens=96))
    (mark,) = Path(config.output).glob("checkpoint-*/complete.json")
    values = json.loads(mark.read_text())
    step = values["step"]
    del values["config"]["decay_steps"], values["config"]["mixed_share"]  # an earlier version did not know them
    mark.write_text(json.dumps(values))
    further = replace(config, total_tokens=192, learning_rate=1e-3, dtype="bfloat16", ratios=(4,), sample_length=40)
    train(further)
    rows = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    (changed,) = [row for row in rows if "changed" in row]
    assert changed["step"] == step
    assert changed["changed"].keys() == {"total_tokens", "learning_rate", "dtype", "ratios", "sample_length"}
    assert changed["changed"]["learning_rate"] == [config.learning_rate, 1e-3]
    assert rows[-1]["step"] > step


def test_a_run_goes_on_with_the_intervals_that_it_is_given(config, folder):
    run = replace(config, eval_data=(str(folder / "held_out.txt"),), save_steps=2, eval_steps=2)
    train(replace(run, total_tokens=2 * 96))
    train(replace(run, total_tokens=9 * 96, save_steps=4, eval_steps=3, logging_steps=5))
    rows = log_of(run)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3, 6, 9]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 5]
    steps = {json.loads(mark.read_text())["step"] for mark in Path(run.output).glob("checkpoint-*/complete.json")}
    assert steps == {8, 9}


def test_a_run_that_goes_on_with_other_batches_trains_on_as_many_tokens_as_it_was_told(config):
    train(replace(config, total_tokens=3 * 96))
    for changes, last in (({"total_tokens": 600, "batch_size": 4}, (5, 288 + 2 * 192)),
                          ({"total_tokens": 700, "batch_size": 1}, (6, 672 + 48)),
                          ({"total_tokens": 720, "sample_length": 40}, (6, 720)),
                          ({"total_tokens": 721, "accumulation_steps": 2}, (7, 720 + 192))):  # fmt: skip
        train(replace(config, **changes))
        row = log_of(config)[-1]
        assert (row["step"], row["tokens"]) == last


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    real = trainer_module.two_stream_losses
    calls = []

    def poisoned(*args, **options):
        calls.append(1)
        losses = real(*args, **options)
        return replace(losses, values=losses.values * float("nan")) if len(calls) == 3 else losses

    monkeypatch.setattr(trainer_module, "two_stream_losses", poisoned)
    with pytest.raises(TrainingError, match="the loss became nan at step 2"):
        train(config)


def test_what_cannot_be_trained_on(config, folder, tmp_path):
    (tmp_path / "short.txt").write_text("Rivers")
    with pytest.raises(TrainingError, match="none of the 1 documents has 17 tokens"):
        train(replace(config, data=(str(tmp_path / "short.txt"),)))
    with pytest.raises(ConfigError, match="a chunk of 88 tokens after 256 embeddings does not fit 256 positions"):
        train(replace(config, sample_length=600, chunk_sizes=(512,)))
    with pytest.raises(TrainingError, match="no document in eval_data has 48 tokens"):
        train(replace(config, eval_data=(str(tmp_path / "short.txt"),)))
    with pytest.raises(ConfigError, match="sample_length=16 leaves nothing to predict"):
        train(replace(config, sample_length=16))
    with pytest.raises(ConfigError, match="ratio=8 is not one of the ratios"):
        train(replace(config, ratios=(2, 8)))


def small_trainer(config, embedder, **changes):
    from transformers import PrinterCallback

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


def test_batches_made_in_other_processes_are_the_same_batches(config, tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def get(self, index, real=trainer_module.Batches.__getitem__):
        with pids.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return real(self, index)

    monkeypatch.setattr(trainer_module.Batches, "__getitem__", get)
    objectives = {"two_stream": 1, "recall": 1}
    config = replace(config, objectives=objectives, embedder={"entry_layer": 1, "chunk_size": 16, "ratios": (2, 4)})
    train(replace(config, output=str(tmp_path / "none")))
    assert set(pids.read_text().split()) == {str(os.getpid())}
    pids.unlink()
    train(replace(config, output=str(tmp_path / "one"), dataloader_num_workers=1))
    assert str(os.getpid()) not in pids.read_text().split()
    assert losses(replace(config, output=str(tmp_path / "one"))) == losses(
        replace(config, output=str(tmp_path / "none"))
    )


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

    monkeypatch.setattr(trainer_module, "two_stream_losses", loss)
    train(replace(config, dtype=dtype, total_tokens=96))
    assert seen == {"llm": expected, "own": {torch.float32}, "autocast": dtype == "bfloat16"}
    assert all(math.isfinite(loss) for loss in losses(config).values())


def test_training_goes_on_from_an_embedder(config, tmp_path):
    train(replace(config, total_tokens=96))
    further = replace(config, start_from=config.output, output=str(tmp_path / "more"), learning_rate=1e-9, embedder={})
    train(replace(further, total_tokens=96))
    for name, tensor in tensors(config).items():
        torch.testing.assert_close(tensors(further)[name], tensor, atol=1e-6, rtol=0)


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


@pytest.mark.cluster
def test_all_processes_stop_by_the_clock_of_the_first(config, tmp_path):
    """Two processes over gloo: the time of the first is up after a step, that of the second one is not."""
    (tmp_path / "run.py").write_text(
        "import json, os, sys\n"
        "from extemb_core.training import trainer\n"
        "settings = json.loads(sys.argv[1])\n"
        "settings['data'] = tuple(settings['data'])\n"
        "settings['max_minutes'] = 1e9 if int(os.environ['RANK']) else 1e-9\n"
        "trainer.train(trainer.TrainingConfig(**settings))\n"
    )
    run = replace(config, total_tokens=8 * 192, save_steps=100)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "run.py"), json.dumps(asdict(run))]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=1800)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends the two as well
        process.communicate()
        raise
    assert process.returncode == 0, said
    assert [folder.name for folder in Path(run.output).glob("checkpoint-*")] == ["checkpoint-1"]


def test_with_several_processes_each_takes_its_own_gpu(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert trainer_module._device(replace(config, device="cuda")) == "cuda:1"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        trainer_module._device(replace(config, device="cuda:0"))
    assert trainer_module._device(config) == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (config.tokens_per_step, config.max_steps) == (192, 3)


# -- other objectives, and readers --------------------------------------------------------------------------------


def reader_tensors(config):
    return load_file(Path(config.output) / "reader" / "adapter_model.safetensors")


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


@pytest.mark.parametrize("trained", ["reader", "both"])
def test_a_reader_learns_and_becomes_an_llm_of_its_own(asked, trained):
    run = replace(asked, trained=trained, total_tokens=40 * 96, logging_steps=10, save_steps=40)
    model = train(run)
    found = list(losses(run).values())
    assert found[-1] < found[0] - 0.5
    assert (Path(run.output) / "model.safetensors").is_file() == (trained == "both")
    base = LLM.from_pretrained(run.llm)
    reader = LLM.from_pretrained(Path(run.output) / "reader")
    ids = base.encode("When was the mill built?")
    tuned = model.llm
    torch.testing.assert_close(reader.hidden(reader.embed(ids)[None]), tuned.hidden(tuned.embed(ids)[None]),
                               atol=1e-4, rtol=1e-3)  # fmt: skip
    assert (reader.hidden(reader.embed(ids)[None]) - base.hidden(base.embed(ids)[None])).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in reader.model.parameters())
    if trained == "both":  # the layers that the embedder shares are as they were
        again = ExtensibleEmbedder.from_pretrained(run.output, llm=reader)
        text = "When was the mill built? " * 8
        torch.testing.assert_close(again.compress(text).embeddings, model.embedder.compress(text).embeddings)
    for name, tensor in LLM.from_pretrained(run.llm).model.state_dict().items():
        torch.testing.assert_close(tensor, base.model.state_dict()[name], atol=0, rtol=0)


def test_an_embedder_can_go_on_for_a_reader_of_its_llm(asked, tmp_path):
    train(replace(asked, trained="reader", total_tokens=10 * 96))
    reader = str(Path(asked.output) / "reader")
    first = replace(asked, output=str(tmp_path / "first"), total_tokens=96)
    own = train(first).embedder
    further = replace(first, llm=reader, start_from=first.output, embedder={}, output=str(tmp_path / "further"),
                      learning_rate=1e-9)  # fmt: skip
    adapted = train(further).embedder
    for name, tensor in own.trainable_state_dict().items():
        if name != "llm_probe":
            torch.testing.assert_close(adapted.trainable_state_dict()[name], tensor, atol=1e-6, rtol=0)
    assert adapted.fingerprint != own.fingerprint
    with pytest.raises(MismatchError, match="differ by"):
        ExtensibleEmbedder.from_pretrained(first.output, llm=LLM.from_pretrained(reader))
    ExtensibleEmbedder.from_pretrained(further.output, llm=LLM.from_pretrained(reader))


def test_a_reader_goes_on_beside_an_embedder(asked, tmp_path):
    train(replace(asked, trained="reader", reader_first_layer=2, total_tokens=10 * 96))
    alone = reader_tensors(asked)
    assert all(".layers.2." in name for name in alone)  # of three layers
    both = replace(asked, trained="both", start_from=asked.output, output=str(tmp_path / "both"), learning_rate=1e-9)
    train(both)
    for name, tensor in reader_tensors(both).items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-6, rtol=0)
    further = replace(both, start_from=both.output, output=str(tmp_path / "further"), embedder={})
    train(further)
    assert (
        load_file(Path(further.output) / "model.safetensors").keys()
        == load_file(Path(both.output) / "model.safetensors").keys()
    )
    with pytest.raises(ConfigError, match="holds a reader and no embedder; pass llm="):
        train(replace(both, trained="embedder", output=str(tmp_path / "alone")))


@pytest.mark.parametrize("trained", ["reader", "both"])
def test_a_reader_goes_on_where_it_was_stopped(asked, trained, monkeypatch, tmp_path):
    whole = replace(asked, trained=trained, output=str(tmp_path / "whole"))
    train(whole)
    real, calls = trainer_module.reading_losses, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    run = replace(asked, trained=trained)
    monkeypatch.setattr(trainer_module, "reading_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.setattr(trainer_module, "reading_losses", real)
    train(run)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in reader_tensors(whole).items():
        torch.testing.assert_close(reader_tensors(run)[name], tensor, atol=1e-5, rtol=0)


def test_a_reader_beside_an_embedder_of_all_layers_is_refused(asked):
    layers = LLM.from_pretrained(asked.llm).text_config.num_hidden_layers
    with pytest.raises(ConfigError, match="a reader gets none of the first"):
        train(replace(asked, trained="both", embedder={**asked.embedder, "num_layers": layers}))


def test_the_connector_can_be_trained_alone(config):
    untrained = ExtensibleEmbedder.from_llm(LLM.from_pretrained(config.llm), **config.embedder).trainable_state_dict()
    train(replace(config, trained="connector"))
    changed = {name for name, tensor in tensors(config).items()
               if "lora_A" not in name and not torch.equal(tensor, untrained[name].cpu())}  # fmt: skip
    assert changed
    assert all("connector" in name for name in changed)


def test_what_a_run_says_of_its_questions_reaches_them(asked, monkeypatch):
    given = {}
    monkeypatch.setattr(trainer_module, "QuestionReadings", lambda *_, **settings: given.update(settings))
    changed = {"most_per_source": 7, "raw_share": 0.11, "mixed_share": 0.12, "focus_share": 0.13, "most_distractors": 5,
               "seed": 3}  # fmt: skip
    plan_batches(replace(asked, **changed), LLM.from_pretrained(asked.llm), 1, (16,))
    assert changed.items() <= given.items()
    settings, taken = ({field.name for field in fields(kind)} for kind in (TrainingConfig, QuestionReadings))
    assert changed.keys() == (settings & taken) - {"questions", "llm"}


# -- entry layers above 0 -----------------------------------------------------------------------------------------


@pytest.fixture
def entering(asked, config):
    return replace(
        asked, data=config.data, trained="both", reader_rank=4, mixed_share=0.5, focus_share=0.5, ratios=(1, 2, 4, 8),
        embedder={"entry_layer": 2, "chunk_size": 16, "ratios": (1, 2, 4, 8), "lora_rank": 4,
                  "token_weighting": "frequency"},
        objectives={"questions": 0.4, "recall": 0.2, "reconstruction": 0.2, "two_stream": 0.2},
    )  # fmt: skip


def read_through(llm, embedder):
    """Hidden states over a compressed text and a question."""
    part = embedder.compress("When was the mill built? It burned down twice. " * 3, ratio=4).part
    return llm.hidden_of([assemble_text(llm, [part, " When?"]).inputs(llm)])


@pytest.mark.parametrize("trained", ["both", "reader", "embedder"])
def test_what_was_trained_above_layer_0_is_loaded_by_name(entering, trained):
    steps = 8 if trained == "embedder" else 40  # a random LLM reads nothing however it is told
    run = replace(entering, trained=trained, total_tokens=steps * 96, logging_steps=steps // 4, save_steps=steps)
    model = train(run)
    found = list(losses(run).values())
    assert trained == "embedder" or found[-1] < found[0] - 0.1
    base = LLM.from_pretrained(run.llm)
    llm = LLM.from_pretrained(Path(run.output) / "reader") if trained != "embedder" else base
    embedder = ExtensibleEmbedder.from_pretrained(run.output, llm=llm)
    assert embedder.config.adaptation == ("none" if trained == "reader" else "lora")
    torch.testing.assert_close(embedder.token_weights, model.embedder.token_weights)
    assert len(embedder.token_weights.unique()) > 10
    tuned = read_through(model.llm, model.embedder)
    torch.testing.assert_close(read_through(llm, embedder), tuned, atol=1e-4, rtol=1e-3)
    untrained = ExtensibleEmbedder.untrained(base, 2, chunk_size=16)
    assert (read_through(base, untrained) - tuned).abs().max() > 1e-2
    if trained != "embedder":
        assert all(".layers.2." in name for name in reader_tensors(run))  # below, the embedder's layers are the LLM's


def test_held_out_text_is_read_by_a_reader_of_embeddings(entering, folder):
    run = replace(entering, trained="reader", eval_data=(str(folder / "held_out.txt"),), total_tokens=96)
    train(run)
    evaluated = [row for row in log_of(run) if "eval_loss" in row]
    assert evaluated[0].keys() >= {f"eval_ratio_{ratio}" for ratio in run.ratios}
    with pytest.raises(ConfigError, match="leaves nothing to predict after a chunk of 64; pass at least 128"):
        train(replace(run, chunk_sizes=(64,), objectives={"questions": 1}, output=run.output + "-2"))


def test_a_run_above_layer_0_goes_on_where_it_was_killed(entering, tmp_path):
    train(entering)
    stopped = replace(entering, output=str(tmp_path / "stopped"), decay_steps=0)
    whole = replace(stopped, output=str(tmp_path / "whole"))
    train(whole)
    train(replace(stopped, total_tokens=entering.total_tokens // 2))
    train(stopped)
    assert losses(stopped) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(whole) != pytest.approx(losses(entering), abs=1e-5)  # whose rate fell


@pytest.mark.parametrize("trained", ["embedder", "reader"])
def test_tokens_weigh_as_they_did_when_a_run_goes_on_with_other_text(entering, folder, trained):
    run = replace(entering, trained=trained)
    first = train(replace(run, total_tokens=run.tokens_per_step))
    further = train(replace(run, total_tokens=2 * run.tokens_per_step, data=(str(folder / "held_out.txt"),)))
    assert log_of(run)[-1]["step"] == 2
    assert torch.equal(further.embedder.token_weights, first.embedder.token_weights)
    assert further.embedder.config.token_weights_digest == first.embedder.config.token_weights_digest


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

    class Renamed(trainer_module.TrainableModel):
        def __init__(self, *args):
            super().__init__(*args)
            self.weights_of_the_reader = self.adapted
            del self.adapted

    monkeypatch.setattr(trainer_module, "TrainableModel", Renamed)
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
    with pytest.raises(WeightsCorruptError, match=r"optimizer\.safetensors is not a whole safetensors file"):
        train(entering)


def test_what_needs_an_entry_layer_above_0(asked, entering):
    for name in ("mixed_share", "focus_share"):
        with pytest.raises(ConfigError, match=f"{name}=0.5 needs an embedder with an entry_layer above 0"):
            train(replace(asked, trained="embedder", **{name: 0.5}))
    with pytest.raises(ConfigError, match="counts tokens in data, and data is empty"):
        train(replace(entering, data=(), objectives={"questions": 1}))
    with pytest.raises(ConfigError, match="decay_steps=-1 is not a whole number of at least 0"):
        replace(entering, decay_steps=-1)
    with pytest.raises(ConfigError, match="save_minutes=0 is not above 0"):
        replace(entering, save_minutes=0)


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

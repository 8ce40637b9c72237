"""Whole training runs on a tiny LLM: they learn, they refuse, and they leave nothing else changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from training.outputs import log_of, losses

from extemb_core.errors import ConfigError, DocumentError, TrainingError, WeightsError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training import trainer as trainer_module
from extemb_core.training.batches import Batches
from extemb_core.training.run_trainer import RunCallback
from extemb_core.training.trainer import train


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


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_is_alone_in_its_folder(config, monkeypatch, resume):
    real, output = RunCallback.on_save, Path(config.output)
    (output / "notes").mkdir(parents=True)

    def on_save(self, args, state, control, **kwargs):
        with pytest.raises(ConfigError, match=f"{output} is being written by another run; wait for that, or pass"):
            train(replace(config, total_tokens=2 * 96), resume=resume)
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_save", on_save)
    train(config)
    assert list(losses(config)) == [1, 2, 3, 4, 5, 6]
    whole = {"complete.json", "config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json"}
    assert all({file.name for file in output.glob(f"checkpoint-{step}/*")} == whole for step in (3, 6))
    assert not [file for file in output.rglob("*") if file.suffix == ".lock" and "data" not in file.parts]
    monkeypatch.undo()
    train(replace(config, total_tokens=7 * 96))


def test_a_folder_of_something_else_is_refused_and_left_alone(config):
    output = Path(config.output)
    output.mkdir()
    (output / "notes.txt").write_text("The mill was built in 1820.")
    with pytest.raises(ConfigError, match="holds 'notes.txt', which is not a run's; pass a new or empty folder"):
        train(config)
    assert [file.name for file in output.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file/run cannot be made \(Not a directory\); pass another output"):
        train(replace(config, output=str(tmp_path / "file" / "run")))


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


def test_batches_made_in_other_processes_are_the_same_batches(config, tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def get(self, index, real=Batches.__getitem__):
        with pids.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return real(self, index)

    monkeypatch.setattr(Batches, "__getitem__", get)
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


def test_held_out_text_is_read_by_a_reader_of_embeddings(entering, folder):
    run = replace(entering, trained="reader", eval_data=(str(folder / "held_out.txt"),), total_tokens=96)
    train(run)
    evaluated = [row for row in log_of(run) if "eval_loss" in row]
    assert evaluated[0].keys() >= {f"eval_ratio_{ratio}" for ratio in run.ratios}
    with pytest.raises(ConfigError, match="leaves nothing to predict after a chunk of 64; pass at least 128"):
        train(replace(run, chunk_sizes=(64,), objectives={"questions": 1}, output=run.output + "-2"))

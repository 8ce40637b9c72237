"""Runs that were stopped, killed or changed go on from their last whole checkpoint, and from no other."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from processes import Process
from safetensors import SafetensorError
from training.outputs import log_of, losses, reader_tensors, tensors

from extemb_core.errors import ConfigError, DocumentError, TrainingError
from extemb_core.training import run_trainer, trainable
from extemb_core.training.checkpoints import discard_checkpoints, last_checkpoint
from extemb_core.training.run_trainer import RunCallback
from extemb_core.training.trainer import train


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
    discard_checkpoints(output)  # what a training without resuming begins with
    assert last_checkpoint(output) is None
    assert copied == {file: file.read_bytes() for file in copied}


def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, tmp_path):
    train(config)
    assert list(losses(config)) == [1, 2, 3, 4, 5, 6]
    broken = replace(config, output=str(tmp_path / "broken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_trainer.time, "monotonic", iter(range(0, 1000, 10)).__next__)
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
        "from extemb_core.training.run_trainer import RunCallback\n"
        "inner = RunCallback.on_step_end\n"
        "def on_step_end(self, args, state, control, **kwargs):\n"
        "    if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    inner(self, args, state, control, **kwargs)\n"
        "RunCallback.on_step_end = on_step_end\n"
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
    real = RunCallback.on_save
    for killed_at, run in ((6, config), (5, replace(config, save_steps=5))):

        def on_save(self, args, state, control, killed_at=killed_at, **kwargs):
            if state.global_step == killed_at:
                raise KeyboardInterrupt
            real(self, args, state, control, **kwargs)

        monkeypatch.setattr(RunCallback, "on_save", on_save)
        with pytest.raises(KeyboardInterrupt):
            train(run)
        for folder in Path(config.output).glob("checkpoint-*"):
            hours = int(folder.name.split("-")[1])  # else all are of one second, and go by their numbers
            os.utime(folder, (3600 * hours, 3600 * hours))
        assert last_checkpoint(Path(config.output)).name == "checkpoint-3"


def test_a_run_that_finds_the_disk_full_says_so_and_goes_on_when_there_is_room(config, monkeypatch):
    optimizer = run_trainer.save_file

    def full(tensors, file):
        if "checkpoint-6" in str(file):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        optimizer(tensors, file)

    monkeypatch.setattr(run_trainer, "save_file", full)
    said = r"checkpoint-6/optimizer.safetensors could not be written \(No space left on device\); make room, and "
    with pytest.raises(TrainingError, match=said):
        train(config)
    assert last_checkpoint(Path(config.output)).name == "checkpoint-3"
    monkeypatch.undo()
    train(config)
    assert [row["step"] for row in log_of(config) if "loss" in row] == [1, 2, 3, 4, 5, 6, 4, 5, 6]


@pytest.mark.parametrize("half", ['{"step": 2, "los', '{"step": 2, "loss": 1.5}'])
def test_half_a_line_that_a_full_disk_left_in_the_log_is_cut_off(config, half):
    train(replace(config, total_tokens=96))
    log = Path(config.output) / "log.jsonl"
    before = log.read_text()
    log.write_text(before + half)
    train(replace(config, total_tokens=2 * 96))
    assert log.read_text().startswith(before)
    assert [row["step"] for row in log_of(config) if "loss" in row] == [1, 2]


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
    output = Path(config.output)
    for folder in output.glob("checkpoint-*"):
        os.utime(folder, (2e9, 2e9))  # some disks give one time to all of them, or none
    train(replace(config, total_tokens=3 * 96), resume=False)
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert last_checkpoint(output).name == "checkpoint-3"
    rows = log_of(config)
    (at,) = (at for at, row in enumerate(rows) if row.get("begins") == "anew")
    assert (rows[at - 1]["step"], rows[at + 1]["step"]) == (6, 1)


def test_a_damaged_mark_of_a_checkpoint_is_told(config):
    train(replace(config, total_tokens=96))
    (mark,) = Path(config.output).glob("checkpoint-*/complete.json")
    mark.write_text("half of")
    with pytest.raises(TrainingError, match=r"complete\.json is damaged .*; remove .*checkpoint-1"):
        train(config)


@pytest.mark.parametrize("total", [3, 4])
def test_a_damaged_file_of_a_checkpoint_is_told_and_the_run_goes_on_without_it(config, total):
    train(replace(config, total_tokens=3 * 96, save_steps=2))
    run, checkpoint = replace(config, total_tokens=total * 96), Path(config.output) / "checkpoint-3"
    said = r"3 is damaged \(.*\); remove it, and the run goes on from the one before$"
    names = ["model.safetensors"] if total == 3 else ["model.safetensors", "trainer_state.json"]
    for file in (checkpoint / name for name in names):
        whole = file.read_bytes()
        for harm in (None, b"", whole[: len(whole) // 2], b"\xff\x00" * 20, b"[1]", b"{}"):
            file.unlink() if harm is None else file.write_bytes(harm)
            with pytest.raises(TrainingError, match=said) as told:
                train(run)
            assert "get it again" not in str(told.value)
        file.write_bytes(whole)
    shutil.rmtree(checkpoint)
    train(run)
    assert list(losses(run))[-1] == total


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


@pytest.mark.parametrize("trained", ["reader", "both"])
def test_a_reader_goes_on_where_it_was_stopped(asked, trained, monkeypatch, tmp_path):
    whole = replace(asked, trained=trained, output=str(tmp_path / "whole"))
    train(whole)
    real, calls = trainable.reading_losses, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    run = replace(asked, trained=trained)
    monkeypatch.setattr(trainable, "reading_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.setattr(trainable, "reading_losses", real)
    train(run)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in reader_tensors(whole).items():
        torch.testing.assert_close(reader_tensors(run)[name], tensor, atol=1e-5, rtol=0)


def test_a_run_above_layer_0_goes_on_where_it_was_killed(entering, tmp_path):
    train(entering)
    stopped = replace(entering, output=str(tmp_path / "stopped"), decay_steps=0)
    whole = replace(stopped, output=str(tmp_path / "whole"))
    train(whole)
    train(replace(stopped, total_tokens=entering.total_tokens // 2))
    train(stopped)
    assert losses(stopped) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(whole) != pytest.approx(losses(entering), abs=1e-5)  # whose rate fell

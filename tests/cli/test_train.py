"""`extemb train`: what it hands on, what it says at its end, and how an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import TEXT, Models, commands, interruptible, misused, refused, run
from tiny import random_embedder, tiny_llm

from extemb_core.cli.output import ExitCode
from extemb_core.cli.train import NewEmbedder
from extemb_core.cli.train import train as train_command


def test_training_defaults_are_those_of_the_library() -> None:
    from extemb_core.models.config import ExtensibleEmbedderConfig
    from extemb_core.training.trainer import TrainingConfig

    fields = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    embedder = ExtensibleEmbedderConfig()
    # None stands for (), or it is no setting of the run.
    own = {"data", "questions", "eval_data", "ratios", "chunk_sizes", "recipe", "resume", "as_json"}
    for name, param in inspect.signature(train_command).parameters.items():
        if param.default is inspect.Parameter.empty or name in own:
            continue
        assert param.default == (fields[name] if name in fields else getattr(embedder, name)), name
    (drawn,) = [p for p in commands()["train"].params if p.name == "chunk_sizes"]
    assert drawn.show_default == "that of the embedder"
    assert fields["chunk_sizes"] == ()
    assert NewEmbedder().ratios == tuple(embedder.ratios)
    (ratios,) = [p for p in commands()["train"].params if p.name == "ratios"]
    assert ratios.show_default.startswith(" ".join(map(str, embedder.ratios)) + ",")


def train_options(models: Models, data: Path, output: Path) -> list[str]:
    return [
        "train", "--llm", str(models.llm), "--data", str(data), "--output", str(output),
        "--num-layers", "1", "--lora-rank", "2", "--chunk-size", "32", "--ratios", "2", "4",
        "--sample-length", "64", "--batch-size", "1", "--device", "cpu",
    ]  # fmt: skip


def test_train_passes_its_options_on(models: Models, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from extemb_core.training import trainer

    seen: list[Any] = []

    def train(config: Any, *, resume: bool) -> Any:
        seen.append((config, resume))
        print("{'loss': 1.0}")  # noqa: T201  # as transformers does
        return trainer.TrainableModel(tiny_llm(), random_embedder(tiny_llm()))

    monkeypatch.setattr(trainer, "train", train)
    command = train_options(models, novel, novel.parent / "run")
    options = ["--eval-data", str(novel), str(novel), "--max-minutes", "1.5", "--no-resume", "--learning-rate", "1e-3"]
    result = run(*command, *options, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == {"output", "fingerprint", "finished", "seconds"}
    assert not json.loads(result.stdout)["finished"]  # there is no checkpoint with all tokens
    config, resume = seen[0]
    assert not resume
    assert dict(config.embedder) == {"num_layers": 1, "lora_rank": 2, "chunk_size": 32, "ratios": (2, 4)}
    assert config.eval_data == (str(novel), str(novel))
    assert (config.max_minutes, config.learning_rate, config.ratios) == (1.5, 1e-3, ())

    kept = ["train", "--llm", "a/b", "--data", novel, "--output", "run", "--start-from", "c/d"]
    assert run(*kept, "--ratios", "4", "8", "--chunk-sizes", "256", "512", "--connector-lr-factor", "2").exit_code == 0
    assert (seen[1][0].chunk_sizes, seen[1][0].connector_lr_factor) == ((256, 512), 2.0)
    assert (seen[1][0].start_from, seen[1][0].ratios, dict(seen[1][0].embedder)) == ("c/d", (4, 8), {})
    assert "--num-layers describes a new embedder" in misused(*kept, "--num-layers", "2")

    above = ["--entry-layer", "0", "--token-weighting", "uniform", "--adaptation", "none", "--mixed-share", "0.5",
             "--focus-share", "0.2", "--decay-steps", "0", "--save-minutes", "2"]  # fmt: skip
    assert run(*train_options(models, novel, novel.parent / "run")[:7], *above).exit_code == 0
    config = seen[2][0]
    assert dict(config.embedder) == {"entry_layer": 0, "token_weighting": "uniform", "adaptation": "none"}
    assert (config.mixed_share, config.focus_share, config.decay_steps, config.save_minutes) == (0.5, 0.2, 0, 2.0)


@pytest.mark.parametrize("kind", ["embedder", "both", "reader"])
def test_train_ends_with_how_to_use_what_was_trained(
    models: Models, novel: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from peft import LoraConfig

    from extemb_core.training import checkpoints, trainer

    embedder = random_embedder(tiny_llm()) if kind != "reader" else None
    made = trainer.TrainableModel(tiny_llm(), embedder, LoraConfig() if kind != "embedder" else None)
    monkeypatch.setattr(trainer, "train", lambda config, *, resume: made)
    monkeypatch.setattr(checkpoints, "is_finished", lambda config: config.max_minutes > 1)
    early = run(*train_options(models, novel, Path("out")), "--max-minutes", "0.5").stderr
    assert "the time is up before all 1,500,000 tokens are seen; the same command goes on from there" in early
    anew = run(*train_options(models, novel, Path("out")), "--max-minutes", "0.5", "--no-resume").stderr
    assert "the same command without --no-resume goes on from there" in anew
    spaced = run(*train_options(models, novel, Path("my out")), "--max-minutes", "2").stderr
    assert "the time is up" not in spaced
    assert ("'my out/reader'" in spaced) == (kind != "embedder")
    assert ("--embedder 'my out'" in spaced) == (kind != "reader")
    said = run(*train_options(models, novel, Path("out"))).stderr
    expected = {
        "embedder": f"--llm {models.llm} --embedder out\n",
        "both": "--llm out/reader --embedder out\n",
        "reader": "--llm out/reader\n",
    }
    assert said.endswith(expected[kind])


def test_of_several_processes_that_train_the_first_says_how_it_ended(
    models: Models, novel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extemb_core.training import trainer

    made = trainer.TrainableModel(tiny_llm(), random_embedder(tiny_llm()))
    monkeypatch.setattr(trainer, "train", lambda config, *, resume: made)
    for options in ((), ("--json",)):
        command = [*train_options(models, novel, Path("out")), *options]
        monkeypatch.setenv("RANK", "1")
        other = run(*command)
        assert (other.exit_code, other.output) == (0, "")
        monkeypatch.setenv("RANK", "0")
        assert "out" in run(*command).stdout


def test_a_recipe_is_trained_with_what_is_given_over_it(
    models: Models, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extemb_core.training import recipes

    seen: dict[str, Any] = {}
    monkeypatch.setattr(recipes, "train_recipe", lambda recipe, *args, **options: seen.update(recipe=recipe, args=args,
                                                                                            **options))  # fmt: skip
    command = ["train", "--recipe", "default", "--llm", str(models.llm), "--data", novel, "--questions", novel,
               "--output", tmp_path / "run"]  # fmt: skip
    result = run(*command, "--total-tokens", "5000", "--batch-size", "2", "--lora-rank", "4")
    assert result.exit_code == 0, result.output
    assert "the time is up" in result.stderr  # the run above ends before it is finished
    assert seen["recipe"].name == "default"
    assert seen["args"] == (str(tmp_path / "run"), 5000)
    assert (seen["batch_size"], seen["embedder"], seen["questions"]) == (2, {"lora_rank": 4}, (str(novel),))
    assert "learning_rate" not in seen  # a stage has its own
    assert "neither a file nor one of default, frozen, joint, paper, reader, text-reader" in refused(
        ExitCode.SETTINGS, *command[:2], "magic", *command[3:]
    )


def test_targets_are_made(models: Models, tmp_path: Path) -> None:
    row = {"id": "a", "context": "The mill was built in 1820.", "question": "When?", "answers": ["1820"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    made = run("train", "make-targets", "--llm", str(models.llm), "--questions", tmp_path / "questions.jsonl",
               "--output", tmp_path / "targets.jsonl", "--json")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["n"] == 1
    assert json.loads((tmp_path / "targets.jsonl").read_text())["references"] == ["1820"]


def test_train_refuses_settings_that_are_not_legal(models: Models, novel: Path, tmp_path: Path) -> None:
    command = train_options(models, novel, tmp_path / "run")
    assert "batch_size=0" in refused(ExitCode.SETTINGS, *command, "--batch-size", "0")
    assert "connector='magic' is not one of" in refused(ExitCode.SETTINGS, *command, "--connector", "magic")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_in_training_says_how_to_go_on(models: Models, tmp_path: Path) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "run"
    data.write_text(" ".join(f"{number} {TEXT}" for number in range(40)), encoding="utf-8")
    command = [*train_options(models, data, out), "--save-steps", "2", "--total-tokens", "200000"]
    process = interruptible(*command)
    process.wait_for(lambda: any(out.glob("checkpoint-*/complete.json")))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED, stderr
    (last,) = re.findall(r"the last checkpoint is (.+), and the same command goes on from it", stderr)
    assert (Path(last) / "complete.json").is_file()
    assert "Traceback" not in stderr


def test_ctrl_c_in_a_recipe_names_the_checkpoint_of_the_stage_that_goes_on(
    models: Models, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extemb_core.training.trainable import TrainableModel

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    recipe = tmp_path / "own.yaml"
    recipe.write_text("stages: [{name: one, share: 1}, {name: two, share: 1}]")
    command = [*train_options(models, novel, tmp_path / "run"), "--recipe", str(recipe), "--total-tokens"]
    assert run(*command, "256").exit_code == 0
    monkeypatch.setattr(TrainableModel, "forward", stop)
    longer = run(*command, "512")
    assert longer.exit_code == ExitCode.INTERRUPTED
    assert "1-one/checkpoint-2, and the same command goes on from it" in longer.stderr
    anew = run(*command, "256", "--no-resume")  # the second stage's checkpoint is still there
    assert "there is no checkpoint yet, so the same command starts anew" in anew.stderr

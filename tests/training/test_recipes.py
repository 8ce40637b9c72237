"""Recipes: what they say is what runs, stage after stage, and a stopped training goes on."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SENTENCES, tiny_model, tiny_tokenizer

from extemb_core.context.focus import mode_of
from extemb_core.errors import ConfigError, TrainingError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training import recipes as recipes_module
from extemb_core.training.checkpoints import is_finished
from extemb_core.training.recipes import Recipe, read_recipe, recipe_names, stage_configs, train_recipe
from extemb_core.training.trainable import TrainableModel

RECIPE = """
embedder: {num_layers: 2, chunk_size: 16, ratios: [2, 4]}
stages:
  - {name: warm-up, share: 1, trained: connector, objectives: {two_stream: 1}, sample_length: 48, batch_size: 2}
  - name: text
    share: 2
    objectives: {two_stream: 1, reconstruction: 1}
    spans: [4, 8]
    sample_length: 48
    batch_size: 2
"""


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    (tmp_path / "text.txt").write_text(SENTENCES * 3)
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def settings(folder):
    return {"llm": str(folder / "llm"), "data": (str(folder / "text.txt"),), "device": "cpu", "warmup_steps": 0}


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_of_the_package_are_legal(name):
    configs = stage_configs(read_recipe(name), "run", 1_000_000, llm="x", data=("a.txt",), questions=("b.jsonl",))
    assert sum(config.total_tokens for config in configs) == pytest.approx(1_000_000, abs=3)
    assert [config.start_from for config in configs] == [None, *[config.output for config in configs[:-1]]]


def test_a_stage_has_what_the_recipe_and_the_caller_say(folder, settings):
    recipe = read_recipe(folder / "own.yaml")
    first, second = stage_configs(recipe, "run", 300, **settings, learning_rate=1e-2, embedder={"lora_rank": 3})
    assert (first.trained, second.trained) == ("connector", "embedder")
    assert (first.total_tokens, second.total_tokens) == (100, 200)
    assert first.embedder == {"num_layers": 2, "chunk_size": 16, "ratios": [2, 4], "lora_rank": 3}
    assert second.embedder == {}
    assert second.spans == (4, 8)
    assert first.learning_rate == second.learning_rate == 1e-2
    assert first.token_cache == second.token_cache == Path("run/data")


def test_stages_follow_one_another_and_the_last_is_left(folder, settings):
    trained = train_recipe(read_recipe(folder / "own.yaml"), folder / "run", 6 * 96, **settings)
    left = load_file(folder / "run" / "model.safetensors")
    first = load_file(folder / "run" / "stages" / "1-warm-up" / "model.safetensors")
    for name, tensor in trained.embedder.trainable_state_dict().items():
        assert torch.equal(left[name], tensor)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in left.items())
    assert all(tensor.abs().max() == 0 for name, tensor in first.items() if "lora_B" in name)
    assert len(list((folder / "run" / "data").glob("tokens-*"))) == 1


def test_a_training_out_of_time_goes_on_with_the_stage_it_was_in(folder, settings, monkeypatch):
    recipe = read_recipe(folder / "own.yaml")
    run = {"output": folder / "run", "total_tokens": 6 * 96}
    configs = stage_configs(recipe, **run, **settings)
    assert train_recipe(recipe, **run, **settings, max_minutes=1e-6) is None
    assert not is_finished(configs[0])
    while not is_finished(configs[0]):
        assert train_recipe(recipe, **run, **settings, max_minutes=1e-6) is None
    ran = []
    real = recipes_module.train

    def noted(config, **options):
        ran.append(Path(config.output).name)
        return real(config, **options)

    monkeypatch.setattr(recipes_module, "train", noted)
    assert train_recipe(recipe, **run, **settings).embedder is not None
    assert ran == ["2-text"]
    assert (folder / "run" / "model.safetensors").is_file()


def test_a_training_is_alone_in_its_folder(folder, settings, monkeypatch):
    recipe, real, ran = read_recipe(folder / "own.yaml"), recipes_module.train, []

    def train(config, **options):
        ran.append(Path(config.output).name)
        with pytest.raises(ConfigError, match=r"run is being written by another run; wait for that, or pass"):
            train_recipe(recipe, folder / "run", 6 * 96, resume=False, **settings)
        return real(config, **options)

    monkeypatch.setattr(recipes_module, "train", train)
    assert train_recipe(recipe, folder / "run", 6 * 96, **settings) is not None
    assert ran == ["1-warm-up", "2-text"]
    assert {path.name for path in (folder / "run").iterdir()} == {"config.json", "data", "model.safetensors", "stages"}


def test_a_stage_that_is_prolonged_has_the_next_one_begin_anew(folder, settings):
    recipe, settings = read_recipe(folder / "own.yaml"), settings | {"decay_steps": 0}
    train_recipe(recipe, folder / "run", 6 * 96, **settings)
    train_recipe(recipe, folder / "run", 9 * 96, **settings)
    train_recipe(recipe, folder / "once", 9 * 96, **settings)
    prolonged, once = (load_file(folder / name / "model.safetensors") for name in ("run", "once"))
    for name, tensor in once.items():
        torch.testing.assert_close(prolonged[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("resume", [True, False])
def test_a_training_stopped_between_two_stages_has_the_next_one_begin_anew(folder, settings, monkeypatch, resume):
    recipe, settings = read_recipe(folder / "own.yaml"), settings | {"decay_steps": 0}
    train_recipe(recipe, folder / "run", 6 * 96, **settings)
    ran = []
    real = recipes_module.train

    def stopped(config, **options):
        if ran:
            raise KeyboardInterrupt
        ran.append(real(config, **options))

    settings |= {"learning_rate": 2e-2, "logging_steps": 1}
    total = 9 * 96 if resume else 6 * 96
    with monkeypatch.context() as patched:
        patched.setattr(recipes_module, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(recipe, folder / "run", total, resume=resume, **settings)
    last = Path(stage_configs(recipe, folder / "run", total, **settings)[-1].output)
    (last / "log.jsonl").unlink()
    train_recipe(recipe, folder / "run", total, **settings)
    rows = [json.loads(line) for line in (last / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1
    assert not any("changed" in row for row in rows)


@pytest.mark.parametrize("trained", ["embedder", "both"])
def test_a_stage_that_did_not_leave_its_result_leaves_it_before_the_next_one_begins(
    folder, settings, monkeypatch, trained
):
    """At its first end, and where the folder has an embedder, and a reader, of before it was prolonged."""
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(folder / "llm")
    stage = {"share": 1, "trained": trained, "objectives": {"reconstruction": 1}, "spans": (4, 8)}
    stages = ({"name": "one", "decay_steps": 0, **stage}, {"name": "two", **stage})
    recipe = Recipe("own", {"num_layers": 2, "chunk_size": 16, "ratios": (2, 4)}, stages)
    settings |= {"sample_length": 48, "batch_size": 2, "learning_rate": 1e-2}
    first = folder / "run" / "stages" / "1-one"
    real = TrainableModel.save

    def full(model, to):
        if to != first:
            return real(model, to)
        if trained == "both":
            model.embedder.save_pretrained(to)
        raise OSError(errno.ENOSPC, "No space left on device", str(to))

    for steps in (2, 4):
        with monkeypatch.context() as patched:
            patched.setattr(TrainableModel, "save", full)
            with pytest.raises(TrainingError, match="make room, and the same run goes on"):
                train_recipe(recipe, folder / "run", 2 * steps * 96, **settings)
        assert train_recipe(recipe, folder / "run", 2 * steps * 96, **settings) is not None
        checkpoint = first / f"checkpoint-{steps}"
        for file in (path.relative_to(checkpoint) for path in checkpoint.rglob("*model.safetensors")):
            assert (first / file).read_bytes() == (checkpoint / file).read_bytes()


def test_a_finished_stage_that_came_from_another_machine_without_its_tensors_is_not_begun_again(folder, settings):
    """As earlier versions carried it: its result, and of its checkpoint only that it was whole."""
    recipe = read_recipe(folder / "own.yaml")
    train_recipe(recipe, folder / "run", 6 * 96, **settings)
    stage = folder / "run" / "stages" / "1-warm-up"
    (checkpoint,) = stage.glob("checkpoint-*")
    mark = json.loads((checkpoint / "complete.json").read_text())
    assert mark.pop("saved")
    for file in checkpoint.iterdir():
        file.unlink()
    (checkpoint / "complete.json").write_text(json.dumps(mark))
    result = (stage / "model.safetensors").read_bytes()
    assert train_recipe(recipe, folder / "run", 6 * 96, **settings) is not None
    assert (stage / "model.safetensors").read_bytes() == result
    assert [file.name for file in checkpoint.iterdir()] == ["complete.json"]


def test_a_recipe_goes_on_whatever_its_paths_are_typed_like_and_where_its_folder_was_moved(
    folder, settings, monkeypatch
):
    recipe = read_recipe(folder / "own.yaml")
    monkeypatch.chdir(folder)
    train_recipe(recipe, "run", 6 * 96, **settings | {"llm": "llm"})
    train_recipe(recipe, folder / "run", 9 * 96, **settings)
    (folder / "run").rename(folder / "moved")
    assert train_recipe(recipe, "./moved/", 12 * 96, **settings) is not None
    log = [json.loads(line) for line in (folder / "moved/stages/1-warm-up/log.jsonl").read_text().splitlines()]
    assert {name for row in log for name in row.get("changed", ())} == {"total_tokens", "cache"}
    (folder / "llm").rename(folder / "other")
    with pytest.raises(TrainingError, match="another llm"):
        train_recipe(recipe, folder / "moved", 15 * 96, **settings | {"llm": str(folder / "other")})


def test_the_readers_recipe_leaves_an_llm(folder, settings):
    tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=9).save_pretrained(folder / "llm")
    row = {
        "id": "a:1",
        "context": "The mill was built in 1820.",
        "question": "When was the mill built?",
        "answers": ["1820"],
    }
    (folder / "questions.jsonl").write_text(json.dumps(row))
    settings |= {"data": (), "questions": (str(folder / "questions.jsonl"),)}
    train_recipe(read_recipe("text-reader"), folder / "run", 2 * 8 * 224, **settings)
    assert LLM.from_pretrained(folder / "run" / "reader").context_window == 1024


def test_a_new_embedder_can_come_after_a_reader(folder, settings):
    (folder / "joint.yaml").write_text(
        """
embedder: {num_layers: 2, chunk_size: 16, ratios: [2, 4]}
stages:
  - {name: reader, share: 1, trained: reader, objectives: {questions: 1}}
  - {name: both, share: 1, trained: both, objectives: {questions: 1}}
  - {name: more, share: 1, trained: both, objectives: {questions: 1}}
"""
    )
    settings |= {"data": (), "questions": ("questions.jsonl",)}
    first, second, third = stage_configs(read_recipe(folder / "joint.yaml"), folder / "run", 96, **settings)
    assert second.embedder["num_layers"] == 2
    assert (second.start_from, third.start_from) == (first.output, second.output)
    assert third.embedder == {}
    (folder / "before" / "reader").mkdir(parents=True)
    settings["start_from"] = str(folder / "before")
    first, second, _ = stage_configs(read_recipe(folder / "joint.yaml"), folder / "run", 96, **settings)
    assert first.start_from == settings["start_from"]
    assert second.embedder["num_layers"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {", "is not YAML"),
        ("embedder: {}", 'has no list of "stages"'),
        ("stages: [{name: a}]", 'stage 1 needs a "name" and a "share"'),
        ("stages: [{name: a, share: 1, magic: 2}]", "stage 1: 'magic' is not one of accumulation_steps, batch_size"),
        ("stages: [{name: a, share: 1}]\nmagic: 1", "'magic' is neither embedder nor stages"),
        ("stages: [{name: a, share: 1, 7: 2, b: 1}]", "stage 1: '7' is not one of"),
        ("stages: [{name: a, share: 1}]\nembedder: [1]", "is no mapping of settings"),
        *(
            (f"stages: [{{name: a, share: {share}}}]", 'stage 1 needs a "name" and a "share" of the tokens above 0')
            for share in ("'1'", ".inf", ".nan", "-1", "0", "true", "[1]", "1e300", "null")
        ),
        *((f"stages: [{{name: {name!r}, share: 1}}]", "stage 1 has the name .*; a name is up to 60 letters")
          for name in ("x/../../evil", "..", "/tmp/x", "a/b", "a\\b", "x" * 300, "-a", "a\0b")),
        ("[" * 999, "is not YAML"),
        ("\udcff", "is not YAML"),
        ("stages: 2001-13-45", "is not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_recipe(folder, text, message):
    (folder / "bad.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        read_recipe(folder / "bad.yaml")


def test_a_recipe_from_elsewhere_is_checked_too():
    stage = {"name": "x/../../evil", "share": 1}
    with pytest.raises(ConfigError, match="stage 1 has the name 'x/../../evil'"):
        Recipe("bundle", {}, (stage,))


def test_a_recipe_that_is_not_there():
    with pytest.raises(
        ConfigError,
        match="recipe='magic' is neither a file nor one of default, frozen, joint, paper, reader, text-reader",
    ):
        read_recipe("magic")


@pytest.mark.parametrize("name", ["joint", "frozen", "reader"])
def test_a_recipe_above_entry_layer_0_trains_what_it_says(folder, settings, name):
    """The whole recipe on a tiny LLM, each stage a step, and what it leaves is loaded by name."""
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(folder / "llm")
    row = {"id": "a:1", "context": "The mill was built in 1820. " * 6, "question": "When?", "answers": ["1820"]}
    (folder / "questions.jsonl").write_text(json.dumps(row))
    (folder / "long.txt").write_text("The mill was built in 1820. It burned down twice. " * 60)
    settings |= {
        "data": (str(folder / "long.txt"),), "questions": (str(folder / "questions.jsonl"),), "batch_size": 2,
        "embedder": {"entry_layer": 2, "lora_rank": 2}, "learning_rate": 1e-2, "logging_steps": 1,
    }  # fmt: skip
    del settings["warmup_steps"]
    trained = train_recipe(read_recipe(name), folder / "run", 4 * 2 * 256, **settings)
    assert trained is not None
    assert (folder / "run" / "reader").is_dir() == (name != "frozen")
    llm = LLM.from_pretrained(folder / "run" / "reader" if name != "frozen" else folder / "llm")
    embedder = ExtensibleEmbedder.from_pretrained(folder / "run", llm=llm)
    assert embedder.config.entry_layer == 2
    assert embedder.config.adaptation == ("none" if name == "reader" else "lora")
    assert mode_of(None, "auto", "Why?", embedder.config) == "focus"  # whoever learned
    text = "When was the mill built? " * 8
    torch.testing.assert_close(
        embedder.compress(text, ratio=4).embeddings, trained.embedder.compress(text, ratio=4).embeddings
    )
    untrained = ExtensibleEmbedder.untrained(LLM.from_pretrained(folder / "llm"), 2, lora_rank=2)
    assert (embedder.fingerprint == untrained.fingerprint) == (name == "reader")  # whose stores serve every reader
    rates = [
        [
            row["learning_rate"]
            for row in map(json.loads, (stage / "log.jsonl").read_text().splitlines())
            if "loss" in row
        ]
        for stage in sorted((folder / "run" / "stages").iterdir())
    ]
    assert rates == [pytest.approx([0, 1e-2 / 20, 2e-2 / 20]), [1e-2]]


def test_a_stage_goes_on_with_the_optimiser_of_the_one_before_it(folder, settings, caplog):
    (folder / "two.yaml").write_text(
        """
embedder: {num_layers: 2, chunk_size: 16, ratios: [2, 4]}
stages:
  - {name: first, share: 1, decay_steps: 0, sample_length: 48, batch_size: 2}
  - {name: last, share: 1, warmup_steps: 0, sample_length: 48, batch_size: 2}
"""
    )
    caplog.set_level("INFO")
    train_recipe(read_recipe(folder / "two.yaml"), folder / "run", 4 * 96, **settings)
    said = [record.message for record in caplog.records if "the optimiser goes on for" in record.message]
    assert len(said) == 1
    counts = [int(word) for word in said[0].split() if word.isdigit()]
    assert counts[0] == counts[1] > 0

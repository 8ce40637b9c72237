"""Bundles: packed, carried as slices, trained elsewhere in pieces of time, and the same as if trained here."""

from __future__ import annotations

import json

import pytest
import torch
from processes import Process
from safetensors.torch import load_file
from tiny import SENTENCES, tiny_model, tiny_tokenizer

from benchmarks.offline_training.bundles import pack, run, shuffled_subset
from benchmarks.offline_training.slices import join_slices
from extemb_core.errors import ConfigError, DocumentError
from extemb_core.models.llm import LLM
from extemb_core.training.checkpoints import OPTIMIZER
from extemb_core.training.data import TokenFile
from extemb_core.training.recipes import read_recipe, train_recipe

RECIPE = """
embedder: {num_layers: 1, chunk_size: 16, ratios: [2, 4]}
stages:
  - {name: text, share: 1, objectives: {two_stream: 1}, sample_length: 48, batch_size: 1}
  - {name: asking, share: 1, objectives: {questions: 1, reconstruction: 1}, sample_length: 48, batch_size: 1,
     spans: [4, 8]}
"""
TOKENS = 8 * 48
# Of what this package depends on, a machine with torch, transformers and peft alone does not have these.
ABSENT = ("typer", "rich", "platformdirs", "gguf", "zstandard", "matplotlib", "tensorboard", "bs4", "pypdf")


@pytest.fixture
def settings(tmp_path):
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    rows = [{"text": SENTENCES[at * 40 :]} for at in range(6)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"id": f"a:{at}", "context": f"The mill has {at} wheels.", "question": "How many?", "answers": [str(at)]}
             for at in range(4)]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "own.yaml").write_text(RECIPE)
    return {
        "llm": str(tmp_path / "llm"), "data": [tmp_path / "text.jsonl"], "questions": [tmp_path / "questions.jsonl"],
        "dtype": "float32", "warmup_steps": 0,
    }  # fmt: skip


@pytest.fixture
def bundle(tmp_path, settings):
    pack(read_recipe(tmp_path / "own.yaml"), tmp_path / "bundle", total_tokens=TOKENS, slice_size="40kb", **settings)
    return tmp_path / "bundle"


def test_a_bundle_is_slices_and_what_unpacks_them(bundle, settings, tmp_path):
    names = {file.name for file in bundle.iterdir()}
    slices = {name for name in names if name.startswith("slice-")}
    assert len(slices) > 2
    assert names - slices == {"manifest.json", "run.py", "slices.py"}
    assert all(file.stat().st_size <= 40_000 for file in bundle.glob("slice-*"))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".bundle")]
    join_slices(bundle, tmp_path / "unpacked")
    with_weights = [file.name for file in (tmp_path / "unpacked" / "llm").glob("*.safetensors")]
    assert with_weights == ["model.safetensors"]
    package = tmp_path / "unpacked" / "package"
    assert not (package / "extemb_core" / "pretrained").exists()
    assert {file.name for file in (package / "benchmarks").iterdir()} == {"__init__.py", "offline_training"}
    with pytest.raises(ConfigError, match="exists; pass another folder"):
        pack(read_recipe("text-reader"), bundle, total_tokens=1, llm=settings["llm"], questions=settings["questions"])


def test_tied_tensors_travel_once(bundle, tmp_path):
    join_slices(bundle, tmp_path / "unpacked")
    llm = LLM.from_pretrained(tmp_path / "unpacked" / "llm")
    saved = load_file(tmp_path / "unpacked" / "llm" / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in llm.model.parameters())


def test_a_training_in_pieces_elsewhere_ends_as_one_here(bundle, settings, tmp_path):
    """Each call a process without the packages that the other machine does not have, on a machine of its own."""
    guard = f"import sys\nfor name in {ABSENT!r}:\n    sys.modules[name] = None\n"
    state = None
    for call in range(12):
        work, left = tmp_path / f"machine-{call}", tmp_path / f"left-{call}"
        arguments = ["--work", str(work), "--output", str(left), "--max-minutes", "1e-6",
                     "--checkpoint-size-limit", "20kb", *(["--resume-from", str(state)] if state else [])]  # fmt: skip
        code = f"{guard}sys.argv = ['run.py', *{arguments!r}]\nsys.path.insert(0, {str(bundle)!r})\n" \
               f"import runpy; runpy.run_path({str(bundle / 'run.py')!r}, run_name='__main__')\n" \
               f"import benchmarks, extemb_core\n" \
               f"assert all(m.__file__.startswith({str(work)!r}) for m in (benchmarks, extemb_core))"  # fmt: skip
        if call == 1:  # the rest in one piece
            code = code.replace("'--max-minutes', '1e-6', ", "")
        process = Process(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
        said = process.communicate()
        assert process.returncode == 0, said
        assert all(file.stat().st_size <= 20_000 for file in left.glob("state-*"))
        state = left
        if call == 1:
            break
    join_slices(state, tmp_path / "result")
    here = train_recipe(read_recipe(tmp_path / "own.yaml"), tmp_path / "here", TOKENS, **(
        settings | {"llm": str(tmp_path / "machine-0" / "llm"), "data": (str(tmp_path / "machine-0" / "tokens"),),
                    "questions": (str(tmp_path / "machine-0" / "questions.jsonl"),)}))  # fmt: skip
    left = load_file(tmp_path / "result" / "model.safetensors")
    for name, tensor in here.embedder.trainable_state_dict().items():
        torch.testing.assert_close(left[name], tensor, atol=1e-5, rtol=1e-4)
    stages = tmp_path / "result" / "stages"
    carried = [{file.name for file in (stages / stage).glob("checkpoint-*/*")} for stage in ("1-text", "2-asking")]
    ends = {"complete.json", "config.json", "model.safetensors", "trainer_state.json"}
    assert carried == [{"complete.json"}, ends]  # of finished stages before the last nothing else is needed


def test_what_a_bundle_goes_on_from_brings_its_optimiser(settings, tmp_path):
    recipe = read_recipe(tmp_path / "own.yaml")
    settings |= {name: tuple(map(str, settings[name])) for name in ("data", "questions")}
    train_recipe(recipe, tmp_path / "first", TOKENS, **settings)
    start = tmp_path / "first" / "stages" / "1-text"
    pack(recipe, tmp_path / "more", total_tokens=TOKENS, start_from=start, **settings)
    join_slices(tmp_path / "more", tmp_path / "unpacked")
    (last,) = start.glob("checkpoint-4")
    carried = [file.relative_to(tmp_path / "unpacked" / "start") for file in
               (tmp_path / "unpacked" / "start").rglob("checkpoint-*/*")]  # fmt: skip
    assert {str(file) for file in carried} == {f"checkpoint-4/{name}" for name in ("complete.json", OPTIMIZER)}
    assert (tmp_path / "unpacked" / "start" / last.name / OPTIMIZER).read_bytes() == (last / OPTIMIZER).read_bytes()


def test_run_goes_on_in_its_own_folder(bundle, tmp_path):
    assert not run(bundle, tmp_path / "left", work=tmp_path / "work", max_minutes=1e-6)
    assert (tmp_path / "left" / "manifest.json").is_file()
    assert run(bundle, tmp_path / "left", work=tmp_path / "work")
    join_slices(tmp_path / "left", tmp_path / "result")
    assert (tmp_path / "result" / "model.safetensors").is_file()


def test_a_finished_training_is_finished_on_another_machine_too(bundle, tmp_path):
    assert run(bundle, tmp_path / "left", work=tmp_path / "one")
    assert run(bundle, tmp_path / "again", work=tmp_path / "another", resume_from=tmp_path / "left")
    for name in ("left", "again"):
        join_slices(tmp_path / name, tmp_path / f"result-{name}")
    left, again = (load_file(tmp_path / f"result-{name}" / "model.safetensors") for name in ("left", "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in left.items())


def test_a_part_of_the_documents_is_drawn_from_all_of_them(tmp_path, settings):
    llm = LLM.from_pretrained(settings["llm"])
    tokens = TokenFile.build(settings["data"], llm, tmp_path / "cache")
    shuffled_subset(tokens, tmp_path / "all", None, seed=1)
    shuffled_subset(tokens, tmp_path / "some", 300, seed=1)
    whole, some = (
        TokenFile.build([tmp_path / "all"], llm, tmp_path),
        TokenFile.build([tmp_path / "some"], llm, tmp_path),
    )
    texts = [file.tokens[start:stop].tolist() for file in (tokens, whole)
             for start, stop in zip(file.offsets[:-1], file.offsets[1:], strict=True)]  # fmt: skip
    assert sorted(texts[: len(tokens)]) == sorted(texts[len(tokens) :])
    assert texts[: len(tokens)] != texts[len(tokens) :]
    assert some.n_tokens == 300
    assert some.tokens.tolist() == whole.tokens[:300].tolist()


def test_tokens_of_another_tokenizer_are_refused(tmp_path, settings):
    llm = LLM.from_pretrained(settings["llm"])
    shuffled_subset(TokenFile.build(settings["data"], llm, tmp_path / "cache"), tmp_path / "tokens", None, seed=1)
    llm.__dict__["tokenizer_digest"] = "another"
    with pytest.raises(DocumentError, match="tokens of another tokenizer"):
        TokenFile.build([tmp_path / "tokens"], llm, tmp_path / "cache")
    with pytest.raises(DocumentError, match="is not a folder of tokens"):
        TokenFile.build([tmp_path / "llm"], llm, tmp_path / "cache")

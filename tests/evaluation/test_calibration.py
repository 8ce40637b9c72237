"""What a calibration measures, that a stopped one goes on, and that its folder is an embedder to answer with."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import Process
from tiny import tiny_llm, tiny_model, tiny_tokenizer

from extemb_core.errors import ConfigError, DocumentError, RatioError
from extemb_core.evaluation import calibration, calibration_samples
from extemb_core.evaluation.calibration import (
    CalibrationConfig,
    CalibrationExperiment,
    calibrate,
    candidate_layers,
    count_tokens,
)
from extemb_core.lm import ExtensibleLM
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM

WINDOW = calibration_samples.CONTEXT_TOKENS + calibration_samples.CONTINUED_TOKENS


@pytest.fixture(scope="module")
def llm():
    """Four layers, and a window that holds a sample."""
    model = tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=4)
    return LLM(model, tiny_tokenizer(), name="tiny")


@pytest.fixture
def config(text):
    return CalibrationConfig(llm="tiny", text=(str(text),), ratios=(1, 2, 4), limit=3, batch_size=1)


# -- what is measured -----------------------------------------------------------------------------------------


def test_candidates_are_spread_over_the_depth(llm):
    assert candidate_layers(llm) == (1, 2, 3)
    deep = LLM(tiny_model("llama", num_hidden_layers=30), tiny_tokenizer(), name="deep")
    assert candidate_layers(deep) == (6, 9, 12, 15, 20)
    assert candidate_layers(tiny_llm()) == (1, 2)
    with pytest.raises(ConfigError, match="single layer"):
        candidate_layers(LLM(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer(), name="flat"))


def test_samples_do_not_depend_on_those_beside_them(llm, config):
    together, alone = (CalibrationExperiment(replace(config, batch_size=size), llm) for size in (3, 1))
    (group,) = together.groups()
    (name, *_) = group
    first = next(iter(together.measure(group)))
    assert first["arms"] == pytest.approx(next(iter(alone.measure([name])))["arms"], abs=1e-4)


def test_counted_tokens_weigh_by_how_rare_they_are(llm, config, text):
    counts = count_tokens(llm, [str(text)])
    assert int(counts.sum()) == len(llm.encode(text.read_text()))
    experiment = CalibrationExperiment(replace(config, weighting="frequency", counts=(str(text),)), llm)
    plain = CalibrationExperiment(config, llm)
    assert experiment.fingerprint != plain.fingerprint
    expected = ExtensibleEmbedder.untrained(llm, 2, token_counts=counts)
    assert torch.equal(experiment.embedders[2].token_weights, expected.token_weights)


# -- the folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["rank", "uniform", "frequency"])
def test_the_folder_is_an_embedder_that_answers(llm, config, text, questions, tmp_path, weighting):
    counts = (str(text),) if weighting == "frequency" else ()
    settings = replace(config, data=(str(questions),), weighting=weighting, counts=counts)
    found = calibrate(settings, tmp_path / "out", llm=llm)
    assert {file.name for file in found.folder.iterdir()} == {
        "calibration.json", "calibration.png", "config.json", "model.safetensors",
    }  # fmt: skip
    assert found.plot is not None
    assert found.plot.read_bytes().startswith(b"\x89PNG")
    llm.model.save_pretrained(tmp_path / "llm")
    llm.tokenizer.save_pretrained(tmp_path / "llm")
    lm = ExtensibleLM.from_pretrained(tmp_path / "llm", embedder=found.folder)
    assert lm.embedder.config.entry_layer == found.layer == found.record["summary"]["layer"]
    assert lm.embedder.fingerprint == found.embedder.fingerprint
    assert lm.embedder.config.token_weighting == weighting
    answer = lm.ask("Which colour?", documents=["Ship 1 is red. " * 20], ratio=4, max_new_tokens=2)
    assert answer.context[0].fidelity == 4
    record = json.loads((found.folder / "calibration.json").read_text())
    assert (record["kind"], record["n"], record["config"]["layers"]) == ("calibration", 6, [1, 2, 3])
    assert str(tmp_path) not in json.dumps(record)


def test_the_planted_layer_is_written(llm, config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        calibration,
        "arm_losses",
        lambda llm, readings, embedders, ratios: [
            {"none": 5.0, "full": 1.0, "truncated/2": 2.0, "truncated/4": 3.0}
            | {f"{layer}/{ratio}": 2.0 + abs(int(layer) - 2) for layer in embedders for ratio in ratios}
            for _ in readings
        ],
    )
    found = calibrate(config, tmp_path / "out", llm=llm)
    assert found.layer == 2
    assert ExtensibleEmbedder.from_pretrained(found.folder, llm=llm).config.entry_layer == 2


def test_without_matplotlib_there_is_no_plot(llm, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = calibrate(config, tmp_path / "out", llm=llm)
    assert found.plot is None
    assert not (found.folder / "calibration.png").exists()


def test_a_stopped_call_goes_on_and_a_finished_one_measures_nothing_again(llm, config, tmp_path, monkeypatch):
    asked = []

    def measure(self, group):
        asked.append(group)
        if stop and len(asked) == 3:
            raise KeyboardInterrupt
        return measured(self, group)

    measured, stop = CalibrationExperiment.measure, True
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # four plots that nobody looks at
    monkeypatch.setattr(CalibrationExperiment, "measure", measure)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(config, out, llm=llm)
    assert [file.name for file in out.iterdir()] == ["calibration.json.partial"]
    stop = False
    found = calibrate(config, out, llm=llm)
    assert len(asked) == 4
    assert found.record["parts"] == 2
    (out / ".embedder").mkdir()  # of a call that was killed while it wrote
    again = calibrate(config, out, llm=llm)
    assert len(asked) == 4
    assert again.record["summary"] == found.record["summary"]
    assert not (out / ".embedder").exists()
    with pytest.raises(ConfigError, match="another ratios.*--no-resume"):
        calibrate(replace(config, ratios=(2,)), out, llm=llm)
    assert calibrate(replace(config, ratios=(2,)), out, llm=llm, resume=False).record["config"]["ratios"] == [2]


def test_a_killed_process_loses_no_finished_sample(text, tmp_path, monkeypatch):
    asked, measured = [], CalibrationExperiment.measure
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path\n"
        "from extemb_core.evaluation.calibration import CalibrationConfig, calibrate\n"
        f"calibrate(CalibrationConfig(llm={str(tmp_path / 'llm')!r}, text=({str(text)!r},), layers=(1,), ratios=(2,), "
        f"limit=40, batch_size=1), Path({str(out)!r}))"
    )
    journal = out / "calibration.json.partial"
    process = Process(code)
    process.wait_for(lambda: journal.is_file() and journal.read_bytes().count(b"\n") > 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [file.name for file in out.iterdir()] == ["calibration.json.partial"]
    whole = journal.read_bytes().count(b"\n") - 1
    monkeypatch.setattr(
        CalibrationExperiment, "measure", lambda self, group: asked.append(group) or measured(self, group)
    )
    settings = CalibrationConfig(llm=str(tmp_path / "llm"), text=(str(text),), layers=(1,), ratios=(2,), limit=40)
    record = calibrate(replace(settings, batch_size=1), out).record
    assert 2 <= whole == record["n"] - len(asked)
    assert record["parts"] == 2
    assert not journal.exists()


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (3,)}, "ratio=3 is not a power of two; pass"),
        ({"ratios": (1,)}, "none above 1"),
        ({"layers": (0,)}, "layers=.0,. must be distinct positive"),
        ({"weighting": "frequency"}, "weighting='frequency' came with 0 files"),
        ({"counts": ("x.txt",)}, "weighting='rank' came with 1 files"),
    ],
)
def test_settings_that_are_not_legal(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": (2, 9)}, ConfigError, "layer 9 is beyond the 4 layers of tiny; pass 1 to 3"),
        ({"ratios": (2, 64)}, RatioError, "ratio=64 is not one of the ratios"),
        ({"weighting": "zipf"}, ConfigError, "token_weighting='zipf' is not one of"),
        ({"limit": 1}, ConfigError, "1 sample of text.*higher limit"),
        ({"data": ("none.jsonl",)}, DocumentError, "none.jsonl does not exist"),
        ({"text": ("none.txt",)}, DocumentError, "none.txt does not exist"),
    ],
)
def test_what_does_not_fit_the_llm_or_is_not_there(llm, config, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        calibrate(replace(config, **changes), tmp_path / "out", llm=llm)
    assert not (tmp_path / "out").exists()


def test_too_little_text_and_no_questions(llm, config, tmp_path):
    short, empty = tmp_path / "short.txt", tmp_path / "empty.jsonl"
    short.write_text("A short text.")
    empty.write_text("")
    with pytest.raises(ConfigError, match=f"no text has the {WINDOW} tokens of a sample, the longest has"):
        calibrate(replace(config, text=(str(short),)), tmp_path / "out", llm=llm)
    with pytest.raises(ConfigError, match="0 different texts"):
        calibrate(replace(config, data=(str(empty),)), tmp_path / "out", llm=llm)
    with pytest.raises(ConfigError, match="window of tiny-llama has 256 positions"):
        calibrate(config, tmp_path / "out", llm=tiny_llm())


def test_an_llm_that_cannot_be_read_in_this_way(config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=len(tiny_tokenizer())))
    with pytest.raises(ConfigError, match="no decoder of plain layers"):
        calibrate(config, tmp_path / "out", llm=LLM(model, tiny_tokenizer(), name="gpt2"))
    model = tiny_model("llama", max_position_embeddings=1024)
    model.is_quantized = True
    with pytest.raises(ConfigError, match="is quantised.*load it in float32"):
        calibrate(config, tmp_path / "out", llm=LLM(model, tiny_tokenizer(), name="quantised"))


def test_a_folder_with_something_else_in_it_is_left_alone(llm, config, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a file.*pass the name of a new one"):
        calibrate(config, file, llm=llm)
    with pytest.raises(
        ConfigError, match="holds 'config.json', which is not a calibration's; pass a new or empty folder"
    ):
        calibrate(config, folder, llm=llm)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_the_text_of_a_calibration_without_any_ships_with_python(llm):
    files, texts = calibration._text(())
    assert Path(files[0]).name.startswith("topics")
    assert len(texts) > 50

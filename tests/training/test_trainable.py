"""What a run trains, what it goes on from, and how that is loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.outputs import log_of, losses, reader_tensors, tensors

from extemb_core.context.assembly import assemble_text
from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training.trainer import train


def test_training_goes_on_from_an_embedder(config, tmp_path):
    train(replace(config, total_tokens=96))
    further = replace(config, start_from=config.output, output=str(tmp_path / "more"), learning_rate=1e-9, embedder={})
    train(replace(further, total_tokens=96))
    for name, tensor in tensors(config).items():
        torch.testing.assert_close(tensors(further)[name], tensor, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("trained", ["embedder", "reader"])
def test_tokens_weigh_as_they_did_when_a_run_goes_on_with_other_text(entering, folder, trained):
    run = replace(entering, trained=trained)
    first = train(replace(run, total_tokens=run.tokens_per_step))
    further = train(replace(run, total_tokens=2 * run.tokens_per_step, data=(str(folder / "held_out.txt"),)))
    assert log_of(run)[-1]["step"] == 2
    assert torch.equal(further.embedder.token_weights, first.embedder.token_weights)
    assert further.embedder.config.token_weights_digest == first.embedder.config.token_weights_digest


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

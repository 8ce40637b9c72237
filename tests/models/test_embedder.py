"""The embedder's contracts on tiny models: the LLM untouched, nothing lost, nested, batch = single, safe files."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import threading
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from safetensors.torch import load_file, save_file
from tiny import (
    ARCHITECTURES,
    FAMILIES,
    entering,
    random_embedder,
    shared_embedder,
    tiny_llm,
    tiny_model,
    tiny_tokenizer,
    tuned,
)

from extemb_core.errors import (
    ConfigError,
    DocumentError,
    ExtembError,
    MismatchError,
    RatioError,
    WeightsCorruptError,
    WeightsNotFoundError,
)
from extemb_core.models import embedder as embedder_module
from extemb_core.models import llm as llm_module
from extemb_core.models.config import Adaptation
from extemb_core.models.connector import CONNECTORS
from extemb_core.models.downscaling import DOWNSCALINGS
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import default_entry_layer
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.models.pooling import TOKEN_WEIGHTINGS, pool
from extemb_core.models.reader_lora import add_reader, save_reader

TEXT = "The lighthouse keeper counted forty-one ships before the fog came in. " * 3
RATIOS = (2, 4, 8)


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_tensors(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def positions(n_tokens, ratio, chunk_size=16):
    full, tail = divmod(n_tokens, chunk_size)
    return full * -(-chunk_size // ratio) + -(-tail // ratio)


# -- the matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "downscaling", "adaptation", "connector"),
    pairwise(ARCHITECTURES, tuple(DOWNSCALINGS), ("lora", "full"), tuple(CONNECTORS)),
)
def test_every_configuration_compresses_saves_and_loads(architecture, downscaling, adaptation, connector, tmp_path):
    llm = tiny_llm(architecture)
    made = {"adaptation": adaptation, "downscaling": downscaling, "connector": connector}
    embedder = random_embedder(llm, **made)
    texts = [TEXT, "Copper wires ran from the cellar."]
    results = embedder.compress(texts, ratio=4)
    for text, result in zip(texts, results, strict=True):
        assert result.n_tokens == len(llm.encode(text))
        assert result.embeddings.shape == (positions(result.n_tokens, 4), llm.hidden_size)
        assert torch.isfinite(result.embeddings).all()

    outputs = embedder(torch.from_numpy(llm.encode(TEXT)[None, :16]).long())
    embedder.read_out(outputs, 0, 16, 4).pow(2).sum().backward()
    trained = {name for name, p in embedder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == embedder.trainable_state_dict().keys() - {"llm_probe"}
    assert all(p.grad is None for p in llm.model.parameters())

    embedder.save_pretrained(tmp_path)
    again = ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm)
    assert_equal_tensors(embedder.trainable_state_dict(), again.trainable_state_dict())
    assert again.fingerprint == embedder.fingerprint
    assert torch.equal(again.compress(TEXT, ratio=4).embeddings, results[0].embeddings)


def assert_parts_are_read_out_as_if_alone(embedder):
    """Parts of chunks of a padded batch, pooled together, are the groups of texts of their own."""
    chunks = [torch.from_numpy(embedder.llm.encode(text)[:16]).long() for text in (TEXT, "Copper wires")]
    outputs = embedder(torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True))
    parts = [(0, 16, 4, 0), (1, len(chunks[1]), 2, 0), (0, 13, 4, 3), (0, 16, 1, 15)]
    for (row, stop, ratio, start), made in zip(parts, embedder.read_out_parts(outputs, parts), strict=True):
        alone = pool(outputs.hidden[row, start:stop], outputs.weights[row, start:stop], ratio)
        torch.testing.assert_close(made.states, alone.states, atol=1e-5, rtol=1e-5)
        groups = chunks[row][start:stop].split(ratio)
        assert made.anchors.tolist() == [int(group[-1]) for group in groups]


# -- contract 1: the LLM is never modified ------------------------------------------------------------------------


@pytest.mark.parametrize("adaptation", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_llm_is_bit_equal_after_everything(architecture, adaptation):
    llm = LLM(tiny_model(architecture), tiny_tokenizer(), name="own")
    ids = torch.arange(3, 40)[None]
    before, logits = copy_of(llm.model), llm.model(ids).logits
    embedder = random_embedder(llm, adaptation=adaptation)
    embedder.compress([TEXT, "a"])
    optimizer = torch.optim.SGD([p for p in embedder.parameters() if p.requires_grad], lr=0.1)
    own = {name: tensor.clone() for name, tensor in embedder.trainable_state_dict().items()}
    embedder.train()
    embedder.read_out(embedder(ids[:, :16]), 0, 16, 4).pow(2).sum().backward()
    optimizer.step()
    assert any(not torch.equal(tensor, own[name]) for name, tensor in embedder.trainable_state_dict().items())
    assert_equal_tensors(before, copy_of(llm.model))
    assert torch.equal(llm.model(ids).logits, logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llm.model.modules())
    assert not any("lora" in name for name in llm.model.state_dict())
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training


def test_two_threads_compress_and_generate_at_once(llm):
    embedder = random_embedder(llm)
    prompt = llm.encode("Rivers carry sand").tolist()
    settings_ = Sampling(max_new_tokens=24)
    alone = embedder.compress(TEXT).embeddings, llm.generate([prompt], settings_)[0].token_ids
    failures = []

    def compress():
        made = [embedder.compress(TEXT).embeddings for _ in range(8)]
        failures.extend("compress" for each in made if not torch.equal(each, alone[0]))

    def generate():
        made = [llm.generate([prompt], settings_)[0].token_ids for _ in range(4)]
        failures.extend("generate" for each in made if each != alone[1])

    threads = [threading.Thread(target=work) for work in (compress, generate, compress)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- contract 2: nothing is lost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 15, 16, 17, 33, 47])
@pytest.mark.parametrize("ratio", RATIOS)
def test_count_of_embeddings(llm, n_tokens, ratio):
    (made,) = shared_embedder(llm).compress_ids([llm.encode(TEXT)[:n_tokens]], ratio=ratio)
    assert len(made) == positions(n_tokens, ratio)
    assert made.n_tokens == n_tokens


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_changed_token_changes_its_own_embedding_and_none_before_or_in_other_chunks(llm, ratio):
    embedder = shared_embedder(llm)
    ids = llm.encode(TEXT)[:41]  # chunks of 16, 16 and 9
    (before,) = embedder.compress_ids([ids], ratio=ratio, batch_size=3)
    for token in range(len(ids)):
        changed = ids.copy()
        changed[token] = 70 if ids[token] != 70 else 71
        (after,) = embedder.compress_ids([changed], ratio=ratio, batch_size=3)
        moved = ((before.embeddings - after.embeddings).abs().amax(1) > 1e-6).nonzero()[:, 0].tolist()
        chunk = token // 16
        own = positions(chunk * 16, ratio) + token % 16 // ratio
        assert moved[0] == own, token
        assert moved[-1] < positions(min((chunk + 1) * 16, len(ids)), ratio), token


def test_empty_and_blank_texts_are_a_no_op_and_a_short_one(llm):
    empty, blank, one = shared_embedder(llm).compress(["", "   \n", "a"], ratio=8)
    assert empty.embeddings.shape == (0, llm.hidden_size)
    assert len(blank) == len(one) == 1
    assert len(empty.at_ratio(8)) == 0
    assert shared_embedder(llm).compress([]) == []


# -- contract 3: nested -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_method():
    return {method: random_embedder(tiny_llm(), downscaling=method) for method in DOWNSCALINGS}


@given(length=st.integers(0, 50), method=st.sampled_from(tuple(DOWNSCALINGS)), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_coarser_equals_compressed_again(by_method, length, method, seed):
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).int().numpy()
    made = {ratio: by_method[method].compress_ids([ids], ratio=ratio)[0] for ratio in RATIOS}
    for fine in RATIOS:
        for coarse in RATIOS:
            if coarse < fine:
                with pytest.raises(RatioError):
                    made[fine].at_ratio(coarse)
            else:
                derived = made[fine].at_ratio(coarse).embeddings
                torch.testing.assert_close(derived, made[coarse].embeddings, atol=1e-5, rtol=0)


def test_the_finest_ratio_is_the_default_and_an_untrained_one_is_refused(llm):
    embedder = random_embedder(llm)
    assert embedder.compress("abc").ratio == 2
    with pytest.raises(RatioError, match="ratio=3 is not one of the ratios"):
        embedder.compress("abc", ratio=3)
    with pytest.raises(ConfigError, match="batch_size=0"):
        embedder.compress("abc", batch_size=0)
    with pytest.raises(DocumentError, match="is a int"):
        embedder.compress(["abc", 5])


# -- contract 6: batch = single -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bos", [None, 5])
def test_batch_equals_single(architecture, bos, monkeypatch):
    llm = tiny_llm(architecture)
    monkeypatch.setitem(llm.__dict__, "bos_token_id", bos)
    embedder = random_embedder(llm)
    texts = ["", "a", TEXT, "Rivers carry sand to the sea.", TEXT[:70], "x y"]
    alone = [embedder.compress(text, batch_size=1).embeddings for text in texts]
    for batch_size, order in ((2, 1), (2, -1), (3, 1), (100, -1)):
        made = embedder.compress(texts[::order], batch_size=batch_size)[::order]
        for text, expected in zip(made, alone, strict=True):
            torch.testing.assert_close(text.embeddings, expected, atol=1e-5, rtol=0)


def test_bos_stands_before_every_chunk(llm, monkeypatch):
    plain = random_embedder(llm)
    monkeypatch.setitem(llm.__dict__, "bos_token_id", 5)
    with_bos = random_embedder(llm)
    ids = torch.from_numpy(llm.encode(TEXT)[:16]).long()
    expected = plain(torch.cat([torch.tensor([5]), ids])[None]).hidden[:, 1:]
    torch.testing.assert_close(with_bos(ids[None]).hidden, expected)
    assert not torch.equal(plain(ids[None]).hidden, expected)
    assert with_bos.fingerprint != plain.fingerprint


# -- contract 8: files --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(llm, tmp_path):
    folder = tmp_path / "embedder"
    shared_embedder(llm).save_pretrained(folder)
    return folder


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_saving_removes_what_a_save_left_that_was_killed_long_ago(llm, tmp_path):
    for name in (".tmpAb12zZ", "reader/.tmpAb12zZ"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    random_embedder(llm).save_pretrained(tmp_path)
    read = LLM(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    save_reader(read, add_reader(read, rank=2), tmp_path / "reader")
    assert not list(tmp_path.rglob(".tmp*"))


def test_saving_is_silent_and_leaves_two_readable_files(llm, tmp_path, capfd):
    random_embedder(llm).save_pretrained(tmp_path / "e")
    assert capfd.readouterr() == ("", "")
    files = sorted((tmp_path / "e").iterdir())
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert files[0].stat().st_mode == files[1].stat().st_mode
    assert files[1].stat().st_size < 80_000  # adapters and connector, not the LLM


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_a_truncated_file(llm, saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsCorruptError, match="not a whole safetensors file"):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)


def test_a_file_of_something_else(llm, saved):
    (saved / "model.safetensors").write_bytes(b"garbage " * 1000)
    with pytest.raises(WeightsCorruptError):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)
    (saved / "config.json").write_text("{not json")
    with pytest.raises(WeightsCorruptError, match="not JSON"):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)


def test_missing_files_and_the_pickle_beside_is_not_read(llm, saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"model\.safetensors does not exist"):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)
    (saved / "config.json").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"config\.json does not exist"):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)
    for nowhere in (saved / "nowhere", "~no-such-user/nowhere"):
        with pytest.raises(WeightsNotFoundError, match="not a folder"):
            ExtensibleEmbedder.from_pretrained(nowhere, llm=llm)


@pytest.mark.parametrize("change", ["rename", "reshape", "drop", "add", "no probe"])
def test_tensors_that_do_not_match_the_config(llm, saved, change):
    tensors = load_file(saved / "model.safetensors")
    name = "connector.projection.weight"
    if change == "reshape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif change == "add":
        tensors["extra"] = torch.zeros(2)
    else:
        value = tensors.pop("llm_probe" if change == "no probe" else name)
        if change == "rename":
            tensors["connector.projection.wait"] = value
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(WeightsCorruptError, match="missing, unknown or of another shape"):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": "8"},
        {"num_layers": 99},
        {"ratios": [2, 3]},
        {"ratios": "all"},
        {"chunk_size": None},
        {"connector": 3},
    ],
)
def test_a_config_with_illegal_values(llm, saved, values):
    edit_config(saved, **values)
    with pytest.raises(ConfigError):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "[]", "{}"])
def test_the_folder_of_another_kind(llm, saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(MismatchError, match="an embedder has 'extemb'"):
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)


def test_an_embedder_of_another_llm(llm, saved):
    with pytest.raises(MismatchError, match="tiny-llama' differ by"):
        ExtensibleEmbedder.from_pretrained(saved, llm=tiny_llm(seed=1))
    wide = LLM(tiny_model("llama", hidden_size=64), tiny_tokenizer(), name="wide")
    with pytest.raises(MismatchError, match="input width 32"):
        ExtensibleEmbedder.from_pretrained(saved, llm=wide)
    with pytest.raises(MismatchError, match="architecture llama"):
        ExtensibleEmbedder.from_pretrained(saved, llm=tiny_llm("mistral"))
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["lighthouse"])
    with pytest.raises(MismatchError, match="tokenizer"):
        ExtensibleEmbedder.from_pretrained(saved, llm=LLM(llm.model, other, name="other words"))


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_same_llm_in_bfloat16_is_the_same(llm, tmp_path, adaptation):
    embedder = random_embedder(llm, adaptation=adaptation)
    embedder.save_pretrained(tmp_path)
    half = LLM(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), name="half")
    again = ExtensibleEmbedder.from_pretrained(tmp_path, llm=half)
    assert again.fingerprint == embedder.fingerprint
    made, exact = again.compress(TEXT).embeddings, embedder.compress(TEXT).embeddings
    assert made.dtype is torch.float32
    assert (made - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_training_in_float32_over_an_llm_in_bfloat16(adaptation, architecture):
    llm = LLM(tiny_model(architecture).to(torch.bfloat16), tiny_tokenizer(), name="half")
    embedder = random_embedder(llm, adaptation=adaptation)
    embedder.trainable_to(torch.float32)
    assert all(p.dtype is torch.float32 for p in embedder.parameters() if p.requires_grad)
    assert llm.dtype is torch.bfloat16
    assert all(p.dtype is torch.bfloat16 for p in llm.model.parameters())
    assert torch.isfinite(embedder.compress(TEXT).embeddings).all()


def test_the_fingerprint_follows_what_the_embeddings_depend_on(llm):
    embedder = random_embedder(llm)
    prints = {
        embedder.fingerprint,
        random_embedder(llm, seed=2).fingerprint,
        random_embedder(llm, chunk_size=8).fingerprint,
    }
    with torch.no_grad():
        embedder.connector.norm.weight[0] += 0.5
    assert len(prints | {embedder.fingerprint}) == 4
    assert embedder.compress("abc").fingerprint == embedder.fingerprint


def test_an_llm_of_another_layout_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)
    )
    with pytest.raises(ConfigError, match="a gpt2 model has no decoder of plain layers"):
        random_embedder(LLM(other, tiny_tokenizer(), name="gpt"))
    with pytest.raises(ConfigError, match="num_layers=4 is beyond the 3 layers of tiny-llama; pass at most 3"):
        random_embedder(tiny_llm(), num_layers=4)


def test_a_folder_in_the_home_directory(llm, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "own")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    loaded = ExtensibleEmbedder.from_pretrained("~/own", llm=llm)
    assert loaded.fingerprint == ExtensibleEmbedder.from_pretrained(saved, llm=llm).fingerprint


def test_a_moved_folder_is_still_whole(llm, saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert ExtensibleEmbedder.from_pretrained(str(tmp_path / "elsewhere"), llm=llm).llm is llm


# -- above entry layer 0 ------------------------------------------------------------------------------------------

PARTS = ("embeddings", "mean_norms", "norms", "weights")


def counts(llm):
    return torch.arange(1, llm.model.get_input_embeddings().num_embeddings + 1).flip(0)


def assert_same_text(made, expected, atol=1e-5):
    assert (made.ratio, made.n_tokens, made.entry_layer) == (expected.ratio, expected.n_tokens, expected.entry_layer)
    assert made.anchors.tolist() == expected.anchors.tolist()
    for name in PARTS:
        torch.testing.assert_close(getattr(made, name), getattr(expected, name), atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    ("adaptation", "connector", "weighting"),
    pairwise(get_args(Adaptation), ("none", "linear", "mlp"), tuple(TOKEN_WEIGHTINGS)),
)
def test_every_configuration_above_layer_0_compresses_saves_and_loads(llm, adaptation, connector, weighting, tmp_path):
    settings = {"adaptation": adaptation, "connector": connector, "token_weighting": weighting}
    if weighting == "frequency":
        settings["token_counts"] = counts(llm)
    embedder = tuned(llm, 2, **settings)
    assert len(embedder.token_weights.unique()) == 1 if weighting == "uniform" else embedder.token_weights.std() > 0.5
    texts = [TEXT, "Copper wires ran from the cellar."]
    results = embedder.compress(texts, ratio=4)
    for text, result in zip(texts, results, strict=True):
        assert result.n_tokens == len(llm.encode(text))
        assert result.embeddings.shape == (positions(result.n_tokens, 4), llm.hidden_size)
        assert len(result.anchors) == len(result)
        assert all(torch.isfinite(getattr(result, name)).all() for name in PARTS)
        assert result.entry_layer == 2
    assert_same_text(embedder.compress(TEXT, ratio=2).at_ratio(4), results[0])

    outputs = embedder(torch.from_numpy(llm.encode(TEXT)[None, :16]).long())
    part = embedder.read_out(outputs, 0, 16, 4)
    assert_parts_are_read_out_as_if_alone(embedder)
    torch.testing.assert_close(part.states, results[0].embeddings[:4], atol=1e-5, rtol=0)
    assert part.anchors.tolist() == results[0].anchors[:4].tolist()
    trained = embedder.trainable_state_dict().keys() - {"llm_probe"}
    assert bool(trained) == (adaptation != "none" or connector != "none")
    if trained:
        part.states.square().sum().backward()
        with_gradient = {n for n, p in embedder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert with_gradient == trained
    assert all(p.grad is None for p in llm.model.parameters())

    embedder.save_pretrained(tmp_path)
    again = ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm)
    assert_equal_tensors(embedder.trainable_state_dict(), again.trainable_state_dict())
    torch.testing.assert_close(again.token_weights, embedder.token_weights, atol=1e-6, rtol=0)
    assert again.fingerprint == embedder.fingerprint == results[0].fingerprint
    assert_same_text(again.compress(TEXT, ratio=4), results[0], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_embedder_gives_the_llms_own_states(family):
    llm = tiny_llm(family)
    ids = llm.encode(TEXT)[:40]
    chunks = torch.from_numpy(np.stack([ids[:16], ids[16:32]])).long()
    with torch.no_grad():  # of a copy: asking for its states leaves hooks in it
        states = copy.deepcopy(llm.model)(chunks, output_hidden_states=True).hidden_states
    for layer in (1, 2):
        (made,) = entering(llm, layer, token_weighting="uniform").compress_ids([ids], ratio=1)
        assert made.anchors.tolist() == ids.tolist()
        torch.testing.assert_close(made.embeddings[:32], states[layer].flatten(0, 1), atol=1e-4, rtol=0)
        torch.testing.assert_close(made.norms, made.embeddings.norm(dim=-1))


def test_layers_of_experts_are_saved_under_their_own_names(tmp_path):
    llm = tiny_llm("qwen3_moe")
    embedder = tuned(llm, 2, adaptation="full")
    embedder.save_pretrained(tmp_path)
    again = ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm)
    assert_equal_tensors(embedder.trainable_state_dict(), again.trainable_state_dict())


def test_an_llm_that_goes_on_from_ids_alone_is_refused_at_layer_0(monkeypatch):
    llm = LLM(tiny_model("llama"), tiny_tokenizer(), name="ids")
    monkeypatch.setattr(llm.model, "prepare_inputs_for_generation", lambda input_ids, **kwargs: {})
    entering(llm)
    with pytest.raises(ConfigError, match="ids generates from token ids alone; use an entry_layer above 0"):
        random_embedder(llm)


def test_layers_that_do_not_run_by_themselves_are_refused_at_layer_0(monkeypatch):
    llm = LLM(tiny_model("llama"), tiny_tokenizer(), name="more")
    monkeypatch.setattr(embedder_module.ExtensibleEmbedder, "forward", refuse)
    with pytest.raises(ConfigError, match="layers of more do not run by themselves .no inputs of each layer"):
        random_embedder(llm)


def refuse(*args, **kwargs):
    raise RuntimeError("no inputs of each layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_logits_that_are_scaled_by_a_name_nobody_knows_are_refused(family, dtype, monkeypatch):
    llm = LLM(tiny_model(family).to(dtype), tiny_tokenizer(), name="other")
    entering(llm)
    monkeypatch.setattr(llm_module, "_LOGIT_SCALES", {})
    with pytest.raises(ConfigError, match="the logits of other are not its states through its output embeddings"):
        entering(llm)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
def test_batch_equals_single_above_layer_0(family, bos):
    llm = tiny_llm(family, bos=bos)
    embedder = tuned(llm, 2)
    texts = ["", "a", TEXT, "Rivers carry sand to the sea.", TEXT[:70], "x y"]
    alone = [embedder.compress(text, ratio=2, batch_size=1) for text in texts]
    for batch_size, order in ((2, -1), (3, 1), (100, -1)):
        made = embedder.compress(texts[::order], ratio=2, batch_size=batch_size)[::order]
        for own, expected in zip(made, alone, strict=True):
            assert_same_text(own, expected)
    assert (len(alone[0]), len(alone[0].anchors)) == (0, 0)


@pytest.fixture(scope="module")
def nesting():
    llm = tiny_llm()
    return [
        entering(llm), tuned(llm, 2, connector="mlp"),
        tuned(llm, 1, adaptation="full", token_counts=counts(llm)), tuned(llm, 2, ratios=(1, 3, 6), chunk_size=10),
    ]  # fmt: skip


@given(length=st.integers(0, 50), which=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_coarser_equals_compressed_again_above_layer_0(nesting, length, which, seed):
    embedder = nesting[which]
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).int().numpy()
    made = {ratio: embedder.compress_ids([ids], ratio=ratio)[0] for ratio in embedder.config.ratios}
    for fine in made:
        for coarse in made:
            if coarse < fine:
                with pytest.raises(RatioError):
                    made[fine].at_ratio(coarse)
            else:
                assert_same_text(made[fine].at_ratio(coarse), made[coarse])


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 15, 16, 17, 33, 47])
@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_the_anchor_of_a_group_is_its_last_token(llm, n_tokens, ratio):
    ids = llm.encode(TEXT)[:n_tokens]
    (made,) = shared_embedder(llm, 1).compress_ids([ids], ratio=ratio)
    ends = [min(end, 16) - 1 + start for start in range(0, n_tokens, 16)
            for end in range(ratio, min(16, n_tokens - start) + ratio, ratio)]  # fmt: skip
    ends = [min(end, n_tokens - 1) for end in ends]
    assert len(made) == positions(n_tokens, ratio)
    assert made.anchors.tolist() == ids[ends].tolist()
    assert made.anchors.dtype == np.int32


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_a_changed_token_changes_no_state_before_its_group_or_in_other_chunks(llm, ratio):
    embedder = shared_embedder(llm, 1)
    ids = llm.encode(TEXT)[:41]  # chunks of 16, 16 and 9
    (before,) = embedder.compress_ids([ids], ratio=ratio, batch_size=3)
    for token in range(0, len(ids), 3):
        changed = ids.copy()
        changed[token] = 70 if ids[token] != 70 else 71
        (after,) = embedder.compress_ids([changed], ratio=ratio, batch_size=3)
        moved = ((before.embeddings - after.embeddings).abs().amax(1) > 1e-6).nonzero()[:, 0].tolist()
        chunk = token // 16
        assert moved[0] == positions(chunk * 16, ratio) + token % 16 // ratio, token
        assert moved[-1] < positions(min((chunk + 1) * 16, len(ids)), ratio), token


def test_rare_tokens_count_more(llm):
    ids = np.array([5, 390], dtype=np.int32)
    uniform, rank = (entering(llm, token_weighting=weighting) for weighting in ("uniform", "rank"))
    (each,) = uniform.compress_ids([ids], ratio=1)
    (even,), (ranked,) = uniform.compress_ids([ids], ratio=2), rank.compress_ids([ids], ratio=2)
    assert even.weights.tolist() == [2]
    assert ranked.weights.item() == pytest.approx(float(rank.token_weights[5] + rank.token_weights[390]))
    distances = [float((made.embeddings[0] - each.embeddings[1]).norm()) for made in (ranked, even)]
    assert distances[0] < distances[1]
    reading = rank.token_weights
    assert reading[390] > reading[5] > 0


@pytest.mark.parametrize(
    ("layers", "expected"), [(2, 1), (3, 1), (4, 2), (6, 2), (12, 5), (24, 10), (30, 12), (32, 13), (80, 32)]
)
def test_two_fifths_of_the_layers_are_the_default(layers, expected):
    llm = LLM(tiny_model("llama", num_hidden_layers=layers, hidden_size=8, head_dim=2), tiny_tokenizer())
    assert default_entry_layer(llm) == expected
    if layers < 12:
        assert ExtensibleEmbedder.from_pretrained("untrained", llm=llm).config.entry_layer == expected


def test_a_layer_that_the_llm_has_not_is_refused(llm):
    assert entering(llm, 2).config.num_layers == 2
    for layer in (3, 4, 99):
        with pytest.raises(ConfigError, match=f"entry_layer={layer} is beyond the 3 layers of tiny-llama"):
            entering(llm, layer)
    with pytest.raises(ConfigError, match="entry_layer=-1"):
        entering(llm, -1)
    one = LLM(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer(), name="one")
    with pytest.raises(ConfigError, match="one has a single layer, and an entry layer above 0 needs one above it"):
        ExtensibleEmbedder.untrained(one)


# -- moving and training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry_layer", [0, 1])
@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_embedder_runs_in_the_dtype_of_its_llm(entry_layer, adaptation):
    llm = LLM(tiny_model("llama"), tiny_tokenizer(), name="whole")
    embedder = random_embedder(llm, entry_layer=entry_layer, num_layers=1, adaptation=adaptation)
    before = embedder.compress(TEXT)
    for move in (
        embedder.half, embedder.bfloat16, embedder.double, lambda: embedder.to(torch.bfloat16),
        lambda: embedder.to("cpu", torch.float16), lambda: embedder.to("meta"), torch.nn.Sequential(embedder).half,
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"cannot be moved to .*: its layers share the tensors of whole"):
            move()
    for same in (embedder.float, lambda: embedder.to("cpu"), lambda: embedder.to(torch.float32), embedder.cpu):
        assert same() is embedder
    theirs = {p.data_ptr() for p in llm.model.parameters()}
    assert embedder.stack.get_input_embeddings().weight.data_ptr() in theirs
    after = embedder.compress(TEXT)
    assert torch.equal(after.embeddings, before.embeddings)
    assert after.fingerprint == before.fingerprint
    assert llm.dtype is torch.float32


@pytest.mark.parametrize("entry_layer", [0, 1])
def test_own_tensors_may_be_held_in_another_dtype(llm, entry_layer):
    embedder = random_embedder(llm, entry_layer=entry_layer, num_layers=1)
    before = embedder.compress(TEXT)
    embedder.trainable_to(torch.bfloat16)
    made = embedder.compress(TEXT)
    assert torch.isfinite(made.embeddings).all()
    assert (made.embeddings - before.embeddings).norm() / before.embeddings.norm() < 0.02
    assert made.fingerprint == before.fingerprint


def test_only_own_tensors_are_ever_trained(llm):
    embedder = tuned(llm, connector="linear")
    embedder.requires_grad_(False)
    assert not any(p.requires_grad for p in embedder.parameters())
    embedder.requires_grad_(True)
    assert {n for n, p in embedder.named_parameters() if p.requires_grad} == set(embedder.trainable_names)
    torch.nn.Sequential(embedder).requires_grad_(True)
    assert {n for n, p in embedder.named_parameters() if p.requires_grad} == set(embedder.trainable_names)


def test_a_tilde_is_the_home_folder(home, llm):
    embedder = shared_embedder(llm)
    embedder.save_pretrained("~/embedder")
    assert (home / "embedder").is_dir()
    assert ExtensibleEmbedder.from_pretrained("~/embedder", llm=llm).fingerprint == embedder.fingerprint


def test_an_open_file_is_no_list_of_texts(llm):
    embedder = shared_embedder(llm)
    with pytest.raises(DocumentError, match="a text to compress is a StringIO; pass a str or several"):
        embedder.compress(io.StringIO("Line one.\nLine two.\n"))
    assert len(embedder.compress(iter(["Line one.", "Line two."]))) == 2


def test_an_embedder_in_training_compresses_without_dropout():
    llm = LLM(tiny_model("llama", attention_dropout=0.5), tiny_tokenizer(), name="dropping")
    embedder = tuned(llm, 2)
    made = embedder.compress(TEXT, ratio=2)
    assert_same_text(embedder.train().compress(TEXT, ratio=2), made)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_changes_own_tensors_and_none_of_the_llm(assign):
    llm = LLM(tiny_model("llama"), tiny_tokenizer(), name="whole")
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    embedder, other = random_embedder(llm), random_embedder(tiny_llm(seed=5), seed=7)
    named = embedder.fingerprint
    embedder.load_state_dict(other.state_dict(), assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.model.state_dict().items())
    theirs = {p.data_ptr() for p in llm.model.parameters()}
    for name, tensor in embedder.named_parameters():
        assert (tensor.data_ptr() in theirs) == (name not in embedder.trainable_names)
        assert name not in embedder.trainable_names or torch.equal(tensor, other.get_parameter(name))
    assert embedder.fingerprint != named


# -- files and fingerprints ---------------------------------------------------------------------------------------


@pytest.fixture
def saved_above_0(llm, tmp_path):
    tuned(llm, token_counts=counts(llm), connector="linear").save_pretrained(tmp_path / "embedder")
    return tmp_path / "embedder"


@pytest.mark.parametrize(
    "name", ["dtype", "tokenizer_digest", "hidden_size", "ratios", "chunk_size", "lora_rank", "id2label"]
)
@pytest.mark.parametrize("value", [None, -1, "x", [], [7], {}, {"a": 7}, 1e300])
def test_a_config_that_describes_no_embedder_is_one_sentence(llm, saved, name, value):
    edit_config(saved, **{name: value})
    message = ""
    try:
        ExtensibleEmbedder.from_pretrained(saved, llm=llm)
    except ExtembError as error:  # and nothing else
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("change", ["missing", "other", "shorter", "digest"])
def test_a_damaged_table_of_token_weights(llm, saved_above_0, change):
    tensors = load_file(saved_above_0 / "model.safetensors")
    table = tensors.pop("token_weights")
    assert table.dtype is torch.float16
    if change == "other":
        table[7] += 1
    if change == "shorter":
        table = table[:-1].clone()
    if change == "digest":
        edit_config(saved_above_0, token_weights_digest="0" * 32)
    kept = {} if change == "missing" else {"token_weights": table}
    save_file(tensors | kept, saved_above_0 / "model.safetensors")
    with pytest.raises(WeightsCorruptError, match=r"does not hold the token weights that config\.json names"):
        ExtensibleEmbedder.from_pretrained(saved_above_0, llm=llm)


@pytest.mark.parametrize("values", [{"entry_layer": 2}, {"entry_layer": 0}, {"num_layers": 2}, {"entry_layer": 9}])
def test_a_config_of_another_entry_layer(llm, saved_above_0, values):
    edit_config(saved_above_0, **values)
    with pytest.raises(ConfigError, match="has no meaning at entry_layer"):
        ExtensibleEmbedder.from_pretrained(saved_above_0, llm=llm)


def test_an_embedder_for_another_layer_llm_or_tokenizer(llm, saved_above_0):
    with pytest.raises(MismatchError, match="tiny-llama' differ by"):
        ExtensibleEmbedder.from_pretrained(saved_above_0, llm=tiny_llm(seed=1))
    with pytest.raises(MismatchError, match="architecture llama"):
        ExtensibleEmbedder.from_pretrained(saved_above_0, llm=tiny_llm("qwen2"))
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["lighthouse"])
    with pytest.raises(MismatchError, match="tokenizer"):
        ExtensibleEmbedder.from_pretrained(saved_above_0, llm=LLM(llm.model, other, name="other words"))
    edit_config(saved_above_0, entry_layer=2, num_layers=2)
    with pytest.raises(WeightsCorruptError, match="missing, unknown or of another shape"):
        ExtensibleEmbedder.from_pretrained(saved_above_0, llm=llm)


def test_a_saved_untrained_embedder_is_of_its_layer_and_llm(llm, tmp_path):
    entering(llm).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 10_000
    assert ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm).fingerprint == entering(llm).fingerprint
    edit_config(tmp_path, entry_layer=2, num_layers=2)
    with pytest.raises(MismatchError, match="differ by"):
        ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm)


def test_a_rank_is_no_part_of_the_fingerprint_where_there_are_no_adapters(llm):
    assert entering(llm, lora_rank=4).fingerprint == entering(llm, lora_rank=8).fingerprint


def test_the_fingerprint_above_layer_0_follows_what_the_states_depend_on(llm):
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["lighthouse"])
    many = counts(llm)
    embedders = [
        entering(llm),
        entering(llm, 2),
        entering(llm, token_weighting="uniform"),
        entering(llm, token_counts=many),
        entering(llm, token_counts=many.flip(0)),
        entering(llm, chunk_size=32),
        entering(tiny_llm(seed=1)),
        entering(tiny_llm(bos=True)),
        entering(LLM(llm.model, other)),
        tuned(llm),
        tuned(llm, seed=2),
        tuned(llm, lora_rank=4),
        tuned(llm, connector="linear"),
        random_embedder(llm, num_layers=1),
    ]
    prints = [embedder.fingerprint for embedder in embedders]
    assert len(set(prints)) == len(prints)
    for same in (entering(llm), entering(llm, ratios=(1, 2)), entering(llm, kept_ratio=4, plan_ratios=(4,))):
        assert same.fingerprint == prints[0]
    assert embedders[0].compress("abc").fingerprint == prints[0]
    with torch.no_grad():
        embedders[9].get_parameter(embedders[9].trainable_names[0]).add_(1)
    assert embedders[9].fingerprint not in prints

"""The embedder's contracts on tiny models: the LLM untouched, nothing lost, nested, batch = single, safe files."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, random_embedder, tiny_llm, tiny_model, tiny_tokenizer

from extemb_core.errors import (
    ConfigError,
    DocumentError,
    MismatchError,
    RatioError,
    WeightsCorruptError,
    WeightsNotFoundError,
)
from extemb_core.models.config import Connector
from extemb_core.models.downscaling import Downscaling
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM, Sampling

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


@pytest.mark.parametrize("connector", get_args(Connector))
@pytest.mark.parametrize("adaptation", ("lora", "full"))
@pytest.mark.parametrize("downscaling", get_args(Downscaling))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrix(architecture, downscaling, adaptation, connector, tmp_path):
    llm = tiny_llm(architecture)
    made = {"adaptation": adaptation, "downscaling": downscaling, "connector": connector}
    embedder = random_embedder(llm, **made)
    texts = [TEXT, "Copper wires ran from the cellar."]
    results = embedder.compress(texts, ratio=4)
    for text, result in zip(texts, results, strict=True):
        assert result.n_tokens == len(llm.encode(text))
        assert result.embeddings.shape == (positions(result.n_tokens, 4), llm.width)
        assert torch.isfinite(result.embeddings).all()

    outputs = embedder(torch.from_numpy(llm.encode(TEXT)[None, :16]).long())
    embedder.read_out(outputs, 0, 16, 4).pow(2).sum().backward()
    trained = {name for name, p in embedder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == embedder.own_state_dict().keys() - {"llm_probe"}
    assert all(p.grad is None for p in llm.model.parameters())

    embedder.save_pretrained(tmp_path)
    again = ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm)
    assert_equal_tensors(embedder.own_state_dict(), again.own_state_dict())
    assert again.fingerprint == embedder.fingerprint
    assert torch.equal(again.compress(TEXT, ratio=4).embeddings, results[0].embeddings)


# -- contract 1: the LLM is never modified ------------------------------------------------------------------------


@pytest.mark.parametrize("adaptation", ("lora", "full"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_llm_is_bit_equal_after_everything(architecture, adaptation):
    llm = LLM(tiny_model(architecture), tiny_tokenizer(), name="own")
    ids = torch.arange(3, 40)[None]
    before, logits = copy_of(llm.model), llm.model(ids).logits
    embedder = random_embedder(llm, adaptation=adaptation)
    embedder.compress([TEXT, "a"])
    optimizer = torch.optim.SGD([p for p in embedder.parameters() if p.requires_grad], lr=0.1)
    own = {name: tensor.clone() for name, tensor in embedder.own_state_dict().items()}
    embedder.train()
    embedder.read_out(embedder(ids[:, :16]), 0, 16, 4).pow(2).sum().backward()
    optimizer.step()
    assert any(not torch.equal(tensor, own[name]) for name, tensor in embedder.own_state_dict().items())
    assert_equal_tensors(before, copy_of(llm.model))
    assert torch.equal(llm.model(ids).logits, logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llm.model.modules())
    assert not any("lora" in name for name in llm.model.state_dict())
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_shares_the_llms_tensors_and_full_copies_the_layers(architecture):
    llm = tiny_llm(architecture)
    theirs = {p.data_ptr() for p in llm.model.parameters()}
    lora, full = (random_embedder(llm, adaptation=adaptation) for adaptation in ("lora", "full"))
    base = [p for name, p in lora.stack.named_parameters() if "lora_" not in name]
    assert len(base) > 8
    assert all(p.data_ptr() in theirs and not p.requires_grad for p in base)
    assert not any(p.data_ptr() in theirs for p in full.stack.layers.parameters())
    assert full.stack.get_input_embeddings().weight.data_ptr() in theirs
    assert len(lora.stack.layers) == 2
    assert len(llm.model.base_model.layers) == 3


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
    (made,) = random_embedder(llm).compress_ids([llm.encode(TEXT)[:n_tokens]], ratio=ratio)
    assert len(made) == positions(n_tokens, ratio)
    assert made.n_tokens == n_tokens


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_changed_token_changes_its_own_embedding_and_none_before_or_in_other_chunks(llm, ratio):
    embedder = random_embedder(llm)
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
    empty, blank, one = random_embedder(llm).compress(["", "   \n", "a"], ratio=8)
    assert empty.embeddings.shape == (0, llm.width)
    assert len(blank) == len(one) == 1
    assert len(empty.at_ratio(8)) == 0
    assert random_embedder(llm).compress([]) == []


# -- contract 3: nested -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_method():
    return {method: random_embedder(tiny_llm(), downscaling=method) for method in get_args(Downscaling)}


@given(length=st.integers(0, 50), method=st.sampled_from(get_args(Downscaling)), seed=st.integers(0, 99))
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
    for batch_size in (1, 2, 3, 100):
        for order in (range(len(texts)), reversed(range(len(texts)))):
            picked = list(order)
            for index, made in zip(
                picked, embedder.compress([texts[i] for i in picked], batch_size=batch_size), strict=True
            ):
                torch.testing.assert_close(made.embeddings, alone[index], atol=1e-5, rtol=0)


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
    random_embedder(llm).save_pretrained(folder)
    return folder


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


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
    with pytest.raises(WeightsNotFoundError, match="not a folder"):
        ExtensibleEmbedder.from_pretrained(saved / "nowhere", llm=llm)


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


@pytest.mark.parametrize("adaptation", ("lora", "full"))
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
@pytest.mark.parametrize("adaptation", ("lora", "full"))
def test_training_in_float32_over_an_llm_in_bfloat16(adaptation, architecture):
    llm = LLM(tiny_model(architecture).to(torch.bfloat16), tiny_tokenizer(), name="half")
    embedder = random_embedder(llm, adaptation=adaptation)
    embedder.own_to(torch.float32)
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

    other = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    with pytest.raises(ConfigError, match="a gpt2 model has no decoder of plain layers"):
        random_embedder(LLM(other, tiny_tokenizer(), name="gpt"))
    with pytest.raises(ConfigError, match="num_layers=4 is above the 3 layers"):
        random_embedder(tiny_llm(), num_layers=4)


def test_a_moved_folder_is_still_whole(llm, saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert ExtensibleEmbedder.from_pretrained(str(tmp_path / "elsewhere"), llm=llm).llm is llm

"""`Compressed.at_ratio` chunk by chunk, with anchors and without, and its refusals."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from extemb_core.errors import MismatchError, RatioError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.models.chunks import span_positions
from extemb_core.models.compressed import Compressed
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.pooling import pool


def compressed(n_tokens, ratio=2, ratios=(2, 4, 8), embeddings=None):
    made = torch.arange(float(n_tokens))[1::2, None] if embeddings is None else embeddings
    return Compressed(
        embeddings=made, ratio=ratio, n_tokens=n_tokens, ref="r", fingerprint="f", chunk_size=8, ratios=ratios,
        downscaling="strided",
    )  # fmt: skip


def test_spans_do_not_cross_chunks():
    # 20 tokens in chunks of 8, 8 and 4: at ratio 8 the last outputs of each chunk remain.
    assert compressed(20).at_ratio(8).embeddings[:, 0].tolist() == [7, 15, 19]
    assert len(compressed(20).at_ratio(4)) == 5


def test_everything_else_is_kept():
    coarse = compressed(20).at_ratio(4)
    assert (coarse.ratio, coarse.n_tokens, coarse.ref, coarse.fingerprint) == (4, 20, "r", "f")


def test_the_same_ratio_and_the_empty_text_are_no_work():
    assert compressed(20).at_ratio(2).embeddings.tolist() == compressed(20).embeddings.tolist()
    empty = compressed(0, embeddings=torch.empty(0, 1)).at_ratio(8)
    assert (len(empty), empty.ratio) == (0, 8)


@pytest.mark.parametrize(
    "values", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf), (3e38, 3e38, math.nan)]
)
def test_numbers_that_are_not_finite_are_refused_and_huge_ones_are_not(values):
    embeddings = torch.full((4, 24), 3e38)
    assert compressed(8, embeddings=embeddings).checked().embeddings is embeddings
    embeddings.flatten()[50 : 50 + len(values)] = torch.tensor(values)
    with pytest.raises(MismatchError, match="embeddings made by f are not finite numbers"):
        compressed(8, embeddings=embeddings).checked()


@pytest.mark.parametrize(("at_hand", "wanted"), [(4, 2), (2, 3), (2, 16), (8, 4), (2, 0)])
def test_what_cannot_be_derived_is_refused(at_hand, wanted):
    with pytest.raises(RatioError, match=f"ratio={wanted} cannot be derived from ratio {at_hand}"):
        compressed(8, ratio=at_hand).at_ratio(wanted)


def test_a_ratio_that_an_embedder_has_beside_others_is_derived_for_a_store():
    text = replace(compressed(24, ratio=2), ratios=(2, 4, 8))
    made = text.derived(6)
    assert (made.ratio, made.ratios) == (6, (2, 6))
    assert torch.equal(made.embeddings, replace(text, ratios=(2, 6)).at_ratio(6).embeddings)
    for wanted in (0, -2, 64):
        with pytest.raises(RatioError):
            text.derived(wanted)


def test_a_tilde_is_the_home_folder(home):
    text = compressed(8)
    text.save("~/text.extemb")
    assert torch.equal(Compressed.load("~/text.extemb").embeddings, text.embeddings)
    assert torch.equal(Compressed.load(home / "text.extemb").embeddings, text.embeddings)


# -- above entry layer 0 ------------------------------------------------------------------------------------------


def anchored(n_tokens, ratio=1, seed=0, chunk_size=8):
    """Random states, pooled chunk by chunk; the id of a token is its place."""
    generator = torch.Generator().manual_seed(seed)
    states, weights = torch.randn(n_tokens, 6, generator=generator), torch.rand(n_tokens, generator=generator) + 0.05
    spans = [slice(start, min(start + chunk_size, n_tokens)) for start in range(0, n_tokens, chunk_size)]
    chunks = [pool(states[span], weights[span], ratio) for span in spans]
    means, totals, norms = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    ends = [np.minimum(np.arange(s.start + ratio, s.stop + ratio, ratio), s.stop) - 1 for s in spans]
    return Compressed(
        embeddings=torch.cat([chunk.states for chunk in chunks]), ratio=ratio, n_tokens=n_tokens, ref="r",
        fingerprint="f", chunk_size=chunk_size, ratios=(1, 2, 4, 8), downscaling="mean", entry_layer=3,
        anchors=np.concatenate(ends).astype(np.int32), mean_norms=means.norm(dim=-1), norms=norms, weights=totals,
    )  # fmt: skip


@given(n_tokens=st.integers(1, 40), fine=st.sampled_from([1, 2, 4]), times=st.sampled_from([1, 2, 4, 8]))
def test_a_coarser_ratio_is_the_text_pooled_anew(n_tokens, fine, times):
    coarse = min(fine * times, 8)
    derived, expected = anchored(n_tokens, fine).at_ratio(coarse), anchored(n_tokens, coarse)
    assert derived.ratio == coarse
    assert derived.anchors.tolist() == expected.anchors.tolist()
    assert derived.anchors.dtype == np.int32
    for name in ("embeddings", "mean_norms", "norms", "weights"):
        torch.testing.assert_close(getattr(derived, name), getattr(expected, name), atol=1e-5, rtol=1e-4)


@given(
    n_tokens=st.integers(1, 40),
    fine=st.sampled_from([1, 2, 4]),
    data=st.data(),
    ratios=st.lists(st.sampled_from([4, 8])),
)
def test_a_span_is_pooled_from_its_start_on_and_in_each_chunk_anew(n_tokens, fine, data, ratios):
    token_states, text = anchored(n_tokens), anchored(n_tokens, fine)
    borders = [at for at in range(n_tokens) if at % 8 % fine == 0] + [n_tokens]
    spans = []
    for ratio in ratios:
        start, stop = sorted(data.draw(st.lists(st.sampled_from(borders), min_size=2, max_size=2, unique=True)))
        spans.append((start, stop, ratio))
    parts = text.parts(spans)
    assert len(parts) == len(spans)
    for part, (start, stop, ratio) in zip(parts, spans, strict=True):
        cuts = sorted({start, stop, *range(8 * (start // 8 + 1), stop, 8)})
        expected = [
            pool(token_states.embeddings[first:last], token_states.weights[first:last], ratio).states
            for first, last in itertools.pairwise(cuts)
        ]
        torch.testing.assert_close(part.states, torch.cat(expected), atol=1e-5, rtol=1e-4)
        ends = [
            min(at + ratio, last) - 1 for first, last in itertools.pairwise(cuts) for at in range(first, last, ratio)
        ]
        assert (part.anchors.tolist(), part.layer) == (ends, 3)
        assert len(part) == span_positions(start, stop, ratio, 8)


def test_the_whole_as_one_span_is_the_text_at_that_ratio():
    whole = anchored(19, 2)
    (part,) = whole.parts([(0, 19, 8)])
    assert torch.equal(part.states, whole.at_ratio(8).embeddings)
    assert part.anchors.tolist() == whole.at_ratio(8).anchors.tolist()


def test_spans_that_cannot_be_derived_are_refused():
    with pytest.raises(RatioError, match="ratio=2 cannot be derived from ratio 4"):
        anchored(19, 4).parts([(0, 8, 4), (8, 16, 2)])
    with pytest.raises(MismatchError, match="entry layer 0 has no spans"):
        compressed(20).parts([(0, 8, 4)])
    assert anchored(9).parts([]) == []


def test_the_last_token_of_each_group_is_its_anchor_tails_and_single_tokens_too():
    whole = anchored(19)  # chunks of 8, 8 and 3
    assert whole.at_ratio(4).anchors.tolist() == [3, 7, 11, 15, 18]
    assert whole.at_ratio(2).anchors.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 18]
    assert whole.at_ratio(2).at_ratio(8).anchors.tolist() == [7, 15, 18]
    torch.testing.assert_close(whole.at_ratio(2).embeddings[-1], whole.embeddings[-1])  # a group of one token
    one = anchored(1)
    torch.testing.assert_close(one.at_ratio(8).embeddings, one.embeddings)


def test_which_token_of_a_group_is_its_anchor_is_said_in_one_place(monkeypatch):
    first = {"strided": SimpleNamespace(select=lambda length, ratio: torch.arange(0, length, ratio))}
    monkeypatch.setattr("extemb_core.models.anchors.DOWNSCALINGS", first)
    assert anchored(19).at_ratio(4).anchors.tolist() == [0, 4, 8, 12, 16]
    assert [part.anchors.tolist() for part in anchored(19).parts([(2, 8, 4), (8, 19, 8)])] == [[2, 6], [8, 16]]


def test_a_huge_state_costs_no_other_chunk_or_group_its_digits():
    whole = anchored(24)
    embeddings, norms = whole.embeddings.clone(), whole.norms.clone()
    embeddings[0] *= 1e6
    norms[0] *= 1e6
    with_huge = replace(whole, embeddings=embeddings, norms=norms, mean_norms=norms)
    assert torch.equal(with_huge.at_ratio(4).embeddings[1:], whole.at_ratio(4).embeddings[1:])
    assert with_huge.at_ratio(4).norms[0] > 1e5


def test_what_stands_in_a_prompt():
    whole = anchored(9, 2)
    part = whole.part
    assert isinstance(part, AnchoredStates)
    assert (len(part), len(whole), part.layer) == (5, 5, 3)
    assert part.anchors is whole.anchors
    assert part.states is whole.embeddings
    assert compressed(20).part.shape == (10, 1)
    empty = replace(
        whole, n_tokens=0, embeddings=torch.empty(0, 6), anchors=np.empty(0, np.int32),
        **{name: torch.empty(0) for name in ("mean_norms", "norms", "weights")},
    )  # fmt: skip
    assert len(empty.at_ratio(8).part) == 0


@pytest.mark.parametrize("name", ["anchors", "mean_norms", "norms", "weights"])
def test_states_without_all_that_belongs_to_them_are_refused(name):
    whole = anchored(9)
    with pytest.raises(MismatchError, match="9 embeddings for entry layer 3 came with 9 and None anchors"):
        replace(whole, **{name: None})
    with pytest.raises(MismatchError, match="came with 8 and 9 anchors"):
        replace(whole, **{name: getattr(whole, name)[1:]})
    with pytest.raises(MismatchError, match="for entry layer 0 came with 9 anchors"):
        replace(whole, entry_layer=0)
    with pytest.raises(MismatchError, match="for entry layer 3 came with None anchors"):
        replace(compressed(20), entry_layer=3)


@pytest.mark.parametrize("text", [compressed(20), compressed(0, embeddings=torch.empty(0, 1)), anchored(9)])
def test_a_file_gives_back_exactly_what_was_saved(tmp_path, text):
    text.save(tmp_path / "a.safetensors", metadata={"title": "A", "page": 1})
    found = Compressed.load(tmp_path / "a.safetensors")
    for one in fields(Compressed):
        value, saved = getattr(found, one.name), getattr(text, one.name)
        same = torch.equal(value, saved) if isinstance(saved, torch.Tensor) else np.array_equal(value, saved)
        assert same, one.name
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_of_version_1_is_read(tmp_path):
    text = compressed(20)
    said = {"format": "extemb", "ref": "r", "ratio": "2", "n_tokens": "20", "fingerprint": "f", "chunk_size": "8",
            "ratios": "[2, 4, 8]", "downscaling": "strided", "source": "a.txt", "title": ""}  # fmt: skip
    save_file({"embeddings": text.embeddings.contiguous()}, tmp_path / "a.safetensors", said)
    assert torch.equal(Compressed.load(tmp_path / "a.safetensors").at_ratio(4).embeddings, text.at_ratio(4).embeddings)


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(StoreNotFoundError, match="does not exist; check the path"):
        Compressed.load(file)
    refused = pytest.raises(
        StoreCorruptError, match="is not a compressed text .*; write it again with: extemb compress"
    )
    anchored(9).save(file)
    file.write_bytes(file.read_bytes()[:-1])
    with refused:
        Compressed.load(file)
    save_file({"weight": torch.ones(2)}, file)
    with refused:
        Compressed.load(file)
    text = compressed(20)
    for change in (
        {"n_tokens": 40}, {"n_tokens": 10**18}, {"n_tokens": -1}, {"ratio": 0}, {"ratio": 2**62}, {"chunk_size": 0},
        {"embeddings": text.embeddings * float("nan")},
    ):  # fmt: skip
        replace(text, **change).save(file)
        with refused:
            Compressed.load(file)
    with refused:
        Compressed.load(tmp_path)


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path):
    with pytest.raises(StoreError, match="could not be written"):
        compressed(20).save(tmp_path / "no" / "a.safetensors")


@pytest.mark.parametrize(("at_hand", "wanted"), [(4, 2), (2, 3), (2, 16), (2, 0)])
def test_what_cannot_be_derived_of_states_is_refused(at_hand, wanted):
    with pytest.raises(RatioError, match=f"ratio={wanted} cannot be derived from ratio {at_hand}"):
        anchored(8, at_hand).at_ratio(wanted)

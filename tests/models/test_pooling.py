"""Pooling keeps norms, nests at every ratio, and no group takes digits from another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extemb_core.errors import ConfigError
from extemb_core.models.pooling import (
    Groups,
    coarsen_groups,
    digest_of,
    pool,
    pool_groups,
    rescaled,
    token_groups,
    token_weights,
)


def random_states(length, width=8, seed=0):
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def by_hand(states, weights, ratio):
    """Groups in float64, one after another."""
    h, w = states.double(), weights.double()
    rows = []
    for start in range(0, len(h), ratio):
        own, share = h[start : start + ratio], w[start : start + ratio]
        mean = (share[:, None] * own).sum(0) / share.sum()
        rows.append((mean, share.sum(), (share * own.norm(dim=-1)).sum() / share.sum()))
    return Groups(*(torch.stack(parts).float() for parts in zip(*rows, strict=True)))


def assert_same(made, expected, atol=1e-5):
    for own, theirs in zip((*made, made.states), (*expected, expected.states), strict=True):
        torch.testing.assert_close(own, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 17])
def test_groups_are_norm_keeping_weighted_means(length, ratio):
    states, weights = random_states(length), torch.rand(length) + 0.1
    made = pool(states, weights, ratio)
    assert len(made.weights) == math.ceil(length / ratio)
    assert_same(made, by_hand(states, weights, ratio))
    torch.testing.assert_close(made.states.norm(dim=-1), made.norms)
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(made.states, made.means), torch.ones(len(made.norms))
    )


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_groups_of_any_lengths_are_pooled_at_once_and_take_no_digits_from_another(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(lengths), 8, generator=generator)
    states[0] *= 1e6
    weights = torch.rand(sum(lengths), generator=generator) + 0.01
    made = pool_groups(token_groups(states, weights), torch.tensor(lengths))
    alone = [by_hand(h, w, len(h)) for h, w in zip(states.split(lengths), weights.split(lengths), strict=True)]
    for at, expected in enumerate(alone):
        assert_same(Groups(*(part[at : at + 1] for part in made)), expected, atol=2e-6 * float(expected.norms))


def test_a_group_of_one_token_is_its_state_whatever_its_weight():
    states = 1e3 * random_states(5)
    for weight in (1e-2, 1.0, 30.0):
        torch.testing.assert_close(pool(states, torch.full((5,), weight), 1).states, states)
        torch.testing.assert_close(pool(states[:3], torch.full((3,), weight), 2).states[1], states[2])


def test_heavier_tokens_count_more():
    states = torch.eye(2)
    torch.testing.assert_close(pool(states, torch.tensor([3.0, 1.0]), 2).means, torch.tensor([[0.75, 0.25]]))


@given(
    length=st.integers(1, 70),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 50.0, 1e6]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_coarser_groups_are_those_pooled_at_once(length, steps, scales, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(scales).repeat(length)[:length, None]
    states = torch.randn(length, 8, generator=generator) * scale
    weights = torch.rand(length, generator=generator) + 0.01
    made, ratio = pool(states, weights, 1), 1
    for step in steps:
        made, ratio = coarsen_groups(made, step), ratio * step
        expected = by_hand(states, weights, ratio)
        largest = max(float(expected.norms.max()), 1e-3)
        for own, theirs in zip((made.means, made.norms), (expected.means, expected.norms), strict=True):
            torch.testing.assert_close(own, theirs, atol=1e-6 * largest, rtol=1e-5)
        torch.testing.assert_close(made.weights, expected.weights)
        torch.testing.assert_close(made.states.norm(dim=-1), made.norms, atol=1e-6 * largest, rtol=1e-5)
        assert made.states.isfinite().all()


def test_a_huge_state_costs_the_groups_after_it_no_digits():
    states, weights = random_states(64), torch.rand(64) + 0.1
    usual = pool(states, weights, 4)
    states[0] *= 1e6
    with_huge = pool(states, weights, 4)
    assert with_huge.norms[0] > 1e5
    for own, theirs in zip(with_huge, usual, strict=True):
        assert torch.equal(own[1:], theirs[1:])
    for own, theirs in zip(coarsen_groups(with_huge, 2), coarsen_groups(usual, 2), strict=True):
        assert torch.equal(own[1:], theirs[1:])


@pytest.mark.parametrize("length", [1.0, 7.0, 1e4, 1e15])
def test_states_that_cancel_out_become_zero_and_not_a_number(length):
    state = torch.zeros(8)
    state[3] = length
    made = pool(torch.stack([state, -state]), torch.ones(2), 2)
    assert torch.equal(made.means, torch.zeros(1, 8))
    assert torch.equal(made.states, torch.zeros(1, 8))
    assert made.norms.tolist() == pytest.approx([length])
    joined = coarsen_groups(Groups(*(torch.cat(pair) for pair in zip(made, made, strict=True))), 2)
    assert torch.equal(joined.states, torch.zeros(1, 8))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1.0, 1e19, 1e37])
def test_rows_of_any_size_are_given_their_length(scale):
    direction = torch.tensor([[3.0, -4.0, 0.0]])
    made = rescaled(direction * scale, torch.tensor([10.0]))
    torch.testing.assert_close(made, torch.tensor([[6.0, -8.0, 0.0]]), atol=2e-2 if scale < 1e-40 else 1e-5, rtol=0)


def test_gradient_is_that_of_the_formula_also_beside_a_group_that_cancels_out():
    states = random_states(4).double().requires_grad_()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])

    def formula(h):
        m, s = (weights[:, None] * h).sum(0) / weights.sum(), (weights * h.norm(dim=-1)).sum() / weights.sum()
        return m / m.norm() * s

    made = torch.autograd.grad(pool(states, weights, 4).states.square()[0, :3].sum(), states)[0]
    expected = torch.autograd.grad(formula(states).square()[:3].sum(), states)[0]
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    cancelling = torch.cat([random_states(2), torch.ones(1, 8), -torch.ones(1, 8)]).requires_grad_()
    pool(cancelling, torch.ones(4), 2).states[0].sum().backward()
    assert cancelling.grad.isfinite().all()
    assert cancelling.grad[:2].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_pooled_in_float32(dtype):
    states = (1e4 * random_states(9)).to(dtype)
    made = pool(states, torch.ones(9, dtype=dtype), 4)
    assert {part.dtype for part in made} == {torch.float32}
    assert_same(made, by_hand(states.float(), torch.ones(9), 4), atol=1e-2)


# -- weights of tokens --------------------------------------------------------------------------------------------


def test_weights_by_rank_follow_zipfs_law():
    made = token_weights("rank", 49_152)
    assert made.shape == (49_152,)
    assert (made > 0).all()
    assert (made.diff() > 0).all()
    share = (-made).exp()
    assert float(share.sum()) == pytest.approx(1, abs=0.02)  # the shares of a vocabulary of that size
    assert float(share[0] / share[9]) == pytest.approx(10, rel=1e-4)


def test_weights_by_frequency_are_log_inverse_shares():
    made = token_weights("frequency", 4, torch.tensor([90, 9, 1, 0]))
    expected = [math.log(101 / 90), math.log(101 / 9), math.log(101), math.log(101)]  # unseen counts as seen once
    assert made.tolist() == pytest.approx(expected, rel=1e-5)
    nearly_all = token_weights("frequency", 2, torch.tensor([10**9, 0]))
    assert (nearly_all >= 0.01).all()
    assert token_weights("uniform", 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "given_"),
    [
        (None, "none"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.zeros(4), r"shape \(4,\)"),
        (torch.tensor([1, -1, 2, 3]), "shape"),
        (torch.tensor([1.0, float("nan"), 2, 3]), "shape"),
    ],
)
def test_frequency_needs_counts_of_every_token(counts, given_):
    with pytest.raises(ConfigError, match=f"token_weighting='frequency' needs .* each of 4 tokens .* got .*{given_}"):
        token_weights("frequency", 4, counts)


def test_the_digest_is_of_what_is_kept():
    made = token_weights("rank", 40)
    assert digest_of(made) == digest_of(made.half()) == digest_of(made.half().float())
    assert digest_of(made) != digest_of(token_weights("uniform", 40))
    assert len(digest_of(made)) == 32

"""Connectors start where a frozen LLM can read, and treat each position on its own."""

from __future__ import annotations

import pytest
import torch

from extemb_core.models.connector import CONNECTORS, recent_embeddings, trailing_means


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_training_starts_from_the_mean_of_token_embeddings(kind):
    residuals = torch.randn(5, 8)
    torch.testing.assert_close(CONNECTORS[kind](8, 0.1)(100 * torch.randn(5, 8), residuals), residuals)


def test_a_convolution_starts_from_the_token_itself_and_the_others_turned_and_small():
    connector = CONNECTORS["conv"](8, 0.1, window=3)
    recent = torch.randn(5, 3, 8)
    recent[:, 1] = 0
    made = connector(100 * torch.randn(5, 8), recent[:, 2], recent.flatten(1))
    torch.testing.assert_close((made - recent[:, 2]).norm(dim=1), 0.3 * recent[:, 0].norm(dim=1))
    recent[:, 0] = 0
    torch.testing.assert_close(connector(torch.randn(5, 8), recent[:, 2], recent.flatten(1)), recent[:, 2])


def test_a_convolution_has_a_map_for_each_of_the_last_token_embeddings():
    embedded, maps, window = torch.randn(6, 4), torch.randn(3, 4, 4), 3
    connector = CONNECTORS["conv"](4, 0.1, window)
    connector.maps.weight.data = torch.cat([each.T for each in maps], dim=1)
    places = torch.tensor([0, 1, 5])
    recent = recent_embeddings(embedded, places, window)
    made = connector(torch.randn(3, 4), torch.zeros(3, 4), recent)
    for row, place in enumerate(places.tolist()):
        expected = torch.zeros(4)
        for offset in range(window):  # the place itself has the last map
            if place - offset >= 0:
                expected += embedded[place - offset] @ maps[window - 1 - offset]
        torch.testing.assert_close(made[row], expected)


def test_without_a_connector_outputs_get_the_size_of_token_embeddings():
    made = CONNECTORS["none"](64, 0.1)(100 * torch.randn(5, 64), torch.randn(5, 64))
    torch.testing.assert_close(made.pow(2).mean(-1).sqrt(), torch.full((5,), 0.1))


@pytest.mark.parametrize("kind", tuple(CONNECTORS))
def test_every_parameter_gets_a_gradient(kind):
    connector = CONNECTORS[kind](8, 0.1, window=2)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter)
    connector(torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 16)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in connector.parameters())


@pytest.mark.parametrize("window", [1, 3, 100])
def test_trailing_means_by_definition(window):
    embedded = torch.randn(2, 12, 4)
    means = trailing_means(embedded, window)
    for at in range(12):
        torch.testing.assert_close(means[:, at], embedded[:, max(0, at + 1 - window) : at + 1].mean(1))
    assert trailing_means(embedded.bfloat16(), window).dtype is torch.float32

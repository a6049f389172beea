"""Draws follow the filtered distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronos_qlib.forecast.engine.sampling import draw

VOCABULARY = 300  # more than the first candidates that top-p looks at


def grid(size: int) -> torch.Tensor:
    """Uniform numbers that stand for the whole interval: one row of evenly spaced ones."""
    return ((torch.arange(size) + 0.5) / size).unsqueeze(0)


def shares(logits: torch.Tensor, **options) -> torch.Tensor:
    """The share of a dense grid of uniform numbers that draws each token."""
    tokens = draw(logits.view(1, 1, -1), grid(20_000), **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options))
    return torch.bincount(tokens[0], minlength=logits.numel()) / 20_000


def filtered(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution by its definition, token by token."""
    order = sorted(range(logits.numel()), key=lambda token: -logits[token].item())
    weight = (logits.double() / temperature).softmax(-1)
    kept = order[:top_k] if top_k else order
    total, prefix, mass = sum(weight[t].item() for t in kept), [], 0.0
    for token in kept:
        prefix.append(token)
        mass += weight[token].item() / total
        if mass > top_p:
            break
    result = torch.zeros(logits.numel(), dtype=torch.double)
    result[prefix] = weight[prefix] / weight[prefix].sum()
    return result


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 2 * VOCABULARY])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 0.9999, 1.0])
def test_shares_are_the_filtered_distribution(temperature, top_k, top_p):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2
    expected = filtered(logits, temperature, top_k, top_p)
    torch.testing.assert_close(
        shares(logits, temperature=temperature, top_k=top_k, top_p=top_p).double(), expected, rtol=0, atol=2e-4
    )


def test_a_flat_distribution_needs_more_than_the_first_candidates():
    assert (shares(torch.zeros(VOCABULARY), top_p=0.9) > 0).sum() > 0.9 * VOCABULARY


@given(st.integers(0, 2**24 - 1), st.floats(0.05, 1.0), st.integers(0, 10))
@settings(deadline=None, max_examples=50)
def test_every_uniform_number_draws_a_token_that_was_kept(number, top_p, seed):
    logits = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    token = draw(logits, torch.full((1, 1), number * 2.0**-24), temperature=1.0, top_k=0, top_p=top_p)
    assert filtered(logits.flatten(), 1.0, 0, top_p)[token] > 0


def test_samples_of_a_row_may_share_a_distribution_or_have_their_own():
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    own = draw(logits, uniform, **options)
    for sample in range(4):
        shared = draw(logits[:, sample : sample + 1], uniform, **options)
        assert torch.equal(own[:, sample], shared[:, sample])


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_in_another_order_the_distribution_is_the_same_and_the_draw_rises_with_it(top_k, top_p):
    random = torch.Generator().manual_seed(0)
    logits, rank = 2 * torch.randn(VOCABULARY, generator=random), torch.randperm(VOCABULARY, generator=random)
    options = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    expected = shares(logits, **options)
    assert torch.allclose(shares(logits, **options, rank=rank), expected, atol=2e-4)
    drawn = rank[draw(logits.view(1, 1, -1), grid(500), **options, rank=rank)[0]]
    assert (drawn.diff() >= 0).all() and drawn[0] < drawn[-1]

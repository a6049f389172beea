"""Draws follow the filtered distribution, and each random number depends on its own seed, key, sample and step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronos_qlib.forecast.engine.sampling import draw, philox, uniforms

VOCABULARY = 300  # more than the first candidates that top-p looks at
ONES = 0xFFFFFFFF
# Known answers published with the Random123 library.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


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
    found = shares(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


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


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(np.array([word], np.uint32) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_numbers_of_a_row_do_not_depend_on_the_other_rows_samples_or_steps():
    keys = np.array([5, -3, 2**62 + 1, 0])
    everything = uniforms(7, keys, sample_count=6, steps=9)
    assert everything.shape == (9, 2, 4, 6)
    alone = uniforms(7, keys[2:3], sample_count=2, steps=4)
    np.testing.assert_array_equal(everything[:4, :, 2:3, :2], alone)


def test_seed_key_sample_step_and_draw_each_change_the_numbers():
    base = uniforms(0, np.arange(2), 2, 2)
    assert len(np.unique(base)) == base.size
    assert not np.isin(uniforms(1, np.arange(2), 2, 2), base).any()
    assert not np.isin(uniforms(1 << 40, np.arange(2), 2, 2), base).any()
    assert not np.isin(uniforms(0, np.arange(2) + (1 << 40), 2, 2), base).any()


def test_numbers_are_uniform_on_the_unit_interval():
    numbers = uniforms(3, np.arange(2000), 5, 10).ravel()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: far in either tail would be 1 in 10,000


@pytest.mark.parametrize("samples", [1, 2, 5, 20])
def test_stratified_numbers_of_a_draw_lie_in_different_strata_and_each_is_uniform(samples):
    numbers = uniforms(3, np.arange(3000), samples, 4, stratified=True)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    strata = np.sort((numbers.astype(np.float64) * samples).astype(int), axis=-1)
    np.testing.assert_array_equal(strata, np.broadcast_to(np.arange(samples), strata.shape))
    for sample in {0, samples - 1}:
        counts = np.histogram(numbers[..., sample], bins=100, range=(0, 1))[0]
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 50 < chi_square < 160


def test_stratified_numbers_depend_on_key_and_step_and_draws_are_independent():
    numbers = uniforms(7, np.array([5, 8]), 5, 9, stratified=True)
    np.testing.assert_array_equal(numbers[:4, :, 1:], uniforms(7, np.array([8]), 5, 4, stratified=True))
    many = uniforms(1, np.arange(20_000), 5, 2, stratified=True)
    first, second, later = many[0, 0, :, 0], many[0, 1, :, 0], many[1, 0, :, 0]
    for one, other in ((first, second), (first, later)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert np.corrcoef(first, many[0, 0, :, 1])[0, 1] < -0.15  # two samples of a draw avoid each other: −1/4 in strata

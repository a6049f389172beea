"""The random numbers are Philox4x32-10, and each hangs on its own seed, key, sample and step alone."""

import numpy as np
import pytest

from kronos_qlib.forecast.engine.sampling import philox, uniforms

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


def test_stratified_numbers_hang_on_key_and_step_and_draws_are_independent():
    numbers = uniforms(7, np.array([5, 8]), 5, 9, stratified=True)
    np.testing.assert_array_equal(numbers[:4, :, 1:], uniforms(7, np.array([8]), 5, 4, stratified=True))
    many = uniforms(1, np.arange(20_000), 5, 2, stratified=True)
    first, second, later = many[0, 0, :, 0], many[0, 1, :, 0], many[1, 0, :, 0]
    for one, other in ((first, second), (first, later)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert np.corrcoef(first, many[0, 0, :, 1])[0, 1] < -0.15  # two samples of a draw avoid each other: −1/4 in strata

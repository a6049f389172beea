"""Counter-based random numbers: each is a function of (seed, key, sample, step) and of nothing else."""

import operator

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 random bits for each counter.

    Args:
        counter: four arrays of uint32 that broadcast to one shape.
        key: two words of 32 bits.

    Returns:
        Four uint32 arrays of the common shape.
    """
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint32) for word in counter))
    key0, key1 = np.array([key[0]], np.uint32), np.array([key[1]], np.uint32)  # arrays wrap around without a warning
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            _high(second) ^ b ^ key0,
            second.astype(np.uint32),
            _high(first) ^ d ^ key1,
            first.astype(np.uint32),
        )
        key0, key1 = key0 + _WEYL[0], key1 + _WEYL[1]
    return a, b, c, d


def uniforms(seed: int, keys: np.ndarray, sample_count: int, steps: int, stratified: bool = False) -> np.ndarray:
    """Uniform numbers in [0, 1) for the draws of s1 and s2: float32 [steps, 2, B, sample_count].

    Args:
        seed: any integer, taken modulo 2^64.
        keys: one integer per row [B], taken modulo 2^64.
        stratified: at each draw, give each of a row's samples another of `sample_count` equal strata, in an order drawn
            anew (a Latin hypercube, McKay et al. 1979). Each number is still uniform, and independent of those of other
            draws and rows. Otherwise a number does not depend on how many samples there are.
    """
    words = np.asarray(keys, dtype=np.int64).view(np.uint64)[None, :, None]
    sample = np.arange(sample_count, dtype=np.uint32)[None, None, :]
    step = np.arange(steps, dtype=np.uint32)[:, None, None]
    seed = operator.index(seed) % (1 << 64)
    counter = ((words & _LOW).astype(np.uint32), _high(words), sample, step)
    drawn = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    numbers = np.stack([_unit(word) for word in drawn[:2]], axis=1)
    if not stratified:
        return numbers
    strata = np.stack(drawn[2:], axis=1).argsort(axis=-1, kind="stable").argsort(axis=-1)
    return np.minimum((strata + numbers.astype(np.float64)) / sample_count, 1 - 2.0**-24).astype(np.float32)


def _high(word: np.ndarray) -> np.ndarray:
    return (word >> _HALF).astype(np.uint32)


def _unit(word: np.ndarray) -> np.ndarray:
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)  # the 24 bits that float32 holds exactly

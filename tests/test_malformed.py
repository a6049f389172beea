"""Malformed inputs are answered by one clear line, and damage changes no result: a share of benchmarks/malformed.py."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from malformed import FAMILIES, faults

# Of how many inputs of a family one is tried here: the benchmark tries all.
SHARES = {"settings": 8, "checkpoint": 3, "store": 4, "predictor": 2, "engine": 1, "cache": 12, "training": 12}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_answer_is_one_clear_line(family, tmp_path):
    count, found = faults(family, tmp_path, SHARES.get(family, 8))
    assert count >= 8 and found == {}


def test_an_answer_that_is_not_clear_is_noticed():
    from malformed import Malformed, fault

    def fails(error):
        raise error

    assert "accepted" in fault(Malformed("", lambda: 1, ("key",)))
    assert "raised at" in fault(Malformed("", lambda: fails(ValueError("key")), ("key",)))
    assert "wrong result" in fault(Malformed("", lambda: 1, ("key",), same=2))
    assert "not named" in fault(Malformed("", lambda: 2, ("key",), same=2))

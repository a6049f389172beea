"""Where there is nothing to find no model finds anything, and a leak of the future is noticed.

Two seeds of benchmarks/leaks.py on smaller markets, with the same functions. LightGBM on Alpha158 alone, which is
Qlib's own, is asked there only: here its features are among those of `factors`.
"""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from leaks import Size, blindness_faults, signal_faults, t_values

pytestmark = pytest.mark.slow

MODELS = "kronos", "calibrated", "ranker", "factors"
SMALL = Size(instruments=8, days=600, tokenizer_windows=600, predictor_windows=900)
WIDE = Size(instruments=30, days=700, tokenizer_windows=600, predictor_windows=900)


@pytest.fixture(scope="module")
def t(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The t of the rank IC of each model, by seed."""
    folder = tmp_path_factory.mktemp("no_signal")
    return pd.DataFrame([t_values(seed, 0.0, MODELS, SMALL, folder) for seed in range(2)])


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_found_where_there_is_nothing(t, model):
    # Two seeds go beyond two standard errors in one case of twenty. The benchmark holds twenty seeds to two.
    assert signal_faults(t[model], standard_errors=3) == []


def test_a_normalisation_over_the_horizon_is_caught(tmp_path):
    leaking = t_values(0, 0.0, ("leaking",), WIDE, tmp_path)["leaking"]
    assert "|t| is above 3.5 for 1 of 1 seeds" in signal_faults([leaking])


def test_what_counts_as_finding_something():
    assert signal_faults([3.4, -3.4, 0.1]) == []
    assert signal_faults([0.1, -0.2, 3.6, -3.7]) == ["|t| is above 3.5 for 2 of 4 seeds"]
    assert signal_faults([1.2] * 4) == ["the mean t is 2.4 standard errors away from 0"]
    assert blindness_faults([3.1] * 4) == []
    assert blindness_faults([2.9] * 4) == ["the mean t less 2 standard errors is only 1.9"]

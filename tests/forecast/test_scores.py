"""The ten scores, by hand on two small windows."""

import numpy as np
import pytest

from kronos_qlib.forecast.scores import SCORES, scores

CLOSE = np.array([[[10.0, 12.0, 14.0], [8.0, 9.0, 10.0]], [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]])  # [B=2, S=2, P=3]
LAST, SCALE = np.array([10.0, 5.0]), np.array([2.0, 0.5])
MEANS = np.array([12.0, 9.0])  # of the two samples of the first window

EXPECTED = {
    "mean_return": (0.2 - 0.1) / 2,
    "last_return": (0.4 + 0.0) / 2,
    "max_return": (0.4 + 0.0) / 2,
    "min_return": (0.0 - 0.2) / 2,
    "prob_up": 0.5,
    "return_to_risk": 0.05 / 0.15,
    "z_mean": (1.0 - 0.5) / 2,
    "z_last": (2.0 + 0.0) / 2,
    "z_max": (2.0 + 0.0) / 2,
    "z_min": (0.0 - 1.0) / 2,
}


def test_there_are_ten_scores():
    assert set(SCORES) == set(EXPECTED) == set(scores(CLOSE, LAST, SCALE))


@pytest.mark.parametrize("name", SCORES)
def test_score_by_hand(name):
    assert scores(CLOSE, LAST, SCALE)[name][0] == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", SCORES)
def test_a_flat_forecast_scores_zero_and_stays_finite(name):
    assert scores(CLOSE, LAST, SCALE)[name][1] == 0

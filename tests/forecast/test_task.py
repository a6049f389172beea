"""A task reaches other processes whole, and its generation says when forecasts change."""

import pickle

import numpy as np
from tasks import LOOKBACK, make_task, make_windows, run

from kronos_qlib.forecast.task import GENERATION, Task

LAST_RETURNS = [0.05112, -0.03356, -0.05064, -0.04681, 0.02477]


def test_a_task_comes_back_from_its_folder_and_from_a_pickle(tmp_path):
    task = make_task(make_windows(last=40))
    task.save(tmp_path)
    rows = np.arange(len(task))
    for other in (Task.load(tmp_path), pickle.loads(pickle.dumps(task))):
        assert other.digest == task.digest
        np.testing.assert_array_equal(other.window_digests(rows), task.window_digests(rows))


def test_the_generation_is_raised_when_forecasts_change():
    """Old caches must not be served as new forecasts: if these closes change, raise GENERATION and write them anew."""
    values, _ = run(make_task(make_windows(last=LOOKBACK)))
    assert GENERATION == 3
    np.testing.assert_allclose(values["last_return"], LAST_RETURNS, atol=2e-4)

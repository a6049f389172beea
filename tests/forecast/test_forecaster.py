"""The columns of a forecast, and how many windows are forecast at a time."""

import numpy as np
import pyarrow.parquet as pq
import tasks
import torch
from tasks import LOOKBACK, NAMES, chunks, make_task, make_windows, run

from kronos_qlib.forecast import forecaster as forecasters
from kronos_qlib.forecast.forecaster import QUANTILES
from kronos_qlib.forecast.scores import scores


def test_the_columns_are_the_scores_and_quantiles_of_the_paths_kept(tmp_path):
    task = make_task(make_windows(last=24), keep_paths=True)
    run(task, tmp_path)
    frame = pq.read_table(chunks(tmp_path)[0]).to_pandas()
    assert list(frame.instrument[:5]) == list(NAMES)
    assert frame.datetime[0] == np.datetime64("2020-01-28")
    paths = np.stack(frame.paths).reshape(len(frame), 3, tasks.HORIZON, 6)
    close = paths[..., 3].astype(float)
    for quantile in QUANTILES:
        for step in range(tasks.HORIZON):
            expected = np.quantile(close[:, :, step], quantile / 100, axis=1)
            np.testing.assert_allclose(frame[f"q{quantile:02d}_{step + 1}"], expected, rtol=1e-6)
    context = task.windows.normalised(np.arange(len(frame)))
    expected = scores(close, context.last_close, context.scale[:, 0, 3])
    for name in ("mean_return", "last_return", "max_return", "min_return", "prob_up", "z_mean"):
        np.testing.assert_allclose(frame[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_device_out_of_memory_is_given_half(monkeypatch, caplog, plain):
    real = forecasters.generate

    def short_of_memory(*inputs, batch_size, **options):
        if batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*inputs, batch_size=batch_size, **options)

    monkeypatch.setattr(forecasters, "generate", short_of_memory)
    values, _ = run(make_task())
    assert "going on with 4 windows at a time" in caplog.text and "going on with 2 windows" in caplog.text
    close = np.isclose(values["mean_return"], plain["mean_return"], rtol=1e-3, atol=1e-5)
    assert close.mean() >= 0.99  # window batches of another size are rounded differently


def test_few_windows_are_not_filled_up_to_a_large_batch(monkeypatch):
    real, sizes = forecasters.generate, []

    def counted(weights, x, *inputs, **options):
        sizes.append(len(x))
        return real(weights, x, *inputs, **options)

    monkeypatch.setattr(forecasters, "generate", counted)
    small, _ = run(make_task(make_windows(last=24)))
    large, _ = run(make_task(make_windows(last=24), batch_size=4096))
    assert sizes == [32, 32], "25 windows in batches of 8; in one"
    np.testing.assert_allclose(large["mean_return"], small["mean_return"], rtol=1e-5)


def test_a_window_batch_fits_the_memory(monkeypatch):
    def choose(memory):
        monkeypatch.setattr(forecasters.psutil, "virtual_memory", lambda: type("Memory", (), {"total": memory}))
        return forecasters.choose_batch_size(make_task().model.config, LOOKBACK, tasks.HORIZON, 3, torch.device("cpu"))

    assert 1 <= choose(2**20) < choose(2**40) == forecasters.CPU_BATCH

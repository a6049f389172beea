"""A forecast is never computed twice, whatever happens to it, and comes out the same."""

import errno
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tasks
import torch
from filelock import FileLock
from tasks import COLUMNS, LOOKBACK, NAMES, assert_same, chunks, make_task, make_windows, run, started, with_bar_changed

from kronos_qlib.forecast import chunk_store as stores
from kronos_qlib.forecast import forecaster as scoring
from kronos_qlib.forecast import run as runs
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.forecaster import QUANTILES
from kronos_qlib.forecast.scores import scores
from kronos_qlib.forecast.task import GENERATION, Task

LAST_RETURNS = [0.02716, -0.04658, -0.04316, -0.04004, 0.01816]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(runs, "CHUNK_WINDOWS", 64)


@pytest.fixture(scope="module")
def plain():
    """The task's forecast, computed in one go and kept nowhere."""
    values, resumed = run(make_task())
    assert resumed == 0
    return values


def test_what_is_kept_is_what_was_computed_and_is_not_computed_again(plain, tmp_path, monkeypatch):
    first, resumed = run(make_task(), tmp_path)
    assert resumed == 0
    assert_same(first, plain)
    monkeypatch.setattr(runs, "Forecaster", None)  # nothing is left that would need it
    again, resumed = run(make_task(), tmp_path)
    assert resumed == len(make_task())
    assert_same(again, plain)


def test_it_says_how_much_was_there(tmp_path, caplog):
    run(make_task(), tmp_path)
    chunks(tmp_path)[0].unlink()
    with caplog.at_level("INFO", "qlib.KronosForecast"):
        run(make_task(), tmp_path)
    total = len(make_task())
    left = total - 64 if f"resumed {total - 64} of {total} windows" in caplog.text else total - total % 64
    assert f"resumed {left} of {total} windows" in caplog.text


@pytest.mark.parametrize("damage", ["cut short", "a byte turned", "empty", "another chunk's"])
def test_a_damaged_chunk_is_reported_and_computed_again(plain, tmp_path, caplog, damage):
    run(make_task(), tmp_path)
    path, other = chunks(tmp_path)[:2]
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        content = content[: len(content) // 2]
    elif damage == "a byte turned":
        place = content.find(b"PAR1") + 200
        content[place] ^= 0xFF
    elif damage == "empty":
        content = b""
    else:
        content = other.read_bytes()
    path.write_bytes(content)
    again, resumed = run(make_task(), tmp_path)
    assert f"{path} is damaged" in caplog.text
    assert 0 < len(make_task()) - resumed <= 64
    assert_same(again, plain)
    assert path.exists() and path.read_bytes() != content


def test_killed_five_times_it_goes_on_with_the_chunk_it_was_at(plain, tmp_path):
    for moment in (1, 2, 4, 5, 6):
        process = started(tmp_path, slow=True)
        end = time.monotonic() + 60
        while len(chunks(tmp_path)) < moment:
            assert time.monotonic() < end and process.exitcode is None
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    kept = sum(pq.read_metadata(path).num_rows for path in chunks(tmp_path))
    again, resumed = run(make_task(), tmp_path)
    assert 6 * 56 <= resumed == kept < len(make_task())
    assert_same(again, plain)


def test_more_days_cost_only_the_new_ones_and_change_nothing(plain, tmp_path):
    fewer, _ = run(make_task(make_windows(last=100)), tmp_path)
    whole, resumed = run(make_task(), tmp_path)
    assert resumed == len(make_windows(last=100))
    assert_same(whole, plain)
    assert_same({name: values[:resumed] for name, values in whole.items()}, fewer)


def test_a_changed_bar_costs_exactly_the_windows_it_is_in(tmp_path, plain):
    run(make_task(), tmp_path)
    day, instrument = 70, 2
    changed = make_task(with_bar_changed(make_windows(), instrument, day))
    again, resumed = run(changed, tmp_path)
    assert len(changed) - resumed == tasks.LOOKBACK
    codes = changed.windows.ends // tasks.DAYS
    days = changed.windows.ends % tasks.DAYS
    touched = (codes == instrument) & (days >= day) & (days < day + tasks.LOOKBACK)
    for name in COLUMNS:
        np.testing.assert_array_equal(again[name][~touched], plain[name][~touched])
    assert (again["last_close"][touched & (days == day)] != plain["last_close"][touched & (days == day)]).all()
    fresh, _ = run(changed)
    assert_same(again, fresh)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": Sampling(3, seed=2)},
        {"sampling": Sampling(3, seed=1, temperature=0.9)},
        {"sampling": Sampling(3, seed=1, sampling="stratified")},
        {"max_context": 32},
        {"dtype": torch.bfloat16},
        {"keep_paths": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_find_nothing(tmp_path, change):
    run(make_task(make_windows(last=40)), tmp_path)
    _, resumed = run(replace(make_task(make_windows(last=40)), **change), tmp_path)
    assert resumed == 0


def test_other_weights_find_nothing_and_how_it_is_worked_on_does_not_matter(tmp_path):
    task = make_task(make_windows(last=40))
    run(task, tmp_path)
    assert run(replace(task, batch_size=5), tmp_path)[1] == len(task)
    with torch.no_grad():
        task.model.head.proj_s1.bias[0] += 1
    assert run(replace(task), tmp_path)[1] == 0


def test_other_instruments_beside_it_do_not_change_a_window_nor_cost_it_again(tmp_path, plain):
    windows = make_windows()
    some = windows.take(windows.ends // tasks.DAYS != 1)
    few, _ = run(make_task(some), tmp_path)
    kept = windows.ends // tasks.DAYS != 1
    for name in COLUMNS:
        np.testing.assert_array_equal(few[name], plain[name][kept])
    _, resumed = run(make_task(), tmp_path)
    assert resumed == len(some)


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


def test_a_task_comes_back_from_its_folder(tmp_path):
    task = make_task(make_windows(last=40))
    task.save(tmp_path)
    loaded = Task.load(tmp_path)
    assert loaded.digest == task.digest
    rows = np.arange(len(task))
    np.testing.assert_array_equal(loaded.window_digests(rows), task.window_digests(rows))


def test_a_device_out_of_memory_is_given_half(monkeypatch, caplog, plain):
    real = scoring.generate

    def short_of_memory(*inputs, batch_size, **options):
        if batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*inputs, batch_size=batch_size, **options)

    monkeypatch.setattr(scoring, "generate", short_of_memory)
    values, _ = run(make_task())
    assert "going on with 4 windows at a time" in caplog.text and "going on with 2 windows" in caplog.text
    close = np.isclose(values["mean_return"], plain["mean_return"], rtol=1e-3, atol=1e-5)
    assert close.mean() >= 0.99  # window batches of another size are rounded differently


def test_a_window_batch_fits_the_memory(monkeypatch):
    def choose(memory):
        monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda: type("Memory", (), {"total": memory}))
        return scoring.choose_batch_size(make_task().model.config, LOOKBACK, tasks.HORIZON, 3, torch.device("cpu"))

    assert 1 <= choose(2**20) < choose(2**40) == scoring.CPU_BATCH


def kill(pid):
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("processes", "kept"), [(2, False), (4, True)])
def test_any_number_of_processes_gives_the_same_with_and_without_a_cache(plain, tmp_path, processes, kept):
    values, resumed = run(make_task(), tmp_path if kept else None, processes=processes)
    assert resumed == 0
    assert_same(values, plain)
    assert len(chunks(tmp_path)) == (-(-len(make_task()) // 64) if kept else 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("kronos-")]


def test_a_dead_process_is_replaced_and_its_chunk_done_by_another(plain, tmp_path, monkeypatch, caplog):
    from kronos_qlib.forecast import processes

    killed = []
    forecast_chunk = processes._Worker._forecast

    def then_kill(self, chunk):
        forecast_chunk(self, chunk)
        if len(killed) < 2 and self.process is not None:
            killed.append(self.process.pid)
            kill(self.process.pid)

    monkeypatch.setattr(processes._Worker, "_forecast", then_kill)
    values, _ = run(make_task(), tmp_path, processes=2)
    assert len(killed) == 2
    assert "a forecasting process died (SIGKILL)" in caplog.text
    assert_same(values, plain)


def test_a_chunk_that_kills_every_process_is_given_up_and_named(tmp_path, monkeypatch):
    from kronos_qlib.forecast import processes

    monkeypatch.setattr(processes, "WORKER", ("-c", "import os; input(); os.kill(os.getpid(), 9)"))
    with pytest.raises(RuntimeError, match="died 6 times in a row .*SIGKILL"):
        run(make_task(), tmp_path, processes=2)
    with pytest.raises(RuntimeError, match="died 3 times on the same 30 windows .*SIGKILL"):
        run(make_task(make_windows(last=25)), tmp_path, processes=2)


def test_what_a_killed_run_has_left_is_removed_and_what_another_uses_is_not(plain, tmp_path):
    process = started(tmp_path, slow=True, processes=2)
    end = time.monotonic() + 60
    while not chunks(tmp_path):
        assert time.monotonic() < end and process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    (left,) = tmp_path.glob("kronos-*")
    used = tmp_path / "kronos-used"
    used.mkdir()
    with FileLock(used / "lock"):
        again, resumed = run(make_task(), tmp_path, processes=2)
        assert used.exists()
    assert not left.exists() and resumed >= 56
    assert_same(again, plain)


def test_chunks_with_paths_serve_a_task_without(plain, tmp_path):
    run(make_task(keep_paths=True), tmp_path)
    again, resumed = run(make_task(), tmp_path)
    assert resumed == len(make_task())
    assert_same(again, plain)


def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    run(make_task(), tmp_path)

    def busy(*args, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(stores.pq, "read_table", busy)
    with pytest.raises(OSError, match="Too many open files"):
        run(make_task(), tmp_path)
    assert len(chunks(tmp_path)) == -(-len(make_task()) // 64)


def test_the_generation_is_raised_when_forecasts_change():
    """Old caches must not be served as new forecasts: if these closes change, raise GENERATION and write them anew."""
    values, _ = run(make_task(make_windows(last=LOOKBACK)))
    assert GENERATION == 3
    np.testing.assert_allclose(values["last_return"], LAST_RETURNS, atol=2e-4)


def test_an_error_of_a_process_is_raised_in_its_words(tmp_path, monkeypatch):
    task = make_task()
    broken = replace(task, sampling=task.sampling, max_context=2)  # below the horizon: refused by generation
    with pytest.raises(RuntimeError, match="pred_len .3. must be below max_context .2."):
        run(broken, tmp_path, processes=2)

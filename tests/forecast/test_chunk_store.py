"""A forecast is found again by its windows, settings and weights, and by its date."""

import errno
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tasks
import torch
from tasks import COLUMNS, NAMES, assert_same, chunks, make_task, make_windows, run, with_bar_changed

from kronos_qlib.forecast import chunk_store as stores
from kronos_qlib.forecast.chunk_store import read_forecasts
from kronos_qlib.forecast.engine.sampling import Sampling


def test_it_says_how_much_was_there(cache_dir, caplog):
    chunks(cache_dir)[0].unlink()
    with caplog.at_level("INFO", "qlib.KronosForecast"):
        run(make_task(), cache_dir)
    total = len(make_task())
    left = total - 64 if f"resumed {total - 64} of {total} windows" in caplog.text else total - total % 64
    assert f"resumed {left} of {total} windows" in caplog.text


@pytest.mark.parametrize("damage", ["cut short", "a byte turned", "empty", "another chunk's"])
def test_a_damaged_chunk_is_reported_and_computed_again(plain, cache_dir, caplog, damage):
    path, other = chunks(cache_dir)[:2]
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
    again, resumed = run(make_task(), cache_dir)
    assert f"{path} is damaged" in caplog.text
    assert 0 < len(make_task()) - resumed <= 64
    assert_same(again, plain)
    assert path.exists() and path.read_bytes() != content


def test_a_setting_that_came_later_leaves_earlier_folders_theirs_until_it_is_set():
    plain, anchored = make_task(), replace(make_task(), sampling=Sampling(3, seed=1, anchor=True))
    assert "anchor" not in plain.identity["sampling"] and anchored.identity["sampling"]["anchor"]
    assert plain.digest != anchored.digest


def test_every_turned_bit_of_a_chunk_is_noticed(cache_dir):
    content = chunks(cache_dir)[0].read_bytes()
    assert stores.is_whole(content)
    places = {*range(0, len(content), 97), *range(len(content) - 3000, len(content))}  # the metadata are at the end
    assert not [at for at in places if stores.is_whole(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])]


def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(cache_dir, monkeypatch):

    def busy(*args, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(stores.pq, "read_table", busy)
    with pytest.raises(OSError, match="Too many open files"):
        run(make_task(), cache_dir)
    assert len(chunks(cache_dir)) == -(-len(make_task()) // 64)


def test_more_days_cost_only_the_new_ones_and_change_nothing(plain, tmp_path):
    fewer, _ = run(make_task(make_windows(last=100)), tmp_path)
    whole, resumed = run(make_task(), tmp_path)
    assert resumed == len(make_windows(last=100))
    assert_same(whole, plain)
    assert_same({name: values[:resumed] for name, values in whole.items()}, fewer)


def test_a_changed_bar_costs_exactly_the_windows_it_is_in(cache_dir, plain):
    day, instrument = 70, 2
    changed = make_task(with_bar_changed(make_windows(), instrument, day))
    again, resumed = run(changed, cache_dir)
    assert len(changed) - resumed == tasks.LOOKBACK
    codes = changed.windows.ends // tasks.DAYS
    days = changed.windows.ends % tasks.DAYS
    touched = (codes == instrument) & (days >= day) & (days < day + tasks.LOOKBACK)
    for name in COLUMNS:
        np.testing.assert_array_equal(again[name][~touched], plain[name][~touched])
    assert (again["last_close"][touched & (days == day)] != plain["last_close"][touched & (days == day)]).all()
    fresh, _ = run(changed)
    assert_same(again, fresh)


def test_other_instruments_beside_it_do_not_change_a_window_nor_cost_it_again(tmp_path, plain):
    windows = make_windows()
    some = windows.take(windows.ends // tasks.DAYS != 1)
    few, _ = run(make_task(some), tmp_path)
    kept = windows.ends // tasks.DAYS != 1
    for name in COLUMNS:
        np.testing.assert_array_equal(few[name], plain[name][kept])
    _, resumed = run(make_task(), tmp_path)
    assert resumed == len(some)


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


def test_chunks_with_paths_serve_a_task_without(plain, tmp_path):
    run(make_task(keep_paths=True), tmp_path)
    again, resumed = run(make_task(), tmp_path)
    assert resumed == len(make_task())
    assert_same(again, plain)


def test_stored_forecasts_are_read_by_date_each_window_once_and_as_it_was_stored_last(tmp_path):
    task = make_task(make_windows(last=40), keep_paths=True)
    before = run(task, tmp_path).columns
    changed = make_task(with_bar_changed(make_windows(last=40), instrument=2, day=39), keep_paths=True)
    values = run(changed, tmp_path).columns
    assert (values["last_close"] != before["last_close"]).any()
    dates = np.unique(task.windows.dates)[[20, 3]]
    table = read_forecasts(tmp_path / task.digest, dates.astype("datetime64[D]"))
    assert table.column_names == ["datetime", "instrument", *COLUMNS]
    assert table["datetime"].to_pylist() == [*map(pd.Timestamp, np.repeat(np.sort(dates), len(NAMES)))]
    assert table["instrument"].to_pylist() == [*NAMES, *NAMES]
    wanted = np.isin(task.windows.dates, dates)  # the task's own order is by date and instrument
    assert_same({name: table[name].to_numpy() for name in COLUMNS}, {name: values[name][wanted] for name in COLUMNS})
    assert len(read_forecasts(tmp_path / task.digest, np.array(["1999-12-31"]))) == 0


def test_a_folder_without_forecasts_is_named_and_a_damaged_one_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no stored forecasts"):
        read_forecasts(tmp_path, np.array([], "datetime64[ns]"))
    (tmp_path / "chunk-1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises((OSError, pa.ArrowException)):
        read_forecasts(tmp_path, np.array([], "datetime64[ns]"))

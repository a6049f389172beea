"""Stored forecasts are found again, by their windows and by date."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tasks import COLUMNS, NAMES, assert_same, make_task, make_windows, run, with_bar_changed

from kronos_qlib.forecast.chunk_store import read_forecasts


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

"""Extra training data: the windows of other universes and stores, as their own datasets would give them."""

import datetime
import io
import os
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from qlib.config import C
from qlib.data import D
from stores import random_bars, sessions, use_store, write_store

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.data.extra import ExtraData, _serve_request, _store_names, extra_windows, training_set
from kronos_qlib.data.windows import Windows
from kronos_qlib.settings import read_settings

DAY = [str(date.date()) for date in pd.bdate_range("2018-01-02", periods=100)]
SEGMENTS = {"train": [DAY[20], DAY[60]], "valid": [DAY[61], DAY[80]]}
END = np.datetime64(DAY[60], "ns")
KEY = "finetune.extra_data[1]"


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """Two markets whose instruments have the same names and other prices."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: write_demo_market(folder / name, instruments=8, days=100, seed=seed)
        for seed, name in enumerate(["own", "us_data"])
    }


@pytest.fixture
def dataset(stores) -> KLineDataset:
    use_store(stores["own"])
    return make_dataset()


@pytest.fixture
def forked(monkeypatch):
    """The process that reads another store, forked from this one: a new one imports Qlib for seconds."""

    def run(command, input, stdout, text, cwd, env):
        answer, write = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                os.chdir(cwd)
                sys.stdin, sys.stdout = io.StringIO(input), os.fdopen(write, "w")
                _serve_request()
                sys.stdout.flush()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(answer) as file:
            output = file.read()
        return CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output)

    monkeypatch.setattr("kronos_qlib.data.extra.subprocess", SimpleNamespace(run=run, PIPE=PIPE))


def make_dataset(universe="demo", handler=None, segments=SEGMENTS) -> KLineDataset:
    return KLineDataset(handler or KLineHandler(universe), segments, lookback=6, horizon=3)


def in_this_process(store: Path, universe: str) -> Windows:
    """What a dataset of that store gives."""
    in_use = C.dpm.provider_uri[C.DEFAULT_FREQ]
    use_store(store)
    windows = make_dataset(universe).training_windows("train")
    use_store(Path(in_use))
    return windows


def listed(windows: Windows) -> list[tuple[str, str]]:
    dates = np.datetime_as_string(windows.dates, unit="m")
    return list(zip(dates.tolist(), windows.instruments.tolist()))


def assert_same(left: Windows, right: Windows) -> None:
    assert listed(left) == listed(right)
    assert (left.lookback, left.future, left.clip) == (right.lookback, right.future, right.clip)
    ours, theirs = (windows.normalised(np.arange(len(windows))) for windows in (left, right))
    for name in vars(ours):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def content(store: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in store.rglob("*")}


@dataclass(frozen=True)
class Reading:
    """The universe `all` of the other store, read once, and what was there before and after."""

    windows: Windows
    folder: Path
    before: list
    after: list


@pytest.fixture(scope="module")
def reading(stores, tmp_path_factory) -> Reading:
    def state() -> list:
        close = D.features(["DEMO0000"], ["$close"], DAY[0], DAY[30], disk_cache=0)["$close"].tolist()
        return [dict(C.dpm.provider_uri), C["region"], close, *map(content, stores.values())]

    use_store(stores["own"])
    folder, dataset = tmp_path_factory.mktemp("windows"), make_dataset()
    before, extra = state(), ExtraData(instruments="all", provider_uri=str(stores["us_data"]), region="us")
    return Reading(extra_windows(extra, dataset, folder, KEY), folder, before, state())


def test_another_store_is_read_as_this_process_would_read_it(stores, dataset, reading):
    assert_same(reading.windows, in_this_process(stores["us_data"], "all"))
    assert isinstance(reading.windows.bars.values.base, np.memmap)


def test_this_process_goes_on_reading_its_own_store_and_none_is_written_to(reading):
    assert reading.after == reading.before


def test_a_second_reading_leaves_the_files_as_they_are(stores, dataset, reading, forked):
    before = content(reading.folder)
    extra = ExtraData(instruments="all", provider_uri=str(stores["us_data"]))
    extra_windows(extra, dataset, reading.folder, KEY)
    assert content(reading.folder) == before
    assert {path.suffix for path in before} == {".npy", ".json"}, "and nothing else is left there"


def test_no_bar_after_the_train_segment_is_there(dataset, reading, tmp_path):
    for found in (reading.windows, extra_windows(ExtraData(instruments="all"), dataset, tmp_path, KEY)):
        assert found.bars.dates.max() == END
        assert found.bars.dates[found.ends + found.future].max() == END


def test_bars_after_the_train_segment_change_nothing(dataset, reading, forked, tmp_path):
    changed = write_demo_market(tmp_path / "changed", instruments=8, days=100, seed=1)
    for path in changed.glob("features/*/*.bin"):
        start, *values = np.fromfile(path, "<f4")
        values[61 - int(start) :] = np.random.default_rng(0).uniform(-9, 9, len(values[61 - int(start) :]))
        np.array([start, *values], "<f4").tofile(path)
    extra = ExtraData(instruments="all", provider_uri=str(changed))
    assert_same(extra_windows(extra, dataset, tmp_path / "windows", KEY), reading.windows)


def test_another_universe_of_the_store_in_use(dataset, tmp_path):
    found = extra_windows(ExtraData(instruments="all"), dataset, tmp_path / "unused", KEY)
    assert_same(found, make_dataset("all").training_windows("train"))
    assert not (tmp_path / "unused").exists()


def test_the_store_in_use_under_another_path_is_the_store_in_use(stores, dataset, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(stores["own"])
    monkeypatch.setenv("HOME", str(tmp_path))
    found = training_set(
        dataset.training_windows("train"),
        dataset,
        [ExtraData(instruments="demo", provider_uri="~/link")],
        tmp_path / "unused",
    )
    assert listed(found) == listed(dataset.training_windows("train")), "every window is there already"
    assert not (tmp_path / "unused").exists()


def test_a_train_segment_without_an_end_ends_with_the_datasets_data(dataset, tmp_path):
    open_ended = make_dataset(handler=KLineHandler("demo", end_time=DAY[50]), segments={"train": [DAY[20], None]})
    found = extra_windows(ExtraData(instruments="all"), open_ended, tmp_path, KEY)
    assert found.bars.dates.max() == np.datetime64(DAY[50])


def test_start_time_bounds_what_is_read(dataset, tmp_path):
    extra = ExtraData(instruments=["DEMO0000"], start_time=datetime.date.fromisoformat(DAY[30]))
    assert extra_windows(extra, dataset, tmp_path, KEY).bars.dates.min() >= np.datetime64(DAY[30])


DAYS = sessions(30)


@pytest.fixture
def two_frequencies(tmp_path) -> Path:
    """A store of 30 days, and of six bars on each of them, every one at the end of its half hour."""
    times = pd.DatetimeIndex([day + pd.Timedelta(hours=10, minutes=30 * i) for day in DAYS for i in range(6)])
    names = ["AAA", "BBB"]
    store = write_store(
        tmp_path / "store", DAYS, {name: random_bars(len(DAYS), seed=i) for i, name in enumerate(names)}
    )
    bars = {name: random_bars(len(times), seed=i + 2) for i, name in enumerate(names)}
    shutil.copytree(write_store(tmp_path / "bars", times, bars, freq="30min"), store, dirs_exist_ok=True)
    use_store(store)
    return store


def test_intraday_bars_beside_daily_ones_run_to_the_end_of_the_last_day(two_frequencies, tmp_path):
    dataset = make_dataset("all", segments={"train": [DAYS[10], DAYS[20]]})
    own, extra = dataset.training_windows("train"), ExtraData(instruments=["AAA"], freq="30min")
    found = extra_windows(extra, dataset, tmp_path, KEY)
    assert found.bars.dates.max() == DAYS[20] + pd.Timedelta(hours=12, minutes=30)
    joined = training_set(own, dataset, [extra], tmp_path)
    assert listed(joined) == listed(own) + [(time, f"30min:{name}") for time, name in listed(found)]


@pytest.mark.parametrize(("end", "last"), [(DAYS[20], DAYS[20]), (DAYS[20] + pd.Timedelta(hours=11), DAYS[19])])
def test_daily_bars_beside_intraday_ones_end_with_the_last_day_that_is_over(two_frequencies, tmp_path, end, last):
    handler = KLineHandler("all", freq="30min")
    dataset = make_dataset(handler=handler, segments={"train": [DAYS[10], end]})
    found = extra_windows(ExtraData(instruments=["AAA"], freq="day"), dataset, tmp_path, KEY)
    assert found.bars.dates.max() == last


def test_a_training_set_counts_every_window_once_and_its_own_first(stores, dataset, forked, tmp_path):
    own = dataset.training_windows("train")
    us = str(stores["us_data"])
    extras = [
        ExtraData(instruments="all"),
        ExtraData(instruments="demo", provider_uri=us),
        ExtraData(instruments="all", provider_uri=us),
    ]
    found = listed(training_set(own, dataset, extras, tmp_path))
    assert found[: len(own)] == listed(own)
    assert len(found) == len(set(found))
    expected = {*listed(make_dataset("all").training_windows("train"))}
    expected |= {(date, f"us_data:{name}") for date, name in listed(in_this_process(stores["us_data"], "all"))}
    assert set(found) == expected


def test_without_extra_data_the_training_set_is_the_datasets_own(dataset, tmp_path):
    own = dataset.training_windows("train")
    assert training_set(own, dataset, [], tmp_path / "unused") is own


def test_stores_with_folders_of_one_name_are_told_apart(stores, dataset, tmp_path):
    folders = [None, stores["own"], stores["us_data"], tmp_path / "us_data", stores["us_data"], tmp_path / "kr_data"]
    extras = [ExtraData(instruments="all", provider_uri=folder and str(folder)) for folder in folders]
    us, them = str(stores["us_data"]), str(tmp_path / "us_data")
    assert _store_names(extras, "day") == ["", "", us, them, us, "kr_data"]


@pytest.mark.slow
def test_relative_paths_are_those_of_the_working_directory_and_warnings_reach_the_user(
    stores, dataset, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(stores["us_data"].parent)
    (tmp_path / "kronos_qlib").mkdir()  # what lies in a working directory is no package
    folder = Path(os.path.relpath(tmp_path))
    extra = ExtraData(instruments=["DEMO0000", "NOBODY"], provider_uri="us_data")
    found = extra_windows(extra, dataset, folder, KEY)
    assert len(found) and (tmp_path / "windows.json").exists()
    out, err = capfd.readouterr()
    assert f"1 of 2 instruments of universe of 2 listed instruments in store {stores['us_data']} have no bars" in err
    assert out == ""


def test_what_a_universe_of_the_store_in_use_leaves_out_is_a_warning(tmp_path):
    bars = {"AAA": random_bars(60), "BBB": random_bars(60), "NEW": random_bars(3)}
    use_store(write_store(tmp_path / "store", sessions(60), bars, first_rows={"NEW": 57}))
    dataset = make_dataset("all", segments={"train": [sessions(60)[20], sessions(60)[59]]})
    with pytest.warns(UserWarning, match=r"1 instruments are left out of segment 'train' .* 6 valid bars .*: NEW$"):
        extra_windows(ExtraData(instruments=["AAA", "NEW"]), dataset, tmp_path, KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruments": "nothing"}, "KLineHandler: unknown universe 'nothing'; store .* has all, demo"),
        ({"instruments": ["NOBODY"]}, "KLineHandler: no bars of universe of 1 listed instruments"),
        ({"start_time": "2018-12-31"}, "KLineHandler: start_time 2018-12-31 is after end_time"),
        ({"freq": "5min"}, "KLineHandler: store .* has no calendar for freq '5min'; it has day"),
        ({"start_time": DAY[55]}, "KLineDataset: segment 'train' .* has no window"),
        ({"amount": "vwap"}, r"KLineHandler: amount = \$vwap × \$volume needs fields"),
    ],
)
def test_what_the_handler_refuses_is_an_error_that_names_the_key(dataset, tmp_path, change, message):
    extra = ExtraData(**{"instruments": "all"} | change)
    with pytest.raises(ValueError, match=rf"^finetune.extra_data\[1\]: {message}") as error:
        extra_windows(extra, dataset, tmp_path, KEY)
    assert "\n" not in str(error.value)


def test_what_is_refused_of_another_store_is_an_error_that_names_key_and_store(stores, dataset, forked, tmp_path):
    store, before = stores["us_data"], content(stores["us_data"])
    extra = ExtraData(instruments="nothing", provider_uri=str(store))
    where = rf"finetune.extra_data\[1\] \(provider_uri {store}\)"
    with pytest.raises(ValueError, match=f"^{where}: KLineHandler: unknown universe 'nothing'; .*all, demo$") as error:
        extra_windows(extra, dataset, tmp_path, KEY)
    assert "\n" not in str(error.value)
    assert content(store) == before


def test_a_missing_store_is_found_before_anything_is_read(stores, dataset, tmp_path):
    extras = [
        ExtraData(instruments="nothing", provider_uri=str(stores["us_data"])),
        ExtraData(instruments="all", provider_uri=str(tmp_path / "nowhere")),
    ]
    with pytest.raises(FileNotFoundError, match=r"^finetune.extra_data\[1\]: there is no Qlib store at .*nowhere;"):
        training_set(dataset.training_windows("train"), dataset, extras, tmp_path / "windows")
    with pytest.raises(FileNotFoundError, match=r"extra_data\[1\]: there is no Qlib store"):
        extra_windows(extras[1], dataset, tmp_path / "windows", KEY)
    assert not (tmp_path / "windows").exists()


def test_a_reader_that_breaks_down_is_an_error_that_names_the_key_and_its_status(
    stores, dataset, forked, tmp_path, capfd
):
    broken = {"market": "demo", "filter_pipe": [{"filter_type": "NoSuchFilter"}]}
    extra = ExtraData(instruments=broken, provider_uri=str(stores["us_data"]))
    with pytest.raises(ValueError, match=r"^finetune.extra_data\[1\] \(provider_uri .*us_data\): .* exit status 1"):
        extra_windows(extra, dataset, tmp_path, KEY)
    assert "NoSuchFilter" in capfd.readouterr().err


def test_settings_are_those_a_workflow_file_writes():
    text = "{instruments: sp500, provider_uri: ~/us_data, region: us, start_time: 2015-01-01, freq: day, amount: ohlc}"
    extra = read_settings(ExtraData, KEY, yaml.safe_load(text))
    assert extra.start_time == pd.Timestamp("2015-01-01")
    assert read_settings(ExtraData, KEY, {"instruments": "all"}).model_dump() == {
        "instruments": "all",
        "provider_uri": None,
        "region": None,
        "freq": None,
        "amount": "auto",
        "start_time": None,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "key 'instruments' is missing"),
        ({"instruments": 300}, "instruments: should be the name of a universe"),
        ({"instruments": "all", "horizon": 3}, "unknown key 'horizon'; known keys: instruments, provider_uri"),
        ({"instruments": "all", "provider_uri": ""}, "provider_uri: "),
        ({"instruments": "all", "region": "mars"}, "region: .*'cn', 'us' or 'tw'"),
        ({"instruments": "all", "freq": "fortnight"}, "freq: "),
        ({"instruments": "all", "start_time": "soon"}, "start_time: should be a date"),
    ],
)
def test_wrong_settings_are_errors_of_one_line(values, message):
    with pytest.raises(ValueError, match=rf"^finetune.extra_data\[1\]: {message}") as error:
        read_settings(ExtraData, KEY, values)
    assert "\n" not in str(error.value)

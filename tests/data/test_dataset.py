import datetime
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.utils import class_casting, init_instance_by_config
from stores import DAYS, market_bars, random_bars, sessions, use_store, write_market, write_store

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.windows import Windows

CALENDAR = sessions(DAYS)
DAY = [str(date.date()) for date in CALENDAR]
SEGMENTS = {"train": [DAY[10], DAY[39]], "test": [DAY[40], DAY[-1]]}


def make_dataset(**changes) -> KLineDataset:
    handler = changes.pop("handler", None) or KLineHandler("some")
    return KLineDataset(**{"handler": handler, "segments": SEGMENTS, "lookback": 6, "horizon": 3} | changes)


def listed(windows: Windows) -> list[tuple[str, str]]:
    dates = np.datetime_as_string(windows.dates, unit="D")
    return list(zip(dates.tolist(), windows.instruments.tolist()))


def expected_windows(first: int, last: int, future: int, lookback: int = 6) -> list[tuple[str, str]]:
    """The windows of the market, instrument by instrument in plain pandas."""
    member = {"AAA": range(DAYS), "BBB": range(46), "CCC": [*range(13), *range(35, DAYS)], "DDD": range(40, DAYS)}
    found = []
    for name, bars in market_bars().items():
        bars.index = np.arange(DAYS)[-len(bars) :]
        valid = bars.index[(bars["volume"] > 0) & bars["close"].notna()]
        for i in range(lookback - 1, len(valid) - future):
            if first <= valid[i] <= last and valid[i] in member[name] and valid[i + future] <= last:
                found.append((DAY[valid[i]], name))
    return sorted(found)


def contents(dataset: KLineDataset, segment: str) -> tuple[np.ndarray, ...]:
    windows = dataset.score_windows(segment)
    batch = windows.normalised(np.arange(len(windows)))
    return windows.keys, batch.x, batch.stamp, batch.mean, batch.scale, batch.last_close


@pytest.mark.parametrize("segment", ["train", "test"])
def test_score_windows_are_those_of_members_with_a_whole_lookback(market, segment):
    windows = make_dataset().score_windows(segment)
    first, last = {"train": (10, 39), "test": (40, DAYS - 1)}[segment]
    assert listed(windows) == expected_windows(first, last, future=0)
    assert (windows.lookback, windows.future) == (6, 0)


def test_the_last_session_of_the_store_has_scores(market):
    assert [pair for pair in listed(make_dataset().score_windows("test")) if pair[0] == DAY[-1]] == [
        (DAY[-1], name) for name in ("AAA", "CCC", "DDD")
    ]


def test_training_windows_never_reach_past_the_end_of_their_segment(market):
    dataset = make_dataset()
    windows = dataset.training_windows("train")
    assert listed(windows) == expected_windows(10, 39, future=4)
    assert windows.future == 4
    assert windows.bars.dates[windows.ends + windows.future].max() == CALENDAR[39]
    assert listed(windows)[-1][0] == DAY[35]
    assert windows.bars.dates[windows.ends - 5].min() < CALENDAR[10], "contexts may reach before the start"


def test_a_window_holds_the_valid_bars_up_to_its_date_across_a_suspension(market):
    windows = make_dataset().score_windows("train")
    row = listed(windows).index((DAY[30], "BBB"))  # suspended from session 20 to 27
    batch = windows.normalised(np.array([row]))
    expected = market_bars()["BBB"].loc[[17, 18, 19, 28, 29, 30], "close"].to_numpy(np.float32)
    np.testing.assert_allclose((batch.x * batch.scale + batch.mean)[0, :, 3], expected, rtol=1e-5)
    assert batch.stamp[0, :, 3].tolist() == [CALENDAR[i].day for i in (17, 18, 19, 28, 29, 30)]
    assert batch.last_close[0] == expected[-1]


def test_a_suspended_day_has_no_score(market):
    assert {DAY[i] for i in range(20, 28)}.isdisjoint(
        d for d, name in listed(make_dataset().score_windows("train")) if name == "BBB"
    )


@pytest.mark.parametrize("fate", ["other prices", "suspended", "missing", "absurd"])
def test_what_comes_after_a_date_does_not_change_windows_up_to_it(market, tmp_path, fate):
    before = make_dataset()
    bars = market_bars()
    for name, table in bars.items():
        after = slice(40 if len(table) == DAYS else 0, None)
        columns = ["open", "high", "low", "close"]
        if fate == "other prices":
            table.iloc[after] = random_bars(DAYS, seed=99)[table.columns].iloc[: len(table.iloc[after])]
        elif fate == "suspended":
            table.loc[table.index[after], "volume"] = 0.0
        elif fate == "missing":
            table.iloc[after] = np.nan
        else:
            table.loc[table.index[after], columns] = table.loc[table.index[after], columns] * 1e6
        bars[name] = table
    seen = contents(before, "train")
    use_store(write_market(tmp_path / "after", bars))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = contents(make_dataset(segments={"train": SEGMENTS["train"]}), "train")
    for left, right in zip(seen, changed):
        np.testing.assert_array_equal(left, right)


def test_keys_do_not_depend_on_segment_universe_or_range(market):
    windows = make_dataset().score_windows("test")
    other = make_dataset(handler=KLineHandler(["AAA", "DDD"], DAY[12]), segments={"any": [None, None]})
    keys = dict(zip(listed(other.score_windows("any")), other.score_windows("any").keys))
    shared = [i for i, pair in enumerate(listed(windows)) if pair in keys]
    assert len(shared) > 30
    assert all(windows.keys[i] == keys[listed(windows)[i]] for i in shared)


@pytest.mark.parametrize(
    "pair", [(DAY[41], DAY[50]), [DAY[41], datetime.date.fromisoformat(DAY[50])], slice(DAY[41], DAY[50])]
)
def test_a_pair_of_dates_is_a_segment_too(market, pair):
    assert listed(make_dataset().score_windows(pair)) == expected_windows(41, 50, future=0)


def test_open_ended_segments_run_to_the_ends_of_the_data(market):
    dataset = make_dataset(segments={"all": [None, None]})
    assert listed(dataset.score_windows("all")) == expected_windows(0, DAYS - 1, future=0)
    assert listed(dataset.training_windows("all")) == expected_windows(0, DAYS - 1, future=4)


def test_prepare_serves_qlibs_records(market):
    dataset = make_dataset()
    with class_casting(dataset, DatasetH):
        label = dataset.prepare("test", col_set="label", data_key=DataHandlerLP.DK_R)
    assert list(label.columns) == ["LABEL0"]
    assert (label.index[0][0], label.index[-1][0]) == (CALENDAR[40], CALENDAR[-1])
    train, test = dataset.prepare(["train", "test"], col_set=["feature", "label"])
    assert train.shape[1] == test.shape[1] == 7
    assert train.index[-1][0] == CALENDAR[39]


def test_a_workflow_file_configures_it(market):
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "some"}}
    segments = {"test": [datetime.date.fromisoformat(day) for day in SEGMENTS["test"]]}
    kwargs = {"handler": handler, "lookback": 6, "horizon": 3, "segments": segments}
    dataset = init_instance_by_config({"class": "KLineDataset", "module_path": "kronos_qlib", "kwargs": kwargs})
    assert listed(dataset.score_windows()) == expected_windows(40, DAYS - 1, future=0)


def test_the_calendar_is_the_stores_and_goes_on_beyond_it(market):
    after = make_dataset().calendar.sessions_after(CALENDAR[-2:].to_numpy(), 3)
    assert after[0, 0] == CALENDAR[-1] and after[1, 0] == np.datetime64("2024-03-26")


@pytest.mark.slow
def test_a_pickle_gives_the_same_windows_in_a_fresh_process(market, tmp_path):
    dataset = make_dataset()
    seen = contents(dataset, "test")
    dataset.calendar.stamps_after(CALENDAR[-1:], 3)
    dataset.config(dump_all=False, recursive=True)  # as qrun does
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(dataset))
    assert (tmp_path / "dataset.pkl").stat().st_size < 4000, "data must not be in the pickle"
    script = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from stores import use_store
from test_dataset import Path, contents
dataset = pickle.loads(Path(sys.argv[3]).read_bytes())
try:
    dataset.score_windows("test")
except ValueError as error:
    assert "call qlib.init" in str(error), error
use_store(sys.argv[2])
label = dataset.prepare("test", col_set="label", data_key="raw")
seen = contents(dataset, "test")
Path(sys.argv[4]).write_bytes(pickle.dumps((seen, label, dataset.calendar.stamps_after(label.index.levels[0][-1:], 3))))
"""
    arguments = [Path(__file__).parent, market, tmp_path / "dataset.pkl", tmp_path / "seen.pkl"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    there, label, stamps = pickle.loads((tmp_path / "seen.pkl").read_bytes())
    for left, right in zip(seen, there, strict=True):
        np.testing.assert_array_equal(left, right)
    pd.testing.assert_frame_equal(label, dataset.prepare("test", col_set="label", data_key="raw"))
    np.testing.assert_array_equal(stamps, dataset.calendar.stamps_after(CALENDAR[-1:], 3))


def test_qlibs_way_of_reloading_other_dates_works(market):
    dataset = pickle.loads(pickle.dumps(make_dataset(handler=KLineHandler("some", end_time=DAY[50]))))
    dataset.config(handler_kwargs={"start_time": DAY[5], "end_time": DAY[-1]}, segments={"later": (DAY[52], DAY[-1])})
    dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    assert listed(dataset.score_windows("later")) == expected_windows(52, DAYS - 1, future=0)
    dataset.config(lookback=12, horizon=2)
    assert listed(dataset.score_windows("later")) == expected_windows(52, DAYS - 1, future=0, lookback=12)
    assert dataset.training_windows("later").future == 3


def test_intraday_segments_end_with_the_last_bar_of_their_last_day(tmp_path):
    times = pd.DatetimeIndex([day + pd.Timedelta(hours=h) for day in sessions(10) for h in (10, 11, 14, 15)])
    use_store(write_store(tmp_path / "store", times, {"AAA": random_bars(40)}, freq="60min"))
    dataset = make_dataset(handler=KLineHandler("all", freq="60min"), segments={"test": ["2024-01-05", "2024-01-08"]})
    assert dataset.score_windows("test").dates.tolist() == times[12:20].to_numpy("M8[ns]").tolist()
    assert len(dataset.prepare("test", col_set="label")) == 8
    assert dataset.calendar.sessions_after(times[-1:], 2)[0].tolist() == [
        np.datetime64(f"2024-01-16T{hour}:00", "ns").item() for hour in (10, 11)
    ]


def test_instruments_with_too_little_history_are_returned_with_the_windows(market):
    dataset = make_dataset(lookback=25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a query warns of nothing
        windows = dataset.score_windows("test")
        assert dataset.training_windows((DAY[0], DAY[59])).left_out == ("DDD",)
    assert windows.left_out == ("DDD",) and "DDD" not in windows.instruments
    assert windows.take(slice(3)).left_out == ("DDD",), "they are the segment's, whatever is taken of its windows"
    assert make_dataset().score_windows("test").left_out == ()


def test_they_are_one_counted_warning_for_each_selection_of_a_dataset(market):
    dataset = make_dataset(lookback=25)
    message = r"1 instruments are left out of segment 'test' \[2024-02-27, .* 25 valid bars behind them there: DDD$"
    with pytest.warns(UserWarning, match=message) as warned:
        for _ in range(2):
            dataset.warn_of_left_out(dataset.score_windows("test"))
    assert len(warned) == 1
    dataset.config(lookback=24)
    with pytest.warns(UserWarning, match="24 valid bars"):
        dataset.warn_of_left_out(dataset.score_windows("test"))


def test_enough_history_for_all_is_no_warning(market):
    dataset = make_dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.warn_of_left_out(dataset.score_windows("test"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"look_back": 5}, "KLineDataset: unknown key 'look_back'; known keys: handler, segments, lookback, horizon"),
        ({"lookback": 1}, "lookback: .*greater than or equal to 2, not 1"),
        ({"lookback": "90"}, "lookback: .*valid integer, not '90'"),
        ({"horizon": 0}, "horizon: .*greater than or equal to 1, not 0"),
        ({"exchange": "NOWHERE"}, "exchange: unknown exchange 'NOWHERE'"),
        ({"segments": {}}, "segments: .*at least 1"),
        ({"segments": [DAY[1], DAY[2]]}, "segments: .*dictionary"),
        ({"segments": {"test": [DAY[1]]}}, r"segments.test: should be \[start, end\]"),
        ({"segments": {"test": [DAY[1], "soon"]}}, r"segments.test: should be two dates"),
        ({"segments": {"test": [DAY[2], DAY[1]]}}, r"segments.test: starts after it ends"),
        (
            {"segments": {"test": ["2031-01-01", "2031-12-31"]}},
            "'test' .2031-01-01, 2031-12-31. is empty: .*2024-01-02 to 2024-03-25",
        ),
        ({"horizon": 0, "lookback": 1}, "lookback: .*; horizon: "),
    ],
)
def test_wrong_settings_are_errors_of_one_line(market, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        make_dataset(**changes)
    assert "\n" not in str(error.value)


def test_another_handler_is_an_error(market):
    with pytest.raises(ValueError, match="handler should be a KLineHandler, not a DataHandlerLP"):
        make_dataset(handler=DataHandlerLP.from_df(KLineHandler("some").fetch()))


def test_an_unknown_segment_is_an_error_that_lists_the_known(market):
    with pytest.raises(ValueError, match="unknown segment 'valid'; known: train, test"):
        make_dataset().score_windows("valid")


def test_a_segment_without_windows_says_why(market):
    with pytest.raises(ValueError, match=r"segment \[2031-01-01, …\] is empty: the handler's data run from"):
        make_dataset().score_windows(("2031-01-01", None))
    with pytest.raises(
        ValueError, match=r"'train' .* has no window: of the \d+ bars .*, 0 have a lookback of 50 valid"
    ):
        make_dataset(lookback=50).score_windows("train")
    with pytest.raises(ValueError, match="and none has the 51 bars after it within the segment"):
        make_dataset(horizon=50).training_windows("test")


def test_config_refuses_what_it_does_not_know(market):
    with pytest.raises(ValueError, match="unknown key 'look_back' of config"):
        make_dataset().config(look_back=3)
    with pytest.raises(ValueError, match="lookback: "):
        make_dataset().config(lookback=0)


def bridging(lookback: int, future: int, allowed: int) -> set[tuple[str, str]]:
    """Windows (date, instrument) with more missed sessions than allowed between two bars, in plain pandas."""
    found = set()
    for name, bars in market_bars().items():
        bars.index = np.arange(DAYS)[-len(bars) :]
        valid = bars.index[(bars["volume"] > 0) & bars["close"].notna()]
        for i in range(lookback - 1, len(valid) - future):
            if (np.diff(valid[i - lookback + 1 : i + future + 1]) - 1 > allowed).any():
                found.add((DAY[valid[i]], name))
    return found


@pytest.mark.parametrize("allowed", [2, 3, 7, 8])
def test_windows_over_a_longer_gap_than_max_gap_are_left_out_and_counted(market, allowed):
    dataset, plain = make_dataset(max_gap=allowed), make_dataset()
    for select, future in (("score_windows", 0), ("training_windows", 4)):
        kept, all_of_them = (getattr(each, select)("train") for each in (dataset, plain))
        over = bridging(6, future, allowed) & set(listed(all_of_them))
        assert listed(kept) == [pair for pair in listed(all_of_them) if pair not in over]
        assert kept.gaps == len(over) and (allowed == 8) == (not over), "BBB misses 8 sessions, CCC 3"
    if allowed == 2:
        with pytest.warns(
            UserWarning, match=r"^KLineDataset: \d+ windows of segment 'train'.* more than 2 sessions.*left"
        ):
            dataset.warn_of_left_out(dataset.score_windows("train"))


def test_long_gaps_are_a_warning_where_none_is_forbidden(market, monkeypatch):
    monkeypatch.setattr("kronos_qlib.data.dataset.LONG_GAP", 7)
    windows = make_dataset().score_windows("train")
    assert windows.gaps == len(bridging(6, 0, 7) & set(listed(windows))) > 0
    with pytest.warns(
        UserWarning, match=f"{windows.gaps} windows .* more than 7 sessions.*set max_gap to leave them out"
    ):
        make_dataset().warn_of_left_out(windows)


def test_a_max_gap_that_leaves_no_window_is_an_error(tmp_path):
    every_other = random_bars(20)
    every_other.loc[1::2, "volume"] = 0.0
    members = {"some": [("AAA", "2000-01-01", "2030-01-01")]}
    use_store(write_store(tmp_path / "store", sessions(20), {"AAA": every_other, "BBB": random_bars(20)}, members))
    handler = KLineHandler(["AAA", "BBB"])
    dataset = KLineDataset(handler, {"all": [None, None]}, lookback=3, horizon=2, max_gap=0)
    assert set(dataset.score_windows("all").instruments) == {"BBB"}
    handler.config(instruments="some")
    with pytest.raises(
        ValueError, match=r"'all' .* no window: each of its \d+ misses more than max_gap \(0\) sessions"
    ):
        KLineDataset(handler, {"all": [None, None]}, lookback=3, horizon=2, max_gap=0).score_windows("all")

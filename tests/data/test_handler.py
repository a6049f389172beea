import datetime
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.data import D
from qlib.data.dataset.handler import DataHandlerLP
from stores import DAYS, market_bars, random_bars, sessions, use_store, write_calendar, write_market, write_store

from kronos_qlib import KLineHandler
from kronos_qlib.data.loader import read_fields
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import COLUMNS

CALENDAR = sessions(DAYS)
REAL_STORE = Path(os.environ.get("QLIB_DATA", "nowhere"))


@pytest.fixture
def one(tmp_path):
    """Write a store of one instrument with these bars and use it."""

    def write(bars: pd.DataFrame, name: str = "one") -> None:
        use_store(write_store(tmp_path / name, sessions(len(bars)), {"AAA": bars}))

    return write


def test_it_serves_features_and_label_as_a_qlib_handler(market):
    data = KLineHandler("some").fetch(col_set=KLineHandler.CS_RAW)
    labels = [("label", "LABEL0")]
    assert list(data.columns) == [("feature", column) for column in COLUMNS] + labels
    assert data.index.names == ["datetime", "instrument"] and data.index.is_monotonic_increasing
    assert set(data.dtypes) == {np.dtype(np.float32)}
    assert len(data) == 3 * DAYS + 20

    close = market_bars()["AAA"]["close"]
    found = data.xs("AAA", level="instrument")
    np.testing.assert_allclose(found["feature", "close"], close, rtol=1e-6)
    np.testing.assert_allclose(found["label", "LABEL0"], close.shift(-2) / close.shift(-1) - 1, rtol=2e-3, atol=1e-6)
    assert list(found.index) == list(CALENDAR)


@pytest.mark.parametrize("dates", [(None, None), ("2024-01-10", "2024-02-05"), ("2024-02-20", None)])
def test_fields_are_those_that_qlib_s_own_loader_reads(market, dates):
    names = [*sorted(market_bars()), "NOBODY"]
    fields = ["$close", "$volume", "Ref($close, -2)/Ref($close, -1) - 1", "$close/Ref($open, 3)", "$absent"]
    start, end = (None if date is None else pd.Timestamp(date) for date in dates)
    ours, theirs = read_fields(names, fields, start, end, "day"), D.features(names, fields, *dates, freq="day")
    assert len(ours) > 20
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_raw_infer_and_learn_data_are_one(market):
    handler = KLineHandler("some")
    frames = [handler.fetch("2024-02-01", col_set="feature", data_key=key) for key in ("raw", "infer", "learn")]
    assert len(frames[0]) == 3
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0])


def test_labels_are_configurable(market):
    handler = KLineHandler("some", label=["Ref($close, -1)/$close - 1", "$close"])
    assert list(handler.fetch(col_set="label").columns) == ["LABEL0", "LABEL1"]
    assert list(KLineHandler("some", label="$close").fetch(col_set="label").columns) == ["LABEL0"]


def test_the_range_is_inclusive_and_takes_yaml_dates(market):
    handler = KLineHandler("some", datetime.date(2024, 1, 10), "2024-02-01")
    assert (handler.dates[0], handler.dates[-1]) == (pd.Timestamp("2024-01-10"), pd.Timestamp("2024-02-01"))


def test_histories_are_whole_and_membership_is_a_mask(market):
    handler = KLineHandler("some")
    bars, members = handler.bars(), handler.members()
    days = {name: bars.dates[(bars.codes == i) & members] for i, name in enumerate(bars.instruments)}
    expected = {
        "AAA": CALENDAR,
        "BBB": CALENDAR[:46].delete(slice(20, 28)),
        "CCC": CALENDAR[:13].append(CALENDAR[35:]),
        "DDD": CALENDAR[40:],
    }
    for name, dates in expected.items():
        assert days[name].tolist() == dates.to_numpy("M8[ns]").tolist(), name
    assert (bars.codes == 1).sum() == DAYS - 8, "BBB has its bars after it left the universe"


def test_an_instrument_that_is_never_a_member_in_the_range_is_not_loaded(market):
    assert KLineHandler("some", "2024-01-02", "2024-01-31").bars().instruments == ("AAA", "BBB", "CCC")


def test_suspended_bars_are_dropped_per_instrument(market):
    bars = KLineHandler("some").bars()
    assert bars.instruments == ("AAA", "BBB", "CCC", "DDD")
    assert np.diff(bars.offsets).tolist() == [DAYS, DAYS - 8, DAYS - 3, 20]
    of_ccc = bars.dates[slice(*bars.offsets[2:4])]
    assert of_ccc.tolist() == CALENDAR.delete(slice(30, 33)).to_numpy("M8[ns]").tolist()
    assert bars.values.flags.c_contiguous and bars.values.dtype == np.float32 and bars.stamp.dtype == np.int8
    assert np.isfinite(bars.values).all() and (bars.values[:, 4] > 0).all()
    np.testing.assert_array_equal(bars.stamp, stamps(bars.dates))
    expected = market_bars()["CCC"].drop(index=[30, 31, 32])
    np.testing.assert_allclose(bars.values[slice(*bars.offsets[2:4]), 3], expected["close"], rtol=1e-6)


def test_a_list_of_instruments_is_always_a_member(market):
    handler = KLineHandler(["DDD", "BBB"])
    assert handler.bars().instruments == ("BBB", "DDD")
    assert handler.members().all()


def test_a_stockpool_with_filters_is_a_universe(market):
    rule = {"filter_type": "NameDFilter", "name_rule_re": "[AB]+", "filter_start_time": None, "filter_end_time": None}
    handler = KLineHandler({"market": "some", "filter_pipe": [rule]})
    assert handler.bars().instruments == ("AAA", "BBB")
    assert not handler.members().all(), "BBB leaves"


def test_amount_is_volume_times_mean_price_if_the_store_has_nothing_better(one):
    bars = random_bars(10)
    one(bars)
    handler = KLineHandler("all")
    assert handler.amount_rule == "ohlc"
    expected = bars["volume"] * bars[["open", "high", "low", "close"]].mean(axis=1)
    np.testing.assert_allclose(handler.bars().values[:, 5], expected, rtol=1e-6)


def test_amount_is_vwap_times_volume_before_that(one):
    bars = random_bars(10).assign(vwap=7.0)
    one(bars)
    assert KLineHandler("all").amount_rule == "vwap"
    np.testing.assert_allclose(KLineHandler("all").bars().values[:, 5], bars["volume"] * 7, rtol=1e-6)
    assert KLineHandler("all", amount="ohlc").amount_rule == "ohlc"


def test_the_stores_own_amount_comes_first(one):
    one(random_bars(10).assign(vwap=7.0, amount=123.0))
    assert KLineHandler("all").amount_rule == "amount"
    assert (KLineHandler("all").bars().values[:, 5] == 123).all()


def test_one_amount_rule_holds_for_all_instruments(tmp_path):
    bars = {"AAA": random_bars(10).assign(amount=123.0), "BBB": random_bars(10)}
    use_store(write_store(tmp_path / "store", sessions(10), bars))
    assert KLineHandler("all").amount_rule == "ohlc"
    with pytest.raises(ValueError, match=r"\$amount needs fields that 1 instruments .* BBB first"):
        KLineHandler("all", amount="amount")


def test_bars_to_come_do_not_decide_the_amount_rule(tmp_path):
    whole = random_bars(10).assign(amount=123.0)
    lost = whole.assign(amount=[123.0] * 6 + [np.nan] * 4)
    seen = []
    for name, bars in (("whole", whole), ("lost", lost)):
        use_store(write_store(tmp_path / name, sessions(10), {"AAA": bars}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the four bars that are dropped
            handler = KLineHandler("all")
        assert handler.amount_rule == "amount"
        seen.append(handler.bars().values[:6])
    np.testing.assert_array_equal(*seen)


def test_an_amount_that_begins_late_does_not_become_the_rule(tmp_path):
    late = random_bars(10).assign(amount=[np.nan] * 6 + [123.0] * 4)
    use_store(write_store(tmp_path / "store", sessions(10), {"AAA": late}))
    assert KLineHandler("all").amount_rule == "ohlc"
    with pytest.warns(UserWarning, match=r"6 bars .* have no amount = \$amount and are dropped, AAA 2024-01-02 first"):
        handler = KLineHandler("all", amount="amount")
    assert len(handler.bars()) == 4


def test_an_instrument_that_lacks_a_field_is_left_out_and_named(tmp_path):
    bars = {"AAA": random_bars(10), "BBB": random_bars(10).drop(columns="volume")}
    use_store(write_store(tmp_path / "store", sessions(10), bars))
    handler = KLineHandler("all")
    with pytest.warns(UserWarning, match=r"1 of 2 instruments are left out.*: BBB \(no volume, amount\)"):
        assert handler.bars().instruments == ("AAA",)


def test_a_pickled_handler_loads_lazily_and_keeps_its_amount_rule(one):
    one(random_bars(10))
    handler = KLineHandler("all")
    content = pickle.dumps(handler)
    assert len(content) < 4000, "data must not be in the pickle"
    one(random_bars(10).assign(amount=123.0), "with-amount")
    again = pickle.loads(content)
    assert again.amount_rule == "ohlc"
    np.testing.assert_array_equal(again.bars().values, handler.bars().values)
    pd.testing.assert_frame_equal(again.fetch(), handler.fetch())
    assert again.get_cols() == handler.get_cols()
    assert KLineHandler("all").amount_rule == "amount"


def test_config_changes_the_range_and_forgets_what_was_loaded(market):
    handler = KLineHandler("some")
    before = len(handler.bars()), len(handler.members())
    handler.config(end_time="2024-02-01")
    assert handler.dates[-1] == pd.Timestamp("2024-02-01")
    assert len(handler.bars()) == len(handler.members()) < before[0]
    handler.config(end_time=None)
    handler.setup_data(init_type=DataHandlerLP.IT_LS)
    assert (len(handler.bars()), len(handler.members())) == before
    with pytest.raises(ValueError, match="unknown key 'freq' of config"):
        handler.config(freq="5min")


def test_intraday_bars_end_with_the_last_day(tmp_path):
    times = pd.DatetimeIndex([day + pd.Timedelta(hours=h) for day in sessions(6) for h in (10, 11, 14, 15)])
    use_store(write_store(tmp_path / "store", times, {"AAA": random_bars(24)}, freq="60min"))
    handler = KLineHandler("all", end_time="2024-01-08", freq="60min")
    assert handler.dates[-1] == pd.Timestamp("2024-01-08 15:00")
    assert handler.members().all()
    assert handler.bars().stamp[-1].tolist() == [0, 15, 0, 8, 1]


# what is wrong is said in one line, before anything is written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instrument": "some"}, "KLineHandler: unknown key 'instrument'; known keys: instruments, start_time"),
        ({"infer_processors": []}, "unknown key 'infer_processors'"),
        ({"start_time": "the day after"}, "start_time: should be a date such as 2015-01-01, not 'the day after'"),
        ({"end_time": 20240101}, "end_time: should be a date"),
        ({"start_time": "2024-03-01", "end_time": "2024-02-01"}, "start_time 2024-03-01 is after end_time 2024-02-01"),
        ({"freq": "fortnight"}, "freq: .*, not 'fortnight'"),
        ({"freq": "5min"}, "has no calendar for freq '5min'; it has day"),
        ({"amount": "turnover"}, "amount: .*'vwap'.*, not 'turnover'"),
        ({"label": "Ref($close"}, "label: should hold Qlib expressions"),
        ({"label": []}, "label: should be a Qlib expression or a list of them"),
        ({"instruments": 300}, "instruments: should be the name of a universe"),
        ({"instruments": []}, "instruments: should be the name of a universe"),
        ({"instruments": "csi300"}, "unknown universe 'csi300'; store .* has all, some"),
        ({"instruments": ["XXX"]}, r"no bars of universe of 1 listed .*calendar runs from 2024-01-02.* to 2024-03-25"),
        ({"start_time": "2031-01-01"}, "universe 'some' .* has no member between 2031-01-01"),
    ],
)
def test_wrong_settings_are_errors_of_one_line(market, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        KLineHandler(**{"instruments": "some"} | settings)
    assert "\n" not in str(error.value)


def test_an_unknown_universe_leaves_no_file_behind(market):
    before = sorted(market.rglob("*"))
    with pytest.raises(ValueError, match="unknown universe"):
        KLineHandler("csi300")
    assert sorted(market.rglob("*")) == before


def test_an_empty_universe_file_is_an_unknown_universe(market):
    (market / "instruments" / "csi300.txt").touch()
    with pytest.raises(ValueError, match="unknown universe 'csi300'"):
        KLineHandler("csi300")


def test_a_missing_store_is_an_error_that_names_the_folder(tmp_path):
    use_store(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no Qlib store at .*nowhere"):
        KLineHandler("all")


@pytest.mark.parametrize("field", ["open", "volume"])
def test_a_field_that_no_instrument_has_is_an_error_that_names_it(one, field):
    one(random_bars(10).drop(columns=field))
    with pytest.raises(
        ValueError, match=rf"field \${field} is missing: no instrument of universe 'all' in store .*one"
    ):
        KLineHandler("all")


def test_instruments_without_bars_are_one_counted_warning(market):
    with pytest.warns(UserWarning, match="2 of 3 instruments .* have no bars: XXX, YYY") as warned:
        assert KLineHandler(["AAA", "YYY", "XXX"]).bars().instruments == ("AAA",)
    assert len(warned) == 1


@pytest.mark.parametrize(("lines", "message"), [((3, 3), "twice"), ((4, 3), "after")])
def test_a_calendar_out_of_order_is_an_error_that_names_file_and_date(market, lines, message):
    days = [*CALENDAR[:3], *(CALENDAR[line] for line in lines), *CALENDAR[5:]]
    write_calendar(market / "calendars" / "day.txt", days)
    use_store(market)
    with pytest.raises(ValueError, match=f"day.txt .* has {CALENDAR[3]} {message}"):
        KLineHandler("some")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("close", np.inf, "infinite"), ("open", -1, "zero or less"), ("volume", -1, "negative"), ("high", 0.1, "below")],
)
def test_bars_that_no_market_prints_are_an_error_that_names_the_first(market, tmp_path, field, value, message):
    bars = market_bars()
    bars["BBB"].loc[[33, 34], field] = value
    use_store(write_market(tmp_path / "bad", bars))
    with pytest.raises(ValueError, match=f"BBB {CALENDAR[33].date()} has .*{message}.*2 such bars"):
        KLineHandler("some").bars()


def test_an_impossible_value_on_a_suspended_bar_is_dropped_with_it(market, tmp_path):
    bars = market_bars()
    bars["BBB"].loc[22, "close"] = 0.0
    use_store(write_market(tmp_path / "store", bars))
    assert len(KLineHandler("some").bars()) == 3 * DAYS - 11 + 20


def test_an_unadjusted_jump_is_a_warning_that_names_it(market, tmp_path):
    bars = market_bars()
    bars["AAA"].loc[30:, ["open", "high", "low", "close"]] *= 5.6
    use_store(write_market(tmp_path / "jump", bars))
    with pytest.warns(UserWarning, match=f"on 1 bars of 1 instruments.*AAA {CALENDAR[30].date()}") as warned:
        KLineHandler("some").bars()
    assert len(warned) == 1


def test_a_jump_over_a_gap_without_closes_is_not_judged(market, tmp_path):
    bars = market_bars()
    bars["CCC"].loc[33:, ["open", "high", "low", "close"]] *= 5.6
    bars["CCC"].loc[33, "change"] = 0.0
    use_store(write_market(tmp_path / "gap", bars))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        KLineHandler("some").bars()


def test_the_first_bar_of_an_instrument_is_not_compared_with_another_instrument(market, tmp_path):
    bars = market_bars()
    for factor, table in zip((1, 100, 1, 100), bars.values()):
        table[["open", "high", "low", "close"]] *= factor
        table.loc[0, "change"] = 0.0
    use_store(write_market(tmp_path / "levels", bars))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        KLineHandler("some").bars()


@pytest.mark.skipif(not (REAL_STORE / "features" / "sz302132").is_dir(), reason="needs the real store in QLIB_DATA")
def test_the_defect_of_the_real_store_is_named():
    use_store(REAL_STORE)
    with pytest.warns(UserWarning, match=r"of 1 instruments.*: SZ302132 2025-02-18 \(\+462.5% against -5.9%\)"):
        KLineHandler(["SH600000", "SZ302132", "SZ000001"]).bars()


def test_change_is_optional(one):
    one(random_bars(10).drop(columns=["change", "factor"]))
    assert len(KLineHandler("all").bars()) == 10


def test_volume_is_optional_for_instruments_that_have_none(tmp_path):
    """Currencies, indices: their bars are kept with a volume and an amount of 0, and counted."""
    fx = {name: random_bars(60, seed).assign(volume=volume) for seed, (name, volume) in enumerate(PAIRS.items())}
    use_store(write_store(tmp_path / "fx", sessions(60), fx))
    with pytest.raises(ValueError, match="none of the 120 bars .* has a volume; .* set volume: optional"):
        KLineHandler("all").bars()
    handler = KLineHandler("all", volume="optional")
    with pytest.warns(UserWarning, match="120 bars"):
        bars = handler.bars()
    assert len(bars) == 120 and (bars.values[:, 4:] == 0).all() and (bars.values[:, :4] > 0).all()


PAIRS = {"EURUSD": 0.0, "GBPUSD": np.nan}


def test_instruments_that_never_have_a_volume_are_a_counted_warning(tmp_path):
    mixed = {"AAA": random_bars(60, 1), "EURUSD": random_bars(60, 2).assign(volume=0.0)}
    use_store(write_store(tmp_path / "mixed", sessions(60), mixed))
    with pytest.warns(UserWarning, match="1 instruments .* never have a volume and are left out, EURUSD first"):
        bars = KLineHandler("all").bars()
    assert bars.instruments[bars.codes[0]] == "AAA" and len(bars) == 60


def test_a_label_of_an_unknown_field_is_an_error(market):
    with pytest.raises(ValueError, match=r"label: field \$nothing is missing"):
        KLineHandler("some", label=["$close", "Ref($nothing, -2) / $close"])

"""Orders of a signal set: those that Qlib's own strategy and exchange would place."""

import copy

import numpy as np
import pandas as pd
import pytest
from finished_runs import BACKTEST, DATE, RECORDS, STRATEGY, Place, bars_file, change_bars
from qlib.backtest import backtest
from qlib.data import D
from tiny import use_market

from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.live.orders import Holdings, make_orders, read_holdings
from kronos_qlib.live.run import LiveRun
from kronos_qlib.live.signal_set import SignalSet
from kronos_qlib.live.signals import make_signals


def signals_of(place: Place, scores: dict[str, float]) -> tuple[LiveRun, SignalSet]:
    run = place.open("kronos")
    found = make_signals(run, DATE)
    table = pd.DataFrame({"score": pd.Series(scores)}).rename_axis("instrument").sort_index()
    table["rank"] = table["score"].rank(ascending=False).astype(int)
    return run, SignalSet(**vars(found) | {"table": table})


def test_orders_are_those_that_qlib_executes_on_the_same_day(place):
    """Qlib's own backtest of one step, at the close, from the same account, with the scores of the day before."""
    names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003", "DEMO0004"]
    run, signals = signals_of(place, dict(zip(names, [5.0, 4.0, 3.0, 2.0, 1.0])))
    bars = D.features(names, ["$factor", "$close", "$change"], DATE, DATE).droplevel("datetime")
    assert (bars["$change"].abs() < 0.095).all()
    holdings = Holdings(300_000.0, {"DEMO0002": 1000.0, "DEMO0003": 700.0, "DEMO0004": 500.0}, {"DEMO0003": 1})
    orders = make_orders(run, signals, holdings)

    before = D.calendar(end_time=DATE)[-2]
    index = pd.MultiIndex.from_product([[before], names], names=["datetime", "instrument"])
    strategy = copy.deepcopy(STRATEGY)
    strategy["kwargs"]["signal"] = pd.Series(signals.table["score"].to_numpy(), index)
    strategy["kwargs"]["hold_thresh"] = 0
    account = {"cash": holdings.cash}
    for name, held in holdings.shares.items():
        account[name] = {"amount": held / bars.loc[name, "$factor"], "price": bars.loc[name, "$close"]}
    executor = {"time_per_step": "day", "generate_portfolio_metrics": True}
    _, indicators = backtest(
        DATE,
        DATE,
        strategy,
        {"class": "SimulatorExecutor", "module_path": "qlib.backtest.executor", "kwargs": executor},
        benchmark="DEMOINDEX",
        account=account,
        exchange_kwargs=BACKTEST["exchange_kwargs"] | {"deal_price": "close"},
    )
    done = indicators["1day"][1].order_indicator_his[DATE].data
    amounts = dict(zip(done["deal_amount"].index.tolist(), done["deal_amount"].data))
    costs = dict(zip(done["trade_cost"].index.tolist(), done["trade_cost"].data))
    found = orders[orders["side"] != "none"].set_index("instrument")
    assert set(found.index) == set(amounts) and {"buy", "sell"} == set(found["side"])
    for name, row in found.iterrows():
        sign = 1 if row["side"] == "buy" else -1
        assert row["shares"] == pytest.approx(sign * amounts[name] * bars.loc[name, "$factor"])
        assert row["expected_cost"] == pytest.approx(costs[name])
        assert row["reference_price"] == pytest.approx(bars.loc[name, "$close"] / bars.loc[name, "$factor"], rel=1e-5)
        assert row["shares"] % 100 == pytest.approx(0, abs=1e-3) or row["side"] == "sell"


def test_what_is_at_its_limit_or_suspended_is_said_and_not_traded(place):
    names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003", "DEMO0004"]
    change_bars(place.store, "DEMO0000", "change", DATE, 0.0)
    path = bars_file(place.store, "DEMO0000", "change")
    content = np.fromfile(path, "<f4")
    calendar = (place.store / "calendars/day.txt").read_text().split()
    content[1 + calendar.index(str(DATE.date())) - int(content[0])] = 0.0999
    content.tofile(path)
    for field in ("open", "close"):
        path = bars_file(place.store, "DEMO0004", field)
        content = np.fromfile(path, "<f4")
        content[1 + calendar.index(str(DATE.date())) - int(content[0])] = np.nan
        content.tofile(path)
    run, signals = signals_of(place, dict(zip(names[:4], [5.0, 4.0, 3.0, 2.0])))
    orders = make_orders(run, signals, Holdings(300_000.0, {"DEMO0004": 500.0}, {})).set_index("instrument")
    assert orders.loc["DEMO0000", "side"] == "none"
    assert orders.loc["DEMO0000", "why"] == "rank 1 of 4, not bought: limit up on 2018-07-18"
    assert orders.loc["DEMO0004", "why"] == "no score, held, suspended on 2018-07-18"
    assert orders.loc["DEMO0001", "side"] == "buy" and orders.loc["DEMO0001", "why"] == "rank 2 of 4, not held"


def test_what_was_bought_too_lately_is_kept(place):
    names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003"]
    run, signals = signals_of(place, dict(zip(names, [4.0, 3.0, 2.0, 1.0])))
    held = {"DEMO0001": 100.0, "DEMO0002": 100.0, "DEMO0003": 100.0}
    for bars_held, side in ((1, set()), (2, {"DEMO0003"})):
        orders = make_orders(run, signals, Holdings(1e6, held, {"DEMO0003": bars_held}))
        assert set(orders.loc[orders["side"] == "sell", "instrument"]) == side


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column instrument"),
        ("instrument,shares\nSH1,5\n", "has no row CASH"),
        ("instrument,shares\nCASH,5\nSH1,many\n", "line 3: shares of SH1 is 'many'"),
        ("instrument,shares\nCASH,5\nSH1,-1\n", "line 3: shares of SH1"),
        ("instrument,shares\nCASH,5\nSH1,1\nsh1,2\n", "SH1 is there twice"),
        ("instrument,shares,bars_held\nCASH,5,\nSH1,1,x\n", "line 3: bars_held of SH1"),
        ("", "no CSV file of holdings"),
    ],
)
def test_wrong_holdings_are_named_by_their_line(tmp_path, text, message):
    (tmp_path / "account.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_holdings(tmp_path / "account.csv")


def test_a_holding_without_any_price_is_named(place):
    run, signals = signals_of(place, {"DEMO0000": 1.0, "DEMO0001": 2.0})
    with pytest.raises(ValueError, match="holdings: SH999999 has no bar in the 60 sessions up to 2018-07-18"):
        make_orders(run, signals, Holdings(1e6, {"SH999999": 100.0}, {}))


@pytest.mark.parametrize("records", ["dotted", "several passes", "without kwargs", "none"])
def test_the_portfolio_is_that_of_any_of_qlibs_records_of_one(place, records):
    run, kwargs = place.open("kronos"), RECORDS[1]["kwargs"]
    record = {
        "dotted": {"class": "qlib.workflow.record_temp.PortAnaRecord", "kwargs": kwargs},
        "several passes": {"class": "MultiPassPortAnaRecord", "kwargs": kwargs | {"pass_num": 2}},
        "without kwargs": {"class": "PortAnaRecord"},
        "none": {"class": "SigAnaRecord"},
    }[records]
    run.task["record"] = [RECORDS[0], record]
    if records == "none":
        assert run.portfolio is None
    else:
        topk = 50 if records == "without kwargs" else 3  # Qlib's default
        assert run.portfolio["strategy"]["kwargs"]["topk"] == topk
        assert run.portfolio["executor"]["kwargs"]["time_per_step"] == "day"


def with_strategy(run: LiveRun, strategy: dict) -> LiveRun:
    config = {"strategy": strategy, "backtest": BACKTEST}
    run.task["record"] = [{"class": "PortAnaRecord", "kwargs": {"config": config}}]
    return run


@pytest.mark.parametrize(
    "strategy",
    [
        {"class": "TWAPStrategy", "module_path": "qlib.contrib.strategy", "kwargs": {}},
        {"class": "NoSuch", "module_path": "qlib.contrib.strategy", "kwargs": {}},
        STRATEGY | {"kwargs": {"signal": "<PRED>"}},
    ],
)
def test_a_strategy_that_cannot_decide_is_one_line(place, strategy):
    run, signals = signals_of(place, {"DEMO0000": 1.0, "DEMO0001": 2.0})
    with pytest.raises(ValueError, match=f"the strategy {strategy['class']} cannot decide on signals"):
        make_orders(with_strategy(run, strategy), signals, Holdings(1e6, {}, {}))


def test_some_instruments_without_a_factor_are_named_as_shares_cannot_be_counted(place):
    path = bars_file(place.store, "DEMO0005", "factor")
    content, calendar = np.fromfile(path, "<f4"), (place.store / "calendars/day.txt").read_text().split()
    content[1 + calendar.index(str(DATE.date())) - int(content[0])] = np.nan
    content.tofile(path)
    run, signals = signals_of(place, {f"DEMO000{number}": float(number) for number in range(6)})
    with pytest.raises(ValueError, match="1 instruments have no factor on 2018-07-18, DEMO0005"):
        make_orders(run, signals, Holdings(1e6, {"DEMO0001": 100.0}, {}))


def test_orders_on_a_bar_within_the_day_see_no_bar_after_it(place, tmp_path):
    """A strategy of days on a signal of 13:00: prices, limits and lots are those of that bar."""
    store, found = write_demo_market(tmp_path / "hours", instruments=5, days=30, freq="60min"), []
    bar = pd.Timestamp("2018-02-01 13:00")
    for later in (1.0, 1.5):
        for folder in (store / "features").iterdir():
            for freq, first in (("60min", bar + pd.Timedelta(hours=1)), ("day", bar.normalize())):
                path, calendar = folder / f"close.{freq}.bin", store / "calendars" / f"{freq}.txt"
                sessions = pd.DatetimeIndex(calendar.read_text().splitlines())
                content = np.fromfile(path, "<f4")
                content[1 + sessions.get_loc(first) - int(content[0]) :] *= later
                content.tofile(path)
        use_market({"60min": str(store), "day": str(store)})
        names = ["DEMO0000", "DEMO0001", "DEMO0002", "DEMO0003"]
        table = pd.DataFrame({"score": [4.0, 3.0, 2.0, 1.0], "rank": [1, 2, 3, 4]}, pd.Index(names, name="instrument"))
        run, signals = signals_of(place, dict(zip(names, table["score"])))
        use_market({"60min": str(store), "day": str(store)})
        signals = SignalSet(**vars(signals) | {"table": table, "date": bar, "freq": "60min"})
        found.append(make_orders(run, signals, Holdings(1e6, {"DEMO0003": 100.0}, {})))
    pd.testing.assert_frame_equal(*found)
    bars = D.features(["DEMO0000"], ["$close/$factor"], bar, bar, freq="60min")
    price = found[0].set_index("instrument").loc["DEMO0000", "reference_price"]
    assert price == pytest.approx(bars.iloc[0, 0], rel=1e-5)

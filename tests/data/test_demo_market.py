import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.data import D
from stores import use_store

from kronos_qlib.data.demo_market import (
    BENCHMARK,
    PLANTED_PREDICTOR,
    UNIVERSE,
    _closes,
    _kind,
    is_synthetic,
    write_demo_market,
)

DAYS_OF_STOCKS = _kind("day", "stocks")
FIELDS = ("open", "high", "low", "close", "volume", "factor", "change")


def read_field(store: Path, field: str) -> pd.DataFrame:
    """One column per instrument, one row per day, read straight from the binary files."""
    days = (store / "calendars" / "day.txt").read_text().split()
    columns = {}
    for home in sorted((store / "features").iterdir()):
        first, *values = np.fromfile(home / f"{field}.day.bin", dtype="<f4").tolist()
        columns[home.name.upper()] = pd.Series(values, index=days[int(first) :])
    return pd.DataFrame(columns, index=days)


def read_members(store: Path) -> pd.DataFrame:
    days = (store / "calendars" / "day.txt").read_text().split()
    spans = [line.split("\t") for line in (store / "instruments" / f"{UNIVERSE}.txt").read_text().splitlines()]
    members = pd.DataFrame(False, index=days, columns=sorted({name for name, _, _ in spans}))
    for name, begin, end in spans:
        members.loc[begin:end, name] = True
    return members


def daily_rank_ic(store: Path, bars: int = 10) -> pd.Series:
    """Rank IC of the planted predictor against the usual label, over the members of each day."""
    close, members = read_field(store, "close"), read_members(store)
    close = close[members.columns]
    predictor = (close.shift(bars) / close).where(members)
    label = (close.shift(-2) / close.shift(-1) - 1).where(members & predictor.notna())
    predictor = predictor.where(label.notna())
    return predictor.rank(axis=1).corrwith(label.rank(axis=1), axis=1).dropna()


def t_statistic(ic: pd.Series) -> float:
    return ic.mean() / ic.std() * len(ic) ** 0.5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_market(tmp_path_factory.mktemp("demo") / "market")


@pytest.fixture(scope="module")
def bars(store: Path) -> dict[str, pd.DataFrame]:
    return {field: read_field(store, field) for field in FIELDS}


def traded(bars: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return bars["volume"] > 0


def test_store_has_business_days_instruments_and_the_benchmark_outside_the_universe(store: Path) -> None:
    days = (store / "calendars" / "day.txt").read_text().split()
    assert days == pd.bdate_range("2018-01-02", periods=900).strftime("%Y-%m-%d").to_list()
    listed = [line.split("\t")[0] for line in (store / "instruments" / "all.txt").read_text().splitlines()]
    assert len(listed) == 61
    assert BENCHMARK in listed
    assert BENCHMARK not in read_members(store).columns


def test_qlib_reads_what_was_written(store: Path, bars: dict[str, pd.DataFrame]) -> None:
    use_store(store)
    spans = D.list_instruments(D.instruments(UNIVERSE), as_list=False)
    assert sum(map(len, spans.values())) == len((store / "instruments" / f"{UNIVERSE}.txt").read_text().splitlines())
    seen = D.features(D.instruments("all"), ["$close", "$change", PLANTED_PREDICTOR], start_time="2021-01-04")
    assert seen.index.get_level_values("instrument").nunique() == 61
    close = bars["close"]["DEMO0000"]
    row = close.index.get_loc("2021-01-05")
    assert seen.loc[("DEMO0000", "2021-01-05"), "$close"] == close.iloc[row]
    planted = seen.loc[("DEMO0000", "2021-01-05"), PLANTED_PREDICTOR]
    assert planted == pytest.approx(close.iloc[row - 10] / close.iloc[row], rel=1e-6)


def test_bars_are_possible(bars: dict[str, pd.DataFrame]) -> None:
    prices = [bars[field] for field in ("open", "high", "low", "close")]
    there = bars["close"].notna()
    assert all((price.notna() == there).all(axis=None) for price in prices)
    assert (bars["high"] >= bars["open"].combine(bars["close"], np.maximum)).where(there, True).all(axis=None)
    assert (bars["low"] <= bars["open"].combine(bars["close"], np.minimum)).where(there, True).all(axis=None)
    assert (bars["low"] > 0).where(there, True).all(axis=None)
    stocks = bars["change"].drop(columns=BENCHMARK)
    assert stocks.abs().max(axis=None) == pytest.approx(0.1, abs=1e-6), "the price limit is reached and kept"


def test_change_is_the_return_of_the_close(bars: dict[str, pd.DataFrame]) -> None:
    wrong = bars["close"].pct_change(fill_method=None) - bars["change"]
    assert wrong.abs().max(axis=None) < 1e-6


def test_members_leave_rejoin_and_list_late(store: Path, bars: dict[str, pd.DataFrame]) -> None:
    members = read_members(store)
    begins = (members.astype(int).diff() == 1).sum()
    ends = (members.astype(int).diff() == -1).sum()
    assert ((ends == 1) & (begins == 0)).sum() >= 3, "some leave for good"
    assert ((ends == 1) & (begins == 1)).sum() >= 3, "some rejoin"
    late = bars["close"].columns[bars["close"].iloc[0].isna()]
    assert len(late) >= 3, "some are listed late"
    listed = bars["close"][members.columns].notna()
    assert not (members & ~listed).any(axis=None), "nobody is a member before being listed"


def test_a_suspension_repeats_the_last_close_without_volume(bars: dict[str, pd.DataFrame]) -> None:
    suspended = bars["close"].notna() & ~traded(bars)
    assert suspended.any().sum() > 20
    before = bars["close"].shift(1)
    for field in ("open", "high", "low", "close"):
        assert (bars[field] == before).where(suspended, True).all(axis=None)
    volume = bars["volume"].where(suspended).stack().dropna()
    assert (volume == 0).all(), "what is not a hole is zero"
    holes = suspended & bars["volume"].isna()
    assert holes.any(axis=None)
    assert (suspended & ~holes).any(axis=None)


def test_a_split_moves_the_factor_and_neither_adjusted_price_nor_adjusted_volume(bars: dict[str, pd.DataFrame]) -> None:
    split = bars["factor"].pct_change(fill_method=None) > 0.15
    assert split.to_numpy().sum() >= 10
    assert bars["close"].pct_change(fill_method=None).where(split).abs().max(axis=None) <= 0.1 + 1e-6
    volume = bars["volume"].where(traded(bars))
    jump = np.log(volume / volume.shift(1)).where(split).stack().dropna()
    assert abs(jump.median()) < 0.2, "raw volume would jump by the split, 1.2 to 2 times"


def test_volatility_clusters_and_volume_goes_with_it(bars: dict[str, pd.DataFrame]) -> None:
    size = bars["change"].abs().where(traded(bars)).drop(columns=BENCHMARK)
    persistence = [size[name].corr(size[name].shift(5)) for name in size]
    assert np.mean(persistence) > 0.05
    assert np.mean([size[name].corr(np.log(bars["volume"][name].where(size[name].notna()))) for name in size]) > 0.2
    kurtosis = bars["change"].drop(columns=BENCHMARK).stack().kurt()
    assert kurtosis > 1, "heavier tails than a normal distribution"


def test_benchmark_is_the_mean_return_of_the_members(store: Path, bars: dict[str, pd.DataFrame]) -> None:
    members = read_members(store)
    returns = bars["close"][members.columns].pct_change(fill_method=None)
    expected = returns.where(members).mean(axis=1)
    assert np.allclose(bars["change"][BENCHMARK].iloc[1:], expected.iloc[1:], atol=1e-6)


def test_same_arguments_same_bytes_and_another_seed_other_prices(tmp_path: Path) -> None:
    first, again, other = (
        write_demo_market(tmp_path / name, instruments=8, days=80, seed=seed)
        for name, seed in [("first", 1), ("again", 1), ("other", 2)]
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files)
    close = Path("features/demo0000/close.day.bin")
    assert (first / close).read_bytes() != (other / close).read_bytes()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_signal_is_there_in_the_strength_asked_for(tmp_path: Path, seed: int) -> None:
    ic = daily_rank_ic(write_demo_market(tmp_path / "market", signal=0.05, seed=seed))
    assert t_statistic(ic) > 6
    assert ic.mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.slow
def test_no_signal_is_none(tmp_path: Path) -> None:
    t = [
        t_statistic(daily_rank_ic(write_demo_market(tmp_path / "market", signal=0, seed=seed), bars))
        for seed in range(4)
        for bars in (1, 10, 60)
    ]
    assert max(map(abs, t)) < 3.5
    assert abs(np.mean(t)) < 1


def test_closes_up_to_a_day_know_nothing_of_later_suspensions() -> None:
    start, first_bar, suspended = np.full(6, 20.0), np.zeros(6, dtype=np.int64), np.zeros((60, 6), dtype=bool)
    later = suspended.copy()
    later[40:45, 2] = True
    plain, _ = _closes(start, first_bar, suspended, 0.3, np.random.default_rng(0), DAYS_OF_STOCKS)
    changed, _ = _closes(start, first_bar, later, 0.3, np.random.default_rng(0), DAYS_OF_STOCKS)
    assert np.array_equal(plain[:41], changed[:41])
    assert not np.array_equal(plain[41:], changed[41:])


def test_mark_tells_the_settings_and_that_the_data_are_synthetic(store: Path, tmp_path: Path) -> None:
    mark = (store / "SYNTHETIC.txt").read_text()
    assert "SYNTHETIC" in mark
    assert '"seed": 0' in mark
    assert '"signal": 0.05' in mark
    assert is_synthetic(store)
    assert is_synthetic(str(store))
    assert is_synthetic({"day": str(store)})
    assert not is_synthetic(tmp_path)


def test_former_demo_market_is_replaced_whole(tmp_path: Path) -> None:
    market = write_demo_market(tmp_path / "market", instruments=9, days=60)
    write_demo_market(market, instruments=5, days=60)
    assert len(list((market / "features").iterdir())) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["market"], "no draft is left beside it"


def test_empty_folder_is_used_and_any_other_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert is_synthetic(write_demo_market(tmp_path / "empty", instruments=4, days=60))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a demo market"):
        write_demo_market(tmp_path / "mine", instruments=4, days=60)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="is a file"):
        write_demo_market(tmp_path / "mine" / "thesis.txt", instruments=4, days=60)


@pytest.mark.parametrize("what", ["a new file", "a changed file", "a link", "no list", "a forged mark"])
def test_a_demo_market_with_anything_of_the_user_s_is_left_alone(tmp_path: Path, what: str) -> None:
    """Whatever lies there: nothing is removed that was not written, byte for byte, with the market."""
    market = write_demo_market(tmp_path / "market", instruments=4, days=60)
    if what == "a new file":
        (market / "features" / "thesis.txt").write_text("years of work")
    elif what == "a changed file":
        (market / "instruments" / "demo.txt").write_text("DEMO0000\t2018-01-02\t2018-02-02\n")
    elif what == "a link":
        (market / "data").symlink_to(tmp_path)
    elif what == "no list":
        (market / "files.json").unlink()
    else:
        shutil.rmtree(market)
        market.mkdir()
        (market / "SYNTHETIC.txt").write_text("notes on synthetic data")
    before = {path: path.read_bytes() for path in market.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="left alone"):
        write_demo_market(market, instruments=4, days=60)
    assert before == {path: path.read_bytes() for path in market.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["market"]


@pytest.mark.parametrize("folder", ["", "  ", "a\0b"])
def test_no_folder_is_no_folder(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder"):
        write_demo_market(folder, instruments=4, days=60)
    assert not list(tmp_path.iterdir())


def test_failure_on_the_way_leaves_the_former_market_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    market = write_demo_market(tmp_path / "market", instruments=4, days=60)
    mark = (market / "SYNTHETIC.txt").read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("kronos_qlib.data.demo_market._write_mark", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo_market(market, instruments=4, days=61)
    assert (market / "SYNTHETIC.txt").read_text() == mark
    assert [path.name for path in tmp_path.iterdir()] == ["market"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("instruments", 3),
        ("instruments", 10.0),
        ("days", 59),
        ("days", True),
        ("signal", -0.01),
        ("signal", 0.6),
        ("signal", float("nan")),
        ("signal", "strong"),
        ("seed", -1),
    ],
)
def test_impossible_argument_is_named_before_anything_is_written(tmp_path: Path, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        write_demo_market(tmp_path / "market", **{argument: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("freq", "market", "stored", "first"),
    [
        ("5min", "stocks", "5min", ["09:30:00", "09:35:00"]),
        ("60min", "crypto", "60min", ["00:00:00", "01:00:00"]),
        ("15min", "futures", "15min", ["09:00:00", "09:15:00"]),
        ("week", "stocks", "1week", []),
    ],
)
def test_other_frequencies_have_the_planted_signal_and_days_that_are_their_bars_joined(
    tmp_path: Path, freq: str, market: str, stored: str, first: list[str]
) -> None:
    days = 1500 if freq == "week" else 40
    store = write_demo_market(tmp_path / "market", freq=freq, market=market, days=days, instruments=30, signal=0.3)
    times = pd.DatetimeIndex(pd.to_datetime((store / "calendars" / f"{stored}.txt").read_text().splitlines()))
    assert times.is_monotonic_increasing and times.is_unique
    assert times[:2].strftime("%H:%M:%S").to_list() == first or (times.dayofweek == 4).all()
    assert ((times.dayofweek >= 5).mean() > 0.2) == (market == "crypto")
    use_store({stored: str(store), "day": str(store)})
    fields = [PLANTED_PREDICTOR, "Ref($close, -2)/Ref($close, -1) - 1"]
    seen = D.features(D.instruments(UNIVERSE), fields, freq=stored).dropna()
    daily = seen.groupby(level="datetime").apply(lambda day: day.corr("spearman").iloc[0, 1])
    assert daily.mean() == pytest.approx(0.26, abs=0.06)
    bars = D.features(["DEMO0003"], ["$open", "$high", "$low", "$close", "$volume"], freq=stored).loc["DEMO0003"]
    whole = D.features(["DEMO0003"], ["$open", "$high", "$low", "$close", "$volume"], freq="day").loc["DEMO0003"]
    by_day = bars.groupby(bars.index.normalize())
    joined = [by_day["$open"].first(), by_day["$high"].max(), by_day["$low"].min(), by_day["$close"].last()]
    joined.append(by_day["$volume"].apply(lambda day: day.sum(skipna=False)))
    pd.testing.assert_frame_equal(pd.concat(joined, axis=1), whole, check_freq=False, rtol=1e-5)


def test_a_frequency_or_market_that_is_none_is_an_error_that_lists_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freq must be one of day, week, 60min.*'2h'"):
        write_demo_market(tmp_path, freq="2h")
    with pytest.raises(ValueError, match="market must be one of stocks, crypto, futures; it is 'bonds'"):
        write_demo_market(tmp_path, market="bonds")

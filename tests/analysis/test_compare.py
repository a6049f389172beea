import dataclasses
import gc
import pickle
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import qlib
from exchange_calendars import get_calendar
from ledgers import signal_set
from matplotlib.image import imread
from mlflow.tracking import MlflowClient
from qlib.contrib.evaluate import risk_analysis
from qlib.data import D
from qlib.workflow import R
from qlib.workflow.record_temp import PortAnaRecord, SigAnaRecord
from scipy.stats import norm, spearmanr

from kronos_qlib.analysis import significance
from kronos_qlib.analysis.comparison import PAIR_COLUMNS, TABLE_COLUMNS, Comparison, compare_runs
from kronos_qlib.analysis.figures import plot_excess_return
from kronos_qlib.analysis.portfolio import annualise, cost_a_year, drawdowns, steps_a_year, sweep_costs
from kronos_qlib.analysis.results import ResultsError, RunResult, load_runs
from kronos_qlib.analysis.signals import daily_ic, daily_rank_ic, wide
from kronos_qlib.analysis.significance import newey_west_t
from kronos_qlib.analysis.tables import WIDTH, terminal_text
from kronos_qlib.analysis.verdicts import pair_verdict, residual_verdict, run_verdict, trials_verdicts
from kronos_qlib.cli import main
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.live.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Mean of empty slice")]  # Qlib's, of an exchange


class _OnlyHere:
    """What the config of a run holds and nobody else can load, as the trained model in qrun's: its module is gone."""

    def __init__(self) -> None:
        self.weights = [1.0, 2.0]


def _record(market: Path, uri: str) -> dict[str, str]:
    """Runs by Qlib's own recorders on a small demo market; the ids of two of them."""
    kwargs = {"uri": uri, "default_exp_name": "Experiment"}
    manager = {"class": "MLflowExpManager", "module_path": "qlib.workflow.expm", "kwargs": kwargs}
    init = {"provider_uri": "market", "region": "cn", "exp_manager": manager}
    qlib.init(**{**init, "provider_uri": str(market)}, kernels=1, logging_level=50)

    fields = ["Ref($close, 10)/$close", "Ref($close, -2)/Ref($close, -1) - 1"]
    data = D.features(D.instruments("demo"), fields, start_time="2018-03-01", end_time="2018-05-18")
    data = data.swaplevel().sort_index()
    label = data.iloc[:, [1]].set_axis(["LABEL0"], axis=1)
    strategy = {"class": "TopkDropoutStrategy", "module_path": "qlib.contrib.strategy"}
    exchange = {"freq": "day", "limit_threshold": 0.095, "deal_price": "open"}
    exchange |= {"open_cost": 0.001, "close_cost": 0.0015, "min_cost": 5}
    span = {"start_time": "2018-03-02", "end_time": "2018-05-18"}
    backtest = {
        "strategy": strategy | {"kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1}},
        "backtest": span | {"account": 1e8, "benchmark": "DEMOINDEX", "exchange_kwargs": exchange},
    }

    def run(name: str, sign: int, records: Sequence[str] = ("signal", "backtest"), benchmark: str = "DEMOINDEX") -> str:
        with R.start(experiment_name=name):
            recorder = R.get_recorder()
            pred = sign * data.iloc[:, [0]].set_axis(["score"], axis=1)
            recorder.save_objects(**{"pred.pkl": pred, "label.pkl": label})
            if "signal" in records:
                SigAnaRecord(recorder).generate()
            if "backtest" in records:
                PortAnaRecord(recorder, backtest).generate()
            if "fail" in records:
                raise RuntimeError("as a workflow may")
        recorder.save_objects(config={"qlib_init": init, "task": {"model": _OnlyHere(), "benchmark": benchmark}})
        return recorder.id

    run("reversal", -1, ["signal"])
    ids = {"newest": run("reversal", 1, ["signal", "backtest"])}
    for name in ("reversal", "failed"):
        with pytest.raises(RuntimeError):
            run(name, 1, ["fail"])
    ids["momentum"] = run("momentum", -1, benchmark="unnamed")
    run("constant", 0)
    run("no_backtest", 1, ["signal"])
    run("no_signal", 1, [])
    return ids


@pytest.fixture(autouse=True, scope="module")
def fewer_draws() -> Iterator[None]:
    """Intervals of a tenth of the resamples, whose number test_significance.py leaves as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(significance, "_DRAWS", 200)
        yield


@dataclass(frozen=True)
class Recorded:
    """A folder as `qrun` leaves it: market/ and mlflow.db; experiments reversal (twice), momentum and unusable ones."""

    folder: Path
    ids: dict[str, str]

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    shutil.copy(database, folder)
    market = write_demo_market(folder / "market", instruments=12, days=110, signal=0.2)
    gone = types.ModuleType("gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "gone", gone)
        patch.setattr(gone, "_OnlyHere", _OnlyHere, raising=False)
        patch.setattr(_OnlyHere, "__module__", "gone")
        ids = _record(market, f"sqlite:///{folder}/mlflow.db")
    gc.collect()
    gc.freeze()  # what is loaded by now is searched no more: statsmodels' multipletests collects garbage at each call
    return Recorded(folder, ids)


def test_newest_finished_run_of_an_experiment_counts(recorded: Recorded) -> None:
    (run,) = load_runs(["reversal"], recorded.uri)
    assert run.run_id == recorded.ids["newest"]
    assert run.name == "reversal"
    assert run.metrics["rank_ic"] > 0, "the older run scores the other way round"


def test_recorder_id_names_a_run(recorded: Recorded) -> None:
    (run,) = load_runs([recorded.ids["momentum"]], recorded.uri)
    assert run.name == f"momentum {recorded.ids['momentum'][:8]}"
    assert run.metrics["rank_ic"] < 0


@pytest.fixture(scope="module")
def compared(recorded: Recorded) -> Comparison:
    return compare_runs(load_runs(["reversal", "momentum", "reversal", "constant"], recorded.uri))


def _without_store(runs: list[RunResult]) -> list[RunResult]:
    """For tests that need no factors: a store is read in another process, which takes seconds."""
    return [dataclasses.replace(run, store=None) for run in runs]


def test_ic_of_all_rows_of_a_run_is_what_qlib_recorded(recorded: Recorded) -> None:
    for run in load_runs(["reversal", "momentum"], recorded.uri):
        scores, labels = wide(run.scores), wide(run.labels)
        ic, rank_ic = daily_ic(scores, labels), daily_rank_ic(scores, labels)
        measured = [ic.mean(), ic.mean() / ic.std(), rank_ic.mean(), rank_ic.mean() / rank_ic.std()]
        stored = [run.metrics[name] for name in ("ic", "icir", "rank_ic", "rank_icir")]
        np.testing.assert_allclose(measured, stored, rtol=0, atol=1e-9)


def test_table_agrees_with_what_qlib_recorded(compared: Comparison) -> None:
    table, runs = compared.table, compared.runs
    assert list(table.index) == ["reversal", "momentum", "constant"], "a name given twice is one row"
    assert list(table.columns) == TABLE_COLUMNS
    excess = (runs[0].report["return"] - runs[0].report["bench"] - runs[0].report["cost"]).cumsum()
    assert table.loc["reversal", "max_drawdown"] == pytest.approx((excess - excess.cummax()).min())
    assert table.loc["reversal", "ic"] == pytest.approx(-table.loc["momentum", "ic"])
    np.testing.assert_allclose(table["cost"], table["excess_return"] - table["excess_return_with_cost"], atol=1e-12)


def test_hit_rate_decile_spread_and_turnover_are_those_of_the_rows(compared: Comparison) -> None:
    row, run = compared.table.loc["reversal"], compared.runs[0]
    rows = pd.DataFrame({"score": run.scores, "label": run.labels}).dropna()
    days = [day for _, day in rows.groupby(level="datetime")]
    rank_ic = np.array([spearmanr(day["score"], day["label"]).statistic for day in days])
    assert row["hit_rate"] == pytest.approx((rank_ic > 0).mean())
    assert 0.5 < row["hit_rate"] < 1, "of a signal that does not hit every day"
    ranks = [np.floor((day["score"].rank() - 0.5) / len(day) * 10) for day in days]  # tenths, 0 … 9
    spread = [day["label"][tenth == 9].mean() - day["label"][tenth == 0].mean() for day, tenth in zip(days, ranks)]
    assert row["decile_spread"] == pytest.approx(np.mean(spread))
    assert row["turnover"] == pytest.approx(run.report["turnover"].mean())
    assert 0.1 < row["turnover"] < 0.8, "one of three is exchanged a day, bought and sold, or its exchange is held back"


def test_exposures_are_to_the_factors_that_a_score_is_made_of(compared: Comparison) -> None:
    reversal, momentum = (compared.exposures.loc[name] for name in ("reversal", "momentum"))
    np.testing.assert_allclose(reversal, -momentum)
    assert reversal["reversal"] > 0.4 > 0 > -0.4 > reversal["momentum"]  # ten days against five, and against twenty
    assert compared.exposures.loc["constant"].isna().all()


def test_scores_turned_round_turn_every_figure_of_the_signal(compared: Comparison) -> None:
    reversal, momentum = compared.table.loc["reversal"], compared.table.loc["momentum"]
    for column in ("rank_ic", "rank_ic_t", "monotonicity", "residual_rank_ic"):
        assert reversal[column] == pytest.approx(-momentum[column]), column
    assert reversal["signal_half_life"] == momentum["signal_half_life"]
    assert 1 < reversal["signal_half_life"] < 20, "the reversal of ten days fades in days"
    assert reversal["rank_ic_low"] < reversal["rank_ic"] < reversal["rank_ic_high"]
    pair = compared.pairs.loc[("reversal", "momentum")]
    assert pair["rank_ic_difference"] == pytest.approx(2 * reversal["rank_ic"])
    assert pair["score_correlation"] == pytest.approx(-1)


def test_scores_that_do_not_vary_have_no_ic_and_the_table_says_so(compared: Comparison) -> None:
    constant = compared.table.loc["constant"]
    assert (
        constant[["ic", "rank_ic", "rank_ic_t", "decile_spread", "signal_half_life", "residual_rank_ic"]].isna().all()
    )
    assert "rank IC: n/a" in run_verdict(compared, "constant")
    (row,) = [line for line in terminal_text(compared).splitlines() if line.startswith("constant") and "…" not in line][
        :1
    ]
    assert "n/a" in row


def test_holm_raises_p_and_counts_no_run_without_one(compared: Comparison) -> None:
    p, corrected = compared.table["rank_ic_p"], compared.table["rank_ic_p_holm"]
    assert corrected["reversal"] == pytest.approx(min(1, 2 * p["reversal"])), "two runs, not three"
    assert np.isnan(corrected["constant"])


def test_only_rows_that_all_runs_score_and_label_count(recorded: Recorded) -> None:
    one, other = _without_store(load_runs(["reversal", "momentum"], recorded.uri))
    before = compare_runs([one, other]).dropped
    usable = one.scores[np.isfinite(one.scores) & np.isfinite(one.labels.reindex(one.scores.index))].index
    days = usable.unique("datetime")
    first_day = usable[usable.get_level_values("datetime") == days[0]]
    scores = other.scores.copy()
    scores[first_day] = np.nan
    scores[usable[len(first_day)]] = np.inf
    unlabelled = one.labels.drop(usable[-1])
    compared = compare_runs([dataclasses.replace(one, labels=unlabelled), dataclasses.replace(other, scores=scores)])
    more = compared.dropped - before
    assert more.loc["reversal", "dropped_rows"] == len(first_day) + 2
    assert more.loc["reversal", "unlabelled_rows"] == 1
    assert more.loc["reversal", "dropped_days"] == 1
    assert more.loc["momentum", "dropped_rows"] == 1, "a row it does not score, it does not lose"
    assert days[0] not in compared.rank_ic.index
    assert compared.table.loc["reversal", "rank_ic"] == pytest.approx(-compared.table.loc["momentum", "rank_ic"])


def test_runs_without_a_common_row_are_an_error(recorded: Recorded) -> None:
    one, other = load_runs(["reversal", "momentum"], recorded.uri)
    later = other.scores.rename(lambda day: day + pd.Timedelta("3650D"), level="datetime")
    with pytest.raises(ResultsError, match=r"no date and instrument .*reversal: \d+ scores, 2018-03-01"):
        compare_runs([one, dataclasses.replace(other, scores=later)])


def test_capacity_is_where_the_twentieth_trade_is_a_hundredth_of_its_market(compared: Comparison) -> None:
    capacity = compared.table.loc["reversal", "capacity"]
    run = compared.runs[0]
    bars = {}
    for instrument in run.trades.index.unique("instrument"):
        folder = run.store / "features" / instrument.lower()
        close, volume = (np.fromfile(folder / f"{name}.day.bin", dtype="<f4") for name in ("close", "volume"))
        days = pd.DatetimeIndex((run.store / "calendars" / "day.txt").read_text().split())
        bars[instrument] = pd.Series(close[1:] * volume[1:], days[int(close[0]) : int(close[0]) + len(close) - 1])
    shares = [
        value / bars[instrument][day] * capacity / run.report.loc[day, "account"]
        for (day, instrument), value in run.trades.items()
        if bars[instrument][day] > 0
    ]
    assert np.mean(np.array(shares) <= 0.01 + 1e-6) == pytest.approx(0.95, abs=0.02)


def test_without_the_store_factors_and_capacity_are_not_known_and_that_is_said(recorded: Recorded) -> None:
    (run,) = load_runs(["reversal"], recorded.uri)
    compared = compare_runs([dataclasses.replace(run, store=None)])
    assert np.isnan(compared.table.loc["reversal", "capacity"])
    assert np.isnan(compared.table.loc["reversal", "residual_rank_ic"])
    assert "its Qlib store (market) is not at hand" in terminal_text(compared)


def test_lag_is_the_longest_recorded_horizon_or_said_to_be_assumed(recorded: Recorded) -> None:
    one, other = _without_store(load_runs(["reversal", "momentum"], recorded.uri))
    compared = compare_runs([dataclasses.replace(one, horizon=4), other])
    assert compared.lag == 4
    assert "lag of all rows: 4 days, the longest horizon recorded (reversal)" in " ".join(compared.notes)
    assert compared.table.loc["momentum", "rank_ic_t"] == newey_west_t(compared.rank_ic["momentum"], 4)
    alone = compare_runs([other])
    assert alone.lag == 10 and "assumed, no run records a horizon" in " ".join(alone.notes)


def test_segments_that_reach_the_days_compared_are_told(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    first = run.scores.index[0][0]
    spans = {"train": ["2018-01-02", str(first.date())], "valid": ["2017-01-02", "2017-12-29"]}
    config = run.config | {"task": {"dataset": {"kwargs": {"segments": spans}}}}
    notes = " ".join(compare_runs([dataclasses.replace(run, config=config)]).notes)
    assert f"CAUTION: reversal: its train segment ends on {first:%Y-%m-%d}" in notes
    assert "its valid segment" not in notes and "segment ends" not in " ".join(compare_runs([run]).notes)


def test_backtests_with_other_rules_are_told(recorded: Recorded) -> None:
    def with_rules(run: RunResult, topk: int, open_cost: float) -> RunResult:
        strategy = {"class": "TopkDropoutStrategy", "kwargs": {"signal": run.name, "topk": topk}}
        backtest = {"start_time": run.name, "account": 1e8, "exchange_kwargs": {"open_cost": open_cost}}
        record = {"class": "PortAnaRecord", "kwargs": {"config": {"strategy": strategy, "backtest": backtest}}}
        return dataclasses.replace(run, config={"task": {"record": [{"class": "SigAnaRecord"}, record]}})

    one, other = _without_store(load_runs(["reversal", "momentum"], recorded.uri))
    alike = [with_rules(run, 50, 0.001) for run in (one, other)]
    assert "the backtests differ" not in " ".join(compare_runs(alike).notes)
    notes = " ".join(compare_runs([alike[0], with_rules(other, 30, 0.0)]).notes)
    assert "CAUTION: the backtests differ in open_cost, topk: their rows do not compare." in notes


def test_scores_with_ties_are_told(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    signs = compare_runs([dataclasses.replace(run, scores=np.sign(run.scores - 1))])
    assert "reversal: 2 distinct scores a day for" in " ".join(signs.notes)
    constant = compare_runs([dataclasses.replace(run, scores=run.scores * 0)])
    assert "CAUTION: reversal: all scores of a day are equal" in " ".join(constant.notes)
    assert "distinct" not in " ".join(compare_runs([run]).notes)


def test_one_run_by_two_names_is_one_row_and_a_copy_is_said_to_be_the_same(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    assert [each.run_id for each in load_runs(["reversal", run.run_id], recorded.uri)] == [run.run_id]
    compared = compare_runs([run, dataclasses.replace(run, name="copy")])
    assert pair_verdict(compared, "reversal", "copy").endswith("0 on every date: the two order the instruments alike")


def test_overlap_with_pretraining_is_told(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    compared = compare_runs([dataclasses.replace(run, overlap="the scores start before the cut-off")])
    assert "CAUTION: reversal: the scores start before the cut-off" in terminal_text(compared)


def test_verdict_gives_the_interval_before_the_word(compared: Comparison) -> None:
    certain = compared.pairs.assign(rank_ic_difference=0.02, low=0.01, high=0.03, p_holm=0.001)
    chance = certain.assign(low=-0.006)
    many = certain.assign(p_holm=0.2)
    said = [
        pair_verdict(dataclasses.replace(compared, pairs=pairs), "reversal", "momentum")
        for pairs in (certain, chance, many)
    ]
    assert said[0] == "reversal − momentum rank IC: +0.020, 95 % +0.010…+0.030: reversal is better than momentum"
    assert said[1] == "reversal − momentum rank IC: +0.020, 95 % −0.006…+0.030: no evidence of a difference"
    assert "no evidence of a difference that stands after correction for 3 pairs (Holm p 0.20)" in said[2]
    assert "rank IC after simple factors: " in residual_verdict(compared, "reversal")


def test_table_fits_a_terminal_whatever_the_names(recorded: Recorded) -> None:
    runs = load_runs(["reversal", "momentum"], recorded.uri)
    runs[1] = dataclasses.replace(runs[1], scores=np.sign(runs[1].scores + 1))
    long = [dataclasses.replace(run, name=f"{run.name}_of_an_experiment_with_a_name {number:08}") for number, run in
            enumerate(runs)]  # fmt: skip
    assert max(map(len, terminal_text(compare_runs(long)).splitlines())) <= WIDTH


def test_demo_market_is_recognised_by_benchmark_or_mark(recorded: Recorded, tmp_path: Path) -> None:
    reversal, momentum = load_runs(["reversal", "momentum"], recorded.uri)
    assert reversal.provider_uri == momentum.provider_uri == "market"
    assert reversal.synthetic
    assert momentum.synthetic, "its config names another benchmark, but the store lies beside the database"
    shutil.copy(recorded.folder / "mlflow.db", tmp_path / "mlflow.db")  # artifacts stay where they are; no store here
    reversal, momentum = load_runs(["reversal", "momentum"], f"sqlite:///{tmp_path}/mlflow.db")
    assert reversal.synthetic
    assert not momentum.synthetic


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody", "no experiment or recorder 'nobody'"),
        ("failed", "experiment 'failed' .* has no finished run"),
        ("no_signal", r"no_signal: run \w+ has no 'IC'.*SigAnaRecord"),
    ],
)
def test_run_that_cannot_be_shown_is_an_error(recorded: Recorded, name: str, reason: str) -> None:
    with pytest.raises(ResultsError, match=reason):
        load_runs(["reversal", name], recorded.uri)


def test_unknown_name_is_told_what_there_is(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "nobody", "--uri", recorded.uri]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "experiments with a finished run: constant, momentum, no_backtest, no_signal, reversal" in told.err
    assert not told.out


def test_something_that_is_no_database_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.db").write_text("not a database, but a text of some length " * 20)
    assert main(["compare", "reversal", "--uri", f"sqlite:///{tmp_path}/notes.db"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_compare_prints_and_writes_table_and_picture(
    recorded: Recorded, compared: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "demo"
    assert main(["compare", *compared.table.index, "--uri", recorded.uri, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "SYNTHETIC demo market" in printed
    assert "Backtest 2018-03-02 … 2018-05-18" in printed
    assert "Rank IC" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        *("comparison.csv", "costs.csv", "deciles.png", "drawdowns.csv", "excess_return.png", "horizons.csv"),
        *("pairs.csv", "report.html", "rolling_ic.png"),
    ]
    table = pd.read_csv(out / "comparison.csv", index_col="run")
    pd.testing.assert_frame_equal(table[TABLE_COLUMNS], compared.table, check_exact=False, rtol=1e-12)
    assert table["synthetic"].all()
    pairs = pd.read_csv(out / "pairs.csv", index_col=["run", "other"])
    pd.testing.assert_frame_equal(pairs[PAIR_COLUMNS], compared.pairs, check_exact=False, rtol=1e-12)
    picture = imread(out / "excess_return.png")
    assert picture.shape[0] > 800
    assert picture[..., :3].std() > 0.02, "something is drawn"


def test_a_ledger_adds_the_live_record_to_the_text_and_to_the_page(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    command = ["compare", "reversal", "--uri", recorded.uri, "--ledger", url]
    assert main(command) == 2
    assert "there is no ledger" in capsys.readouterr().err
    Ledger(url).record(signal_set(experiment="reversal"), made_at=datetime(2024, 6, 3, 9), region="cn")
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "reversal live: no rank IC yet" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert '<section id="ledger">' in page and "reversal live: no rank IC yet" in page


def test_picture_of_a_demo_market_differs_from_one_of_real_bars(recorded: Recorded, tmp_path: Path) -> None:
    runs = load_runs(["reversal"], recorded.uri)
    plot_excess_return(runs, tmp_path / "demo.png")
    plot_excess_return([dataclasses.replace(run, synthetic=False) for run in runs], tmp_path / "real.png")
    demo, real = imread(tmp_path / "demo.png"), imread(tmp_path / "real.png")
    differs = np.argwhere((demo != real).any(axis=-1))
    assert len(differs) > 5000, "the note is prominent"
    assert differs[:, 0].max() < demo.shape[0] * 0.15, "and in the head of the figure"


def test_runs_of_different_dates_and_partly_synthetic_are_called_out(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    other = dataclasses.replace(run, name="other", report=run.report.iloc[5:], synthetic=False)
    told = terminal_text(compare_runs([run, other]))
    assert "CAUTION: the backtests cover different dates" in told
    assert "SYNTHETIC demo market (reversal)" in told
    assert "SYNTHETIC" not in terminal_text(compare_runs([other]))


def test_metric_that_is_no_number_is_shown_as_such(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    compared = compare_runs([dataclasses.replace(run, metrics=run.metrics | {"information_ratio": float("nan")})])
    (block,) = [block for block in terminal_text(compared).split("\n\n") if block.startswith("Backtest\n")]
    (row,) = [line for line in block.splitlines() if line.startswith("reversal")]
    assert row.split().count("n/a") == 2, "and the capacity, without a store"


# Days to come, costs, trials, ties, seeds


def test_rank_ic_over_one_day_is_that_of_the_usual_label_and_longer_ones_are_of_longer_returns(
    recorded: Recorded, compared: Comparison
) -> None:
    horizons = compared.horizons.loc["reversal"]
    assert list(horizons.index) == [1, 5, 10, 20]
    assert horizons.loc[1, "rank_ic"] == pytest.approx(compared.table.loc["reversal", "rank_ic"])
    assert horizons.loc[1, "t"] == pytest.approx(compared.table.loc["reversal", "rank_ic_t"])
    scores = wide(compared.runs[0].scores)
    names, days = scores.columns, (recorded.folder / "market" / "calendars" / "day.txt").read_text().split()
    closes = {}
    for name in names:
        first, *values = np.fromfile(recorded.folder / "market" / "features" / name.lower() / "close.day.bin", "<f4")
        closes[name] = pd.Series(values, pd.DatetimeIndex(days[int(first) :]))
    close = pd.DataFrame(closes)
    later = (close.shift(-6) / close.shift(-1) - 1).reindex_like(scores)
    counted = compared.rank_ic.index
    rows = compared.runs[0].scores.reindex(compared.runs[0].labels.dropna().index).dropna()
    daily = daily_rank_ic(wide(rows).loc[counted], later.loc[counted])
    assert horizons.loc[5, "rank_ic"] == pytest.approx(daily.mean(), abs=1e-6)
    assert (horizons["low"] < horizons["rank_ic"]).all() and (horizons["rank_ic"] < horizons["high"]).all()


def test_costs_once_are_those_recorded_and_the_deepest_drawdown_is_qlibs(compared: Comparison) -> None:
    row, costs = compared.table.loc["reversal"], compared.costs.loc["reversal"]
    assert costs["excess_return_1x"] == pytest.approx(row["excess_return_with_cost"])
    assert costs["information_ratio_1x"] == pytest.approx(row["information_ratio"])
    assert costs["excess_return_0x"] == pytest.approx(row["excess_return"])
    assert costs["excess_return_3x"] == pytest.approx(row["excess_return"] - 3 * row["cost"])
    assert costs["excess_return_0x"] - costs["break_even"] * row["cost"] == pytest.approx(0, abs=1e-9)
    deepest = compared.drawdowns.loc["reversal"].iloc[0]
    report = compared.runs[0].report
    total = (report["return"] - report["bench"] - report["cost"]).cumsum()
    under = total - total.cummax()
    assert deepest["depth"] == pytest.approx(row["max_drawdown"]) and deepest["trough"] == under.idxmin()
    assert deepest["start"] < deepest["trough"]
    back = under[deepest["trough"] :]
    assert pd.isna(deepest["end"]) == (back < 0).all()


def test_trials_are_the_finished_runs_of_the_experiment_and_of_its_trials(recorded: Recorded, clone) -> None:
    uri = clone("reversal_trials", {})
    runs = _without_store(load_runs(["reversal", "momentum"], uri))
    assert [run.trials for run in runs] == [3, 1], "two of its own, one trial; the failed run is none"
    compared = compare_runs(runs)
    table = compared.table
    assert list(table["trials"]) == [3, 1]
    more = compare_runs(runs, trials=50).table
    for column in ("deflated_rank_ic", "deflated_sharpe"):
        assert more.loc["reversal", column] < table.loc["reversal", column] < 1
    assert table.loc["reversal", "deflated_sharpe"] < table.loc["reversal", "probabilistic_sharpe"] < 1
    assert table.loc["momentum", "deflated_sharpe"] == table.loc["momentum", "probabilistic_sharpe"]
    assert table["trials_rank_ic_sd"].isna().all(), "this trial recorded no rank_ic, so chance's deviation counts"
    every = load_runs(["reversal:all"], recorded.uri)
    assert [run.run_id for run in every][-1] == recorded.ids["newest"] and len(every) == 2
    assert every[0].name == f"reversal {every[0].run_id[:8]}"


def _told(comparison: Comparison) -> str:
    return " ".join(terminal_text(comparison).split())


def test_rank_ics_that_trials_recorded_say_how_far_the_best_of_them_lies_by_chance(recorded: Recorded, clone) -> None:
    uri, rank_ics = clone("reversal_trials", {}), [0.01, 0.05, -0.03, 0.02]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("reversal_trials").experiment_id
    for number, rank_ic in enumerate([*rank_ics, None]):  # the last could not be used, and was looked at
        trial = client.create_run(experiment, tags={"kronos_qlib.trial": str(number)}).info.run_id
        if rank_ic is not None:
            client.log_metric(trial, "rank_ic", rank_ic)
        client.set_terminated(trial)
    unfinished = client.create_run(experiment).info.run_id
    client.log_metric(unfinished, "rank_ic", 9.0)
    (run,) = _without_store(load_runs(["reversal"], uri))
    assert run.trials == 2 + 1 + 5 and sorted(run.trial_rank_ics) == sorted(rank_ics)
    compared = compare_runs([run])
    row, daily = compared.table.loc["reversal"], compared.rank_ic["reversal"]
    assert row["trials_rank_ic_sd"] == pytest.approx(np.std(rank_ics, ddof=1))
    error = daily.mean() / newey_west_t(daily, compared.lag)
    gamma, n = np.euler_gamma, 8
    best = (1 - gamma) * norm.ppf(1 - 1 / n) + gamma * norm.ppf(1 - 1 / (n * np.e))
    expected = norm.cdf((daily.mean() - np.std(rank_ics, ddof=1) * best) / error)
    assert row["deflated_rank_ic"] == pytest.approx(expected)
    assert "± 0.0330" in terminal_text(compared)


def test_trials_have_a_verdict_where_there_was_evidence_before_they_were_counted(compared: Comparison) -> None:
    evidence = {"rank_ic_low": 0.01, "rank_ic_p_holm": 0.01, "probabilistic_sharpe": 0.97, "trials": 9}
    table = compared.table.assign(deflated_rank_ic=0.99, deflated_sharpe=0.9499, **evidence)
    table.loc["momentum", ["rank_ic_low", "probabilistic_sharpe"]] = -0.01, 0.5
    table.loc["constant", "trials"] = 1
    assert trials_verdicts(dataclasses.replace(compared, table=table)) == [
        "reversal rank IC after counting 9 trials: deflated 0.990: it stands",
        "reversal Sharpe ratio after counting 9 trials: deflated 0.949: no evidence that stands, which needs 0.95",
    ]


def test_a_year_outside_china_is_the_market_s_own_and_bars_of_a_day_are_taken_together(compared: Comparison) -> None:
    hours, sessions = pd.date_range("2020-01-01", "2020-03-31", freq="h"), get_calendar("XNYS").sessions_in_range
    assert steps_a_year("60minute", hours) == pytest.approx(365.25)
    assert steps_a_year("1day", sessions("2020-01-01", "2023-12-31")) == pytest.approx(1006 / 4, rel=0.005)
    assert steps_a_year("1week", hours[::168]) == pytest.approx(52.18, abs=0.01)
    daily = compared.runs[0].report
    halves = pd.concat([daily / 2, (daily / 2).set_axis(daily.index + pd.Timedelta(hours=6))]).sort_index()
    expected = risk_analysis(daily["return"] - daily["bench"] - daily["cost"], N=365)["risk"]
    for report in (daily, halves):
        found = annualise(report, 365)
        assert found["excess_return_with_cost"] == pytest.approx(expected["annualized_return"])
        assert found["information_ratio"] == pytest.approx(expected["information_ratio"])
        assert found["max_drawdown"] == pytest.approx(expected["max_drawdown"])
        assert found["excess_return"] - found["excess_return_with_cost"] == pytest.approx(cost_a_year(report, 365))
    own = compare_runs([dataclasses.replace(compared.runs[0], name="coins", year=365.0)])
    assert own.table.loc["coins", "information_ratio"] == pytest.approx(expected["information_ratio"])
    assert any(note.startswith("Figures a year are of whole days") and "coins: 365" in note for note in own.notes)


def test_a_backtest_by_weeks_has_fifty_of_them_a_year_as_in_qlib(compared: Comparison) -> None:
    weekly = compared.runs[0].report.resample("W").sum()
    expected = risk_analysis(weekly["return"] - weekly["bench"] - weekly["cost"], freq="week")["risk"]
    costs = sweep_costs(weekly, steps_a_year("1week"))
    assert costs["excess_return_1x"] == pytest.approx(expected["annualized_return"])
    assert costs["information_ratio_1x"] == pytest.approx(expected["information_ratio"])
    assert costs["excess_return_0x"] - costs["excess_return_1x"] == pytest.approx(
        cost_a_year(weekly, steps_a_year("1week"))
    )
    assert drawdowns(weekly)["depth"].iloc[0] == pytest.approx(expected["max_drawdown"])


def test_what_ties_leave_to_chance_is_measured(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    config = {"task": {"record": [{"kwargs": {"config": {"strategy": {"kwargs": {"topk": 3}}}}}]}}
    signs = dataclasses.replace(run, name="signs", scores=np.sign(run.scores - 1))
    table = compare_runs([dataclasses.replace(each, config=config) for each in (run, signs)]).table
    assert list(table["topk"]) == [3, 3]
    assert table.loc["reversal", "tied_share"] == 0 and table.loc["reversal", "topk_label_sd"] == pytest.approx(0)
    assert table.loc["signs", "tied_share"] > 0.9 and table.loc["signs", "topk_label_sd"] > 1e-4
    rows = pd.DataFrame({"score": run.scores, "label": run.labels}).dropna()
    best = rows.groupby(level="datetime").apply(lambda day: day.nlargest(3, "score")["label"].mean())
    assert table.loc["reversal", "topk_label"] == pytest.approx(best.mean())


def test_runs_that_differ_in_their_seed_alone_are_averaged(recorded: Recorded) -> None:
    one, other = _without_store(load_runs(["reversal", "momentum"], recorded.uri))

    def seeded(run: RunResult, name: str, seed: int, **kwargs) -> RunResult:
        model = {"class": "KronosRanker", "kwargs": {"seed": seed, "ranker": {"output_dir": name, **kwargs}}}
        return dataclasses.replace(
            run, name=name, config={"task": run.config["task"] | {"benchmark": "", "head": model}}
        )

    assert isinstance(one.config["task"]["model"], type(other.config["task"]["model"])), "what qrun filled in, not read"
    again = seeded(one, "again", 2)
    runs = [seeded(one, "a", 1), again, seeded(other, "b", 2), seeded(other, "c", 3, epochs=9)]
    compared = compare_runs(runs)
    assert list(compared.seeds.index) == ["a, b"], "the last of each seed"
    assert compared.seeds.loc["a, b", "seeds"] == 2
    figures = compared.table.loc[["a", "b"], "rank_ic"]
    assert compared.seeds.loc["a, b", "rank_ic_mean"] == pytest.approx(figures.mean())
    assert compared.seeds.loc["a, b", "rank_ic_sd"] == pytest.approx(figures.std())
    assert "Seeds: mean ± standard deviation" in terminal_text(compared)
    assert "Seeds" not in terminal_text(compare_runs(runs[1:3])), "two of one seed, in other folders, are no seeds"


def test_overfitting_is_a_figure_of_four_runs_and_more(recorded: Recorded) -> None:
    (run,) = _without_store(load_runs(["reversal"], recorded.uri))
    rng = np.random.default_rng(0)
    others = [
        dataclasses.replace(run, name=name, scores=pd.Series(rng.normal(size=len(run.scores)), run.scores.index))
        for name in "bcd"
    ]
    compared = compare_runs([run, *others])
    found = compared.overfitting["rank IC"]
    assert found.share < 0.2, "one of them has a signal"
    assert f"by rank IC (4 runs, {found.days} dates, {found.blocks} blocks); a half is" in _told(compared)
    alone = compare_runs([run])
    assert all(np.isnan(found.share) for found in alone.overfitting.values())
    told = "n/a for overfitting: it takes 4 runs that vary and 20 days in common; by excess return there are 1 and "
    assert told in _told(alone)


# Runs of other kinds, and damaged ones


@pytest.fixture
def clone(recorded: Recorded, tmp_path: Path):
    """A function that adds the newest run of `reversal` to a copy of the database, with other artifacts; its uri."""
    shutil.copy(recorded.folder / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def add(name: str, artifacts: dict[str, bytes | None], freq: str = "1day") -> str:
        client = MlflowClient(uri)
        source = client.get_run(recorded.ids["newest"])
        experiment = client.create_experiment(name, artifact_location=str(tmp_path / name))
        run = client.create_run(experiment)
        for key, value in source.data.metrics.items():
            client.log_metric(run.info.run_id, key.replace("1day", freq), value)
        files = tmp_path / "files"
        shutil.copytree(client.download_artifacts(source.info.run_id, ""), files, dirs_exist_ok=True)
        for path in files.glob("portfolio_analysis/*1day*"):
            path.rename(path.with_name(path.name.replace("1day", freq)))
        for artifact, content in artifacts.items():
            (files / artifact).unlink() if content is None else (files / artifact).write_bytes(content)
        client.log_artifacts(run.info.run_id, str(files))
        client.set_terminated(run.info.run_id)
        return uri

    return add


def test_a_run_without_a_backtest_is_compared_and_that_is_said_once(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "reversal", "no_backtest", "--uri", recorded.uri, "--out", str(tmp_path)]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("no backtest is recorded of no_backtest") == 1
    table = pd.read_csv(tmp_path / "comparison.csv", index_col="run")
    backtest = ["turnover", "cost", "excess_return", "excess_return_with_cost", "max_drawdown", "information_ratio"]
    assert table.loc["no_backtest", [*backtest, "capacity"]].isna().all()
    assert table.loc["reversal", backtest].notna().all()
    assert table.loc["no_backtest", "rank_ic"] == pytest.approx(table.loc["reversal", "rank_ic"])
    assert main(["compare", "no_backtest", "--uri", recorded.uri, "--out", str(tmp_path)]) == 0, "alone as well"


def test_a_backtest_of_another_frequency_is_compared_by_the_day(recorded: Recorded, clone) -> None:
    (run,) = load_runs(["reversal"], recorded.uri)
    half = run.report.assign(**{column: run.report[column] / 2 for column in ("return", "cost", "bench", "turnover")})
    bars = pd.concat([half.shift(freq="11h"), half.shift(freq="15h")]).sort_index()
    uri = clone("intraday", {"portfolio_analysis/report_normal_30minute.pkl": pickle.dumps(bars)}, "30minute")
    runs = load_runs(["reversal", "intraday"], uri)
    assert [run.freq for run in runs] == ["1day", "30minute"]
    compared = compare_runs(runs)
    for column in ("turnover", "cost", "excess_return", "max_drawdown"):
        assert compared.table.loc["intraday", column] == pytest.approx(compared.table.loc["reversal", column])
    told = terminal_text(compared)
    assert "different frequencies: reversal: 1day; intraday: 30minute" in " ".join(told.split())
    assert f"{len(bars)} steps of 30minute" in " ".join(told.split())


ARTIFACTS = ["pred.pkl", "label.pkl", "config"] + [
    f"portfolio_analysis/{name}" for name in ("report_normal_1day.pkl", "indicators_normal_1day_obj.pkl")
]
UNREADABLE = [b"", b"OK", b"\x80\x04\x95\xff"]
CRAFTED = b"cposix\nsystem\n(Vtouch gotcha\ntR."  # runs a command where pickles are loaded as they are


@pytest.mark.parametrize("artifact", ARTIFACTS)
@pytest.mark.parametrize(
    "content",
    [*UNREADABLE, pickle.dumps(5), pickle.dumps([1]), pickle.dumps(pd.DataFrame({"a": ["x"]})), CRAFTED],
    ids=["nothing", "text", "cut", "a number", "a list", "another table", "crafted"],
)  # fmt: skip
def test_a_damaged_artifact_is_one_line_that_names_it(
    clone, artifact: str, content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = clone("damaged", {artifact: content})
    status = main(["compare", "damaged", "--uri", uri])
    told = capsys.readouterr()
    if artifact != "config" or content in UNREADABLE:  # a config of no use is as none
        assert status == 2 and told.err.count("\n") == 1
        assert f"damaged: {artifact} of run" in told.err
    assert not Path("gotcha").exists()


@pytest.mark.parametrize("uri", ["", "mysql://u:p@127.0.0.1/x", "http://127.0.0.1:9", "http://[bad", "sqlite:///a\0b"])
def test_a_store_that_cannot_be_read_is_one_line(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "reversal", "--uri", uri]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ("uri" in told or "MLflow store" in told)


def test_names_are_harmless_in_a_terminal_and_a_spreadsheet(
    clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "=cmd|' /C calc'!A0 \x1b[31mred"
    assert main(["compare", name, "--uri", clone(name, {}), "--out", str(tmp_path / "out")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    for path in (tmp_path / "out").glob("*.csv"):
        assert "\x1b" not in path.read_text() and "\n=" not in path.read_text()


def test_an_unwritable_out_is_named(recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["compare", "reversal", "--uri", recorded.uri, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(tmp_path / "out") in told

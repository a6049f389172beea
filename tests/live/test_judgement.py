"""The live record is judged apart from the simulated one, and held against what the backtest promised."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import qlib
from ledgers import QUANTILES, signal_set
from qlib.data import D
from qlib.workflow.record_temp import PortAnaRecord
from scipy.stats import spearmanr

from kronos_qlib.analysis.tables import WIDTH
from kronos_qlib.data.demo_market import BENCHMARK, write_demo_market
from kronos_qlib.live.judgement import (
    LEVEL,
    POWER,
    PaperError,
    PromiseTest,
    compare_with_promise,
    counted_sets,
    judge,
    promise_sentence,
)
from kronos_qlib.live.ledger import Ledger
from kronos_qlib.live.ledger_page import record_json, record_text
from kronos_qlib.live.paper_portfolio import run_paper_portfolio

PROMISED = {"rank_ic": 0.03, "sd": 0.12, "days": 400}
DATES = pd.bdate_range("2024-03-04", periods=60)
QUANTILE_LEVELS = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])


def table_of(seed: int, instruments: int = 12) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"score": random.normal(size=instruments)}, [f"S{number:02d}" for number in range(instruments)]
    )
    table[QUANTILES] = np.sort(random.normal(0, 0.03, (instruments, 7)), axis=1)
    return table


def record(ledger: Ledger, date: pd.Timestamp, seed: int, hours: float = 9, **changes: Any) -> int:
    """Record a set, made so many hours after the date began in UTC; from 25.5 on it is simulated."""
    made = (date + timedelta(hours=hours)).to_pydatetime()
    return ledger.record(signal_set(date, table=table_of(seed), **changes), made_at=made, region="cn").id


def came(seed: int, instruments: int = 12) -> pd.DataFrame:
    random = np.random.default_rng(1000 + seed)
    values = {"label": random.normal(0, 0.02, instruments), "came": random.normal(0, 0.03, instruments)}
    return pd.DataFrame(values, [f"S{number:02d}" for number in range(instruments)])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def test_of_live_versions_the_last_before_the_opening_counts_and_later_ones_are_simulated(ledger: Ledger):
    day = DATES[0]
    early, late = record(ledger, day, 1, 9), record(ledger, day, 2, 20)
    after, again = record(ledger, day, 3, 30), record(ledger, day, 4, 300)
    other = record(ledger, DATES[1], 5, 9)
    sets, rows = ledger.read()
    live = sets["live"]
    assert list(counted_sets(sets[live]).index) == [late, other]
    assert list(counted_sets(sets[~live]).index) == [again]
    assert {early, after}.isdisjoint(counted_sets(sets[live]).index)
    found = judge(sets, rows)
    assert [(each.kind, each.figures["dates"]) for each in found] == [("live", 2), ("simulated", 1)]


def test_the_figures_are_those_of_the_forecasts_that_count(ledger: Ledger):
    scores, outcomes = [], []
    for number, day in enumerate(DATES[:24]):
        record(ledger, day, 500 + number, 8, experiment="ranker")  # an earlier version, which does not count
        ledger.fill(record(ledger, day, number, 9, experiment="ranker", horizon=2), came(number))
        scores.append(table_of(number))
        outcomes.append(came(number))
    (found,) = judge(*ledger.read())
    rank_ics = [spearmanr(score["score"], came_["label"])[0] for score, came_ in zip(scores, outcomes)]
    np.testing.assert_allclose(found.rank_ics, rank_ics)
    assert found.figures["rank_ic"] == pytest.approx(np.mean(rank_ics))
    assert found.figures["low"] < found.figures["rank_ic"] < found.figures["high"]
    values = np.concatenate([came_["came"] for came_ in outcomes])
    quantiles = np.concatenate([score[QUANTILES] for score in scores])
    inside = (values >= quantiles[:, 0]) & (values <= quantiles[:, 6])
    assert (found.figures["outcomes"], found.figures["coverage_90"]) == (len(values), inside.mean())
    assert found.figures["coverage_90_low"] < inside.mean() < found.figures["coverage_90_high"]
    error = values[:, None] - quantiles
    pinball = np.where(error > 0, QUANTILE_LEVELS * error, (QUANTILE_LEVELS - 1) * error)
    weights = np.diff([0, 0.075, 0.175, 0.375, 0.625, 0.825, 0.925, 1])
    assert found.figures["crps"] == pytest.approx((2 * pinball @ weights).mean())
    assert (found.experiment, found.kind, found.test.promised) == ("ranker", "live", 0.03)


def test_a_record_without_outcomes_says_so_and_can_be_shown(ledger: Ledger):
    record(ledger, DATES[0], 0)
    found = judge(*ledger.read())
    assert "no label has come" in found[0].sentences[0]
    assert "n/a" in record_text(found)
    (plain,) = record_json(found)
    assert (plain["rank_ic"], plain["crps"], plain["dates"]) == (None, None, 1)


def daily(mean: float, days: int, random: np.random.Generator) -> pd.Series:
    return pd.Series(random.normal(mean, PROMISED["sd"], days), pd.bdate_range("2024-01-01", periods=days))


def test_the_power_is_no_more_than_how_often_a_record_of_nothing_is_found_worse_and_little_less():
    random, days, runs = np.random.default_rng(0), 60, 250
    without = [compare_with_promise(daily(0.0, days, random), PROMISED, 2) for _ in range(runs)]
    found = np.mean([test.p < LEVEL for test in without])
    assert 0.4 < found < POWER  # some power, and not enough
    assert found - 0.1 < np.mean([test.power for test in without]) < found + 0.02
    kept = [compare_with_promise(daily(PROMISED["rank_ic"], days, random), PROMISED, 2) for _ in range(runs)]
    assert np.mean([test.p < LEVEL for test in kept]) < LEVEL + 0.03


def test_so_many_days_as_are_needed_have_the_power_wanted():
    random = np.random.default_rng(1)
    needed = compare_with_promise(daily(0.0, 60, random), PROMISED, 2).days_needed
    tests = [compare_with_promise(daily(0.0, int(needed), random), PROMISED, 2) for _ in range(100)]
    assert np.mean([test.power for test in tests]) == pytest.approx(POWER, abs=0.06)


@pytest.mark.parametrize(
    ("mean", "days", "said"),
    [
        (-0.04, 250, "worse than the backtest promised"),
        (0.03, 250, "no evidence that it is worse"),
        (0.03, 30, "too few days to tell"),
        (-0.04, 5, "too few days to tell"),
    ],
)
def test_the_sentence_says_worse_no_evidence_or_too_few_days(mean: float, days: int, said: str):
    rank_ics = daily(0.0, days, np.random.default_rng(2))
    test = compare_with_promise(rank_ics - rank_ics.mean() + mean, PROMISED, 5)
    assert promise_sentence(test).startswith(said)
    assert test.difference == pytest.approx(mean - PROMISED["rank_ic"])


def test_a_promise_that_is_nothing_or_not_sure_is_not_held_against_the_record():
    rank_ics = daily(0.0, 100, np.random.default_rng(3))
    assert "promised nothing" in promise_sentence(compare_with_promise(rank_ics, PROMISED | {"rank_ic": -0.01}, 5))
    unsure = compare_with_promise(rank_ics + 0.05, PROMISED | {"days": 4}, 5)
    assert unsure.days_needed == np.inf
    assert "the promise itself is too unsure" in promise_sentence(unsure)
    none = compare_with_promise(rank_ics[:0], PROMISED, 5)
    assert none.power == 0 and np.isnan(none.p)


def test_a_live_record_of_the_same_value_every_day_is_no_evidence():
    assert np.isnan(compare_with_promise(daily(0, 80, np.random.default_rng(0)) * 0, PROMISED, 5).p)


def test_without_a_promise_there_is_no_test(ledger: Ledger):
    for number, day in enumerate(DATES[:20]):
        ledger.fill(record(ledger, day, number, promised=None), came(number))
    (found,) = judge(*ledger.read())
    assert found.test is None
    assert "evidence of a signal" in found.sentences[0]


CONFIG = {
    "strategy": {
        "class": "TopkDropoutStrategy",
        "module_path": "qlib.contrib.strategy",
        "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1},
    },
    "backtest": {
        "start_time": "2018-01-02",
        "end_time": "2030-01-01",
        "account": 1e7,
        "benchmark": BENCHMARK,
        "exchange_kwargs": {"deal_price": "close", "open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5},
    },
}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> pd.Series:
    """Scores of 15 dates of a market that Qlib is pointed at."""
    folder = write_demo_market(tmp_path_factory.mktemp("demo") / "market", instruments=8, days=90, seed=1)
    qlib.init(provider_uri=str(folder), region="cn", kernels=1, logging_level=50, clear_mem_cache=True)
    days = D.calendar()[60:75]
    names = D.list_instruments(D.instruments("demo"), as_list=True)
    index = pd.MultiIndex.from_product([days, sorted(names)], names=["datetime", "instrument"])
    return pd.Series(np.random.default_rng(0).normal(size=len(index)), index, name="score")


class _Recorder:
    """What PortAnaRecord asks of a recorder."""

    experiment_id = "0"

    def log_metrics(self, **_: float) -> None:
        pass


def test_the_paper_portfolio_is_that_of_qlibs_own_record(scores: pd.Series, monkeypatch: pytest.MonkeyPatch):
    report = run_paper_portfolio(CONFIG, scores)
    monkeypatch.setattr(PortAnaRecord, "load", lambda self, name: scores.to_frame("score"))
    days = {"start_time": scores.index[0][0], "end_time": report.index[-1]}
    record = PortAnaRecord(_Recorder(), config=CONFIG | {"backtest": CONFIG["backtest"] | days})
    expected = record._generate()["report_normal_1day.pkl"]
    pd.testing.assert_frame_equal(report, expected)
    assert report["cost"].sum() > 0
    assert (report.index > scores.index[-1][0]).sum() == 1  # the session at which the last date's orders are done


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "no PortAnaRecord"),
        (CONFIG | {"strategy": CONFIG["strategy"] | {"module_path": "/tmp/evil.py"}}, "names /tmp/evil.py"),
        (CONFIG | {"strategy": CONFIG["strategy"] | {"class": "os.system"}}, "names os.system"),
        (CONFIG | {"strategy": "file:///tmp/evil.pkl"}, "not described but named"),
        (CONFIG | {"strategy": CONFIG["strategy"] | {"kwargs": {"topk": 3}}}, "takes no signal"),
        (CONFIG | {"backtest": CONFIG["backtest"] | {"exchange_kwargs": {"exchange": "x"}}}, "not described but named"),
        (CONFIG | {"backtest": CONFIG["backtest"] | {"benchmark": "NONE"}}, "its benchmark NONE has no bar on "),
    ],
)
def test_without_a_stock_configuration_there_is_a_reason_instead(scores: pd.Series, config: Any, reason: str):
    with pytest.raises(PaperError, match=reason):
        run_paper_portfolio(config, scores)


def test_one_date_is_no_portfolio(scores: pd.Series):
    with pytest.raises(PaperError, match="needs two dates"):
        run_paper_portfolio(CONFIG, scores[: len(scores.index.unique("instrument"))])


def test_why_there_is_no_paper_portfolio_is_said(ledger: Ledger):
    def paper(newest: pd.Series, scores: pd.Series) -> pd.DataFrame:
        raise PaperError(f"no store {newest['store']}")

    record(ledger, DATES[0], 0)
    (found,) = judge(*ledger.read(), paper)
    assert "no paper portfolio: no store no/such/store" in " ".join(found.sentences)


def test_a_test_of_a_promise_is_plain_numbers(ledger: Ledger):
    ledger.fill(record(ledger, DATES[0], 0), came(0))
    (plain,) = record_json(judge(*ledger.read()))
    assert plain["test"].keys() == PromiseTest.__annotations__.keys()
    assert plain["test"]["p"] is None
    assert datetime.fromisoformat(plain["first"]) == DATES[0]


def test_the_text_fits_a_terminal_of_100_columns(ledger: Ledger):
    for number, day in enumerate(DATES[:20]):
        for hours in (9, 30):
            placed = record(ledger, day, number + int(hours), hours, experiment="kronos_csi300_with_a_long_name")
            ledger.fill(placed, came(number))
    assert max(map(len, record_text(judge(*ledger.read())).splitlines())) <= WIDTH

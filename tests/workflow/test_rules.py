"""The simple rules: the demo workflows' own files, on the room's small market, against raw bars."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from qlib.cli.run import render_template
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.model.trainer import task_train
from qlib.utils import init_instance_by_config
from qlib.utils.data import update_config
from ruamel.yaml import YAML
from scipy.stats import spearmanr
from test_laws import LAST_DAY, tampered
from tiny import SEGMENTS, make_dataset, use_market

from kronos_qlib.workflow.rules import FactorScore

WORKFLOWS = Path(__file__).parents[2] / "workflows"
RANKED = ["reversal", "momentum", "volatility"]
RULES = [*RANKED, "last_value"]
WHOLE = ("2018-01-02", "2018-08-13")
pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")  # Qlib, on a day without an order


def task(name: str, segments: dict[str, Any] = SEGMENTS, feature: str | None = None) -> dict[str, Any]:
    """The task of a rule's demo workflow as `qrun` reads it, with the small market's dates."""
    yaml = YAML(typ="safe", pure=True)
    config = yaml.load(render_template(WORKFLOWS / f"{name}_demo.yaml"))
    task = update_config(yaml.load((WORKFLOWS / config["BASE_CONFIG_PATH"]).read_text()), config)["task"]
    dataset = task["dataset"]["kwargs"]
    dataset["segments"] = copy.deepcopy(segments)
    dataset["handler"]["kwargs"]["end_time"] = WHOLE[1]
    if feature is not None:
        dataset["handler"]["kwargs"]["data_loader"]["kwargs"]["config"]["feature"][0][0] = feature
    (config,) = [record["kwargs"]["config"] for record in task["record"] if record["class"] == "PortAnaRecord"]
    config["strategy"]["kwargs"] |= {"topk": 3, "n_drop": 1}
    config["backtest"] |= {"start_time": SEGMENTS["test"][0], "end_time": SEGMENTS["test"][1]}
    return task


def scores_of(market: Path, task: dict[str, Any]) -> pd.Series:
    use_market(market)
    model, dataset = init_instance_by_config(task["model"]), init_instance_by_config(task["dataset"])
    model.fit(dataset)
    return model.predict(dataset)


def raw_bars(market: Path, field: str) -> pd.DataFrame:
    """A field of all demo instruments by (date, instrument), from the store's files and not through Qlib."""
    days = pd.DatetimeIndex((market / "calendars" / "day.txt").read_text().split(), name="datetime")
    columns = {}
    for path in sorted((market / "features").glob(f"*/{field}.day.bin")):
        content = np.fromfile(path, "<f4").astype(float)
        columns[path.parent.name.upper()] = pd.Series(content[1:], days[int(content[0]) :][: len(content) - 1])
    return pd.DataFrame(columns, days).drop(columns="DEMOINDEX")


def members(market: Path) -> pd.DataFrame:
    """Membership by (date, instrument)."""
    bars = raw_bars(market, "close")
    mask = pd.DataFrame(False, bars.index, bars.columns)
    for line in (market / "instruments" / "demo.txt").read_text().splitlines():
        name, first, last = line.split("\t")
        mask.loc[first:last, name] = True
    return mask


def by_hand(name: str, market: Path) -> pd.Series:
    """The rule on raw bars, on the days on which members traded."""
    close, traded = raw_bars(market, "close"), raw_bars(market, "volume") > 0
    daily = close / close.shift(1) - 1
    score = {
        "reversal": -(close / close.shift(5) - 1),
        "momentum": close / close.shift(20) - 1,
        "volatility": -daily.rolling(20).std().where(close.shift(20).notna()),
        "last_value": close * 0,
    }[name]
    return score.where(traded & members(market)).stack().dropna().rename("score")


@pytest.mark.parametrize("name", RULES)
def test_the_score_is_the_rule_on_raw_bars_on_the_days_that_members_traded(name, store):
    score = scores_of(store, task(name, {"test": list(WHOLE)}))
    expected = by_hand(name, store)
    assert score.index.names == ["datetime", "instrument"] and score.index.is_monotonic_increasing
    pd.testing.assert_series_equal(
        score.astype(float), expected, check_names=False, check_index_type=False, rtol=1e-4, atol=1e-6
    )
    assert score.name == "score" and len(score) > 500
    untraded = (members(store) & ~(raw_bars(store, "volume") > 0)).sum().sum()
    assert untraded > 0, "the market has suspended days, or this shows nothing"


@pytest.mark.parametrize("how", ["prices", "no volume", "holes", "membership"])
@pytest.mark.parametrize("name", RULES)
def test_no_score_sees_what_comes_after_it(name, how, store, tmp_path):
    before = scores_of(store, task(name))
    after = scores_of(tampered(store, tmp_path / "tampered", how), task(name))
    pd.testing.assert_series_equal(before.loc[:LAST_DAY], after.loc[:LAST_DAY], check_exact=True)
    assert len(before.loc[:LAST_DAY]) > 50
    if name != "last_value" or how != "prices":
        assert not before.loc[LAST_DAY:].equals(after.loc[LAST_DAY:]), "scores after the day do change"


def test_the_law_of_no_look_ahead_catches_a_rule_that_leaks(store, tmp_path):
    leaking = task("reversal", feature="Ref($close, -1)/Ref($close, 4) - 1")
    before, after = scores_of(store, leaking), scores_of(tampered(store, tmp_path / "tampered", "prices"), leaking)
    changed = (before != after).groupby("datetime").any()
    assert not changed.loc[:"2018-07-09"].any() and changed.loc[LAST_DAY], "the last day sees one bar too many"


def test_reversal_has_the_rank_ic_of_raw_bars_and_what_was_left_out_is_counted(store):
    recorder = task_train(task("reversal"), "reversal_demo")
    days = slice(*SEGMENTS["test"])
    expected, close = by_hand("reversal", store).loc[days], raw_bars(store, "close")
    label = (close.shift(-2) / close.shift(-1) - 1).stack().rename("label")
    both = expected.to_frame().join(label, how="inner")
    rank_ic = [spearmanr(day["score"], day["label"]).statistic for _, day in both.groupby(level=0)]
    metrics = recorder.list_metrics()
    assert metrics["Rank IC"] == pytest.approx(np.mean(rank_ic), abs=1e-6)
    assert metrics["Rank ICIR"] == pytest.approx(np.mean(rank_ic) / np.std(rank_ic, ddof=1), abs=1e-5)

    member = members(store).loc[days]
    untraded = (member & ~(raw_bars(store, "volume").loc[days] > 0)).to_numpy().sum()
    assert (metrics["rule.scores"], metrics["rule.untraded"]) == (len(expected), untraded)
    assert metrics["rule.undefined"] == member.to_numpy().sum() - len(expected) - untraded


def test_a_recorded_rule_gives_the_recorded_scores_again(store):
    recorder = task_train(task("volatility"), "volatility_demo")
    model, dataset = recorder.load_object("params.pkl"), recorder.load_object("dataset")
    dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    again = model.predict(dataset)
    pd.testing.assert_series_equal(recorder.load_object("pred.pkl")["score"], again, check_exact=True)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_no_change_ranks_nothing_says_so_and_still_runs_to_the_backtest(store, warnings_logged):
    recorder = task_train(task("last_value"), "last_value_demo")
    assert recorder.info["status"] == "FINISHED"
    assert (recorder.load_object("pred.pkl")["score"] == 0).all()
    metrics = recorder.list_metrics()
    assert all(np.isnan(metrics[name]) for name in ("IC", "ICIR", "Rank IC", "Rank ICIR"))
    assert np.isfinite(metrics["1day.excess_return_with_cost.information_ratio"])
    assert recorder.load_object("portfolio_analysis/report_normal_1day.pkl")["turnover"].sum() > 0
    assert "same NO_CHANGE on every date, which ranks nothing" in recorder.list_tags()["no_rank"]
    said = [entry for entry in warnings_logged.records if entry.levelno == logging.WARNING]
    assert any("ranks nothing" in entry.getMessage() for entry in said)


@pytest.mark.parametrize("name", RANKED)
def test_a_rule_that_ranks_is_not_said_to_rank_nothing(name, store, warnings_logged):
    scores_of(store, task(name))
    assert "ranks nothing" not in warnings_logged.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature": "A", "signs": 1}, "unknown key 'signs'; known keys: feature, sign, volume"),
        ({"feature": "A", "sign": 2}, "sign: Input should be 1 or -1, not 2"),
        ({"feature": ""}, "feature: String should have at least 1 character, not ''"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(settings, message):
    with pytest.raises(ValueError) as caught:
        FactorScore(**settings)
    assert str(caught.value) == f"FactorScore: {message}"


def test_a_column_that_the_dataset_lacks_is_named_before_anything_runs(store):
    dataset = init_instance_by_config(task("reversal")["dataset"])
    with pytest.raises(ValueError, match="^FactorScore: feature 'RETURN50' is the name of 0 .* RETURN5, VOLUME$"):
        FactorScore("RETURN50").fit(dataset)
    with pytest.raises(ValueError, match="^FactorScore: volume 'AMOUNT' is the name of 0 .* RETURN5, VOLUME$"):
        FactorScore("RETURN5", volume="AMOUNT").predict(dataset)


def test_a_rule_takes_no_reweighter_and_needs_a_dataset_of_columns(store):
    rule = FactorScore("RETURN5")
    with pytest.raises(ValueError, match="^FactorScore: a reweighter was given, but a rule learns nothing$"):
        rule.fit(init_instance_by_config(task("reversal")["dataset"]), reweighter=object())
    with pytest.raises(ValueError, match="^FactorScore: the dataset must be a DatasetH, not a dict$"):
        rule.fit({})


def test_a_rule_without_a_single_number_is_an_error(store):
    with pytest.raises(ValueError, match="^FactorScore: no valid bar has a number in 'RETURN5'; segment 'test'$"):
        scores_of(store, task("reversal", feature="Ref($close, 500)/$close"))


def test_the_dataset_is_stock_qlib(store):
    assert type(init_instance_by_config(task("reversal")["dataset"])) is DatasetH
    with pytest.raises(ValueError, match="^FactorScore: feature 'RETURN5' is the name of 0 of the dataset's features"):
        FactorScore("RETURN5").fit(make_dataset())

"""Scores from which volatility and size are taken out."""

import logging

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from qlib.data import D
from test_laws import LAST_DAY, tampered
from tiny import SEGMENTS, make_dataset, make_model, use_market

from kronos_qlib.data.factors import amount_expression
from kronos_qlib.workflow import neutralise as neutral

FACTORS = ["volatility", "size"]


def by_qlib(score: pd.Series) -> pd.DataFrame:
    """The two factors for the rows of a score, written out."""
    fields = ["Std($close/Ref($close, 1), 20)", "Mean($volume*$close, 20)"]
    names = sorted(score.index.unique("instrument"))
    frame = D.features(names, fields, score.index[0][0], score.index[-1][0]).swaplevel()
    return frame.set_axis(FACTORS, axis=1).reindex(score.index)


@pytest.mark.filterwarnings("ignore:The design matrix is rank-deficient")  # on a day both ranks are the same
def test_scores_are_the_residuals_of_a_days_fit_on_ranks(store):
    dataset = make_dataset()
    plain, left = make_model().predict(dataset), make_model(neutralise=FACTORS).predict(dataset)
    assert left.index.equals(plain.index) and left.name == "score"
    factors = by_qlib(plain)
    for day, scores in plain.groupby(level="datetime"):
        ranks = factors.loc[scores.index].rank()
        expected = sm.OLS(scores, sm.add_constant(ranks - ranks.mean(), has_constant="add")).fit().resid
        np.testing.assert_allclose(left.loc[scores.index], expected, rtol=1e-6, atol=1e-12, err_msg=str(day))
    assert plain.groupby(level="datetime").corr(factors["size"]).abs().max() > 0.1, "there was something to take out"


def test_one_factor_leaves_the_other_in(store):
    dataset = make_dataset()
    left = make_model(neutralise=["size"]).predict(dataset)
    ranks = by_qlib(left).groupby(level="datetime").rank()
    correlation = {name: left.groupby(level="datetime").corr(ranks[name]).abs().max() for name in FACTORS}
    assert correlation["size"] < 1e-9 < 0.1 < correlation["volatility"]


def test_the_forecasts_columns_stay_as_they_are(store):
    dataset = make_dataset()
    one, other = (make_model(neutralise=names).forecast(dataset, "test", ["mean_return"]) for names in ([], FACTORS))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.parametrize("how", ["prices", "no volume", "holes", "membership"])
def test_neutral_scores_do_not_see_what_comes_after_them(store, market, tmp_path, how):
    def scores(folder):
        use_market(folder)
        return make_model(neutralise=FACTORS).predict(make_dataset())

    before, after = scores(market), scores(tampered(market, tmp_path / "tampered", how))
    pd.testing.assert_series_equal(before.loc[:LAST_DAY], after.loc[:LAST_DAY], check_exact=True)
    assert len(before.loc[:LAST_DAY]) > 50


def test_days_with_too_few_instruments_have_no_score_and_that_is_said(store, market, tmp_path, caplog):
    use_market(tampered(market, tmp_path / "tampered", "membership"))  # Qlib sets up its loggers anew
    logging.getLogger("qlib").addHandler(caplog.handler)
    left = make_model(neutralise=FACTORS).predict(make_dataset())
    assert left.index[-1][0] == pd.Timestamp(LAST_DAY) and left.notna().all()
    assert "on 2018-07-11 there are 1: 15 of 32 days have too few and get no score" in caplog.text


def test_too_few_instruments_throughout_are_an_error_that_names_a_day(store):
    dataset = make_dataset(instruments=["DEMO0001", "DEMO0004", "DEMO0005"])
    with pytest.raises(ValueError, match="2 factors need 5 instruments a day; on 2018-06-18 there are 3, and no"):
        make_model(neutralise=FACTORS).predict(dataset)


@pytest.mark.parametrize("names", [["beta"], ["size", "size"]])
def test_an_unknown_factor_is_answered_with_the_known_ones(names):
    with pytest.raises(
        ValueError, match="neutralise: should be a list of different names among reversal, momentum, volatility"
    ):
        make_model(neutralise=names)


def test_a_score_does_not_hang_on_where_its_segment_starts(store, monkeypatch):
    """The kind of volume is judged by the same bars whatever is scored."""
    dataset, asked = make_dataset(), []

    def watched(*bars):
        asked.append(bars)
        return amount_expression(*bars)

    monkeypatch.setattr(neutral, "amount_expression", watched)
    whole = make_model(neutralise=FACTORS).predict(dataset)
    late = whole.index.unique("datetime")[-3:]
    short = make_dataset(segments=SEGMENTS | {"test": [str(late[0].date()), str(late[-1].date())]})
    pd.testing.assert_series_equal(make_model(neutralise=FACTORS).predict(short), whole.loc[late], check_exact=True)
    assert len(asked) == 2 and asked[0] == asked[1]
    assert asked[0][2] < pd.Timestamp(SEGMENTS["test"][0])

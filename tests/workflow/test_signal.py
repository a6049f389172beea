"""On a market without signal a trained Kronos finds none, and a leak of the future would be noticed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_1samp
from tiny import finetune, make_model, use_market

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.demo import write_demo_market

SEGMENTS = {
    "train": ["2018-01-02", "2018-10-31"],
    "valid": ["2018-11-01", "2018-12-31"],
    "test": ["2019-01-02", "2019-06-28"],
}
LOOKBACK, HORIZON = 20, 5


class LeakingDataset(KLineDataset):
    """A dataset with the fault to be noticed: every bar is that of two sessions later."""

    def score_windows(self, segment="test"):
        windows = super().score_windows(segment)
        later = np.roll(windows.bars.values, -2, axis=0)
        return replace(windows, bars=replace(windows.bars, values=later))


def t_of_rank_ic(dataset, score):
    """The t of the mean daily rank IC against the label."""
    label = dataset.prepare("test", col_set="label", data_key="raw").iloc[:, 0]
    frame = score.to_frame().join(label.rename("label"), how="inner").dropna()
    daily = [spearmanr(day["score"], day["label"]).statistic for _, day in frame.groupby("datetime")]
    assert len(daily) > 100
    return ttest_1samp(daily, 0).statistic


@pytest.fixture(scope="module")
def no_signal(tmp_path_factory):
    """A market with nothing to find, and networks trained on it."""
    root = tmp_path_factory.mktemp("no_signal")
    use_market(write_demo_market(root / "market", instruments=40, days=400, signal=0, seed=3))
    model = make_model(finetune=finetune(root / "run"), forecast={"sample_count": 4})
    model.fit(dataset(KLineDataset))
    return root / "market", model


def dataset(kind):
    return kind(KLineHandler("demo"), SEGMENTS, LOOKBACK, HORIZON)


def test_a_trained_model_finds_no_signal_where_there_is_none(no_signal):
    market, model = no_signal
    use_market(market)
    honest = dataset(KLineDataset)
    assert abs(t_of_rank_ic(honest, model.predict(honest))) < 3.5


def test_a_leak_of_the_future_is_noticed_there(no_signal):
    market, model = no_signal
    use_market(market)
    leaking = dataset(LeakingDataset)
    assert abs(t_of_rank_ic(leaking, model.predict(leaking))) > 3.5

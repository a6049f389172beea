"""The laws on bars of five minutes: no look-ahead within a day, no batch, and a kill that costs one chunk."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from forks import forked
from networks import MODEL, TOKENIZER
from tampering import PRICES
from tiny import make_model, use_market
from waiting import wait_for

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.demo_market import write_demo_market

FREQ, MOMENT = "5min", pd.Timestamp("2018-01-09 11:00")  # in the middle of the morning, and of the test segment
SEGMENTS = {"test": ["2018-01-08", "2018-01-10 14:55"]}
WIDE = {"tokenizer": TOKENIZER | {"s1_bits": 8, "s2_bits": 4}, "model": MODEL | {"s1_bits": 8, "s2_bits": 4}}


@pytest.fixture(scope="module")
def minutes(tmp_path_factory):
    return write_demo_market(tmp_path_factory.mktemp("minutes") / "m", instruments=8, days=20, seed=3, freq=FREQ)


@pytest.fixture(autouse=True)
def own_folder(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def dataset_of(market: Path) -> KLineDataset:
    use_market({FREQ: str(market), "day": str(market)})
    return KLineDataset(KLineHandler("demo", freq=FREQ), SEGMENTS, lookback=40, horizon=6)


def scores_of(market: Path, **forecast) -> pd.Series:
    return make_model(**WIDE, forecast=forecast).predict(dataset_of(market))


def shocked(market: Path, folder: Path, how: str) -> Path:
    """A copy of the market that differs in all bars after MOMENT; bars of days are none of a score's business."""
    shutil.copytree(market, folder)
    times = pd.to_datetime((market / "calendars" / f"{FREQ}.txt").read_text().splitlines())
    rng = np.random.default_rng(0)
    for path in (folder / "features").glob(f"*/*.{FREQ}.bin"):
        content, field = np.fromfile(path, "<f4"), path.name.split(".")[0]
        after = slice(1 + times.get_loc(MOMENT) + 1 - int(content[0]), None)  # the first number is the first bar's row
        if how == "holes":
            content[after] = np.nan
        elif field in PRICES:
            content[after] *= 2
        elif field == "volume":
            content[after] *= rng.uniform(0.1, 10, len(content[after]))
        content.tofile(path)
    return folder


@pytest.fixture(scope="module")
def whole(minutes, workplace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return scores_of(minutes)


@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.parametrize("how", ["prices", "holes"])
def test_no_score_sees_a_later_bar_of_its_day(minutes, whole, tmp_path, how):
    after = scores_of(shocked(minutes, tmp_path / "shocked", how))
    pd.testing.assert_series_equal(whole.loc[:MOMENT], after.loc[:MOMENT], check_exact=True)
    of_the_day = whole.loc[MOMENT.normalize() : MOMENT]
    assert of_the_day.index.get_level_values(0).nunique() == 19, "bars from 9:30 to 11:00"
    assert not whole.loc[MOMENT:].equals(after.loc[MOMENT:]), "scores after the moment do change"


def test_the_batch_does_not_matter(minutes, whole):
    morning = ("2018-01-09 09:30", str(MOMENT))
    other = make_model(**WIDE, forecast={"batch_size": 7}).predict(dataset_of(minutes), morning)
    same = np.isclose(whole.loc[slice(*morning)], other, rtol=1e-4, atol=1e-6)
    assert len(same) == len(other) > 100 and same.mean() >= 0.99


def test_score_times_choose_rows_and_change_no_score(minutes, whole):
    dataset = dataset_of(minutes)
    dataset.config(score_times=["11:00", "14:55"])
    chosen = make_model(**WIDE).predict(dataset)
    times = whole.index.get_level_values(0).strftime("%H:%M")
    expected = whole[times.isin(["11:00", "14:55"])]
    assert chosen.index.equals(expected.index) and len(chosen) == 6 * len(expected.loc[MOMENT])
    assert np.isclose(chosen, expected, rtol=1e-4, atol=1e-6).all()
    with pytest.raises(ValueError, match="score_times: no bar is of 15:00; the last of a day are mostly of 14:55"):
        dataset.config(score_times=["15:00"])
        dataset.score_windows("test")
    for wrong in (["25:00"], "11:00", [900]):
        with pytest.raises(ValueError, match="score_times: "):
            dataset.config(score_times=wrong)


def forecast(market: str, folder: str, cache: str) -> None:
    import os

    os.chdir(folder)
    scores_of(Path(market), cache_dir=cache)


@pytest.mark.slow
def test_a_killed_forecast_goes_on_and_comes_out_the_same(minutes, whole, workplace, tmp_path):
    cache = tmp_path / "cache"
    process = forked(tmp_path / "said", forecast, str(minutes), str(workplace), str(cache))
    wait_for(lambda: any(cache.rglob("chunk-*.parquet")))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("chunk-*.parquet")}
    resumed = scores_of(minutes, cache_dir=str(cache))
    pd.testing.assert_series_equal(whole, resumed, check_exact=True)
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("chunk-*.parquet")}
    assert kept.items() <= after.items() and len(after) > len(kept), "what was forecast is not forecast again"

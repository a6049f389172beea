"""A KronosModel calibrates its forecasts on an earlier segment, says so, keeps what it fitted and sees no future."""

import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.log import get_module_logger
from qlib.workflow import R
from qlib.workflow.recorder import Recorder
from tampering import LAST_DAY, tampered
from tiny import HORIZON, LOOKBACK, SEGMENTS, STAGE, finetune, make_dataset, make_model, use_market

from kronos_qlib import KLineDataset, KronosModel
from kronos_qlib.evaluation.calibration import calibrate
from kronos_qlib.forecast.calibration import load_calibration
from kronos_qlib.forecast.forecaster import quantile_columns
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.workflow.calibration_job import calibration_windows
from kronos_qlib.workflow.records import ForecastRecord, segment_outcomes
from kronos_qlib.workflow.settings import CalibrationSettings

SAMPLES, DAYS = 6, 14


def calibrated_model(cache=None, **changes) -> KronosModel:
    forecast = {"sample_count": SAMPLES} | ({"cache_dir": str(cache)} if cache else {})
    return make_model(forecast=forecast, calibration={"days": DAYS} | changes)


@dataclass(frozen=True)
class Calibrated:
    """A fitted run whose forecasts are calibrated."""

    model: KronosModel
    dataset: KLineDataset
    recorder: Recorder
    record: ForecastRecord
    cache: Path
    log: str

    def artifact(self, name) -> Path:
        return Path(self.recorder.get_local_dir()) / "artifacts" / name


@pytest.fixture(scope="module")
def calibrated(market, workplace, tmp_path_factory):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        use_market(market)
        get_module_logger("KronosModel", logging.INFO)
        logging.getLogger("qlib").addHandler(handler)
        cache, dataset = tmp_path_factory.mktemp("cache"), make_dataset()
        model = calibrated_model(cache)
        with R.start(experiment_name="calibrated"):
            model.fit(dataset)
            model.predict(dataset)
            recorder = R.get_recorder()
            record = ForecastRecord(model, dataset, recorder)
            record.generate()
        logging.getLogger("qlib").removeHandler(handler)
        get_module_logger("KronosModel", logging.WARNING)
        return Calibrated(model, dataset, recorder, record, cache, "\n".join(lines))


@pytest.fixture
def here(calibrated, store):
    """The calibrated run, with Qlib set to its market."""
    return calibrated


def test_paths_as_drawn_are_bitwise_those_of_a_model_without_calibration(here):
    plain = make_model(forecast={"sample_count": SAMPLES})
    expected = plain.forecast(here.dataset)
    drawn = here.model.forecast(here.dataset, calibrated=False)
    pd.testing.assert_frame_equal(drawn, expected, check_exact=True)
    assert plain.calibration is None and plain.settings.calibration is None
    assert not here.model.forecast(here.dataset).equals(expected)
    assert len(list(here.cache.iterdir())) == 1, "the cache holds forecasts of one kind"
    same = make_model(forecast={"sample_count": SAMPLES, "cache_dir": str(here.cache)})
    with R.start(experiment_name="plain"):
        same.forecast(here.dataset)
        recorder = R.get_recorder()
    assert recorder.list_metrics()["forecast.resumed"] == len(expected)


def test_every_column_is_that_of_the_calibrated_paths(here):
    frame, (index, paths) = here.model.forecast(here.dataset), here.model.paths(here.dataset)
    assert index.equals(frame.index) and list(frame) == ["last_close", *SCORES, *quantile_columns(HORIZON)]
    closes = paths[..., 3].astype(float) / frame["last_close"].to_numpy()[:, None, None]
    np.testing.assert_allclose(frame["mean_return"], closes.mean((1, 2)) - 1, atol=1e-6)
    np.testing.assert_allclose(frame["max_return"], closes.max(2).mean(1) - 1, atol=1e-6)
    np.testing.assert_allclose(frame["prob_up"], (closes.mean(2) > 1).mean(1), atol=1e-9)
    scale = here.dataset.score_windows("test").normalised(np.arange(len(frame))).scale[:, 0, 3]
    z_last = (closes[..., -1].mean(1) - 1) * frame["last_close"] / scale
    np.testing.assert_allclose(frame["z_last"], z_last, rtol=1e-4, atol=1e-5)
    pd.testing.assert_series_equal(here.model.predict(here.dataset), frame["mean_return"].rename("score"))
    expected = calibrate(segment_outcomes(here.model, here.dataset, "test"), here.model.calibration)
    levels = frame[quantile_columns(HORIZON)].to_numpy().reshape(len(frame), 7, HORIZON).swapaxes(1, 2)
    np.testing.assert_allclose(levels, expected.quantiles * frame[["last_close"]].to_numpy()[..., None], rtol=1e-5)
    assert (np.diff(levels, axis=-1) >= 0).all()
    some = here.model.forecast(here.dataset, "test", ["q95_2", "prob_up"])
    pd.testing.assert_frame_equal(some, frame[["q95_2", "prob_up"]])


def test_the_recorder_and_the_log_say_so(here):
    fitted = here.model.calibration
    assert load_calibration(here.artifact("calibration.json")) == fitted
    told = json.loads(here.artifact("kronos_run.json").read_text())
    assert told["calibration"]["fitted_on"]["segment"] == "valid"
    assert told["calibration"]["slopes"] == [list(row) for row in fitted.slopes]
    assert told["model"]["calibration"] == {"segment": "valid", "days": DAYS, "bands": "split"}
    assert fitted.fitted_on.synthetic and fitted.fitted_on.days == DAYS
    for line in ("calibrating on 14 of", "forecasts of segment 'test'", "are calibrated, split bands, fitted on"):
        assert line in here.log


def test_it_is_fitted_on_windows_whose_horizon_lies_within_the_segment(here):
    windows = calibration_windows(here.dataset, CalibrationSettings(days=DAYS))
    days = np.unique(windows.dates)
    assert len(days) == DAYS and str(days[0])[:10] == SEGMENTS["valid"][0]
    last = windows.bars.dates[windows.ends + HORIZON]
    assert str(last.max())[:10] == here.model.calibration.fitted_on.until <= SEGMENTS["valid"][1]
    assert len(windows) == here.model.calibration.fitted_on.windows
    every = calibration_windows(here.dataset, CalibrationSettings(days=10_000))
    assert set(days) < set(every.dates) and np.isin(windows.ends, every.ends).all()


def test_a_pickle_applies_the_same_calibration_to_later_data(here):
    again = pickle.loads(pickle.dumps(here.model))
    assert again.calibration == here.model.calibration
    later = make_dataset(segments={"test": ["2018-07-10", "2018-07-31"]})
    expected = here.model.forecast(here.dataset).loc["2018-07-10":]
    pd.testing.assert_frame_equal(again.forecast(later), expected, rtol=1e-6)


def test_a_model_that_was_pickled_without_a_calibration_has_none(store):
    model = make_model()
    state = model.settings.__getstate__()
    state["__dict__"].pop("calibration")
    model.settings.__setstate__(state)
    assert model.settings.calibration is None and model.calibrate(make_dataset()) is None


def test_a_forecast_without_fit_calibrates_first(here):
    model = calibrated_model(here.cache)
    scores = model.predict(here.dataset)
    assert model.calibration == here.model.calibration
    pd.testing.assert_series_equal(scores, here.model.predict(here.dataset), check_exact=True)


@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.parametrize("how", ["prices", "holes"])
def test_no_calibrated_forecast_sees_what_comes_after_it(here, market, tmp_path, how):
    def forecasts(folder):
        use_market(folder)
        model = calibrated_model(bands="adaptive")
        frame = model.forecast(make_dataset())
        return model.calibration, frame

    (before, honest), (after, shocked) = forecasts(market), forecasts(tampered(market, tmp_path / "tampered", how))
    assert before == after
    pd.testing.assert_frame_equal(honest.loc[:LAST_DAY], shocked.loc[:LAST_DAY], check_exact=True)
    assert len(honest.loc[:LAST_DAY]) > 50
    assert not honest.loc[LAST_DAY:].equals(shocked.loc[LAST_DAY:]), "forecasts after the day do change"


def test_bands_adapt_to_bars_that_came_and_scores_do_not(here):
    adaptive = calibrated_model(here.cache, bands="adaptive")
    frame, split = adaptive.forecast(here.dataset), here.model.forecast(here.dataset)
    pd.testing.assert_frame_equal(frame[list(SCORES)], split[list(SCORES)], check_exact=True)
    days = frame.index.get_level_values(0)
    differs = (frame["q95_1"] != split["q95_1"]).groupby(days).any()
    assert not differs.iloc[0] and differs.iloc[1:].any()


def test_other_weights_need_another_calibration(here, store):
    other = make_model(forecast={"sample_count": SAMPLES}, calibration={"days": DAYS}, seed=2)
    other.calibration = here.model.calibration
    with pytest.raises(
        ValueError, match="KronosModel: the calibration was fitted on forecasts with a .* other weights"
    ):
        other.predict(here.dataset)


@pytest.mark.slow
def test_a_training_is_calibrated_with_its_own_weights_and_again_after_the_next(store, tmp_path):
    stages = {"tokenizer": STAGE | {"epochs": 1}, "predictor": None}
    model = make_model(
        finetune=finetune(tmp_path, **stages), forecast={"sample_count": SAMPLES}, calibration={"days": DAYS}
    )
    dataset = make_dataset()
    model.fit(dataset)
    first = model.calibration
    assert load_calibration(tmp_path / "calibration.json") == first
    model.finetune(dataset)
    assert model.calibration.identity != first.identity
    assert load_calibration(tmp_path / "finetune" / "calibration.json") == model.calibration
    model.predict(dataset, ("2018-06-18", "2018-06-19"))


@pytest.mark.parametrize(
    ("changes", "segments", "message"),
    [
        ({"segment": "tune"}, SEGMENTS, "calibration.segment: unknown segment 'tune'; known: train, valid, test"),
        ({"segment": "test"}, SEGMENTS, "segment 'test' should end before 'test' starts"),
        (
            {},
            SEGMENTS | {"valid": ["2018-05-01", "2018-06-20"]},
            "calibration.segment: segment 'valid' should end before 'test' starts",
        ),
        (
            {},
            SEGMENTS | {"valid": ["2018-06-13", "2018-06-15"]},
            "no window of segment 'valid' .* has all 3 bars after",
        ),
        ({"days": 2}, SEGMENTS, "calibration: segment 'valid': .* in the first half and .* each should have 20"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_a_training(store, changes, segments, message):
    with pytest.raises(ValueError, match=f"KronosModel: .*{message}"):
        calibrated_model(**changes).fit(make_dataset(segments=segments))


def test_the_record_measures_calibrated_forecasts_and_shows_what_calibrating_changed(here):
    folder = here.artifact("forecast_evaluation")
    assert {path.name for path in folder.iterdir()} >= set(here.record.list()) >= {"calibration.csv", "prob_up.csv"}
    overall = pd.read_csv(folder / "overall.csv").iloc[0]
    table = pd.read_csv(folder / "calibration.csv").set_index(["measure", "step"])
    assert table.loc[("crps", "all"), "after"] == pytest.approx(overall["crps"], rel=1e-6)
    assert table.loc[("crps", "all"), "before"] > overall["crps"]
    assert table.loc[("coverage_90", "all"), "after"] == pytest.approx(overall["coverage_90"], abs=1e-3)
    assert abs(table.loc[("coverage_90", "all"), "after"] - 0.9) < 0.1
    assert {"coverage_50_adaptive", "coverage_90_adaptive"} <= set(table.index.get_level_values(0))
    about = json.loads((folder / "about.json").read_text())["calibration"]
    assert about["last_bar"] <= SEGMENTS["valid"][1] and about["fitted_on"]["samples"] == SAMPLES
    assert here.recorder.list_metrics()["forecast.calibrated.crps"] == pytest.approx(overall["crps"])


def test_the_record_refuses_a_second_calibration(here):
    with pytest.raises(ValueError, match="calibrate_on: the model is calibrated on 'valid' already"):
        ForecastRecord(here.model, here.dataset, calibrate_on="valid")


def test_a_lookback_without_volatility_cannot_be_calibrated(store):
    with pytest.raises(ValueError, match="calibration needs a lookback of 3 bars or more, not 2"):
        calibrated_model().fit(make_dataset(lookback=2))
    assert LOOKBACK > 2

"""ForecastRecord measures a run's forecasts as a Qlib record does, and its calibration sees nothing of the test."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from qlib.data import D
from qlib.model.trainer import task_train
from qlib.workflow import R
from qlib.workflow.record_temp import SignalRecord
from qlib.workflow.recorder import Recorder
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, TOKENIZER, make_dataset, make_model, use_market

from kronos_qlib import KLineDataset, KronosModel
from kronos_qlib.workflow.records import ForecastRecord, segment_outcomes
from kronos_qlib.workflow.rules import FactorScore


@dataclass(frozen=True)
class Recorded:
    """A run with everything: paths kept, calibrated on valid."""

    model: KronosModel
    dataset: KLineDataset
    recorder: Recorder
    record: ForecastRecord

    def path(self, name):
        return Path(self.recorder.get_local_dir()) / "artifacts" / "forecast_evaluation" / name

    def table(self, name):
        return pd.read_csv(self.path(name))


@pytest.fixture(scope="module")
def recorded(market, workplace, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        use_market(market)
        cache = str(tmp_path_factory.mktemp("cache"))
        dataset = make_dataset()
        model = make_model(forecast={"cache_dir": cache, "keep_paths": True, "sample_count": 4})
        with R.start(experiment_name="forecast_record"):
            recorder = R.get_recorder()
            SignalRecord(model, dataset, recorder).generate()
            baselines = ["last_value", "ewma", "garch_t", "historical_simulation"]
            record = ForecastRecord(model, dataset, recorder, calibrate_on="valid", baselines=baselines)
            record.generate()
        return Recorded(model, dataset, recorder, record)


@pytest.fixture
def here(recorded, store):
    """The recorded run, with Qlib set to its market."""
    return recorded


def test_every_artifact_it_names_is_there(here):
    here.record.check(include_self=True)
    present = {Path(path).name for path in here.recorder.list_artifacts("forecast_evaluation")}
    assert set(here.record.list()) == present >= {"steps.csv", "by_year.csv", "calibration.csv", "risk.csv"}
    height, width, _ = imread(here.path("forecast_evaluation.png")).shape
    assert height > width > 1000


def test_the_tables_have_a_row_per_step_year_and_tercile(here):
    assert here.table("steps.csv")["step"].to_list() == [1, 2, 3]
    assert here.table("by_year.csv")["year"].to_list() == [2018]
    assert here.table("by_volatility.csv")["volatility"].to_list() == ["low", "middle", "high"]
    scored = len(here.recorder.load_object("pred.pkl"))
    assert here.table("steps.csv")["evaluated_windows"].eq(scored).all(), "all bars of the test came"
    assert here.table("by_volatility.csv")["evaluated_windows"].sum() == scored


def test_the_figures_are_metrics_of_the_recorder(here):
    metrics, overall = here.recorder.list_metrics(), here.table("overall.csv").iloc[0]
    for name in ("crps", "crps_volatility", "crps_last_value", "coverage_50", "coverage_90", "mae", "direction"):
        assert metrics[f"forecast.{name}"] == pytest.approx(overall[name])
    assert metrics["forecast.samples"] == 4
    assert metrics["forecast.calibrated.coverage_90"] != metrics["forecast.uncalibrated.coverage_90"]


def test_the_baselines_it_names_are_compared_and_what_they_could_not_do_is_told(here):
    table = here.table("baselines.csv").set_index(["forecast", "step"])
    names = ["kronos", "last_value", "ewma", "garch_t", "historical_simulation"]
    assert list(table.index) == [(name, step) for name in names for step in ("1", "2", "3", "all")]
    overall, metrics = here.table("overall.csv").iloc[0], here.recorder.list_metrics()
    assert table.loc[("kronos", "all"), "crps"] == pytest.approx(overall["crps"])
    for name in ("crps_less_last_value", "crps_less_last_value_low", "crps_less_last_value_high"):
        ours = name.replace("less_last_value", "difference")
        assert table.loc[("last_value", "all"), ours] == pytest.approx(overall[name])
    assert metrics["forecast.ewma.crps"] == pytest.approx(table.loc[("ewma", "all"), "crps"])
    assert metrics["forecast.historical_simulation.energy"] > 0 and np.isfinite(metrics["forecast.interval_90"])
    about = json.loads(here.path("about.json").read_text())["baselines"]
    assert list(about) == names[1:]
    scored = len(here.recorder.load_object("pred.pkl"))
    assert about["garch_t"]["ewma_instead"] == scored, "160 days are too few for a GARCH"
    assert about["historical_simulation"]["ewma_instead"] == 0


def test_the_risk_of_all_that_have_paths_is_backtested(here):
    table = here.table("risk.csv").set_index(["forecast", "measure"])
    assert set(table.index) == {
        ("kronos", "drawdown"),  # four paths have no 5 %
        *((name, measure) for name in ("garch_t", "historical_simulation") for measure in ("var", "drawdown")),
    }
    var = table.loc[("historical_simulation", "var")].set_index("level")
    assert list(var.index) == [0.01, 0.05]
    scored = len(here.recorder.load_object("pred.pkl"))
    assert (var["windows"] == scored).all() and var["kupiec_p"].between(0, 1).all()


def test_without_baselines_there_is_no_such_table(here):
    record = ForecastRecord(here.model, here.dataset, baselines=[])
    assert "baselines.csv" not in record.list()
    assert ForecastRecord(make_model(), here.dataset).settings.baselines == ["last_value", "volatility"]
    assert "risk.csv" not in ForecastRecord(make_model(), here.dataset).list()


def test_what_came_is_what_qlib_says_came(here):
    outcomes = segment_outcomes(here.model, here.dataset, "test")
    windows = here.dataset.score_windows("test")
    fields = [f"Ref($close, {-step}) / $close" for step in range(1, HORIZON + 1)]
    volatility = f"Std(Log($close / Ref($close, 1)), {LOOKBACK - 1})"
    bars = D.features(D.instruments("demo"), ["$volume", *fields, volatility]).swaplevel()
    index = pd.MultiIndex.from_arrays([windows.dates, windows.instruments])
    # Bars are the sessions on which there was trade: compare where none is missing around the score date.
    traded = bars["$volume"].gt(0).groupby("instrument")
    whole = traded.transform(lambda days: days.rolling(LOOKBACK + HORIZON).min().shift(-HORIZON)).loc[index].eq(1)
    expected = bars.loc[index][whole.to_numpy()]
    assert len(expected) > 100
    np.testing.assert_allclose(outcomes.closes[whole.to_numpy()], expected[fields], rtol=1e-5)
    np.testing.assert_allclose(outcomes.volatility[whole.to_numpy()], expected[volatility], rtol=1e-3)


def test_paths_and_quantiles_are_of_the_same_forecast(here):
    outcomes = segment_outcomes(here.model, here.dataset, "test")
    assert outcomes.paths.shape == (len(outcomes), 4, HORIZON)
    np.testing.assert_allclose(np.median(outcomes.paths, axis=1), outcomes.quantiles[..., 3], rtol=1e-5)
    mean_return = outcomes.paths.mean((1, 2)) - 1
    np.testing.assert_allclose(mean_return, outcomes.mean_return, atol=1e-5)


def test_the_scores_are_left_as_they_were(here):
    pd.testing.assert_series_equal(here.recorder.load_object("pred.pkl")["score"], here.model.predict(here.dataset))


def test_calibrating_brings_the_90_percent_band_near_90(here):
    table = here.table("calibration.csv").set_index(["measure", "step"])
    before, after = table.loc[("coverage_90", "all"), ["before", "after"]]
    assert before < 0.5 and abs(after - 0.9) < 0.1
    about = json.loads(here.path("about.json").read_text())["calibration"]
    assert about["last_bar"] <= SEGMENTS["valid"][1]


def changed_after(dataset, date):
    """The dataset with other closes after a date."""
    changed = make_dataset(handler=dataset.handler)
    bars = dataset.handler.bars()
    values = bars.values.copy()
    values[bars.dates > np.datetime64(date), :4] *= np.float32(1.7)
    changed.handler._bars = replace(bars, values=values)
    return changed


def test_the_calibration_does_not_hang_on_bars_after_its_segment(here):
    def fitted(dataset):
        calibration = ForecastRecord(here.model, dataset, calibrate_on="valid")._calibration()
        assert calibration.fitted_on.until <= SEGMENTS["valid"][1]
        return calibration

    ours = make_dataset()
    assert fitted(changed_after(ours, SEGMENTS["valid"][1])) == fitted(make_dataset())
    assert fitted(changed_after(make_dataset(), "2018-06-01")) != fitted(make_dataset()), "it would have been noticed"


def test_a_workflow_names_it_and_qlib_fills_in_model_and_dataset(here, warnings_logged, tmp_path):
    model = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "forecast": {"sample_count": 2}}
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "demo"}}
    dataset = {"handler": handler, "segments": SEGMENTS, "lookback": LOOKBACK, "horizon": HORIZON}
    record = {"model": "<MODEL>", "dataset": "<DATASET>"}
    task = {
        "model": {"class": "KronosModel", "module_path": "kronos_qlib", "kwargs": model},
        "dataset": {"class": "KLineDataset", "module_path": "kronos_qlib", "kwargs": dataset},
        "record": [{"class": "ForecastRecord", "module_path": "kronos_qlib.workflow.records", "kwargs": record}],
    }
    recorder = task_train(task, experiment_name="by_qlib")
    assert recorder.list_metrics()["forecast.crps"] > 0
    names = {Path(path).name for path in recorder.list_artifacts("forecast_evaluation")}
    assert "steps.csv" in names and "calibration.csv" not in names
    assert "bands from 2 samples are rough" in warnings_logged.text
    assert "cache_dir is null" in warnings_logged.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calibrate": "valid"}, "unknown key 'calibrate'; known keys: segment, calibrate_on"),
        ({"segment": "tset"}, "segment: unknown segment 'tset'; known: train, valid, test"),
        ({"calibrate_on": "later"}, "calibrate_on: unknown segment 'later'"),
        ({"baselines": ["arima"]}, "baselines.0: Input should be 'last_value', 'volatility', 'ewma'.* not 'arima'"),
        ({"baselines": ["ewma", "ewma"]}, "baselines: should name each baseline once"),
        ({"baselines": "ewma"}, "baselines: Input should be a valid list, not 'ewma'"),
        ({"model": "x"}, "model should be a KronosModel, not a str"),
    ],
)
def test_wrong_settings_are_named(here, wrong, message):
    with pytest.raises(ValueError, match=message):
        ForecastRecord(**{"model": here.model, "dataset": here.dataset} | wrong)


def test_other_models_have_nothing_to_measure(here):
    recorder = here.recorder
    record = ForecastRecord(FactorScore("RETURN5"), here.dataset, recorder)
    before = recorder.list_metrics()
    record.generate()
    assert record.list() == [] and recorder.list_metrics() == before


def test_paths_are_those_that_the_scores_are_made_of(here):
    index, paths = here.model.paths(here.dataset)
    frame = here.model.forecast(here.dataset, "test", ["last_close", "mean_return"])
    assert index.equals(frame.index) and paths.shape == (len(frame), 4, HORIZON, 6)
    means = paths[..., 3].astype(float).mean((1, 2)) / frame["last_close"].to_numpy() - 1
    np.testing.assert_allclose(means, frame["mean_return"], atol=1e-6)


def test_paths_that_were_not_kept_are_refused(here):
    with pytest.raises(ValueError, match="the sample paths are not kept: set forecast.keep_paths"):
        make_model().paths(here.dataset)


def test_a_lookback_without_volatility_is_refused(here):
    with pytest.raises(ValueError, match="needs a lookback of 3 bars or more, not 2"):
        ForecastRecord(here.model, make_dataset(lookback=2))


def test_a_calibration_without_paths_is_refused(here):
    with pytest.raises(ValueError, match="calibrate_on needs sample paths: set forecast.keep_paths and a cache_dir"):
        ForecastRecord(make_model(), here.dataset, calibrate_on="valid")


def test_it_calibrates_on_earlier_segments_only(here):
    record = ForecastRecord(here.model, here.dataset, segment="valid", calibrate_on="test")
    with pytest.raises(ValueError, match="calibrate_on: segment 'test' should end before 'valid' starts"):
        record.generate()


def test_forecasts_without_spread_are_measured_and_not_calibrated(here, warnings_logged, tmp_path):
    sure = {"cache_dir": str(tmp_path), "keep_paths": True, "top_k": 1}  # all samples are the likeliest path
    model = make_model(forecast=sure)
    with R.start(experiment_name="no_spread"):
        recorder = R.get_recorder()
        record = ForecastRecord(model, here.dataset, recorder, calibrate_on="valid")
        assert "calibration.csv" in record.list()
        record.generate()
    assert "calibrate_on: segment 'valid': the samples coincide at step 1" in warnings_logged.text
    written = {Path(path).name for path in recorder.list_artifacts("forecast_evaluation")}
    assert written == set(record.list()) and "calibration.csv" not in written and "steps.csv" in written


def test_forecasts_of_the_last_day_cannot_be_measured_yet(here):
    last = str(here.dataset.handler.bars().dates.max())[:10]
    dataset = make_dataset(segments=SEGMENTS | {"test": [last, last]})
    with pytest.raises(ValueError, match="no bar follows the score dates of segment 'test'"):
        ForecastRecord(here.model, dataset).generate()

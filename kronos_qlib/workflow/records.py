"""ForecastRecord, a Qlib record: measures a run's forecasts against the actual bars."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BeforeValidator
from qlib.config import C
from qlib.data.dataset import Dataset
from qlib.log import get_module_logger
from qlib.model.base import BaseModel
from qlib.workflow.record_temp import RecordTemp
from qlib.workflow.recorder import Recorder

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.demo_market import is_synthetic
from kronos_qlib.data.windows import CLOSE, Windows
from kronos_qlib.evaluation.baselines import (
    FORECASTS,
    BaselineForecast,
    compare_baselines,
    forecast_baselines,
    forecast_own_baseline,
    load_baseline,
)
from kronos_qlib.evaluation.calibration import NoSpread, calibrate, compare_calibration, measure_reliability
from kronos_qlib.evaluation.figure import Evaluation, draw_evaluation
from kronos_qlib.evaluation.measures import (
    BASELINES,
    Outcomes,
    lookback_volatility,
    measure,
    perfect_coverage,
    pit_histogram,
    realised_closes,
    summarise,
    summarise_groups,
    summarise_steps,
    volatility_terciles,
)
from kronos_qlib.evaluation.risk import backtest_risk
from kronos_qlib.extensions import describe_extension
from kronos_qlib.forecast.calibration import Calibration
from kronos_qlib.forecast.forecaster import QUANTILES, quantile_columns
from kronos_qlib.settings import Settings, check_configuration, read_settings
from kronos_qlib.workflow.calibration_job import drawn_outcomes, fit_on_segment
from kronos_qlib.workflow.model import KronosModel

logger = get_module_logger("ForecastRecord")
_NO_MODEL = "<MODEL>"  # what a workflow file says, where no model took its place
FEW_SAMPLES = 20  # with fewer the 90 % band of the right forecast covers less than 81 %


def _known_baseline(entry: Any) -> Any:
    """Check an entry of `baselines`: a name, or the configuration of a class of the user's own. Raises ValueError."""
    if isinstance(entry, Mapping):
        load_baseline(check_configuration(entry))
    elif not isinstance(entry, str) or entry not in FORECASTS:
        *names, last = map(repr, FORECASTS)
        raise ValueError(f"Input should be {', '.join(names)} or {last}")
    return entry


def _all_different(baselines: list[Any]) -> list[Any]:
    """Check the setting `baselines`. Raises ValueError."""
    names = [_baseline_name(entry) for entry in baselines]
    if len(set(names)) < len(names):
        raise ValueError("should name each baseline once")
    return baselines


def _baseline_name(entry: str | Mapping[str, Any]) -> str:
    """Return a baseline's name: its own, or its class's."""
    return entry if isinstance(entry, str) else getattr(entry["class"], "__name__", str(entry["class"]))


class RecordSettings(Settings):
    """The keyword arguments of `ForecastRecord`, but for model, dataset and recorder."""

    segment: str = "test"
    """The segment whose forecasts are measured."""
    calibrate_on: str | None = None
    """A segment that ends before `segment` starts; on its forecasts a calibration is fitted and shown, not applied: for
    a model without a `calibration` of its own, which is shown by itself."""
    baselines: Annotated[list[Annotated[Any, BeforeValidator(_known_baseline)]], AfterValidator(_all_different)] = [
        *("last_value", "volatility")
    ]
    """What the forecasts are compared with: `last_value`, `volatility`, `ewma`, `garman_klass`, `garch_t`,
    `historical_simulation`; the last two take minutes, see [Baselines and risk](forecasting.md#baselines-and-risk). Or
    a class of your own (class, module_path, kwargs), see [Extending](extending.md)."""


class ForecastRecord(RecordTemp):
    """Measures the forecasts of a KronosModel against the actual bars, beside baseline forecasts.

    The forecasts come from the model's `forecast.cache_dir`; without one they are computed again. See
    `kronos_qlib.evaluation.measures` for what is measured. Artifacts, in forecast_evaluation/: steps.csv (a row per
    step), overall.csv, by_year.csv, by_volatility.csv (thirds of each day by the lookback's volatility), pit.csv,
    about.json, forecast_evaluation.png; baselines.csv, where there are any (see `compare_baselines`); where paths are
    kept risk.csv, backtests of the forecasts and of the baselines that have paths (see `backtest_risk`); with a
    calibration calibration.csv and prob_up.csv. The figures of overall.csv are metrics of the recorder, `forecast.crps`
    and so on, and those of baselines.csv over all steps, `forecast.ewma.crps` and so on.

    Args:
        model, dataset: a fitted KronosModel and its KLineDataset (`<MODEL>` and `<DATASET>` in a workflow). For another
            Qlib model it measures nothing and logs that: workflows of all models may share their records; likewise
            for `<MODEL>` itself, as in a run that Qlib's `Rolling` has joined of several models' predictions.
        segment: whose forecasts are measured.
        calibrate_on: a segment that ends before `segment` starts. On its forecasts, those of which all bars lie within
            it, a calibration is fitted; what it would change on `segment` is recorded. It changes no score. It needs
            `forecast.keep_paths`; the forecasts of this segment are computed too, unless they are in the cache. Where
            their samples coincide, a warning says so and nothing is calibrated. A model with a `calibration` of its own
            is measured with it, and what that changes is recorded without this key.
        baselines: what the forecasts are compared with in baselines.csv, see `forecast_baselines`; by default
            last_value and volatility. garch_t and historical_simulation take minutes for a year of 300 instruments.

    Raises:
        ValueError: an unknown key or baseline, no model, another dataset, an unknown segment, a lookback of fewer than
            3 bars, `calibrate_on` without `keep_paths` or for a model that is calibrated.
    """

    artifact_path = "forecast_evaluation"

    def __init__(
        self,
        model: BaseModel,
        dataset: Dataset,
        recorder: Recorder | None = None,
        segment: str = "test",
        calibrate_on: str | None = None,
        baselines: Sequence[str | Mapping[str, Any]] = ("last_value", "volatility"),
        **unknown: Any,
    ) -> None:
        super().__init__(recorder)
        listed = list(baselines) if isinstance(baselines, tuple) else baselines
        values = {"segment": segment, "calibrate_on": calibrate_on, "baselines": listed, **unknown}
        self.model, self.dataset = model, dataset
        self.settings = settings = read_settings(RecordSettings, "ForecastRecord", values)
        self._calibrated = settings.calibrate_on is not None
        if not self._has_forecasts:
            return
        own = model.settings.calibration if isinstance(model, KronosModel) else None
        self._calibrated |= own is not None
        for name, given, kind in (("model", model, KronosModel), ("dataset", dataset, KLineDataset)):
            if not isinstance(given, kind):
                raise ValueError(f"ForecastRecord: {name} should be a {kind.__name__}, not a {type(given).__name__}")
        if dataset.handler.prices == "any":
            raise ValueError(
                "ForecastRecord: its errors and baselines are of ratios of prices, which may be zero or less (prices: "
                "any); leave the record out"
            )
        for key in ("segment", "calibrate_on"):
            named = getattr(settings, key)
            if named is not None and named not in dataset.segments:
                raise ValueError(
                    f"ForecastRecord: {key}: unknown segment {named!r}; known: {', '.join(dataset.segments)}"
                )
        if settings.calibrate_on is not None and own is not None:
            raise ValueError(
                f"ForecastRecord: calibrate_on: the model is calibrated on {own.segment!r} already, and that is shown"
            )
        if settings.calibrate_on is not None and not model.settings.forecast.keep_paths:
            raise ValueError("ForecastRecord: calibrate_on needs sample paths: set forecast.keep_paths and a cache_dir")
        if dataset.lookback < 3:
            raise ValueError(
                f"ForecastRecord: the historical volatility needs a lookback of 3 bars or more, not {dataset.lookback}"
            )

    @property
    def _has_forecasts(self) -> bool:
        return self.model != _NO_MODEL and (
            isinstance(self.model, KronosModel) or not isinstance(self.model, BaseModel)
        )

    def generate(self, **kwargs: Any) -> None:
        """Measure the forecasts; save tables and figure.

        Raises:
            ValueError: no bar follows any score date of the segment; `calibrate_on` does not end before it, or has no
                window of which all bars lie within it.
        """
        if not self._has_forecasts:
            name = "a joined run" if self.model == _NO_MODEL else type(self.model).__name__
            logger.info(f"ForecastRecord: {name} forecasts no bars: there is nothing to measure")
            return
        calibration = self._calibration()
        drawn = outcomes = segment_outcomes(self.model, self.dataset, self.settings.segment)
        own = self.model.settings.calibration
        if own is not None and calibration is not None:
            outcomes = calibrate(drawn, calibration, own.bands)
        if np.isnan(outcomes.closes).all():
            raise ValueError(
                f"ForecastRecord: no bar follows the score dates of segment {self.settings.segment!r}: "
                "its forecasts cannot be measured yet"
            )
        self._warn_of_few_samples(outcomes.samples)
        baselines = self._baselines()
        evaluation = _evaluate(outcomes, drawn, calibration, self._note())
        evaluation = replace(evaluation, **self._comparison(outcomes, baselines))
        with tempfile.TemporaryDirectory() as folder:
            for path in _write(evaluation, calibration, outcomes, baselines, Path(folder)):
                self.recorder.save_objects(local_path=str(path), artifact_path=self.get_path())
        figures = {**evaluation.overall.iloc[0], **evaluation.metrics}
        known = {f"forecast.{name}": float(value) for name, value in figures.items() if np.isfinite(value)}
        self.recorder.log_metrics(**known)
        logger.info(f"ForecastRecord: {describe(evaluation)}")

    def list(self) -> list[str]:
        """The names of the artifacts."""
        if not self._has_forecasts:
            return []
        names = ["steps.csv", "overall.csv", "by_year.csv", "by_volatility.csv", "pit.csv", "about.json"]
        names += ["calibration.csv", "prob_up.csv"] if self._calibrated else []
        names += ["baselines.csv"] if self.settings.baselines else []
        names += ["risk.csv"] if self.model.settings.forecast.keep_paths else []
        return [*names, "forecast_evaluation.png"]

    def _calibration(self) -> Calibration | None:
        name, segment = self.settings.calibrate_on, self.settings.segment
        if name is None:
            return self._calibration_of_the_model()
        end, start = self.dataset.segments[name][1], self.dataset.segments[segment][0]
        if end is None or start is None or end >= start:
            raise ValueError(f"ForecastRecord: calibrate_on: segment {name!r} should end before {segment!r} starts")
        outcomes = segment_outcomes(self.model, self.dataset, name)
        try:
            return fit_on_segment(self.dataset, name, outcomes, self.model.identity_on(self.dataset))
        except NoSpread as error:
            self._calibrated = False
            logger.warning(f"ForecastRecord: calibrate_on: {error}. Nothing is calibrated")
            return None
        except ValueError as error:
            raise ValueError(f"ForecastRecord: calibrate_on: {error}") from None

    def _calibration_of_the_model(self) -> Calibration | None:
        calibration: Calibration | None = self.model.calibrate(self.dataset)
        start = self.dataset.segments[self.settings.segment][0]
        if calibration is not None and (start is None or start <= pd.Timestamp(calibration.fitted_on.until)):
            logger.warning(
                f"ForecastRecord: segment {self.settings.segment!r} begins before {calibration.fitted_on.until}, the "
                "last bar that the calibration was fitted on: up to then its gain is none"
            )
        return calibration

    def _baselines(self) -> dict[str, BaselineForecast]:
        """Forecast by the baselines, with a warning of the windows that one of them could not forecast its own way."""
        windows = self.dataset.score_windows(self.settings.segment)
        baselines: dict[str, BaselineForecast] = {}
        for entry in self.settings.baselines:
            name, horizon = _baseline_name(entry), self.dataset.horizon
            if isinstance(entry, str):
                baselines |= forecast_baselines(windows, horizon, [entry])
                continue
            try:
                baselines[name] = forecast_own_baseline(windows, horizon, load_baseline(entry))
            except ValueError as error:
                raise ValueError(f"ForecastRecord: baselines: {error}") from None
            baselines[name].about["extension"] = describe_extension(entry)
        for name, forecast in baselines.items():
            instead = forecast.about.get("ewma_instead", 0)
            if instead:
                count = len(forecast.about["instruments_of_these"])
                logger.warning(
                    f"ForecastRecord: {name}: {instead:,} of {len(windows):,} forecasts, of {count} instruments, "
                    "have too few bars or no fit: ewma in their place (about.json names the instruments)"
                )
        return baselines

    def _comparison(self, outcomes: Outcomes, baselines: dict[str, BaselineForecast]) -> dict[str, pd.DataFrame]:
        """Compare with the baselines, and backtest the risk of all that have paths: tables by field of `Evaluation`."""
        tables = {"baselines": compare_baselines(outcomes, baselines)} if baselines else {}
        if outcomes.paths is not None:
            runs = _runs(self.dataset.score_windows(self.settings.segment))
            paths = {"kronos": outcomes.paths} | {name: each.paths for name, each in baselines.items()}
            backtests = {
                name: backtest_risk(each, outcomes.closes, outcomes.dates, runs)
                for name, each in paths.items()
                if each is not None
            }
            tables["risk"] = pd.concat(backtests, names=["forecast"]).reset_index("forecast")
        return tables

    def _warn_of_few_samples(self, samples: int) -> None:
        if samples < FEW_SAMPLES:
            covered = perfect_coverage(samples)["coverage_90"]
            logger.warning(
                f"ForecastRecord: bands from {samples} samples are rough: "
                f"so many samples of the right distribution make a 90 % band that covers {covered:.0%}, "
                "and a larger CRPS"
            )

    def _note(self) -> str:
        synthetic = is_synthetic(C.dpm.get_data_uri(self.dataset.handler.freq))
        return "synthetic data: simulated bars, not a real result" if synthetic else ""


def segment_outcomes(model: KronosModel, dataset: KLineDataset, segment: str) -> Outcomes:
    """Forecast a segment, from the cache where possible, and look up the actual closes; not calibrated."""
    horizon, options = dataset.horizon, model.settings.forecast
    if options.cache_dir is None:
        logger.warning(f"ForecastRecord: forecast.cache_dir is null: the forecasts of {segment!r} are computed again")
    windows = dataset.score_windows(segment)
    if model.settings.calibration is not None:
        _, bars = model.paths(dataset, segment, calibrated=False)
        last = windows.bars.values[windows.ends, CLOSE].astype(np.float64)
        return drawn_outcomes(windows, horizon, {"last_close": last, "paths": bars})
    names = quantile_columns(horizon)
    frame = model.forecast(dataset, segment, ["last_close", "mean_return", "prob_up", *names], calibrated=False)
    last_close = frame["last_close"].to_numpy()
    quantiles = frame[names].to_numpy(np.float64).reshape(len(frame), len(QUANTILES), horizon).swapaxes(1, 2)
    paths = None
    if options.keep_paths:
        _, bars = model.paths(dataset, segment, calibrated=False)
        paths = bars[..., CLOSE] / last_close[:, None, None].astype(np.float32)
    closes, ends = realised_closes(windows, horizon)
    return Outcomes(
        dates=windows.dates,
        quantiles=quantiles / last_close[:, None, None],
        closes=closes,
        ends=ends,
        volatility=lookback_volatility(windows),
        mean_return=frame["mean_return"].to_numpy(),
        prob_up=frame["prob_up"].to_numpy(),
        samples=options.sample_count,
        paths=paths,
    )


def _runs(windows: Windows) -> np.ndarray:
    """Label the runs of windows on successive bars of an instrument [W]."""
    order = np.argsort(windows.ends)
    new = np.diff(windows.ends[order], prepend=-1) != 1
    new |= np.diff(windows.bars.codes[windows.ends[order]], prepend=-1) != 0
    labels = np.empty(len(windows), int)
    labels[order] = np.cumsum(new)
    return labels


def _evaluate(outcomes: Outcomes, drawn: Outcomes, calibration: Calibration | None, note: str) -> Evaluation:
    """Measure forecasts, and what a calibration changes of them as they were drawn."""
    measured = measure(outcomes)
    years = outcomes.dates.astype("datetime64[Y]").astype(str)
    return Evaluation(
        overall=pd.DataFrame([summarise(outcomes, measured)]),
        steps=summarise_steps(outcomes, measured),
        by_year=summarise_groups(outcomes, measured, years, "year"),
        by_volatility=summarise_groups(outcomes, measured, volatility_terciles(outcomes), "volatility"),
        pit=pit_histogram(measured),
        samples=outcomes.samples,
        first=outcomes.dates.min(),
        last=outcomes.dates.max(),
        note=note,
        calibration=None if calibration is None else compare_calibration(drawn, calibration),
        prob_up=None if calibration is None else measure_reliability(drawn, calibration),
    )


def _write(
    evaluation: Evaluation,
    calibration: Calibration | None,
    outcomes: Outcomes,
    baselines: dict[str, BaselineForecast],
    folder: Path,
) -> list[Path]:
    tables = {
        "overall.csv": evaluation.overall.set_index("evaluated_windows"),
        "steps.csv": evaluation.steps,
        "by_year.csv": evaluation.by_year,
        "by_volatility.csv": evaluation.by_volatility,
        "pit.csv": evaluation.pit.set_index("step"),
    }
    if evaluation.calibration is not None and evaluation.prob_up is not None:
        tables["calibration.csv"] = evaluation.calibration.set_index("measure")
        tables["prob_up.csv"] = evaluation.prob_up.set_index("when")
    if evaluation.baselines is not None:
        tables["baselines.csv"] = evaluation.baselines.set_index("forecast")
    if evaluation.risk is not None:
        tables["risk.csv"] = evaluation.risk.set_index("forecast")
    for name, table in tables.items():
        table.to_csv(folder / name)
    about = _about(evaluation, calibration, outcomes)
    about["baselines"] = {name: forecast.about for name, forecast in baselines.items()}
    if evaluation.risk is not None:
        about["risk"] = {
            "tested": "VaR and ES: the first step alone, as horizons overlap; drawdowns: the whole horizon"
        }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    draw_evaluation(evaluation).savefig(folder / "forecast_evaluation.png", format="png")
    return sorted(folder.iterdir())


def _about(evaluation: Evaluation, calibration: Calibration | None, outcomes: Outcomes) -> dict[str, Any]:
    about: dict[str, Any] = {
        "samples": outcomes.samples,
        "perfect_coverage": perfect_coverage(outcomes.samples),
        "pit_from": "quantiles" if outcomes.paths is None else "paths",
        "first": _day(evaluation.first),
        "last": _day(evaluation.last),
        "note": evaluation.note,
        "intervals": "95 %, Driscoll-Kraay: dependence within a day and between overlapping horizons (lag step - 1)",
    }
    if calibration is not None:
        about["calibration"] = {
            **calibration.model_dump(exclude={"identity", "conformity", "version"}),
            "last_bar": calibration.fitted_on.until,
        }
    return about


def _day(date: np.datetime64) -> str:
    return str(np.datetime_as_string(date, "D"))


def describe(evaluation: Evaluation) -> str:
    """Summarise an evaluation in one line."""
    row = evaluation.overall.iloc[0]
    parts = [f"{row['evaluated_windows']:,.0f} forecasts from {evaluation.samples} samples", f"CRPS {row['crps']:.5f}"]
    differences = {
        baseline: [row[f"crps_less_{name}{end}"] for end in ("", "_low", "_high")]
        for name, baseline in (("last_value", "last value"), ("volatility", "historical volatility"))
    }
    if evaluation.baselines is not None:
        table = evaluation.baselines
        table = table[(table["step"] == "all") & ~table["forecast"].isin(["kronos", *BASELINES])]
        columns = [f"crps_difference{end}" for end in ("", "_low", "_high")]
        differences |= {
            name.replace("_", " "): list(found) for name, *found in table[["forecast", *columns]].to_numpy()
        }
    for baseline, (difference, low, high) in differences.items():
        verdict = "no evidence of a difference" if not high < 0 and not low > 0 else "better" if high < 0 else "worse"
        parts.append(f"{difference:+.5f} ({low:+.5f} … {high:+.5f}) against {baseline}: {verdict}")
    parts += [f"the {band[-2:]} % band covers {row[band]:.1%}" for band in ("coverage_50", "coverage_90")]
    return "; ".join(parts)

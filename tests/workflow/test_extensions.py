"""Classes of a user's own, those of examples/: what they are given, what they do to a run, how a wrong one is told."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.workflow import R
from scipy.stats import t
from tiny import HORIZON, make_dataset, make_model

from kronos_qlib import KronosModel
from kronos_qlib.evaluation.measures import LEVELS
from kronos_qlib.workflow.records import ForecastRecord

EXAMPLES = Path(__file__).parents[2] / "examples"
SCORE = {"class": "UpsideLessDrawdown", "module_path": str(EXAMPLES / "upside_score.py"), "kwargs": {"aversion": 0.5}}
BASELINE = {"class": "StudentVolatility", "module_path": str(EXAMPLES / "student_baseline.py"), "kwargs": {"df": 5}}


@pytest.fixture
def kept(tmp_path):
    return {"keep_paths": True, "cache_dir": str(tmp_path / "cache")}


def own(folder: Path, body: str) -> dict:
    """A configuration of a class whose `__call__` has this body."""
    (folder / "own.py").write_text(
        f"import numpy as np\n\nclass Own:\n    def __call__(self, *given):\n        {body}\n"
    )
    return {"class": "Own", "module_path": str(folder / "own.py")}


def test_a_score_of_the_paths_is_the_run_s_score_and_its_file_is_recorded(store, kept):
    dataset, model = make_dataset(), make_model(score=SCORE, forecast=kept)
    with R.start(experiment_name="own_score"):
        model.fit(dataset)
        found = model.predict(dataset)
        recorded = R.get_recorder()
        run = json.loads((Path(recorded.get_local_dir()) / "artifacts" / "kronos_run.json").read_text())
    assert run["model"]["score"] == SCORE and run["extensions"]["score"]["file"] == SCORE["module_path"]
    index, paths = model.paths(dataset)
    pd.testing.assert_index_equal(found.index, index)
    last = model.forecast(dataset, columns=["last_close"])["last_close"].to_numpy()
    for row in (0, len(index) // 2, len(index) - 1):
        values = []
        for path in paths[row].astype(float):
            close = [last[row], *path[:, 3]]
            fall = max(1 - close[end] / max(close[: end + 1]) for end in range(len(close)))
            values.append((close[-1] / last[row] - 1, fall))
        upside, drawdown = np.mean(values, axis=0)
        assert found.iloc[row] == pytest.approx(upside - 0.5 * drawdown, rel=1e-5, abs=1e-7)


def test_another_score_of_the_same_paths_draws_none_anew(store, kept, monkeypatch):
    make_model(score=SCORE, forecast=kept).predict(make_dataset())
    monkeypatch.setattr("kronos_qlib.forecast.forecaster.generate", None)
    other = SCORE | {"kwargs": {"aversion": 0.0}}
    made = make_model(score=other, forecast=kept).predict(make_dataset())
    last = make_model(forecast=kept, score="last_return").predict(make_dataset())
    np.testing.assert_allclose(made, last, rtol=1e-5, atol=1e-7)


def test_a_baseline_of_one_s_own_stands_beside_the_others(store, kept):
    dataset, model = make_dataset(), make_model(forecast=kept)
    with R.start(experiment_name="own_baseline"):
        ForecastRecord(model, dataset, R.get_recorder(), baselines=["volatility", BASELINE]).generate()
        folder = Path(R.get_recorder().get_local_dir()) / "artifacts" / "forecast_evaluation"
    table = pd.read_csv(folder / "baselines.csv").set_index(["forecast", "step"])
    windows = dataset.score_windows("test")
    rows = np.arange(len(windows))
    close = windows.values(rows)[..., 3].astype(float)
    after = np.array([windows.bars.values[end + 1 : end + 1 + HORIZON, 3] for end in windows.ends])
    spread = np.diff(np.log(close), axis=1).std(1, ddof=1)[:, None] * np.sqrt(np.arange(1, HORIZON + 1))
    low, high = (np.exp(spread * t.ppf(level, 5) * np.sqrt(3 / 5)) for level in (LEVELS[0], LEVELS[-1]))
    inside = (after / close[:, -1:] >= low) & (after / close[:, -1:] <= high)
    assert table.loc[("StudentVolatility", "all"), "coverage_90"] == pytest.approx(inside.mean())
    assert table.loc[("StudentVolatility", "all"), "crps"] != table.loc[("volatility", "all"), "crps"]
    about = json.loads((folder / "about.json").read_text())["baselines"]["StudentVolatility"]
    assert about["extension"]["file"] == BASELINE["module_path"]


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (SCORE | {"module_path": "no/such.py"}, "score: module_path 'no/such.py' cannot be imported: FileNotFound"),
        (SCORE | {"class": "Lacking"}, "has no class 'Lacking'"),
        (SCORE | {"module": "x"}, "score: unknown key 'module'; known keys: class, module_path, kwargs"),
        (SCORE | {"kwargs": {"averse": 1}}, "UpsideLessDrawdown cannot be made: TypeError"),
        ({"class": "Path", "module_path": "pathlib"}, "Path has no __call__"),
        (BASELINE | {"kwargs": {"df": 1}}, "StudentVolatility cannot be made: ValueError: df should be above 2"),
    ],
)
def test_a_class_that_cannot_be_made_is_told_as_the_model_is_made(store, kept, configuration, message):
    with pytest.raises(ValueError, match="^KronosModel: score: ") as told:
        make_model(score=configuration, forecast=kept)
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return np.zeros(1)", "Own returns the shape [1], and should return [3]"),
        ("return given[0][0, 99]", "Own fails: IndexError"),
        ("return np.full(len(given[0]), np.nan)", "Own returns what is no finite number"),
        ("return given[1][:, -1, 3].argsort().argsort()", "Own scores a window by the others of its block too"),
    ],
)
def test_a_score_that_returns_something_else_is_told_before_a_training(store, kept, tmp_path, body, message):
    stage = {"epochs": 1, "windows_per_epoch": 32, "batch_size": 32, "valid_windows": 32}
    finetune = {"output_dir": str(tmp_path / "out"), "tokenizer": stage, "predictor": stage}
    model = make_model(score=own(tmp_path, body), forecast=kept, finetune=finetune)
    with pytest.raises(ValueError, match="^KronosModel: score: ") as told:
        model.fit(make_dataset())
    assert message in str(told.value) and not (tmp_path / "out").exists()


def test_a_score_needs_the_paths_and_one_that_fails_on_a_window_names_it(store, kept, tmp_path):
    with pytest.raises(ValueError, match="a score of your own needs the sample paths: set forecast.keep_paths"):
        make_model(score=SCORE)
    dataset = make_dataset()
    windows = dataset.score_windows("test")
    last = float(windows.values(np.arange(len(windows)))[:, -1, 3].max())
    rare = own(tmp_path, f"return np.where(given[1][:, -1, 3] == {last!r}, np.inf, 0.0)")
    with pytest.raises(ValueError, match=r"score: Own returns inf for DEMO000\d on 2018-0\d-\d\d.*, and for 1 of "):
        make_model(score=rare, forecast=kept).predict(dataset)


def test_a_baseline_that_is_wrong_is_told_as_the_record_is_made(store, kept, tmp_path):
    model, dataset = make_model(forecast=kept), make_dataset()
    for body, message in (
        ("return np.ones((len(given[0]), given[1]))", "shape"),
        (
            "return np.zeros((len(given[0]), given[1], 7)) - np.arange(7)",
            "quantiles that are not finite or do not rise",
        ),
        ("return np.full((len(given[0]), given[1], 7), given[0].mean())", "forecasts a window by the others"),
    ):
        with pytest.raises(ValueError, match=rf"^ForecastRecord: baselines.0: Own .*{message}"):
            ForecastRecord(model, dataset, baselines=[own(tmp_path, body)])


def test_a_model_with_a_score_of_its_own_is_pickled_whole(store, kept, tmp_path):
    model, dataset = make_model(score=SCORE, forecast=kept), make_dataset()
    again: KronosModel = pickle.loads(pickle.dumps(model))
    for name in [name for name in sys.modules if name.startswith("kronos_qlib_extension_")]:
        del sys.modules[name]
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))

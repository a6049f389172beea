"""Tuning: what a trial is worth, that it goes on where it was stopped, and that no bar after valid decides anything."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from linear import FEATURES, LABEL, SEGMENTS, mlflow_uri
from linear import write as write_linear
from mlflow import MlflowClient
from networks import MODEL, TOKENIZER
from qlib.cli.run import workflow as qrun
from qlib.contrib.model.linear import LinearModel
from qlib.data import D
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from tampering import LAST_DAY, tampered
from tiny import use_market

from kronos_qlib.cli import main
from kronos_qlib.workflow.trial_store import Trial
from kronos_qlib.workflow.tuning import Tuning, daily_rank_ic, results_text
from kronos_qlib.workflow.workflow_file import read_workflow

SPACE = {
    "task.model.kwargs.alpha": {"float": [1e-4, 10.0], "log": True},
    "task.model.kwargs.fit_intercept": {"choice": [True, False]},
}


class Stoppable(LinearModel):
    """Linear regression that a file `stop` interrupts, as Ctrl-C does."""

    def fit(self, dataset: Any, reweighter: Any = None) -> Any:
        if Path("stop").exists():
            raise KeyboardInterrupt
        return super().fit(dataset, reweighter)


def write(market: Path, folder: Path, model: dict[str, Any] | None = None, space: dict[str, Any] | None = None) -> Path:
    """Write base.yaml, linear.yaml above it, and space.yaml into a folder; return linear.yaml."""
    path = write_linear(market, folder, model)
    (folder / "space.yaml").write_text(yaml.safe_dump(space or SPACE))
    return path


def tune(path: Path, trials: int = 4, **options: Any) -> list[Trial]:
    options = {"folds": 2, "valid_sessions": 30} | options
    return list(Tuning(path, path.with_name("space.yaml"), trials, **options).run())


def found(trials: list[Trial]) -> list[tuple]:
    return [(each.number, each.values, each.rank_ic, each.folds, each.standard_error, each.reason) for each in trials]


def runs(experiment: str = "linear_trials") -> list[Any]:
    client = MlflowClient(mlflow_uri())
    own = client.get_experiment_by_name(experiment)
    found = client.search_runs([own.experiment_id])
    return sorted(found, key=lambda run: int(run.data.tags.get("kronos_qlib.trial", 0)))


def test_a_trial_is_worth_its_mean_daily_rank_ic_and_the_best_one_is_a_workflow_for_qrun(market, place, capsys):
    path = write(market, place / "folder")
    command = ["tune", str(path), "--space", "folder/space.yaml", "--trials", "3", "--folds", "2"]
    assert main([*command, "--valid-sessions", "30"]) == 0
    told = capsys.readouterr().out
    recorded = runs()
    assert [run.data.tags["kronos_qlib.trial"] for run in recorded] == ["0", "1", "2"]
    assert all(run.info.status == "FINISHED" for run in recorded)
    assert recorded[0].data.params == {"task.model.kwargs.alpha": "1.0", "task.model.kwargs.fit_intercept": "True"}
    for run in recorded:
        folds = [run.data.metrics[f"rank_ic_fold_{number}"] for number in (1, 2)]
        assert run.data.metrics["rank_ic"] == pytest.approx(np.mean(folds), abs=1e-15)
    assert [run.data.metrics[f"rank_ic_fold_{n}"] for n in (1, 2)] == pytest.approx(by_hand(market), abs=1e-6)

    best = max(recorded, key=lambda run: run.data.metrics["rank_ic"])
    assert f"{best.data.metrics['rank_ic']:+.4f}" in told and "written: linear_tuned.yaml" in told
    tuned, original = read_workflow(Path("linear_tuned.yaml")), read_workflow(path)
    chosen = tuned["task"]["model"]["kwargs"]
    assert str(chosen["alpha"]) == best.data.params["task.model.kwargs.alpha"] and chosen["estimator"] == "ridge"
    assert tuned["task"]["dataset"] == original["task"]["dataset"] and tuned["experiment_name"] == "linear_tuned"
    text = Path("linear_tuned.yaml").read_text()
    assert "best settings of 3 trials" in text and "# A comment that stays." in text and "NOWHERE" in text
    qrun("linear_tuned.yaml")
    (run,) = runs("linear_tuned")
    assert run.info.status == "FINISHED"


def by_hand(market: Path) -> list[float]:
    """The rank ICs of the last trial's settings on both blocks of 30 sessions, without handler, dataset or fold."""
    values = {key.split(".")[-1]: yaml.safe_load(value) for key, value in runs()[-1].data.params.items()}
    use_market(market)
    sessions = pd.DatetimeIndex(D.calendar("2018-01-02", LAST_DAY))[:-2]
    table = D.features(D.instruments("demo"), [*FEATURES, LABEL], "2018-01-02", sessions[-1])
    table = table.swaplevel().sort_index()
    results = []
    for first in (len(sessions) - 60, len(sessions) - 30):
        train, valid = table.loc[: sessions[first - 3]], table.loc[sessions[first] : sessions[first + 29]]
        middle = train[FEATURES].median()
        spread = (train[FEATURES] - middle).abs().median() * 1.4826 + 1e-12

        def normal(part: pd.DataFrame, middle=middle, spread=spread) -> pd.DataFrame:
            return ((part[FEATURES] - middle) / spread).clip(-3, 3).fillna(0)

        known = train[train[LABEL].notna()]
        model = Ridge(float(values["alpha"]), fit_intercept=values["fit_intercept"])
        model.fit(normal(known).to_numpy(), known[LABEL].to_numpy())
        valid = valid.assign(score=model.predict(normal(valid).to_numpy()))
        valid = valid[valid[LABEL].notna()]
        days = [spearmanr(day["score"], day[LABEL])[0] for _, day in valid.groupby(level="datetime")]
        results.append(float(np.mean(days)))
    return results


def test_a_tuning_that_was_stopped_goes_on_with_the_same_trials(market, place, monkeypatch):
    """Twelve trials, so that the sampler's model is at work and not chance alone."""
    model = {"class": "Stoppable", "module_path": "test_tuning"}
    path = write(market, place / "folder", model)
    whole = tune(path, 12, storage=Path("whole.db"))
    assert len({str(each.values) for each in whole}) == 12

    tuning = Tuning(path, path.with_name("space.yaml"), 12, 2, 30, storage=Path("parts.db"))
    first = list(islice(tuning.run(), 3))
    Path("stop").touch()
    with pytest.raises(KeyboardInterrupt):
        tune(path, 12, storage=Path("parts.db"))
    Path("stop").unlink()
    client = MlflowClient(mlflow_uri())
    killed = client.create_run(runs()[0].info.experiment_id, tags=runs()[0].data.tags | {"kronos_qlib.trial": "3"})
    parts = tune(path, 12, storage=Path("parts.db"))
    assert found(parts) == found(whole) and found(first) == found(whole)[:3]
    assert found(tune(path, 5, storage=Path("parts.db"))) == found(whole)[:5], "nothing is tried again"
    assert killed.info.run_id not in {run.info.run_id for run in runs()}
    numbers = [run.data.tags["kronos_qlib.trial"] for run in runs()]
    assert numbers == [str(number) for number in range(12)], "both storages hold the same study: each trial counts once"
    assert found(tune(path, 2, storage=Path("parts.db"), seed=1))[1] != found(whole)[1]


@pytest.mark.parametrize(("how", "folds"), [("prices", 1), ("holes", 2), ("membership", 2)])
def test_no_bar_after_the_valid_segment_decides_a_trial(market, place, how, folds):
    options = {"folds": folds, "valid_sessions": 30 if folds > 1 else None}
    one = tune(write(market, place / "one"), 2, storage=Path("one.db"), **options)
    other = tune(
        write(tampered(market, place / "market", how), place / "other"), 2, storage=Path("other.db"), **options
    )
    assert found(one) == found(other) and len(one[1].folds) == folds
    assert len(runs()) == 2, "it is one study: its name holds a digest of all labels"


@pytest.mark.slow
def test_rankers_are_tuned_alike_and_leave_no_folders(market, place):
    sizes = {"epochs": 1, "days_per_epoch": 16, "batch_size": 8, "valid_days": 10}
    kwargs = {
        "tokenizer": TOKENIZER,
        "model": MODEL,
        "ranker": {"output_dir": "out", "learning_rate": 5e-3} | sizes,
        "device": "cpu",
        "dtype": "float32",
        "seed": 1,
    }
    space = {
        "task.model.kwargs.ranker.learning_rate": {"float": [1e-3, 1e-2], "log": True},
        "task.model.kwargs.model.n_heads": {"choice": [2, 3]},  # 16 is no multiple of 3
        "task.dataset.kwargs.lookback": {"int": [8, 12]},
    }

    def ranker(market: Path, folder: Path) -> Path:
        path = write(market, folder, {"class": "KronosRanker", "module_path": "kronos_qlib", "kwargs": kwargs}, space)
        config = yaml.safe_load((folder / "base.yaml").read_text())
        handler = {"class": "KLineHandler", "module_path": "kronos_qlib"}
        handler["kwargs"] = {"instruments": "demo", "end_time": "2018-08-13"}
        dataset = {"class": "KLineDataset", "module_path": "kronos_qlib"}
        dataset["kwargs"] = {"lookback": 10, "horizon": 3, "segments": SEGMENTS, "handler": handler}
        config["task"]["dataset"] = dataset
        (folder / "base.yaml").write_text(yaml.safe_dump(config))
        return path

    tuning = Tuning(ranker(market, place / "one"), place / "one" / "space.yaml", 4, 2, 25, storage=Path("one.db"))
    sessions = pd.DatetimeIndex(D.calendar("2018-01-02", LAST_DAY))
    for fold in tuning.folds:
        between = sessions[(sessions > fold["train"][1]) & (sessions < fold["valid"][0])]
        assert len(between) == 2 + 3, "the label's reach and the dataset's horizon"
    one = list(tuning.run())
    other = tune(
        ranker(tampered(market, place / "market", "holes"), place / "other"),
        4,
        valid_sessions=25,
        storage=Path("other.db"),
    )
    assert found(one) == found(other)
    refused = [each for each in one if each.values["task.model.kwargs.model.n_heads"] == 3]
    assert refused and all(each.rank_ic is None and "n_heads" in each.reason for each in refused)
    assert not Path("out").exists() and not [path for path in place.glob("one_*") if path.is_dir()]
    tuned = read_workflow(tuning.write_best(one))
    assert tuned["task"]["model"]["kwargs"]["ranker"]["output_dir"] == "out_tuned", "out holds another training"


def test_settings_that_the_model_refuses_are_a_trial_without_a_value(market, place, capsys):
    path = write(market, place / "folder", space={"task.model.kwargs.alpha": {"choice": [1.0, -5.0]}})
    assert main(["tune", str(path), "--space", "folder/space.yaml", "--trials", "4", "--folds", "1"]) == 0
    refused = [run for run in runs() if run.data.tags["kronos_qlib.trial_state"] == "pruned"]
    assert refused and all("rank_ic" not in run.data.metrics for run in refused)
    reason = refused[0].data.tags["kronos_qlib.trial_reason"]
    assert "alpha" in reason and "\n" not in reason and reason in capsys.readouterr().out
    path = write(market, place / "folder", {"kwargs": {"estimator": "ridge", "alpha": -1.0}})
    (place / "folder" / "space.yaml").write_text("task.model.kwargs.alpha: {float: [0.1, 1]}\n")
    with pytest.raises(ValueError, match="linear.yaml as it is: .*alpha"):
        tune(path)


def test_a_dry_run_says_folds_rows_space_and_budget_and_writes_nothing(market, place, capsys):
    path = write(market, place / "folder")
    command = [
        "tune",
        str(path),
        "--space",
        "folder/space.yaml",
        "--trials",
        "7",
        "--dry-run",
        "--valid-sessions",
        "30",
    ]
    before = {each.name for each in place.iterdir()}
    assert main([*command, "--folds", "2"]) == 0
    told = capsys.readouterr().out
    assert f"bars up to {LAST_DAY}" in told and "labels up to 2018-07-06" in told
    assert "fold 2   train 2018-01-02 … 2018-05-23 (" in told and "valid 2018-05-28 … 2018-07-06 (" in told
    assert "0.0001 … 10, log" in told and "7 trials" in told and "2 fits each" in told
    assert {each.name for each in place.iterdir()} == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task.model.kwargs.alfa", {"float": [0, 1]}, "has no such key; known there: alpha, estimator, fit_intercept"),
        ("task.model.kwargs.more.alpha", {"float": [0, 1]}, "has no such key"),
        ("task.model.class", {"choice": ["a", "b"]}, "only task.model.kwargs.… and task.dataset.kwargs.… can be tried"),
        ("task.dataset.kwargs.segments.train", {"choice": [1, 2]}, "segments decides what the trials are measured on"),
        ("task.dataset.kwargs.handler.kwargs.end_time", {"choice": [1, 2]}, "end_time decides"),
        ("task.model.kwargs.alpha", {"float": [2, 1]}, "float should be [low, high], low below high, not [2.0, 1.0]"),
        ("task.model.kwargs.alpha", {"float": [0, 1], "log": True}, "log needs a low above 0"),
        ("task.model.kwargs.alpha", {"float": [0, 1], "int": [0, 1]}, "should be one of"),
        ("task.model.kwargs.alpha", {"flaot": [0, 1]}, "unknown key 'flaot'; known keys: log, choice, int, float"),
        ("task.model.kwargs.alpha", {"int": [0.5, 1]}, "int.0: Input should be a valid integer"),
        ("task.model.kwargs.alpha", {"choice": [1, 1]}, "choice has a value twice"),
        ("task.model.kwargs.alpha", 3, "should be a mapping such as"),
    ],
)
def test_a_wrong_space_is_one_line_that_names_file_and_key(market, place, capsys, key, value, message):
    path = write(market, place / "folder", space={key: value})
    assert main(["tune", str(path), "--space", "folder/space.yaml", "--trials", "2"]) == 2
    told = capsys.readouterr().err
    assert f"folder/space.yaml: {key}: " in told and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 4, "valid_sessions": 40}, "4 folds of 40 sessions"),
        ({"trials": 0}, "trials and sessions should be 1 or more"),
        ({"folds": 1, "valid_sessions": 9}, "are of two folds and more"),
        ({"out": Path("folder/base.yaml")}, "base.yaml is there already and was not written by tune"),
        ({"storage": Path("folder/base.yaml")}, "base.yaml: cannot be used as the storage of trials"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_fit(market, place, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        tune(write(market, place / "folder"), **options)
    assert "\n" not in " ".join(str(caught.value).split())
    assert not Path("linear_tuned.yaml").exists()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"valid": ["2018-05-07", "2018-07-12"]}, "should follow each other"),
        ({"train": [None, "2018-05-04"]}, "segments.train should be two dates"),
    ],
)
def test_segments_out_of_order_are_refused(market, place, segments, message):
    path = write(market, place / "folder")
    base = yaml.safe_load((place / "folder" / "base.yaml").read_text())
    base["task"]["dataset"]["kwargs"]["segments"] |= segments
    (place / "folder" / "base.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(ValueError, match=message):
        tune(path)


def test_days_of_equal_scores_count_as_nothing_and_scores_that_never_differ_are_refused():
    days = pd.MultiIndex.from_product([pd.date_range("2020-01-01", periods=2), list("abc")])
    days.names = ["datetime", "instrument"]
    label = pd.Series([1.0, 2, 3, 3, 1, 2], days)
    scores = pd.Series([1.0, 2, 3, 5, 5, 5], days)
    assert daily_rank_ic(scores, label).tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="all equal"):
        daily_rank_ic(scores * 0, label)
    with pytest.raises(ValueError, match="has a label"):
        daily_rank_ic(scores, label * math.nan)


def test_the_table_has_the_best_first():
    trials = [
        Trial(n, {"a.b": n, "a.c": 0.5}, rank_ic=value, folds=(value,)) for n, value in enumerate((0.1, None, 0.3))
    ]
    lines = results_text(trials).splitlines()
    assert lines[0].split() == ["trial", "rank", "IC", "s.e.", "fold", "1", "b", "c"]
    assert [line.split()[0] for line in lines[1:]] == ["2", "0"]


def test_the_spaces_fit_the_workflows_and_have_as_many_keys(monkeypatch):
    from kronos_qlib.workflow.search_space import read_space

    monkeypatch.delenv("QLIB_DATA", raising=False)
    folder, sizes = Path(__file__).parents[2] / "workflows", set()
    for space, names in {"lightgbm": ("lightgbm_demo", "lightgbm_csi300"), "ranker": ("ranker_demo",)}.items():
        for name in names:
            path = folder / f"{name}.yaml"
            read = read_space(folder / "spaces" / f"{space}.yaml", read_workflow(path), path)
            assert read.parameters(read.present(read_workflow(path))), "the workflow's own values lie within"
            sizes.add(len(read.ranges))
    assert len(sizes) == 1

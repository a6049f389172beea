"""Qlib's rolling, online and report tools work on a KronosModel, unmodified, and its rolling on a KronosRanker."""

import copy
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from qlib.model.trainer import TrainerR, task_train
from qlib.workflow import R
from qlib.workflow.online.update import LabelUpdater, PredUpdater
from qlib.workflow.task.gen import RollingGen, task_generator
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, STAGE, TOKENIZER, finetune, make_dataset, make_model

pytestmark = pytest.mark.slow
FORECAST = {"sample_count": 2, "temperature": 1.0}


def task(kind: str = "KronosModel", **model) -> dict:
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "demo"}}
    sizes = {"lookback": LOOKBACK, "horizon": HORIZON}
    networks = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": 1}
    return {
        "model": {
            "class": kind,
            "module_path": "kronos_qlib",
            "kwargs": networks | model,
        },
        "dataset": {
            "class": "KLineDataset",
            "module_path": "kronos_qlib",
            "kwargs": {"handler": handler, "segments": copy.deepcopy(SEGMENTS), **sizes},
        },
        "record": [{"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"}],
    }


STAGES = dict.fromkeys(("tokenizer", "predictor"), STAGE | {"epochs": 1})


@pytest.mark.parametrize(
    ("kind", "settings", "stage"),
    [
        ("KronosModel", {"forecast": FORECAST, "finetune": finetune(Path("out"), **STAGES)}, "predictor"),
        ("KronosRanker", {"ranker": {"output_dir": "out", "epochs": 1, "ensemble": 2}}, "ranker_2"),
    ],
)
def test_rolled_tasks_train_each_into_a_folder_of_their_dates(
    store, tmp_path, monkeypatch, warnings_logged, kind, settings, stage
):
    (tmp_path / "mlflow.db").symlink_to(Path("mlflow.db").resolve())
    monkeypatch.chdir(tmp_path)
    rolled = task(kind, **settings)
    tasks = task_generator(rolled, RollingGen(step=10, rtype=RollingGen.ROLL_SD))[:2]
    recorders = TrainerR(experiment_name=f"rolls of {kind}").train(tasks)
    first, second = (recorder.load_object("pred.pkl").index.get_level_values("datetime") for recorder in recorders)
    assert first.max() < second.min()
    assert (tmp_path / "out" / stage / "best").is_dir()
    (folder,) = (path.parents[1] for path in Path("out").glob(f"2*_*/{stage}/best"))
    start, end = (pd.Timestamp(date) for date in tasks[1]["dataset"]["kwargs"]["segments"]["train"])
    first_date, last_date = map(pd.Timestamp, folder.name.split("_"))
    assert start <= first_date < last_date <= end
    assert f"{kind}: out holds a training on " in warnings_logged.text
    assert f"goes into {folder}" in warnings_logged.text


@pytest.mark.parametrize("options", [{}, {"hist_ref": 40}])
def test_an_updated_prediction_is_that_of_a_run_to_the_later_date(store, options):
    early = task(forecast=FORECAST)
    early["dataset"]["kwargs"]["segments"]["test"] = ["2018-06-18", "2018-07-06"]
    recorder = task_train(early, experiment_name="live")
    expected = make_model().predict(make_dataset())
    assert recorder.load_object("pred.pkl").index.get_level_values("datetime").max() == pd.Timestamp("2018-07-06")
    PredUpdater(recorder, to_date="2018-07-31", **options).update()
    found = recorder.load_object("pred.pkl")["score"].sort_index()
    pd.testing.assert_series_equal(found, expected, check_exact=True, check_freq=False)
    LabelUpdater(recorder, to_date="2018-07-31", **options).update()
    labels = recorder.load_object("label.pkl")
    assert labels.index.get_level_values("datetime").max() == pd.Timestamp("2018-07-31")


@pytest.mark.skipif(int(version("plotly").split(".")[0]) > 6, reason="qlib.contrib.report needs plotly 6 or older")
def test_qlib_draws_its_report_figures_of_kronos_scores(run):
    from qlib.contrib.report import analysis_model, analysis_position

    labels = R.get_recorder(recorder_id=run.recorder.id, experiment_name="run")
    assert labels.list_artifacts()
    frame = run.scores.to_frame("score").join(
        run.dataset.prepare("test", col_set="label").iloc[:, 0].rename("label"), how="inner"
    )
    figures = [
        *analysis_model.model_performance_graph(frame, show_notebook=False),
        *analysis_position.score_ic_graph(frame.swaplevel().sort_index(), show_notebook=False),
    ]
    assert len(figures) >= 5 and all(figure.data for figure in figures)

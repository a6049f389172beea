"""Qlib's rolling, online and report tools work on a KronosModel, unmodified, and its rolling on a KronosRanker."""

import copy
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from qlib.contrib.rolling.base import Rolling
from qlib.model.ens.ensemble import RollingEnsemble
from qlib.model.trainer import TrainerR, task_train
from qlib.utils import init_instance_by_config
from qlib.workflow import R
from qlib.workflow.online.manager import OnlineManager
from qlib.workflow.online.strategy import RollingStrategy
from qlib.workflow.online.update import LabelUpdater, PredUpdater
from qlib.workflow.online.utils import OnlineToolR
from qlib.workflow.record_temp import MultiPassPortAnaRecord, PortAnaRecord
from qlib.workflow.task.collect import RecorderCollector
from qlib.workflow.task.gen import RollingGen, task_generator
from qlib.workflow.task.utils import list_recorders
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, STAGE, TOKENIZER, finetune, make_dataset, make_model

from kronos_qlib.cli import main

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


PORTFOLIO = {
    "strategy": {
        "class": "TopkDropoutStrategy",
        "module_path": "qlib.contrib.strategy",
        "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1},
    },
    "backtest": {
        "start_time": "2018-06-18",
        "end_time": "2018-07-30",
        "account": 1e8,
        "benchmark": "DEMOINDEX",
        "exchange_kwargs": {"freq": "day", "deal_price": "close", "limit_threshold": 0.095},
    },
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


@pytest.mark.parametrize(
    ("kind", "settings", "stage"),
    [
        ("KronosModel", {"forecast": FORECAST, "finetune": finetune(Path("out/{task}"), tokenizer=None)}, "predictor"),
        ("KronosRanker", {"ranker": {"output_dir": "out/{train_end}-{task}", "epochs": 2}}, "ranker"),
    ],
)
def test_rolled_tasks_lie_side_by_side_and_start_from_the_one_before(
    store, tmp_path, monkeypatch, warnings_logged, kind, settings, stage
):
    (tmp_path / "mlflow.db").symlink_to(Path("mlflow.db").resolve())
    monkeypatch.chdir(tmp_path)
    settings = copy.deepcopy(settings)
    options = next(iter(value for value in settings.values() if "output_dir" in value))
    options["start_from"] = "previous"
    (options if stage == "ranker" else options["predictor"])["next_epochs"] = 1
    early, late = task_generator(task(kind, **settings), RollingGen(step=10, rtype=RollingGen.ROLL_EX))[:2]
    trainer = TrainerR(experiment_name=f"previous of {kind}")
    trainer.train([late, early, late])  # the first time there is none before it
    known = {path.parents[1]: json.loads(path.read_text()) for path in Path("out").glob(f"*/{stage}/identity.json")}
    (begun,) = (folder for folder, values in known.items() if "start" in values)
    former = Path(known[begun]["start"])
    ends = {folder: values["dates"]["train"][1] for folder, values in known.items()}
    assert len(known) == 3 and ends[former] == min(ends.values()) < ends[begun]
    epochs = {folder: values["settings.epochs"] for folder, values in known.items()}
    assert epochs.pop(begun) == 1 and set(epochs.values()) == {2}
    options["start_from"] = str(begun)
    early["model"]["kwargs"] |= settings
    with pytest.raises(ValueError, match="holds no finished training of such networks whose dates end before"):
        init_instance_by_config(early["model"]).job(init_instance_by_config(early["dataset"]))
    assert "goes into" not in warnings_logged.text


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


def test_online_models_are_updated_to_the_later_date(store):
    early = task(forecast=FORECAST)
    early["dataset"]["kwargs"]["segments"]["test"] = ["2018-06-18", "2018-07-06"]
    recorder, tool = task_train(early, experiment_name="online"), OnlineToolR("online")
    tool.reset_online_tag(recorder)
    tool.update_online_pred(to_date="2018-07-31")
    (online,) = tool.online_models()
    found = online.load_object("pred.pkl")["score"].sort_index()
    pd.testing.assert_series_equal(found, make_model().predict(make_dataset()), check_exact=True, check_freq=False)


def test_an_online_manager_simulates_rolling_tasks(store):
    template = task(forecast=FORECAST)
    template["dataset"]["kwargs"]["segments"]["test"] = ["2018-06-18", "2018-06-29"]
    strategy = RollingStrategy("simulated", template, RollingGen(step=10))
    manager = OnlineManager(strategy, TrainerR(), begin_time="2018-06-29")
    signals = manager.simulate(end_time="2018-07-18")
    tests = [
        recorder.load_object("task")["dataset"]["kwargs"]["segments"]["test"]
        for recorder in list_recorders("simulated").values()
    ]
    assert sorted(str(start.date()) for start, _ in tests) == ["2018-06-18", "2018-07-02", "2018-07-16"]
    days = signals.index.get_level_values("datetime")
    assert days.min() == pd.Timestamp("2018-06-18") and days.max() == pd.Timestamp("2018-07-27")
    assert signals.groupby("datetime").mean().abs().max() < 1e-9, "Qlib standardises the scores of a day"


def test_qlibs_rolling_runs_our_workflow_files(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"task": task(forecast=FORECAST), "qlib_init": {"region": "cn"}}
    config["qlib_init"]["exp_manager"] = {"class": "MLflowExpManager", "module_path": "qlib.workflow.expm"}
    config["qlib_init"]["exp_manager"]["kwargs"] = {"uri": "sqlite:///mlflow.db", "default_exp_name": "Experiment"}
    model = config["task"].pop("model")
    config["task"]["dataset"]["kwargs"]["segments"]["train"][0] = "2018-01-03"  # Qlib counts from the second session
    for name in ("SigAnaRecord", "ForecastRecord"):
        place = "kronos_qlib.workflow.records" if name == "ForecastRecord" else "qlib.workflow.record_temp"
        kwargs = {"model": "<MODEL>", "dataset": "<DATASET>"} if name == "ForecastRecord" else {}
        config["task"]["record"].append({"class": name, "module_path": place, "kwargs": kwargs})
    Path("base.yaml").write_text(yaml.safe_dump(config))
    own = {"BASE_CONFIG_PATH": "base.yaml", "task": {"model": model}}
    own["qlib_init"] = {"provider_uri": '{{ NOWHERE | default("' + str(store) + '", true) }}'}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    assert main(["workflow", "--flat", "own.yaml"]) == 0
    rolling = Rolling("own_flat.yaml", exp_name="joined", horizon=1, step=12, rolling_exp="parts")
    rolling.run()
    parts = RecorderCollector("parts", artifacts_path={"pred": "pred.pkl"})()["pred"]
    joined = R.get_recorder(recorder_id=rolling._rid, experiment_name="joined")
    found = joined.load_object("pred.pkl")["score"]
    assert len(parts) == 3 and found.equals(RollingEnsemble()(parts)["score"])
    found = found.loc[:"2018-07-31"]  # Qlib's last task goes on to the end of its step
    pd.testing.assert_series_equal(found, make_model().predict(make_dataset()), check_exact=True, check_freq=False)
    assert np.isfinite(joined.list_metrics()["Rank IC"])


def test_ties_are_shuffled_over_several_backtests(store, run):
    labels = run.dataset.prepare("test", col_set="label")
    with R.start(experiment_name="ties"):
        recorder = R.get_recorder()
        R.save_objects(**{"pred.pkl": run.scores.to_frame("score").round(2), "label.pkl": labels})
        record = MultiPassPortAnaRecord(recorder, pass_num=2, config=PORTFOLIO)
        record.generate()
    table = recorder.load_object("portfolio_analysis/multi_pass_port_analysis_1day.pkl")
    assert np.isfinite(table[["mean", "std"]].to_numpy()).all() and len(table) == 4
    assert (table["std"] > 0).all(), table


@pytest.mark.skipif(int(version("plotly").split(".")[0]) > 6, reason="qlib.contrib.report needs plotly 6 or older")
def test_qlib_draws_its_report_figures_of_our_recorders(store, run):
    from qlib.contrib.report import analysis_model, analysis_position

    with R.start(experiment_name="figures"):
        recorder = R.get_recorder()
        labels = run.dataset.prepare("test", col_set="label")
        R.save_objects(**{"pred.pkl": run.scores.to_frame("score"), "label.pkl": labels})
        PortAnaRecord(recorder, config=PORTFOLIO).generate()
    report, positions, analysis = (
        recorder.load_object(f"portfolio_analysis/{name}_1day.pkl")
        for name in ("report_normal", "positions_normal", "port_analysis")
    )
    scores = recorder.load_object("pred.pkl")
    frame = scores.join(recorder.load_object("label.pkl").iloc[:, 0].rename("label"), how="inner")
    by_name = frame.swaplevel().sort_index()
    labels = by_name[["label"]]
    quiet = {"show_notebook": False}
    figures = {
        "model_performance": analysis_model.model_performance_graph(frame, **quiet),
        "score_ic": analysis_position.score_ic_graph(by_name, **quiet),
        "report": analysis_position.report_graph(report, **quiet),
        "risk_analysis": analysis_position.risk_analysis_graph(analysis, report, **quiet),
        "cumulative_return": analysis_position.cumulative_return_graph(positions, report, labels, **quiet),
        "rank_label": analysis_position.rank_label_graph(positions, labels, **quiet),
    }
    assert all(figures.values())
    assert all(figure.data for drawn in figures.values() for figure in drawn)

"""Stock `qrun` runs a Kronos workflow from the file to the backtest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from qlib.workflow import R
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, STAGE, TOKENIZER, use_market

pytestmark = pytest.mark.slow

BASE = Path(__file__).parents[2] / "workflows" / "base_demo.yaml"
SIGNAL = {"pred.pkl", "label.pkl"}
STRATEGY = {
    "class": "TopkDropoutStrategy",
    "module_path": "qlib.contrib.strategy",
    "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1},
}


def workflow(market: Path, folder: Path, **model) -> Path:
    """A tiny workflow over the demo workflows' base: other networks, dates and portfolio size, the same records."""
    base = yaml.safe_load(BASE.read_text())
    records = base["task"]["record"]
    (backtest,) = [record["kwargs"]["config"] for record in records if record["class"] == "PortAnaRecord"]
    backtest["strategy"] = STRATEGY
    backtest["backtest"] |= {"start_time": "2018-06-18", "end_time": "2018-07-27"}
    stage = STAGE | {"epochs": 1}
    settings = {
        "tokenizer": TOKENIZER,
        "model": MODEL,
        "finetune": {"output_dir": "out", "tokenizer": stage, "predictor": stage},
        "forecast": {"sample_count": 2},
        "seed": 1,
    }
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"end_time": "2018-08-13"}}
    config = {
        "BASE_CONFIG_PATH": str(BASE),
        "experiment_name": "tiny",
        "qlib_init": {"provider_uri": str(market), "kernels": 1},
        "task": {
            "model": {"class": "KronosModel", "module_path": "kronos_qlib", "kwargs": settings | model},
            "dataset": {
                "class": "KLineDataset",
                "module_path": "kronos_qlib",
                "kwargs": {"lookback": LOOKBACK, "horizon": HORIZON, "segments": SEGMENTS, "handler": handler},
            },
            "record": records,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def qrun(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlib.cli.run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=300)


def test_qrun_ends_with_scores_their_analysis_and_a_backtest(market, database, tmp_path, monkeypatch):
    shutil.copy(database, tmp_path)
    done = qrun(workflow(market, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    use_market(market)
    (recorder,) = R.list_recorders(experiment_name="tiny").values()
    assert recorder.info["status"] == "FINISHED"
    artifacts = set(recorder.list_artifacts())
    assert "forecast_evaluation/steps.csv" in recorder.list_artifacts("forecast_evaluation")
    assert SIGNAL | {"params.pkl", "dataset", "kronos_run.json", "sig_analysis", "portfolio_analysis"} <= artifacts
    assert "sig_analysis/ic.pkl" in recorder.list_artifacts("sig_analysis")
    assert "portfolio_analysis/report_normal_1day.pkl" in recorder.list_artifacts("portfolio_analysis")

    scores, label = recorder.load_object("pred.pkl"), recorder.load_object("label.pkl")
    assert list(scores.columns) == ["score"] and scores["score"].notna().all()
    assert scores.index.isin(label.index).all()
    days = scores.index.get_level_values("datetime")
    assert (str(days.min().date()), str(days.max().date())) == tuple(SEGMENTS["test"])
    report = recorder.load_object("portfolio_analysis/report_normal_1day.pkl")
    assert len(report) > 20 and report["turnover"].sum() > 0 and report["bench"].abs().sum() > 0
    metrics = recorder.list_metrics()
    assert {"IC", "Rank IC", "1day.excess_return_with_cost.information_ratio", "predictor.val_loss"} <= set(metrics)
    assert np.isfinite(metrics["IC"])
    assert (tmp_path / "out" / "predictor" / "best" / "model.safetensors").is_file(), "relative to where qrun was run"

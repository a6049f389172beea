"""Two finished runs on a small market, of a KronosModel and of LightGBM, which many tests score another date with."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from qlib.model.trainer import task_train
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, TOKENIZER, use_market

from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.live.run import LiveRun, open_run

DATE = pd.Timestamp("2018-07-18")
STRATEGY = {
    "class": "TopkDropoutStrategy",
    "module_path": "qlib.contrib.strategy",
    "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1, "hold_thresh": 2},
}
EXCHANGE = {"freq": "day", "deal_price": "open", "limit_threshold": 0.095, "open_cost": 0.001, "close_cost": 0.002}
BACKTEST = {
    "start_time": "2018-06-19",
    "end_time": "2018-07-30",
    "account": 1_000_000,
    "benchmark": "DEMOINDEX",
    "exchange_kwargs": EXCHANGE | {"min_cost": 5},
}
RECORDS = [
    {"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"},
    {
        "class": "PortAnaRecord",
        "module_path": "qlib.workflow.record_temp",
        "kwargs": {"config": {"strategy": STRATEGY, "backtest": BACKTEST}},
    },
    {"class": "SigAnaRecord", "module_path": "qlib.workflow.record_temp", "kwargs": {"ana_long_short": False}},
]


def kronos_task() -> dict:
    networks = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": 1}
    model = networks | {"forecast": {"sample_count": 2, "temperature": 1.0}}
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "demo"}}
    dataset = {"handler": handler, "segments": SEGMENTS, "lookback": LOOKBACK, "horizon": HORIZON}
    return {
        "model": {"class": "KronosModel", "module_path": "kronos_qlib", "kwargs": model},
        "dataset": {"class": "KLineDataset", "module_path": "kronos_qlib", "kwargs": dataset},
        "record": RECORDS,
    }


def lightgbm_task() -> dict:
    """LightGBM on a few columns of Qlib's own handler, whose label is normalised by a processor."""
    loader = {
        "class": "QlibDataLoader",
        "kwargs": {
            "config": {
                "feature": (["$close/Ref($close,1)-1", "Mean($close,5)/$close", "Std($close,9)/$close"], list("abc")),
                "label": (["Ref($close,-2)/Ref($close,-1)-1"], ["LABEL0"]),
            }
        },
    }
    processors = [{"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}}]
    processors[0]["kwargs"] |= {"fit_start_time": SEGMENTS["train"][0], "fit_end_time": SEGMENTS["train"][1]}
    handler = {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
        "kwargs": {
            "instruments": "demo",
            "data_loader": loader,
            "infer_processors": processors,
            "learn_processors": [{"class": "DropnaLabel"}],
        },
    }
    return {
        "model": {
            "class": "LGBModel",
            "module_path": "qlib.contrib.model.gbdt",
            "kwargs": {"num_threads": 1, "min_data_in_leaf": 5, "verbosity": -1},
        },
        "dataset": {
            "class": "DatasetH",
            "module_path": "qlib.data.dataset",
            "kwargs": {"handler": handler, "segments": SEGMENTS},
        },
        "record": RECORDS,
    }


@dataclass(frozen=True)
class Place:
    """A folder with mlflow.db, two finished runs in it, and a store of the bars."""

    folder: Path
    store: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def open(self, name: str, store: Path | None = None) -> LiveRun:
        found = open_run(name, self.uri, store or self.store)
        logging.getLogger("qlib").setLevel(logging.INFO)
        return found


def make_runs(folder: Path) -> Place:
    """Run both in a folder that has an mlflow.db, which is the working directory."""
    store = write_demo_market(folder / "market", instruments=8, days=160, seed=3)
    use_market(store)
    for name, task in (("kronos", kronos_task()), ("lightgbm", lightgbm_task())):
        task_train(copy.deepcopy(task), experiment_name=name)
    return Place(folder, store)


def bars_file(store: Path, instrument: str, field: str) -> Path:
    return store / "features" / instrument.lower() / f"{field}.day.bin"


def change_bars(store: Path, instrument: str, field: str, first: pd.Timestamp, values: float | None) -> None:
    """Set a field from a session on; None cuts the file there."""
    path, calendar = bars_file(store, instrument, field), (store / "calendars/day.txt").read_text().split()
    content = np.fromfile(path, "<f4")
    row = calendar.index(str(first.date())) - int(content[0]) + 1
    if values is None:
        content = content[:row]
    else:
        content[row:] *= values
    content.tofile(path)

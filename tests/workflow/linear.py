"""A workflow of a linear regression on three features, which a test fits in a moment."""

from pathlib import Path
from typing import Any

import yaml
from tampering import LAST_DAY

LABEL = "Ref($close, -2)/Ref($close, -1) - 1"
FEATURES = ["$close/Ref($close, 5) - 1", "$close/Ref($close, 20) - 1", "$volume/Mean($volume, 10)"]
SEGMENTS = {
    "train": ["2018-01-02", "2018-05-04"],
    "valid": ["2018-05-07", LAST_DAY],
    "test": ["2018-07-11", "2018-07-31"],
}


def mlflow_uri() -> str:
    """The working directory's database by its whole path, by which MLflow keeps what it has opened."""
    return f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def write(market: Path, folder: Path, model: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write base.yaml and linear.yaml above it into a folder; return linear.yaml.

    changes: of the segments, the dataset and the further records.
    """
    segments, records = changes.get("segments", SEGMENTS), changes.get("records", [])
    folder.mkdir(exist_ok=True)
    loader = {
        "class": "QlibDataLoader",
        "module_path": "qlib.data.dataset.loader",
        "kwargs": {"config": {"feature": [FEATURES, ["A", "B", "C"]], "label": [[LABEL], ["LABEL0"]]}},
    }
    handler = {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
        "kwargs": {
            "instruments": "demo",
            "start_time": "2018-01-02",
            "end_time": "2018-08-13",
            "data_loader": loader,
            "infer_processors": [
                {
                    "class": "RobustZScoreNorm",
                    "kwargs": {
                        "fields_group": "feature",
                        "fit_start_time": segments["train"][0],
                        "fit_end_time": segments["train"][1],
                    },
                },
                {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
            ],
        },
    }
    manager = {"class": "MLflowExpManager", "module_path": "qlib.workflow.expm"}
    manager["kwargs"] = {"uri": mlflow_uri(), "default_exp_name": "Experiment"}
    dataset = {"class": "DatasetH", "module_path": "qlib.data.dataset"}
    record = {"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"}
    record["kwargs"] = {"model": "<MODEL>", "dataset": "<DATASET>"}
    base = {
        "qlib_init": {"region": "cn", "kernels": 1, "logging_level": 30, "exp_manager": manager},
        "task": {
            "dataset": dataset | {"kwargs": {"handler": handler, "segments": segments} | changes.get("dataset", {})},
            "record": [record, *records],
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    own = {"class": "LinearModel", "module_path": "qlib.contrib.model.linear"}
    own["kwargs"] = {"estimator": "ridge", "alpha": 1.0, "fit_intercept": True}
    config = {"BASE_CONFIG_PATH": "base.yaml", "experiment_name": "linear", "task": {"model": own | (model or {})}}
    text = "# A comment that stays.\n" + yaml.safe_dump(config)
    text += f"qlib_init: {{provider_uri: '{{{{ NOWHERE | default(\"{market}\", true) }}}}'}}\n"
    (folder / "linear.yaml").write_text(text)
    return folder / "linear.yaml"

"""A market, a dataset and networks so small that a whole run takes a second."""

from pathlib import Path
from typing import Any

import numpy as np
import qlib
from networks import MODEL, TOKENIZER

from kronos_qlib import KLineDataset, KLineHandler, KronosModel

# The demo market of conftest.py: 160 business days from 2018-01-02, to 2018-08-13.
SEGMENTS = {
    "train": ["2018-01-02", "2018-04-30"],
    "valid": ["2018-05-01", "2018-06-15"],
    "test": ["2018-06-18", "2018-07-31"],
}
LOOKBACK, HORIZON = 10, 3
STAGE = {
    "epochs": 2,
    "windows_per_epoch": 96,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "log_every": 2,
    "valid_windows": 64,
}


def use_market(folder: Path | dict[str, str]) -> None:
    """Point Qlib, which is global, at a market or folders by frequency, its recorders at mlflow.db where we are."""
    qlib.init(
        provider_uri=folder if isinstance(folder, dict) else str(folder),
        region="cn",
        kernels=1,
        logging_level=30,
        clear_mem_cache=True,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {"uri": f"sqlite:///{Path.cwd() / 'mlflow.db'}", "default_exp_name": "Experiment"},
        },
    )


def make_dataset(**changes: Any) -> KLineDataset:
    handler = changes.pop("handler", None) or KLineHandler(changes.pop("instruments", "demo"))
    return KLineDataset(
        **{"handler": handler, "segments": SEGMENTS, "lookback": LOOKBACK, "horizon": HORIZON} | changes
    )


def make_model(**changes: Any) -> KronosModel:
    """New tiny networks, not trained; `forecast` is laid over the forecast's settings, the rest replaces."""
    forecast = {"sample_count": 2, "temperature": 1.0} | changes.pop("forecast", {})
    settings = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": 1}
    return KronosModel(**settings | {"forecast": forecast} | changes)


def finetune(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "checkpoint_every": 4, "tokenizer": STAGE, "predictor": STAGE} | changes


def weights(network: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in network.state_dict().items()}


def same_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)

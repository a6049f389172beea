"""Kronos, the foundation model for K-lines, as a first-class citizen of Qlib."""

from importlib import import_module
from typing import Any

_HOME = {
    "Kronos": "nn.model",
    "KronosTokenizer": "nn.tokenizer",
    "KronosPredictor": "forecast.predictor",
    "KronosModel": "workflow.model",
    "KLineHandler": "data.handler",
    "KLineDataset": "data.dataset",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `kronos-qlib --help` need not load torch and Qlib."""
    if name not in _HOME:
        raise AttributeError(f"module 'kronos_qlib' has no attribute {name!r}")
    return getattr(import_module(f"kronos_qlib.{_HOME[name]}"), name)

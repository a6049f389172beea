"""Kronos, the foundation model for K-lines, as a first-class citizen of Qlib."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kronos_qlib.data.dataset import KLineDataset as KLineDataset
    from kronos_qlib.data.handler import KLineHandler as KLineHandler
    from kronos_qlib.forecast.predictor import KronosPredictor as KronosPredictor
    from kronos_qlib.nn.model import Kronos as Kronos
    from kronos_qlib.nn.tokenizer import KronosTokenizer as KronosTokenizer
    from kronos_qlib.workflow.kronos_factors import Alpha158Kronos as Alpha158Kronos
    from kronos_qlib.workflow.kronos_factors import KronosFactors as KronosFactors
    from kronos_qlib.workflow.model import KronosModel as KronosModel
    from kronos_qlib.workflow.ranker import KronosRanker as KronosRanker

_MODULES = {
    "Kronos": "nn.model",
    "KronosTokenizer": "nn.tokenizer",
    "KronosPredictor": "forecast.predictor",
    "KronosModel": "workflow.model",
    "KronosRanker": "workflow.ranker",
    "KronosFactors": "workflow.kronos_factors",
    "Alpha158Kronos": "workflow.kronos_factors",
    "KLineHandler": "data.handler",
    "KLineDataset": "data.dataset",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `kronos-qlib --help` need not load torch and Qlib."""
    if name not in _MODULES:
        raise AttributeError(f"module 'kronos_qlib' has no attribute {name!r}")
    return getattr(import_module(f"kronos_qlib.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted({*globals(), *_MODULES})

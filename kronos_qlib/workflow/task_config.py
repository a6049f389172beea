"""Reads and changes the configuration of a task: labels, frequency, horizon, output folders; for tuning and rolling."""

import random
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from qlib.utils import get_callable_kwargs


def label_expressions(handler: Mapping[str, Any]) -> list[str] | None:
    """Return the label expressions of a handler's configuration or of its class; None if it tells none."""
    kwargs = handler.get("kwargs") or {}
    loader = kwargs.get("data_loader")
    kind, _ = get_callable_kwargs(handler)
    default = signature(kind).parameters.get("label")
    if "label" in kwargs:
        labels = kwargs["label"]
    elif isinstance(loader, Mapping):
        config = (loader.get("kwargs") or {}).get("config")
        labels = config.get("label") if isinstance(config, Mapping) else None
    elif hasattr(kind, "get_label_config"):
        labels = kind.get_label_config(object.__new__(kind))
    else:
        labels = None if default is None or default.default is Parameter.empty else default.default
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], (list, tuple)):
        labels = labels[0]  # expressions and names
    return [labels] if isinstance(labels, str) else list(labels) if labels else None


def bar_freq(handler: Mapping[str, Any]) -> str:
    """Return the frequency of the bars that a handler's configuration names, itself or in its loader."""
    kwargs = handler.get("kwargs") or {}
    loader = kwargs.get("data_loader")
    within = (loader.get("kwargs") or {}).get("freq") if isinstance(loader, Mapping) else None
    return kwargs.get("freq") or within or "day"


def horizon_of(dataset: Mapping[str, Any]) -> int:
    """Return how many bars a dataset's training windows have ahead of them; 0 for a dataset without a horizon."""
    kind, kwargs = get_callable_kwargs(dataset)
    default = signature(kind).parameters.get("horizon")
    return int(kwargs.get("horizon", 0 if default is None else default.default))


def replaced(configuration: Any, values: Mapping[str, Any]) -> Any:
    """Copy a configuration, with other values wherever one of these keys is set; null stays null."""
    if isinstance(configuration, Mapping):
        return {
            key: values[key] if key in values and value is not None else replaced(value, values)
            for key, value in configuration.items()
        }
    if isinstance(configuration, (list, tuple)):
        return [replaced(value, values) for value in configuration]
    return configuration


def output_dirs(configuration: Any, key: str) -> list[tuple[str, str]]:
    """Find the output_dir settings of a configuration, by dotted key: a workflow of other settings needs others."""
    if not isinstance(configuration, Mapping):
        return []
    found = [pair for name, value in configuration.items() for pair in output_dirs(value, f"{key}.{name}")]
    own = configuration.get("output_dir")
    return [*found, (f"{key}.output_dir", own)] if isinstance(own, str) else found


def seed_generators(seed: int) -> None:
    """Seed the global generators, for models that draw from them: a fit must not depend on those before it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)

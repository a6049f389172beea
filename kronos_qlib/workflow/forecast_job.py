"""Forecast windows as the settings of a KronosModel say: the task, how it is executed, what the recorder gets of it."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.windows import Windows
from kronos_qlib.extensions import identify
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.forecaster import choose_batch_size
from kronos_qlib.forecast.ray_cluster import require_ray
from kronos_qlib.forecast.run import Execution, forecast
from kronos_qlib.forecast.task import Task, future_stamps
from kronos_qlib.hardware.device import process_count, resolve_device, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.workflow.recording import record_metrics, record_tags
from kronos_qlib.workflow.settings import ModelSettings


def forecast_windows(
    tokenizer: KronosTokenizer,
    model: Kronos,
    settings: ModelSettings,
    dataset: KLineDataset,
    windows: Windows,
    columns: Sequence[str],
) -> dict[str, np.ndarray]:
    """Forecast windows of a dataset; those in `forecast.cache_dir` are read there.

    The active recorder gets the seconds, the number of windows and of those resumed as metrics `forecast.*`, and as the
    tag `forecast.digest` the name of the folder in `cache_dir` that holds these forecasts.

    Returns:
        The columns by name, in the order of the windows; see `kronos_qlib.forecast.run.forecast`.
    """
    task = forecast_task(tokenizer, model, settings, dataset, windows)
    started = time.perf_counter()
    result = forecast(task, resolve_execution(settings), columns)
    figures = {"seconds": time.perf_counter() - started, "windows": len(windows), "resumed": result.resumed}
    record_metrics({f"forecast.{name}": value for name, value in figures.items()}, None)
    record_tags({"forecast.digest": task.digest})
    return result.columns


def forecast_task(
    tokenizer: KronosTokenizer, model: Kronos, settings: ModelSettings, dataset: KLineDataset, windows: Windows
) -> Task:
    """Return all that decides the forecasts of some windows: networks, windows, settings."""
    options, device, batch_size = settings.forecast, resolve_device(settings.device), settings.forecast.batch_size
    if batch_size == "auto":
        shape = dataset.lookback, dataset.horizon, options.sample_count
        batch_size = choose_batch_size(model.config, *shape, device)
    return Task(
        tokenizer=tokenizer,
        model=model,
        windows=windows,
        future_stamp=future_stamps(windows, dataset.horizon, dataset.calendar.stamps_after),
        sampling=sampling_of(settings),
        max_context=settings.max_context,
        batch_size=batch_size,
        dtype=resolve_dtype(settings.dtype, device),
        device=device,
        keep_paths=options.keep_paths or settings.calibration is not None,
    )


def sampling_of(settings: ModelSettings) -> Sampling:
    """Return how paths are drawn."""
    options = settings.forecast
    return Sampling(
        sample_count=options.sample_count,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=settings.seed,
        s2_rotation=options.s2_rotation,
        anchor=options.anchor,
        sampling=options.sampling,
        filter=None if options.filter is None else identify(options.filter),
    )


def resolve_execution(settings: ModelSettings) -> Execution:
    """Return how forecasts are executed on this machine; nothing in it decides a score.

    Raises:
        ValueError: more processes than GPUs, or a cache_dir that cannot be written.
        ModuleNotFoundError: `engine: ray` without Ray.
    """
    options, on_ray = settings.forecast, settings.forecast.engine == "ray"
    processes = process_count("KronosModel: forecast", options.processes, resolve_device(settings.device))
    if on_ray:
        require_ray()
    cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
    if cache_dir is not None:
        existing = next(folder for folder in (cache_dir, *cache_dir.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"KronosModel: forecast.cache_dir: {cache_dir} cannot be made or written: see {existing}")
    return Execution(cache_dir, 1 if on_ray else processes, options.engine)

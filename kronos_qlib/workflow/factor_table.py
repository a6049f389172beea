"""Kronos' factors of a workflow: what they will take, and their table as a Parquet file for other tools."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import qlib
import torch
from qlib.data.dataset import DatasetH
from qlib.utils import init_instance_by_config

from kronos_qlib.files import whole_file
from kronos_qlib.forecast.chunk_store import ChunkStore
from kronos_qlib.forecast.embedding import Embedder
from kronos_qlib.forecast.forecaster import Forecaster
from kronos_qlib.forecast.run import EMBEDDING_CHUNK, forecast_chunk_size
from kronos_qlib.workflow.findings import Finding, one_line
from kronos_qlib.workflow.kronos_factors import KronosFactors, factor_loaders, without_data
from kronos_qlib.workflow.workflow_file import read_workflow

PROVENANCE = b"kronos_qlib.factors"  # key of the Parquet file's metadata; its value is JSON


class FactorTable:
    """The factors of a workflow file whose handler has a `KronosFactors`, with Qlib initialised.

    Raises:
        ValueError, FileNotFoundError: one line, for a file that is no such workflow, and for what its parts refuse.
    """

    def __init__(self, workflow: Path, start: str | None = None, end: str | None = None) -> None:
        config = read_workflow(workflow)
        self.name = config.get("experiment_name", workflow.stem)
        dataset = without_data(config["task"]["dataset"])
        if dataset is config["task"]["dataset"]:
            raise ValueError(f"{workflow}: task.dataset has no handler with KronosFactors, such as Alpha158Kronos")
        qlib.init(**config["qlib_init"])
        self.dataset: DatasetH = init_instance_by_config(dataset)
        handler = self.dataset.handler
        self.loader = factor_loaders(handler.data_loader)[0]
        self.range = handler.instruments, start or handler.start_time, end or handler.end_time

    def findings(self) -> Iterator[Finding]:
        """Yield what `write` would compute, and how long it takes."""
        return factor_findings(self.loader, *self.range, self.dataset.segments)

    def write(self, path: Path) -> pa.Table:
        """Compute the factors and write them to a whole file; return what was written.

        Columns: datetime, instrument, the factors (float32). The metadata hold under `kronos_qlib.factors` settings,
        weights' digests, data and versions as JSON, and for pandas that the first two are the index.
        """
        frame = self.loader.load(*self.range)["feature"]
        table = pa.Table.from_pandas(frame)
        table = table.select([*frame.index.names, *frame.columns])
        provenance = json.dumps(self.loader.loaded, indent=2, default=str).encode()
        table = table.replace_schema_metadata({**table.schema.metadata, PROVENANCE: provenance})
        with whole_file(path) as draft:
            pq.write_table(table, draft, compression="zstd")
        return table


def read_provenance(path: Path) -> dict[str, Any]:
    """Return what the factors of a file of `FactorTable.write` are made of."""
    return json.loads(pq.read_schema(path).metadata[PROVENANCE])


def factor_findings(
    loader: KronosFactors, instruments: Any, start: Any, end: Any, segments: dict[str, Any]
) -> Iterator[Finding]:
    """Say what a load of factors computes, what of it the cache has and how long the rest takes; find what is odd.

    A few windows are computed to take the time; nothing is written.
    """
    settings = loader.settings
    cautions = list(loader.cautions())
    for name in ("tokenizer", "model"):
        network = getattr(loader, name)
        text = f"{network.n_parameters:,} parameters, {network.source or 'a new network, random weights'}"
        yield Finding("ok" if network.source else "warning", f"factors {name}", text)
    yield from (Finding("warning", "factors", text) for text in cautions if "is new" not in text)
    if settings.pca is not None and segments.get("valid"):
        last, valid = settings.pca.fit[1], segments["valid"][0]
        if valid is None or last >= np.datetime64(valid):
            text = f"pca.fit ends on {last.date()}; it must end before segment 'valid' begins, on {valid}"
            yield Finding("error", "factors", text)
    try:
        work = loader.work(instruments, start, end)
    except (ValueError, OSError) as error:
        yield Finding("error", "factors", one_line(error))
        return
    count = f"{len(loader.names)} factors of {len(work.windows):,} windows of {settings.lookback} bars"
    yield Finding("ok", "factors", f"{count}, of {len(set(work.windows.instruments))} instruments")
    read = loader.embedding_task(work.read)
    fit = f", {len(work.fit):,} of them to fit the PCA on" if work.fit is not None else ""
    store = ChunkStore(loader.cache_dir, read, read.schema) if loader.cache_dir else None
    sample = np.arange(min(len(read), 4 * torch.get_num_threads() * 32))
    took = _time(store, EMBEDDING_CHUNK, len(read), sample, lambda: Embedder(read).table)
    yield Finding("ok", "factors, one pass", f"{len(read):,} windows{fit}; {took}")
    if settings.forecast is not None:
        task = loader.forecast_task(work)
        store = ChunkStore(loader.cache_dir, task) if loader.cache_dir else None
        threads = torch.get_num_threads() if task.device.type == "cpu" else 1
        sample, size = np.arange(min(len(task), task.batch_size * threads)), forecast_chunk_size(task, 1)
        took = _time(store, size, len(task), sample, lambda: Forecaster(task).table)
        paths = f"{task.sampling.sample_count} samples × {task.horizon} bars"
        yield Finding("ok", "factors, forecasts", f"{len(task):,} windows × {paths}; {took}")
    if loader.cache_dir is None:
        yield Finding("warning", "factors", "cache_dir is null: a run that is killed begins anew")
    seen = loader.seen_dates(work.windows)
    if seen:
        yield Finding("warning", "factors", seen)


def _time(
    store: ChunkStore | None, size: int, windows: int, sample: np.ndarray, make: Callable[[], Callable[..., pa.Table]]
) -> str:
    """Say how many windows the cache has, and estimate from a sample how long the others take."""
    cached = sum(len(rows) for rows, _ in store.read(size)) if store else 0
    if cached == windows:
        return "all in the cache"
    table = make()
    table(sample)  # the first time is slower
    started = time.perf_counter()
    table(sample)
    rate = len(sample) / (time.perf_counter() - started)
    return f"{cached:,} in the cache, the others some {_duration((windows - cached) / rate)} ({rate:,.0f} windows/s)"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"

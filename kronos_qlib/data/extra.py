"""Adds training windows of other universes, of the Qlib store in use or of other stores."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import qlib
from pydantic import BeforeValidator, Field
from qlib.config import C
from qlib.log import get_module_logger

from kronos_qlib.data.calendar import DAY, is_intraday, range_end
from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.dates import Date
from kronos_qlib.data.handler import KLineHandler, check_universe
from kronos_qlib.data.join_windows import drop_unused_bars, join_windows
from kronos_qlib.data.windows import Normalisation, Windows
from kronos_qlib.data.windows_on_disk import map_windows, save_windows
from kronos_qlib.extensions import at_home
from kronos_qlib.settings import Settings


class ExtraData(Settings):
    """An entry of `finetune.extra_data`: a universe to train on, on the dates of the dataset's train segment."""

    instruments: Annotated[Any, BeforeValidator(check_universe)]
    """As of `KLineHandler`."""
    provider_uri: str | None = Field(default=None, min_length=1)
    """Its Qlib store; null: the one in use."""
    region: Literal["cn", "us", "tw"] | None = None
    """Of that store; null: the one in use."""
    freq: str | None = Field(default=None, pattern=r"^(day|1week|\d*min)$")
    """Frequency of its bars; null: the dataset's."""
    amount: Literal["auto", "amount", "vwap", "ohlc"] = "auto"
    """As of `KLineHandler`."""
    start_time: Date = None
    """As of `KLineHandler`."""


def training_set(
    own: Windows,
    dataset: KLineDataset,
    extras: Sequence[ExtraData],
    folder: Path,
    setting: str = "finetune.extra_data",
) -> Windows:
    """Join the dataset's own training windows and then those of every extra universe, each window once.

    Args:
        own: `dataset.training_windows("train")`, returned as they are if there is no extra data. Their bars come first,
            see `join_windows`.
        folder: gets a folder for each extra that is in another store. Only one process at a time may use it.
        setting: the key of the extra data, for messages.

    Raises:
        ValueError (FileNotFoundError for a missing store): one line that names the key of the extra data.
    """
    logger = get_module_logger("KronosTrainer")
    keys = [f"{setting}[{i}]" for i in range(len(extras))]
    _check_stores(extras, keys, dataset.handler.freq)  # before the first of them is read, which takes time
    sources = [("", own)]
    for i, (extra, key, store) in enumerate(zip(extras, keys, _store_names(extras, dataset.handler.freq))):
        windows = extra_windows(extra, dataset, folder / str(i), key)
        sources.append((store, windows))
        logger.info(f"{key}: {len(windows):,} windows of {extra.instruments!r}{f' of {store}' if store else ''}")
    train = join_windows(sources)
    if extras:
        logger.info(f"training set: {len(own):,} windows of the dataset and {len(train) - len(own):,} others")
    return train


def extra_windows(extra: ExtraData, dataset: KLineDataset, folder: Path, key: str) -> Windows:
    """Select windows of another universe over the train segment of `dataset`, with its lookback, horizon,
    normalisation and columns, and its rule for bars without volume.

    No bar after the segment's end is read; a train segment without an end ends with the dataset's data. Qlib has one
    store in a process, so another store is read by a process of its own, which saves the windows in `folder`; they are
    mapped from there. Nothing is written to a store.

    Args:
        key: of the extra data, for messages.

    Raises:
        ValueError: what `KLineHandler` or `KLineDataset` refuse. FileNotFoundError: there is no such store.
    """
    freq = extra.freq or dataset.handler.freq
    start, end = _train_segment(dataset, freq)
    selection = {
        "instruments": extra.instruments,
        "start_time": extra.start_time,
        "freq": freq,
        "amount": extra.amount,
        "volume": dataset.handler.data_loader.volume,
        "prices": dataset.handler.prices,
        "columns": {name: at_home(column) for name, column in dataset.handler.data_loader.columns.items()},
        "conditions": dict(dataset.handler.data_loader.conditions),
        "segment": [start, end],
        "lookback": dataset.lookback,
        "horizon": dataset.horizon,
        "normalisation": dataset.normalisation,
    }
    store = _other_store(extra, freq)
    if store is None:
        try:
            return _select_windows(**selection)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    _check_stores([extra], [key], dataset.handler.freq)
    qlib_init = {"provider_uri": str(store), "region": extra.region or C["region"]}
    qlib_init |= {"kernels": C.get_kernels(freq), "logging_level": C["logging_level"]}
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    request = {"qlib": qlib_init, "folder": str(folder), "selection": selection}
    _run_reader(request, folder, f"{key} (provider_uri {store})")
    return map_windows(folder)["train"]


def _select_windows(
    instruments: Any,
    start_time: Any,
    freq: str,
    amount: str,
    volume: str,
    prices: str,
    columns: Mapping[str, Any],
    conditions: Mapping[str, str],
    segment: Sequence[Any],
    lookback: int,
    horizon: int,
    normalisation: Normalisation,
) -> Windows:
    """Select the training windows of a segment from the store in use, on no more bars than they need."""
    # A label that looks ahead would read bars after the end.
    handler = KLineHandler(
        instruments, start_time, segment[1], freq, "$close", amount, volume, prices, columns, conditions
    )
    dataset = KLineDataset(handler, {"train": segment}, lookback, horizon, normalisation=normalisation)
    windows = dataset.training_windows("train")
    dataset.warn_of_left_out(windows)
    return drop_unused_bars(windows)


def _train_segment(dataset: KLineDataset, freq: str) -> tuple[pd.Timestamp | None, pd.Timestamp]:
    """Return the train segment for bars of `freq`, which are all complete at its end."""
    start, end = dataset.segments["train"]
    if end is None:
        end = dataset.handler.dates[-1]
    if is_intraday(dataset.handler.freq) and not is_intraday(freq) and end < range_end(end.normalize(), "min"):
        end = end.normalize() - DAY  # the bar of a day that is not over
    return start, range_end(end, freq)


def _other_store(extra: ExtraData, freq: str) -> Path | None:
    """Return the folder of the extra data's store, or None if it is the one in use for `freq`."""
    if extra.provider_uri is None:
        return None
    folder = Path(extra.provider_uri).expanduser().resolve()
    in_use = C.dpm.provider_uri
    uri = in_use.get(freq, in_use.get(C.DEFAULT_FREQ))
    return None if uri is not None and Path(uri).expanduser().resolve() == folder else folder


def _check_stores(extras: Sequence[ExtraData], keys: Sequence[str], freq: str) -> None:
    """Check that the other stores exist; a FileNotFoundError names the key of the first that does not."""
    for extra, key in zip(extras, keys):
        store = _other_store(extra, extra.freq or freq)
        if store is not None and not store.is_dir():
            raise FileNotFoundError(f"{key}: there is no Qlib store at {store}; correct its provider_uri")


def _store_names(extras: Sequence[ExtraData], freq: str) -> list[str]:
    """Return what to call the store of each extra universe, "" for the dataset's own bars.

    It is the folder's name, or all of the path if two stores' folders have the same name, and the frequency if it is
    not the dataset's.
    """
    stores = [_other_store(extra, extra.freq or freq) for extra in extras]
    folders = [store.name for store in {*stores} if store is not None]
    names = []
    for extra, store in zip(extras, stores):
        name = [] if store is None else [store.name if folders.count(store.name) == 1 else str(store)]
        name += [extra.freq] if extra.freq not in (None, freq) else []
        names.append("/".join(name))
    return names


def _run_reader(request: Mapping[str, Any], folder: Path, title: str) -> None:
    """Run `_serve_request` in a new process; its warnings and log go to this one's stderr.

    Raises:
        ValueError: the process refused the request or broke down; the message begins with `title`.
    """
    # It imports what this process does, whatever lies in the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    ended = subprocess.run(
        [sys.executable, "-m", "kronos_qlib.data.extra"],
        input=json.dumps(request, default=str),
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )
    if ended.returncode:
        raise ValueError(
            f"{title}: the process that reads this store ended with exit status {ended.returncode}; "
            "see what it printed before"
        )
    error = json.loads(ended.stdout)["error"]
    if error is not None:
        raise ValueError(f"{title}: {error}")


def _serve_request() -> None:
    """Read a request from stdin, save its windows in its folder, and write the error, or null, to stdout.

    Both are JSON. Whatever else is printed goes to stderr.
    """
    request, error = json.load(sys.stdin), None
    with redirect_stdout(sys.stderr):
        try:
            qlib.init(**request["qlib"])
            save_windows(Path(request["folder"]), {"train": _select_windows(**request["selection"])})
        except (ValueError, OSError) as refusal:
            error = str(refusal)
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    _serve_request()

"""Extra training data: the train segment of other universes, of the store in use or of another one."""

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

from kronos_qlib.data.calendar import end_of, is_intraday
from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.dates import Date
from kronos_qlib.data.handler import KLineHandler, universe
from kronos_qlib.data.join_windows import join, trim
from kronos_qlib.data.windows import Windows
from kronos_qlib.data.windows_on_disk import map_windows, save_windows
from kronos_qlib.settings import Settings

DAY = pd.Timedelta(days=1)


class ExtraData(Settings):
    """One entry of `finetune.extra_data`: a universe to train on beside the dataset's own.

    instruments, start_time, amount: as of `KLineHandler`; the score dates are those of the dataset's train segment.
    provider_uri: the Qlib store; null is the one in use. region: that store's; null is the one in use.
    freq: null is the dataset's.
    """

    instruments: Annotated[Any, BeforeValidator(universe)]
    provider_uri: str | None = Field(default=None, min_length=1)
    region: Literal["cn", "us", "tw"] | None = None
    freq: str | None = Field(default=None, pattern=r"^(day|\d*min)$")
    amount: Literal["auto", "amount", "vwap", "ohlc"] = "auto"
    start_time: Date = None


def training_set(
    own: Windows,
    dataset: KLineDataset,
    extras: Sequence[ExtraData],
    folder: Path,
    where: str = "finetune.extra_data",
) -> Windows:
    """The dataset's own training windows and then those of every extra universe, each window once (see `join`).

    Args:
        own: `dataset.training_windows("train")`; what is returned if there is no extra data. Its bars come first.
        folder: gets a folder for each extra that is in another store. Only one process at a time may use it.
        where: the key of the extra data, for messages.

    Raises:
        ValueError (FileNotFoundError for a missing store): one line that names the key of the extra data.
    """
    logger = get_module_logger("KronosTrainer")
    keys = [f"{where}[{i}]" for i in range(len(extras))]
    _check_stores(extras, keys, dataset.handler.freq)  # before any of them takes its time
    parts = [("", own)]
    for i, (extra, key, store) in enumerate(zip(extras, keys, _labels(extras, dataset.handler.freq))):
        parts.append((store, extra_windows(extra, dataset, folder / str(i), key)))
        logger.info(f"{key}: {len(parts[-1][1]):,} windows of {extra.instruments!r}{f' of {store}' if store else ''}")
    joined = join(parts)
    if extras:
        logger.info(f"training set: {len(own):,} windows of the dataset and {len(joined) - len(own):,} others")
    return joined


def extra_windows(extra: ExtraData, dataset: KLineDataset, folder: Path, where: str) -> Windows:
    """Windows of another universe over the train segment of `dataset`, with its lookback and horizon.

    No bar after the segment's end is read; a train segment without an end ends with the dataset's data. Qlib has one
    store per process, so another store is read by a process of its own, which leaves the windows in `folder`; they
    are mapped from there. Stores are only read.

    Args:
        where: the key of the extra data, for messages.

    Raises:
        ValueError: what `KLineHandler` or `KLineDataset` refuse. FileNotFoundError: there is no such store.
    """
    freq = extra.freq or dataset.handler.freq
    start, end = _train_segment(dataset, freq)
    task = {
        "instruments": extra.instruments,
        "start_time": extra.start_time,
        "freq": freq,
        "amount": extra.amount,
        "segment": [start, end],
        "lookback": dataset.lookback,
        "horizon": dataset.horizon,
    }
    store = _other_store(extra, freq)
    if store is None:
        try:
            return _windows(**task)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    _check_stores([extra], [where], dataset.handler.freq)
    options = {"provider_uri": str(store), "region": extra.region or C["region"]}
    options |= {"kernels": C.get_kernels(freq), "logging_level": C["logging_level"]}
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _run_child({"qlib": options, "folder": str(folder), "task": task}, folder, f"{where} (provider_uri {store})")
    return map_windows(folder)["train"]


def _windows(
    instruments: Any,
    start_time: Any,
    freq: str,
    amount: str,
    segment: Sequence[Any],
    lookback: int,
    horizon: int,
) -> Windows:
    """The training windows of a segment from the store in use, on no more bars than they need."""
    # A label that looks ahead would read bars after the end.
    handler = KLineHandler(instruments, start_time, segment[1], freq, label="$close", amount=amount)
    return trim(KLineDataset(handler, {"train": segment}, lookback, horizon).training_windows("train"))


def _train_segment(dataset: KLineDataset, freq: str) -> tuple[pd.Timestamp | None, pd.Timestamp]:
    """The train segment for bars of `freq`: they are all complete at its end."""
    start, end = dataset.segments["train"]
    if end is None:
        end = dataset.handler.dates[-1]
    if is_intraday(dataset.handler.freq) and not is_intraday(freq) and end < end_of(end.normalize(), "min"):
        end = end.normalize() - DAY  # the bar of a day that is not over
    return start, end_of(end, freq)


def _other_store(extra: ExtraData, freq: str) -> Path | None:
    """The folder of the extra data's store, None if it is the one in use for `freq`."""
    if extra.provider_uri is None:
        return None
    folder = Path(extra.provider_uri).expanduser().resolve()
    in_use = C.dpm.provider_uri
    uri = in_use.get(freq, in_use.get(C.DEFAULT_FREQ))
    return None if uri is not None and Path(uri).expanduser().resolve() == folder else folder


def _check_stores(extras: Sequence[ExtraData], keys: Sequence[str], freq: str) -> None:
    for extra, key in zip(extras, keys):
        store = _other_store(extra, extra.freq or freq)
        if store is not None and not store.is_dir():
            raise FileNotFoundError(f"{key}: there is no Qlib store at {store}; correct its provider_uri")


def _labels(extras: Sequence[ExtraData], freq: str) -> list[str]:
    """What to call the store of each extra universe, "" for the dataset's own bars.

    It is the folder's name, all of the path if two stores' folders have the same name, and the frequency if it is
    not the dataset's.
    """
    stores = [_other_store(extra, extra.freq or freq) for extra in extras]
    names = [store.name for store in {*stores} if store is not None]
    labels = []
    for extra, store in zip(extras, stores):
        parts = [] if store is None else [store.name if names.count(store.name) == 1 else str(store)]
        parts += [extra.freq] if extra.freq not in (None, freq) else []
        labels.append("/".join(parts))
    return labels


def _run_child(order: Mapping[str, Any], folder: Path, where: str) -> None:
    """Have a new process do what `_child` does; its warnings and log go to this one's stderr.

    Raises ValueError with its error.
    """
    # It imports what this process does, whatever lies in the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "kronos_qlib.data.extra"],
        input=json.dumps(order, default=str),
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )
    if done.returncode:
        raise ValueError(
            f"{where}: the process that reads this store ended with exit status {done.returncode}; "
            "what it printed before tells why"
        )
    error = json.loads(done.stdout)["error"]
    if error is not None:
        raise ValueError(f"{where}: {error}")


def _child() -> None:
    """Read an order from stdin, leave the windows in its folder, and say on stdout what is wrong with it, if anything.

    Both are JSON. Whatever else is printed goes to stderr.
    """
    order, error = json.load(sys.stdin), None
    with redirect_stdout(sys.stderr):
        try:
            qlib.init(**order["qlib"])
            save_windows(Path(order["folder"]), {"train": _windows(**order["task"])})
        except (ValueError, OSError) as problem:
            error = str(problem)
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    _child()

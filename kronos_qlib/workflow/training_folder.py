"""Where a training goes, by the `output_dir` of its settings, and the former training whose weights it starts from."""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from qlib.log import get_module_logger

from kronos_qlib.data.windows import Windows
from kronos_qlib.nn.checkpoint import WEIGHTS_FILE, HubModule, digest_of_weights
from kronos_qlib.settings import Settings
from kronos_qlib.train.fingerprint import (
    DATES,
    EXECUTION,
    FROM_FORMER,
    describe_dates,
    digest_of_windows,
    read_dates,
    read_finished,
)
from kronos_qlib.train.settings import PLACES

logger = get_module_logger("KronosModel")
PREVIOUS = "previous"
AnySettings = TypeVar("AnySettings", bound=Settings)


def training_folder(
    owner: str,
    output_dir: Path,
    settings: Settings,
    networks: Mapping[str, HubModule],
    train: Windows,
    valid: Windows,
    seed: int,
    targets: Sequence[np.ndarray] = (),
) -> Path:
    """Return the folder of a training: `output_dir` with its places filled in.

    An `output_dir` without places that holds a training on other dates, as when Qlib rolls a task on, gives a folder in
    it that is named by the training's dates, with a warning of the owner.

    Args:
        networks: those that learn, by the name of their stage, with the weights that they begin with.
        targets: labels of the windows, where they are learned.
    """
    dates = describe_dates(train, valid)
    if _has_places(output_dir):
        values = {"train_start": dates["train"][0], "train_end": dates["train"][1]}
        if "{task}" in str(output_dir):
            values["task"] = _digest(settings, networks, train, valid, seed, targets)
        text = str(output_dir)
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        return Path(text)
    for stage in networks:
        theirs = read_dates(output_dir / stage)
        if theirs is not None and theirs != dates:
            own = output_dir / "_".join(dates["train"])
            logger.warning(
                f"{owner}: {output_dir} holds a training on {' … '.join(theirs['train'])}; this one, on "
                f"{' … '.join(dates['train'])}, goes into {own}"
            )
            return own
    return output_dir


def load_former_weights(
    owner: str,
    start_from: str | None,
    output_dir: Path,
    networks: Mapping[str, HubModule],
    train: Windows,
    valid: Windows,
) -> Path | None:
    """Give networks the best weights of the training that `start_from` names, and return its folder; None for none.

    `previous` is the newest finished training beside this one, of networks of the same shape, whose training and
    validation dates end before this one's: a training never starts from weights that know later bars than itself.

    Raises:
        ValueError: the folder that `start_from` names holds no such training.
    """
    if start_from is None:
        return None
    dates = describe_dates(train, valid)
    if start_from == PREVIOUS:
        found = [(theirs, folder) for folder in _siblings(output_dir) if (theirs := _former(folder, networks, dates))]
        if not found:
            logger.info(
                f"{owner}: start_from: no earlier training beside {output_dir}; it starts as tokenizer and model"
            )
            return None
        theirs, folder = max(found)
    else:
        folder = Path(start_from)
        theirs = _former(folder, networks, dates)
        if theirs is None:
            raise ValueError(
                f"{owner}: start_from: {folder} holds no finished training of such networks whose dates end before "
                f"{dates['train'][1]} (train) and not after {dates['valid'][1]} (valid)"
            )
    for stage, network in networks.items():
        network.load_weights(folder / stage / "best" / WEIGHTS_FILE)
    logger.info(f"{owner}: starts from the weights of {folder}, trained to {theirs[0]}")
    return folder


def next_settings(stage: AnySettings) -> AnySettings:
    """Return a stage's settings as they are for a training from former weights."""
    values = {key: getattr(stage, f"next_{key}") for key in ("epochs", "learning_rate")}
    return stage.model_copy(update={key: value for key, value in values.items() if value is not None})


def fixed_part(output_dir: str) -> Path:
    """Return an `output_dir` up to its first part with a place."""
    parts = Path(output_dir).parts
    first = next((number for number, part in enumerate(parts) if _has_places(part)), len(parts))
    return Path(*parts[:first])


def _has_places(output_dir: Path | str) -> bool:
    return any(f"{{{name}}}" in str(output_dir) for name in PLACES)


def _siblings(output_dir: Path) -> Sequence[Path]:
    """List the folders in which trainings of the same `output_dir` lie."""
    if not _has_places(output_dir):
        return [output_dir, *output_dir.glob("*_*")]
    root, pattern = fixed_part(str(output_dir)), str(output_dir)
    for name in PLACES:
        pattern = pattern.replace(f"{{{name}}}", "*")
    return list(root.glob(str(Path(pattern).relative_to(root))))


def _former(
    folder: Path, networks: Mapping[str, HubModule], dates: Mapping[str, Sequence[str]]
) -> tuple[str, str, str] | None:
    """Return the last dates of a folder's training, and its name, if that can be started from; else None."""
    ends = []
    for stage, network in networks.items():
        found = read_finished(folder / stage)
        shape = json.loads(json.dumps({f"network.{key}": value for key, value in network.config.items()}, default=str))
        if found is None or DATES not in found or not (folder / stage / "best" / WEIGHTS_FILE).exists():
            return None
        if shape != {key: value for key, value in found.items() if key.startswith("network.")}:
            return None
        train_end, valid_end = found[DATES]["train"][1], found[DATES]["valid"][1]
        if train_end >= dates["train"][1] or valid_end > dates["valid"][1]:
            return None
        ends.append((train_end, valid_end, folder.name))
    return max(ends)


def _digest(
    settings: Settings,
    networks: Mapping[str, HubModule],
    train: Windows,
    valid: Windows,
    seed: int,
    targets: Sequence[np.ndarray],
) -> str:
    """Return a digest of what decides a training: settings, initial weights, windows, labels and seed."""
    what = [_decisive(settings.model_dump()), seed, train.normalisation_identity]
    what += [[name, digest_of_weights(network)] for name, network in networks.items()]
    what += [f"{len(each)} {each.lookback} {each.future} {digest_of_windows(each)}" for each in (train, valid)]
    digest = blake2b(json.dumps(what, sort_keys=True, default=_plain).encode(), digest_size=5)
    for labels in targets:
        digest.update(labels.tobytes())
    return digest.hexdigest()


def _decisive(settings: Any) -> Any:
    """Leave out what changes no weight, of a mapping and those in it."""
    if not isinstance(settings, Mapping):
        return settings
    left_out = {*EXECUTION, *FROM_FORMER, "log_every"}
    return {key: _decisive(value) for key, value in settings.items() if key not in left_out}


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Settings) else str(value)

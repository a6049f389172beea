"""The fingerprint of a training: all that decides its result, so that a folder is resumed only by its own training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from kronos_qlib.data.windows import Windows
from kronos_qlib.extensions import identity_of
from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import digest_of_weights
from kronos_qlib.train.checkpoints import CHECKPOINTS, RESULT_FILE, newest_progress, whole_checkpoints
from kronos_qlib.train.stages import StageSpecification

FILE = "identity.json"
DATES = "dates"  # of the windows, for people and for `read_dates`: the digests below tell trainings apart
START = "start"  # the folder whose weights a training began with; the weights themselves are told by their digest
NEEDLESS = ("settings.log_every", DATES, START)  # change no weight and no choice of weights
# Of a ranker's settings: where, by how many and how safely it is trained, and how many others are. Of all: what is of
# a training from former weights, whose own epochs and learning rate these are.
EXECUTION = "output_dir", "processes", "max_restarts", "checkpoint_every", "ensemble"
FROM_FORMER = "start_from", "next_epochs", "next_learning_rate"
EPOCHS, VALID_WINDOWS = "settings.epochs", "settings.valid_windows"
CONTINUED = "continued"  # of a training whose epochs were raised: those before, and the step at which it went on
BARS_AT_ONCE = 65_536


def fingerprint(specification: StageSpecification) -> dict[str, object]:
    """Describe what decides the result: two trainings of equal fingerprints and micro-batches give equal weights.

    The micro-batch size that `micro_batch_size: auto` comes to depends on the machine; a training keeps it when it is
    resumed. The device is left out: a training may go on elsewhere, where it rounds differently.
    """
    stage = specification.stage
    settings = stage.settings.model_dump(exclude={*EXECUTION, *FROM_FORMER})
    if isinstance(settings.get("loss"), dict):  # a class of the user's own, wherever its file lies
        settings["loss"] = identity_of(settings["loss"])
    values: dict[str, object] = {f"settings.{key}": value for key, value in settings.items()}
    values |= {f"network.{key}": value for key, value in stage.network.config.items()}
    values |= {"micro_batch_size": specification.micro_batch_size, "compile": specification.compile}
    values |= {"seed": specification.seed, "dtype": str(specification.dtype)}
    values |= {"initial weights": digest_of_weights(stage.network)}
    if stage.frozen_tokenizer is not None:
        values["tokenizer weights"] = digest_of_weights(stage.frozen_tokenizer)
        if stage.frozen_tokenizer.own_quantizer is not None:
            values["tokenizer quantizer"] = identity_of(stage.frozen_tokenizer.own_quantizer)
    for name, windows in (("training windows", specification.train), ("validation windows", specification.valid)):
        values[name] = f"{len(windows)} × ({windows.lookback} + {windows.future}) {digest_of_windows(windows)}"
    if specification.train.normalisation != "unit_free":
        values["normalisation"] = specification.train.normalisation_identity
    values[DATES] = describe_dates(specification.train, specification.valid)
    if specification.start is not None:
        values[START] = specification.start
    if specification.draw_weights is not None:
        digest = hashlib.blake2b(specification.draw_weights.tobytes(), digest_size=16)
        values["window weights (half_life_days, reweighter)"] = digest.hexdigest()
    for name, targets in (("train", specification.train_targets), ("valid", specification.valid_targets)):
        if targets is not None:
            values[f"{name} labels"] = hashlib.blake2b(targets.tobytes(), digest_size=16).hexdigest()
    return json.loads(json.dumps(values, default=str))


def claim_folder(folder: Path, values: dict[str, object]) -> list[str]:
    """Write a training's fingerprint into its folder; one without a checkpoint has nothing to lose and is taken over.

    A training in the folder is the same if it differs only in `log_every`; in `valid_windows` after its end; or in
    `epochs`, of which there are now more: then it goes on from its last checkpoint.

    Returns:
        Such changes in words.

    Raises:
        ValueError: the folder holds another training; the message names every key that differs. Or it has checkpoints
            and no fingerprint, or more epochs would change the tokenizer of a training beside it.
    """
    differences, changes = compare(folder, values)
    if whole_checkpoints(folder / CHECKPOINTS):
        if differences is None:
            raise ValueError(
                f"{folder} has checkpoints but no {FILE} to say of what training; choose another output_dir"
            )
        if differences:
            raise ValueError(
                f"{folder} holds another training ({differences}); choose another output_dir or remove that one"
            )
        if EPOCHS in changes:
            values = values | {CONTINUED: _go_on(folder, values)}
    if differences != "" or changes:
        with whole_file(folder / FILE) as draft:
            draft.write_text(json.dumps(values, indent=2) + "\n")
    return list(changes.values())


def compare(folder: Path, values: dict[str, object]) -> tuple[str | None, dict[str, str]]:
    """Compare a training with the one in a folder.

    Returns:
        The keys in which it is another training, with their values: "" for none, None if the folder has no fingerprint.
        And the changes by key, in words, with which it is the same.

    Raises:
        ValueError: the folder has checkpoints and its fingerprint is damaged.
    """
    theirs = _read(folder)
    if theirs is None:
        return None, {}
    differing = [key for key in {**values, **theirs} if values.get(key) != theirs.get(key)]
    pairs = {
        key: f"{key}: {theirs.get(key)!r} there, {values.get(key)!r} now"
        for key in differing
        if key not in (*NEEDLESS, CONTINUED)
    }
    changes = {}
    if VALID_WINDOWS in pairs and EPOCHS not in pairs and (folder / RESULT_FILE).exists():
        changes[VALID_WINDOWS] = pairs.pop(VALID_WINDOWS)
    if EPOCHS in pairs and isinstance(theirs.get(EPOCHS), int) and values[EPOCHS] > theirs[EPOCHS]:
        changes[EPOCHS] = pairs.pop(EPOCHS)
    return "; ".join([*pairs.values(), *(changes.values() if pairs else ())]), changes


def describe_dates(train: Windows, valid: Windows) -> dict[str, list[str]]:
    """Return the first and the last score date of the training and of the validation windows."""
    return {
        name: [str(np.datetime_as_string(date, "D")) for date in (windows.dates.min(), windows.dates.max())]
        for name, windows in (("train", train), ("valid", valid))
    }


def read_dates(folder: Path) -> dict[str, list[str]] | None:
    """Read the dates of the training whose checkpoints are in a stage's folder; None without one, or without dates."""
    return (_read(folder) or {}).get(DATES) if whole_checkpoints(folder / CHECKPOINTS) else None


def read_finished(folder: Path) -> dict[str, Any] | None:
    """Read the fingerprint of the training in a stage's folder if that has ended, else None."""
    return _read(folder) if (folder / RESULT_FILE).exists() else None


def _go_on(folder: Path, values: dict[str, object]) -> list[list[int]]:
    """Take back that a training has ended, and return at which steps, after how many epochs, it has gone on."""
    theirs = _read(folder) or {}
    for path in folder.parent.glob(f"*/{FILE}"):
        follows = "tokenizer weights" in (_read(path.parent) or {}) and "tokenizer weights" not in values
        if follows and whole_checkpoints(path.parent / CHECKPOINTS):
            raise ValueError(
                f"{folder}: epochs {theirs[EPOCHS]} → {values[EPOCHS]} would change the tokenizer, and {path.parent} "
                "holds a training on the former one; choose another output_dir or remove that one"
            )
    (folder / RESULT_FILE).unlink(missing_ok=True)
    progress = newest_progress(folder / CHECKPOINTS)
    return [*theirs.get(CONTINUED, []), [theirs[EPOCHS], progress.step if progress else 0]]


def _read(folder: Path) -> dict[str, Any] | None:
    """Read a folder's fingerprint; one that is damaged is none if the folder has no checkpoints to lose."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict):
            return values
        problem = "it holds no mapping"
    except (OSError, ValueError) as error:
        problem = str(error)
    if whole_checkpoints(folder / CHECKPOINTS):
        raise ValueError(
            f"{path}: damaged ({problem}): it says of what training the checkpoints are; choose another output_dir"
        )
    return None


def digest_of_windows(windows: Windows) -> str:
    """Digest the bars that are in any of the windows, and the windows' instruments and dates."""
    edges = np.zeros(len(windows.bars) + 1, np.int64)
    np.add.at(edges, windows.ends - windows.lookback + 1, 1)
    np.add.at(edges, windows.ends + windows.future + 1, -1)
    used = edges[:-1].cumsum() > 0
    digest = hashlib.blake2b(windows.keys.tobytes(), digest_size=16)
    for array in (windows.bars.values, windows.bars.stamp):
        for start in range(0, len(array), BARS_AT_ONCE):
            rows = slice(start, start + BARS_AT_ONCE)
            digest.update(array[rows][used[rows]].tobytes())
    return digest.hexdigest()

"""The fingerprint of a training: all that decides its result, so that a folder is resumed only by its own training."""

import hashlib
import json
from pathlib import Path

import numpy as np

from kronos_qlib.data.windows import Windows
from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import digest_of_weights
from kronos_qlib.train.checkpoints import CHECKPOINTS, whole_checkpoints
from kronos_qlib.train.stages import StageSpecification

FILE = "identity.json"
BARS_AT_ONCE = 65_536


def fingerprint(specification: StageSpecification) -> dict[str, object]:
    """Describe what decides the result: two trainings of equal fingerprints and micro-batches give equal weights.

    The micro-batch size that `micro_batch_size: auto` comes to depends on the machine; a training keeps it when it is
    resumed. The device is left out: a training may go on elsewhere, where it rounds differently.
    """
    stage = specification.stage
    values: dict[str, object] = {f"settings.{key}": value for key, value in stage.settings.model_dump().items()}
    values |= {f"network.{key}": value for key, value in stage.network.config.items()}
    values |= {"micro_batch_size": specification.micro_batch_size, "compile": specification.compile}
    values |= {"seed": specification.seed, "dtype": str(specification.dtype)}
    values |= {"initial weights": digest_of_weights(stage.network)}
    if stage.frozen_tokenizer is not None:
        values["tokenizer weights"] = digest_of_weights(stage.frozen_tokenizer)
    for name, windows in (("training windows", specification.train), ("validation windows", specification.valid)):
        values[name] = f"{len(windows)} × ({windows.lookback} + {windows.future}) {digest_of_windows(windows)}"
    if specification.draw_weights is not None:
        digest = hashlib.blake2b(specification.draw_weights.tobytes(), digest_size=16)
        values["window weights (half_life_days, reweighter)"] = digest.hexdigest()
    return json.loads(json.dumps(values, default=str))


def claim_folder(folder: Path, values: dict[str, object]) -> None:
    """Write a training's fingerprint into its folder; one without a checkpoint has nothing to lose and is taken over.

    Raises:
        ValueError: the folder holds another training; the message names every key that differs. Or it has checkpoints
            and no fingerprint.
    """
    differences, begun = describe_differences(folder, values), whole_checkpoints(folder / CHECKPOINTS)
    if differences is None and begun:
        raise ValueError(f"{folder} has checkpoints but no {FILE} to say of what training; choose another output_dir")
    if differences and begun:
        raise ValueError(
            f"{folder} holds another training ({differences}); choose another output_dir or remove that one"
        )
    if differences != "":
        with whole_file(folder / FILE) as draft:
            draft.write_text(json.dumps(values, indent=2) + "\n")


def describe_differences(folder: Path, values: dict[str, object]) -> str | None:
    """Name the keys in which a folder's training differs: "" for none, None if the folder has no fingerprint."""
    path = folder / FILE
    if not path.exists():
        return None
    theirs = json.loads(path.read_text())
    differing = [key for key in {**values, **theirs} if values.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {theirs.get(key)!r} there, {values.get(key)!r} now" for key in differing)


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

"""What decides the result of a training, so that a folder is resumed only by the training it holds."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from kronos_qlib.data.windows import Windows
from kronos_qlib.files import whole_file
from kronos_qlib.nn.checkpoint import digest_of_weights
from kronos_qlib.train.checkpoints import CHECKPOINTS, finished
from kronos_qlib.train.stages import PredictorStage, Stage

FILE = "identity.json"
DIGESTED_AT_ONCE = 65_536  # bars


def identity_of(
    stage: Stage,
    train: Windows,
    valid: Windows,
    seed: int,
    dtype: torch.dtype,
    weights: np.ndarray | None = None,
    micro_batch_size: int | str = "auto",
    compiled: bool = False,
) -> dict[str, object]:
    """What decides the result of a training: two runs of equal identities, in the same parts, give equal weights.

    The size of the parts under `micro_batch_size: auto` follows from the machine. A training keeps to it when resumed.
    The device is not in it: a training may go on elsewhere, where it is rounded otherwise.
    """
    settings = stage.settings.model_dump()
    identity: dict[str, object] = {f"settings.{key}": value for key, value in settings.items()}
    identity |= {f"network.{key}": value for key, value in stage.network.config.items()}
    identity |= {"micro_batch_size": micro_batch_size, "compile": compiled, "seed": seed, "dtype": str(dtype)}
    identity |= {"initial weights": digest_of_weights(stage.network)}
    if isinstance(stage, PredictorStage):
        identity["tokenizer weights"] = digest_of_weights(stage.tokenizer)
    for name, windows in (("training windows", train), ("validation windows", valid)):
        identity[name] = f"{len(windows)} × ({windows.lookback} + {windows.future}) {digest_of_windows(windows)}"
    if weights is not None:
        identity["window weights (half_life_days, reweighter)"] = hashlib.blake2b(
            weights.tobytes(), digest_size=16
        ).hexdigest()
    return json.loads(json.dumps(identity, default=str))


def claim(folder: Path, identity: dict[str, object]) -> None:
    """Make the folder this training's own; one that has not come to a checkpoint has nothing to lose.

    Raises:
        ValueError: it holds another; the message names every key that differs. Or nothing says which it holds.
    """
    found, begun = differences(folder, identity), finished(folder / CHECKPOINTS)
    if found is None and begun:
        raise ValueError(f"{folder} has checkpoints but no {FILE} to say of what training; choose another output_dir")
    if found and begun:
        raise ValueError(f"{folder} holds another training ({found}); choose another output_dir or remove that one")
    if found is None or found:
        with whole_file(folder / FILE) as draft:
            draft.write_text(json.dumps(identity, indent=2) + "\n")


def differences(folder: Path, identity: dict[str, object]) -> str | None:
    """In what a folder's training differs, in words: "" in nothing, None if there is no training."""
    path = folder / FILE
    if not path.exists():
        return None
    theirs = json.loads(path.read_text())
    differing = [key for key in {**identity, **theirs} if identity.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {theirs.get(key)!r} there, {identity.get(key)!r} now" for key in differing)


def digest_of_windows(windows: Windows) -> str:
    """A digest of the bars in any of the windows, and of the windows' instruments and dates."""
    edges = np.zeros(len(windows.bars) + 1, np.int64)
    np.add.at(edges, windows.ends - windows.lookback + 1, 1)
    np.add.at(edges, windows.ends + windows.future + 1, -1)
    used = edges[:-1].cumsum() > 0
    digest = hashlib.blake2b(windows.keys.tobytes(), digest_size=16)
    for rows in (windows.bars.values, windows.bars.stamp):
        for start in range(0, len(rows), DIGESTED_AT_ONCE):
            block = slice(start, start + DIGESTED_AT_ONCE)
            digest.update(rows[block][used[block]].tobytes())
    return digest.hexdigest()

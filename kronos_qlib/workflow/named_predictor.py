"""A `KronosPredictor` by the name of its networks: of the zoo, or of a folder; as `kronos-qlib forecast` takes it."""

import json
import re
from pathlib import Path

from kronos_qlib.forecast.calibration import Calibration
from kronos_qlib.forecast.predictor import KronosPredictor
from kronos_qlib.nn import Kronos, KronosTokenizer, zoo
from kronos_qlib.train.fingerprint import FILE


def load_predictor(
    name: str, device: str | None = "cpu", calibration: Calibration | None = None
) -> tuple[KronosPredictor, str]:
    """Load the networks of a name of the zoo or of a folder, and say what they are.

    Args:
        name: nano, mini, small, base, or a folder: tokenizer/ and model/, or a training.
        device, calibration: see `KronosPredictor`.

    Raises:
        ValueError: no such networks, or the calibration is of others; one line.
    """
    entry, folder = zoo.MODELS.get(name), Path(name)
    if entry is not None and entry.tokenizer is not None and entry.trained_until is not None:
        sources: tuple[str | Path, str | Path] = entry.tokenizer, name
    elif folder.is_dir():
        places = [(folder / "tokenizer", folder / "model"), (folder / "tokenizer/best", folder / "predictor/best")]
        found = next((pair for pair in places if all(place.is_dir() for place in pair)), None)
        if found is None:
            raise ValueError(f"--model {name}: the folder has no tokenizer/ and model/, nor a training's best/ of both")
        sources = found
    else:
        known = [known for known, entry in zoo.MODELS.items() if entry.trained_until is not None]
        raise ValueError(f"--model {name!r} is neither a folder nor one of {', '.join(known)}")
    tokenizer, model = KronosTokenizer.from_pretrained(sources[0]), Kronos.from_pretrained(sources[1])
    note = f"Model: {name}, {model.n_parameters:,} parameters."
    if entry is not None and entry.trained_until is not None:
        note += f" Trained on bars up to {entry.trained_until}: what it says of earlier days it may have seen."
    if name == "nano":
        note += f" {zoo.SHIPPED_NOTE}."
    context = entry.max_context if entry is not None and entry.max_context else _trained_context(folder) or 512
    # nano did better with an anchor on its validation segment; docs/forecasting.md
    anchor = name == "nano" if calibration is None else calibration.identity.anchor
    note += " Its paths are measured from the last bar as it decodes it (anchor)." if anchor else ""
    predictor = KronosPredictor(
        model, tokenizer, device, context, s2_rotation="aligned", anchor=anchor, calibration=calibration
    )
    return predictor, note


def most_lookback(predictor: KronosPredictor, horizon: int) -> int:
    """Return how many bars the network sees beside so many to come, within the windows that it was trained on."""
    return max(predictor.max_context - horizon, predictor.max_context // 2)


def _trained_context(folder: Path) -> int | None:
    """Read from a training's folder how many bars the windows had that it was trained on; None for another folder."""
    try:
        identity = json.loads((folder / "predictor" / FILE).read_text(encoding="utf-8"))
        found = re.search(r"× \((\d+) \+ (\d+)\)", str(identity["training windows"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(found[1]) + int(found[2]) - 1 if found else None  # the last bar is only a target

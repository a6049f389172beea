"""Saves windows on disk, from where any number of processes map them into memory: one copy for all of them."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from kronos_qlib.data.windows import Bars, Windows
from kronos_qlib.files import save_array, whole_file

WINDOWS_FILE = "windows.json"
_DTYPES = {"values": "<f4", "stamp": "|i1", "dates": "<M8[ns]", "offsets": "<i8"}
_SETTINGS = ("lookback", "future", "clip", "normalisation")


def save_windows(folder: Path, windows: Mapping[str, Windows]) -> None:
    """Write windows that share one `Bars` object, by name, as .npy files and a manifest, which is written last.

    A folder that holds exactly these already is left as it is. Files are replaced, never changed: a process that has
    mapped a file keeps what it mapped. Only one process at a time may write to a folder.

    Raises ValueError if the windows do not share one `Bars` object.
    """
    if len({id(each.bars) for each in windows.values()}) != 1:
        raise ValueError(f"the windows for {folder} ({', '.join(windows) or 'none'}) do not share one Bars object")
    bars = next(iter(windows.values())).bars
    arrays = {name: np.ascontiguousarray(getattr(bars, name), dtype) for name, dtype in _DTYPES.items()}
    arrays |= {_ends(name): np.ascontiguousarray(each.ends, "<i8") for name, each in windows.items()}
    manifest: dict[str, Any] = {
        "windows": {name: {key: getattr(each, key) for key in _SETTINGS} for name, each in windows.items()},
        "arrays": {name: {"dtype": array.dtype.str, "shape": array.shape} for name, array in arrays.items()},
        "instruments": bars.instruments,
        "columns": bars.columns,
    }
    manifest["digest"] = _digest(manifest, arrays)
    if _holds(folder, manifest["digest"]):
        return
    (folder / WINDOWS_FILE).unlink(missing_ok=True)  # until it is written again the folder is not whole
    for name, array in arrays.items():
        save_array(_file(folder, name), array)
    with whole_file(folder / WINDOWS_FILE) as draft:
        draft.write_text(json.dumps(manifest) + "\n")


def map_windows(folder: Path) -> dict[str, Windows]:
    """Map the windows of a folder by name, on read-only arrays that the operating system loads as they are read.

    Raises FileNotFoundError for a missing file and ValueError for one that is damaged, cut short or of another shape
    than in the manifest; both are one line and name the file. Values are not checked.
    """
    manifest = _read_manifest(folder)
    arrays = {name: _map(_file(folder, name), **kind) for name, kind in manifest["arrays"].items()}
    names = tuple(manifest["instruments"]), tuple(manifest["columns"])
    values, stamp, dates, offsets = (arrays[name] for name in _DTYPES)
    bars = Bars(values, stamp, dates, offsets, *names)
    return {name: Windows(bars, arrays[_ends(name)], **settings) for name, settings in manifest["windows"].items()}


def _holds(folder: Path, digest: str) -> bool:
    """Return whether the folder is whole and its content has this digest."""
    try:
        return _read_manifest(folder)["digest"] == digest and bool(map_windows(folder))
    except (FileNotFoundError, ValueError):
        return False


def _digest(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / WINDOWS_FILE
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: no windows were saved there, or not to the end") from None
    except ValueError:
        raise ValueError(_damage(path, "is not JSON")) from None
    if (
        not isinstance(manifest, dict)
        or not {"windows", "arrays", "instruments", "columns", "digest"} <= manifest.keys()
    ):
        raise ValueError(_damage(path, "is not a manifest of windows"))
    return manifest


def _map(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    """Map a .npy file as a plain read-only array; with np.memmap every slice would be a np.memmap too."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(_damage(path, "is missing")) from None
    except (ValueError, EOFError) as error:
        raise ValueError(_damage(path, f"is cut short or no .npy file ({error})")) from None
    if (array.dtype.str, list(array.shape)) != (dtype, shape):
        found, wanted = f"{array.dtype.str} {list(array.shape)}", f"{dtype} {shape}"
        raise ValueError(_damage(path, f"holds {found} and the manifest says {wanted}"))
    return array.view(np.ndarray)


def _damage(path: Path, what: str) -> str:
    return f"{path} {what}; remove {path.parent} and let it be written anew"


def _file(folder: Path, array: str) -> Path:
    return folder / f"{array}.npy"


def _ends(name: str) -> str:
    return f"ends.{name}"

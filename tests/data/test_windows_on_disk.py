import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stores import DAYS, sessions

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.windows import Bars, Windows
from kronos_qlib.data.windows_on_disk import WINDOWS_FILE, map_windows, save_windows

DAY = [str(date.date()) for date in sessions(DAYS)]
SEGMENTS = {"train": [DAY[10], DAY[39]], "valid": [DAY[40], DAY[-1]]}
ARRAYS = ("values", "stamp", "dates", "offsets", "ends.train", "ends.valid")


@pytest.fixture
def windows(market) -> dict[str, Windows]:
    dataset = KLineDataset(KLineHandler("some"), SEGMENTS, lookback=6, horizon=3)
    return {name: dataset.training_windows(name) for name in SEGMENTS}


def with_other_values(windows: dict[str, Windows]) -> dict[str, Windows]:
    bars = next(iter(windows.values())).bars
    other = replace(bars, values=bars.values * 2)
    return {name: replace(each, bars=other) for name, each in windows.items()}


def everything(windows: Windows) -> list[np.ndarray]:
    batch = windows.normalised(np.arange(len(windows))[::-1])
    return [windows.keys, batch.x, batch.stamp, batch.mean, batch.scale, batch.last_close]


def assert_same(left: Windows, right: Windows) -> None:
    assert (left.lookback, left.future, left.clip) == (right.lookback, right.future, right.clip)
    assert left.bars.instruments == right.bars.instruments
    for ours, theirs in zip(everything(left), everything(right)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_mapped_windows_are_those_that_were_saved(windows, tmp_path):
    windows["valid"] = replace(windows["valid"], clip=np.inf)
    save_windows(tmp_path / "windows", windows)
    mapped = map_windows(tmp_path / "windows")
    assert list(mapped) == ["train", "valid"]
    assert mapped["train"].bars is mapped["valid"].bars, "one copy for both"
    for name, saved in windows.items():
        assert_same(mapped[name], saved)


def test_mapped_arrays_are_read_only_and_still_on_disk(windows, tmp_path):
    save_windows(tmp_path, windows)
    mapped = map_windows(tmp_path)["train"]
    for array in (mapped.bars.values, mapped.bars.stamp, mapped.bars.dates, mapped.bars.offsets, mapped.ends):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        mapped.bars.values[0] = 0
    assert all(array.flags.writeable for array in everything(mapped)), "torch.from_numpy wants arrays of its own"


def test_normalising_mapped_windows_copies_the_batch_and_no_more(tmp_path):
    count = 400_000
    bars = Bars(
        values=np.ones((count, 6), np.float32),
        stamp=np.ones((count, 5), np.int8),
        dates=np.arange(count).astype("M8[m]").astype("M8[ns]"),
        offsets=np.array([0, count]),
        instruments=("AAA",),
    )
    save_windows(tmp_path, {"train": Windows(bars, np.arange(9, count), lookback=10, future=0)})
    mapped = map_windows(tmp_path)["train"]
    mapped.normalised(np.arange(10))
    tracemalloc.start()
    mapped.normalised(np.arange(0, 3000, 300))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 < bars.stamp.nbytes
    assert "codes" not in vars(mapped.bars), "8 bytes a bar that no batch needs"


def test_what_a_segment_left_out_is_not_saved(windows, tmp_path):
    save_windows(tmp_path, windows)
    before = files(tmp_path)
    save_windows(tmp_path, {name: replace(each, left_out=("DDD",), segment="a") for name, each in windows.items()})
    assert files(tmp_path) == before, "the digest is the same"
    assert map_windows(tmp_path)["train"].left_out == ()


def test_the_same_windows_are_not_written_again(windows, tmp_path):
    save_windows(tmp_path, windows)
    before = files(tmp_path)
    copies = replace(windows["train"].bars, values=windows["train"].bars.values.copy())
    save_windows(tmp_path, {name: replace(each, bars=copies) for name, each in windows.items()})
    assert files(tmp_path) == before
    save_windows(tmp_path, map_windows(tmp_path))
    assert files(tmp_path) == before


@pytest.mark.parametrize("change", ["values", "ends", "clip", "names"])
def test_other_windows_replace_the_former_ones(windows, tmp_path, change):
    save_windows(tmp_path, windows)
    if change == "values":
        windows = with_other_values(windows)
    elif change == "ends":
        windows["train"] = windows["train"].take(slice(1, None))
    elif change == "clip":
        windows["train"] = replace(windows["train"], clip=1.0)
    else:
        windows = {"train": windows["train"]}
    save_windows(tmp_path, windows)
    mapped = map_windows(tmp_path)
    assert list(mapped) == list(windows)
    for name, saved in windows.items():
        assert_same(mapped[name], saved)


def test_a_process_that_has_mapped_windows_keeps_them_when_others_are_written(windows, tmp_path):
    save_windows(tmp_path, windows)
    mapped = map_windows(tmp_path)["train"]
    save_windows(tmp_path, with_other_values(windows))
    assert_same(mapped, windows["train"])


def test_a_folder_written_to_the_middle_is_not_taken_for_whole(windows, tmp_path):
    save_windows(tmp_path, windows)
    (tmp_path / "ends.valid.npy").unlink()
    (tmp_path / "ends.valid.npy").mkdir()  # the last array cannot be written
    with pytest.raises(OSError):
        save_windows(tmp_path, with_other_values(windows))
    with pytest.raises(FileNotFoundError, match=f"{WINDOWS_FILE} is missing: no windows were saved there, or not"):
        map_windows(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("damage", ["absent", "cut short", "empty", "other shape", "other type", "pickled"])
def test_a_damaged_array_is_an_error_that_names_its_file_and_is_written_anew(windows, tmp_path, array, damage):
    save_windows(tmp_path, windows)
    path = tmp_path / f"{array}.npy"
    content, whole = np.load(path), path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(whole[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other shape":
        np.save(path, content[:-1])
    elif damage == "other type":
        np.save(path, content.astype(">f8" if content.dtype.kind != "M" else "M8[s]"))
    else:
        np.save(path, content.astype(object), allow_pickle=True)
    error = FileNotFoundError if damage == "absent" else ValueError
    with pytest.raises(error, match=f"{array}.npy (is|holds) .*; remove {tmp_path}") as refusal:
        map_windows(tmp_path)
    assert "\n" not in str(refusal.value)
    save_windows(tmp_path, windows)
    assert_same(map_windows(tmp_path)["valid"], windows["valid"])


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"digest": ""})])
def test_a_damaged_manifest_is_an_error_that_names_it(windows, tmp_path, content):
    save_windows(tmp_path, windows)
    (tmp_path / WINDOWS_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{WINDOWS_FILE} is not .*; remove {tmp_path}"):
        map_windows(tmp_path)
    save_windows(tmp_path, windows)
    assert_same(map_windows(tmp_path)["train"], windows["train"])


def test_windows_on_different_bars_do_not_go_into_one_folder(windows, tmp_path):
    windows["valid"] = with_other_values(windows)["valid"]
    with pytest.raises(ValueError, match=r"\(train, valid\) do not share one Bars object"):
        save_windows(tmp_path / "windows", windows)
    with pytest.raises(ValueError, match=r"\(none\) do not share"):
        save_windows(tmp_path / "windows", {})
    assert not (tmp_path / "windows").exists()


def test_no_window_at_all_can_be_saved(windows, tmp_path):
    none = {"train": windows["train"].take(slice(0))}
    save_windows(tmp_path, none)
    assert len(map_windows(tmp_path)["train"]) == 0


def test_a_process_that_maps_windows_needs_neither_pandas_nor_qlib(windows, tmp_path):
    save_windows(tmp_path, windows)
    script = """
import sys
from pathlib import Path
import numpy as np
import kronos_qlib.data.join_windows, kronos_qlib.data.windows
from kronos_qlib.data.windows_on_disk import map_windows
assert len(map_windows(Path(sys.argv[1]))["train"].normalised(np.arange(3)).x) == 3
print(sorted({"pandas", "qlib", "torch", "pydantic"} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"

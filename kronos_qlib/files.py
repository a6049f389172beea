"""Files that are written whole or not at all, and folders that a killed process does not leave behind."""

import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a draft beside `path` to write to; it replaces `path` if the block ends without an error, or is removed.

    Missing folders are made. The draft ends in .tmp, so that a search for files by their suffix does not find it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # as of the user's other files; some writers make files that only they can read
        yield draft
        draft.chmod(mode)
        _flush_to_disk(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a whole .npy file. A full disk is an OSError with its errno, which numpy's own save loses."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as draft, draft.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8))


@contextmanager
def scratch_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
    """Make a new folder in `parent` (None: the system's place for such folders) and remove it when the block ends.

    Folders of the same parent and prefix whose process was killed are removed too: no process holds their lock.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
        for lock in parent.glob(f"{prefix}*/lock"):
            with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
                shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder, FileLock(Path(folder) / "lock"):
        yield Path(folder)


def _flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk: without this the rename after it may be there earlier."""
    if sys.platform == "win32":  # no flush for a file opened to read
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

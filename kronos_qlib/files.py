"""Files that are written whole or not at all, and folders that a killed process does not leave behind."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DRAFT_NAME = re.compile(r"\..+\.(\d+-)?[0-9a-f]{8,16}\.tmp")  # of whole_file, earlier versions' too
_SCRATCH_MARK = "made-by-kronos-qlib.txt"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a draft beside `path` to write to; it replaces `path` if the block ends without an error, or is removed.

    Missing folders are made. The draft ends in .tmp, so that a search for files by their suffix does not find it; its
    name cannot be guessed, so that nobody can put a link in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode  # as of the user's other files; some writers make files that only they can read
        yield draft
        draft.chmod(mode)
        _flush_to_disk(draft)
        draft.replace(path)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:  # as `write` raises it
            error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def is_draft(path: Path) -> bool:
    """Return whether a path has the name of a draft of `whole_file`: a killed process has left it."""
    return _DRAFT_NAME.fullmatch(path.name) is not None and not path.is_dir()


def digest_of_file(path: Path) -> str:
    """Return a digest of a file's content."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a whole .npy file. A full disk is an OSError with its errno, which numpy's own save loses."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as draft, draft.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8))


@contextmanager
def scratch_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
    """Make a new folder in `parent` (None: the system's place for such folders) and remove it when the block ends.

    Folders of the same parent and prefix whose process was killed are removed too: they hold the mark that is written
    here, with their own name in it, and no process holds their lock. A folder without that mark is somebody else's.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
        for lock in parent.glob(f"{prefix}*/lock"):
            if _is_scratch(lock.parent):
                with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name, FileLock(Path(name) / "lock"):
        folder = Path(name)
        (folder / _SCRATCH_MARK).write_text(_scratch_mark(folder))
        yield folder


def _scratch_mark(folder: Path) -> str:
    return f"{folder.name}: a scratch folder of kronos-qlib, removed when its process has ended\n"


def _is_scratch(folder: Path) -> bool:
    """Return whether a folder is no link and holds the mark of `scratch_folder` with its own name."""
    try:
        return not folder.is_symlink() and (folder / _SCRATCH_MARK).read_text() == _scratch_mark(folder)
    except (OSError, ValueError):
        return False


def _flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk: without this the rename after it may be there earlier."""
    if sys.platform == "win32":  # no flush for a file opened to read
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

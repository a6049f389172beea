"""Files that users brought: checked, kept under a name of our own, and listed with what was found in them."""

import gzip
import json
import re
import secrets
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kronos_qlib.files import digest_of_file, whole_file
from kronos_qlib.ingest.bars import SourceBars, read_bars
from kronos_qlib.ingest.tables import SourceError
from kronos_qlib.text import printable
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.settings import Limits

KINDS = (".csv", ".txt", ".tsv", ".parquet", ".zip", ".gz")
_ID = re.compile(r"upload-[0-9a-f]{16}")
_NAMED = 20  # rejected rows that are shown
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Upload:
    """A file that a user brought.

    id: its name here. name: as the user called it. path: where it lies. instruments, bars, first, last: what it holds.
    findings: what was found, in words. rejected: how many rows are no bars; examples: the first of them, and why.
    """

    id: str
    name: str
    path: Path
    instruments: list[str]
    bars: int
    first: str
    last: str
    findings: list[str]
    rejected: int
    examples: list[dict[str, Any]]


class Uploads:
    """Keeps uploads in a folder."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.limits = folder.resolve(), limits
        self._lock = threading.Lock()
        for draft in self.folder.glob(".draft-*"):  # of a process that was killed
            draft.unlink(missing_ok=True)

    def draft(self, name: str) -> Path:
        """Return a new file to write an upload to. Raises Problem for a name of another kind of file."""
        return self.folder / f".draft-{secrets.token_hex(8)}{_kind(name)}"

    def keep(self, draft: Path, name: str) -> Upload:
        """Check a draft, and keep it if it holds bars. Raises Problem."""
        shown = printable(Path(name.replace("\\", "/")).name)[:_LONGEST_NAME]
        own = f"upload-{digest_of_file(draft)[:16]}"
        try:
            self._check_size(draft, shown)
            read = self._read(draft, shown)
        except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
            raise Problem(422, f"{shown}: cannot be read ({type(error).__name__}).") from None
        path = self.folder / f"{own}{draft.suffix}"
        with self._lock:
            draft.replace(path)
            upload = _describe(own, shown, path, read)
            with whole_file(self.folder / f"{own}.json") as about:
                about.write_text(json.dumps(asdict(upload) | {"path": path.name}), encoding="utf-8")
            self._forget_oldest()
        return upload

    def list(self) -> list[Upload]:
        """List the uploads, the newest first."""
        about = sorted(self.folder.glob("upload-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [upload for path in about if (upload := self.find(path.stem)) is not None]

    def find(self, name: str) -> Upload | None:
        """Return an upload by its id; None if there is none, or if it is not a file of this folder."""
        if not _ID.fullmatch(name):
            return None
        try:
            about = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            path = self.folder / Path(about["path"]).name
            if path.is_symlink() or not path.is_file() or path.resolve().parent != self.folder:
                return None
            return Upload(**about | {"path": path})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove(self, name: str) -> bool:
        """Remove an upload, and return whether it was there."""
        found = self.find(name)
        if found is not None:
            found.path.unlink(missing_ok=True)
            (self.folder / f"{name}.json").unlink(missing_ok=True)
        return found is not None

    def _forget_oldest(self) -> None:
        for upload in self.list()[self.limits.files :]:
            self.remove(upload.id)

    def _check_size(self, path: Path, name: str) -> None:
        """Refuse what is larger, when it is read, than an upload may be; nothing is unpacked to the disk."""
        kind, most = path.suffix, self.limits.unpacked_bytes
        if kind == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if len(members) > self.limits.files:
                raise Problem(413, f"{name} holds {len(members):,} files; {self.limits.files:,} are read at most.")
            size = sum(member.file_size for member in members)
        elif kind == ".gz":
            size = 0
            with gzip.open(path) as file:
                while size <= most and (block := file.read(2**20)):
                    size += len(block)
        elif kind == ".parquet":
            metadata = pq.read_metadata(path)
            size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
            self._check_table(metadata.num_rows, metadata.num_columns, name)
        else:
            size = path.stat().st_size
            with path.open("rb") as lines:
                widest = max((line.count(mark) for line in lines.readlines(2**16) for mark in b",;\t|"), default=0)
            self._check_table(0, widest, name)
        if size > most:
            raise Problem(413, f"{name} holds more than {most:,} bytes when it is unpacked, which is the most here.")

    def _check_table(self, rows: int, columns: int, name: str) -> None:
        if rows > self.limits.rows:
            raise Problem(413, f"{name} has {rows:,} rows; {self.limits.rows:,} are read at most.")
        if columns > self.limits.columns:
            raise Problem(413, f"{name} has {columns:,} columns; {self.limits.columns:,} are read at most.")

    def _read(self, path: Path, name: str) -> SourceBars:
        try:
            read = read_bars(path)
        except SourceError as error:
            text = str(error).replace(str(path), name).replace(path.stem, Path(name).stem)
            raise Problem(422, text) from None
        self._check_table(len(read.bars) + len(read.rejected), 0, name)
        return read


def _kind(name: str) -> str:
    kind = next((kind for kind in KINDS if name.lower().endswith(kind)), None)
    if kind is None:
        raise Problem(415, f"{name[:_LONGEST_NAME]!r} is no file of bars; it should end in {', '.join(KINDS)}.")
    return kind


def _describe(own: str, name: str, path: Path, read: SourceBars) -> Upload:
    instruments = [str(instrument) for instrument in read.bars["instrument"].cat.categories]
    rejected = read.rejected
    examples = [
        {"line": int(row["line"]), "reason": str(row["reason"])} for row in rejected.head(_NAMED).to_dict("records")
    ]
    clean: Callable[[str], str] = lambda text: text.replace(str(path), name)  # noqa: E731
    first, last = (str(read.bars["time"].agg(end)) for end in ("min", "max"))
    findings = [clean(finding) for finding in read.findings]
    return Upload(own, name, path, instruments, len(read.bars), first, last, findings, len(rejected), examples)

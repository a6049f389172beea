"""Files that users brought: checked, kept under a name of our own, and listed with what was found in them."""

import gzip
import io
import json
import os
import re
import secrets
import shutil
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kronos_qlib.files import digest_of_file
from kronos_qlib.ingest.bars import SourceBars, read_bars
from kronos_qlib.ingest.tables import SourceError
from kronos_qlib.text import printable
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.schema import UploadEntry
from kronos_qlib.web.settings import Limits

KINDS = (".csv", ".txt", ".tsv", ".parquet", ".zip", ".gz")
_ID = re.compile(r"upload-[0-9a-f]{16}")
_FOREIGN = re.compile(r"[^\w.-]+")
_ABOUT = "about.json"
_DRAFT = ".draft-"
_NAMED = 20  # rejected rows that are shown
_LONGEST_NAME = 120
_MARKS = (b",", b";", b"\t", b"|")  # between the cells of a row
_ROWS_TOGETHER = 4096  # of a Parquet file


class Upload(UploadEntry):
    """A file that a user brought, and where it lies."""

    path: Path


class Uploads:
    """Keeps uploads in a folder, each in a folder of its own: the name of a file without a symbol is its instrument."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.limits = folder.resolve(), limits
        self._lock, self._reading = threading.Lock(), threading.Lock()
        for draft in self.folder.glob(f"{_DRAFT}*"):  # of a process that was killed
            owner = draft.name.removeprefix(_DRAFT).partition("-")[0]
            if not owner.isdigit() or int(owner) == os.getpid() or not psutil.pid_exists(int(owner)):
                shutil.rmtree(draft, ignore_errors=True)

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """Give a new file to write an upload to, within a block. Raises Problem for a name of another kind of file."""
        kind = next((kind for kind in KINDS if name.lower().endswith(kind)), None)
        if kind is None:
            raise Problem(415, f"{name[:_LONGEST_NAME]!r} is no file of bars; it should end in {', '.join(KINDS)}.")
        stem = _FOREIGN.sub("-", _shown(name)[: -len(kind)]).strip("-._")[:60]
        folder = self._hidden_folder()
        folder.mkdir()
        try:
            yield folder / f"{stem or 'bars'}{kind}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, draft: Path, name: str) -> Upload:
        """Check a draft, and keep it if it holds bars. Raises Problem."""
        shown = _shown(name)
        own = f"upload-{blake2b(f'{digest_of_file(draft)} {shown}'.encode(), digest_size=8).hexdigest()}"
        try:
            self._check_size(draft, shown)
            read = self._read(draft, shown)
        except Problem:
            raise
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, pa.ArrowException, ValueError) as error:
            raise Problem(422, f"{shown}: cannot be read ({type(error).__name__}).") from None
        folder = self.folder / own
        upload = _describe(own, shown, folder / draft.name, read, draft)
        with (draft.parent / _ABOUT).open("x", encoding="utf-8") as about:
            about.write(json.dumps(upload.model_dump() | {"path": draft.name}))
        with self._lock:
            self._remove_folder(own)
            draft.parent.rename(folder)
            self._forget_oldest()
        return upload

    def list(self) -> list[Upload]:
        """List the uploads, the newest first."""
        about = sorted(self.folder.glob(f"upload-*/{_ABOUT}"), key=_age)
        return [upload for path in about if (upload := self.find(path.parent.name)) is not None]

    def find(self, name: str) -> Upload | None:
        """Return an upload by its id; None if there is none, or if it is not a file of this folder."""
        if not _ID.fullmatch(name):
            return None
        folder = self.folder / name
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            path = folder / Path(about["path"]).name
            if path.is_symlink() or not path.is_file() or path.resolve() != path:
                return None
            return Upload(**about | {"path": path})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove(self, name: str) -> bool:
        """Remove an upload, and return whether it was there."""
        with self._lock:
            return self.find(name) is not None and self._remove_folder(name)

    def _hidden_folder(self) -> Path:
        return self.folder / f"{_DRAFT}{os.getpid()}-{secrets.token_hex(8)}"

    def _remove_folder(self, name: str) -> bool:
        """Move a folder out of sight and remove it, so that nobody finds half of it; return whether it was there."""
        gone = self._hidden_folder()
        try:
            (self.folder / name).rename(gone)
        except FileNotFoundError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return True

    def _forget_oldest(self) -> None:
        for upload in self.list()[self.limits.files :]:
            self._remove_folder(upload.id)

    def _check_size(self, path: Path, name: str) -> None:
        """Refuse what is larger, when it is read, than an upload may be; nothing is unpacked to the disk."""
        if path.suffix == ".parquet":
            self._check_parquet(path, name)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                if len(members) > self.limits.files:
                    raise Problem(413, f"{name} holds {len(members):,} files; {self.limits.files:,} are read at most.")
                size = rows = 0
                for member in members:
                    with archive.open(member) as file:
                        size, rows = self._check_text(file, name, size, rows)
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                self._check_text(file, name)

    def _check_text(
        self, file: IO[bytes] | io.BufferedIOBase, name: str, size: int = 0, rows: int = 0
    ) -> tuple[int, int]:
        """Count bytes and rows of a text, after those before it; refuse what is no text, whatever its name says."""
        start = True
        while block := file.read(2**20):
            if start and block[:6].startswith((b"PAR1", b"ARROW1", b"FEA1")):
                raise Problem(415, f"{name} holds a table of another kind than its name says.")
            size, rows = size + len(block), rows + block.count(b"\n")
            if size > self.limits.unpacked_bytes:
                self._refuse_size(name)
            widest = (
                0 if not start else max(line.count(mark) for line in block[: 2**16].split(b"\n") for mark in _MARKS)
            )
            self._check_table(rows, widest, name)
            start = False
        return size, rows

    def _check_parquet(self, path: Path, name: str) -> None:
        """Read a Parquet file bit by bit, texts by their dictionaries: what these unpack to stands nowhere in it."""
        schema, texts = pq.read_schema(path), []
        for field in schema:
            if pa.types.is_nested(field.type):
                raise Problem(415, f"{name}: its column {printable(field.name)} holds no numbers, texts or times.")
            if pa.types.is_string(field.type) or pa.types.is_binary(field.type):
                texts.append(field.name)
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            told = file.metadata
            self._check_table(told.num_rows, told.num_columns, name)
            size = sum(told.row_group(group).total_byte_size for group in range(told.num_row_groups))
            if size > self.limits.unpacked_bytes:
                self._refuse_size(name)
            size = 0
            for batch in file.iter_batches(batch_size=_ROWS_TOGETHER):
                size += sum(map(_unpacked_bytes, batch.columns))
                if size > self.limits.unpacked_bytes:
                    self._refuse_size(name)

    def _refuse_size(self, name: str) -> None:
        most = self.limits.unpacked_bytes
        raise Problem(413, f"{name} holds more than {most:,} bytes when it is unpacked, which is the most here.")

    def _check_table(self, rows: int, columns: int, name: str) -> None:
        if rows > self.limits.rows:
            raise Problem(413, f"{name} has {rows:,} rows; {self.limits.rows:,} are read at most.")
        if columns > self.limits.columns:
            raise Problem(413, f"{name} has {columns:,} columns; {self.limits.columns:,} are read at most.")

    def _read(self, path: Path, name: str) -> SourceBars:
        try:
            with self._reading:  # one at a time: a table takes several times its file's size
                read = read_bars(path)
        except SourceError as error:
            raise Problem(422, str(error).replace(str(path), name)) from None
        self._check_table(len(read.bars) + len(read.rejected), 0, name)
        return read


def _unpacked_bytes(column: pa.Array) -> int:
    """Count the bytes of a column whose dictionary, if it has one, is written out."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    values = column.dictionary
    if not (pa.types.is_string(values.type) or pa.types.is_binary(values.type)):
        return 8 * len(column)
    return int(pc.sum(pc.take(pc.binary_length(values), column.indices)).as_py() or 0)


def _shown(name: str) -> str:
    """Return the last part of a file's name as the user called it."""
    return printable(re.split(r"[/\\]", name)[-1])[-_LONGEST_NAME:]


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _describe(own: str, name: str, path: Path, read: SourceBars, draft: Path) -> Upload:
    instruments = [str(instrument) for instrument in read.bars["instrument"].cat.categories]
    rejected = read.rejected
    examples = [
        {"line": int(row["line"]), "reason": str(row["reason"])} for row in rejected.head(_NAMED).to_dict("records")
    ]
    first, last = (str(read.bars["time"].agg(end)) for end in ("min", "max"))
    findings = [finding.replace(str(draft), name) for finding in read.findings]
    return Upload(
        id=own,
        name=name,
        instruments=instruments,
        bars=len(read.bars),
        first=first,
        last=last,
        findings=findings,
        rejected=len(rejected),
        examples=examples,
        path=path,
    )

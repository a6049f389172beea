"""Files of bars as tables of text: any delimiter and encoding, with or without a header, Parquet, Feather, zip, gz."""

import gzip
import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather as feather
import pyarrow.parquet as pq

from kronos_qlib.data.columns import NAMES, plain_name
from kronos_qlib.extensions import load_extension

DELIMITERS = ",\t;|"
MISSING = ("", "-", "--", "nan", "NaN", "NA", "N/A", "null", "None", "NULL")
SAMPLE_BYTES = 65_536
LARGEST = 8 * 2**30  # bytes that a compressed file may hold
LARGEST_RATIO = 200  # bytes of content for each of a compressed file: bars shrink some ten times, a zip bomb 1,000
_BINANCE = "open_time open high low close volume close_time quote_volume count taker_buy_volume taker_buy_quote ignore"
_HISTDATA = "datetime open high low close volume"
_HEADERLESS = {12: _BINANCE, 6: _HISTDATA}  # names of the columns of files without a header, by their number
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+([eE][-+]?\d+)?\s*$")


class SourceError(ValueError):
    """A file that cannot be read as bars; the message, one line, names it and says why."""


@dataclass
class RawTable:
    """A file as it was written: all text, or the types of its own of a Parquet or Feather file.

    columns: by name, of the same length. first_line: the line of the first row in the file, from 1.
    rejected: rows that are no rows of this table: line and reason.
    """

    path: Path
    name: str
    columns: dict[str, pa.ChunkedArray]
    first_line: int = 2
    rejected: list[tuple[int, str]] = field(default_factory=list)


class SourceReader(Protocol):
    """A reader of a user's own, `--reader` of `ingest`: for files of another kind."""

    def __call__(self, path: Path) -> Iterable[tuple[str, pa.Table]]:
        """Read a file.

        Returns:
            Tables, a row per bar, each with a name, which is the instrument's where no column names it. Columns are
            named as in a CSV file, numbers and times are typed or text; what is found out about such a file is found
            out about them.
        """


def load_reader(configuration: Mapping[str, Any]) -> SourceReader:
    """Make a reader of the user's own. Raises ValueError."""
    reader: SourceReader = load_extension(configuration)
    return reader


def read_tables(path: Path, reader: SourceReader | None = None) -> Iterable[RawTable]:
    """Read the tables of a file; a zip holds several.

    Raises:
        SourceError: there is no such file, it is none of the kinds, empty, cut short or a bomb; or the user's own
            reader fails, or returns something else than tables.
    """
    if not path.is_file():
        raise SourceError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    if reader is not None:
        yield from _read_by(reader, path)
        return
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        if suffixes[-1:] == [".zip"]:
            yield from _read_zip(path)
        elif suffixes[-1:] == [".gz"]:
            with gzip.open(path) as file:
                yield _read(path, path.with_suffix("").name, _limited(file, path, path.stat().st_size))
        else:
            yield _read(path, path.name, path.read_bytes())
    except SourceError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, pa.ArrowException, UnicodeError, ValueError, RuntimeError) as error:
        raise SourceError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _read_by(reader: SourceReader, path: Path) -> Iterable[RawTable]:
    kind = type(reader).__name__
    try:
        tables = list(reader(path))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise SourceError(f"{path}: {kind} fails: {type(error).__name__}: {text}") from error
    for each in tables:
        pair = isinstance(each, tuple) and len(each) == 2
        if not pair or not isinstance(each[0], str) or not isinstance(each[1], pa.Table):
            raise SourceError(f"{path}: {kind} should return pairs of a name and a pyarrow.Table, not {each!r:.80}")
    if not tables:
        raise SourceError(f"{path}: {kind} finds no table in it")
    yield from (_typed(path, name, table) for name, table in tables)


def _read_zip(path: Path) -> Iterable[RawTable]:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if not members:
            raise SourceError(f"{path}: the archive holds no file")
        for member in members:
            with archive.open(member) as file:  # nothing is unpacked to the disk, so names in it lead nowhere
                content = _limited(file, path, member.compress_size)
            yield _read(path, Path(member.filename).name, content)


def _limited(file: gzip.GzipFile | IO[bytes], path: Path, compressed: int) -> bytes:
    """Read a compressed file up to what a file of bars may hold."""
    most = min(LARGEST, max(compressed, 1000) * LARGEST_RATIO)
    content = file.read(most + 1)
    if len(content) > most:
        raise SourceError(f"{path}: holds more than {most:,} bytes, {LARGEST_RATIO} times its size: no file of bars")
    return content


def _read(path: Path, name: str, content: bytes) -> RawTable:
    if not content.strip(b"\0 \r\n\t"):
        raise SourceError(f"{path}: empty")
    if content[:4] == b"PAR1":
        return _typed(path, name, pq.read_table(pa.BufferReader(content)))
    if content[:6] in (b"ARROW1", b"FEA1\0\0") or name.lower().endswith((".feather", ".arrow")):
        return _typed(path, name, feather.read_table(pa.BufferReader(content)))
    if b"\0" in content[:SAMPLE_BYTES] and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{path}: neither text nor Parquet nor Feather")
    return _read_text(path, name, content)


def _typed(path: Path, name: str, table: pa.Table) -> RawTable:
    metadata = (table.schema.metadata or {}).get(b"pandas")
    columns = {column: table.column(column) for column in table.column_names}
    if metadata is not None:  # pandas keeps an unnamed index under a name of its own
        columns = {re.sub(r"^__index_level_\d+__$", "index", column): values for column, values in columns.items()}
    return RawTable(path, name, columns, first_line=1)


def _read_text(path: Path, name: str, content: bytes) -> RawTable:
    encoding = _encoding(path, content)
    lines = content[: SAMPLE_BYTES if encoding != "utf-16" else None].decode(encoding, errors="ignore").splitlines()
    lines = [line.lstrip("\ufeff") for line in lines]
    head = [line for line in lines if line.strip()]
    delimiter = _delimiter(head)
    cells = [[cell.strip().strip('"') for cell in line.split(delimiter)] for line in head[:4]]
    names, skipped, yahoo = _header(path, cells)
    rejected: list[tuple[int, str]] = []
    blank = next(number for number, line in enumerate(lines) if line.strip())

    def reject(row: pacsv.InvalidRow) -> str:
        rejected.append((row.number or 0, f"{row.actual_columns} cells, not {row.expected_columns}"))
        return "skip"

    if encoding == "utf-8-sig":
        content, encoding = content.removeprefix(b"\xef\xbb\xbf"), "utf-8"
    elif encoding != "utf-8":
        content, encoding = content.decode(encoding).lstrip("\ufeff").encode(), "utf-8"
    columns_read = pacsv.ReadOptions(
        column_names=names, skip_rows=blank + skipped, encoding=encoding, use_threads=False
    )
    parsed = pacsv.ParseOptions(delimiter=delimiter, invalid_row_handler=reject, newlines_in_values=False)
    numbers = {name for column in NAMES.values() for name in column}
    text = dict.fromkeys(names, pa.string())
    typed = text | {name: pa.float64() for name in names if plain_name(name) in numbers}
    for types in (typed, text):  # where a cell is no number, all are read as they are written
        rejected.clear()
        try:
            table = pacsv.read_csv(
                io.BytesIO(content),
                columns_read,
                parsed,
                pacsv.ConvertOptions(column_types=types, null_values=list(MISSING), strings_can_be_null=False),
            )
            break
        except pa.ArrowInvalid:
            if types is text:
                raise
    columns = {column: table.column(column) for column in names}
    if yahoo:
        columns["ticker"] = pa.chunked_array([pa.array([yahoo] * len(table), pa.string())])
    return RawTable(path, name, columns, blank + skipped + 1, rejected)


def _encoding(path: Path, content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if content[:3] == b"\xef\xbb\xbf":
        return "utf-8-sig"
    for encoding in ("utf-8", "gb18030"):
        try:
            content.decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    raise SourceError(f"{path}: text in an encoding that is neither UTF-8 nor UTF-16 nor GBK")


def _delimiter(lines: list[str]) -> str:
    """Find the delimiter that divides the first lines into most cells, and into equally many."""
    counts = {delimiter: [line.count(delimiter) for line in lines[:20]] for delimiter in DELIMITERS}
    return max(counts, key=lambda delimiter: (min(counts[delimiter]) > 0, min(counts[delimiter])))


def _header(path: Path, cells: list[list[str]]) -> tuple[list[str], int, str]:
    """Return the names of the columns, the lines before the first row, and the ticker of yfinance's three headers."""
    first = cells[0]
    if len(cells) > 2 and first[0] == "Price" and cells[1][0] == "Ticker":
        tickers = {cell for cell in cells[1][1:] if cell}
        if len(tickers) > 1:
            raise SourceError(f"{path}: yfinance's columns of {len(tickers)} tickers in one table; save one file each")
        return [cells[2][0] or "Date", *first[1:]], 3, tickers.pop() if tickers else ""
    if all(_NUMBER.match(cell) or re.match(r"\d{8} \d{6}$", cell) for cell in first if cell):
        if len(first) not in _HEADERLESS:
            raise SourceError(f"{path}: {len(first)} columns without a header; name them in a first line")
        return _HEADERLESS[len(first)].split(), 0, ""
    known = {name for names in NAMES.values() for name in names}
    if not known & {plain_name(cell) for cell in first}:
        raise SourceError(f"{path}: its first line names no column of a bar: {', '.join(first)[:100]}")
    names = [cell or f"column {number}" for number, cell in enumerate(first, 1)]
    if len(set(names)) < len(names):
        raise SourceError(f"{path}: a column stands twice: {next(name for name in names if names.count(name) > 1)!r}")
    return names, 1, ""

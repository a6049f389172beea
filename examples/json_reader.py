"""A reader of one's own: candles as JSON, an object a line, as many brokers' interfaces give them."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.json as json


class JsonLines:
    """Read files of lines such as {"time": "2024-01-02", "symbol": "AAPL", "open": 187.1, …}.

        kronos-qlib ingest candles/ store --reader examples/json_reader.py:JsonLines

    A file without a column of symbols is of the instrument that its name says: AAPL.jsonl.
    """

    def __call__(self, path: Path) -> Iterable[tuple[str, pa.Table]]:
        """Read a file: its name without the suffix, and a row per candle."""
        yield path.stem, json.read_json(path)

"""Whatever a file holds, reading it ends in bars or in one line that names it, and a store is whole or not there."""

import gzip
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kronos_qlib.ingest.bars import read_bars
from kronos_qlib.ingest.store import ingest
from kronos_qlib.ingest.tables import SourceError

TRUTH = (Path(__file__).parent / "truth.csv").read_bytes()
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def end(path):
    """Read and ingest a file: how many bars, or None for one clear line; then there is no store."""
    store = path.parent / "store"
    try:
        count = len(read_bars(path).bars)
        ingest([path], store)
    except (SourceError, ValueError) as error:
        message = str(error)
        assert "\n" not in message and message
        assert str(path) in message or path.name in message or "units" in message or "frequency" in message
        assert not store.exists() and list(path.parent.iterdir()) == [path]
        return None
    shutil.rmtree(store)
    return count


@some
@given(content=st.binary(max_size=400), name=st.sampled_from(["a.csv", "a.parquet", "a.feather", "a.zip", "a.csv.gz"]))
def test_random_bytes(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("garbage") / name
    path.write_bytes(content)
    end(path)


@some
@given(data=st.data())
def test_a_file_of_bars_with_cells_of_every_kind(tmp_path_factory, data):
    rows = [line.split(b",") for line in TRUTH.splitlines()]
    cells = st.sampled_from(
        [b"", b"--", b"x", b'"1,234.5"', b"1e400", b"-1", b"nan", b"2024-13-45", b"\xff", b"0", b"99999999999999999999"]
    )
    for _ in range(data.draw(st.integers(1, 12))):
        row = data.draw(st.integers(1, len(rows) - 1))
        rows[row][data.draw(st.integers(0, 6))] = data.draw(cells)
    path = tmp_path_factory.mktemp("cells") / "a.csv"
    path.write_bytes(b"\n".join(b",".join(row) for row in rows))
    count = end(path)
    assert count is None or count <= len(rows) - 1


@some
@given(cut=st.floats(0, 1), kind=st.sampled_from(["csv", "parquet", "feather", "zip", "gz"]))
def test_a_file_that_is_cut_short(tmp_path_factory, cut, kind):
    frame, sink = pd.read_csv(io.BytesIO(TRUTH)), io.BytesIO()
    if kind == "parquet":
        frame.to_parquet(sink)
    elif kind == "feather":
        frame.to_feather(sink)
    elif kind == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.csv", TRUTH)
    else:
        sink.write(gzip.compress(TRUTH) if kind == "gz" else TRUTH)
    content = sink.getvalue()
    path = tmp_path_factory.mktemp("cut") / f"a.{kind}"
    path.write_bytes(content[: int(cut * len(content))])
    count = end(path)
    assert kind == "csv" or count in (None, len(frame))


def test_bombs_links_and_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside.csv", b"0" * 50_000_000)
    with pytest.raises(SourceError, match=r"bomb.zip: holds more than [\d,]+ bytes"):
        read_bars(tmp_path / "bomb.zip")
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(SourceError, match=r"bomb.csv.gz: holds more than"):
        read_bars(tmp_path / "bomb.csv.gz")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in ((tmp_path, "a folder"), (tmp_path / "loop", "no such file"), (tmp_path / "none", "no such")):
        with pytest.raises(SourceError, match=message):
            read_bars(path)
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("../../outside.csv", TRUTH)
    ingest([tmp_path / "up.zip"], tmp_path / "store")
    assert not list(tmp_path.parent.glob("outside*")) and not list(tmp_path.glob("outside*"))


def test_two_rows_of_one_minute_where_clocks_are_set_back(tmp_path):
    times = pd.date_range("2024-10-27 00:00", periods=6, freq="30min", tz="Europe/Berlin").tz_localize(None)
    times = times.append(times[-2:]).append(pd.DatetimeIndex(["2024-10-27 03:00"]))
    frame = pd.DataFrame({"time": times} | {name: np.arange(9) + 10.0 for name in ("open", "high", "low", "close")})
    frame.to_csv(tmp_path / "a.csv", index=False)
    read = read_bars(tmp_path / "a.csv")
    assert len(read.bars) == 7
    assert any("2 bars stand twice" in finding for finding in read.findings)

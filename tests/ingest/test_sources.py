"""Files as 29 sources write them are read and ingested without an option, and come back as they were."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.data import D
from stores_of_tests import use_store

from kronos_qlib.cli import main
from kronos_qlib.ingest.bars import read_bars
from kronos_qlib.ingest.store import ingest

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "sources").iterdir())
TRUTH = pd.read_csv(HERE / "truth.csv", parse_dates=["time"])
MINUTES = [pd.Timestamp("2024-01-02 09:35") + pd.Timedelta(minutes=5 * number) for number in range(len(TRUTH))]
# What a source's own columns do not tell, and the rules find: the unit of the volume.
LOTS = ("tushare", "investment_data", "akshare_hist", "akshare_min_em")
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)


@every_source
def test_a_source_is_read_as_it_was_written(path):
    read = read_bars(path)
    bars = read.bars
    assert len(bars) == len(TRUTH) and bars["instrument"].nunique() == 1 and read.rejected.empty
    times = bars["time"].to_list()
    assert times in (TRUTH["time"].to_list(), MINUTES)
    for column in ("open", "high", "low", "close"):
        np.testing.assert_allclose(bars[column], TRUTH[column])
    assert re.fullmatch(r"(SH|SZ)\d{6}|[A-Z0-9._=-]+", bars["instrument"].iloc[0])


@every_source
def test_a_source_comes_back_from_qlib_as_the_float32_of_its_numbers(path, tmp_path):
    summary = ingest([path], tmp_path / "store")
    use_store(tmp_path / "store", summary.freq)
    fields = ["$open", "$high", "$low", "$close", "$volume"]
    found = D.features(D.instruments("all"), fields, freq=summary.freq).droplevel("instrument")
    assert len(found) == len(TRUTH)
    for column in ("open", "high", "low", "close"):
        np.testing.assert_array_equal(found[f"${column}"], TRUTH[column].to_numpy(np.float32))
    volume = TRUTH["volume"] * ("histdata" not in path.stem)  # which knows none
    np.testing.assert_allclose(found["$volume"], volume, rtol=1e-6)
    assert not any("otherwise than the source's own change" in finding for finding in summary.findings)
    if path.stem.startswith(LOTS):
        assert any("lots of 100" in finding for finding in summary.findings)


def test_symbols_of_all_spellings_are_one_instrument(tmp_path):
    names = ["600000.SH", "600000.SS", "600000.XSHG", "sh600000", "sh.600000", "SH600000", "600000"]
    table = TRUTH.head(len(names)).assign(symbol=names)
    table.to_csv(tmp_path / "mixed.csv", index=False)
    assert read_bars(tmp_path / "mixed.csv").bars["instrument"].unique().tolist() == ["SH600000"]


def test_adjusted_prices_and_volumes_multiply_to_the_money_traded(tmp_path):
    factor = np.where(TRUTH.index < 15, 0.5, 1.0)
    TRUTH.assign(adjclose=TRUTH["close"] * factor).to_csv(tmp_path / "AAPL.csv", index=False)
    summary = ingest([tmp_path / "AAPL.csv"], tmp_path / "store")
    assert "adjustment: by the adjusted close, at least 0.5 of the close" in summary.findings
    use_store(tmp_path / "store", "day")
    found = D.features(["AAPL"], ["$close", "$volume", "$factor", "$change"]).droplevel("instrument")
    np.testing.assert_allclose(found["$close"], TRUTH["close"] * factor, rtol=1e-6)
    np.testing.assert_allclose(found["$close"] * found["$volume"], TRUTH["close"] * TRUTH["volume"], rtol=1e-5)
    np.testing.assert_allclose(found["$change"].iloc[1:], found["$close"].pct_change().iloc[1:], rtol=1e-3, atol=1e-6)


def test_a_figure_that_fits_no_unit_is_asked_about(tmp_path):
    TRUTH.assign(amount=TRUTH["amount"] * 7).to_csv(tmp_path / "A.csv", index=False)
    with pytest.raises(ValueError, match=r"median of amount / \(close × volume\) is 7\.\d+, .* name one by --unit"):
        ingest([tmp_path / "A.csv"], tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert ingest([tmp_path / "A.csv"], tmp_path / "store", unit="shares").bars == len(TRUTH)


# Many files, appends, bad rows


def test_rows_that_are_no_bars_are_kept_with_file_line_and_reason(tmp_path):
    lines = TRUTH.to_csv(index=False).splitlines()
    lines[3] = lines[3].replace(lines[3].split(",")[1], "n/a?")
    lines[5] = ",".join(["", *lines[5].split(",")[1:]])
    lines[7] = lines[7] + ",1,2"
    lines[9] = lines[9].replace(lines[9].split(",")[4], "-3")
    lines[11] = lines[11].replace(lines[11].split(",")[2], "1.5")  # the high
    (tmp_path / "A.csv").write_text("\n".join(lines) + "\n")
    summary = ingest([tmp_path / "A.csv"], tmp_path / "store")
    rejected = pd.read_csv(tmp_path / "store" / "rejected.csv").sort_values("line")
    assert summary.bars + summary.rejected == len(TRUTH) and summary.rejected == 5
    assert rejected["file"].unique().tolist() == ["A.csv"]
    assert rejected["line"].tolist() == [4, 6, 8, 10, 12]
    assert rejected["reason"].str.contains("open is no number|no time|cells, not|zero or less|outside low").all()


def test_more_bars_are_added_and_a_changed_history_is_refused(tmp_path):
    table = TRUTH.assign(symbol="AAPL")
    other = TRUTH.assign(symbol="MSFT").iloc[5:]
    pd.concat([table.iloc[:20], other.iloc[:10]]).to_csv(tmp_path / "first.csv", index=False)
    pd.concat([table.iloc[15:], other]).to_csv(tmp_path / "second.csv", index=False)
    ingest([tmp_path / "first.csv"], tmp_path / "store")
    summary = ingest([tmp_path / "second.csv"], tmp_path / "store", append=True)
    assert summary.bars == len(table) + len(other)
    ingest([tmp_path / "first.csv", tmp_path / "second.csv"], tmp_path / "whole")
    assert contents(tmp_path / "store", "*.bin") == contents(tmp_path / "whole", "*.bin")
    before = contents(tmp_path / "store", "*")
    table.assign(close=table["close"] * 1.01, high=table["high"] * 1.02).to_csv(tmp_path / "third.csv", index=False)
    with pytest.raises(ValueError, match="AAPL 2024-01-02 .* has high .* history has changed"):
        ingest([tmp_path / "third.csv"], tmp_path / "store", append=True)
    assert contents(tmp_path / "store", "*") == before
    assert {path.name for path in tmp_path.iterdir()} == {"first.csv", "second.csv", "third.csv", "store", "whole"}


def contents(folder, pattern):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def test_a_store_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not empty"):
        ingest([SOURCES[0]], tmp_path / "store")
    with pytest.raises(ValueError, match="no store that ingest has written"):
        ingest([SOURCES[0]], tmp_path / "store", append=True)
    assert (tmp_path / "store" / "thesis.tex").read_text() == "years of work"


def test_a_folder_of_files_and_a_universe_with_members_that_have_left(tmp_path):
    folder = tmp_path / "bars"
    folder.mkdir()
    for name in ("SH600000", "SZ000001", "con"):
        TRUTH.to_csv(folder / f"{name}.csv", index=False)
    (folder / "loop").symlink_to(folder)
    members = tmp_path / "members.txt"
    members.write_text("SH600000\t2024-01-02\t2024-02-01\nSH600009\t2024-01-02\t2024-02-01\n")
    summary = ingest([folder], tmp_path / "store", universes={"mine": members})
    assert summary.instruments == 3 and summary.files == 3
    assert any("1 of 2 members have no bars, SH600009 first" in finding for finding in summary.findings)
    use_store(tmp_path / "store", "day")
    assert list(D.list_instruments(D.instruments("mine"), as_list=True)) == ["SH600000", "SH600009"]
    assert len(D.features(["CON"], ["$close"])) == len(TRUTH)


def test_foreign_names_are_mapped(tmp_path):
    TRUTH.rename(columns={"close": "Dernier", "time": "Quand"}).to_csv(tmp_path / "A.csv", index=False)
    assert main(["ingest", str(tmp_path / "A.csv"), str(tmp_path / "store")]) == 2
    command = [
        "ingest",
        str(tmp_path / "A.csv"),
        str(tmp_path / "store"),
        "--map",
        "close=Dernier",
        "--map",
        "time=Quand",
    ]
    assert main(command) == 0

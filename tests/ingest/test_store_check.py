"""The check of a store finds what was put wrong into it, where it was put, and nothing else."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from kronos_qlib.analysis.pages import write_store_page
from kronos_qlib.cli import main
from kronos_qlib.ingest.store import ingest
from kronos_qlib.ingest.store_check import check_store

DAYS = pd.bdate_range("2022-01-03", periods=400)


def bars(seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    close = 10 * np.exp(np.cumsum(random.normal(0, 0.01, len(DAYS))))
    frame = pd.DataFrame({"date": DAYS, "open": np.r_[close[0], close[:-1]], "close": close})
    frame["high"], frame["low"] = (
        frame[["open", "close"]].max(axis=1) * 1.01,
        frame[["open", "close"]].min(axis=1) * 0.99,
    )
    frame["volume"] = random.lognormal(12, 0.3, len(DAYS)).round()
    return frame.assign(amount=frame["close"] * frame["volume"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store without faults: three shares and an index."""
    folder = tmp_path_factory.mktemp("sound")
    for number in range(3):
        bars(number).to_csv(folder / f"SH60000{number}.csv", index=False)
    bars(9).to_csv(folder / "index.csv", index=False)
    index = folder.rename(folder.with_name("bars")) / "index.csv"
    table = pd.read_csv(index).assign(symbol="SH000300")
    table.to_csv(index, index=False)
    ingest([index.parent], index.parent.parent / "store", benchmark="SH000300")
    store = index.parent.parent / "store"
    (store / "calendars" / "day_future.txt").write_text((store / "calendars" / "day.txt").read_text() + "2023-08-01\n")
    return store


@pytest.fixture
def store(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "store")


def change(store, name, field, edit):
    """Edit the numbers of a field of an instrument in place."""
    path = store / "features" / name.lower() / f"{field}.day.bin"
    values = np.fromfile(path, "<f4")
    edit(values[1:])
    values.tofile(path)


def findings(store):
    return {finding.subject: finding for finding in check_store(store).findings if finding.level != "ok"}


def test_a_sound_store_has_no_finding(sound, capsys):
    assert findings(sound) == {}
    assert main(["check", str(sound)]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_every_kind_of_fault_is_found_where_it_is(store):
    def missing(values):
        values[100:130] = np.nan

    for field in ("open", "high", "low", "close", "volume", "amount", "change", "vwap"):
        change(store, "SH600000", field, missing)
    for field in ("open", "high", "low", "close"):
        change(store, "SH600000", field, lambda values: values.__setitem__(slice(200, None), values[200:] / 2))
        change(store, "SH600001", field, lambda values: values.__setitem__(slice(300, 308), values[300]))
    change(store, "SH600001", "high", lambda values: values.__setitem__(slice(300, 308), values[300:308].max() * 2))
    change(store, "SH600001", "low", lambda values: values.__setitem__(50, values[50] * 3))
    change(store, "SH600001", "volume", lambda values: values.__setitem__(slice(20, 24), 0))
    change(store, "SH600002", "volume", lambda values: values.__setitem__(slice(250, None), values[250:] / 100))
    change(store, "SH000300", "close", lambda values: values.__setitem__(7, np.nan))
    with (store / "instruments" / "gone.txt").open("w") as file:
        file.write("SH600000\t2022-01-03\t2023-01-01\nSH699999\t2022-01-03\t2022-06-01\n")
    (store / "calendars" / "day_future.txt").unlink()
    (store / "features" / "sh600009").mkdir()
    (store / "features" / "sh600009" / "close.day.bin").write_bytes(b"\0\0\0")
    found = findings(store)
    day = [str(date.date()) for date in DAYS]
    expected = {
        "missing bars": f"SH600000 {day[130]}: 30 before it",
        "jumps": f"SH600000 {day[200]}: -",
        "impossible bars": f"SH600001 {day[50]} open",
        "no volume": f"SH600001 {day[20]} first of 4",
        "stale prices": f"SH600001 {day[307]}: 8 bars",
        "unit changes": f"SH600002 {day[250]}: × ",
        "universe": "SH699999",
        "damaged files": "sh600009/close.day.bin: 3 bytes",
    }
    for subject, example in expected.items():
        assert any(example in line for line in found[subject].examples), (subject, found[subject])
    assert found["benchmark"].count == 1 and "1 missing between them" in found["benchmark"].text
    assert found["impossible bars"].level == found["damaged files"].level == "error"
    assert set(found) == {*expected, "benchmark", "future calendar"}
    assert main(["check", str(store)]) == 2


def test_json_and_page_hold_the_same_findings(store, tmp_path, capsys):
    change(store, "SH600001", "volume", lambda values: values.__setitem__(slice(20, 24), 0))
    assert main(["check", str(store), "--json", "--html", str(tmp_path / "page.html")]) == 0
    content = json.loads(capsys.readouterr().out)
    (finding,) = [finding for finding in content["findings"] if finding["level"] == "warning"]
    (row,) = [row for row in content["instruments"] if row["instrument"] == "SH600001"]
    assert finding["subject"] == "no volume" and finding["count"] == row["no volume"] == 4
    page = (tmp_path / "page.html").read_text()
    assert finding["text"] in page and "SH600001" in page and "https://" not in page.split("<script>")[0]


def test_names_in_a_page_are_text(store, tmp_path):
    (store / "instruments" / "a.txt").write_text("<SCRIPT>ALERT(1)</SCRIPT>\t2022-01-03\t2023-01-01\n")
    page = write_store_page(check_store(store), tmp_path / "page.html").read_text()
    assert "<SCRIPT>" not in page and "&lt;SCRIPT&gt;" in page


@pytest.mark.parametrize("arguments", [["--freq", "5min"], ["--html", "/proc/no/page.html"]])
def test_what_cannot_be_done_is_one_line(store, capsys, arguments):
    assert main(["check", str(store), *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_options_of_a_store_and_a_folder_that_is_none(tmp_path, capsys):
    assert main(["check", str(tmp_path / "no.yaml"), "--json"]) == 2
    assert "which is a folder" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 2
    assert "no Qlib store, which has calendars/" in capsys.readouterr().err


def test_what_is_odd_in_the_last_sessions_is_an_error_where_that_is_asked(store, capsys):
    for field in ("open", "high", "low", "close"):
        change(store, "SH600000", field, lambda values: values.__setitem__(slice(-3, None), values[-3:] / 2))
    assert main(["check", str(store)]) == 0
    assert main(["check", str(store), "--recent", "2"]) == 0
    assert main(["check", str(store), "--recent", "3"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert f"recent jumps 1 since {DAYS[-3]} SH600000 {DAYS[-3].date()}: -" in printed
    assert main(["check", str(store), "--recent", "-1"]) == 2

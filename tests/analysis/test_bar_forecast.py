"""kronos-qlib forecast: from a file to a table, a CSV file and a page; and its Python face, predict_df."""

import contextlib
import io
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from calibrations import calibration_of, make_calibration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import make_networks

from kronos_qlib import Kronos, KronosPredictor, KronosTokenizer
from kronos_qlib.cli import main
from kronos_qlib.forecast.predictor import possible_bars

SOURCES = Path(__file__).parents[1] / "ingest" / "sources"


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder as --model takes it."""
    folder = tmp_path_factory.mktemp("networks")
    for name, network in zip(("tokenizer", "model"), make_networks()):
        network.save_pretrained(folder / name)
    return folder


def forecast(networks, source, out, *more) -> int:
    command = ["forecast", str(source), "--model", str(networks), "--horizon", "6", "--samples", "30"]
    return main([*command, "--out", str(out), *more])


def figure_of(page: Path) -> dict:
    return json.loads(re.search(r'id="figure">(.*?)</script>', page.read_text(), re.DOTALL)[1])


@pytest.mark.parametrize(
    ("source", "instrument", "first", "last"),
    [
        ("tushare.csv", "SH600000", "2024-02-19", "2024-02-26"),  # after the holidays of the New Year
        ("BTCUSDT-5m-2024-01.zip", "BTCUSDT", "2024-01-02 12:05:00", "2024-01-02 12:30:00"),
        ("yfinance.csv", "AAPL", "2024-02-13", "2024-02-20"),
    ],
)
def test_a_file_becomes_a_table_a_csv_file_and_a_page(networks, tmp_path, capsys, source, instrument, first, last):
    assert forecast(networks, SOURCES / source, tmp_path / "page.html") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{instrument}: 30 bars to") and f"{first}"[:16] in printed
    table = pd.read_csv(tmp_path / "page.csv", index_col="time")
    assert table.index[0] == first and table.index[-1] == last and len(table) == 6
    levels = table[["q05", "q10", "q25", "q50", "q75", "q90", "q95"]].to_numpy()
    assert (np.diff(levels, axis=1) >= 0).all() and table["prob_up"].between(0, 1).all()
    assert (table["low"] <= table["high"]).all()
    figure = figure_of(tmp_path / "page.html")
    kinds = [trace["type"] for trace in figure["data"]]
    assert kinds.count("candlestick") == 1 and "bar" in kinds and kinds.count("scatter") >= 20
    assert "http" not in re.sub(r"<script>.*?</script>", "", (tmp_path / "page.html").read_text(), flags=re.DOTALL)
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page.csv"}


def test_from_an_earlier_date_what_came_is_shown(networks, tmp_path, capsys):
    assert forecast(networks, SOURCES / "tushare.csv", tmp_path / "p.html", "--at", "2024-01-19") == 0
    assert "came" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p.csv", index_col="time")
    truth = pd.read_csv(SOURCES.parent / "truth.csv", index_col="time")["close"]
    assert table.index[0] == "2024-01-22"
    np.testing.assert_allclose(table["came"], truth.loc[table.index])
    assert [trace.get("name") for trace in figure_of(tmp_path / "p.html")["data"]].count("what came") == 1


def test_the_forecast_sees_nothing_of_what_came(networks, tmp_path):
    frame = pd.read_csv(SOURCES.parent / "truth.csv")
    later = frame["time"] > "2024-01-19"
    for name, factor in (("a", 1.0), ("b", 3.0)):
        prices = ["open", "high", "low", "close"]
        changed = frame.copy()
        changed.loc[later, prices] = frame.loc[later, prices] * factor
        changed.to_csv(tmp_path / f"{name}.csv", index=False)
        assert forecast(networks, tmp_path / f"{name}.csv", tmp_path / f"{name}.html", "--at", "2024-01-19") == 0
    one, other = (pd.read_csv(tmp_path / f"{name}.csv").drop(columns=["came", "instrument"]) for name in "ab")
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--horizon", "0"], "--horizon is 0"),
        (["--at", "someday"], "--at 'someday' is no date"),
        (["--at", "1990-01-01"], "0 bars to forecast from up to 1990-01-01"),
        (["--map", "close"], "--map 'close' should be NAME=VALUE"),
        (["--map", "close=Last"], "no column 'Last' for close"),
        (["--exchange", "NOWHERE"], "unknown exchange 'NOWHERE'"),
        (["--model", "huge"], "--model 'huge' is neither a folder nor one of"),
    ],
)
def test_what_cannot_be_forecast_is_one_line(networks, tmp_path, capsys, more, message):
    assert forecast(networks, SOURCES / "tushare.csv", tmp_path / "p.html", *more) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told
    assert not list(tmp_path.iterdir())


def test_several_instruments_are_asked_about_and_one_is_named(networks, tmp_path, capsys):
    truth = pd.read_csv(SOURCES.parent / "truth.csv")
    pd.concat([truth.assign(symbol="AAPL"), truth.assign(symbol="MSFT")]).to_csv(tmp_path / "two.csv", index=False)
    assert forecast(networks, tmp_path / "two.csv", tmp_path / "p.html") == 2
    assert "holds 2 instruments; name one as" in capsys.readouterr().err
    assert forecast(networks, f"{tmp_path / 'two.csv'}:MSFT", tmp_path / "p.html") == 0


def test_an_instrument_of_a_store(networks, tmp_path, capsys):
    assert main(["ingest", str(SOURCES / "tushare.csv"), str(tmp_path / "store")]) == 0
    assert forecast(networks, f"{tmp_path / 'store'}:SH600000", tmp_path / "p.html") == 0
    assert forecast(networks, SOURCES / "tushare.csv", tmp_path / "q.html") == 0
    assert pd.read_csv(tmp_path / "p.csv")["q50"].to_list() == pytest.approx(pd.read_csv(tmp_path / "q.csv")["q50"])
    assert forecast(networks, tmp_path / "store", tmp_path / "r.html") == 2
    assert "name an instrument of it" in capsys.readouterr().err


def test_forecast_bars_are_possible_and_their_close_is_as_drawn():
    paths = np.random.default_rng(0).normal(size=(50, 8, 6))
    bars = possible_bars(paths)
    opened, high, low, close = (bars[..., place] for place in range(4))
    assert (high >= np.maximum(opened, close)).all() and (low <= np.minimum(opened, close)).all()
    assert (bars[..., 4:] >= 0).all()
    np.testing.assert_array_equal(bars[..., [0, 3]], paths[..., [0, 3]])


# How much a model sees


def test_a_calibrated_forecast_says_so_and_its_bands_are_conformal(networks, tmp_path, capsys):
    tokenizer = KronosTokenizer.from_pretrained(networks / "tokenizer")
    calibration = calibration_of(tokenizer, Kronos.from_pretrained(networks / "model"), lookback=20)
    path = calibration.save(tmp_path / "calibration.json")
    command = ["forecast", str(SOURCES / "tushare.csv"), "--model", str(networks), "--samples", "30"]
    assert main([*command, "--calibration", str(path), "--out", str(tmp_path / "page.html")]) == 0
    printed, table = capsys.readouterr().out, pd.read_csv(tmp_path / "page.csv")
    assert ", calibrated\n" in printed and f"Calibrated: {calibration.describe()}" in printed
    assert "SH600000: 20 bars to" in printed and len(table) == calibration.horizon, "as it was fitted"
    page = (tmp_path / "page.html").read_text()
    assert "calibrated forecast" in page and "and calibrated" in page and "split conformal" in page
    assert {"90% band", "50% band"} <= {trace.get("name") for trace in figure_of(tmp_path / "page.html")["data"]}
    wide = make_calibration(calibration.identity.model_dump(), 20, conformity=(((9.0,) * 101,) * 3,) * 3).save(
        tmp_path / "wide.json"
    )
    assert main([*command, "--calibration", str(wide), "--out", str(tmp_path / "wide.html")]) == 0
    wider = pd.read_csv(tmp_path / "wide.csv")
    assert (wider["q95"] > table["q95"]).all() and (wider["q05"] < table["q05"]).all()
    pd.testing.assert_frame_equal(wider[["q50", "prob_up", "low"]], table[["q50", "prob_up", "low"]])
    capsys.readouterr()
    assert main([*command, "--calibration", str(path), "--horizon", "4", "--out", str(tmp_path / "no.html")]) == 2
    assert main([*command, "--calibration", str(networks / "model" / "config.json")]) == 2
    assert main([*command[:2], "--calibration", str(path), "--out", str(tmp_path / "no.html")]) == 2
    steps, foreign, nano = capsys.readouterr().err.splitlines()
    assert "the calibration has 3 steps, and the forecast 4" in steps and "is no calibration of kronos-qlib" in foreign
    assert "calibration.json: KronosPredictor: the calibration was fitted on forecasts with a" in nano
    assert not (tmp_path / "no.html").exists()


def long_file(folder: Path) -> Path:
    frame = series("A", 300).rename(columns={"timestamp": "date"})
    frame.to_csv(folder / "A.csv", index=False)
    return folder / "A.csv"


@pytest.mark.parametrize(("horizon", "seen"), [(24, 76), (80, 50)])
def test_nano_sees_no_more_bars_than_it_was_trained_on(tmp_path, capsys, horizon, seen):
    command = ["forecast", str(long_file(tmp_path)), "--horizon", str(horizon), "--samples", "2"]
    assert main([*command, "--out", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"A: {seen} bars to") and "nano, which comes with kronos-qlib, is small" in printed
    assert f"It sees the last {seen} bars, as it was trained on windows of 100" in printed
    assert "as it decodes it (anchor)" in printed


def test_a_training_says_how_long_its_windows_were(networks, tmp_path, capsys):
    for stage, name in (("tokenizer", "tokenizer"), ("predictor", "model")):
        shutil.copytree(networks / name, tmp_path / "training" / stage / "best")
    identity = {"training windows": "480 × (40 + 11) 98"}
    (tmp_path / "training" / "predictor" / "identity.json").write_text(json.dumps(identity))
    assert forecast(tmp_path / "training", long_file(tmp_path), tmp_path / "page.html") == 0
    assert capsys.readouterr().out.startswith("A: 44 bars to"), "50 less a horizon of 6"


def test_windows_longer_than_those_of_the_training_are_warned_of():
    predictor = KronosPredictor(Kronos.from_pretrained("nano"), KronosTokenizer.from_pretrained("nano"), "cpu")
    for length, expected in ((90, 0), (91, 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            predictor.predict_df(series("A", length), prediction_length=10, sample_count=2)
        assert len([w for w in said if "longer than the 100 that nano was trained on" in str(w.message)]) == expected


# Garbage


CELLS = st.sampled_from(
    [b"", b"--", b"x", b'"1,234.5"', b"1e400", b"-1", b"nan", b"2024-13-45", b"\xff", b"0", b"9" * 20]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_holds_there_is_one_clear_end(networks, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("garbage")
    name = data.draw(st.sampled_from(["a.csv", "a.parquet", "a.zip", "a.csv.gz", "a.feather"]))
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=300))
    else:
        rows = [line.split(b",") for line in (SOURCES.parent / "truth.csv").read_bytes().splitlines()]
        for _ in range(data.draw(st.integers(1, 40))):
            rows[data.draw(st.integers(1, len(rows) - 1))][data.draw(st.integers(0, 6))] = data.draw(CELLS)
        content, name = b"\n".join(b",".join(row) for row in rows), "a.csv"
    (folder / name).write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        status = forecast(networks, folder / name, folder / "page.html", "--samples", "4")
    written = {path.name for path in folder.iterdir()} - {name}
    if status == 0:
        table = pd.read_csv(folder / "page.csv")
        assert written == {"page.html", "page.csv"} and np.isfinite(table.drop(columns=["time", "instrument"])).all(
            axis=None
        )
    else:
        lines = error.getvalue().strip().splitlines()
        assert status == 2 and not written and len(lines) == 1 and name in lines[0]


# predict_df


@pytest.fixture(scope="module")
def predictor():
    tokenizer, model = make_networks()
    return KronosPredictor(model, tokenizer, device="cpu", s2_rotation="aligned")


def series(name, length, seed=0):
    rng = np.random.default_rng(seed)
    close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, length)))
    times = pd.bdate_range("2024-01-02", periods=length)
    bars = {"open": close, "high": close * 1.01, "low": close * 0.99, "close": close, "volume": 1e4}
    return pd.DataFrame({"item_id": name, "timestamp": times} | bars)


def test_series_of_different_lengths_are_forecast_together_and_each_as_alone(predictor):
    frame = pd.concat([series("B", 30, 1), series("A", 20, 2), series("C", 30, 3)])
    found = predictor.predict_df(frame, prediction_length=4, quantile_levels=[0.1, 0.9], sample_count=20)
    assert list(found.columns) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.9"]
    assert found["item_id"].unique().tolist() == ["B", "A", "C"] and len(found) == 12
    assert (found["0.1"] <= found["predictions"]).all() and (found["predictions"] <= found["0.9"]).all()
    for name, part in found.groupby("item_id"):
        own = frame[frame["item_id"] == name]
        alone = predictor.predict_df(own, prediction_length=4, quantile_levels=[0.1, 0.9], sample_count=20)
        np.testing.assert_allclose(alone["predictions"], part["predictions"], rtol=1e-6)
        expected = pd.bdate_range(own["timestamp"].iloc[-1], periods=5)[1:]
        assert part["timestamp"].to_list() == expected.to_list()


def test_given_times_targets_and_names_are_taken(predictor):
    frame = series("A", 20).rename(columns={"item_id": "symbol", "timestamp": "when"})
    future = pd.DataFrame({"symbol": "A", "when": pd.date_range("2024-03-01", periods=3)})
    names = {"id_column": "symbol", "timestamp_column": "when"}
    found = predictor.predict_df(frame, future, target=["high", "low"], sample_count=5, **names)
    assert found["target_name"].to_list() == ["high"] * 3 + ["low"] * 3
    assert found["when"].to_list() == future["when"].to_list() * 2
    high, low = (found.loc[found["target_name"] == name, "predictions"].to_numpy() for name in ("high", "low"))
    assert (high >= low).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give either future_df or prediction_length"),
        ({"prediction_length": 0}, "prediction_length is 0"),
        ({"prediction_length": 3, "target": "vwap"}, "target should name columns"),
        ({"prediction_length": 3, "quantile_levels": [1.5]}, "quantile_levels lie within"),
        ({"prediction_length": 3, "id_column": "code"}, "df has no column 'code'"),
        ({"future_df": pd.DataFrame({"item_id": ["Z"], "timestamp": ["2025-01-01"]})}, "no times of item_id 'A'"),
    ],
)
def test_bad_arguments_are_one_line(predictor, changes, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict_df(series("A", 20), **changes)

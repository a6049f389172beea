import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from kronos_qlib.analysis import charts
from kronos_qlib.analysis.comparison import Comparison, compare_runs
from kronos_qlib.analysis.fans import BARS_BEFORE, FansError, load_fans
from kronos_qlib.analysis.figures import plot_deciles, plot_rolling_ic
from kronos_qlib.analysis.report import write_page
from kronos_qlib.analysis.results import RunResult
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.forecast.forecaster import quantile_columns

HORIZON, DAYS = 4, 70
LARGEST = 6e6  # bytes


def _run(name: str, days: pd.DatetimeIndex, instruments: list[str], seed: int) -> RunResult:
    """A run whose scores are a mix of its label and noise."""
    random = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([days, instruments], names=["datetime", "instrument"])
    labels = pd.Series(np.random.default_rng(0).normal(0, 0.02, len(index)), index)
    report = pd.DataFrame(
        {
            "return": random.normal(0.001, 0.01, len(days)),
            "bench": random.normal(0, 0.01, len(days)),
            "cost": 0.0002,
            "turnover": random.uniform(0.1, 0.3, len(days)),
            "account": 1e8,
        },
        index=days,
    )
    return RunResult(
        name=name,
        run_id=f"{seed:032d}",
        metrics=dict.fromkeys(("excess_return", "excess_return_with_cost", "information_ratio", "max_drawdown"), 0.1),
        report=report,
        freq="1day",
        scores=(0.1 * labels + pd.Series(random.normal(0, 0.02, len(index)), index)).rename("score"),
        labels=labels.rename("label"),
        trades=None,
        provider_uri="market",
        store=None,
        synthetic=True,
        horizon=None,
        overlap=None,
        config={"task": {"model": {"class": "LGBModel", "kwargs": {"loss": "mse"}}}, "odd": object()},
        kronos_run={},
        forecast_digest=None,
        artifacts=None,
    )


def _write_forecasts(folder: Path, run: RunResult, store: Path) -> None:
    """Chunks as `kronos_qlib.forecast.chunk_store` leaves them: bands about the last close."""
    calendar = pd.DatetimeIndex((store / "calendars" / "day.txt").read_text().split())
    rows = run.scores.rename("mean_return").reset_index()
    closes = {}
    for name in rows["instrument"].unique():
        values = np.fromfile(store / "features" / name.lower() / "close.day.bin", dtype="<f4")
        closes[name] = pd.Series(values[1:], calendar[int(values[0]) : int(values[0]) + len(values) - 1])
    rows["last_close"] = [float(closes[name][day]) for day, name in zip(rows["datetime"], rows["instrument"])]
    columns = {
        column: (rows["last_close"] * (0.9 + 0.002 * int(column[1:3]))).astype("float32")
        for column in quantile_columns(HORIZON)
    }
    rows = pd.concat([rows, pd.DataFrame(columns)], axis=1)
    folder.mkdir(parents=True)
    for part, chunk in enumerate(np.array_split(np.arange(len(rows)), 3)):
        pq.write_table(pa.Table.from_pandas(rows.iloc[chunk], preserve_index=False), folder / f"chunk-{part}.parquet")


def _first_bar(folder: Path) -> int:
    return int(np.fromfile(folder / "close.day.bin", dtype="<f4", count=1)[0])


def _write_evaluation(folder: Path) -> None:
    """Artifacts as ForecastRecord leaves them, the columns that the page shows."""
    folder.mkdir()
    steps = pd.DataFrame(index=pd.RangeIndex(1, HORIZON + 1, name="step"))
    for column in ("coverage_50", "coverage_50_volatility", "coverage_90", "coverage_90_volatility"):
        steps[column] = int(column[9:11]) / 100 - 0.05
    for number, column in enumerate(("crps", "crps_volatility", "crps_last_value")):
        steps[column] = 0.01 * (1 + 0.1 * number) * np.sqrt(steps.index)
    steps.to_csv(folder / "steps.csv")
    about = {"samples": 5, "perfect_coverage": {"coverage_50": 1 / 3, "coverage_90": 0.6}, "pit_from": "quantiles"}
    (folder / "about.json").write_text(json.dumps(about | {"calibration": {"last_bar": "2020-01-31"}}))
    names = ["crps", "crps_last_value", "crps_volatility", "mae", "rmse", "coverage_50", "coverage_90", "direction"]
    row = dict.fromkeys(names, 0.01) | {"crps": 0.0281, "direction_low": 0.48, "direction_high": 0.55}
    for name, column, groups in (
        ("overall.csv", "evaluated_windows", [700]),
        ("by_year.csv", "year", [2019, 2020]),
        ("by_volatility.csv", "volatility", ["low", "middle", "high"]),
    ):
        pd.DataFrame([{column: group} | row for group in groups]).to_csv(folder / name, index=False)
    low = np.arange(20) / 20
    histogram = {"step": "all", "low": low, "high": low + 0.05, "density": 1.0, "density_volatility": 1.1}
    pd.DataFrame(histogram).to_csv(folder / "pit.csv", index=False)
    fitted = [
        {"measure": band, "step": step, "before": 0.4, "after": int(band[-2:]) / 100}
        for band in ("coverage_50", "coverage_90")
        for step in [*range(1, HORIZON + 1), "all"]
    ]
    pd.DataFrame(fitted).to_csv(folder / "calibration.csv", index=False)
    compared = [{"forecast": "kronos", "step": "all", "crps": 0.0281, "energy": 0.09, "coverage_90": 0.4}]
    ends = {"crps_difference": -0.0002, "crps_difference_low": -0.0005, "crps_difference_high": 0.0001, "dm_p": 0.21}
    compared += [{"forecast": "historical_simulation", "step": step, "crps": 0.0283} | ends for step in ("1", "all")]
    every = {"interval_50": 0.1, "interval_90": 0.2, "coverage_50": 0.5, "qlike": -5.5}
    pd.DataFrame([row | every for row in compared]).to_csv(folder / "baselines.csv", index=False)
    drawdown = {"measure": "drawdown", "level": 0.1, "expected": 0.04, "observed": 0.05}
    risk = [{"forecast": "kronos", "observed_low": 0.03, "observed_high": 0.07} | drawdown]
    pd.DataFrame(risk).to_csv(folder / "risk.csv", index=False)
    prob_up = {"when": ["before", "before", "after"], "forecast": [0.2, 0.8, 0.5], "share": 0.5, "windows": [5, 5, 10]}
    pd.DataFrame(prob_up).to_csv(folder / "prob_up.csv", index=False)


@dataclasses.dataclass(frozen=True)
class Page:
    """A report of a Kronos run with forecasts and two plain runs, one of which has a name that is markup."""

    comparison: Comparison
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def kronos(self) -> RunResult:
        return self.comparison.runs[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    store = write_demo_market(folder / "market", instruments=20, days=150)
    days = pd.DatetimeIndex((store / "calendars" / "day.txt").read_text().split())[60 : 60 + DAYS]
    listed = [folder for folder in sorted((store / "features").glob("demo0*")) if _first_bar(folder) == 0]
    instruments = [folder.name.upper() for folder in listed]
    artifacts = folder / "mlruns" / "1" / "run" / "artifacts"
    artifacts.mkdir(parents=True)
    _write_evaluation(artifacts / "forecast_evaluation")
    settings = {"model": {"score": "mean_return", "forecast": {"cache_dir": "forecasts"}}, "data": {"horizon": HORIZON}}
    settings["data"]["lookback"] = 30
    kronos = dataclasses.replace(
        _run("kronos_demo", days, instruments, 1),
        kronos_run=settings,
        forecast_digest="digest",
        artifacts=artifacts,
        overlap="seen before",
        horizon=HORIZON,
    )
    _write_forecasts(folder / "forecasts" / "digest", kronos, store)
    comparison = compare_runs(
        [kronos, _run("</script><b>lightgbm", days, instruments, 2), _run("reversal", days, instruments, 3)]
    )
    runs = [dataclasses.replace(run, store=store) for run in comparison.runs]  # factors take seconds, and are not shown
    comparison = dataclasses.replace(comparison, runs=runs)
    return Page(comparison, write_page(comparison, folder / "out" / "report.html"))


def _figures(text: str) -> list[dict]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)]


def _sections(text: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', text, re.S))


def test_page_is_one_file_that_needs_no_network(page: Page) -> None:
    assert page.path.stat().st_size < LARGEST
    markup = re.sub(r"<script>.*?</script>", "", page.text, flags=re.S)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(""", markup)
    assert page.text.count("plotly.js v") == 1
    assert [path.name for path in page.path.parent.iterdir()] == ["report.html"]


def test_verdict_comes_first_then_warnings_then_tables_and_figures(page: Page) -> None:
    assert list(_sections(page.text)) == [
        *("verdict", "warnings", "tables", "uncertainty", "excess-return", "rolling-ic", "monthly", "deciles"),
        *("decile-returns", "costs", "turnover", "score-correlation", "calibration", "fans", "settings"),
    ]
    assert "rank IC: " in _sections(page.text)["verdict"]
    warnings = _sections(page.text)["warnings"]
    assert "CAUTION: kronos_demo: seen before." in warnings
    assert "SYNTHETIC demo market" in warnings
    assert page.text.index("simulated bars, not a real result") < page.text.index("<h1>")


def test_names_are_text_and_never_markup(page: Page) -> None:
    assert "<b>lightgbm" not in page.text
    assert "&lt;/script&gt;&lt;b&gt;lightgbm" in page.text
    assert "object at 0x" not in page.text


def test_tables_have_every_run_and_pair(page: Page) -> None:
    text = _sections(page.text)["tables"]
    assert text.count('<th scope="row">reversal</th>') == 8, (
        "signal, shape, backtest, returns and ratios at other costs, trials, after factors, rows"
    )
    assert '<th scope="row">kronos_demo − reversal</th>' in text


def test_fans_show_the_forecast_from_the_bar_it_was_made_on(page: Page) -> None:
    rank_ic = page.comparison.rank_ic["kronos_demo"]
    fans = load_fans(page.kronos, rank_ic)
    assert [fan.day_was for fan in fans[::3]] == ["best", "median", "worst"]
    assert [fan.rank_ic for fan in fans[::3]] == [rank_ic.max(), rank_ic.sort_values().iloc[DAYS // 2], rank_ic.min()]
    for fan in fans:
        assert list(fan.bars.index) == list(range(-BARS_BEFORE, HORIZON + 1))
        assert fan.bars.loc[0, "date"] == fan.day
        assert fan.bars.loc[0, "close"] == pytest.approx(fan.last_close)
        assert fan.quantiles["q50"].tolist() == pytest.approx([fan.last_close] * HORIZON, rel=1e-5)
    day = page.kronos.scores.loc[fans[0].day]
    assert (fans[0].instrument, fans[2].instrument) == (day.idxmax(), day.idxmin())


def test_forecasts_of_other_scores_or_none_are_said_and_not_shown(page: Page, tmp_path: Path) -> None:
    rank_ic = page.comparison.rank_ic["kronos_demo"]
    with pytest.raises(FansError, match="are not those of this run's scores"):
        load_fans(dataclasses.replace(page.kronos, scores=page.kronos.scores * 2), rank_ic)
    settings = page.kronos.kronos_run["model"] | {"calibration": {"segment": "valid"}}
    calibrated = dataclasses.replace(page.kronos, kronos_run=page.kronos.kronos_run | {"model": settings})
    with pytest.raises(
        FansError, match="its forecasts are calibrated, and its cache_dir holds them as they were drawn"
    ):
        load_fans(calibrated, rank_ic)
    with pytest.raises(FansError, match="the Qlib store market is not at hand"):
        load_fans(dataclasses.replace(page.kronos, store=None), rank_ic)
    elsewhere = dataclasses.replace(page.kronos, artifacts=None)
    with pytest.raises(FansError, match=r"its forecasts \(forecasts\) are not at hand"):
        load_fans(elsewhere, rank_ic)
    runs = [elsewhere, *page.comparison.runs[1:]]
    text = write_page(dataclasses.replace(page.comparison, runs=runs), tmp_path / "report.html").read_text()
    assert "Not drawn: its forecasts (forecasts) are not at hand." in _sections(text)["fans"]
    assert "No run has the artifacts of a ForecastRecord" in _sections(text)["calibration"]


def test_calibration_says_how_many_samples_and_gives_the_figures(page: Page) -> None:
    section = _sections(page.text)["calibration"]
    assert "dashed: 5 samples at best" in section and "rough in the tails as it is from quantiles" in section
    assert "on earlier days, to 2020-01-31" in section
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>2.81%</td>', section)
    assert rows == ["All", "2019", "2020", "Volatility low", "Volatility middle", "Volatility high"]
    assert "<td>48.0% … 55.0%</td>" in section


def test_baselines_and_risk_have_a_table(page: Page) -> None:
    section = _sections(page.text)["calibration"]
    rows = dict(re.findall(r'<th scope="row">(kronos|historical simulation)</th>(<td>2.8.*)', section))
    assert rows.keys() == {"kronos", "historical simulation"}
    assert "<td>2.830%</td><td>−0.020%</td><td>−0.050% … +0.010%</td><td>0.21</td>" in section
    assert "<td>drawdown 10%</td><td>4.00%</td><td>5.00%</td><td>3.00% … 7.00%</td><td>n/a</td>" in section


def test_neutralised_scores_are_shown_with_the_forecasts_they_were_made_of(page: Page) -> None:
    rank_ic = page.comparison.rank_ic["kronos_demo"]
    settings = page.kronos.kronos_run
    model = settings["model"] | {"neutralise": ["size"]}
    run = dataclasses.replace(page.kronos, scores=-page.kronos.scores, kronos_run=settings | {"model": model})
    fans, plain = load_fans(run, rank_ic), load_fans(page.kronos, rank_ic)
    assert (fans[0].instrument, fans[0].score) == (plain[2].instrument, -plain[2].score)
    with pytest.raises(FansError, match="score it again"):
        load_fans(dataclasses.replace(run, forecast_digest=None), rank_ic)


def test_long_lines_are_thinned_to_their_last_day_and_the_page_says_so() -> None:
    daily = pd.Series(range(2500), pd.bdate_range("2015-01-01", periods=2500))
    drawn = charts.thin(daily)
    assert len(drawn) <= charts.MOST_POINTS
    assert drawn.index[-1] == daily.index[-1]
    assert charts.thinning(2500) == 5
    assert charts.thin(daily[:100]).equals(daily[:100])


def test_pictures_are_drawn(page: Page, tmp_path: Path) -> None:
    plot_rolling_ic(page.comparison, tmp_path / "rolling_ic.png")
    plot_deciles(page.comparison, tmp_path / "deciles.png")
    for name in ("rolling_ic", "deciles"):
        assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.02


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of this machine, started once."""
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with browsers.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 375)])
def test_browser_draws_every_figure_without_a_word(
    page: Page, chromium: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    view = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    said: list[str] = []
    view.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(page.path.as_uri())
    view.wait_for_function("document.body.dataset.drawn", timeout=120_000)
    drawn = view.evaluate(
        "[...document.querySelectorAll('.figure')].map(place => "
        "place.querySelectorAll('.main-svg path, .main-svg image').length)"
    )
    wider = view.evaluate("document.documentElement.scrollWidth - innerWidth")
    view.screenshot(path=tmp_path / "page.png", full_page=True)
    view.close()
    assert said == []
    assert len(drawn) == len(_figures(page.text)) > 15
    assert min(drawn) > 0
    assert wider <= 0, "the page does not scroll sideways"
    picture = imread(tmp_path / "page.png")[..., :3]
    assert picture.std() > 0.05, "not blank"
    assert (picture.mean() < 0.3) == (scheme == "dark")

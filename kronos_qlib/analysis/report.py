"""The comparison as one HTML page that needs no network."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kronos_qlib.analysis import charts, tables
from kronos_qlib.analysis.comparison import Comparison
from kronos_qlib.analysis.fans import Fan, FansError, load_fans
from kronos_qlib.analysis.notes import backtest_period, synthetic_note
from kronos_qlib.analysis.own_figures import ReportFigure, draw_figure
from kronos_qlib.analysis.results import RunResult
from kronos_qlib.analysis.sections import Figure, Part, Section, Sentences, Table
from kronos_qlib.analysis.verdicts import pair_verdict, residual_verdict, run_verdict, trials_verdicts
from kronos_qlib.evaluation.palette import DARK, LIGHT
from kronos_qlib.files import whole_file

_HERE = Path(__file__).parent
_WARNINGS = ("CAUTION", "SYNTHETIC", "Survivorship")  # how notes begin that must not be missed
_MOST_SENTENCES = 6  # of a kind, before they are folded away


def write_page(
    comparison: Comparison, path: Path, figures: Sequence[ReportFigure] = (), sections: Sequence[Section] = ()
) -> Path:
    """Write the comparison to `path` as a page of its own: verdict, warnings, tables, figures, settings; return `path`.

    Forecast fans and calibration are shown for the runs that have their files; for the others a sentence names what is
    missing. Figures of more than `charts.MOST_POINTS` days show every n-th; a caption names n.

    Args:
        figures: of the user's own, shown last. sections: further ones, shown before them.

    Raises:
        ValueError: a figure of the user's own fails.
    """
    names = [run.name for run in comparison.runs]
    return write_sections(
        path,
        title=f"{', '.join(names)}: comparison",
        heading=" · ".join(names),
        about=_describe(comparison),
        synthetic=synthetic_note(comparison.runs),
        verdicts=_verdicts(comparison),
        warnings=[note for note in comparison.notes if note.startswith(_WARNINGS)],
        notes=[*tables.legend(comparison.step), *(note for note in comparison.notes if not note.startswith(_WARNINGS))],
        tables=_tables(comparison),
        sections=[*_sections(comparison), *sections, *_own_section(comparison, figures)],
        settings=[_settings(comparison, run) for run in comparison.runs],
    )


def write_sections(path: Path, **content: Any) -> Path:
    """Write a page of the template's `content` (title, heading, about, verdicts, …) to `path`, and return it."""
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = _json
    page = environment.get_template("report.html.jinja").render(
        **content,
        css=Markup((_HERE / "report.css").read_text()),  # of this package  # nosec B704
        plotly=Markup(get_plotlyjs()),  # of plotly  # nosec B704
        light=LIGHT,
        dark=DARK,
        dark_colours=charts.DARK_COLOURS,
    )
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _json(chart: go.Figure) -> Markup:
    """Encode a figure for a script element, which any `</script` in a name would end."""
    return Markup(chart.to_json().replace("<", "\\u003c"))  # no tag can begin in it  # nosec B704


def _describe(comparison: Comparison) -> str:
    days = comparison.rank_ic.index
    rows = int(comparison.dropped["kept_rows"].iloc[0])
    return (
        f"Scores of {days[0]:%d %b %Y} to {days[-1]:%d %b %Y}: {len(days):,} {comparison.step}s, {rows:,} rows that "
        f"all of {len(comparison.runs)} run{'s' if len(comparison.runs) > 1 else ''} score. Intervals: 95 %."
    )


def _verdicts(comparison: Comparison) -> list[Sentences]:
    kronos = {run.name for run in comparison.runs if run.kronos_run}
    pairs = list(comparison.pairs.index)
    first = [pair for pair in pairs if kronos & set(pair)] or pairs
    others = [pair for pair in pairs if pair not in first]
    names = list(comparison.table.index)
    residual = [name for name in names if comparison.residual_rank_ic[name].notna().any()]
    return [
        _sentences("One against the other", [pair_verdict(comparison, *pair) for pair in first], folded=False),
        _sentences("The other pairs", [pair_verdict(comparison, *pair) for pair in others], folded=True),
        _sentences("Each run by itself", [run_verdict(comparison, name) for name in names]),
        _sentences("After counting trials", trials_verdicts(comparison)),
        _sentences("After simple factors", [residual_verdict(comparison, name) for name in residual]),
    ]


def _sentences(title: str, items: list[str], folded: bool | None = None) -> Sentences:
    return Sentences(title, items, len(items) > _MOST_SENTENCES if folded is None else folded)


def _tables(comparison: Comparison) -> list[Table]:
    blocks = [
        make_table("Scores against returns", comparison.table, tables.SIGNAL),
        make_table("Shape of the signal", comparison.table, tables.SHAPE),
        make_table(
            tables.horizons_title(comparison), tables.by_horizon(comparison), tables.horizon_columns(comparison.step)
        ),
        make_table("Backtest", comparison.table, tables.BACKTEST),
        make_table("Backtest at other costs, excess a year", comparison.costs, tables.COSTS),
        make_table("Information ratio at other costs", comparison.costs, tables.RATIOS),
        make_table(tables.TRIALS_TITLE, comparison.table, tables.TRIALS),
        make_table(tables.TIES_TITLE, tables.tied(comparison), tables.TIES),
        make_table("Seeds: mean ± standard deviation", comparison.seeds, tables.SEEDS),
        make_table("Pairs: first less second", comparison.pairs, tables.PAIRS),
        make_table("After simple factors: rank IC of the residual score", comparison.table, tables.RESIDUAL),
        _exposures(comparison.exposures),
        make_table(
            "Rows that count: scored and labelled in all runs",
            comparison.dropped,
            tables.dropped_columns(comparison.step),
        ),
    ]
    return [block for block in blocks if block.rows]


def make_table(title: str, rows: pd.DataFrame, columns: dict[str, tables.Cell]) -> Table:
    """Format rows, each with its name, by the cells of columns."""
    body = [[_name(name), *(_minus(cell(row)) for cell in columns.values())] for name, row in rows.iterrows()]
    return Table(title, ["", *columns], body)


def _exposures(exposures: pd.DataFrame) -> Table:
    known = exposures.dropna(how="all")
    body = [
        [name, *("n/a" if pd.isna(value) else _minus(f"{value:+.2f}") for value in row)]
        for name, *row in known.itertuples()
    ]
    columns = ["", *(str(factor).replace("_", " ") for factor in exposures)]
    return Table("Exposures: mean daily rank correlation of the score with simple factors", columns, body)


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _name(name: str | tuple[str, str]) -> str:
    return name if isinstance(name, str) else " − ".join(name)


def _own_section(comparison: Comparison, figures: Sequence[ReportFigure]) -> Iterator[Section]:
    if figures:
        drawn = [Figure(*draw_figure(figure, comparison.runs)) for figure in figures]
        yield Section("own", "Figures of your own", "", [Part(drawn)])


def _sections(comparison: Comparison) -> Iterator[Section]:
    runs, days, step = comparison.runs, len(comparison.rank_ic), comparison.step
    yield _uncertainty(comparison)
    yield _section(
        "excess-return",
        "Cumulative excess return and drawdown",
        "Over the benchmark, summed. Solid: after costs; dotted: before. Below: drawdown after costs."
        + _thinning(max(len(run.report) for run in runs), "step"),
        charts.excess_return(runs),
    )
    yield _rolling(comparison)
    yield _section(
        "monthly",
        "Rank IC by month",
        f"Mean of the month's rank ICs, one a {step}.",
        charts.monthly_rank_ic(comparison),
    )
    yield _section(
        "deciles", "Deciles", "Mean label of the tenths of the instruments by score.", charts.deciles(comparison)
    )
    yield Section(
        "decile-returns",
        "Labels of the deciles, summed",
        f"As if each tenth were held from every label's {step} to the next, without costs. Below: the top decile less "
        f"the bottom one; shaded: the 95 % interval of its mean a {step} (stationary bootstrap), from the first {step} "
        "on. Each run is by itself." + _thinning(days, step),
        [
            Part(
                [
                    Figure(charts.decile_returns(rows), name)
                    for name, rows in comparison.decile_days.items()
                    if rows.notna().any(axis=None)
                ],
                columns=2,
            )
        ],
    )
    if len(comparison.horizons):
        yield _section(
            "horizons",
            tables.horizons_title(comparison),
            f"With the return from the next {step}'s close over so many {step}s. Longer ones overlap: their intervals "
            "say so.",
            charts.rank_ic_by_horizon(comparison),
        )
    if any(len(run.report) for run in runs):
        yield _costs_and_drawdowns(comparison)
    yield _section(
        "turnover",
        "Turnover and cost",
        f"Above: bought plus sold over the account, a day, mean of {charts.TURNOVER_DAYS}. Below: costs over the "
        "account, summed." + _thinning(max(len(run.report) for run in runs), "step"),
        charts.turnover_and_cost(runs),
    )
    yield _section(
        "score-correlation",
        "Score correlation",
        f"Mean rank correlation of the scores of a {step}. 1: the same order every {step}.",
        charts.score_correlation(comparison),
    )
    yield _calibration(runs)
    yield _fans(comparison)


def _section(name: str, title: str, text: str, chart: go.Figure) -> Section:
    return Section(name, title, text, [Part([Figure(chart)])])


def _thinning(count: int, step: str) -> str:
    apart = charts.thinning(count)
    return f" One {step} in {apart} is drawn." if apart > 1 else ""


def _uncertainty(comparison: Comparison) -> Section:
    figures = [Figure(charts.rank_ic_intervals(comparison), "Each run")]
    if len(comparison.pairs):
        figures.append(Figure(charts.pair_intervals(comparison), "Differences: first less second"))
    text = (
        f"Mean rank IC of a {comparison.step} with its 95 % interval. An interval across zero is no evidence of a "
        "signal. Each interval is by itself; the verdict corrects for how many there are."
    )
    return Section("uncertainty", "How sure the rank IC is", text, [Part(figures, columns=2)])


def _rolling(comparison: Comparison) -> Section:
    step, days = comparison.step, len(comparison.rank_ic)
    title = f"Rolling IC, {charts.ROLLING_DAYS} {step}s"
    if days < charts.ROLLING_DAYS:
        return Section("rolling-ic", title, f"Not drawn: the runs have {days} {step}s in common.", [])
    text = f"Mean of the last {charts.ROLLING_DAYS} {step}s: rank IC above, IC below." + _thinning(days, step)
    return _section("rolling-ic", title, text, charts.rolling_ic(comparison))


def _costs_and_drawdowns(comparison: Comparison) -> Section:
    rows = [
        [run, f"{row['start']:%d %b %Y}", f"{row['trough']:%d %b %Y}", _day(row["end"]), _minus(f"{row['depth']:.1%}")]
        + [f"{row['days']:,}"]
        for (run, _), row in comparison.drawdowns.iterrows()
    ]
    text = "The same trades at other costs: a strategy that knew them would trade less. Returns over the benchmark."
    columns = ["", "from", "lowest", "back at the high", "depth", "days"]
    parts = [
        Part([Figure(charts.costs(comparison))]),
        Part(tables=[Table("The deepest drawdowns after costs", columns, rows)]),
    ]
    return Section("costs", "Costs and drawdowns", text, parts)


def _day(date: pd.Timestamp) -> str:
    return "not yet" if pd.isna(date) else f"{date:%d %b %Y}"


def _calibration(runs: list[RunResult]) -> Section:
    title = "Calibration of the forecasts"
    parts = [part for run in runs if (part := _calibration_of(run))]
    if parts:
        return Section("calibration", title, "Forecast closes against actual closes.", parts)
    text = "No run has the artifacts of a ForecastRecord here, which measures forecasts against the actual bars."
    return Section("calibration", title, text, [])


def _calibration_of(run: RunResult) -> Part | None:
    folder = run.artifacts / "forecast_evaluation" if run.artifacts else None
    if folder is None or not (folder / "steps.csv").is_file():
        return None
    steps = pd.read_csv(folder / "steps.csv", index_col=0)
    about = json.loads((folder / "about.json").read_text())
    samples = f"{about['samples']} samples"
    bands = f"Share of closes within the 50 % and 90 % bands; dotted: as it should be, dashed: {samples} at best"
    rough = ", rough in the tails as it is from quantiles" if about["pit_from"] == "quantiles" else ""
    figures = [
        Figure(charts.coverage(steps, about["perfect_coverage"]), bands),
        Figure(charts.crps(steps), f"CRPS over the last close, from {samples}; less is better"),
        Figure(charts.pit(pd.read_csv(folder / "pit.csv")), f"PIT, all steps; dotted: calibrated{rough}"),
    ]
    if (folder / "calibration.csv").is_file():
        fitted = pd.read_csv(folder / "calibration.csv")
        before = f"Coverage before and after calibration on earlier days, to {about['calibration']['last_bar']}"
        figures.append(Figure(charts.calibrated(fitted), before))
    if (folder / "prob_up.csv").is_file():
        prob_up = pd.read_csv(folder / "prob_up.csv")
        figures.append(Figure(charts.reliability(prob_up), "prob_up and the share that rose; size: forecasts"))
    return Part(figures, title=run.name, columns=2, tables=[*_evaluation_tables(folder), *_baseline_tables(folder)])


def _evaluation_tables(folder: Path) -> list[Table]:
    """Tabulate what a ForecastRecord measured: overall, by year, by tercile of volatility."""
    files = {"overall.csv": "All", "by_year.csv": "", "by_volatility.csv": "Volatility "}
    rows = []
    for name, prefix in files.items():
        if (folder / name).is_file():
            for _, row in pd.read_csv(folder / name, dtype={"year": str}).iterrows():
                group = prefix if name == "overall.csv" else f"{prefix}{row.iloc[0]}"
                rows.append([group, *_evaluation_cells(row)])
    columns = ["", "CRPS", "last value", "hist. volatility", "MAE", "RMSE", "50 % band", "90 % band"]
    columns += ["direction", "95 %"]
    return [Table("Forecast closes against actual closes, over the last close", columns, rows)] if rows else []


def _baseline_tables(folder: Path) -> Iterator[Table]:
    """Tabulate the comparison with baseline forecasts, all steps, and the backtests of risk."""
    for name, title, columns in (
        (
            "baselines.csv",
            "Beside baseline forecasts, all steps; differences: this model less the baseline",
            _BASELINES,
        ),
        ("risk.csv", "Risk: losses beyond the VaR of one step, drawdowns within the horizon", _RISK),
    ):
        if (folder / name).is_file():
            table = pd.read_csv(folder / name, dtype={"step": str})
            rows = table[table["step"] == "all"] if "step" in table else table
            body = [
                [row["forecast"].replace("_", " "), *(_minus(cell(row)) for cell in columns.values())]
                for _, row in rows.iterrows()
            ]
            yield Table(title, ["", *columns], body)


def _figure_cell(layout: str, *names: str) -> tables.Cell:
    """Make a cell of the figures of some columns; n/a where the first is missing."""
    return lambda row: "n/a" if pd.isna(row.get(names[0])) else layout.format(*(row[name] for name in names))


_BASELINES = {
    "CRPS": _figure_cell("{:.3%}", "crps"),
    "difference": _figure_cell("{:+.3%}", "crps_difference"),
    "95 %": _figure_cell("{:+.3%} … {:+.3%}", "crps_difference_low", "crps_difference_high"),
    "DM p": _figure_cell("{:.2g}", "dm_p"),
    "interval score 50 %": _figure_cell("{:.2%}", "interval_50"),
    "90 %": _figure_cell("{:.2%}", "interval_90"),
    "in the 50 % band": _figure_cell("{:.1%}", "coverage_50"),
    "in the 90 % band": _figure_cell("{:.1%}", "coverage_90"),
    "QLIKE": _figure_cell("{:.3f}", "qlike"),
    "energy score": _figure_cell("{:.2%}", "energy"),
}
_RISK = {
    "": lambda row: f"{row['measure'].replace('var', 'VaR')} {row['level']:.0%}",
    "expected": _figure_cell("{:.2%}", "expected"),
    "observed": _figure_cell("{:.2%}", "observed"),
    "95 %": _figure_cell("{:.2%} … {:.2%}", "observed_low", "observed_high"),
    "Kupiec p": _figure_cell("{:.2g}", "kupiec_p"),
    "Christoffersen p": _figure_cell("{:.2g}", "conditional_p"),
    "instruments rejected": _figure_cell("{:.0%} and {:.0%}", "rejected_kupiec", "rejected_conditional"),
    "loss beyond over ES": _figure_cell("{:+.1%}", "es_residual"),
    "its 95 %": _figure_cell("{:+.1%} … {:+.1%}", "es_residual_low", "es_residual_high"),
}


def _evaluation_cells(row: pd.Series) -> list[str]:
    names = ["crps", "crps_last_value", "crps_volatility", "mae", "rmse", "coverage_50", "coverage_90", "direction"]
    cells = [f"{row[name]:.2%}" if name[:2] in ("cr", "ma", "rm") else f"{row[name]:.1%}" for name in names]
    ends = row["direction_low"], row["direction_high"]
    return [*cells, "n/a" if pd.isna(ends[0]) else f"{ends[0]:.1%} … {ends[1]:.1%}"]


def _fans(comparison: Comparison) -> Section:
    kronos = [run for run in comparison.runs if run.kronos_run]
    title = "Forecasts and actual bars"
    if not kronos:
        return Section("fans", title, "No run among these forecasts bars.", [])
    text = (
        f"The best, the median and the worst {comparison.step} by rank IC, and of each the instruments with the "
        "highest, the median and the lowest score. Shades: 90 % and 50 % bands of the close; line: median; candles: "
        "actual bars."
    )
    return Section("fans", title, text, [part for run in kronos for part in _fans_of(run, comparison)])


def _fans_of(run: RunResult, comparison: Comparison) -> list[Part]:
    try:
        fans = load_fans(run, comparison.rank_ic[run.name])
    except FansError as error:
        return [Part(title=run.name, text=f"Not drawn: {error}.")]
    days = dict.fromkeys((fan.day_was, fan.day, fan.rank_ic) for fan in fans)
    return [
        Part(
            [Figure(charts.fan(fan), _fan_caption(fan)) for fan in fans if fan.day_was == day_was],
            title=f"{run.name}: {day_was} {comparison.step}, {_time(day)}, rank IC " + _minus(f"{rank_ic:+.3f}"),
            columns=3,
        )
        for day_was, day, rank_ic in days
    ]


def _time(date: pd.Timestamp) -> str:
    return f"{date:%d %b %Y}" if date == date.normalize() else f"{date:%d %b %Y %H:%M}"


def _fan_caption(fan: Fan) -> str:
    return f"{fan.instrument}: {fan.score_was} score, " + _minus(f"{fan.score:+.4f}")


def _settings(comparison: Comparison, run: RunResult) -> Table:
    rows = [[name, value] for name, value in _facts(comparison, run).items() if value]
    recorded = {"config": run.config, "kronos_run": run.kronos_run}
    plain = json.loads(json.dumps(recorded, default=_plain))
    return Table(run.name, ["", ""], rows, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _facts(comparison: Comparison, run: RunResult) -> dict[str, str]:
    task, data = run.config.get("task", {}), run.kronos_run.get("data", {})
    days = run.scores.index.get_level_values("datetime")
    dataset = task.get("dataset", {}).get("kwargs", {}) if isinstance(task.get("dataset"), dict) else {}
    handler = dataset.get("handler", {}).get("kwargs", {}) if isinstance(dataset.get("handler"), dict) else {}
    return {
        "Recorder": run.run_id,
        "Qlib store": str(run.provider_uri or "") + (" (synthetic)" if run.synthetic else ""),
        "Scores": f"{days.min():%Y-%m-%d} … {days.max():%Y-%m-%d}, {len(run.scores):,} rows",
        "Instruments": f"{run.scores.index.get_level_values('instrument').nunique():,}",
        "Universe": str(data.get("universe") or handler.get("instruments") or ""),
        "Bars": _range([data.get("first") or handler.get("start_time"), data.get("last") or handler.get("end_time")]),
        **_segments(data.get("segments") or dataset.get("segments")),
        "Model": _class_text(task.get("model")),
        "Score": str(run.kronos_run.get("model", {}).get("score") or ""),
        "Lookback, horizon": f"{data['lookback']}, {data['horizon']} bars" if "horizon" in data else "",
        "Newey–West lag": f"{comparison.lag} {comparison.step}s",
        "Backtest": backtest_period(run),
        **_backtest(task.get("record")),
    }


def _segments(segments: Any) -> dict[str, str]:
    return {f"Segment {name}": _range(span) for name, span in segments.items()} if isinstance(segments, dict) else {}


def _range(span: Any) -> str:
    return " … ".join(str(end).split(" ")[0] for end in span) if isinstance(span, (list, tuple)) and all(span) else ""


def _backtest(records: Any) -> dict[str, str]:
    """List strategy, benchmark and costs of the record that has a backtest."""
    for record in records if isinstance(records, list) else [records]:
        config = record.get("kwargs", {}).get("config") if isinstance(record, dict) else None
        if isinstance(config, dict):
            backtest = config.get("backtest", {})
            return {
                "Strategy": _class_text(config.get("strategy")),
                "Benchmark": str(backtest.get("benchmark") or ""),
                "Account": f"{backtest['account']:,}" if "account" in backtest else "",
                "Exchange": _arguments_text(backtest.get("exchange_kwargs")),
            }
    return {}


def _class_text(settings: Any) -> str:
    """Name a class of a workflow with its arguments that are plain values."""
    if not isinstance(settings, dict) or "class" not in settings:
        return ""
    arguments = _arguments_text(settings.get("kwargs"))
    return f"{settings['class']}: {arguments}" if arguments else str(settings["class"])


def _arguments_text(arguments: Any) -> str:
    plain = arguments if isinstance(arguments, dict) else {}
    return ", ".join(f"{key} {value}" for key, value in plain.items() if isinstance(value, (str, int, float)))


def _plain(value: Any) -> str:
    return str(value) if type(value).__str__ is not object.__str__ else f"({type(value).__name__.strip('_').lower()})"

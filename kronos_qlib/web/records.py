"""The record: the ledger, finished runs and their comparison, and the health of a store; as the commands give them."""

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from kronos_qlib.web.commands import hidden_folders, run_command
from kronos_qlib.web.jobs import Report
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.uploads import Upload

SHOWN_ROWS = 2000


def list_runs(uri: str) -> list[dict[str, Any]]:
    """List the finished runs of an MLflow store. Raises Problem."""
    from kronos_qlib.analysis import results  # MLflow, which takes seconds

    try:
        return results.list_runs(uri)
    except results.ResultsError as error:
        raise Problem(422, _without_address(str(error), uri)) from None


def compare(names: list[str], uri: str, report: Report) -> dict[str, Any]:
    """Compare runs and make their report. Raises Problem."""
    from kronos_qlib.analysis import report as pages
    from kronos_qlib.analysis.comparison import compare_runs
    from kronos_qlib.analysis.results import ResultsError, load_runs
    from kronos_qlib.analysis.tables import terminal_text

    try:
        report(0.0)
        runs = load_runs(names, uri)
        report(0.3)
        comparison = compare_runs(runs)
        report(0.7)
        with tempfile.TemporaryDirectory() as folder:
            page = pages.write_page(comparison, Path(folder) / "report.html").read_text(encoding="utf-8")
    except ResultsError as error:
        raise Problem(422, _without_address(str(error), uri)) from None
    report(1.0)
    return {"runs": [run.name for run in runs], "text": terminal_text(comparison), "report": page}


def check(folder: Path, name: str, report: Report) -> dict[str, Any]:
    """Check the health of a store. Raises Problem."""
    from kronos_qlib.ingest.store_check import check_store
    from kronos_qlib.web.sources import told_without_paths

    def progress(names: list[str]) -> Any:
        for number, each in enumerate(names):
            report(number / len(names))
            yield each

    with told_without_paths(folder, name):
        found = check_store(folder, progress=progress)
    findings = [asdict(finding) for finding in found.findings]
    content = json.loads(json.dumps(findings).replace(json.dumps(str(folder))[1:-1], name))
    coverage = found.coverage
    thin = coverage.iloc[:: max(1, len(coverage) // 500)]
    times = [str(time).removesuffix(" 00:00:00") for time in thin.index]
    return {
        "store": name,
        "freq": found.freq,
        "errors": found.errors,
        "findings": content,
        "coverage": {"time": times, "instruments": thin.tolist()},
    }


def check_upload(upload: Upload, report: Report) -> dict[str, Any]:
    """Make a store of a file as `kronos-qlib ingest` does, say what was found, and check its health. Raises Problem."""
    from kronos_qlib.ingest.store import ingest
    from kronos_qlib.web.sources import told_without_paths

    report(0.0)
    with tempfile.TemporaryDirectory() as folder:
        with told_without_paths(upload.path, upload.name):
            summary = ingest([upload.path], Path(folder) / "store")
        report(0.2)
        found = check(summary.store, upload.name, lambda share, partial=None: report(0.2 + 0.8 * share))
    return found | {"ingest": [finding.replace(str(upload.path), upload.name) for finding in summary.findings]}


def read_ledger(url: str) -> dict[str, Any]:
    """Read the ledger's sets, the newest first, and judge its record. Raises Problem."""
    from kronos_qlib.live.judgement import judge
    from kronos_qlib.live.ledger_page import record_json

    name, sets, rows = _read(url)
    judgements = judge(sets, rows) if len(sets) else []
    came = rows["came"].notna().groupby(level="id").sum() if len(rows) else pd.Series(dtype=int)
    listed = [
        {
            "id": int(key),
            "date": str(row["date"]).removesuffix(" 00:00:00"),
            "experiment": row["experiment"],
            "recorder": row["recorder"],
            "version": int(row["version"]),
            "made_at": str(row["made_at"])[:19],
            "live": bool(row["live"]),
            "horizon": None if pd.isna(row["horizon"]) else int(row["horizon"]),
            "instruments": int(row["instruments"]),
            "came": int(came.get(key, 0)),
        }
        for key, row in sets[::-1].head(SHOWN_ROWS).iterrows()
    ]
    return {"name": name, "sets": listed, "judgements": record_json(judgements)}


def read_ledger_set(url: str, set_id: int) -> dict[str, Any]:
    """Read the rows of a set, by rank. Raises Problem."""
    _, sets, rows = _read(url)
    if set_id not in sets.index:
        raise Problem(404, f"The ledger has no set {set_id}.")
    own = rows.xs(set_id, level="id").drop(columns="filled_at").sort_values("rank").reset_index()
    return {
        "id": set_id,
        "date": str(sets.loc[set_id, "date"]).removesuffix(" 00:00:00"),
        "experiment": str(sets.loc[set_id, "experiment"]),
        "rows": [{key: _plain(value) for key, value in row.items()} for row in own.head(SHOWN_ROWS).to_dict("records")],
    }


def judge_record(ledger: str, report: Report) -> dict[str, Any]:
    """Fill in what came and judge the record, with its paper portfolios: `kronos-qlib ledger`. Raises Problem."""
    hidden, environment = hidden_folders(ledger), {"KRONOS_LEDGER": ledger}
    updated, judgements = (
        run_command(["ledger", action, "--json"], report, hidden, environment) for action in ("update", "show")
    )
    return {"updated": updated, "judgements": judgements}


def _read(url: str) -> tuple[str, pd.DataFrame, pd.DataFrame]:
    from kronos_qlib.live.ledger import Ledger, LedgerError

    try:
        ledger = Ledger(url, must_exist=True)
        return Path(ledger.name).name, *ledger.read()
    except LedgerError as error:
        raise Problem(422, _without_address(str(error), url)) from None


def _without_address(text: str, address: str) -> str:
    """Return a message without the folder that a database lies in."""
    for hidden, shown in hidden_folders(address).items():
        text = text.replace(hidden, shown)
    return text


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""`kronos-qlib signals`: the signals of the latest bar, and what the run's strategy would trade on them."""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from kronos_qlib.cli.command import Commands, fail
from kronos_qlib.cli.ledger import DEFAULT_LEDGER
from kronos_qlib.text import printable

if TYPE_CHECKING:
    import pandas as pd

    from kronos_qlib.live.ledger import Recorded
    from kronos_qlib.live.signal_set import SignalSet

_DESCRIPTION = """\
    Score the latest complete bar of a store with the newest finished run of any Qlib model: of a workflow's file, of an
    experiment, or the run of a recorder id. Only that date is scored. A bar is complete when the exchange has closed,
    whatever the clock and time zone of this machine. Of a date in the run's test segment the scores are those of the
    backtest, and that is checked.

    Printed and written: score and rank of each instrument; of a KronosModel also the share of paths that end above the
    last close and quantiles of the return to the end of the horizon. With --holdings also the orders that the run's own
    strategy would place: side, shares in the region's lots, the last close as the reference price, expected cost, and
    why; decided by Qlib's strategy and exchange at the latest bar.

    Each call is kept in the ledger (kronos-qlib ledger --help), unless --no-ledger. The model is read from a pickle of
    your own MLflow store, as Qlib does: do not use stores of people whom you do not trust.

    Exit status 0: done. 2: an error. 3: the store lacks the bars of the date. With 2 and 3 nothing is written.
"""

_EXAMPLES = """\
    examples:
      kronos-qlib signals workflows/kronos_csi300.yaml
      kronos-qlib signals lightgbm_csi300 --date 2025-06-05 --out signals.csv
      kronos-qlib signals mine.yaml --holdings account.csv --out signals.csv      orders go to signals_orders.csv

    account.csv: what is held, in shares as the broker counts them; CASH is the account's cash; bars_held, if known, is
    compared with the strategy's hold_thresh (1: bought today):
      instrument,shares,bars_held
      CASH,250000,
      SH600519,100,7
"""
_SHOWN = 20
_LACKS_BARS = 3


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "signals",
        help="signals and orders of the latest bar, from a finished run",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="WORKFLOW.yaml|EXPERIMENT|RECORDER", help="whose run scores")
    command.add_argument("--date", default="latest", help="score this date of the store (default: latest)")
    command.add_argument("--holdings", type=Path, metavar="FILE.csv", help="what is held: print orders, too")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write signals, and orders beside them, as .csv or .parquet"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--store", type=Path, metavar="DIR", help="the Qlib store (default: the run's)")
    command.add_argument("--uri", help="MLflow store of the runs (default: the workflow's, or sqlite:///mlflow.db)")
    command.add_argument(
        "--ledger",
        metavar="URL",
        default=os.environ.get("KRONOS_LEDGER", DEFAULT_LEDGER),
        help="database that keeps the signals (default: $KRONOS_LEDGER, or sqlite:///ledger.db)",
    )
    command.add_argument("--no-ledger", action="store_true", help="do not keep them")
    command.add_argument(
        "--allow-missing", type=int, default=0, metavar="N", help="members that may lack the date's bar (default: 0)"
    )
    command.add_argument(
        "--now", metavar="TIME", help="take this for the time of the clock, such as 2025-06-05T18:00+08:00, to try out"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    warnings.filterwarnings("ignore")  # what matters is logged
    collected = gc.isenabled()
    gc.disable()  # half a second of the imports: there is no garbage among them
    try:
        from kronos_qlib.analysis.results import ResultsError
        from kronos_qlib.live.ledger import Ledger, LedgerError
        from kronos_qlib.live.run import open_run
        from kronos_qlib.live.signals import StoreLacksBars, latest_complete, make_signals, named_date
    finally:
        if collected:
            gc.enable()

    try:
        with contextlib.redirect_stdout(sys.stderr):  # Qlib's models print about others that are not installed
            if options.out is not None and options.out.suffix not in (".csv", ".parquet"):
                raise ValueError(f"--out {options.out} should end in .csv or .parquet")
            holdings = None
            if options.holdings is not None:
                with contextlib.redirect_stderr(io.StringIO()):  # gym, which Qlib imports, prints a notice
                    from kronos_qlib.live.orders import make_orders, read_holdings
                holdings = read_holdings(options.holdings)
            now = _read_time(options.now)
            ledger = None if options.no_ledger else Ledger(options.ledger)
            live = open_run(options.source, options.uri, options.store, options.date)
            logging.getLogger("qlib.signals").setLevel(logging.INFO)
            dataset, latest = live.load_dataset(), options.date == "latest"
            date = latest_complete(live, dataset, now) if latest else named_date(live, dataset, options.date, now)
            signals = make_signals(live, date, options.allow_missing)
            orders = None if holdings is None else make_orders(live, signals, holdings)
            with _drafts(options.out, signals, orders) as written:
                recorded = None if ledger is None else ledger.record(signals)
    except StoreLacksBars as error:
        return fail("signals", error, _LACKS_BARS)
    except (ResultsError, LedgerError, ValueError, OSError) as error:
        return fail("signals", error)
    place = None if recorded is None or ledger is None else {"ledger": ledger.name, **_place(recorded)}
    print(_as_json(signals, orders, place) if options.json else printable(_as_text(signals, orders)))
    if not options.json:
        if place is not None:
            kind = "live" if place["live"] else "simulated, as the next session has opened"
            kept = "" if place["new"] else ", as before"
            written.append(f"{place['ledger']} set {place['set']}, version {place['version']}{kept} ({kind})")
        if written:
            print(f"\nwritten: {', '.join(written)}")
    return 0


def _place(recorded: "Recorded") -> dict[str, Any]:
    return {"set": recorded.id, "version": recorded.version, "new": recorded.new, "live": recorded.live}


def _read_time(text: str | None) -> "pd.Timestamp":
    import pandas as pd

    if text is None:
        return pd.Timestamp.now("UTC")
    try:
        time = pd.Timestamp(text)
    except ValueError:
        raise ValueError(f"--now {text!r} is no time such as 2025-06-05T18:00+08:00") from None
    if time.tzinfo is None:
        raise ValueError(f"--now {text!r} has no time zone, such as +08:00 at its end")
    return time


@contextlib.contextmanager
def _drafts(out: Path | None, signals: "SignalSet", orders: "pd.DataFrame | None") -> Iterator[list[str]]:
    """Write the tables aside, and move them into place if the block ends without an error; give their paths."""
    from kronos_qlib.files import whole_file

    tables = {}
    if out is not None:
        tables[out] = signals.table.reset_index()
        tables[out].insert(0, "date", signals.date)
        if orders is not None:
            tables[out.with_name(f"{out.stem}_orders{out.suffix}")] = orders
    with contextlib.ExitStack() as stack:
        for path, rows in tables.items():
            draft = stack.enter_context(whole_file(path))
            rows.to_csv(draft, index=False) if path.suffix == ".csv" else rows.to_parquet(draft, index=False)
        yield [str(path) for path in tables]


def _as_json(signals: "SignalSet", orders: "pd.DataFrame | None", place: dict[str, Any] | None) -> str:
    rows = signals.table.reset_index().astype(object)
    found: dict[str, Any] = {
        "date": str(signals.date),
        "experiment": signals.experiment,
        "recorder": signals.recorder,
        "store": signals.store,
        "horizon": signals.horizon,
        "weights_digest": signals.weights_digest,
        "data_digest": signals.data_digest,
        "signals": rows.where(rows.notna(), None).to_dict("records"),  # to_json would round
    }
    if orders is not None:
        found["orders"] = json.loads(orders.to_json(orient="records", date_format="iso", double_precision=15))
    if place is not None:
        found["ledger"] = place
    return json.dumps(found, indent=2)


def _as_text(signals: "SignalSet", orders: "pd.DataFrame | None") -> str:
    from kronos_qlib.live.signals import shown

    ranked = signals.table.sort_values(["rank"], kind="stable")
    head = f"{signals.experiment} {signals.recorder[:8]}, {shown(signals.date)}: {len(ranked)} instruments"
    bands = ["up", "50 %", "90 %"] if "prob_up" in ranked else []
    rows = [["rank", "instrument", "score", *bands]]
    for name, row in ranked.head(_SHOWN).iterrows():
        cells = [f"{row['rank']:.0f}", str(name), f"{row['score']:+.5g}"]
        if "prob_up" in ranked:
            cells += [f"{row['prob_up']:.0%}", *(f"{row[a]:+.1%} … {row[b]:+.1%}" for a, b in _BANDS)]
        rows.append(cells)
    lines = [head, "", *_columns(rows)]
    if len(ranked) > _SHOWN:
        lines.append(f"… and {len(ranked) - _SHOWN} more")
    if signals.horizon is not None:
        lines.append(f"up, 50 %, 90 %: of the return to the close {signals.horizon} bars later")
    if orders is not None:
        lines += ["", f"Orders ({len(orders)}), decided at the close of {shown(signals.date)}", ""]
        table = [["side", "instrument", "shares", "price", "cost", "why"]]
        for row in orders.to_dict("records"):
            traded = row["side"] != "none"
            numbers = [f"{row['shares']:,.6g}", f"{row['reference_price']:,.6g}", f"{row['expected_cost']:,.2f}"]
            table.append([row["side"], row["instrument"], *(numbers if traded else ["", "", ""]), row["why"]])
        lines += _columns(table)
        cost = orders["expected_cost"].sum()
        lines.append(f"expected cost of all: {cost:,.2f}")
    return "\n".join(lines)


_BANDS = (("q25", "q75"), ("q05", "q95"))


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if place in (1, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]

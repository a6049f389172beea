"""`kronos-qlib ledger`: fill in the bars that came, and judge the record of forecasts."""

import argparse
import contextlib
import io
import json
import os
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from kronos_qlib.cli.command import Commands, fail

if TYPE_CHECKING:
    import pandas as pd

    from kronos_qlib.live.judgement import Paper

DEFAULT_LEDGER = "sqlite:///ledger.db"  # of kronos_qlib.live.ledger, which imports SQLAlchemy
_DESCRIPTION = """\
    The ledger is a database of forecasts: `kronos-qlib signals` writes each of its runs there, with the time, the
    recorder, digests of weights and data, and versions. Nothing in it is overwritten: other signals of the same date
    and settings are its next version, the same signals again are the set that is there.

      ledger update   read the bars that came from the Qlib store, and fill in what the forecasts should have been
      ledger show     judge the record: rank IC with its interval, CRPS, coverage of the bands, a paper portfolio
                      with costs; and test whether live is worse than the backtest promised

    A forecast is live if it was made before the next session opened, by the hours of the region's exchange; all others
    are simulated, and are judged apart.
"""
_UPDATE = """\
    Fill in, for each forecast whose bars have come, the value of the run's label, and the return from the date's close
    to that of `horizon` bars later: bars of the instrument, so a suspension puts it off. What is filled never changes;
    where the store says something else by now (adjusted prices that were written anew), the rows are counted. A set is
    one transaction: an update that was interrupted can be repeated.
"""
_SHOW = """\
    Judge each experiment's live forecasts, and apart from them the simulated ones. Of live ones the last version counts
    that was made before the next session opened. The paper portfolio is Qlib's backtest of the run's own strategy,
    exchange and costs on the ledger's scores; it needs the Qlib store. The test whether live is worse than promised
    is one-sided at 5 %, and its power is said: with few days, no evidence means little.
"""
_EXAMPLES = """\
    examples:
      kronos-qlib ledger update                                   the ledger.db of this folder, each set's own store
      kronos-qlib ledger update --store ~/.qlib/qlib_data/mine    the store has moved
      kronos-qlib ledger show --out runs/live                     also runs/live/ledger.html, which needs no network
      kronos-qlib ledger show --ledger postgresql://me@host/db --json
      KRONOS_LEDGER=sqlite:////data/ledger.db kronos-qlib ledger show
"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": dedent(_EXAMPLES)}
    command = commands.add_parser(
        "ledger", help="what was forecast and what came", description=dedent(_DESCRIPTION), **options
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    update = actions.add_parser("update", help="fill in the bars that came", description=dedent(_UPDATE), **options)
    show = actions.add_parser("show", help="judge the record", description=dedent(_SHOW), **options)
    for action, run in ((update, run_update), (show, run_show)):
        action.add_argument(
            "--ledger",
            metavar="URL",
            default=os.environ.get("KRONOS_LEDGER", DEFAULT_LEDGER),
            help=f"SQLite or PostgreSQL, or a file (default: KRONOS_LEDGER of the environment, or {DEFAULT_LEDGER})",
        )
        action.add_argument(
            "--store", type=Path, metavar="DIR", help="Qlib store of sets whose own is not there any more"
        )
        action.add_argument("--json", action="store_true", help="print JSON instead of text")
        action.set_defaults(run=run)
    show.add_argument("--out", type=Path, metavar="DIR", help="also write ledger.html to DIR")


def run_update(options: argparse.Namespace) -> int:
    """Run `ledger update` and return its exit status."""
    from kronos_qlib.live.ledger import Ledger, LedgerError
    from kronos_qlib.live.outcomes import Filled, fill_outcomes

    done = Filled()
    try:
        ledger = Ledger(options.ledger, must_exist=True)
        sets, rows = ledger.read()
        if options.store is not None:  # those whose own is there keep it: it may be another market's
            check_store(options.store)
            moved = [not (Path(store) / "calendars").is_dir() for store in sets["store"]]
            sets.loc[moved, "store"] = str(options.store)
        for (store, region), own in sets.groupby(["store", "region"]):
            use_store(Path(store), region)
            done += fill_outcomes(ledger, own, rows)
    except (LedgerError, ValueError, OSError) as error:
        return fail("ledger update", error)
    if options.json:
        print(json.dumps(vars(done), default=str))
        return 0
    new = done.labels + done.returns
    what = f"{done.labels:,} labels and {done.returns:,} returns filled" if new else "nothing new came"
    last = f" (the store's last bar: {done.last_bar})" if done.last_bar is not None else ""
    print(f"{ledger.name}: {done.sets:,} sets: {what}{last}; {done.waiting:,} rows still wait")
    if done.changed_outcomes or done.changed_closes:
        print(
            f"warning: the store has changed since: {done.changed_outcomes:,} outcomes would differ from those filled, "
            f"which stay, and {done.changed_closes:,} last closes from those of the forecasts (prices adjusted anew?)"
        )
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Run `ledger show` and return its exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # Qlib's backtest would draw a bar
    from kronos_qlib.live.judgement import judge
    from kronos_qlib.live.ledger import Ledger, LedgerError
    from kronos_qlib.live.ledger_page import record_json, record_text, write_record_page

    try:
        ledger = Ledger(options.ledger, must_exist=True)
        sets, rows = ledger.read()
        if options.store is not None:
            check_store(options.store)
        if sets.empty:
            raise ValueError(f"ledger {ledger.name} is empty; kronos-qlib signals writes to it")
        judgements = judge(sets, rows, paper_maker(options.store))
        print(json.dumps(record_json(judgements)) if options.json else record_text(judgements))
        if options.out is not None:
            written = write_record_page(judgements, ledger.name, sets, options.out / "ledger.html")
            if not options.json:
                print(f"\nwritten: {written}")
    except (LedgerError, ValueError, OSError) as error:
        return fail("ledger show", error)
    return 0


def check_store(store: Path) -> None:
    """Raise FileNotFoundError if a folder is no Qlib store."""
    if not (store.expanduser() / "calendars").is_dir():
        raise FileNotFoundError(f"there is no Qlib store {store}; name it by --store")


def use_store(store: Path, region: str) -> None:
    """Point Qlib at a store. Raises FileNotFoundError if it is none."""
    import qlib

    check_store(store)
    qlib.init(
        provider_uri=str(store.expanduser().resolve()), region=region, kernels=1, logging_level=50, clear_mem_cache=True
    )


def paper_maker(store: Path | None) -> "Paper":
    """Return the maker of paper portfolios, in each set's own store or in `store`."""
    with contextlib.redirect_stderr(io.StringIO()):  # gym, which Qlib imports, prints a notice
        from kronos_qlib.live.paper_portfolio import PaperError, run_paper_portfolio

    def paper(newest: "pd.Series", scores: "pd.Series") -> "pd.DataFrame":
        try:
            own = Path(newest["store"])
            use_store(own if store is None or (own / "calendars").is_dir() else store, newest["region"])
        except OSError as error:
            raise PaperError(str(error)) from None
        return run_paper_portfolio(newest["settings"].get("portfolio"), scores, newest["freq"])

    return paper

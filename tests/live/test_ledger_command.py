"""`kronos-qlib ledger`: from signals to a judged record, with clear lines where something is wrong."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import qlib
from ledgers import LABEL, QUANTILES, SECRET, signal_set
from qlib.data import D
from scipy.stats import norm

from kronos_qlib.analysis.results import RunResult
from kronos_qlib.cli import main
from kronos_qlib.cli.compare import _live_record
from kronos_qlib.cli.ledger import DEFAULT_LEDGER
from kronos_qlib.data.demo_market import BENCHMARK, write_demo_market
from kronos_qlib.live.ledger import DEFAULT_URL, Ledger

PORTFOLIO = {
    "strategy": {
        "class": "TopkDropoutStrategy",
        "module_path": "qlib.contrib.strategy",
        "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1},
    },
    "backtest": {
        "account": 1e7,
        "benchmark": BENCHMARK,
        "start_time": None,
        "end_time": None,
        "exchange_kwargs": {"deal_price": "close", "open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5},
    },
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a demo market and a ledger of the reversal's signals: 25 dates simulated, 25 live."""
    folder = tmp_path_factory.mktemp("live")
    market = write_demo_market(folder / "market", instruments=12, days=120, signal=0.5, seed=2)
    qlib.init(provider_uri=str(market), region="cn", kernels=1, logging_level=50, clear_mem_cache=True)
    names = D.list_instruments(D.instruments("demo"), as_list=True)
    bars = D.features(sorted(names), ["Ref($close, 10)/$close", "$close", "$volume"]).swaplevel().sort_index()
    bars.columns = ["score", "last_close", "volume"]
    bars = bars[bars["volume"] > 0].dropna().drop(columns="volume").astype(float)
    ledger = Ledger(f"sqlite:///{folder}/ledger.db")
    for number, date in enumerate(D.calendar()[60:110]):
        table = bars.loc[date].assign(rank=lambda rows: rows["score"].rank(ascending=False))
        table[QUANTILES] = np.tile(norm.ppf([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]) * 0.05, (len(table), 1))
        signals = signal_set(
            date, table=table, store=str(market), label=LABEL, horizon=3, settings={"portfolio": PORTFOLIO}
        )
        made = date + pd.Timedelta(hours=9 if number >= 25 else 300)
        ledger.record(signals, made_at=made.to_pydatetime(), region="cn")
    return folder


@pytest.fixture
def place(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(recorded)
    return recorded


@pytest.fixture
def updated(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["ledger", "update"]) == 0
    capsys.readouterr()
    return place


def test_update_fills_what_came_and_then_says_that_nothing_new_did(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ledger", "update"]) == 0
    assert re.search(r"50 sets: \d+ labels and \d+ returns filled \(the store's last bar: ", capsys.readouterr().out)
    assert main(["ledger", "update", "--store", "market", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["sets"], again["labels"], again["returns"], again["changed_closes"]) == (50, 0, 0, 0)
    assert main(["ledger", "update"]) == 0
    assert "nothing new came" in capsys.readouterr().out


def test_show_judges_live_apart_from_simulated_and_writes_a_page(
    updated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["ledger", "show", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for words in ("kronos_csi300 live", "kronos_csi300 simulated", "too few days to tell", "Paper portfolio", "CRPS"):
        assert words in told
    assert "synthetic bars, not a real result" in told
    page = re.sub("<script>.*?</script>", "", (tmp_path / "ledger.html").read_text(), flags=re.S)
    for words in ("Rank IC, summed over the days", "Share of returns within the bands", "excess return after costs"):
        assert words in page
    assert not re.search(r'(src|href)="(http|//)', page)


def test_show_as_json_has_the_figures_of_both_kinds(updated: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ledger", "show", "--json"]) == 0
    live, simulated = json.loads(capsys.readouterr().out)
    assert (live["kind"], live["dates"], simulated["kind"], simulated["dates"]) == ("live", 25, "simulated", 25)
    assert live["rank_ic"] > 0.1 and simulated["test"] is None
    assert live["paper_days"] == 26 and live["paper_cost"] > 0
    assert 0 < live["test"]["power"] < 0.8 and live["test"]["promised"] == 0.03


def test_without_the_store_all_but_the_paper_portfolio_is_shown(updated: Path, capsys: pytest.CaptureFixture[str]):
    (store,) = set(Ledger(f"sqlite:///{updated / 'ledger.db'}").read()[0]["store"])
    away = Path(store).rename(f"{store}_away")
    try:
        assert main(["ledger", "show"]) == 0
        told = capsys.readouterr().out
        assert main(["ledger", "show", "--store", str(away), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["paper_days"] == 26
    finally:
        away.rename(store)
    assert f"no paper portfolio: there is no Qlib store {store}" in " ".join(told.split())
    assert "Forecast returns and what came" in told


def test_compare_takes_the_live_record_of_its_runs_by_experiment_or_recorder(updated: Path):
    def run(name: str, run_id: str) -> RunResult:
        found = object.__new__(RunResult)
        found.__dict__.update(name=name, run_id=run_id)
        return found

    url = f"sqlite:///{updated}/ledger.db"
    for known in (run("kronos_csi300", "another"), run("another", "0123456789abcdef")):
        text, section = _live_record(url, [known])
        assert "kronos_csi300 live" in text and any(part.figures for part in section.parts)
    text, section = _live_record(url, [run("another", "another")])
    assert "has no forecasts of these runs" in text and section.parts == []


@pytest.mark.parametrize("action", ["update", "show"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (["--ledger", "missing.db"], "there is no ledger missing.db"),
        (["--ledger", f"postgresql://me:{SECRET}@127.0.0.1:1/db"], "connection"),
        (["--ledger", "text.db"], "not a database"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: str, place, reason: str
):
    monkeypatch.chdir(tmp_path)
    Path("text.db").write_text("this is no database " * 100)
    assert main(["ledger", action, *place]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith(f"kronos-qlib ledger {action}: error: ") and reason in told.err
    assert SECRET not in told.err


def test_an_update_without_the_store_names_it(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ledger", "update", "--store", "nowhere"]) == 2
    assert "there is no Qlib store nowhere; name it by --store" in capsys.readouterr().err


def test_an_empty_ledger_says_who_writes_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Ledger(str(tmp_path / "new.db"))
    assert main(["ledger", "show", "--ledger", str(tmp_path / "new.db")]) == 2
    assert "is empty; kronos-qlib signals writes to it" in capsys.readouterr().err


def test_the_environment_names_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("KRONOS_LEDGER", str(tmp_path / "mine.db"))
    assert main(["ledger", "show"]) == 2
    assert "mine.db" in capsys.readouterr().err
    assert DEFAULT_LEDGER == DEFAULT_URL

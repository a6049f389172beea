import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from kronos_qlib.analysis.comparison import COLUMNS, comparison, terminal_text
from kronos_qlib.analysis.figures import plot_excess_return
from kronos_qlib.analysis.results import ResultsError, load_runs
from kronos_qlib.cli import main
from kronos_qlib.data.demo import write_demo_market

# Qlib's own recorders on a small demo market, in a process of their own: qlib.init is for the whole process. The config
# holds an object that only this script can load, as qrun's holds the trained model.
_RECORD = """
import json, sys
import qlib
from qlib.data import D
from qlib.workflow import R
from qlib.workflow.record_temp import PortAnaRecord, SigAnaRecord

class OnlyHere:
    def __init__(self): self.weights = [1.0, 2.0]

market, uri = sys.argv[1:]
manager = {"class": "MLflowExpManager", "module_path": "qlib.workflow.expm",
           "kwargs": {"uri": uri, "default_exp_name": "Experiment"}}
init = {"provider_uri": "market", "region": "cn", "exp_manager": manager}
qlib.init(**{**init, "provider_uri": market}, kernels=1, logging_level=50)

data = D.features(D.instruments("demo"), ["Ref($close, 10)/$close", "Ref($close, -2)/Ref($close, -1) - 1"],
                  start_time="2018-03-01", end_time="2018-05-18").swaplevel().sort_index()
label = data.iloc[:, [1]].set_axis(["LABEL0"], axis=1)
backtest = {
    "strategy": {"class": "TopkDropoutStrategy", "module_path": "qlib.contrib.strategy",
                 "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1}},
    "backtest": {"start_time": "2018-03-02", "end_time": "2018-05-18", "account": 1e8, "benchmark": "DEMOINDEX",
                 "exchange_kwargs": {"freq": "day", "limit_threshold": 0.095, "deal_price": "open",
                                     "open_cost": 0.001, "close_cost": 0.0015, "min_cost": 5}},
}

def run(name, sign, records=("signal", "backtest"), benchmark="DEMOINDEX"):
    with R.start(experiment_name=name):
        recorder = R.get_recorder()
        recorder.save_objects(**{"pred.pkl": sign * data.iloc[:, [0]].set_axis(["score"], axis=1), "label.pkl": label})
        if "signal" in records:
            SigAnaRecord(recorder).generate()
        if "backtest" in records:
            PortAnaRecord(recorder, backtest).generate()
        if "fail" in records:
            raise RuntimeError("as a workflow may")
    recorder.save_objects(config={"qlib_init": init, "task": {"model": OnlyHere(), "benchmark": benchmark}})
    return recorder.id

run("reversal", -1, ["signal"])
ids = {"newest": run("reversal", 1)}
try: run("reversal", 1, ["fail"])
except RuntimeError: pass
try: run("failed", 1, ["fail"])
except RuntimeError: pass
ids["momentum"] = run("momentum", -1, benchmark="unnamed")
run("no_backtest", 1, ["signal"])
run("no_signal", 1, [])
print(json.dumps(ids))
"""


@dataclass(frozen=True)
class Recorded:
    """A folder as `qrun` leaves it: market/ and mlflow.db; experiments reversal (twice), momentum and unusable ones."""

    folder: Path
    ids: dict[str, str]

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    market = write_demo_market(folder / "market", instruments=12, days=110, signal=0.2)
    command = [sys.executable, "-c", _RECORD, str(market), f"sqlite:///{folder}/mlflow.db"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return Recorded(folder, json.loads(ran.stdout.splitlines()[-1]))


def test_newest_finished_run_of_an_experiment_counts(recorded: Recorded) -> None:
    (run,) = load_runs(["reversal"], recorded.uri)
    assert run.run_id == recorded.ids["newest"]
    assert run.name == "reversal"
    assert run.metrics["rank_ic"] > 0, "the older run scores the other way round"


def test_recorder_id_names_a_run(recorded: Recorded) -> None:
    (run,) = load_runs([recorded.ids["momentum"]], recorded.uri)
    assert run.name == f"momentum {recorded.ids['momentum'][:8]}"
    assert run.metrics["rank_ic"] < 0


def test_table_agrees_with_what_qlib_recorded(recorded: Recorded) -> None:
    runs = load_runs(["reversal", "momentum", "reversal"], recorded.uri)
    table = comparison(runs)
    assert list(table.index) == ["reversal", "momentum"], "a name given twice is one row"
    assert list(table.columns) == COLUMNS
    excess = (runs[0].report["return"] - runs[0].report["bench"] - runs[0].report["cost"]).cumsum()
    assert table.loc["reversal", "max_drawdown"] == pytest.approx((excess - excess.cummax()).min())
    assert table.loc["reversal", "ic"] == pytest.approx(-table.loc["momentum", "ic"])


def test_demo_market_is_recognised_by_benchmark_or_mark(recorded: Recorded, tmp_path: Path) -> None:
    reversal, momentum = load_runs(["reversal", "momentum"], recorded.uri)
    assert reversal.provider_uri == momentum.provider_uri == "market"
    assert reversal.synthetic
    assert momentum.synthetic, "its config names another benchmark, but the store lies beside the database"
    shutil.copy(recorded.folder / "mlflow.db", tmp_path / "mlflow.db")  # artifacts stay where they are; no store here
    reversal, momentum = load_runs(["reversal", "momentum"], f"sqlite:///{tmp_path}/mlflow.db")
    assert reversal.synthetic
    assert not momentum.synthetic


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody", "no experiment or recorder 'nobody'"),
        ("failed", "experiment 'failed' .* has no finished run"),
        ("no_backtest", r"no_backtest: run \w+ has no '1day\..*PortAnaRecord"),
        ("no_signal", r"no_signal: run \w+ has no 'IC'.*SigAnaRecord"),
    ],
)
def test_run_that_cannot_be_shown_is_an_error(recorded: Recorded, name: str, reason: str) -> None:
    with pytest.raises(ResultsError, match=reason):
        load_runs(["reversal", name], recorded.uri)


def test_unknown_name_is_told_what_there_is(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "nobody", "--uri", recorded.uri]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "experiments with a finished run: momentum, no_backtest, no_signal, reversal" in told.err
    assert not told.out


def test_something_that_is_no_database_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.db").write_text("not a database, but a text of some length " * 20)
    assert main(["compare", "reversal", "--uri", f"sqlite:///{tmp_path}/notes.db"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_compare_prints_and_writes_table_and_picture(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "demo"
    assert main(["compare", "reversal", "momentum", "--uri", recorded.uri, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "SYNTHETIC demo market" in printed
    assert "Backtest 2018-03-02 … 2018-05-18" in printed
    heading, _, first, *_ = printed.splitlines()
    assert heading.split()[0] == "run"
    assert first.split()[0] == "reversal"
    assert sorted(path.name for path in out.iterdir()) == ["comparison.csv", "excess_return.png"]
    table = pd.read_csv(out / "comparison.csv", index_col="run")
    stored = comparison(load_runs(["reversal", "momentum"], recorded.uri))
    pd.testing.assert_frame_equal(table[COLUMNS], stored, check_exact=False, rtol=1e-12)
    assert table["synthetic"].all()
    picture = imread(out / "excess_return.png")
    assert picture.shape[0] > 800
    assert picture[..., :3].std() > 0.02, "something is drawn"


def test_picture_of_a_demo_market_differs_from_one_of_real_bars(recorded: Recorded, tmp_path: Path) -> None:
    runs = load_runs(["reversal"], recorded.uri)
    plot_excess_return(runs, tmp_path / "demo.png")
    plot_excess_return([dataclasses.replace(run, synthetic=False) for run in runs], tmp_path / "real.png")
    demo, real = imread(tmp_path / "demo.png"), imread(tmp_path / "real.png")
    differs = np.argwhere((demo != real).any(axis=-1))
    assert len(differs) > 5000, "the note is prominent"
    assert differs[:, 0].max() < demo.shape[0] * 0.15, "and in the head of the figure"


def test_runs_of_different_dates_and_partly_synthetic_are_called_out(recorded: Recorded) -> None:
    (run,) = load_runs(["reversal"], recorded.uri)
    other = dataclasses.replace(run, name="other", report=run.report.iloc[5:], synthetic=False)
    told = terminal_text([run, other])
    assert "CAUTION: the backtests cover different dates" in told
    assert "SYNTHETIC demo market (reversal)" in told
    assert "SYNTHETIC" not in terminal_text([other])


def test_metric_that_is_no_number_is_shown_as_such(recorded: Recorded) -> None:
    (run,) = load_runs(["reversal"], recorded.uri)
    assert "n/a" in terminal_text([dataclasses.replace(run, metrics=run.metrics | {"icir": float("nan")})])

"""Walk-forward: tasks that see nothing of what they score, that go on after a kill, and one run that joins them."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from forks import environment
from linear import mlflow_uri, write
from mlflow import MlflowClient
from networks import MODEL, TOKENIZER
from qlib.contrib.model.linear import LinearModel
from qlib.data import D
from qlib.workflow import R
from tampering import LAST_DAY, tampered
from tiny import STAGE

from kronos_qlib.analysis.results import load_runs
from kronos_qlib.cli import main
from kronos_qlib.live.run import open_run
from kronos_qlib.live.signals import make_signals
from kronos_qlib.workflow.rolling import WalkForward
from kronos_qlib.workflow.rolling_task import TaskRun

# Test segments of seven sessions: 2018-06-18 …, 06-27 …, 07-06 … 07-16, of which LAST_DAY is in the third, 07-17 …
DATES = {
    "train": ["2018-01-02", "2018-04-30"],
    "valid": ["2018-05-01", "2018-06-15"],
    "test": ["2018-06-18", "2018-07-24"],
}
RECORDS = [
    {"class": "SigAnaRecord", "module_path": "qlib.workflow.record_temp"},
    {
        "class": "PortAnaRecord",
        "module_path": "qlib.workflow.record_temp",
        "kwargs": {
            "config": {
                "strategy": {
                    "class": "TopkDropoutStrategy",
                    "module_path": "qlib.contrib.strategy",
                    "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1},
                },
                "backtest": {
                    "start_time": "2018-06-18",
                    "end_time": "2018-07-24",
                    "account": 1e8,
                    "benchmark": "DEMOINDEX",
                    "exchange_kwargs": {"freq": "day", "deal_price": "close", "limit_threshold": 0.095},
                },
            }
        },
    },
]


class Mortal(LinearModel):
    """Linear regression that writes down each fit, and kills its process after as many as the file `kill_at` says."""

    def fit(self, dataset: Any, reweighter: Any = None) -> Any:
        fitted = super().fit(dataset, reweighter)
        with Path("fits").open("a") as file:
            file.write("fit\n")
        if Path("kill_at").exists() and len(Path("fits").read_text().split()) == int(Path("kill_at").read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        return fitted


class Drawn(LinearModel):
    """Scores drawn from NumPy's global generator, for which nothing but the task may be decisive."""

    def predict(self, dataset: Any, segment: str = "test") -> pd.Series:
        import numpy as np

        scores = super().predict(dataset, segment)
        return scores + np.random.standard_normal(len(scores))  # noqa: NPY002


def linear(market: Path, folder: Path, kind: str | None = None) -> Path:
    model = {"class": kind, "module_path": "test_roll"} if kind else None
    return write(market, folder, model, segments=DATES, records=RECORDS)


def kronos(market: Path, folder: Path, kind: str = "KronosModel", **changes: Any) -> Path:
    """A workflow of tiny networks; changes are of the model's arguments."""
    stage = STAGE | {"epochs": 1}
    kwargs = {"tokenizer": TOKENIZER, "model": MODEL, "device": "cpu", "dtype": "float32", "seed": 1} | changes
    if kind == "KronosModel":
        kwargs["forecast"] = {"sample_count": 2, "temperature": 1.0}
        kwargs.setdefault("finetune", {"output_dir": "out", "predictor": stage | {"epochs": 2}})
    path = write(market, folder, {"class": kind, "module_path": "kronos_qlib", "kwargs": kwargs}, segments=DATES)
    base = yaml.safe_load((folder / "base.yaml").read_text())
    handler = {"class": "KLineHandler", "module_path": "kronos_qlib", "kwargs": {"instruments": "demo"}}
    base["task"]["dataset"] = {"class": "KLineDataset", "module_path": "kronos_qlib"}
    base["task"]["dataset"]["kwargs"] = {"lookback": 10, "horizon": 3, "segments": DATES, "handler": handler}
    base["task"]["record"] += RECORDS[:1]
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    return path


def scores(run: TaskRun, walk: WalkForward) -> pd.DataFrame:
    return R.get_recorder(recorder_id=run.recorder_id, experiment_name=walk.task_experiment).load_object("pred.pkl")


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return one.index.equals(other.index) and (one.to_numpy() == other.to_numpy()).all()


def roll_in_child(*arguments: str) -> int:
    """Run the command in a process of its own, as a shell would; return how it ended."""
    process = multiprocessing.get_context("fork").Process(target=_roll, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _roll(arguments: tuple[str, ...]) -> None:
    os._exit(main(["roll", *arguments]))


def test_segments_follow_each_other_with_an_embargo_and_cover_the_test_segment(market, place):
    walk = WalkForward(kronos(market, place / "folder"), 7)
    sessions = pd.DatetimeIndex(D.calendar())
    scored = [
        sessions[(sessions >= s["test"][0]) & (sessions <= s["test"][1])] for s in (t.segments for t in walk.tasks)
    ]
    assert [len(days) for days in scored] == [7, 7, 7, 6]
    assert list(scored[0].append(list(scored[1:]))) == list(
        sessions[(sessions >= "2018-06-18") & (sessions <= "2018-07-24")]
    )
    for task in walk.tasks:
        for earlier, later in (("train", "valid"), ("valid", "test")):
            end, start = task.segments[earlier][1], task.segments[later][0]
            assert ((sessions > end) & (sessions < start)).sum() == 3, "the horizon, which is above the label's reach"
    assert {task.segments["train"][0] for task in walk.tasks} == {sessions[0]}
    sliding = WalkForward(walk.workflow, 7, window="sliding")
    lengths = [((sessions >= a) & (sessions <= b)).sum() for a, b in (task.segments["train"] for task in sliding.tasks)]
    assert len(set(lengths)) == 1 and sliding.tasks[1].segments["train"][0] == sessions[7]


def test_a_roll_is_one_run_beside_static_ones_and_a_second_one_trains_nothing(market, place, database, capsys):
    path = linear(market, place / "folder", "Mortal")
    Path("mlflow.db").unlink()
    assert main(["roll", str(path), "--step", "7", "--dry-run"]) == 0
    assert "not known before a task" in capsys.readouterr().out and not Path("mlflow.db").exists()
    shutil.copy(database, place)
    assert main(["roll", str(path), "--step", "7"]) == 0
    told = capsys.readouterr().out
    assert "4/4  task 4: 2018-07-17 … 2018-07-24  rank IC " in told
    (result,) = load_runs(["linear_rolling"], mlflow_uri())
    days = result.scores.index.get_level_values("datetime")
    assert (str(days.min().date()), str(days.max().date())) == ("2018-06-18", "2018-07-24")
    assert result.metrics["rank_ic"] == pytest.approx(result.metrics["rank_ic"]) and len(result.report)
    assert result.config["task"]["rolling"]["tasks"] == 4 and result.config["experiment_name"] == "linear_rolling"
    record = json.loads((Path(result.artifacts) / "kronos_rolling.json").read_text())
    assert len({task["recorder"] for task in record["tasks"]}) == 4
    client = MlflowClient(mlflow_uri())
    tasks = client.search_runs([client.get_experiment_by_name("linear_rolling_tasks").experiment_id])
    assert {run.info.run_id for run in tasks} == {task["recorder"] for task in record["tasks"]}

    assert main(["roll", str(path), "--step", "7"]) == 0
    told = capsys.readouterr().out
    assert told.count("finished before") == 4 and result.run_id in told
    assert Path("fits").read_text().count("fit") == 4
    assert main(["roll", str(path), "--step", "7", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "embargo    2 sessions" in told and "nothing is left to train" in told


def test_a_joined_run_is_what_the_tasks_scored_and_no_score_sees_a_later_bar(market, place):
    one = WalkForward(linear(market, place / "one"), 7)
    runs = list(one.run())
    found = [scores(run, one) for run in runs]
    joined = one.join(runs).load_object("pred.pkl")
    assert same(joined, pd.concat(found).sort_index())
    for how in ("prices", "holes", "membership"):
        changed = tampered(market, place / how / "market", how)
        other = WalkForward(linear(changed, place / how), 7, experiment=how)
        assert other.tasks[0].digest == one.tasks[0].digest and other.tasks[3].digest != one.tasks[3].digest
        again = [scores(run, other) for run in other.run()]
        assert all(same(theirs, own) for theirs, own in zip(found[:2], again[:2]))
        upto = [each.loc[:LAST_DAY] for each in (found[2], again[2])]
        assert same(*upto) and len(upto[0])
        assert not found[3].equals(again[3]), "the market does differ"


def test_a_longer_test_segment_adds_tasks_and_leaves_those_of_before(market, place):
    long = WalkForward(linear(market, place / "long"), 7)
    path = write(market, place / "short", segments=DATES | {"test": ["2018-06-18", "2018-07-05"]}, records=RECORDS)
    base = path.with_name("base.yaml")
    base.write_text(base.read_text().replace("end_time: '2018-08-13'", "end_time: '2018-07-12'"))
    short = WalkForward(path, 7)
    assert short.config["task"]["dataset"]["kwargs"]["handler"]["kwargs"]["end_time"] == "2018-07-12"
    assert [task.digest for task in short.tasks] == [task.digest for task in long.tasks[:2]]


def test_a_roll_that_is_killed_at_any_task_goes_on_from_the_next_one(market, place):
    path = linear(market, place / "folder", "Mortal")
    arguments = str(path), "--step", "9"
    for number in (1, 2, 4):  # fits in all: each killed task is fitted again
        Path("kill_at").write_text(str(number))
        assert roll_in_child(*arguments) == -signal.SIGKILL
    Path("kill_at").unlink()
    assert roll_in_child(*arguments) == 0
    tasks = 3
    assert Path("fits").read_text().count("fit") == tasks + 3
    walk = WalkForward(path, 9)
    runs = list(walk.run())
    assert all(run.reused for run in runs) and len(runs) == tasks
    found = walk.join(runs).load_object("pred.pkl")
    whole = WalkForward(linear(market, place / "other"), 9, experiment="whole")
    assert same(found, whole.join(list(whole.run())).load_object("pred.pkl"))


def test_signals_of_a_joined_run_are_those_of_the_task_that_scored_the_date(market, place):
    walk = WalkForward(linear(market, place / "folder"), 14)
    runs = list(walk.run())
    joined = walk.join(runs).load_object("pred.pkl")["score"]
    for date, task in (("2018-06-20", runs[0]), ("2018-07-20", runs[1]), ("2018-07-30", runs[1])):
        run = open_run(walk.experiment, mlflow_uri(), market, date)
        assert run.trained.run_id == task.recorder_id and run.portfolio["strategy"]["kwargs"]["topk"] == 3
        found = make_signals(run, pd.Timestamp(date))
        assert found.experiment == walk.experiment and found.promised["days"] > 20
        if pd.Timestamp(date) <= pd.Timestamp(DATES["test"][1]):
            expected = joined.xs(pd.Timestamp(date), level="datetime").sort_index().astype(float)
            pd.testing.assert_series_equal(found.table["score"], expected, check_exact=True)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of one core on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    node = {"num_cpus": 1, "include_log_monitor": False, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.long
def test_neither_processes_nor_a_cluster_change_a_score(market, place, cluster):
    path = linear(market, place / "folder", "Drawn")
    walks = [
        WalkForward(path, 18, experiment=name, **options)
        for name, options in {"one": {}, "two": {"processes": 2}, "ray": {"engine": "ray"}}.items()
    ]
    found = [sorted(walk.run(), key=lambda run: run.task.number) for walk in walks]
    one = [scores(run, walks[0]) for run in found[0]]
    assert len(one) == 2
    for walk, runs in zip(walks[1:], found[1:]):
        assert all(same(a, scores(run, walk)) for a, run in zip(one, runs, strict=True))
        assert not any(run.reused for run in runs)


@pytest.mark.slow
def test_trainings_start_from_those_of_the_task_before(market, place, capsys):
    path = kronos(market, place / "folder")
    walks = {
        start: WalkForward(path, 14, start=start, next_epochs=1 if start == "previous" else None, experiment=start)
        for start in ("previous", "scratch")
    }
    found = {start: list(walk.run()) for start, walk in walks.items()}
    folders = {
        start: [Path(run.task.config["model"]["kwargs"]["finetune"]["output_dir"]) for run in runs]
        for start, runs in found.items()
    }
    first, second = folders["previous"]
    assert first.parent == Path("out_rolling") and first.name.startswith("2018-06-18_")
    identity = json.loads((second / "predictor" / "identity.json").read_text())
    assert identity["start"] == str(first) and identity["settings.epochs"] == 1
    assert "start" not in json.loads((folders["scratch"][1] / "predictor" / "identity.json").read_text())
    tables = {start: [scores(run, walks[start]) for run in runs] for start, runs in found.items()}
    assert same(tables["previous"][0], tables["scratch"][0]), "the first task has none before it"
    assert not same(tables["previous"][1], tables["scratch"][1])
    walks["previous"].join(found["previous"])
    (result,) = load_runs(["previous"], mlflow_uri())
    assert result.horizon == 3 and result.kronos_run["rolling"]["start"] == "previous"

    assert main(["roll", str(path), "--step", "14", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "task 2/2" in told and "windows " in told and "by the 2 tasks" not in told


@pytest.mark.slow
def test_a_ranker_is_rolled_from_previous_weights_too(market, place):
    ranker = {"output_dir": "out/{task}", "epochs": 1, "days_per_epoch": 16, "batch_size": 8, "valid_days": 10}
    walk = WalkForward(kronos(market, place / "folder", "KronosRanker", ranker=ranker), 14, start="previous")
    runs = list(walk.run())
    first, second = (Path(run.task.config["model"]["kwargs"]["ranker"]["output_dir"]) for run in runs)
    assert first.parent == Path("out_rolling")
    assert json.loads((second / "ranker" / "identity.json").read_text())["start"] == str(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "0"], "step, processes and next epochs should be 1 or more"),
        (["--step", "7", "--from", "previous"], "from previous needs a model whose training has an output_dir"),
        (["--step", "7", "--from", "previous", "--processes", "2"], "from previous is a chain of tasks"),
        (["--step", "7", "--engine", "ray", "--processes", "2"], "processes are of this machine"),
        (["--step", "7", "--next-epochs", "1"], "say from previous too"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_work(market, place, capsys, options, message):
    assert main(["roll", str(linear(market, place / "folder")), *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("kronos-qlib roll: error: ") and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"valid": ["2018-06-14", "2018-06-15"]}, "leaves nothing to validate"),
        ({"train": ["2018-04-30", "2018-04-30"]}, "leaves nothing to train on"),
        ({"valid": ["2018-05-01", "2018-06-20"]}, "should follow each other"),
        ({"test": None}, "segments.test should be two dates"),
    ],
)
def test_segments_that_leave_nothing_are_refused(market, place, segments, message):
    path = write(market, place / "folder", segments=DATES | segments)
    with pytest.raises(ValueError, match=message):
        WalkForward(path, 7)

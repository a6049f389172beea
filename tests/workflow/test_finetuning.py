"""Fine-tuning as a user meets it: from fit, from the command, from torchrun; what it records, and what it refuses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from forks import forked
from qlib.data.dataset.weight import Reweighter
from qlib.workflow import R
from tiny import MODEL, SEGMENTS, STAGE, TOKENIZER, finetune, make_dataset, make_model, same_weights, weights
from waiting import meanwhile, wait_for

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.cli import main
from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.train.batches import BatchSampler

pytestmark = pytest.mark.slow

ARTIFACTS = {"training.png", "reconstruction.csv", "codebook.json", "kronos_run.json"}


# From fit


def test_two_processes_give_the_weights_of_one_and_the_same_record(run, store, tmp_path):
    model = make_model(finetune=finetune(tmp_path / "out", processes=2))
    with R.start(experiment_name="two"):
        model.fit(make_dataset())
        recorder = R.get_recorder()
    assert same_weights(weights(model.model), weights(run.model.model))
    assert same_weights(weights(model.tokenizer), weights(run.model.tokenizer))
    assert not (tmp_path / "out" / "job").exists()
    ours, theirs = ({key for key in r.list_metrics() if "forecast" not in key} for r in (recorder, run.recorder))
    assert ours == theirs >= {"tokenizer.val_loss", "predictor.lr", "predictor.windows_per_second"}
    assert ARTIFACTS <= set(recorder.list_artifacts())
    history = recorder.client.get_metric_history(recorder.id, "predictor.train_loss")
    assert [point.step for point in history] == [2, 3, 4, 6]


def test_the_report_is_kept_beside_the_weights_and_in_the_recorder(run):
    assert ARTIFACTS <= set(run.recorder.list_artifacts())
    metrics = run.recorder.list_metrics()
    use = json.loads((run.folder / "codebook.json").read_text())
    assert metrics["codebook.perplexity_s1"] == pytest.approx(use["perplexity_s1"])
    assert 1 <= metrics["codebook.perplexity_s1"] <= 2 ** TOKENIZER["s1_bits"]
    assert metrics["reconstruction.close.mae"] > 0


class OneInstrument(Reweighter):
    """All weight, almost, on one instrument."""

    def __init__(self, name):
        self.name = name

    def reweight(self, data):
        self.data = data
        return np.where(data.index.get_level_values("instrument") == self.name, 1.0, 1e-9)


def test_a_reweighter_decides_which_windows_are_drawn(store, tmp_path):
    dataset = make_dataset()
    windows = dataset.training_windows("train")
    name = windows.instruments[0]
    reweighter = OneInstrument(name)
    job = make_model(finetune=finetune(tmp_path / "out")).job(dataset, reweighter)
    own = int((windows.instruments == name).sum())
    *_, specification = job.specifications()
    drawn = BatchSampler.from_specification(specification).batches()
    first = np.concatenate([batch.rows for batch in drawn if batch.epoch == 0])
    assert (windows.instruments[first] == name).sum() == min(own, len(first))
    bar = reweighter.data.iloc[-1]
    assert bar["close"] == windows.bars.values[windows.ends[-1]][3]


class Nonsense(Reweighter):
    def __init__(self):
        """Qlib's own refuses to be called."""

    def reweight(self, data):
        return np.full(len(data), np.nan)


def test_a_reweighter_without_weights_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match="the reweighter should give a weight above 0 for each of the"):
        make_model(finetune=finetune(tmp_path / "out")).fit(make_dataset(), Nonsense())
    with pytest.raises(ValueError, match="a reweighter was given, but finetune is null"):
        make_model().fit(make_dataset(), Nonsense())


def test_recent_windows_weigh_more(store, tmp_path):
    dataset = make_dataset()
    job = make_model(finetune=finetune(tmp_path / "out", half_life_days=30)).job(dataset)
    dates = job.train.dates
    age = (dates.max() - dates) / np.timedelta64(1, "D")
    assert job.draw_weights[dates.argmax()] == 1
    assert job.draw_weights[age == 60] == pytest.approx(0.25)


def test_weights_that_change_nothing_are_told(store, tmp_path, warnings_logged):
    dataset = make_dataset()
    count = len(dataset.training_windows("train"))
    stages = {"tokenizer": {**finetune("x")["tokenizer"], "windows_per_epoch": count}}
    make_model(finetune=finetune(tmp_path / "out", half_life_days=30) | stages).job(dataset)
    assert f"tokenizer.windows_per_epoch ({count:,}) takes all {count:,} training windows" in warnings_logged.text
    assert "predictor.windows_per_epoch" not in warnings_logged.text


def test_another_store_joins_the_training_but_not_the_validation(store, tmp_path):
    other = write_demo_market(tmp_path / "other", instruments=4, days=160, seed=9)
    extra = [{"instruments": "demo", "provider_uri": str(other)}]
    dataset = make_dataset()
    job = make_model(finetune=finetune(tmp_path / "out", extra_data=extra)).job(dataset)
    own, valid = dataset.training_windows("train"), dataset.training_windows("valid")
    assert len(job.train) > len(own)
    assert {name for name in job.train.instruments if name.startswith("other:")}
    assert job.train.bars.dates[job.train.ends + job.train.future].max() <= np.datetime64(SEGMENTS["train"][1])
    np.testing.assert_array_equal(job.valid.keys, valid.keys)
    np.testing.assert_array_equal(job.valid.normalised(np.arange(9)).x, valid.normalised(np.arange(9)).x)


# From the command


@pytest.fixture
def workflow(store, tmp_path):
    """A workflow file of the tiny networks, its runs in a folder of its own."""
    config = {
        "experiment_name": "tiny",
        "qlib_init": {
            "provider_uri": str(store),
            "region": "cn",
            "kernels": 1,
            "exp_manager": {
                "class": "MLflowExpManager",
                "module_path": "qlib.workflow.expm",
                "kwargs": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "default_exp_name": "Experiment"},
            },
        },
        "task": {
            "model": {
                "class": "KronosModel",
                "module_path": "kronos_qlib",
                "kwargs": {
                    "tokenizer": TOKENIZER,
                    "model": MODEL,
                    "device": "cpu",
                    "dtype": "float32",
                    "seed": 1,
                    "finetune": finetune(tmp_path / "out"),
                },
            },
            "dataset": {
                "class": "KLineDataset",
                "module_path": "kronos_qlib",
                "kwargs": {
                    "handler": {
                        "class": "KLineHandler",
                        "module_path": "kronos_qlib",
                        "kwargs": {"instruments": "demo"},
                    },
                    "segments": SEGMENTS,
                    "lookback": 10,
                    "horizon": 3,
                },
            },
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_dry_run_tells_what_would_happen_and_does_nothing(workflow, tmp_path, capsys):
    assert main(["finetune", str(workflow), "--dry-run"]) == 0
    told = capsys.readouterr().out
    dataset = make_dataset()
    count = len(dataset.training_windows("train"))
    assert f"train {count:,}   valid {len(dataset.training_windows('valid')):,}" in told
    assert f"{make_model().model.n_parameters:,} parameters, new" in told
    assert "192 windows in 6 steps of 32: 2 epochs of 3 steps; validated on 64 windows" in told
    assert "first batch: x [32, 14, 6] float32, stamp [32, 14, 5] int64" in told
    assert re.search(r"memory about \d+ MiB of this machine's, beside torch and the data", told)
    assert "tokenizer holds no training yet" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_a_dry_run_says_that_a_folder_would_be_refused_or_gone_on_with(workflow, run, tmp_path, capsys):
    config = yaml.safe_load(workflow.read_text())
    kwargs = config["task"]["model"]["kwargs"]
    kwargs["finetune"]["output_dir"] = str(run.folder)
    for seed, said in ((1, "goes on with the training in"), (2, "another training (seed: 1 there, 2 now")):
        kwargs["seed"] = seed
        workflow.write_text(yaml.safe_dump(config))
        assert main(["finetune", str(workflow), "--dry-run"]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.long
def test_torchrun_leaves_what_the_recorder_and_a_later_run_need(workflow, run, database, tmp_path):
    shutil.copy(database, tmp_path)
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "kronos_qlib", "finetune", str(workflow)]
    done = command(tmp_path, sys.executable, "-m", *torchrun)
    assert done.returncode == 0, done.stderr
    for kind, name, theirs in (
        (KronosTokenizer, "tokenizer", run.model.tokenizer),
        (Kronos, "predictor", run.model.model),
    ):
        assert same_weights(weights(kind.from_pretrained(tmp_path / "out" / name / "best")), weights(theirs))
    assert (tmp_path / "out" / "training.png").exists()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny_finetune")
    (record,) = client.search_runs([experiment.experiment_id])
    assert record.info.status == "FINISHED"
    assert "predictor.best_val_loss" in record.data.metrics


def statuses(folder: Path) -> list[str]:
    """How the recorder says that the runs of the command have ended."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny_finetune")
    return [record.info.status for record in client.search_runs([experiment.experiment_id])]


def test_a_stopped_training_ends_as_failed_with_the_signal_s_status_and_goes_on(workflow, database, tmp_path, capfd):
    shutil.copy(database, tmp_path)
    config = yaml.safe_load(workflow.read_text())
    long = STAGE | {"epochs": 300}
    config["task"]["model"]["kwargs"]["finetune"] = finetune(tmp_path / "out", tokenizer=long, predictor=None)
    workflow.write_text(yaml.safe_dump(config))

    def stop():
        wait_for(lambda: list((tmp_path / "out").glob("tokenizer/checkpoints/step-????????")))
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop), pytest.raises(SystemExit) as stopped:
        main(["finetune", str(workflow)])
    assert stopped.value.code == 128 + signal.SIGTERM
    printed = capfd.readouterr().err
    assert "run the same again to go on" in printed
    assert "Traceback" not in printed
    assert statuses(tmp_path) == ["FAILED"]
    steps = [int(path.name[5:]) for path in (tmp_path / "out").glob("tokenizer/checkpoints/step-????????")]
    assert 0 < max(steps) < 900


def test_an_error_under_torchrun_is_said_once_and_recorded_as_failed(
    workflow, run, database, tmp_path, monkeypatch, capfd
):
    """As torchrun would start them: this process, and another that joins it."""
    shutil.copy(database, tmp_path)
    config = yaml.safe_load(workflow.read_text())
    kwargs = config["task"]["model"]["kwargs"]
    kwargs["finetune"]["output_dir"], kwargs["seed"] = str(run.folder), 2
    workflow.write_text(yaml.safe_dump(config))
    kept = {path: path.read_bytes() for path in run.folder.glob("*/*.*")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    arguments = ["finetune", str(workflow)]
    second = forked(tmp_path / "said.txt", main, arguments, **both, RANK="1", LOCAL_RANK="1")
    for name, value in (both | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    try:
        status = main(arguments)
    finally:
        torch.set_num_threads(threads)  # the processes of a machine divide its cores
        second.join()
    assert status == second.exitcode == 2
    printed = capfd.readouterr().err + (tmp_path / "said.txt").read_text()
    assert printed.count("kronos-qlib finetune: error: ") == 1
    assert "another training (seed: 1 there, 2 now" in printed
    assert statuses(tmp_path) == ["FAILED"]
    assert kept and kept == {path: path.read_bytes() for path in run.folder.glob("*/*.*")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("task"), "no workflow: it needs qlib_init, task.model and task.dataset"),
        (lambda config: config["task"]["model"]["kwargs"].update(finetune=None), "finetune is null"),
        (
            lambda config: config["task"]["model"].update(
                {"class": "LGBModel", "module_path": "qlib.contrib.model.gbdt", "kwargs": {}}
            ),
            "task.model is a LGBModel, not a KronosModel",
        ),
        (lambda config: config.update(BASE_CONFIG_PATH="base.yaml"), "BASE_CONFIG_PATH base.yaml is neither here nor"),
    ],
)
def test_a_file_without_anything_to_train_is_one_line_and_status_2(workflow, capsys, change, message):
    config = yaml.safe_load(workflow.read_text())
    change(config)
    workflow.write_text(yaml.safe_dump(config))
    assert main(["finetune", str(workflow)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("kronos-qlib finetune: error: ")
    assert message in told


def test_a_missing_workflow_is_one_line(tmp_path, capsys):
    assert main(["finetune", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such workflow file" in capsys.readouterr().err

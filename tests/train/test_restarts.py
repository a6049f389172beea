"""Killed, stopped or out of space, a training goes on where it was and ends as if nothing had happened."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks import forked
from jobs import (
    STEPS,
    assert_same_results,
    checkpoints,
    job,
    ranker_job,
    results,
    steps_done,
    workers,
)
from waiting import meanwhile, wait_for

from kronos_qlib.files import scratch_folder
from kronos_qlib.nn import KronosTokenizer
from kronos_qlib.train import job as jobs_of_training
from kronos_qlib.train.checkpoints import Progress, read_progress
from kronos_qlib.train.distributed import Group
from kronos_qlib.train.launch import launch
from kronos_qlib.train.signals import TrainingStopped
from kronos_qlib.train.step import TrainingStep
from kronos_qlib.train.worker import _load_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"),
]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A shell that starts the tests in the background lets them ignore Ctrl-C, and so would the trainings."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def started(folder, processes):
    """A process of its own that trains the job, alone or as the launcher of others."""
    return forked(Path(folder) / "said.txt", _train, folder, processes)


def _train(folder, processes):
    if processes == 1:
        job(folder).run()
    else:
        launch(job(folder), processes)


def alive(pids):
    """Those of some processes that still run."""
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and "\nState:\tZ" not in status(pid)]


def status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ"


def moments(seed, last):
    """Three moments at random, by the steps done, the first before stage 1 is half done."""
    rng = random.Random(seed)
    return [rng.randrange(first + 1, first + last // 3) for first in range(0, last, last // 3)][:3]


def test_a_killed_process_is_started_again_and_after_max_restarts_the_same_again_goes_on(whole, tmp_path):
    killed = []

    def kill():
        for steps in (STEPS - 10, STEPS + 10):  # in stage 1, whose processes are started again, and in stage 2
            wait_for(lambda steps=steps: steps_done(tmp_path) >= steps and workers())
            killed.append(workers()[-1])
            os.kill(killed[-1], signal.SIGKILL)
            wait_for(lambda: not alive(killed))

    with (
        meanwhile(kill),
        pytest.raises(RuntimeError, match=r"died 2 times \(process [01]: SIGKILL.*the last checkpoint is .*predictor"),
    ):
        launch(job(tmp_path, max_restarts=1), 2)
    assert len(killed) == 2 and not workers()
    assert STEPS < steps_done(tmp_path) < 2 * STEPS
    job(tmp_path).run()  # by one process: their number does not matter
    assert_same_results(tmp_path, whole)


def test_killed_at_three_moments_a_training_resumes_bitwise(whole, tmp_path):
    """By another number of processes each time; those of a launcher that is killed alone end by themselves."""
    for moment, processes in zip(moments(1, 2 * STEPS - 15), (1, 2, 1)):
        started_here = started(tmp_path, processes)
        wait_for(lambda moment=moment: steps_done(tmp_path) >= moment and checkpoints(tmp_path, "tokenizer"))
        time.sleep(random.Random(moment).uniform(0, 0.05))  # also between two checkpoints, or while one is written
        left = workers(started_here.pid)
        assert len(left) == (processes if processes > 1 else 0)
        started_here.kill()
        started_here.join()
        assert started_here.exitcode == -signal.SIGKILL
        wait_for(lambda left=left: not alive(left))
    assert steps_done(tmp_path) < 2 * STEPS
    job(tmp_path).run()
    assert_same_results(tmp_path, whole)


def test_a_killed_ranker_whose_layers_have_rates_of_their_own_resumes_bitwise(tmp_path):
    settings = {"layer_decay": 0.5, "checkpoint_every": 5, "log_every": 6}
    ranker_job(tmp_path / "whole", **settings).run()
    process = forked(tmp_path / "said.txt", _rank_until_killed, tmp_path / "killed", settings)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed", "ranker") == [13, 15]  # the last of an epoch of 13 steps, and of five
    ranker_job(tmp_path / "killed", **settings).run()
    assert_same_results(tmp_path / "killed", tmp_path / "whole")
    ranker_job(tmp_path / "even", **settings | {"layer_decay": 1.0}).run()
    assert results(tmp_path / "even") != results(tmp_path / "whole")


def _rank_until_killed(folder, settings):
    def kill(metrics, step):
        if step == 18:
            os.kill(os.getpid(), signal.SIGKILL)

    ranker_job(folder, **settings).run(log=kill)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_at_hand_which_is_saved(whole, tmp_path, number):
    def stop(metrics, step):
        if "predictor.lr" in metrics:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingStopped, match="predictor: stopped after step 21 of 40.*run the same again") as stopped:
        job(tmp_path, checkpoint_every=1000).run(log=stop)
    assert stopped.value.signal == number
    assert checkpoints(tmp_path, "predictor") == [20, 21]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    job(tmp_path).run()
    assert_same_results(tmp_path, whole)


def test_a_signal_at_the_end_of_a_stage_is_not_lost(whole, tmp_path):
    def stop(metrics, step):
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        job(tmp_path).run(log=stop)
    assert not (tmp_path / "predictor").exists()
    job(tmp_path).run()
    assert_same_results(tmp_path, whole)


def test_a_signal_while_the_best_weights_are_validated_is_not_lost(whole, tmp_path, monkeypatch):
    stopped_in = job(tmp_path)
    load, calls = stopped_in.tokenizer.load_weights, []

    def load_weights(path):
        calls.append(path)
        os.kill(os.getpid(), signal.SIGTERM)
        load(path)

    stopped_in.tokenizer.load_weights = load_weights
    with pytest.raises(TrainingStopped):
        stopped_in.run()
    assert calls and not (tmp_path / "predictor").exists()
    job(tmp_path).run()
    assert_same_results(tmp_path, whole)


def test_a_signal_to_the_launcher_stops_its_processes_after_a_step_which_is_saved(whole, tmp_path):
    def stop():
        wait_for(lambda: steps_done(tmp_path) >= 10)
        os.kill(os.getpid(), signal.SIGINT)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with meanwhile(stop), pytest.raises(TrainingStopped, match="stopped by SIGINT.*run the same again") as stopped:
        launch(job(tmp_path, checkpoint_every=10), 2)
    assert stopped.value.signal == signal.SIGINT
    assert not workers()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert steps_done(tmp_path) < 2 * STEPS
    assert not list(tmp_path.glob("*/checkpoints/*.tmp"))
    job(tmp_path).run()
    assert_same_results(tmp_path, whole)


@contextmanager
def largest_file(size):
    """A limit on the size of files of this process, as of a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_a_checkpoint_leaves_the_one_before_and_says_so(whole, tmp_path):
    limited = job(tmp_path)
    size = sum(tensor.nbytes for tensor in limited.tokenizer.state_dict().values())
    limits = []

    def limit(metrics, step):
        if step == 20:
            limits.append(largest_file(size))  # the weights alone fit no more, with their header
            limits[0].__enter__()

    try:
        with pytest.raises(
            OSError, match="the last whole checkpoint is step-00000015. Free some space and run the same"
        ):
            limited.run(log=limit)
    finally:
        limits[0].__exit__(None, None, None)
    assert checkpoints(tmp_path, "tokenizer") == [10, 15]
    assert not list(tmp_path.glob("tokenizer/checkpoints/*.tmp"))
    KronosTokenizer.from_pretrained(tmp_path / "tokenizer" / "checkpoints" / "step-00000015")
    job(tmp_path).run()
    assert_same_results(tmp_path, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to mount a disk here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_reported_by_the_processes_and_nothing_is_lost(whole, small_disk):
    def fill():
        wait_for(lambda: steps_done(small_disk) >= 10)
        with (small_disk / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                pass
            try:
                while True:
                    file.write(bytes(512))
            except OSError:
                pass

    with (
        meanwhile(fill),
        pytest.raises(OSError, match="No space left on device.*last whole checkpoint is.*run the same"),
    ):
        launch(job(small_disk, max_restarts=0), 2)
    newest = checkpoints(small_disk, "tokenizer")[-1]
    KronosTokenizer.from_pretrained(small_disk / "tokenizer" / "checkpoints" / f"step-{newest:08d}")
    (small_disk / "filler").unlink()
    job(small_disk).run()
    assert_same_results(small_disk, whole)


def run_until(steps, the_job, monkeypatch):
    """Run a job that is interrupted at a step, the first being 1."""
    take, done = TrainingStep.take, []

    def interrupted(*args):
        done.append(1)
        if len(done) == steps:
            raise KeyboardInterrupt
        return take(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            the_job.run()


@pytest.mark.parametrize("steps", [7, STEPS + 12])
def test_a_job_that_was_interrupted_goes_on_when_it_is_run_again(whole, tmp_path, monkeypatch, steps):
    """As when fit() is called again in a notebook after Ctrl-C: the very same networks."""
    the_job = job(tmp_path)
    run_until(steps, the_job, monkeypatch)
    assert steps_done(tmp_path) >= 5
    the_job.run()
    assert_same_results(tmp_path, whole)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A training of stage 1 that was stopped at step 13, with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        run_until(13, job(folder, predictor=None), patch)
    assert checkpoints(folder, "tokenizer") == [5, 10]
    return folder


@pytest.mark.parametrize("damage", ["cut short", "a bit turned"])
@pytest.mark.parametrize("file", ["progress.json", "optimizer.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(whole, interrupted, tmp_path, caplog, file, damage):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "tokenizer" / "checkpoints" / "step-00000010" / file
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "a bit turned" else content[:20])
    job(tmp_path, predictor=None).run()
    assert "step-00000010 is damaged" in caplog.text and "the one before is tried" in caplog.text
    expected = {name: content for name, content in results(whole).items() if name.startswith("tokenizer")}
    assert results(tmp_path) == expected


def test_a_history_that_was_damaged_or_removed_is_written_anew(whole, interrupted, tmp_path):
    """Its rows are in the checkpoints."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer" / "history.csv").write_bytes(b"\xfe\x00nothing")
    job(tmp_path, predictor=None).run()
    assert results(tmp_path)["tokenizer/history.csv"] == results(whole)["tokenizer/history.csv"]


@pytest.mark.parametrize("content", ["{", "[]", "\xff", ""])
def test_checkpoints_whose_identity_is_damaged_are_refused_with_its_name(interrupted, tmp_path, content):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer" / "identity.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="identity.json: damaged .*choose another output_dir"):
        job(tmp_path, predictor=None).run()


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """As earlier versions wrote them."""
    (tmp_path / "progress.json").write_text('{"step": 7, "best": 0.5, "schedule": {"last_epoch": 7}, "part_size": 8}')
    assert read_progress(tmp_path) == Progress(step=7, best=0.5, micro_batch_size=8)


def test_a_resumed_training_holds_on_to_no_file_of_its_checkpoint(tmp_path, monkeypatch):
    """They will be removed, which a network file system refuses or hides while they are mapped."""
    run_until(13, job(tmp_path, predictor=None), monkeypatch)
    take, seen = TrainingStep.take, []

    def looked_at(*args):
        seen.append("checkpoints/step-" in Path("/proc/self/maps").read_text())
        return take(*args)

    monkeypatch.setattr(TrainingStep, "take", looked_at)
    job(tmp_path, predictor=None).run()
    assert len(seen) == STEPS - 10 and not any(seen)


def test_checkpoints_that_do_not_say_of_what_training_are_refused(tmp_path):
    job(tmp_path, predictor=None).run()
    (tmp_path / "tokenizer" / "identity.json").unlink()
    with pytest.raises(ValueError, match="has checkpoints but no identity.json"):
        job(tmp_path, predictor=None).run()


def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    """As of a machine that does not see the folder."""

    class Two(Group):
        def all_gather(self, value):
            return [value, FileNotFoundError("not here")]

    with scratch_folder(tmp_path, "job-") as folder:
        job(tmp_path).save(folder)
        with pytest.raises(FileNotFoundError, match="not here"):
            _load_job(folder, Two())
        assert _load_job(folder, Group()).folder == tmp_path


def test_what_a_killed_launcher_left_is_removed_and_what_a_living_one_needs_is_not(tmp_path):
    program = """
import sys, time; from pathlib import Path; from kronos_qlib.files import scratch_folder
with scratch_folder(Path(sys.argv[1]), "job-") as folder:
    print(folder, flush=True); time.sleep(100)
"""
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, living = (Path(other.stdout.readline().strip()) for other in others)
    assert killed.is_dir() and living.is_dir()
    others[0].kill()
    others[0].wait()
    with scratch_folder(tmp_path, "job-") as own:
        assert set(tmp_path.iterdir()) == {own, living}
    others[1].kill()
    others[1].wait()


def test_a_second_training_in_the_folder_is_turned_away(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_of_training, "LOCK_SECONDS", 0.1)
    short = {"epochs": 1, "windows_per_epoch": 8}
    refused = []

    def second(metrics, step):
        with pytest.raises(TimeoutError, match="another training is at work in .*choose another output_dir"):
            job(tmp_path, short, None).run()
        refused.append(step)

    job(tmp_path, short, None).run(log=second)
    assert refused
    assert results(tmp_path)

"""A forecast is never computed twice, whatever happens to it and whoever computes it, and comes out the same."""

import os
import signal
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from tasks import assert_same, chunks, make_task, make_windows, run, started

from kronos_qlib.forecast import processes
from kronos_qlib.forecast import run as runs

# A worker in which pandas and Qlib cannot be imported: it stays small without them.
WITHOUT_PANDAS = """
import runpy, sys
sys.modules["pandas"] = sys.modules["qlib"] = None
runpy.run_module("kronos_qlib.forecast.processes", run_name="__main__", alter_sys=True)
"""


def wait_for_chunks(cache_dir, count, process):
    end = time.monotonic() + 60
    while len(chunks(cache_dir)) < count:
        assert time.monotonic() < end and process.exitcode is None
        time.sleep(0.01)


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def test_what_is_kept_is_what_was_computed_and_is_not_computed_again(plain, tmp_path, monkeypatch):
    first, resumed = run(make_task(), tmp_path)
    assert resumed == 0
    assert_same(first, plain)
    monkeypatch.setattr(runs, "Forecaster", None)  # nothing is left that would need it
    again, resumed = run(make_task(), tmp_path)
    assert resumed == len(make_task())
    assert_same(again, plain)


@pytest.mark.slow
def test_killed_again_and_again_it_goes_on_with_the_chunk_it_was_at(plain, tmp_path):
    for moment in (1, 3, 6):
        process = started(tmp_path, slow=True)
        wait_for_chunks(tmp_path, moment, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    kept = sum(pq.read_metadata(path).num_rows for path in chunks(tmp_path))
    again, resumed = run(make_task(), tmp_path)
    assert 6 * 56 <= resumed == kept < len(make_task())
    assert_same(again, plain)


@pytest.mark.slow
def test_processes_without_a_cache_give_the_same_and_need_no_pandas(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "WORKER", ("-c", WITHOUT_PANDAS))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    values, resumed = run(make_task(), processes=2)
    assert resumed == 0
    assert_same(values, plain)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dead_processes_and_what_a_killed_run_has_left(plain, tmp_path, monkeypatch, caplog):
    """A process that dies is replaced and its chunk done by another; the folder of a run that was killed is removed."""
    process = started(tmp_path, slow=True, processes=2)
    wait_for_chunks(tmp_path, 1, process)
    process.kill()
    process.join()
    (left,) = tmp_path.glob("kronos-*")
    used = tmp_path / "kronos-used"
    used.mkdir()
    killed = []
    forecast_chunk = processes._Worker._forecast

    def then_kill(self, chunk):
        forecast_chunk(self, chunk)
        if not killed and self.process is not None:
            killed.append(self.process.pid)
            kill(self.process.pid)

    monkeypatch.setattr(processes._Worker, "_forecast", then_kill)
    with FileLock(used / "lock"):
        values, resumed = run(make_task(), tmp_path, processes=2)
        assert used.exists()  # another run uses it
    assert len(killed) == 1 and "a forecasting process died (SIGKILL)" in caplog.text
    assert not left.exists() and [path.name for path in tmp_path.glob("kronos-*")] == ["kronos-used"]
    assert 56 <= resumed < len(make_task())
    assert_same(values, plain)
    assert sum(pq.read_metadata(path).num_rows for path in chunks(tmp_path)) == len(make_task())


@pytest.mark.slow
def test_a_chunk_that_kills_every_process_is_given_up_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WORKER", ("-c", "import os; input(); os.kill(os.getpid(), 9)"))
    with pytest.raises(RuntimeError, match="died 6 times in a row .*SIGKILL"):
        run(make_task(), tmp_path, processes=2)
    with pytest.raises(RuntimeError, match="died 3 times on the same 30 windows .*SIGKILL"):
        run(make_task(make_windows(last=25)), tmp_path, processes=2)


@pytest.mark.slow
def test_an_error_of_a_process_is_raised_in_its_words():
    broken = replace(make_task(make_windows(last=25)), max_context=2)  # below the horizon: refused by generation
    with pytest.raises(RuntimeError, match="pred_len .3. must be below max_context .2."):
        run(broken, processes=2)

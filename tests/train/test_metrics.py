"""What one process leaves in a file reaches the recorder of another, whole and in order, while it comes."""

import math

import pytest
from waiting import wait_for

from kronos_qlib.train import metrics
from kronos_qlib.train.metrics import file_log, forward_metrics, guarded_log, recorder_log


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(metrics, "POLL_SECONDS", 0.01)


def test_metrics_are_forwarded_as_they_come_and_the_rest_at_the_end(tmp_path):
    seen, path = [], tmp_path / "metrics.jsonl"
    with forward_metrics(path, lambda values, step: seen.append((values, step))):
        file_log(path)({"predictor.train_loss": 0.1 + 0.2}, 1)
        wait_for(lambda: len(seen) == 1)
        file_log(path)({"predictor.val_loss": math.inf}, 2)  # another process, after a restart
    assert seen == [({"predictor.train_loss": 0.1 + 0.2}, 1), ({"predictor.val_loss": math.inf}, 2)]


def test_a_line_that_is_still_being_written_waits(tmp_path):
    seen, path = [], tmp_path / "metrics.jsonl"
    with forward_metrics(path, lambda values, step: seen.append(step)), path.open("ab", buffering=0) as file:
        file.write(b'[{"a": 1.0}, 1]\n[{"a": 2')
        wait_for(lambda: seen == [1])
        file.write(b'.0}, 2]\n[{"a"')  # the last one never to be ended
    assert seen == [1, 2]


def test_a_line_that_was_cut_short_costs_itself_alone(tmp_path):
    seen, path = [], tmp_path / "metrics.jsonl"
    with forward_metrics(path, lambda values, step: seen.append(step)):
        path.open("ab").write(b'[{"a": 2')
        file_log(path)({}, 3)
    assert seen == [3]


def test_what_came_before_an_error_is_forward_metrics(tmp_path):
    seen, path = [], tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError), forward_metrics(path, lambda values, step: seen.append(step)):
        file_log(path)({}, 7)
        raise RuntimeError
    assert seen == [7]


def test_a_recorder_out_of_reach_is_reported_once_and_ends_nothing(caplog):
    log = guarded_log(recorder_log({"uri": "nowhere://at-all", "run_id": "1"}))
    log({"predictor.train_loss": 1.0}, 1)
    log({"predictor.train_loss": 1.0}, 2)
    assert [record.getMessage().startswith("the metrics of step 1 could not") for record in caplog.records] == [True]

"""What can be known of a workflow before it runs is said by `kronos-qlib check`, by `finetune` and at `fit`."""

import copy
import logging
from pathlib import Path

import pytest
import yaml
from qlib.workflow import R
from tiny import HORIZON, LOOKBACK, MODEL, SEGMENTS, STAGE, TOKENIZER, make_dataset, make_model

from kronos_qlib.cli import main
from kronos_qlib.workflow.check import WorkflowCheck

RULE = {"class": "FactorScore", "module_path": "kronos_qlib.workflow.rules", "kwargs": {"feature": "A"}}
TEMPLATE = "qlib.workflow.record_temp"
BACKTEST = {
    "start_time": SEGMENTS["test"][0],
    "end_time": SEGMENTS["test"][1],
    "account": 100_000_000,
    "benchmark": "DEMOINDEX",
    "exchange_kwargs": {"deal_price": "open", "limit_threshold": 0.095},
}
STRATEGY = {
    "class": "TopkDropoutStrategy",
    "module_path": "qlib.contrib.strategy",
    "kwargs": {"signal": "<PRED>", "topk": 3, "n_drop": 1},
}


def workflow(market: Path) -> dict:
    """A workflow of which nothing is wrong."""
    kronos = {"module_path": "kronos_qlib"}
    handler = {"class": "KLineHandler", **kronos, "kwargs": {"instruments": "demo"}}
    return {
        "qlib_init": {
            "provider_uri": str(market),
            "region": "cn",
            "kernels": 1,
            "exp_manager": {
                "class": "MLflowExpManager",
                "module_path": "qlib.workflow.expm",
                "kwargs": {"uri": f"sqlite:///{Path.cwd() / 'mlflow.db'}", "default_exp_name": "Experiment"},
            },
        },
        "experiment_name": "checked",
        "task": {
            "model": {
                "class": "KronosModel",
                **kronos,
                "kwargs": {
                    "tokenizer": TOKENIZER,
                    "model": MODEL,
                    "device": "cpu",
                    "forecast": {"cache_dir": "forecasts"},
                    "finetune": {"output_dir": "checked", "tokenizer": STAGE, "predictor": STAGE},
                },
            },
            "dataset": {
                "class": "KLineDataset",
                **kronos,
                "kwargs": {"handler": handler, "segments": SEGMENTS, "lookback": LOOKBACK, "horizon": HORIZON},
            },
            "record": [
                {"class": "SignalRecord", "module_path": TEMPLATE},
                {"class": "SigAnaRecord", "module_path": TEMPLATE},
                {
                    "class": "PortAnaRecord",
                    "module_path": TEMPLATE,
                    "kwargs": {"config": {"strategy": STRATEGY, "backtest": BACKTEST}},
                },
            ],
        },
    }


def findings(changed: dict) -> list:
    Path("changed.yaml").write_text(yaml.safe_dump(changed))
    return list(WorkflowCheck(Path("changed.yaml")).findings())


def with_value(config: dict, path: str, value) -> dict:
    """A copy of a configuration with another value at a dotted path; None of `...` takes the key away."""
    changed = copy.deepcopy(config)
    *above, last = path.split(".")
    inner = changed
    for key in above:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return changed


BACKTEST_PATH = "task.record.2.kwargs.config.backtest"


def test_nothing_is_found_in_a_workflow_that_runs_and_what_will_run_is_said_with_sizes(store, capsys):
    config = workflow(store)
    found = findings(config)
    assert [finding for finding in found if finding.level != "ok"] == []
    texts = {finding.subject: finding.text for finding in found}
    windows = len(make_dataset().score_windows("test"))
    assert f"{windows:,} windows of {LOOKBACK} bars" in texts["test"]
    assert f"{windows:,} windows × 5 samples × {HORIZON} bars" in texts["forecast"]
    assert "GiB free" in texts["finetune.output_dir"] and "GiB free" in texts["forecast.cache_dir"]
    assert not Path("checked").exists() and not Path("forecasts").exists(), "nothing is made"
    assert main(["check", "changed.yaml"]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "value", "subject", "message"),
    [
        (f"{BACKTEST_PATH}.end_time", "2018-08-13", "backtest", "reaches the store's last session, 2018-08-13"),
        (f"{BACKTEST_PATH}.end_time", ..., "backtest", "end it on 2018-08-10"),
        (f"{BACKTEST_PATH}.start_time", "2031-01-01", "backtest", "has no session; the store has 2018-01-02"),
        (f"{BACKTEST_PATH}.start_time", "someday", "backtest", "someday"),
        (f"{BACKTEST_PATH}.benchmark", None, "benchmark", "null, for which Qlib takes SH000300; the store has no bars"),
        (f"{BACKTEST_PATH}.benchmark", ..., "benchmark", "not named, so Qlib takes SH000300; the store has no bars"),
        (f"{BACKTEST_PATH}.benchmark", "DEMO9999", "benchmark", "the store has no bars of DEMO9999"),
        (f"{BACKTEST_PATH}.exchange_kwargs.limit_threshold", ["$a", "$b"], "limit_threshold", "from Python only"),
        ("task.record.2.kwargs.config.strategy.class", "NoStrategy", "strategy", "qlib.contrib.strategy has no NoStr"),
        ("task.record.1.class", "NoRecord", "record NoRecord", "qlib.workflow.record_temp has no NoRecord"),
        ("task.record.1.module_path", "no.module", "record SigAnaRecord", "No module named 'no'"),
        ("task.dataset.kwargs.segments.valid", ["2018-04-20", "2018-06-15"], "train", "ends on 2018-04-30, after"),
        ("task.dataset.kwargs.segments.test", ["2031-01-01", None], "task.dataset", "test"),
        ("task.dataset.kwargs.handler.kwargs.instruments", "nobody", "task.dataset", "unknown universe 'nobody'"),
        ("task.model.kwargs.tokenizer", "no/such-folder/here", "task.model", "no/such-folder/here"),
        ("task.model.kwargs.device", "cuda:97", "task.model", "cuda:97"),
        ("task.model.kwargs.finetune.output_dir", "/proc/none", "finetune.output_dir", "cannot be written"),
        ("qlib_init.exp_manager.kwargs.uri", "sqlite:////proc/none/mlflow.db", "recorder", "cannot be written"),
        ("qlib_init.exp_manager.kwargs.uri", 5, "recorder", "qlib_init.exp_manager.kwargs.uri"),
        ("qlib_init.provider_uri", "no/store", "qlib_init", "there is no Qlib store at"),
        ("task.reweighter", RULE, "task.reweighter", "not a Reweighter"),
        ("task.dataset.kwargs.handler.kwargs.columns", {"a": "$high/$low"}, "model", "d_in is 6; bars have 7 columns"),
        ("task.dataset.kwargs.handler.kwargs.prices", "any", "model", "score mean_return is a ratio of prices"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_one_error_before(store, path, value, subject, message):
    errors = [finding for finding in findings(with_value(workflow(store), path, value)) if finding.level == "error"]
    assert [finding.subject for finding in errors] == [subject]
    assert message in errors[0].text and "\n" not in errors[0].text


def test_a_calibration_is_looked_at_before_the_training(store):
    def found(settings, **segments):
        changed = with_value(workflow(store), "task.model.kwargs.calibration", settings)
        for name, dates in segments.items():
            changed = with_value(changed, f"task.dataset.kwargs.segments.{name}", dates)
        return next(finding for finding in findings(changed) if finding.subject == "calibration")

    few = found({"days": 5})
    assert few.level == "warning" and "windows of 5 days of valid × 5 samples, split bands; bands of 90 %" in few.text
    unknown = found({"segment": "tune"})
    assert unknown.level == "error" and "unknown segment 'tune'; known: test, train, valid" in unknown.text
    late = found({}, test=["2018-06-15", "2018-07-31"])
    assert late.level == "error" and "segment 'valid' should end before 'test' starts" in late.text


def test_the_command_prints_a_line_for_each_and_fails(store, capsys):
    changed = with_value(workflow(store), f"{BACKTEST_PATH}.benchmark", None)
    Path("changed.yaml").write_text(yaml.safe_dump(with_value(changed, "task.record.1.class", "NoRecord")))
    assert main(["check", "changed.yaml"]) == 2
    printed = capsys.readouterr()
    assert [line[:2] for line in printed.err.splitlines() if line.startswith("✗")] == ["✗ ", "✗ "]
    assert "2 errors, 0 warnings" in printed.out


def test_an_untrained_network_and_overlapping_segments_are_warnings(store):
    changed = with_value(workflow(store), "task.model.kwargs.finetune", None)
    changed = with_value(changed, "task.dataset.kwargs.segments.test", ["2018-06-11", "2018-07-31"])
    warned = [finding for finding in findings(changed) if finding.level == "warning"]
    assert {finding.subject for finding in warned} == {"tokenizer", "model", "valid"}


@pytest.mark.slow
def test_finetune_looks_first_and_trains_nothing_that_cannot_be_trained(store, capsys):
    changed = with_value(workflow(store), "task.dataset.kwargs.segments.valid", ["2018-04-20", "2018-06-15"])
    Path("changed.yaml").write_text(yaml.safe_dump(changed))
    assert main(["finetune", "changed.yaml"]) == 2
    assert "ends on 2018-04-30, after 'valid' starts on 2018-04-20" in capsys.readouterr().err
    assert not Path("checked").exists()


def test_fit_warns_of_records_that_will_fail(store, tmp_path, warnings_logged):
    task = with_value(workflow(store), f"{BACKTEST_PATH}.benchmark", None)["task"]
    with R.start(experiment_name="warned"):
        R.save_objects(task=task)  # as Qlib's trainer does
        make_model().fit(make_dataset())
    assert "benchmark: is null, for which Qlib takes SH000300" in warnings_logged.text
    assert [record.levelno for record in warnings_logged.records if "benchmark" in record.message] == [logging.WARNING]

"""The workflow files, read as qrun reads them: rendered from the environment, laid over their base."""

import copy
import datetime
import functools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from qlib.cli.run import render_template
from qlib.utils.data import update_config
from ruamel.yaml import YAML

WORKFLOWS = Path(__file__).parents[1] / "workflows"
LEARNT = ["lightgbm", "lightgbm360", "lightgbm_kronos", "linear"]
RULES = ["reversal", "momentum", "volatility", "last_value"]
BASELINES = LEARNT + RULES
KRONOS = ["kronos_csi300", "kronos_csi300_zeroshot", "kronos_csi300_nano", "kronos_csi300_nano_chosen"]
KRONOS += ["kronos_csi300_nano_calibrated", "ranker_csi300", "ranker_nano_csi300"]
CSI300 = KRONOS + [f"{name}_csi300" for name in BASELINES]
DEMO = ["kronos_demo", "ranker_demo"] + [f"{name}_demo" for name in BASELINES]
OTHERS = [
    f"{kind}_{market}" for market in ("5min", "crypto_1h", "us_day") for kind in ("kronos", "lightgbm", "reversal")
]
NESTED = ["nested_daily_signal", "nested_minute_execution"]
VARIABLES = ["QLIB_DATA", "KRONOS_TOKENIZER", "KRONOS_MODEL"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def load(name: str) -> dict[str, Any]:
    """A workflow as `qrun` sees it: `qlib.cli.run.workflow` up to the start of Qlib."""
    path = WORKFLOWS / f"{name}.yaml"
    config = YAML(typ="safe", pure=True).load(render_template(path))
    return update_config(load_base(config["BASE_CONFIG_PATH"]), config) if "BASE_CONFIG_PATH" in config else config


def load_base(file_name: str) -> dict[str, Any]:
    return copy.deepcopy(parsed_base(file_name))


@functools.cache
def parsed_base(file_name: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((WORKFLOWS / file_name).read_text())


def backtest_config(config: dict[str, Any]) -> dict[str, Any]:
    return record_kwargs(config, "PortAnaRecord")["config"]


def record_kwargs(config: dict[str, Any], name: str) -> dict[str, Any]:
    (record,) = [record for record in config["task"]["record"] if record["class"] == name]
    return record["kwargs"]


def handler_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """A handler's keyword arguments; label and freq are here too where a stock handler gives them to its loader."""
    kwargs = copy.deepcopy(config["task"]["dataset"]["kwargs"]["handler"]["kwargs"])
    if "data_loader" in kwargs:
        loader = kwargs.pop("data_loader")["kwargs"]
        assert not {"label", "freq"} & set(kwargs)
        expressions, names = loader["config"]["label"]
        assert names == [f"LABEL{i}" for i in range(len(expressions))]
        kwargs |= {"label": expressions, "freq": loader["freq"]}
    return kwargs


def shared_part(config: dict[str, Any]) -> dict[str, Any]:
    """All of a workflow but its name, its model, its features, and what its forecasts are held against."""
    config = copy.deepcopy(config)
    dataset = config["task"]["dataset"]
    dataset["kwargs"]["handler"]["kwargs"] = handler_kwargs(config)
    for part, keys in [
        (config, ["experiment_name"]),
        (config["task"], ["model"]),
        (dataset, ["class", "module_path"]),
        (dataset["kwargs"], ["lookback", "horizon", "exchange"]),
        (dataset["kwargs"]["handler"], ["class", "module_path"]),
        (record_kwargs(config, "ForecastRecord"), ["baselines"]),
        (dataset["kwargs"]["handler"]["kwargs"], ["infer_processors", "fit_start_time", "fit_end_time", "kronos"]),
    ]:
        for key in keys:
            part.pop(key, None)
    return config


def test_these_are_all_the_workflows():
    bases = [f"base_{market}" for market in ("csi300", "demo", "5min", "crypto_1h", "us_day")]
    assert {path.stem for path in WORKFLOWS.glob("*.yaml")} == {*CSI300, *DEMO, *OTHERS, *NESTED, *bases}


@pytest.mark.parametrize("name", CSI300 + DEMO + OTHERS + NESTED)
def test_the_experiment_is_named_after_the_file(name):
    assert load(name)["experiment_name"] == name


@pytest.mark.parametrize("empty", [False, True], ids=["unset", "empty"])
@pytest.mark.parametrize("name", CSI300 + DEMO)
def test_paths_have_defaults(name, empty, monkeypatch):
    if empty:
        for variable in VARIABLES:
            monkeypatch.setenv(variable, "")
    config = load(name)
    default = "runs/demo/market" if name in DEMO else "~/.qlib/qlib_data/cn_data"
    assert config["qlib_init"]["provider_uri"] == default
    if name in ("kronos_csi300", "kronos_csi300_zeroshot"):
        assert config["task"]["model"]["kwargs"]["tokenizer"] == "NeoQuasar/Kronos-Tokenizer-base"
        assert config["task"]["model"]["kwargs"]["model"] == "NeoQuasar/Kronos-small"


@pytest.mark.parametrize("name", CSI300 + DEMO)
def test_paths_come_from_the_environment(name, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"/somewhere/of my own/{variable}")
    config = load(name)
    assert config["qlib_init"]["provider_uri"] == "/somewhere/of my own/QLIB_DATA"
    if name in ("kronos_csi300", "kronos_csi300_zeroshot"):
        assert config["task"]["model"]["kwargs"]["tokenizer"] == "/somewhere/of my own/KRONOS_TOKENIZER"
        assert config["task"]["model"]["kwargs"]["model"] == "/somewhere/of my own/KRONOS_MODEL"


@pytest.mark.parametrize("base", [path.name for path in WORKFLOWS.glob("base_*.yaml")])
def test_a_base_holds_no_template(base):
    """Qlib would leave it as it stands."""
    text = (WORKFLOWS / base).read_text()
    assert "{{" not in text and "{%" not in text


@pytest.mark.parametrize("name", CSI300 + DEMO + OTHERS + NESTED)
def test_the_recorder_is_a_sqlite_file(name):
    manager = load(name)["qlib_init"]["exp_manager"]
    assert manager["class"] == "MLflowExpManager"
    assert manager["kwargs"]["uri"] == "sqlite:///mlflow.db"


@pytest.mark.parametrize("name", CSI300 + DEMO + OTHERS)
def test_kronos_and_the_baselines_differ_in_model_and_features_only(name):
    market = name.split("_", 1)[1] if name in OTHERS else "demo" if name in DEMO else "csi300"
    ours, yardstick = load(name), load(f"lightgbm_{market}")
    models = {"kronos": "KronosModel", "linear": "LinearModel", "lightgbm": "LGBModel", "lightgbm360": "LGBModel"}
    models |= {"ranker": "KronosRanker"}
    assert ours["task"]["model"]["class"] == models.get(name.split("_")[0], "FactorScore")
    assert shared_part(ours) == shared_part(yardstick)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_the_same_on_both_markets(name):
    """But for its settings where it learns, which follow the number of rows, and for the dates of its segments."""
    demo, csi300 = load(f"{name}_demo"), load(f"{name}_csi300")
    for config in (demo, csi300):
        handler = config["task"]["dataset"]["kwargs"]["handler"]
        for key in ("instruments", "start_time", "end_time", "fit_start_time", "fit_end_time", "kronos"):
            handler["kwargs"].pop(key, None)
        if name in LEARNT:
            config["task"]["model"].pop("kwargs")
    for part in ("model", "dataset"):
        demo["task"][part].get("kwargs", {}).pop("segments", None)
        csi300["task"][part].get("kwargs", {}).pop("segments", None)
        assert demo["task"][part] == csi300["task"][part]


@pytest.mark.parametrize("name", [f"{name}_{market}" for name in RULES for market in ("csi300", "demo")] + OTHERS[2::3])
def test_a_rule_is_a_stock_dataset_without_processors_whose_column_is_the_score(name):
    task = load(name)["task"]
    assert task["model"]["module_path"] == "kronos_qlib.workflow.rules"
    handler = task["dataset"]["kwargs"]["handler"]
    assert (task["dataset"]["class"], handler["class"]) == ("DatasetH", "DataHandlerLP")
    assert not {"infer_processors", "learn_processors", "shared_processors"} & set(handler["kwargs"])
    expressions, columns = handler["kwargs"]["data_loader"]["kwargs"]["config"]["feature"]
    rule = task["model"]["kwargs"]
    assert columns == [rule["feature"], rule["volume"]] and expressions[1] == "$volume"


@pytest.mark.parametrize("name", ["linear_csi300", "linear_demo"])
def test_the_linear_model_normalises_by_its_train_segment_alone(name):
    dataset = load(name)["task"]["dataset"]["kwargs"]
    kwargs = dataset["handler"]["kwargs"]
    assert [kwargs["fit_start_time"], kwargs["fit_end_time"]] == dataset["segments"]["train"]
    assert [processor["class"] for processor in kwargs["infer_processors"]] == ["RobustZScoreNorm", "Fillna"]


@pytest.mark.parametrize("name", ["lightgbm_kronos_csi300", "lightgbm_kronos_demo"])
def test_the_pca_of_kronos_factors_is_fitted_on_the_train_segment_alone(name):
    dataset = load(name)["task"]["dataset"]["kwargs"]
    assert dataset["handler"]["kwargs"]["kronos"]["pca"]["fit"] == dataset["segments"]["train"]
    plain = load(name.replace("_kronos", ""))
    assert load(name)["task"]["model"] == plain["task"]["model"], "the features are all that differs"


@pytest.mark.parametrize("name", CSI300 + DEMO + OTHERS)
def test_the_label_is_the_return_that_an_order_after_the_close_can_earn(name):
    assert handler_kwargs(load(name))["label"] == ["Ref($close, -2)/Ref($close, -1) - 1"]


@pytest.mark.parametrize("name", CSI300 + DEMO + OTHERS)
def test_segments_are_in_order_and_the_backtest_is_the_test_segment(name):
    config = load(name)
    segments = config["task"]["dataset"]["kwargs"]["segments"]
    dates = [pd.Timestamp(date) for segment in ("train", "valid", "test") for date in segments[segment]]
    assert dates == sorted(set(dates)) and len(segments) == 3
    backtest = backtest_config(config)["backtest"]
    assert [backtest["start_time"], backtest["end_time"]] == segments["test"]


@pytest.mark.parametrize("name", CSI300)
def test_csi300_is_the_reference_backtest(name):
    config = load(name)
    segments = config["task"]["dataset"]["kwargs"]["segments"]
    assert segments["test"] == [datetime.date(2024, 7, 1), datetime.date(2025, 6, 5)]
    config = backtest_config(config)
    assert config["strategy"]["kwargs"] == {"signal": "<PRED>", "topk": 50, "n_drop": 5, "hold_thresh": 5}
    assert config["backtest"]["benchmark"] == "SH000300" and config["backtest"]["account"] == 1e8
    assert config["backtest"]["exchange_kwargs"] == {
        "freq": "day",
        "deal_price": "open",
        "limit_threshold": 0.095,
        "open_cost": 0.001,
        "close_cost": 0.0015,
        "min_cost": 5,
    }


def test_the_demo_is_set_up_as_csi300_but_for_market_dates_and_portfolio_size():
    demo, csi300 = load_base("base_demo.yaml"), load_base("base_csi300.yaml")
    for config in (demo, csi300):
        kwargs = config["task"]["dataset"]["kwargs"]
        kwargs.pop("segments")
        for key in ("instruments", "start_time", "end_time"):
            kwargs["handler"]["kwargs"].pop(key)
        backtest = backtest_config(config)
        for key in ("start_time", "end_time", "benchmark"):
            backtest["backtest"].pop(key)
        for key in ("topk", "n_drop"):
            backtest["strategy"]["kwargs"].pop(key)
    assert demo == csi300

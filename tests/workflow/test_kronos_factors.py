"""Kronos as factors: what they are, what they may see, and that every Qlib model takes them."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from networks import MODEL, TOKENIZER
from qlib.cli.run import workflow as qrun
from qlib.contrib.data.handler import Alpha158
from qlib.contrib.model.double_ensemble import DEnsembleModel
from qlib.contrib.model.gbdt import LGBModel
from qlib.contrib.model.linear import LinearModel
from qlib.contrib.model.pytorch_general_nn import GeneralPTNN
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.workflow import R
from scipy.stats import skew
from sklearn.decomposition import PCA
from tampering import LAST_DAY, tampered
from test_qrun import workflow
from tiny import HORIZON, LOOKBACK, SEGMENTS, make_dataset, make_model, use_market

from kronos_qlib import Alpha158Kronos, KronosFactors
from kronos_qlib.cli import main
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.forecast.embedding import HIDDEN, SURPRISES, Embedder
from kronos_qlib.forecast.scores import SCORES, summaries
from kronos_qlib.workflow.check import WorkflowCheck
from kronos_qlib.workflow.factor_table import read_provenance

FIT = SEGMENTS["train"]
SETTINGS: dict[str, Any] = {
    "tokenizer": TOKENIZER,
    "model": MODEL,
    "lookback": LOOKBACK,
    "pca": {"components": 3, "fit": FIT},
    "pooled_bars": 4,
    "surprise_bars": 3,
    "device": "cpu",
    "dtype": "float32",
    "seed": 1,
}
FORECAST = {"sample_count": 3, "temperature": 1.0}
FORECASTING = {"forecast": FORECAST, "horizon": HORIZON}
RANGE = SEGMENTS["train"][0], SEGMENTS["test"][1]
ALPHA = {"instruments": "demo", "start_time": RANGE[0], "end_time": RANGE[1]}


def make_factors(**changes: Any) -> KronosFactors:
    return KronosFactors(**SETTINGS | changes)


def load(start: str = RANGE[0], end: str = RANGE[1], instruments: Any = "demo", **changes: Any) -> pd.DataFrame:
    return make_factors(**changes).load(instruments, start, end)


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.fixture(scope="module")
def factors(market: Path, workplace: Path) -> pd.DataFrame:
    """All factors of the market, kept nowhere."""
    use_market(market)
    return load(**FORECASTING)


def test_the_factors_are_features_of_every_member_with_a_lookback(store, factors):
    windows = make_dataset().score_windows(RANGE)
    assert len(factors) == len(windows) and factors.index.names == ["datetime", "instrument"]
    assert (
        factors.index.is_monotonic_increasing and (factors.index.levels[0][[0, -1]] == [*windows.dates[[0, -1]]]).all()
    )
    assert (factors.dtypes == np.float32).all() and set(factors.columns.get_level_values(0)) == {"feature"}
    assert list(factors["feature"]) == make_factors(**FORECASTING).names and factors.shape[1] == 28
    assert factors.notna().all().all() and factors.nunique().min() > 2


@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.parametrize("how", ["prices", "no volume", "holes", "membership"])
def test_no_factor_sees_what_comes_after_it(market, store, factors, tmp_path, how):
    use_market(tampered(market, tmp_path / "tampered", how))
    after = load(**FORECASTING)
    assert_same(after.loc[:LAST_DAY], factors.loc[:LAST_DAY])
    assert len(after.loc[:LAST_DAY]) > 500 and not after.loc[LAST_DAY:].equals(factors.loc[LAST_DAY:])


@pytest.mark.filterwarnings("ignore:.*disagree")
def test_the_pca_reads_nothing_after_its_last_date(market, store, tmp_path):
    pca = {"components": 3, "fit": [None, LAST_DAY]}
    one, other, longer = make_factors(pca=pca), make_factors(pca=pca), make_factors(pca=pca | {"fit": RANGE})
    one.load("demo", *RANGE)
    use_market(tampered(market, tmp_path / "tampered", "prices"))
    other.load("demo", *RANGE)
    longer.load("demo", *RANGE)
    for name, array in vars(projection(one)).items():
        np.testing.assert_array_equal(array, vars(projection(other))[name])
    assert not np.allclose(projection(one).components, projection(longer).components), "bars after it would matter"


def projection(factors: KronosFactors) -> Any:
    (found,) = factors._projections.values()
    return found


@pytest.mark.parametrize("part", [("2018-05-02", "2018-05-31"), ("2018-07-10", RANGE[1])])
def test_a_part_of_the_range_has_the_same_factors_alone(store, factors, part):
    assert_same(load(*part, **FORECASTING), factors.loc[slice(*part)])


def test_other_instruments_matter_to_the_pca_alone(store, factors):
    names = ["DEMO0001", "DEMO0004", "DEMO0005"]
    few = load(instruments=names, **FORECASTING)
    free = [name for name in few if "_pc" not in name[1]]
    shared = few.index.intersection(factors.index)
    assert_same(few.loc[shared, free], factors.loc[shared, free])
    assert len(shared) > 300


def test_neither_order_nor_company_matters(store):
    factors = make_factors()
    task = factors.embedding_task(factors.work("demo", *RANGE).windows)
    rows = np.random.default_rng(0).permutation(len(task))
    whole, shuffled = Embedder(task).table(np.arange(len(task))), Embedder(task).table(rows[:300])
    assert shuffled.equals(whole.take(rows[:300]))
    wider = Embedder(task)
    wider.batch_size = 7
    for name in (*SURPRISES, HIDDEN):
        one, other = (np.stack(table[name].to_numpy()) for table in (whole, wider.table(np.arange(100))))
        np.testing.assert_allclose(other, one[:100], rtol=1e-4, atol=1e-5)


def test_surprise_and_hidden_states_are_the_networks_own(store, factors):
    loader = make_factors()
    loader.tokenizer.eval(), loader.model.eval()
    work = loader.work("demo", *RANGE)
    batch = work.windows.normalised(np.arange(50))
    x, stamp = torch.from_numpy(batch.x), torch.from_numpy(batch.stamp)
    with torch.no_grad():
        s1, s2 = loader.tokenizer.encode(x, half=True)
        _, hidden = loader.model.decode_s1(s1, s2, stamp)
        before = slice(None, -1)
        logits = loader.model(s1[:, before], s2[:, before], stamp[:, before], None, True, s1[:, 1:])
        losses = [
            F.cross_entropy(own.transpose(1, 2), codes[:, 1:], reduction="none")[:, -3:]
            for own, codes in zip(logits, (s1, s2))
        ]
    expected = np.column_stack([*(loss.mean(1) for loss in losses), *(loss[:, -1] for loss in losses)])
    found = factors["feature"].iloc[:50]
    np.testing.assert_allclose(found[[f"kronos_{name}" for name in SURPRISES]], expected, rtol=1e-4, atol=1e-5)

    table = Embedder(loader.embedding_task(work.windows)).table(np.arange(50))
    np.testing.assert_allclose(np.stack(table[HIDDEN].to_numpy()), hidden[:, -4:].mean(1), rtol=1e-4, atol=1e-5)


def test_the_components_are_those_of_an_ordinary_pca(store, factors):
    loader = make_factors()
    windows = loader.work("demo", *RANGE).windows
    table = Embedder(loader.embedding_task(windows)).table(np.arange(len(windows)))
    hidden = np.stack(table[HIDDEN].to_numpy()).astype(float)
    train = windows.dates <= np.datetime64(FIT[1])
    expected = PCA(3).fit(hidden[train]).transform(hidden)
    found = factors["feature"][["kronos_pc01", "kronos_pc02", "kronos_pc03"]].to_numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.abs([np.corrcoef(*pair)[0, 1] for pair in zip(found.T, expected.T)]), 1)


def test_forecast_factors_are_the_forecasts_of_a_model_with_these_settings(store, factors):
    found, model = factors["feature"].loc["2018-07-02":], make_model(forecast=FORECAST)
    expected = model.forecast(make_dataset(), ("2018-07-02", RANGE[1]))
    assert found.index.equals(expected.index)
    for name in SCORES:
        np.testing.assert_array_equal(found[f"kronos_{name}"], expected[name].astype(np.float32))
    for quantile in ("q05", "q50", "q95"):
        own = expected[f"{quantile}_{HORIZON}"] / expected["last_close"] - 1
        np.testing.assert_allclose(found[f"kronos_{quantile}"], own, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["kronos_spread"], found["kronos_q90"] - found["kronos_q10"], atol=1e-6)


def test_range_volume_and_skew_are_of_the_paths(store, factors, tmp_path):
    days = "2018-07-02", "2018-07-06"
    model = make_model(forecast=FORECAST | {"keep_paths": True, "cache_dir": str(tmp_path)})
    dataset = make_dataset()
    index, paths = model.paths(dataset, days)
    windows = dataset.score_windows(days)
    volume, close = (windows.values(np.arange(len(windows)))[..., COLUMNS.index(name)] for name in ("volume", "close"))
    high, low = paths[..., 1].max(2), paths[..., 2].min(2)
    expected = {
        "range": ((high - low) / close[:, -1:]).mean(1),
        "volume_change": paths[..., 4].reshape(len(paths), -1).mean(1) / volume.mean(1) - 1,
        "skew": skew(paths[:, :, -1, 3] / close[:, -1:] - 1, axis=1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(factors["feature"].loc[index, f"kronos_{name}"], values, rtol=1e-3, atol=1e-4)


def test_samples_that_agree_have_no_skew_and_a_context_without_volume_no_change():
    paths = np.ones((1, 3, 2, 6))
    found = summaries(paths, np.ones(1), np.zeros(1))
    assert np.isnan(found["skew"]).all() and np.isnan(found["volume_change"]).all() and found["range"] == 0


# The cache


def test_what_is_in_the_cache_is_not_computed_again_and_a_lost_part_comes_back_the_same(
    store, factors, tmp_path, monkeypatch
):
    monkeypatch.setattr("kronos_qlib.forecast.run.EMBEDDING_CHUNK", 256)
    monkeypatch.setattr("kronos_qlib.forecast.run.CHUNK_WINDOWS", 256)
    cached = FORECASTING | {"cache_dir": str(tmp_path)}
    assert_same(load(**cached), factors)
    chunks = {path: path.read_bytes() for path in sorted(tmp_path.rglob("chunk-*.parquet"))}
    (pca,) = tmp_path.rglob("pca-*.safetensors")
    assert len(chunks) > 6 and len({path.parent for path in chunks}) == 2
    lost = list(chunks)[::3]
    for path in lost:
        path.unlink()
    tables = []
    spied = Embedder.table
    monkeypatch.setattr(Embedder, "table", lambda self, *given: tables.append(spied(self, *given)) or tables[-1])
    assert_same(load(**cached), factors)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("chunk-*.parquet"))} == chunks
    assert len(tables) == sum(path.parent == pca.parent for path in lost)

    monkeypatch.setattr("kronos_qlib.workflow.projection.PCA", None)  # it is not fitted again
    assert_same(load("2018-07-02", **cached), factors.loc["2018-07-02":])
    assert len(tables) == sum(path.parent == pca.parent for path in lost), "all of it was there"


def test_a_damaged_pca_is_fitted_again(store, factors, tmp_path, warnings_logged):
    load(cache_dir=str(tmp_path))
    (path,) = tmp_path.rglob("pca-*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    plain = [name for name in factors if name[1] in make_factors().names]
    assert_same(load(cache_dir=str(tmp_path)), factors[plain])
    assert f"{path} is damaged" in warnings_logged.text and path.read_bytes() == content


def test_the_forecasts_of_a_model_in_the_same_folder_are_left_alone(store, tmp_path):
    cached = {"cache_dir": str(tmp_path)}
    model = make_model(forecast=FORECAST | cached)
    before = model.predict(make_dataset(), ("2018-07-02", "2018-07-06"))
    found = load("2018-07-02", "2018-07-06", **FORECASTING | cached)["feature"]["kronos_mean_return"]
    after = model.predict(make_dataset(), ("2018-07-02", "2018-07-06"))
    pd.testing.assert_series_equal(before, after, check_exact=True)
    np.testing.assert_array_equal(found, before.astype(np.float32))
    assert len({path.parent.name for path in tmp_path.rglob("chunk-*.parquet")}) == 2


# The handler


def make_alpha(**changes: Any) -> Alpha158Kronos:
    return Alpha158Kronos(**ALPHA | {"kronos": SETTINGS} | changes)


@pytest.fixture(scope="module")
def alpha(market: Path, workplace: Path) -> Alpha158Kronos:
    use_market(market)
    return make_alpha()


@pytest.fixture(scope="module")
def normalised(market: Path, workplace: Path) -> Alpha158Kronos:
    """As models need it that take no NaN: the processors of workflows/linear_demo.yaml."""
    processors = [
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    use_market(market)
    return make_alpha(fit_start_time=FIT[0], fit_end_time=FIT[1], infer_processors=processors)


def test_the_handler_is_alpha158_with_the_factors_beside_it(store, alpha, factors):
    own = Alpha158(**ALPHA)
    for key in (DataHandlerLP.DK_R, DataHandlerLP.DK_I, DataHandlerLP.DK_L):
        joined, plain = (handler.fetch(col_set=handler.CS_RAW, data_key=key) for handler in (alpha, own))
        assert_same(joined[plain.columns], plain)
        kronos = joined["feature"].filter(like="kronos_")
        shared = joined.index.intersection(factors.index)
        assert_same(kronos.loc[shared], factors["feature"].loc[shared, kronos.columns])
        assert kronos.loc[~joined.index.isin(factors.index)].isna().all().all(), "nothing is filled in"
        assert kronos.shape[1] == 7 and len(shared) > 0.8 * len(joined)


def test_a_pickle_keeps_the_pca_and_needs_neither_cache_nor_the_days_it_was_fitted_on(store, alpha):
    expected = alpha.fetch(slice("2018-07-02", None), col_set="feature")
    again = pickle.loads(pickle.dumps(alpha))
    (loader,) = [each for each in again.data_loader.data_loader_l if isinstance(each, KronosFactors)]
    assert loader.work("demo", "2018-07-02", RANGE[1]).fit is None
    again.config(start_time="2018-07-02")
    again.setup_data(init_type=DataHandlerLP.IT_LS)
    assert_same(again.fetch(col_set="feature"), expected)


GBM = {"loss": "mse", "num_threads": 1, "verbosity": -1}
NETWORK = {"n_epochs": 1, "batch_size": 64, "GPU": -1, "n_jobs": 0, "pt_model_uri": "qlib.contrib.model.pytorch_nn.Net"}
MODELS = {
    "lightgbm": ("alpha", lambda: LGBModel(**GBM, num_boost_round=5)),
    "linear": ("normalised", lambda: LinearModel("ridge", alpha=5.0)),
    "double ensemble": ("alpha", lambda: DEnsembleModel("gbm", num_models=2, epochs=5, decay=0.5, **GBM)),
    "mlp": ("normalised", lambda: GeneralPTNN(**NETWORK, pt_model_kwargs={"input_dim": 165})),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_qlib_takes_them(store, name, request):
    handler, make = MODELS[name]
    dataset, model = DatasetH(request.getfixturevalue(handler), SEGMENTS), make()
    with R.start(experiment_name=f"taken by {name}"):
        model.fit(dataset)
        scores = model.predict(dataset)
    assert np.isfinite(scores).all() and scores.nunique() > 20


def test_the_recorder_gets_what_they_are_made_of(store):
    with R.start(experiment_name="made of"):
        load("2018-07-30")
        recorder = R.get_recorder()
    made = json.loads(Path(recorder.client.download_artifacts(recorder.id, "kronos_factors.json")).read_text())
    assert made["settings"]["lookback"] == LOOKBACK and len(made["weights"]["model"]) == 32
    assert len(made["pca"]["explained_variance"]) == 3 and made["packages"]["torch"]


@pytest.mark.slow
def test_qrun_ends_with_a_backtest(store, database, tmp_path, monkeypatch):
    """In this process; test_qrun.py has one of its own."""
    shutil.copy(database, tmp_path)
    monkeypatch.chdir(tmp_path)
    qrun(factor_workflow(store, tmp_path))
    use_market(store)
    (recorder,) = R.list_recorders(experiment_name="tiny").values()
    scores = recorder.load_object("pred.pkl")
    assert scores["score"].notna().all() and "portfolio_analysis" in recorder.list_artifacts()
    dataset = recorder.load_object("dataset")
    dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    again = recorder.load_object("params.pkl").predict(dataset)
    pd.testing.assert_series_equal(again, scores["score"], check_names=False, check_exact=True)


# Before it runs, and beside Qlib


def factor_workflow(market: Path, folder: Path, **kronos: Any) -> Path:
    path = workflow(market, folder)
    config = yaml.safe_load(path.read_text())
    task = config["task"]
    task["model"] = {"class": "LGBModel", "module_path": "qlib.contrib.model.gbdt", "kwargs": GBM}
    handler = {"class": "Alpha158Kronos", "module_path": "kronos_qlib"}
    handler["kwargs"] = ALPHA | {"kronos": SETTINGS | kronos}
    task["dataset"] = {"class": "DatasetH", "module_path": "qlib.data.dataset"}
    task["dataset"]["kwargs"] = {"handler": handler, "segments": SEGMENTS}
    # MLflow keeps what it opened by a relative address for later tests elsewhere.
    config["qlib_init"]["exp_manager"] = {"kwargs": {"uri": f"sqlite:///{folder}/mlflow.db"}}
    path.write_text(yaml.safe_dump(config))
    return path


def test_check_says_what_will_be_computed_and_computes_it_not(store, tmp_path):
    cache = tmp_path / "cache"
    path = factor_workflow(store, tmp_path, cache_dir=str(cache), **FORECASTING)
    found = list(WorkflowCheck(path).findings())
    assert [finding for finding in found if finding.level == "error"] == []
    text = " ".join(finding.text for finding in found if finding.subject.startswith("factors"))
    windows = len(make_dataset().score_windows(RANGE))
    assert f"28 factors of {windows:,} windows of {LOOKBACK} bars" in text
    assert f"{windows:,} windows × 3 samples × {HORIZON} bars; 0 in the cache" in text and "windows/s" in text
    assert not cache.exists()
    load(cache_dir=str(cache), **FORECASTING)
    text = " ".join(finding.text for finding in WorkflowCheck(path).findings())
    assert text.count("all in the cache") == 2


def test_a_pca_that_is_fitted_on_the_valid_segment_is_an_error_of_check(store, tmp_path):
    path = factor_workflow(store, tmp_path, pca={"components": 3, "fit": ["2018-01-02", SEGMENTS["valid"][0]]})
    errors = [finding for finding in WorkflowCheck(path).findings() if finding.level == "error"]
    assert len(errors) == 1 and "it must end before segment 'valid' begins" in errors[0].text


def test_the_command_writes_a_table_that_comes_back_with_what_it_is_made_of(store, tmp_path, capsys, factors):
    path, out = factor_workflow(store, tmp_path, **FORECASTING), tmp_path / "factors.parquet"
    command = ["factors", str(path), "--start", "2018-07-02", "--end", "2018-07-31"]
    assert main([*command, "--dry-run"]) == 0
    assert "dry run, nothing is written" in capsys.readouterr().out and not out.exists()
    assert main([*command, "--out", str(out)]) == 0
    assert "28 factors" in capsys.readouterr().out
    table = pd.read_parquet(out)
    assert_same(table, factors["feature"].loc["2018-07-02":"2018-07-31"])
    made = read_provenance(out)
    assert made["settings"]["forecast"]["sample_count"] == 3 and made["data"]["synthetic"]
    assert made["data"]["windows"] == len(table) and made["packages"]["torch"] and len(made["weights"]) == 2
    assert main(["factors", str(path)]) == 2
    assert "give --out FILE, or --dry-run" in capsys.readouterr().err


def test_a_workflow_without_factors_is_refused(store, tmp_path, capsys):
    assert main(["factors", str(workflow(store, tmp_path)), "--dry-run"]) == 2
    assert "has no handler with KronosFactors" in capsys.readouterr().err


def test_dates_that_a_network_was_trained_on_are_said(store, monkeypatch, warnings_logged):
    nano = {"tokenizer": "nano", "model": "nano", "pca": None}
    loader = make_factors(**nano)
    windows = loader.work("demo", "2018-07-30", "2018-07-31").windows
    assert loader.seen_dates(windows) is None, "simulated bars were never seen"
    monkeypatch.setattr("kronos_qlib.workflow.kronos_factors.is_synthetic", lambda folder: False)
    loader.load("demo", "2018-07-30", "2018-07-31")
    assert f"nano was trained on data up to 2024-06-30, and {len(windows)} of {len(windows)}" in warnings_logged.text
    later = replace(windows, bars=replace(windows.bars, dates=windows.bars.dates + np.timedelta64(3650, "D")))
    assert loader.seen_dates(later) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lookbak": 3}, "unknown key 'lookbak'; known keys: tokenizer, model, lookback, pca"),
        ({"pca": {"components": 3}}, "key 'pca.fit' is missing"),
        ({"pca": {"fit": ["2018-01-02", None]}}, "pca.fit: should end on the last date of the train segment"),
        ({"pca": {"fit": "train"}}, "pca.fit: should be [start, end]"),
        ({"pca": {"components": 99, "fit": FIT}}, "pca.components (99) is above the width"),
        ({"surprise_bars": LOOKBACK}, "surprise_bars (10) is above 9"),
        ({"pooled_bars": 11}, "pooled_bars (11) is above 10"),
        ({"max_context": 5}, "lookback (10) is above max_context (5)"),
        ({"forecast": {"cache_dir": "x"}}, "forecast.cache_dir is not wanted"),
        ({"forecast": {"samples": 3}}, "unknown key 'forecast.samples'"),
        ({"model": MODEL | {"s1_bits": 5}}, "do not belong together"),
        ({"cache_dir": f"{__file__}/cache"}, "KronosFactors: cache_dir: "),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as caught:
        make_factors(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_handler_without_factors_is_refused():
    with pytest.raises(ValueError, match="^Alpha158Kronos: kronos should be a mapping .*, not missing$"):
        Alpha158Kronos(**ALPHA)


def test_too_few_windows_for_the_pca_and_none_to_load_are_named(store):
    with pytest.raises(ValueError, match="fewer than the 16 components"):
        load(pca={"fit": ["2018-01-02", "2018-01-16"]})
    with pytest.raises(ValueError, match="has no window"):
        load("2018-01-02", "2018-01-05")

"""KronosModel fits, scores and leaves behind what a Qlib user and a later run need."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.data import D
from qlib.workflow import R
from tiny import (
    LOOKBACK,
    MODEL,
    SEGMENTS,
    STAGE,
    TOKENIZER,
    finetune,
    make_dataset,
    make_model,
    same_weights,
    weights,
)

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.nn import zoo
from kronos_qlib.workflow.recording import pretraining_overlap

pytestmark = pytest.mark.slow

FEW_DAYS = slice("2018-06-18", "2018-06-20")


def test_scores_are_a_sorted_float_series_without_holes(run):
    scores = run.scores
    assert isinstance(scores, pd.Series) and scores.name == "score" and scores.dtype == np.float64
    assert scores.index.names == ["datetime", "instrument"]
    assert scores.index.is_monotonic_increasing and scores.index.is_unique
    assert np.isfinite(scores).all()
    assert scores.nunique() > 0.9 * len(scores)


def test_exactly_the_members_with_a_whole_lookback_have_a_score(run, store):
    spans = D.list_instruments(D.instruments("demo"))
    bars = D.features(sorted(spans), ["$close", "$volume"])
    expected = set()
    for name in spans:
        traded = bars.loc[name][lambda table: table["$close"].notna() & (table["$volume"] > 0)].index
        for date in traded[LOOKBACK - 1 :]:
            member = any(pd.Timestamp(begin) <= date <= pd.Timestamp(end) for begin, end in spans[name])
            if member and pd.Timestamp(SEGMENTS["test"][0]) <= date <= pd.Timestamp(SEGMENTS["test"][1]):
                expected.add((date, name))
    assert set(run.scores.index) == expected
    assert len(expected) < len(D.calendar(*SEGMENTS["test"])) * len(spans), "the market has members that leave"


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_the_output_folder_holds_history_checkpoints_and_the_best_weights(run, stage):
    folder = run.folder / stage
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "epoch", "lr", "train_loss", "val_loss"]
    assert [int(row[0]) for row in rows[1:]] == [2, 3, 4, 6]  # 3 steps an epoch, a row every 2 and at an epoch's end
    assert [bool(row[4]) for row in rows[1:]] == [False, True, False, True]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    kind, fitted = {"tokenizer": (KronosTokenizer, run.model.tokenizer), "predictor": (Kronos, run.model.model)}[stage]
    assert same_weights(weights(kind.from_pretrained(folder / "best")), weights(fitted))


def test_fitting_changes_both_networks(run):
    new = make_model()
    assert not same_weights(weights(new.tokenizer), weights(run.model.tokenizer))
    assert not same_weights(weights(new.model), weights(run.model.model))


def test_without_finetune_the_weights_stay_and_the_user_hears_that_they_are_random(store, warnings_logged):
    model = make_model()
    before = weights(model.tokenizer), weights(model.model)
    model.fit(make_dataset())
    assert same_weights(before[0], weights(model.tokenizer)) and same_weights(before[1], weights(model.model))
    assert "scores of random weights" in warnings_logged.text


@pytest.mark.parametrize("skipped", ["tokenizer", "predictor"])
def test_a_skipped_stage_leaves_its_network(store, tmp_path, skipped):
    stages = {"tokenizer": STAGE | {"epochs": 1}, "predictor": STAGE | {"epochs": 1}, skipped: None}
    model = make_model(finetune=finetune(tmp_path, **stages))
    before = {"tokenizer": weights(model.tokenizer), "predictor": weights(model.model)}
    model.fit(make_dataset())
    after = {"tokenizer": weights(model.tokenizer), "predictor": weights(model.model)}
    unchanged = [stage for stage in before if same_weights(before[stage], after[stage])]
    assert unchanged == [skipped]
    assert not (tmp_path / skipped).exists()


def test_finetune_goes_on_from_the_fitted_weights_into_a_folder_of_its_own(store, tmp_path):
    model = make_model(finetune=finetune(tmp_path, predictor=None))
    dataset = make_dataset()
    model.fit(dataset)
    fitted = weights(model.tokenizer)
    model.finetune(dataset)
    assert not same_weights(fitted, weights(model.tokenizer))
    assert same_weights(fitted, weights(KronosTokenizer.from_pretrained(tmp_path / "tokenizer" / "best")))
    further = KronosTokenizer.from_pretrained(tmp_path / "finetune" / "tokenizer" / "best")
    assert same_weights(weights(further), weights(model.tokenizer))

    apart = make_model(tokenizer=str(tmp_path / "tokenizer" / "best"), finetune=finetune(tmp_path, predictor=None))
    apart.finetune(dataset, tmp_path / "elsewhere")
    assert same_weights(weights(apart.tokenizer), weights(model.tokenizer)), "it began from the fitted weights"


def test_the_ten_scores_can_be_chosen_and_agree_with_one_another(store):
    dataset = make_dataset()
    found = {name: make_model(score=name).predict(dataset, FEW_DAYS) for name in SCORES}
    assert len(found) == 10
    assert all(series.name == "score" and np.isfinite(series).all() for series in found.values())
    assert len({tuple(series) for series in found.values()}) == 10, "no two are the same"
    for kind in ("{}_return", "z_{}"):
        low, mean, high = (found[kind.format(name)] for name in ("min", "mean", "max"))
        assert ((low <= mean) & (mean <= high)).all() and (low < high).any()
        assert ((low <= found[kind.format("last")]) & (found[kind.format("last")] <= high)).all()
    assert (np.sign(found["mean_return"]) == np.sign(found["z_mean"])).all()
    assert (np.sign(found["mean_return"]) == np.sign(found["return_to_risk"])).all()
    assert found["prob_up"].isin([0, 0.5, 1]).all()  # two samples


def test_new_weights_depend_on_the_seed_only():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = make_model(seed=7)
    assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers are used up"
    torch.manual_seed(6)
    second, other = make_model(seed=7), make_model(seed=8)
    for network in ("tokenizer", "model"):
        assert same_weights(weights(getattr(first, network)), weights(getattr(second, network)))
        assert not same_weights(weights(getattr(first, network)), weights(getattr(other, network)))


def test_the_zoos_own_small_networks_go_by_name_trained_and_new():
    trained, new = make_model(tokenizer="nano", model="nano"), make_model(tokenizer="nano-new", model="nano-new")
    for name, entries in (("model", zoo.MODELS), ("tokenizer", zoo.TOKENIZERS)):
        of_package, own = getattr(trained, name), getattr(new, name)
        assert of_package.n_parameters == own.n_parameters == entries["nano"].parameters
        assert of_package.source == "nano" and own.source is None
        assert not same_weights(weights(of_package), weights(own))


def test_scores_from_before_the_end_of_nano_s_training_are_warned_of():
    model = make_model(tokenizer="nano", model="nano")
    warning = pretraining_overlap(model.tokenizer, model.model, np.datetime64("2024-06-28", "ns"))
    assert "nano was trained on data up to 2024-06-30" in warning
    assert pretraining_overlap(model.tokenizer, model.model, np.datetime64("2024-07-01", "ns")) is None
    new = make_model(tokenizer="nano-new", model="nano-new")
    assert pretraining_overlap(new.tokenizer, new.model, np.datetime64("2018-06-18", "ns")) is None


# What a run records


def recorded(run) -> dict:
    local = run.recorder.client.download_artifacts(run.recorder.id, "kronos_run.json")
    return json.loads(Path(local).read_text())


def test_the_recorder_holds_settings_data_versions_and_seed(run, store):
    record = recorded(run)
    assert record["model"]["seed"] == 1
    assert record["model"]["tokenizer"] == TOKENIZER and record["model"]["model"] == MODEL
    assert record["model"]["finetune"]["predictor"]["batch_size"] == STAGE["batch_size"]
    assert record["model"]["forecast"]["top_p"] == 0.9, "defaults too"
    data = record["data"]
    assert data["provider_uri"] == str(store) and data["universe"] == "demo"
    assert data["synthetic"] is True
    assert data["first"].startswith("2018-01-02") and data["last"].startswith("2018-08-13")
    assert (data["lookback"], data["amount"]) == (LOOKBACK, "ohlc")
    assert set(data["segments"]) == set(SEGMENTS)
    assert record["packages"]["torch"] == torch.__version__
    assert {"kronos-qlib", "pyqlib", "numpy", "pandas"} < set(record["packages"])
    assert record["machine"]["threads"] == torch.get_num_threads()


def test_metrics_of_both_stages_and_of_the_forecast_are_logged(run):
    metrics = run.recorder.list_metrics()
    for stage in ("tokenizer", "predictor"):
        assert {f"{stage}.lr", f"{stage}.train_loss", f"{stage}.val_loss", f"{stage}.best_val_loss"} <= set(metrics)
        with (run.folder / stage / "history.csv").open(newline="") as file:
            history = list(csv.DictReader(file))
        logged = run.recorder.client.get_metric_history(run.recorder.id, f"{stage}.train_loss")
        assert {(metric.step, metric.value) for metric in logged} == {
            (int(row["step"]), float(row["train_loss"])) for row in history
        }
    assert metrics["forecast.windows"] == len(run.scores)
    assert metrics["forecast.seconds"] > 0


def test_without_a_recorder_none_is_started(store, tmp_path):
    dataset = make_dataset()
    model = make_model(finetune=finetune(tmp_path, predictor=None, tokenizer=STAGE | {"epochs": 1}))
    model.fit(dataset)
    model.predict(dataset, FEW_DAYS)
    assert R.exp_manager.active_experiment is None


def test_a_run_records_itself_once_and_the_folder_of_its_forecasts(store, tmp_path, monkeypatch):
    dataset, model = make_dataset(), make_model(forecast={"cache_dir": str(tmp_path / "cache")})
    saved = []
    with R.start(experiment_name="once"):
        recorder = R.get_recorder()
        save = recorder.save_objects
        monkeypatch.setattr(recorder, "save_objects", lambda **what: (saved.append(what), save(**what)))
        model.fit(dataset)
        model.predict(dataset, FEW_DAYS)
        model.forecast(dataset, FEW_DAYS)
        assert [Path(what["local_path"]).name for what in saved] == ["kronos_run.json"]
    digest = recorder.list_tags()["forecast.digest"]  # Qlib sets tags in a thread of its own, until the run ends
    assert list((tmp_path / "cache" / digest).glob("chunk-*.parquet"))
    with R.start(experiment_name="once"):
        model.predict(dataset, FEW_DAYS)
        assert "kronos_run.json" in R.get_recorder().list_artifacts(), "another run has its own"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders with a tokenizer and a model of published shapes, as a user who downloaded them has."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    KronosTokenizer(**zoo.TOKENIZERS["tokenizer-2k"].config).save_pretrained(folder / "tokenizer")
    Kronos(**zoo.MODELS["mini"].config).save_pretrained(folder / "model")
    return folder


def test_scores_from_before_the_end_of_the_pretraining_are_warned_of_and_tagged(store, published, warnings_logged):
    model = make_model(tokenizer=str(published / "tokenizer"), model=str(published / "model"))
    dataset = make_dataset()
    with R.start(experiment_name="overlap"):
        model.predict(dataset, ("2018-06-18", "2018-06-18"))
        tags = R.get_recorder().list_tags()
    warning = tags["pretraining_overlap"]
    assert warning in warnings_logged.text
    for part in ("start on 2018-06-18", "NeoQuasar/Kronos-mini", str(published / "model"), "2024-06-30"):
        assert part in warning


def test_the_warning_ends_with_the_pretraining(published):
    model = make_model(tokenizer=str(published / "tokenizer"), model=str(published / "model"))
    assert "2024-06-30" in pretraining_overlap(model.tokenizer, model.model, np.datetime64("2024-06-30", "ns"))
    assert pretraining_overlap(model.tokenizer, model.model, np.datetime64("2024-07-01", "ns")) is None


def test_a_published_tokenizer_under_a_new_model_counts_too(published):
    new = MODEL | {"s1_bits": 10, "s2_bits": 10}
    model = make_model(tokenizer=str(published / "tokenizer"), model=new)
    warning = pretraining_overlap(model.tokenizer, model.model, np.datetime64("2018-06-18", "ns"))
    assert "NeoQuasar/Kronos-Tokenizer-2k" in warning


def test_new_networks_have_seen_nothing(run, warnings_logged, store):
    assert "pretraining_overlap" not in run.recorder.list_tags()
    shape = make_model(tokenizer=zoo.TOKENIZERS["tokenizer-2k"].config, model=zoo.MODELS["mini"].config)
    assert pretraining_overlap(shape.tokenizer, shape.model, np.datetime64("2018-06-18", "ns")) is None
    run.model.predict(run.dataset, FEW_DAYS)
    assert "was trained on data up to" not in warnings_logged.text


def test_instruments_left_out_are_one_warning_of_a_segment_that_is_scored(store):
    dataset, model = make_dataset(lookback=100), make_model(neutralise=["volatility"])
    with pytest.warns(UserWarning, match=r"1 instruments are left out of segment 'test' .*: DEMO0002$") as warned:
        model.predict(dataset)
        model.forecast(dataset, "test", ["mean_return"])
    assert len([each for each in warned if "left out" in str(each.message)]) == 1

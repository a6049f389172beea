"""What cannot work is refused in one line that names it, before any long work."""

import re
import shutil
import sys

import huggingface_hub
import pytest
import torch
from tiny import MODEL, SEGMENTS, TOKENIZER, finetune, make_dataset, make_model

from kronos_qlib.forecast.scores import SCORES
from kronos_qlib.nn.checkpoint import CheckpointError
from kronos_qlib.workflow.settings import ForecastSettings


def refusal(error: type[Exception] = ValueError, **settings) -> str:
    with pytest.raises(error) as caught:
        make_model(**settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def stage(**changes):
    return {"finetune": {"output_dir": "out", "tokenizer": {"epochs": 1} | changes}}


@pytest.mark.parametrize(
    ("settings", "key", "known"),
    [
        ({"samples": 5}, "samples", "tokenizer, model, max_context, finetune, forecast, score, neutralise"),
        (
            {"finetune": {"output_dir": "out", "epochs": 3}},
            "finetune.epochs",
            "output_dir, start_from, checkpoint_every, tokenizer, predictor, processes, max_restarts, "
            "micro_batch_size, compile, half_life_days, extra_data",
        ),
        (
            stage(lr=1e-3),
            "finetune.tokenizer.lr",
            "epochs, learning_rate, weight_decay, clip_norm, betas, patience, freeze_blocks, lora, log_every, "
            "next_epochs, next_learning_rate, windows_per_epoch, batch_size, valid_windows",
        ),
        (
            {"finetune": {"output_dir": "out", "predictor": {"epochs": 1, "query": "sampled"}}},
            "finetune.predictor.query",
            "s1_query",
        ),
        (
            {"forecast": {"samples": 5}},
            "forecast.samples",
            "sample_count, temperature, top_p, top_k, anchor, s2_rotation, sampling, batch_size, processes, engine, "
            "cache_dir, keep_paths",
        ),
    ],
)
def test_an_unknown_key_is_named_beside_the_known_ones(settings, key, known):
    message = refusal(**settings)
    assert message.startswith(f"KronosModel: unknown key {key!r}; known keys: ")
    assert known in message.split("known keys: ")[1]


def test_an_unknown_constructor_argument_of_a_new_network_is_named():
    message = refusal(model=MODEL | {"layers": 3})
    assert (
        message.startswith("KronosModel: model: unknown key 'layers' for Kronos; known keys:") and "n_layers" in message
    )
    missing = {key: value for key, value in TOKENIZER.items() if key != "d_model"}
    assert "tokenizer: KronosTokenizer needs the keys ['d_model']" in refusal(tokenizer=missing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "100"}, "seed: Input should be a valid integer, not '100'"),
        ({"max_context": 51.5}, "max_context: Input should be a valid integer"),
        ({"tokenizer": 3}, "tokenizer: should be a hub id, a folder, a name of the zoo or a mapping"),
        ({"model": None}, "model: should be a hub id, a folder, a name of the zoo or a mapping"),
        ({"finetune": 3}, "finetune: Input should be a valid dictionary"),
        ({"score": 3}, "score: Input should be a valid string"),
        (stage(learning_rate="2e-4"), "finetune.tokenizer.learning_rate: Input should be a valid number, not '2e-4'"),
        (stage(epochs=1.5), "finetune.tokenizer.epochs: Input should be a valid integer"),
        ({"finetune": {"tokenizer": None}}, "key 'finetune.output_dir' is missing"),
        ({"forecast": {"sample_count": "5"}}, "forecast.sample_count: Input should be a valid integer"),
        (
            {"forecast": {"batch_size": "many"}},
            "forecast.batch_size: should be auto or a whole number from 1, not 'many'",
        ),
        ({"forecast": {"s2_rotation": "none"}}, "forecast.s2_rotation: Input should be 'aligned' or 'reference'"),
    ],
)
def test_a_wrong_type_is_named(settings, message):
    assert refusal(**settings).startswith(f"KronosModel: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_context": 1}, "max_context: Input should be greater than or equal to 2, not 1"),
        ({"forecast": {"sample_count": 0}}, "forecast.sample_count: Input should be greater than or equal to 1, not 0"),
        ({"forecast": {"top_p": 1.5}}, "forecast.top_p: Input should be less than or equal to 1, not 1.5"),
        ({"forecast": {"top_p": 0.0}}, "forecast.top_p: Input should be greater than 0"),
        ({"forecast": {"top_k": -1}}, "forecast.top_k: Input should be greater than or equal to 0"),
        ({"forecast": {"temperature": 0}}, "forecast.temperature: Input should be greater than 0"),
        ({"forecast": {"temperature": float("nan")}}, "forecast.temperature: Input should be"),
        ({"forecast": {"batch_size": -1}}, "forecast.batch_size: should be auto or a whole number from 1, not -1"),
        (stage(epochs=0), "finetune.tokenizer.epochs: Input should be greater than or equal to 1"),
        (stage(learning_rate=0.0), "finetune.tokenizer.learning_rate: Input should be greater than 0"),
        (stage(learning_rate=-1e-3), "finetune.tokenizer.learning_rate: Input should be greater than 0"),
        (stage(batch_size=-50), "finetune.tokenizer.batch_size: Input should be greater than or equal to 1"),
        (
            stage(windows_per_epoch=0),
            "finetune.tokenizer.windows_per_epoch: Input should be greater than or equal to 1",
        ),
        (stage(betas=[0.9, 1.0]), "finetune.tokenizer.betas.1: Input should be less than 1"),
        (
            {"finetune": {"output_dir": "out", "checkpoint_every": 0}},
            "finetune.checkpoint_every: Input should be greater",
        ),
    ],
)
def test_an_impossible_value_is_named(settings, message):
    assert refusal(**settings).startswith(f"KronosModel: {message}")


def test_an_unknown_score_is_answered_with_the_known_ones():
    message = refusal(score="sharpe")
    assert message == f"KronosModel: score: should be one of {', '.join(SCORES)}, not 'sharpe'"


def test_return_to_risk_needs_a_spread_of_samples():
    message = refusal(score="return_to_risk", forecast={"sample_count": 1})
    assert message.startswith("KronosModel: score return_to_risk needs forecast.sample_count of 2 or more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output_dir": "out/{digest}"},
            "finetune.output_dir: should have no other braces than {task} and {train_start}",
        ),
        ({"output_dir": "out/{task"}, "finetune.output_dir: should have no other braces than {task} and"),
        ({"start_from": ""}, "finetune.start_from: String should have at least 1 character"),
        ({"processes": 0}, "finetune.processes: should be auto or a whole number from 1, not 0"),
        ({"max_restarts": -1}, "finetune.max_restarts: Input should be greater than or equal to 0, not -1"),
        ({"micro_batch_size": "all"}, "finetune.micro_batch_size: should be auto or a whole number from 1, not 'all'"),
        ({"compile": 1}, "finetune.compile: Input should be a valid boolean, not 1"),
        ({"half_life_days": 0.0}, "finetune.half_life_days: Input should be greater than 0, not 0.0"),
        (
            {"half_life_days": 365},
            "finetune: has half_life_days, which needs tokenizer.windows_per_epoch: an epoch of all windows draws none "
            "more often than another",
        ),
        ({"tokenizer": {"epochs": 1, "patience": 0}}, "finetune.tokenizer.patience: Input should be greater than or"),
        (
            {"tokenizer": {"epochs": 1, "freeze_blocks": 9}},
            "finetune.tokenizer.freeze_blocks: should be at most 1, the blocks of this KronosTokenizer, not 9",
        ),
        (
            {"tokenizer": {"epochs": 1, "freeze_blocks": 1, "lora": {}}},
            "finetune.tokenizer: has both freeze_blocks and lora",
        ),
        (
            {"tokenizer": {"epochs": 1, "lora": {"targets": ["fc1"]}}},
            "finetune.tokenizer.lora.targets.0: Input should be 'q_proj', 'k_proj'",
        ),
        ({"extra_data": {"instruments": "csi500"}}, "finetune.extra_data: should be a list of mappings"),
        (
            {"extra_data": [{"universe": "csi500"}]},
            "finetune.extra_data: entry 0: key 'instruments' is missing; unknown key 'universe'",
        ),
    ],
)
def test_an_impossible_way_to_train_is_refused_before_any_work(changes, message):
    settings = {"finetune": {"output_dir": "out", "tokenizer": {"epochs": 1}} | changes}
    assert refusal(**settings).startswith(f"KronosModel: {message}")


def test_what_forecasting_cannot_do_is_said_before_any_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "forecast.cache_dir: " in refusal(forecast={"cache_dir": str(tmp_path / "file" / "cache")})
    assert "with engine: ray leave them auto" in refusal(forecast={"engine": "ray", "processes": 2})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match="the extra"):
        make_model(forecast={"engine": "ray"})


def test_paths_cannot_be_kept_nowhere():
    message = refusal(forecast={"keep_paths": True})
    assert message.startswith("KronosModel: forecast: ") and "keep_paths needs a cache_dir" in message


def test_a_calibration_is_checked_as_the_rest():
    assert refusal(calibration={"on": "valid"}).startswith(
        "KronosModel: unknown key 'calibration.on'; known keys: segment, days, bands"
    )
    assert "calibration.bands: Input should be 'split' or 'adaptive'" in refusal(calibration={"bands": "wide"})
    assert "calibration.days: Input should be greater than or equal to 2" in refusal(calibration={"days": 1})
    message = refusal(calibration={}, forecast={"sample_count": 1})
    assert "calibration needs forecast.sample_count of 2 or more: one sample has no spread" in message


def test_several_mistakes_are_named_together():
    message = refusal(seed="x", forecast={"sample_count": 0})
    assert "seed: " in message and "forecast.sample_count: " in message


# Devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent():
    assert re.match(r"device: 'cuda' was asked for, but torch sees 0 CUDA device", refusal(device="cuda"))


def test_an_unknown_device_or_dtype():
    assert refusal(device="gpu").startswith("device: 'gpu' is unknown; use auto, cpu, mps, cuda or cuda:N")
    assert refusal(dtype="half") == "KronosModel: dtype: should be auto, float32 or bfloat16, not 'half'"


# Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    model = make_model()
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.model.save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_missing_checkpoint_folder(tmp_path):
    message = refusal(FileNotFoundError, model=str(tmp_path / "nowhere"))
    assert (
        message == f"KronosModel: model: {tmp_path / 'nowhere'}: neither a folder nor a hub id of the form owner/name"
    )


def test_a_checkpoint_folder_without_weights(checkpoints):
    (checkpoints / "model" / "model.safetensors").unlink()
    message = refusal(FileNotFoundError, model=str(checkpoints / "model"))
    assert message.startswith(f"KronosModel: model: {checkpoints / 'model'}: no model.safetensors there")


def test_a_truncated_checkpoint(checkpoints):
    path = checkpoints / "tokenizer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(CheckpointError, tokenizer=str(checkpoints / "tokenizer"))
    assert message.startswith(f"KronosModel: tokenizer: {path}: truncated or not a safetensors file")


def test_a_models_checkpoint_given_as_tokenizer(checkpoints):
    shutil.copy(checkpoints / "model" / "config.json", checkpoints / "tokenizer" / "config.json")
    message = refusal(CheckpointError, tokenizer=str(checkpoints / "tokenizer"))
    assert "for KronosTokenizer" in message and "config.json" in message


def test_a_tokenizer_and_a_model_of_different_bits():
    message = refusal(model=MODEL | {"s2_bits": 6})
    assert message == "tokenizer and model do not belong together: (s1_bits, s2_bits) are (4, 4) and (4, 6)"


def test_a_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(FileNotFoundError, model="nobody-at-all/no-such-kronos")
    assert message.startswith(
        "KronosModel: model: nobody-at-all/no-such-kronos: not in the local cache and the hub cannot be reached: "
        "give a folder"
    )


# What only shows when model and dataset meet


def test_finetune_without_settings_says_what_is_missing(store):
    with pytest.raises(ValueError, match="^KronosModel: finetune is null in the settings"):
        make_model().finetune(make_dataset())


def test_a_window_longer_than_the_context_is_slow_and_said_to_be(store, warnings_logged):
    scores = make_model(max_context=12).predict(make_dataset(), ("2018-06-18", "2018-06-19"))
    assert scores.notna().all() and len(scores)
    assert "lookback (10) + horizon (3) is above max_context (12)" in warnings_logged.text
    assert "slow" in warnings_logged.text


def test_a_window_as_long_as_the_context_is_not_warned_of(store, warnings_logged):
    make_model(max_context=13).predict(make_dataset(), ("2018-06-18", "2018-06-19"))
    assert "max_context" not in warnings_logged.text


def test_a_horizon_as_long_as_the_context_is_refused_before_training(store, tmp_path):
    model = make_model(max_context=3, finetune=finetune(tmp_path / "out"))
    refused = r"^KronosModel: the dataset's horizon \(3\) must be below max_context \(3\)$"
    for work in (model.fit, model.finetune, model.predict):
        with pytest.raises(ValueError, match=refused):
            work(make_dataset())
    assert not (tmp_path / "out").exists()


def test_an_unknown_or_empty_segment_is_named(store):
    with pytest.raises(ValueError, match="unknown segment 'tset'; known: train, valid, test"):
        make_model().predict(make_dataset(), "tset")
    with pytest.raises(ValueError, match="is empty: the handler's data run from 2018-01-02"):
        make_model().predict(make_dataset(), ("2030-01-01", "2030-06-30"))


@pytest.mark.slow
def test_another_trainings_output_folder_is_refused(run, store):
    model = make_model(seed=2, finetune=finetune(run.folder))
    with pytest.raises(ValueError, match="holds another training .*seed: 1 there, 2 now.*choose another output_dir"):
        model.fit(make_dataset())


def test_finetune_without_a_stage_is_refused():
    assert "finetune: gives no stage to train" in refusal(finetune={"output_dir": "out"})


def test_a_dataset_of_another_class_is_refused(store):
    with pytest.raises(ValueError, match="must be a KLineDataset, not a str"):
        make_model().predict("csi300")


def test_a_test_segment_without_windows_is_refused_before_training(store, tmp_path):
    segments = SEGMENTS | {"test": ["2018-01-02", "2018-01-05"]}  # no lookback behind it
    with pytest.raises(ValueError, match="segment 'test'.*has no window"):
        make_model(finetune=finetune(tmp_path / "out")).fit(make_dataset(segments=segments))
    assert not (tmp_path / "out").exists()


def test_training_on_dates_to_be_scored_is_warned_of(store, tmp_path, warnings_logged):
    segments = SEGMENTS | {"valid": ["2018-05-01", "2018-07-10"]}
    make_model(finetune=finetune(tmp_path / "out", predictor=None)).fit(make_dataset(segments=segments))
    assert "the valid segment has bars to 2018-07-10 and the test segment starts on 2018-06-18" in warnings_logged.text
    assert "the train segment" not in warnings_logged.text


def test_settings_of_an_earlier_pickle_get_the_defaults_of_later_keys():
    settings = ForecastSettings(sample_count=7)
    state = settings.__getstate__()
    for later in ("filter", "anchor"):
        del state["__dict__"][later]
    loaded = ForecastSettings.__new__(ForecastSettings)
    loaded.__setstate__(state)
    assert loaded == settings and loaded.filter is None and loaded.sample_count == 7

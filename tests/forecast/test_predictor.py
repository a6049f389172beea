"""KronosPredictor forecasts as published, in price units, and refuses what it cannot forecast."""

import numpy as np
import pandas as pd
import pytest
import torch

from kronos_qlib import KronosPredictor
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.forecast import predictor as predictors
from kronos_qlib.forecast.engine.weights import prepare_weights

GREEDY = {"T": 1.0, "top_k": 1, "top_p": 1.0, "sample_count": 1}


def series(golden):
    length = golden.vectors["s1"].shape[1]
    times = pd.to_datetime(golden.vectors["timestamps"], unit="us")  # as they were written, whatever their README says
    frames = [pd.DataFrame(bars, columns=list(COLUMNS)) for bars in golden.vectors["bars"]]
    return frames, pd.Series(times[:length]), pd.Series(times[length:])


@pytest.fixture
def predictor(small):
    return KronosPredictor(small.model, small.tokenizer, device="cpu")


@pytest.mark.parametrize(
    ("columns", "vector"), [(6, "predict_full"), (5, "predict_no_amount"), (4, "predict_prices_only")]
)
def test_forecasts_are_the_published_ones(golden, columns, vector):
    frames, x_times, y_times = series(golden)
    predictor = KronosPredictor(golden.model, golden.tokenizer, device="cpu")
    forecast = predictor.predict(frames[0].iloc[:, :columns], x_times, y_times, len(y_times), verbose=False, **GREEDY)
    assert list(forecast.columns) == list(COLUMNS)
    assert list(forecast.index) == list(y_times)
    np.testing.assert_allclose(forecast.to_numpy(), golden.vectors[vector], rtol=1e-4, atol=1e-4)


def test_a_batch_is_the_published_one(golden):
    frames, x_times, y_times = series(golden)
    predictor, n = KronosPredictor(golden.model, golden.tokenizer, device="cpu"), len(frames)
    forecasts = predictor.predict_batch(frames, [x_times] * n, [y_times] * n, len(y_times), verbose=False, **GREEDY)
    np.testing.assert_allclose(np.stack(forecasts), golden.vectors["predict_batch"], rtol=1e-4, atol=1e-4)


def test_the_forecast_is_the_mean_of_the_paths(predictor, small):
    frames, x_times, y_times = series(small)
    paths = predictor.predict_paths(frames[0], x_times, y_times, len(y_times), T=0.8, top_p=0.9, sample_count=7, seed=5)
    assert paths.shape == (7, len(y_times), 6)
    mean = predictor.predict(
        frames[0], x_times, y_times, len(y_times), T=0.8, top_p=0.9, sample_count=7, seed=5, verbose=False
    )
    np.testing.assert_allclose(mean.to_numpy(), paths.mean(0), rtol=1e-9)


def test_torch_manual_seed_decides_where_no_seed_is_given(predictor, small):
    frames, x_times, y_times = series(small)

    def forecast(seed):
        torch.manual_seed(seed)
        return predictor.predict(frames[0], x_times, y_times, len(y_times), verbose=False)

    pd.testing.assert_frame_equal(forecast(1), forecast(1))
    assert not forecast(1).equals(forecast(2))


def broken(change, small):
    frames, x_times, y_times = series(small)
    arguments = {
        "df": frames[0].copy(),
        "x_timestamp": x_times.copy(),
        "y_timestamp": y_times.copy(),
        "pred_len": len(y_times),
    }
    change(arguments)
    return arguments


def set_nan(arguments):
    arguments["df"].loc[3, "close"] = np.nan


def drop_high(arguments):
    arguments["df"] = arguments["df"].drop(columns="high")


def repeat_a_time(arguments):
    arguments["x_timestamp"].iloc[5] = arguments["x_timestamp"].iloc[4]


def unsort(arguments):
    arguments["y_timestamp"] = arguments["y_timestamp"].iloc[::-1]


def start_too_early(arguments):
    arguments["y_timestamp"] = arguments["y_timestamp"] - pd.Timedelta("30D")


def forecast_more_than_asked(arguments):
    arguments["pred_len"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, r"nan in column 'close', row 3"),
        (drop_high, "no column 'high'"),
        (repeat_a_time, "x_timestamp must be strictly increasing"),
        (unsort, "y_timestamp must be strictly increasing"),
        (start_too_early, "not after the last bar"),
        (forecast_more_than_asked, "y_timestamp holds 12 times, but pred_len is 13"),
    ],
)
def test_bad_input_is_one_clear_error(predictor, small, change, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**broken(change, small), verbose=False)


def test_an_absent_cuda_device_is_named(small):
    with pytest.raises(ValueError, match="cuda:97.*auto or cpu"):
        KronosPredictor(small.model, small.tokenizer, device="cuda:97")


def test_an_empty_frame_and_a_column_that_stands_twice_are_named(predictor, small):
    frames, x_times, y_times = series(small)
    twice = pd.concat([frames[0], frames[0][["close"]]], axis=1)
    for frame, message in ((frames[0].iloc[:0], "has no bars"), (twice, "has a column twice")):
        with pytest.raises(ValueError, match=message):
            predictor.predict(frame, x_times[: len(frame)], y_times, len(y_times), verbose=False)


def test_weights_are_prepared_once_and_again_when_they_change(predictor, small, monkeypatch):
    frames, x_times, y_times = series(small)
    prepared = []

    def prepare(*arguments):
        prepared.append(arguments)
        return prepare_weights(*arguments)

    def predict(predictor):
        return predictor.predict_paths(frames[0], x_times, y_times, len(y_times), sample_count=2)

    monkeypatch.setattr(predictors, "prepare_weights", prepare)
    first = predict(predictor)
    np.testing.assert_array_equal(predict(predictor), first)
    assert len(prepared) == 1
    small.model.head.proj_s1.bias.data.mul_(-3)  # through .data, which leaves no version number behind
    changed = predict(predictor)
    assert len(prepared) == 2 and not np.array_equal(changed, first)
    np.testing.assert_array_equal(changed, predict(KronosPredictor(small.model, small.tokenizer, device="cpu")))
    with torch.no_grad():
        small.model.head.proj_s1.bias.copy_(small.model.head.proj_s1.bias.flip(0))  # the same sum
    flipped = predict(predictor)
    assert not np.array_equal(flipped, changed)
    np.testing.assert_array_equal(flipped, predict(KronosPredictor(small.model, small.tokenizer, device="cpu")))

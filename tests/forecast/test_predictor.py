"""KronosPredictor forecasts as published, in price units, and refuses what it cannot forecast."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from calibrations import calibration_of, make_calibration
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_networks

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


# What stands for what


def forecast(predictor, frame, x_times, y_times, **options):
    options = {"sample_count": 3, "seed": 4} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return predictor.predict_paths(frame, x_times, y_times, len(y_times), **options)


def same(one, other):
    return np.array_equal(one, other)


@pytest.mark.parametrize(
    "names",
    [
        {"volume": "vol", "amount": "amt"},
        {"open": "Open", "high": "High", "low": "Low", "close": "Close", "volume": "Volume", "amount": "Turnover"},
        {"open": "开盘", "high": "最高", "low": "最低", "close": "收盘", "volume": "成交量", "amount": "成交额"},
        {"volume": "<VOL>", "amount": "quote_volume"},
    ],
)
def test_columns_under_their_usual_names_are_the_same_bars(predictor, small, names):
    frames, x_times, y_times = series(small)
    expected = forecast(predictor, frames[0], x_times, y_times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predictor.predict_paths(
            frames[0].rename(columns=names), x_times, y_times, len(y_times), sample_count=3, seed=4
        )
    assert same(found, expected)
    assert not same(forecast(predictor, frames[0].drop(columns=["volume", "amount"]), x_times, y_times), expected)


def test_columns_that_are_not_used_and_bars_that_are_impossible_are_named_once(predictor, small):
    frames, x_times, y_times = series(small)
    frame = frames[0].assign(vwap=1.0, symbol="X")
    frame.loc[2, "high"] = frame.loc[2, "close"] / 2
    with pytest.warns(UserWarning) as warned:
        predictor.predict_paths(frame, x_times, y_times, len(y_times))
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert "columns that are not used: 'vwap'" in messages[0] and "symbol" not in messages[0]
    assert "1 bars whose open or close lies outside low … high, the first in row 2" in messages[1]
    assert all(warning.filename == __file__ for warning in warned), "a warning points to the user's line"


def test_a_turnover_that_is_a_rate_is_no_amount(predictor, small):
    frames, x_times, y_times = series(small)
    without = frames[0].drop(columns="amount")
    rate = without.assign(turnover=without["volume"] / 1e9)
    assert same(forecast(predictor, rate, x_times, y_times), forecast(predictor, without, x_times, y_times))
    money = without.assign(turnover=frames[0]["amount"])
    assert same(forecast(predictor, money, x_times, y_times), forecast(predictor, frames[0], x_times, y_times))


def test_times_with_a_zone_are_compared_in_utc_and_stamped_in_the_bars_own_local_time(predictor, small):
    frames, x_times, y_times = series(small)
    plain = forecast(predictor, frames[0], x_times, y_times, top_k=1)
    x_zone, y_zone = (times.dt.tz_localize("Asia/Shanghai") for times in (x_times, y_times))
    assert same(forecast(predictor, frames[0], x_zone, y_zone, top_k=1), plain)
    assert same(forecast(predictor, frames[0], x_zone, y_zone.dt.tz_convert("UTC"), top_k=1), plain)
    utc = forecast(predictor, frames[0], x_zone.dt.tz_convert("UTC"), y_zone, top_k=1)
    assert not same(utc, plain), "in UTC the bars are of other hours"
    for x, y, message in (
        (x_zone, y_times, "x_timestamp has the time zone Asia/Shanghai and y_timestamp has none"),
        (x_times, y_zone, "y_timestamp has the time zone Asia/Shanghai and x_timestamp has none"),
    ):
        with pytest.raises(ValueError, match=message):
            forecast(predictor, frames[0], x, y)


def test_the_index_of_a_forecast_is_as_the_user_gave_it(predictor, small):
    frames, x_times, y_times = series(small)
    zoned = [times.dt.tz_localize("Asia/Shanghai") for times in (x_times, y_times)]
    found = predictor.predict(frames[0], zoned[0], zoned[1].dt.tz_convert("UTC"), len(y_times), verbose=False)
    assert found.index.tz is not None and list(found.index) == list(zoned[1])


# Draws and units


def test_a_series_has_the_same_draws_alone_and_in_a_batch(predictor, small):
    frames, x_times, y_times = series(small)
    frames = [frames[0], frames[0] * 1.5, frames[0].iloc[::-1].reset_index(drop=True)]
    count = len(frames)
    options = {"sample_count": 4, "seed": 3, "verbose": False}
    together = predictor.predict_batch(frames, [x_times] * count, [y_times] * count, len(y_times), **options)
    for frame, expected in zip(frames, together):
        alone = predictor.predict(frame, x_times, y_times, len(y_times), **options)
        np.testing.assert_allclose(alone.to_numpy(), expected.to_numpy(), rtol=1e-5)
    assert not np.allclose(together[2], together[0])


def walk(seed, length):
    """Bars at ordinary prices, which move by 2 % a bar."""
    rng = np.random.default_rng(seed)
    close = 30 * np.exp(np.cumsum(rng.normal(0, 0.02, length)))
    opened = np.concatenate([[30], close[:-1]])
    high, low = np.maximum(opened, close) * 1.004, np.minimum(opened, close) * 0.996
    bars = {"open": opened, "high": high, "low": low, "close": close, "volume": rng.lognormal(10, 0.4, length)}
    return pd.DataFrame(bars)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), power=st.integers(-9, 6))
def test_a_forecast_is_the_same_in_every_currency(tiny, seed, power):
    """Prices × 10^k: the mean return, as scores are, stays equal to 1e-5."""
    times = pd.bdate_range("2024-01-02", periods=63)
    frame = walk(seed, 60)
    scaled = frame.assign(**{name: frame[name] * 10.0**power for name in ("open", "high", "low", "close")})
    x_times, y_times = times[:60], times[60:]
    one, other = (forecast(tiny, bars, x_times, y_times)[..., 3].mean(axis=0) for bars in (frame, scaled))
    returns, scaled_returns = one / frame["close"].iloc[-1] - 1, other / scaled["close"].iloc[-1] - 1
    np.testing.assert_allclose(scaled_returns, returns, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def tiny():
    tokenizer, model = make_networks()
    return KronosPredictor(model, tokenizer, device="cpu", s2_rotation="aligned")


def test_published_normalisation_is_there_by_option_and_differs_for_small_prices_only(tiny):
    published = KronosPredictor(
        tiny.model, tiny.tokenizer, device="cpu", s2_rotation="aligned", normalisation="published"
    )
    times, frame = pd.bdate_range("2024-01-02", periods=63), walk(0, 60)
    for unit, equal in ((1.0, True), (1e-6, False)):
        bars = frame.assign(**{name: frame[name] * unit for name in ("open", "high", "low", "close")})
        one, other = (forecast(predictor, bars, times[:60], times[60:]) for predictor in (tiny, published))
        assert same(one[..., :5], other[..., :5]) == equal


def test_networks_in_each_other_s_place_are_said_in_the_constructor(small):
    with pytest.raises(ValueError, match="tokenizer and model are in each other's place"):
        KronosPredictor(small.tokenizer, small.model)


# Calibrated


def calibrated(small, **changes):
    calibration = calibration_of(small.tokenizer, small.model, lookback=len(series(small)[1]), **changes)
    drawn = {"device": "cpu", "s2_rotation": "aligned"}
    return (
        calibration,
        KronosPredictor(small.model, small.tokenizer, calibration=calibration, **drawn),
        KronosPredictor(small.model, small.tokenizer, **drawn),
    )


SAMPLED = {"T": 1.0, "top_p": 1.0, "sample_count": 25, "seed": 5}


def test_a_calibrated_forecast_is_the_map_of_the_one_that_was_drawn(small, tmp_path):
    frames, x_times, y_times = series(small)
    calibration, predictor, plain = calibrated(small)
    times = (x_times, y_times[:3], 3)
    drawn = plain.predict_paths(frames[0], *times, **SAMPLED)
    closes = frames[0]["close"].to_numpy(float)
    last, volatility = closes[-1:], np.diff(np.log(closes)).std(ddof=1, keepdims=True)
    expected = calibration.map_bars(drawn[None], last, volatility)[0]
    paths = predictor.predict_paths(frames[0], *times, **SAMPLED)
    np.testing.assert_allclose(paths, expected, rtol=1e-12)
    mean = predictor.predict(frames[0], *times, verbose=False, **SAMPLED)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-12)
    assert mean.attrs["calibration"] == calibration.describe()
    batch = predictor.predict_batch(frames[:2], [x_times] * 2, [y_times[:3]] * 2, 3, verbose=False, **SAMPLED)
    np.testing.assert_allclose(batch[0], mean, rtol=1e-5)  # one window and two are other products in float32
    from_file = KronosPredictor(
        small.model, small.tokenizer, "cpu", s2_rotation="aligned", calibration=calibration.save(tmp_path / "c.json")
    )
    assert np.array_equal(from_file.predict_paths(frames[0], *times, **SAMPLED), paths)
    assert "calibration" not in plain.predict(frames[0], *times, verbose=False, **SAMPLED).attrs


def test_quantiles_of_the_close_have_the_conformal_offsets(small):
    frames, x_times, y_times = series(small)
    calibration, predictor, _ = calibrated(small)
    long = frames[0].assign(item_id="A", timestamp=x_times)
    future = pd.DataFrame({"item_id": "A", "timestamp": y_times[:3]})
    options = {"sample_count": 25, "seed": 5, "quantile_levels": [0.95, 0.05, 0.5], "target": ["close", "high"]}
    found = predictor.predict_df(long, future, **options)
    paths = predictors.possible_bars(predictor.predict_paths(frames[0], x_times, y_times[:3], 3, **SAMPLED))
    closes = frames[0]["close"].to_numpy(float)
    last, volatility = closes[-1], np.diff(np.log(closes)).std(ddof=1, keepdims=True)
    expected = calibration.quantiles(paths[None, ..., 3] / last, volatility, np.array([0.05, 0.5, 0.95]))[0] * last
    close = found[found["target_name"] == "close"]
    np.testing.assert_allclose(close[["0.05", "0.5", "0.95"]], expected, rtol=1e-12)
    np.testing.assert_allclose(close["predictions"], expected[:, 1], rtol=1e-12)
    high = found[found["target_name"] == "high"]
    np.testing.assert_allclose(high["0.95"], np.quantile(paths[..., 1], 0.95, axis=0), rtol=1e-12)
    assert found.attrs["calibration"] == calibration.describe()


def test_a_calibration_of_other_forecasts_is_refused(small, tmp_path):
    frames, x_times, y_times = series(small)
    _, predictor, _ = calibrated(small)
    with pytest.raises(ValueError, match="KronosPredictor: the calibration has 3 steps, and the forecast 4"):
        predictor.predict_paths(frames[0], x_times, y_times[:4], 4, **SAMPLED)
    with pytest.raises(ValueError, match="KronosPredictor: the calibration was .* with top_p 1.0, not 0.9"):
        predictor.predict(frames[0], x_times, y_times[:3], 3, verbose=False)
    with pytest.raises(ValueError, match="KronosPredictor: .* a tokenizer of other weights"):
        KronosPredictor(small.model, small.tokenizer, "cpu", calibration=make_calibration())
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match="KronosPredictor: .*c.json is no calibration of kronos-qlib"):
        KronosPredictor(small.model, small.tokenizer, "cpu", calibration=tmp_path / "c.json")
    with pytest.raises(ValueError, match="needs 3 bars or more"):
        predictor.predict_paths(frames[0][-2:], x_times[-2:], y_times[:3], 3, **SAMPLED)
    with pytest.warns(UserWarning, match="was fitted on lookbacks of .* bars, not 5"):
        predictor.predict_paths(frames[0][-5:], x_times[-5:], y_times[:3], 3, **SAMPLED)


def test_weights_that_change_after_the_calibration_was_checked_are_noticed(small):
    frames, x_times, y_times = series(small)
    tokenizer, model = make_networks()
    calibration = calibration_of(tokenizer, model, lookback=len(x_times))
    predictor = KronosPredictor(model, tokenizer, "cpu", s2_rotation="aligned", calibration=calibration)
    predictor.predict_paths(frames[0], x_times, y_times[:3], 3, **SAMPLED)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="a model of other weights"):
        predictor.predict_paths(frames[0], x_times, y_times[:3], 3, **SAMPLED)

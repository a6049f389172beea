import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kronos_qlib.data.stamps import STAMP_FIELDS, stamps
from kronos_qlib.data.windows import COLUMNS, EPS, Bars, Windows, denormalise, normalise


def make_bars(counts: list[int], seed: int = 0) -> Bars:
    rng = np.random.default_rng(seed)
    dates = np.concatenate([pd.bdate_range("2020-01-01", periods=count).to_numpy("M8[ns]") for count in counts])
    scales = np.array([10, 10, 10, 10, 1e7, 1e8])
    return Bars(
        values=(np.exp(rng.normal(0, 0.1, (sum(counts), 6))) * scales).astype(np.float32),
        stamp=stamps(dates).astype(np.int8),
        dates=dates,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        instruments=tuple(f"SH{i:06d}" for i in range(len(counts))),
    )


@pytest.fixture
def windows() -> Windows:
    bars = make_bars([40, 25, 60])
    ends = np.array([9, 30, 54, 64, 74, 100, 113])
    return Windows(bars, ends, lookback=10, future=11)


rows_of_any_scale = st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(0, 4)).flatmap(
    lambda sizes: st.tuples(
        arrays(np.float32, (sizes[0], sizes[1] + sizes[2], 6), elements=st.floats(0, 2.0**33, width=32)),
        st.just(sizes[1]),
    )
)


@settings(max_examples=60, deadline=None)
@given(rows_of_any_scale)
def test_denormalise_undoes_normalise(case):
    rows, lookback = case
    x, mean, scale = normalise(rows, lookback, clip=np.inf)
    # float32 keeps 24 bits of x, and x is measured in units of scale
    tolerance = 1e-6 * (np.abs(x) * scale) + 1e-12 * np.abs(rows) + 1e-9
    assert (np.abs(denormalise(x, mean, scale) - rows) <= tolerance).all()


@settings(max_examples=60, deadline=None)
@given(rows_of_any_scale, st.integers(0, 2**32 - 1))
def test_statistics_see_the_lookback_only(case, seed):
    rows, lookback = case
    changed = rows.copy()
    changed[:, lookback:] = np.random.default_rng(seed).uniform(0, 1e9, changed[:, lookback:].shape)
    for before, after in zip(normalise(rows, lookback)[1:], normalise(changed, lookback)[1:]):
        np.testing.assert_array_equal(before, after)
    seen = [normalise(version, lookback)[0][:, :lookback] for version in (rows, changed)]
    np.testing.assert_array_equal(*seen)


def test_normalise_is_the_textbook_formula():
    rows = 10 * np.random.default_rng(0).lognormal(size=(3, 20, 6))
    x, mean, scale = normalise(rows, 15, clip=1.5)
    np.testing.assert_allclose(mean, rows[:, :15].mean(axis=1, keepdims=True))
    np.testing.assert_allclose(scale, rows[:, :15].std(axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(x, np.clip((rows - mean) / scale, -1.5, 1.5), rtol=1e-6, atol=1e-7)
    assert (x.dtype, mean.dtype, scale.dtype) == (np.float32, np.float64, np.float64)
    assert np.abs(x[:, 15:]).max() == 1.5, "the bars after the lookback are clipped too"


@pytest.mark.parametrize("value", [1e10, 1e10 + 0.1, 0.0, 1 / 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_column_gives_zeros_and_not_rounding_noise(value, dtype):
    x, _, scale = normalise(np.full((2, 90, 6), value, dtype), 90)
    assert (x == 0).all()
    assert (scale == EPS).all() or (value < 1 and (0 < scale).all() and (scale < EPS).all())


def test_each_window_is_its_slice_of_the_bars_normalised(windows):
    batch = windows.normalised(np.arange(len(windows)))
    for i, end in enumerate(windows.ends):
        rows = slice(end - 9, end + 12)
        x, mean, scale = normalise(windows.bars.values[None, rows], 10, clip=5.0)
        np.testing.assert_array_equal(batch.x[i], x[0])
        np.testing.assert_array_equal(batch.mean[i], mean[0])
        np.testing.assert_array_equal(batch.scale[i], scale[0])
        np.testing.assert_array_equal(batch.stamp[i], windows.bars.stamp[rows])
        assert batch.last_close[i] == windows.bars.values[end, COLUMNS.index("close")]
    assert (batch.x.shape, batch.x.dtype) == ((7, 21, 6), np.float32)
    assert (batch.stamp.shape, batch.stamp.dtype) == ((7, 21, 5), np.int64)
    assert (batch.mean.shape, batch.last_close.dtype) == ((7, 1, 6), np.float64)


def test_a_window_is_bitwise_the_same_in_any_batch(windows):
    bars = make_bars([1500])
    many = Windows(bars, np.arange(20, 1400), lookback=20, future=3)
    together = many.normalised(np.arange(len(many)))
    order = np.random.default_rng(0).permutation(len(many))
    np.testing.assert_array_equal(many.normalised(order).x, together.x[order])
    for size in (1, 2, 3, 7):
        np.testing.assert_array_equal(many.normalised(np.arange(700, 700 + size)).x, together.x[700 : 700 + size])


def test_no_window_at_all_is_an_empty_batch(windows):
    assert windows.normalised(np.array([], int)).x.shape == (0, 21, 6)


def test_windows_name_their_date_and_instrument(windows):
    assert list(windows.instruments) == [f"SH{i:06d}" for i in (0, 0, 1, 1, 2, 2, 2)]
    np.testing.assert_array_equal(windows.dates, windows.bars.dates[windows.ends])
    assert len(windows) == 7


def test_take_keeps_the_order_given(windows):
    part = windows.take(np.array([5, 1]))
    np.testing.assert_array_equal(part.ends, [100, 30])
    np.testing.assert_array_equal(part.normalised(np.array([0])).x, windows.normalised(np.array([5])).x)


def test_keys_depend_on_instrument_and_date_alone(windows):
    # fixed for ever: a forecast's random numbers are drawn from them, in this process and in any other
    assert windows.keys[0] == 6613594153234481903  # SH000000 2020-01-14
    assert windows.keys.dtype == np.int64 and (windows.keys >= 0).all()
    assert len(set(windows.keys)) == len(windows)
    np.testing.assert_array_equal(windows.take(np.array([5, 1])).keys, windows.keys[[5, 1]])
    alone = replace(windows, bars=make_bars([40], seed=9), ends=np.array([9]), lookback=3, future=0)
    assert alone.keys[0] == windows.keys[0]


def test_normalising_ten_thousand_windows_takes_a_fifth_of_a_second_of_one_core():
    bars = make_bars([2500] * 40)
    ends = np.random.default_rng(0).permutation(np.flatnonzero(np.arange(len(bars)) % 2500 >= 89))
    many = Windows(bars, ends[ends < len(bars) - 11], lookback=90, future=11)
    times = []
    for start in range(0, 30_000, 10_000):
        began = time.process_time()
        assert many.normalised(np.arange(start, start + 10_000)).x.shape == (10_000, 101, 6)
        times.append(time.process_time() - began)
    assert min(times) < 0.2


def test_stamps_are_minute_hour_weekday_day_month():
    assert STAMP_FIELDS == ("minute", "hour", "weekday", "day", "month")
    times = pd.DatetimeIndex(["2024-01-01 09:35", "2024-12-31 15:00"])  # a Monday, a Tuesday
    expected = [[35, 9, 0, 1, 1], [0, 15, 1, 31, 12]]
    for form in (times, times.to_series(), times.to_numpy(), times.tz_localize("Asia/Shanghai")):
        assert stamps(form).tolist() == expected
    assert stamps(times.to_numpy().reshape(2, 1)).tolist() == [[expected[0]], [expected[1]]]
    assert stamps(times).dtype == np.int64


prices = st.tuples(st.integers(0, 2**32 - 1), st.floats(1.0, 5000.0), st.floats(0.003, 0.1))


def walks(seed: int, price: float, step: float) -> np.ndarray:
    """Two windows of 24 bars: prices that move by `step` a bar, volume and amount."""
    rng = np.random.default_rng(seed)
    close = price * np.exp(np.cumsum(rng.normal(0, step, (2, 24)), axis=1))
    volume = rng.lognormal(12, 0.5, (2, 24))
    columns = [close * np.exp(rng.normal(0, step / 2, (2, 24))) for _ in range(3)]
    return np.stack([*columns, close, volume, volume * close], -1)


@settings(max_examples=60, deadline=None)
@given(prices)
def test_windows_of_ordinary_prices_are_normalised_as_published_bit_by_bit(case):
    rows = walks(*case)
    if (rows[:, :20, :4].std(axis=1) < 0.01).any() or (rows[:, :20, :4].mean(axis=1) < 1).any():
        return  # small beside 1e-5
    for one, other in zip(normalise(rows, 20), normalise(rows, 20, normalisation="published")):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=100, deadline=None)
@given(prices, st.integers(-9, 6))
def test_the_unit_of_a_price_does_not_change_a_window(case, power):
    rows = walks(*case).astype(np.float32).astype(np.float64)
    scaled = rows * np.where(np.arange(6) < 4, 10.0**power, 1)
    x, _, scale = normalise(rows, 20)
    other, _, other_scale = normalise(scaled, 20)
    # an ordinary window's own 1e-5 is what is left: a thousandth of its deviation at most
    np.testing.assert_allclose(other, x, rtol=1.1e-3, atol=1e-6)
    np.testing.assert_allclose(other_scale[..., :4] / 10.0**power, scale[..., :4], rtol=1.1e-3)


def test_the_published_normalisation_flattens_small_prices():
    rows = walks(0, 30.0, 0.02) * np.where(np.arange(6) < 4, 1e-8, 1)
    assert np.abs(normalise(rows, 20, normalisation="published")[0][..., :4]).max() < 0.01
    assert np.abs(normalise(rows, 20)[0][..., :4]).max() > 1

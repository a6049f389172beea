from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import DAYS, market_bars, sessions, use_store, write_market

from kronos_qlib import KLineDataset, KLineHandler
from kronos_qlib.data.join_windows import drop_unused_bars, join_windows
from kronos_qlib.data.windows import Bars, Windows

DAY = [str(date.date()) for date in sessions(DAYS)]
TRAIN = [DAY[10], DAY[39]]


def training_windows(universe, segment=TRAIN, lookback: int = 6, start_time=None) -> Windows:
    return KLineDataset(KLineHandler(universe, start_time), {"a": segment}, lookback, 3).training_windows("a")


def listed(windows: Windows) -> list[tuple[str, str]]:
    dates = np.datetime_as_string(windows.dates, unit="D")
    return list(zip(dates.tolist(), windows.instruments.tolist()))


def assert_same_batches(left: Windows, right: Windows) -> None:
    assert len(left) == len(right)
    ours, theirs = (windows.normalised(np.arange(len(windows))) for windows in (left, right))
    for name in vars(ours):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.fixture
def two_stores(market, tmp_path) -> tuple[Windows, Windows]:
    """Windows of two stores whose instruments have the same names and other prices."""
    own = training_windows("some")
    bars = {name: table.assign(volume=table["volume"] * 3) for name, table in market_bars().items()}
    use_store(write_market(tmp_path / "other", bars))
    return own, training_windows("some")


def test_windows_of_two_stores_come_one_after_the_other_unchanged(two_stores):
    own, other = two_stores
    train = join_windows([("", own), ("us", other)])
    assert len(train) == len(own) + len(other)
    assert_same_batches(train.take(slice(len(own))), own)
    assert_same_batches(train.take(slice(len(own), None)), other)
    assert (train.lookback, train.future, train.clip) == (own.lookback, own.future, own.clip)


def test_instruments_of_another_store_carry_its_label(two_stores):
    own, other = two_stores
    train = join_windows([("", own), ("us", other)])
    assert listed(train) == listed(own) + [(date, f"us:{name}") for date, name in listed(other)]
    assert len(set(train.keys)) == len(train)
    np.testing.assert_array_equal(train.keys[: len(own)], own.keys)


def test_joined_bars_are_well_formed(two_stores):
    own, other = two_stores
    bars = join_windows([("", own), ("us", other)]).bars
    assert (bars.values.dtype, bars.stamp.dtype, bars.dates.dtype) == (np.float32, np.int8, np.dtype("M8[ns]"))
    assert bars.offsets.dtype == np.int64
    assert len(bars.values) == len(bars.stamp) == len(bars.dates) == bars.offsets[-1]
    assert len(bars.offsets) == len(bars.instruments) + 1
    for start, stop in zip(bars.offsets[:-1], bars.offsets[1:]):
        assert (np.diff(bars.dates[start:stop]) > np.timedelta64(0)).all()


def test_other_windows_on_the_first_bars_stay_what_they_are(market, two_stores):
    own, other = two_stores
    valid = own.take(np.array([5, 1, 7]))
    train = join_windows([("", own), ("us", other)])
    moved = replace(valid, bars=train.bars)
    assert_same_batches(moved, valid)
    np.testing.assert_array_equal(moved.keys, valid.keys)


def test_a_window_in_several_universes_of_a_store_counts_once(market):
    own, all_, longer = training_windows("some"), training_windows("all"), training_windows("all", [DAY[5], DAY[45]])
    train = join_windows([("", own), ("", all_), ("", longer), ("", own)])
    pairs = listed(train)
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {*listed(own), *listed(all_), *listed(longer)}
    assert pairs[: len(own)] == listed(own), "the dataset's own come first"
    assert set(listed(all_)) - set(listed(own)), "or the test says nothing"
    reference = dict(zip(listed(longer), longer.normalised(np.arange(len(longer))).x))
    for pair, x in zip(pairs, train.normalised(np.arange(len(train))).x):
        np.testing.assert_array_equal(x, reference[pair])


def test_windows_of_different_stores_are_never_repeats(two_stores):
    own, other = two_stores
    assert len(join_windows([("", own), ("us", own), ("uk", other), ("us", other)])) == 3 * len(own)


def test_a_universe_that_is_there_already_adds_nothing(market):
    own = training_windows("some")
    train = join_windows([("", own), ("", training_windows(["AAA"]))])
    assert listed(train) == listed(own)
    assert train.bars.instruments == own.bars.instruments


def test_one_source_alone_is_itself(market):
    own = training_windows("some")
    assert join_windows([("", own)]) is own


@pytest.mark.parametrize("change", [{"lookback": 7}, {"future": 3}, {"clip": 3.0}])
def test_windows_of_different_sizes_are_not_joined(market, change):
    own = training_windows("some")
    with pytest.raises(
        ValueError,
        match=r"windows of us have \(lookback, future, clip, normalisation\) .* the first ones \(6, 4, 5.0, 'unit",
    ):
        join_windows([("", own), ("us", replace(own, **change))])


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(sizes, st.data())
def test_windows_without_unused_bars_are_the_same_on_fewer_bars(sizes, data):
    count, lookback, future = sum(sizes), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    bars = Bars(
        values=np.random.default_rng(0).lognormal(size=(count, 6)).astype(np.float32),
        stamp=np.arange(count * 5).reshape(count, 5).astype(np.int8),
        dates=np.arange(count).astype("M8[D]").astype("M8[ns]"),
        offsets=offsets,
        instruments=tuple("ABCDE"[: len(sizes)]),
    )
    possible = [
        end for start, stop in zip(offsets[:-1], offsets[1:]) for end in range(start + lookback - 1, stop - future)
    ]
    ends = data.draw(st.lists(st.sampled_from(possible), unique=True)) if possible else []
    windows = Windows(bars, np.array(ends, np.int64), lookback, future)
    used = drop_unused_bars(windows)
    if ends:
        assert_same_batches(used, windows)
    assert listed(used) == listed(windows)
    np.testing.assert_array_equal(used.keys, windows.keys)
    needed = {row for end in ends for row in range(end - lookback + 1, end + future + 1)}
    np.testing.assert_array_equal(used.bars.values, bars.values[sorted(needed)])
    assert set(used.bars.instruments) == set(windows.instruments)

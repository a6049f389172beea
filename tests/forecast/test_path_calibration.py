"""A calibration maps whole paths, keeps bars possible and quantiles in order, adapts from the past, and is kept."""

import json
import pickle

import numpy as np
import pytest
from calibrations import IDENTITY, STEPS, make_calibration
from scipy.stats import betabinom

from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.forecast.calibration import (
    BANDS,
    GRID,
    Calibration,
    ForecastIdentity,
    conformity_grid,
    conformity_scores,
    load_calibration,
    sample_quantiles,
)

LEVELS = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
DAILY = 0.02


def plain(**changes) -> Calibration:
    """One that changes nothing but bands."""
    return make_calibration(terciles=(), slopes=((1.0,) * STEPS,), spreads=((1.0,) * STEPS,), **changes)


def walks(windows=200, samples=20, spread=1.0, seed=0):
    """Closes of sample paths [W, S, P], ratios to the last close, what came, and the volatility."""
    rng = np.random.default_rng(seed)
    paths = np.exp(spread * DAILY * rng.standard_normal((windows, samples, STEPS)).cumsum(2))
    came = np.exp(DAILY * rng.standard_normal((windows, STEPS)).cumsum(1))
    return paths, came, np.full(windows, DAILY)


def bars_of(paths):
    """Possible bars whose closes are these: [W, S, P, 6]."""
    rng = np.random.default_rng(1)
    opened = paths * np.exp(0.01 * rng.standard_normal(paths.shape))
    high, low = np.maximum(opened, paths) * 1.01, np.minimum(opened, paths) * 0.99
    return np.stack([opened, high, low, paths, rng.random(paths.shape), rng.random(paths.shape)], axis=-1)


def test_the_map_is_the_one_of_the_docstring_computed_by_hand():
    closes = np.exp(np.array([[[0.1, 0.2, 0.3], [0.3, 0.0, 0.1]]]))
    mapped = np.log(make_calibration().map_closes(closes, np.array([0.02])))[0]
    for step, (slope, spread) in enumerate(zip((0.3, 0.4, 0.5), (2.0, 2.5, 3.0))):  # of the middle tercile
        drawn = np.log(closes[0, :, step])
        centre = drawn.mean()
        expected = slope * centre + spread * np.sqrt(2) * (drawn - centre)
        np.testing.assert_allclose(mapped[:, step], expected, rtol=1e-12, atol=1e-15)


def test_every_window_is_mapped_by_its_own_tercile_and_by_itself_alone():
    paths, _, _ = walks()
    volatility = np.random.default_rng(2).uniform(0.001, 0.05, len(paths))
    calibration = make_calibration()
    whole = calibration.map_closes(paths, volatility)
    bands = calibration.quantiles(whole, volatility, LEVELS)
    order = np.random.default_rng(3).permutation(len(paths))
    assert np.array_equal(calibration.map_closes(paths[order], volatility[order]), whole[order])
    for row in (0, 57, 199):
        alone = calibration.map_closes(paths[row : row + 1], volatility[row : row + 1])
        assert np.array_equal(alone[0], whole[row])
        assert np.array_equal(calibration.quantiles(alone, volatility[row : row + 1], LEVELS)[0], bands[row])
    low = make_calibration(slopes=((0.0,) * 3, (1.0,) * 3, (1.0,) * 3)).map_closes(paths, volatility)
    still = np.abs(np.log(low).mean(1)).max(1) < 1e-12  # whose location was shrunk away
    assert np.array_equal(still, volatility <= 0.01) and 0 < still.sum() < len(still)


def test_possible_bars_stay_possible_and_only_prices_move():
    paths, _, volatility = walks()
    bars = bars_of(paths) * np.array([7, 7, 7, 7, 1, 1.0])
    last = np.full(len(paths), 7.0)
    mapped = make_calibration().map_bars(bars.astype(np.float32), last, volatility)
    opened, high, low, close = np.moveaxis(mapped[..., :4], -1, 0)
    assert (low < np.minimum(opened, close)).all() and (np.maximum(opened, close) < high).all() and (low > 0).all()
    assert np.array_equal(mapped[..., 4:], bars.astype(np.float32)[..., 4:])
    closes = make_calibration().map_closes(bars[..., COLUMNS.index("close")] / 7, volatility)
    np.testing.assert_allclose(close, 7 * closes, rtol=1e-6)
    impossible = bars.copy()
    impossible[0, 0, 0, :4] = -1.0  # the network may draw it
    assert (make_calibration().map_bars(impossible, last, volatility)[..., :4] > 0).all()


@pytest.mark.parametrize("offset", [-3.0, -0.4, 0.0, 0.7])
def test_quantiles_stay_in_order_whatever_the_offsets(offset):
    paths, _, volatility = walks()
    rows = tuple((offset + 0.5 * (band == 1) + 0 * GRID).tolist() for band in range(3))  # the 80 % band's is largest
    calibration = plain(conformity=(tuple(map(tuple, rows)),) * STEPS)
    found = calibration.quantiles(paths, volatility, LEVELS)
    assert (np.diff(found, axis=-1) >= 0).all()
    assert np.array_equal(found[..., 3], sample_quantiles(paths, LEVELS)[..., 3]), "the median is no band's"
    some = calibration.quantiles(paths, volatility, np.array([0.25, 0.5, 0.6, 0.999]))
    assert np.array_equal(some[..., 0], found[..., 2]), "the same level among others"


def test_quantiles_of_the_right_samples_cover_as_they_should_however_few_there_are():
    for samples in (19, 100):
        paths, came, _ = walks(windows=4000, samples=samples, seed=4)
        low, high = np.moveaxis(sample_quantiles(paths, LEVELS)[..., [0, 6]], -1, 0)
        assert ((low <= came) & (came <= high)).mean() == pytest.approx(0.9, abs=0.01)


def test_split_conformal_bands_cover_within_the_bounds_of_exchangeable_forecasts():
    """Of n scores the share covered is Beta((n + 1) · level, (n + 1)(1 − level)) at each level: Vovk 2012."""
    fitted, judged = 999, 4000
    paths, came, volatility = walks(windows=fitted + judged, spread=0.4, seed=5)
    first, later = slice(fitted), slice(fitted, None)
    grid = conformity_grid(conformity_scores(paths[first], came[first], volatility[first]))
    calibration = plain(conformity=tuple(tuple(map(tuple, bands.tolist())) for bands in grid.transpose(1, 2, 0)))
    found = calibration.quantiles(paths[later], volatility[later], LEVELS)
    for band, (low, high) in enumerate(((2, 4), (1, 5), (0, 6))):
        level = BANDS[band] / 100
        law = betabinom(judged, 1000 * level, 1000 * (1 - level))
        inside = (found[..., low] <= came[later]) & (came[later] <= found[..., high])
        before = sample_quantiles(paths[later], LEVELS)
        narrow = (before[..., low] <= came[later]) & (came[later] <= before[..., high])
        for step in range(STEPS):
            assert 1e-4 < law.cdf(inside[:, step].sum()) < 1 - 1e-4
            assert narrow[:, step].mean() < level - 0.15, "they had to be widened"


def changing_market(days=200, names=40, seed=6):
    """Forecasts of a market whose volatility doubles halfway, which they do not know."""
    paths, came, volatility = walks(days * names, seed=seed)
    dates = np.repeat(np.arange(days), names).astype("datetime64[D]").astype("datetime64[ns]")
    came[days * names // 2 :] **= 2
    ends = dates[:, None] + np.arange(1, STEPS + 1) * np.timedelta64(1, "D")
    return paths, volatility, came, dates, ends


def conformal(paths, volatility, came):
    grid = conformity_grid(conformity_scores(paths, came, volatility))
    return plain(conformity=tuple(tuple(map(tuple, bands.tolist())) for bands in grid.transpose(1, 2, 0)))


def test_adaptive_bands_follow_a_change_of_variance_that_split_ones_miss():
    paths, volatility, came, dates, ends = changing_market()
    half = len(dates) // 2
    calibration = conformal(paths[:half], volatility[:half], came[:half])
    offsets = calibration.adaptive_offsets(paths, volatility, came, dates, ends)
    split = calibration.quantiles(paths, volatility, LEVELS)
    adaptive = calibration.quantiles(paths, volatility, LEVELS, offsets)

    def coverage(found, rows):
        return ((found[rows, :, 0] <= came[rows]) & (came[rows] <= found[rows, :, 6])).mean()

    before, late = slice(half), slice(half + half // 2, None)
    assert coverage(adaptive, before) == pytest.approx(coverage(split, before), abs=0.02)
    assert coverage(split, late) < 0.65 and coverage(adaptive, late) == pytest.approx(0.9, abs=0.03)


def test_adaptive_bands_of_a_day_know_nothing_of_later_bars_and_something_of_earlier_ones():
    paths, volatility, came, dates, ends = changing_market(days=60)
    calibration = conformal(paths, volatility, came)
    day = dates[len(dates) // 2]
    unknown = ends > day
    honest = calibration.adaptive_offsets(paths, volatility, came, dates, ends)
    shocked = calibration.adaptive_offsets(paths, volatility, np.where(unknown, 5 * came, came), dates, ends)
    absent = calibration.adaptive_offsets(
        paths, volatility, np.where(unknown, np.nan, came), dates, np.where(unknown, np.datetime64("NaT"), ends)
    )
    upto = dates <= day
    assert np.array_equal(honest[upto], shocked[upto]) and np.array_equal(honest[upto], absent[upto])
    assert not np.array_equal(honest[~upto], shocked[~upto]), "it would have been noticed"
    past = calibration.adaptive_offsets(paths, volatility, np.where(ends == day, 5 * came, came), dates, ends)
    assert not np.array_equal(honest[dates == day], past[dates == day]), "the bar of the day itself counts"
    order = np.random.default_rng(7).permutation(len(dates))
    mixed = calibration.adaptive_offsets(*(each[order] for each in (paths, volatility, came, dates, ends)))
    assert np.array_equal(mixed, honest[order])


def test_the_first_adaptive_day_has_the_split_bands():
    paths, volatility, came, dates, ends = changing_market(days=10)
    calibration = conformal(paths, volatility, came)
    offsets = calibration.adaptive_offsets(paths, volatility, came, dates, ends)
    np.testing.assert_allclose(offsets[dates == dates[0]], np.broadcast_to(calibration.offsets, (40, STEPS, 3)))


def test_a_file_holds_every_bit(tmp_path):
    rng = np.random.default_rng(8)
    numbers = tuple(map(tuple, rng.random((3, STEPS)).tolist()))
    conformity = np.sort(rng.standard_normal((STEPS, 3, 101)) * 10.0 ** rng.integers(-9, 9, (STEPS, 3, 1)))
    calibration = make_calibration(
        slopes=numbers, spreads=numbers, conformity=tuple(tuple(map(tuple, bands.tolist())) for bands in conformity)
    )
    path = calibration.save(tmp_path / "deep" / "calibration.json")
    again = load_calibration(path)
    assert again == calibration == pickle.loads(pickle.dumps(calibration))
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: '{"slopes": [1]}', "identity"),
        (lambda text: "[]", "."),
        (lambda text: text.replace('"version": 1', '"version": 2').replace('"version":1', '"version":2'), "version"),
        (lambda text: changed(text, spreads=[[1.0, 0.0, 1.0]] * 3), "spreads should be above 0"),
        (lambda text: changed(text, slopes=[[1.0]] * 3), "different shapes"),
        (lambda text: changed(text, terciles=[0.3]), "different shapes"),
        (lambda text: changed(text, conformity=[[[0.0] * 7] * 3] * 3), "101 levels"),
        (lambda text: changed(text, conformity=[[[1.0, *[0.0] * 100]] * 3] * 3), "should not fall"),
        (lambda text: changed(text, extra=1), "extra"),
        (lambda text: text.replace("0.5", "NaN"), "JSON"),
    ],
)
def test_a_file_that_is_damaged_or_something_else_is_one_clear_error(tmp_path, damage, message):
    path = make_calibration().save(tmp_path / "mine.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="mine.json is no calibration of kronos-qlib") as raised:
        load_calibration(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def changed(text, **values):
    return json.dumps(json.loads(text) | values)


def test_forecasts_that_it_was_not_fitted_for_are_refused():
    calibration = make_calibration()
    calibration.check(ForecastIdentity(**IDENTITY), STEPS)
    calibration.check(ForecastIdentity(**IDENTITY), 1)
    with pytest.raises(ValueError, match="has 3 steps, and the forecast 4"):
        calibration.check(ForecastIdentity(**IDENTITY), 4)
    with pytest.raises(ValueError, match="forecasts with top_p 1.0, not 0.9"):
        calibration.check(ForecastIdentity(**IDENTITY | {"top_p": 0.9}), STEPS)
    with pytest.raises(ValueError, match="a model of other weights"):
        calibration.check(ForecastIdentity(**IDENTITY | {"model": "c"}), STEPS)

"""Columns beyond the six: from the store and from a class, through training and forecasts; a wider tokenizer."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from networks import MODEL, TOKENIZER
from qlib.data import D
from tampering import LAST_DAY, day_number, tampered
from tiny import HORIZON, LOOKBACK, finetune, make_dataset, make_model, use_market

from kronos_qlib import KLineHandler, KronosPredictor, KronosRanker
from kronos_qlib.cli import main
from kronos_qlib.data.windows import COLUMNS
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.workflow.records import ForecastRecord

EXAMPLE = Path(__file__).parents[2] / "examples" / "range_column.py"
RANGE = {"class": "SmoothedRange", "module_path": str(EXAMPLE), "kwargs": {"half_life": 3}}
INDEX_RETURN = "ChangeInstrument('DEMO0000', $close/Ref($close, 1) - 1)"
TWO = {"range": RANGE, "market": INDEX_RETURN}


def wide_dataset(columns=TWO, **changes):
    return make_dataset(handler=KLineHandler("demo", columns=columns), **changes)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(3)
    return KronosTokenizer(**TOKENIZER).eval(), Kronos(**MODEL).eval()


@pytest.fixture
def narrow(networks, tmp_path):
    return str(networks[0].save_pretrained(tmp_path / "narrow") or tmp_path / "narrow")


def test_columns_are_those_of_the_expression_and_the_class(store):
    bars = KLineHandler("demo", columns=TWO).bars()
    six = KLineHandler("demo").bars()
    assert bars.columns == (*COLUMNS, "range", "market") and bars.values.shape[1] == 8
    returns = D.features(["DEMO0000"], ["$close"])["$close"].droplevel(0).pct_change(fill_method=None)
    np.testing.assert_allclose(bars.values[:, 7], returns[bars.dates], rtol=1e-4, atol=1e-7)
    own = slice(six.offsets[1], six.offsets[2])
    expected = pd.Series(np.log(six.values[own, 1].astype(float) / six.values[own, 2])).ewm(halflife=3, adjust=False)
    # The index has no return on its first day and around a suspension, so bars of these days are left out.
    kept = np.isin(six.dates[own], bars.dates)
    mine = bars.values[bars.offsets[1] : bars.offsets[2], 6]
    np.testing.assert_allclose(mine, expected.mean()[kept], rtol=1e-4, atol=1e-7)


def test_bars_without_a_column_are_counted_and_left_out(store):
    with pytest.warns(UserWarning, match=r"have no market and are dropped, DEMO00\d\d 2018-01-02"):
        bars = KLineHandler("demo", columns={"market": INDEX_RETURN}).bars()
    assert bars.dates.min() == np.datetime64("2018-01-03")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"next": "Ref($close, -1)"}, "columns: next: Ref($close, -1) looks 1 sessions ahead"),
        ({"close": "$open"}, "columns: has 'close': a name is letters, digits and _, and none of open"),
        ({"x": "$close +"}, "columns: x: should hold Qlib expressions"),
        ({"next": "Delta($close, -1)"}, "columns: next: Delta($close, -1) looks 1 sessions ahead"),
        ({"next": "Mean(Ref($close, 2), 3)/Ref(Delta($close, -3), 1)"}, "looks 2 sessions ahead"),
        ({"x": "1"}, "columns: x: should hold Qlib expressions, which name a field such as $close, not '1'"),
        ({"x": 3}, "columns: x: should be a Qlib expression or a configuration"),
        ({"x": "$absent"}, "KLineHandler: columns: field $absent is missing: no instrument of store"),
        ({"x": "0/($close - $close)"}, "KLineHandler: columns: x: no bar of universe 'demo'"),
        (["$open"], "columns: should be a mapping of names"),
    ],
)
def test_a_wrong_column_is_one_line(store, columns, message):
    with pytest.raises(ValueError) as error:
        KLineHandler("demo", columns=columns)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return np.append(bars[1:, 3], 0)", "Own looks ahead"),
        ("return bars[:, 3] - bars[:, 3].mean()", "Own looks ahead"),
        ("return bars[:5, 3]", "Own returns the shape [5], and should return [60]"),
        ("return bars[:, 3] / 0", "Own returns what is infinite"),
        ("raise KeyError('x')", "Own fails: KeyError"),
    ],
)
def test_a_class_that_cannot_be_a_column_is_told_before_anything_is_loaded(tmp_path, body, message):
    file = tmp_path / "own.py"
    file.write_text(f"import numpy as np\n\nclass Own:\n    def __call__(self, bars):\n        {body}\n")
    with np.errstate(divide="ignore"), pytest.raises(ValueError) as error:
        KLineHandler("demo", columns={"x": {"class": "Own", "module_path": str(file)}})
    assert "KLineHandler: columns: x: " in str(error.value) and message in str(error.value)


def test_a_wider_tokenizer_forecasts_bitwise_what_the_narrow_one_does_until_it_learns(store, narrow, networks):
    """Zero weights: the columns change neither codes nor the six, whatever they hold."""
    model = {"model": MODEL, "forecast": {"sample_count": 3}}
    before, wide = make_dataset(), wide_dataset({"range": RANGE, "spread": "$high/$low"})
    old = make_model(tokenizer=narrow, **model)
    new = make_model(tokenizer={"start_from": narrow, "d_in": 8}, **model)
    pd.testing.assert_frame_equal(old.forecast(before), new.forecast(wide), check_exact=True)
    windows, drawn = wide.score_windows("test"), []
    for dataset, made in ((before, old), (wide, new)):
        batch = dataset.score_windows("test").normalised(np.arange(40))
        x = torch.from_numpy(batch.x)
        with torch.inference_mode():
            codes = made.tokenizer.encode(x)
            drawn.append((codes, made.tokenizer.decode(codes)[..., :6], made.tokenizer(x)[0][1][..., :6]))
    assert all(torch.equal(one, other) for one, other in zip(*drawn))
    assert windows.bars.values.shape[1] == 8 and new.tokenizer.source == narrow


def test_all_columns_are_learnt_and_forecast(store, narrow, tmp_path):
    forecast = {"keep_paths": True, "cache_dir": str(tmp_path / "cache")}
    wide = {"start_from": narrow, "d_in": 8}
    model = make_model(tokenizer=wide, forecast=forecast, finetune=finetune(tmp_path / "run"))
    dataset = wide_dataset()
    model.fit(dataset)
    start = KronosTokenizer.from_pretrained(narrow).widened(8)
    assert not torch.equal(model.tokenizer.embed.weight[:, 6:], start.embed.weight[:, 6:])
    index, paths = model.paths(dataset)
    assert paths.shape == (len(index), 2, HORIZON, 8)
    again = KronosTokenizer.from_pretrained(tmp_path / "run" / "tokenizer" / "best")
    assert again.d_in == 8 and torch.equal(again.head.weight, model.tokenizer.head.weight)
    assert "range" in (tmp_path / "run" / "reconstruction.csv").read_text()


def test_no_score_sees_a_later_value_of_a_column(store, narrow, tmp_path):
    def scores(folder):
        use_market(folder)
        model = make_model(tokenizer={"start_from": narrow, "d_in": 7})
        with torch.no_grad():
            model.tokenizer.embed.weight[:, 6] = 0.1
        return model.predict(wide_dataset({"range": RANGE}))

    whole, shocked = scores(store), scores(tampered(store, tmp_path / "shocked", "prices"))
    until = whole.index.get_level_values(0) <= LAST_DAY
    assert until.any() and not until.all()
    pd.testing.assert_series_equal(whole[until], shocked.reindex(whole.index)[until], check_exact=True)
    assert not whole[~until].equals(shocked.reindex(whole.index)[~until])


def test_columns_and_tokenizer_must_agree(store, narrow):
    with pytest.raises(ValueError, match="d_in is 6; bars have 7 columns, open, .*, range; the handler's setting"):
        make_model(tokenizer=narrow).predict(wide_dataset({"range": RANGE}))
    with pytest.raises(ValueError, match="d_in is 8; bars have 6 columns"):
        make_model(tokenizer={"start_from": narrow, "d_in": 8}).predict(make_dataset())
    with pytest.raises(ValueError, match=r"d_in \(4\) is below the 6 columns"):
        make_model(tokenizer={"start_from": narrow, "d_in": 4})
    with pytest.raises(ValueError, match="tokenizer: start_from is of a tokenizer's"):
        make_model(tokenizer={"start_from": narrow, "bits": 4})
    for ranker, message in (
        ({"inputs": "bars"}, "inputs: bars it takes 6"),
        ({}, "2 columns beyond six have no effect"),
    ):
        tokenizer = {"start_from": narrow, "d_in": 8}
        with torch.random.fork_rng(), pytest.raises(ValueError, match=message):
            made = KronosRanker(tokenizer, MODEL, ranker={"output_dir": "ranker"} | ranker)
            made.tokenizer.embed.weight.data[:, 6:] += 0.1 if ranker else 0.0
            made.fit(wide_dataset())


def test_a_tokenizer_knows_the_columns_that_it_was_trained_on(store, narrow, tmp_path, warnings_logged):
    wide = {"start_from": narrow, "d_in": 8}
    model = make_model(tokenizer=wide)
    model.fit(wide_dataset())
    assert "2 columns beyond six have no effect: their weights in the tokenizer are zero" in warnings_logged.text
    stages = finetune(tmp_path / "run")
    make_model(tokenizer=wide, finetune=stages | {"predictor": None}).fit(wide_dataset())
    best = str(tmp_path / "run" / "tokenizer" / "best")
    trained = make_model(tokenizer=best)
    trained.predict(wide_dataset())
    with pytest.raises(ValueError, match="the tokenizer was trained on the columns range, market, not market, range"):
        trained.predict(wide_dataset({"market": INDEX_RETURN, "range": RANGE}))
    with pytest.raises(ValueError, match="was trained on the columns range, market, in this order"):
        KronosPredictor(trained.model, trained.tokenizer, "cpu", columns=["market", "range"])


def test_predictor_takes_and_returns_the_columns_that_it_is_told(networks):
    tokenizer, model = networks
    times = pd.date_range("2024-01-01", periods=LOOKBACK + 3)
    random = np.random.default_rng(0)
    bars = pd.DataFrame(
        100 + random.normal(0, 1, (LOOKBACK, 1)) + [0, 1, -1, 0.5], columns=["open", "high", "low", "close"]
    )
    bars["funding"] = random.normal(0, 1e-4, LOOKBACK)
    wide = KronosPredictor(model, tokenizer.widened(7), "cpu", columns=["funding"])
    options = {"pred_len": 3, "seed": 1, "verbose": False}
    found = wide.predict(bars, times[:LOOKBACK], times[LOOKBACK:], **options)
    plain = KronosPredictor(model, tokenizer, "cpu")
    expected = plain.predict(bars.drop(columns="funding"), times[:LOOKBACK], times[LOOKBACK:], **options)
    assert list(found.columns) == [*COLUMNS, "funding"]
    assert np.isfinite(found["funding"]).all() and expected.shape == (3, 6)
    with pytest.raises(ValueError, match="df has no column 'funding'"):
        wide.predict(bars.drop(columns="funding"), times[:LOOKBACK], times[LOOKBACK:], **options)
    with pytest.raises(ValueError, match="d_in is 7; bars have 6 columns, and columns should name the 1 others"):
        KronosPredictor(model, tokenizer.widened(7), "cpu")


# Prices of zero or less


@pytest.fixture
def below_zero(store, tmp_path):
    """A file of prices less their median, as if joined by differences: on both sides of zero."""
    bars = D.features(D.instruments("demo"), ["$open", "$high", "$low", "$close", "$volume"]).dropna().reset_index()
    bars.columns = ["symbol", "time", "open", "high", "low", "close", "volume"]
    middle = bars.groupby("symbol")["close"].transform("median")
    bars[["open", "high", "low", "close"]] = bars[["open", "high", "low", "close"]].sub(middle, axis=0)
    bars[bars["volume"] > 0].to_csv(tmp_path / "bars.csv", index=False)
    return tmp_path


def test_prices_below_zero_are_kept_where_they_are_asked_for_and_give_no_ratio(below_zero, capsys):
    ingest = ["ingest", str(below_zero / "bars.csv"), str(below_zero / "store"), "--prices", "any"]
    assert main(ingest) == 0 and main(["check", str(below_zero / "store")]) == 0
    assert main(["workflow", str(below_zero / "store")]) == 2
    assert "prices may be zero or less" in capsys.readouterr().err
    use_market(below_zero / "store")
    with pytest.raises(
        ValueError, match="a price of zero or less: .*; for futures joined by differences set prices: any"
    ):
        KLineHandler("all").bars()
    handler = KLineHandler("all", prices="any", label="Ref($close, -2) - Ref($close, -1)")
    dataset = make_dataset(handler=handler)
    assert (handler.bars().values[:, 3] < 0).mean() > 0.3
    scores = make_model(score="z_last").predict(dataset)
    assert np.isfinite(scores).all() and scores.nunique() > 100
    columns = make_model(score="z_last").forecast(dataset).columns
    assert {"z_last", "prob_up", "q50_1"} <= set(columns) and "mean_return" not in columns
    for change, message in (
        ({}, "score mean_return is a ratio of prices, which may be zero or less"),
        ({"score": "z_last", "calibration": {}}, "calibration takes logarithms"),
        ({"score": "z_last", "neutralise": ["volatility"]}, "neutralise takes ratios"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(**change).predict(dataset)
    with pytest.raises(ValueError, match="ForecastRecord: its errors and baselines are of ratios"):
        ForecastRecord(make_model(score="z_last"), dataset)


def test_without_being_asked_for_they_are_rejected_rows(below_zero, capsys):
    assert main(["ingest", str(below_zero / "bars.csv"), str(below_zero / "other")]) == 0
    assert "a price of zero or less" in (below_zero / "other" / "rejected.csv").read_text()
    assert main(["ingest", str(below_zero / "bars.csv"), str(below_zero / "x"), "--prices", "some"]) == 2
    assert "--prices 'some' is unknown; use positive, any" in capsys.readouterr().err
    again = ["ingest", str(below_zero / "bars.csv"), str(below_zero / "other"), "--append", "--prices", "any"]
    assert main(again) == 2 and "was written with positive" in capsys.readouterr().err


# Conditions


SECTORS = {"DEMO0001": 0, "DEMO0002": 1, "DEMO0003": 2}  # the others have none


def with_sectors(market: Path, folder: Path, later: int | None = None) -> Path:
    """A copy of the market with the field sector; of another number from 2018-07-10 on, if `later` says so."""
    shutil.copytree(market, folder)
    for name, number in SECTORS.items():
        close = np.fromfile(folder / "features" / name.lower() / "close.day.bin", "<f4")
        content = np.concatenate([close[:1], np.full(len(close) - 1, number)]).astype("<f4")
        if later is not None:
            content[1 + day_number(market) + 1 - int(close[0]) :] = later
        content.tofile(folder / "features" / name.lower() / "sector.day.bin")
    return folder


def sector_dataset(market: Path):
    use_market(market)
    return make_dataset(handler=KLineHandler("demo", conditions={"sector": "$sector"}))


def conditioned(tokenizer: str, seed: int = 0, **changes):
    model = make_model(tokenizer=tokenizer, model=MODEL | {"conditions": {"sector": 3}}, **changes)
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            model.model.time_emb.conditions[0].weight[1:].normal_()
    return model


def test_conditions_change_the_forecasts_of_their_groups_alone(store, narrow, tmp_path):
    dataset = sector_dataset(with_sectors(store, tmp_path / "sectors"))
    bars = dataset.handler.bars()
    groups = {name: set(bars.stamp[bars.codes == code, 5]) for code, name in enumerate(bars.instruments)}
    assert groups == {name: {SECTORS.get(name, -1) + 1} for name in bars.instruments}
    plain = make_model(tokenizer=narrow).predict(make_dataset())
    start = conditioned(narrow)
    assert start.model.time_emb.conditions[0].weight.abs().max() == 0
    pd.testing.assert_series_equal(start.predict(dataset), plain, check_exact=True)
    scores = conditioned(narrow, seed=1).predict(dataset)
    known = scores.index.get_level_values(1).isin(list(SECTORS))
    pd.testing.assert_series_equal(scores[~known], plain[~known], check_exact=True)
    assert (scores[known] != plain[known]).mean() > 0.9


def test_a_condition_is_that_of_the_score_date(store, narrow, tmp_path):
    before = conditioned(narrow, seed=1).predict(sector_dataset(with_sectors(store, tmp_path / "one")))
    after = conditioned(narrow, seed=1).predict(sector_dataset(with_sectors(store, tmp_path / "two", later=2)))
    pd.testing.assert_series_equal(before.loc[:LAST_DAY], after.loc[:LAST_DAY], check_exact=True)
    changed = (before != after).loc["2018-07-11":].groupby(level=1).mean()
    assert changed["DEMO0001"] > 0.9 and changed["DEMO0003"] == 0, "it was 2 before"


def test_conditions_keep_their_order_when_they_are_saved(tmp_path):
    torch.manual_seed(0)
    model = Kronos(**MODEL | {"conditions": {"sector": 3, "cap": 5}})
    model.time_emb.conditions[0].weight.data.normal_()
    model.save_pretrained(tmp_path)
    again = Kronos.from_pretrained(tmp_path)
    assert list(again.conditions.items()) == [("sector", 3), ("cap", 5)]
    assert torch.equal(again.time_emb.conditions[0].weight, model.time_emb.conditions[0].weight)


@pytest.mark.slow
def test_conditions_are_learnt_saved_and_the_same_in_two_processes(store, narrow, tmp_path):
    market, models = with_sectors(store, tmp_path / "sectors"), []
    for processes in (1, 2):
        models.append(conditioned(narrow, finetune=finetune(tmp_path / str(processes), processes=processes)))
        models[-1].fit(sector_dataset(market))
    one, two = (model.model.time_emb.conditions[0].weight for model in models)
    assert torch.equal(one, two) and (one[1:].abs().max(1).values > 0).all()
    best = {name: str(tmp_path / "1" / name / "best") for name in ("tokenizer", "predictor")}
    loaded = make_model(tokenizer=best["tokenizer"], model=best["predictor"], forecast={"processes": 2})
    scores = loaded.predict(sector_dataset(market))
    pd.testing.assert_series_equal(scores, models[0].predict(sector_dataset(market)), check_exact=True)


def test_wrong_conditions_are_one_line(store, narrow, tmp_path):
    market = with_sectors(store, tmp_path / "sectors")
    with pytest.raises(ValueError, match="the model's conditions are sector, the handler's none"):
        conditioned(narrow).predict(make_dataset())
    dataset = sector_dataset(market)
    with pytest.raises(ValueError, match="the model has 2 groups of sector, 0 … 1; the bars have 2"):
        make_model(tokenizer=narrow, model=MODEL | {"conditions": {"sector": 2}}).predict(dataset)
    with pytest.raises(ValueError, match=r"conditions: x of DEMO0000 on 2018-\d\d-\d\d.* groups are numbered 0 … 125"):
        KLineHandler("demo", conditions={"x": "$close"}).bars()
    with pytest.raises(ValueError, match="conditions: next: .* looks 1 sessions ahead"):
        KLineHandler("demo", conditions={"next": "Ref($sector, -1)"})
    with pytest.raises(ValueError, match="conditions: sector should have 1 … 126 groups, not 0"):
        make_model(tokenizer=narrow, model=MODEL | {"conditions": {"sector": 0}})
    with pytest.raises(ValueError, match="KronosRanker: the model's conditions are none, the handler's sector"):
        KronosRanker(narrow, MODEL, ranker={"output_dir": "r"}).fit(dataset)
    with pytest.raises(ValueError, match="KronosRanker: takes no model with conditions"):
        KronosRanker(narrow, MODEL | {"conditions": {"sector": 3}}, ranker={"output_dir": "r"})

"""Classes of a user's own, those of examples/: what they are given, what they do to a run, how a wrong one is told."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import MODEL, TOKENIZER
from qlib.data.dataset.weight import Reweighter
from qlib.utils import init_instance_by_config
from qlib.workflow import R
from qlib.workflow.record_temp import SigAnaRecord, SignalRecord
from scipy.stats import t
from tiny import HORIZON, make_dataset, make_model, same_weights, use_market, weights

from kronos_qlib import KLineHandler, KronosModel
from kronos_qlib.cli import main
from kronos_qlib.data.dataset import window_index
from kronos_qlib.evaluation.measures import LEVELS
from kronos_qlib.extensions import identify
from kronos_qlib.forecast.engine.generate import encode
from kronos_qlib.forecast.engine.sampling import draw, load_filter
from kronos_qlib.forecast.engine.weights import prepare_weights
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.workflow.records import ForecastRecord

EXAMPLES = Path(__file__).parents[2] / "examples"
SCORE = {"class": "UpsideLessDrawdown", "module_path": str(EXAMPLES / "upside_score.py"), "kwargs": {"aversion": 0.5}}
BASELINE = {"class": "StudentVolatility", "module_path": str(EXAMPLES / "student_baseline.py"), "kwargs": {"df": 5}}


@pytest.fixture
def kept(tmp_path):
    return {"keep_paths": True, "cache_dir": str(tmp_path / "cache")}


def own(folder: Path, body: str) -> dict:
    """A configuration of a class whose `__call__` has this body."""
    (folder / "own.py").write_text(
        f"import numpy as np\n\nclass Own:\n    def __call__(self, *given):\n        {body}\n"
    )
    return {"class": "Own", "module_path": str(folder / "own.py")}


def test_a_score_of_the_paths_is_the_run_s_score_and_its_file_is_recorded(store, kept):
    dataset, model = make_dataset(), make_model(score=SCORE, forecast=kept)
    with R.start(experiment_name="own_score"):
        model.fit(dataset)
        found = model.predict(dataset)
        recorded = R.get_recorder()
        run = json.loads((Path(recorded.get_local_dir()) / "artifacts" / "kronos_run.json").read_text())
    assert run["model"]["score"] == SCORE and run["extensions"]["score"]["file"] == SCORE["module_path"]
    index, paths = model.paths(dataset)
    pd.testing.assert_index_equal(found.index, index)
    last = model.forecast(dataset, columns=["last_close"])["last_close"].to_numpy()
    for row in (0, len(index) // 2, len(index) - 1):
        values = []
        for path in paths[row].astype(float):
            close = [last[row], *path[:, 3]]
            fall = max(1 - close[end] / max(close[: end + 1]) for end in range(len(close)))
            values.append((close[-1] / last[row] - 1, fall))
        upside, drawdown = np.mean(values, axis=0)
        assert found.iloc[row] == pytest.approx(upside - 0.5 * drawdown, rel=1e-5, abs=1e-7)


def test_another_score_of_the_same_paths_draws_none_anew(store, kept, monkeypatch):
    make_model(score=SCORE, forecast=kept).predict(make_dataset())
    monkeypatch.setattr("kronos_qlib.forecast.forecaster.generate", None)
    other = SCORE | {"kwargs": {"aversion": 0.0}}
    made = make_model(score=other, forecast=kept).predict(make_dataset())
    last = make_model(forecast=kept, score="last_return").predict(make_dataset())
    np.testing.assert_allclose(made, last, rtol=1e-5, atol=1e-7)


def test_a_baseline_of_one_s_own_stands_beside_the_others(store, kept):
    dataset, model = make_dataset(), make_model(forecast=kept)
    with R.start(experiment_name="own_baseline"):
        ForecastRecord(model, dataset, R.get_recorder(), baselines=["volatility", BASELINE]).generate()
        folder = Path(R.get_recorder().get_local_dir()) / "artifacts" / "forecast_evaluation"
    table = pd.read_csv(folder / "baselines.csv").set_index(["forecast", "step"])
    windows = dataset.score_windows("test")
    rows = np.arange(len(windows))
    close = windows.values(rows)[..., 3].astype(float)
    after = np.array([windows.bars.values[end + 1 : end + 1 + HORIZON, 3] for end in windows.ends])
    spread = np.diff(np.log(close), axis=1).std(1, ddof=1)[:, None] * np.sqrt(np.arange(1, HORIZON + 1))
    low, high = (np.exp(spread * t.ppf(level, 5) * np.sqrt(3 / 5)) for level in (LEVELS[0], LEVELS[-1]))
    inside = (after / close[:, -1:] >= low) & (after / close[:, -1:] <= high)
    assert table.loc[("StudentVolatility", "all"), "coverage_90"] == pytest.approx(inside.mean())
    assert table.loc[("StudentVolatility", "all"), "crps"] != table.loc[("volatility", "all"), "crps"]
    about = json.loads((folder / "about.json").read_text())["baselines"]["StudentVolatility"]
    assert about["extension"]["file"] == BASELINE["module_path"]


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (SCORE | {"module_path": "no/such.py"}, "score: module_path 'no/such.py' cannot be imported: FileNotFound"),
        (SCORE | {"class": "Lacking"}, "has no class 'Lacking'"),
        (SCORE | {"module": "x"}, "score: unknown key 'module'; known keys: class, module_path, kwargs"),
        (SCORE | {"kwargs": {"averse": 1}}, "UpsideLessDrawdown cannot be made: TypeError"),
        ({"class": "Path", "module_path": "pathlib"}, "Path has no __call__"),
        (BASELINE | {"kwargs": {"df": 1}}, "StudentVolatility cannot be made: ValueError: df should be above 2"),
    ],
)
def test_a_class_that_cannot_be_made_is_told_as_the_model_is_made(store, kept, configuration, message):
    with pytest.raises(ValueError, match="^KronosModel: score: ") as told:
        make_model(score=configuration, forecast=kept)
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return np.zeros(1)", "Own returns the shape [1], and should return [3]"),
        ("return given[0][0, 99]", "Own fails: IndexError"),
        ("return np.full(len(given[0]), np.nan)", "Own returns what is no finite number"),
        ("return given[1][:, -1, 3].argsort().argsort()", "Own scores a window by the others of its block too"),
    ],
)
def test_a_score_that_returns_something_else_is_told_before_a_training(store, kept, tmp_path, body, message):
    stage = {"epochs": 1, "windows_per_epoch": 32, "batch_size": 32, "valid_windows": 32}
    finetune = {"output_dir": str(tmp_path / "out"), "tokenizer": stage, "predictor": stage}
    model = make_model(score=own(tmp_path, body), forecast=kept, finetune=finetune)
    with pytest.raises(ValueError, match="^KronosModel: score: ") as told:
        model.fit(make_dataset())
    assert message in str(told.value) and not (tmp_path / "out").exists()


def test_a_score_needs_the_paths_and_one_that_fails_on_a_window_names_it(store, kept, tmp_path):
    with pytest.raises(ValueError, match="a score of your own needs the sample paths: set forecast.keep_paths"):
        make_model(score=SCORE)
    dataset = make_dataset()
    windows = dataset.score_windows("test")
    last = float(windows.values(np.arange(len(windows)))[:, -1, 3].max())
    rare = own(tmp_path, f"return np.where(given[1][:, -1, 3] == {last!r}, np.inf, 0.0)")
    with pytest.raises(ValueError, match=r"score: Own returns inf for DEMO000\d on 2018-0\d-\d\d.*, and for 1 of "):
        make_model(score=rare, forecast=kept).predict(dataset)


def test_a_baseline_that_is_wrong_is_told_as_the_record_is_made(store, kept, tmp_path):
    model, dataset = make_model(forecast=kept), make_dataset()
    for body, message in (
        ("return np.ones((len(given[0]), given[1]))", "shape"),
        (
            "return np.zeros((len(given[0]), given[1], 7)) - np.arange(7)",
            "quantiles that are not finite or do not rise",
        ),
        ("return np.full((len(given[0]), given[1], 7), given[0].mean())", "forecasts a window by the others"),
    ):
        with pytest.raises(ValueError, match=rf"^ForecastRecord: baselines.0: Own .*{message}"):
            ForecastRecord(model, dataset, baselines=[own(tmp_path, body)])


def test_a_model_with_a_score_of_its_own_is_pickled_whole(store, kept, tmp_path):
    model, dataset = make_model(score=SCORE, forecast=kept), make_dataset()
    again: KronosModel = pickle.loads(pickle.dumps(model))
    for name in [name for name in sys.modules if name.startswith("kronos_qlib_extension_")]:
        del sys.modules[name]
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))


# Sampling filter

MIN_P = {"class": "MinP", "module_path": str(EXAMPLES / "min_p_filter.py"), "kwargs": {"share": 0.2}}
ALL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def test_a_filter_draws_what_it_keeps_in_the_kept_proportions():
    keep = load_filter(identify(MIN_P))
    logits = 2 * torch.randn(4, 1, 30, generator=torch.Generator().manual_seed(1))
    uniform = (torch.arange(4000) + 0.5).div(4000).expand(4, -1)
    drawn = draw(logits, uniform, 0.8, 0, 1.0, torch.randperm(30, generator=torch.Generator().manual_seed(2)), keep)
    expected = (logits[:, 0] / 0.8).softmax(-1)
    expected = torch.where(expected >= 0.2 * expected.amax(-1, keepdim=True), expected, 0.0)
    found = torch.stack([torch.bincount(row, minlength=30) for row in drawn]) / 4000
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdim=True), atol=5e-4)


def test_a_filter_decides_scores_and_is_part_of_what_a_forecast_is(store, tmp_path):
    options = ALL | {"cache_dir": str(tmp_path / "cache"), "sample_count": 3}
    dataset, plain = make_dataset(), make_model(forecast=options).predict(make_dataset())
    filtered = make_model(forecast=options | {"filter": MIN_P})
    scores = filtered.predict(dataset)
    assert (scores != plain).mean() > 0.5
    pd.testing.assert_series_equal(filtered.predict(dataset), scores, check_exact=True)
    everything = make_model(forecast=options | {"filter": MIN_P | {"kwargs": {"share": 1e-9}}}).predict(dataset)
    pd.testing.assert_series_equal(everything, plain, check_exact=True)
    assert len(list((tmp_path / "cache").iterdir())) == 3, "each has a folder of its own"
    two = make_model(forecast=options | {"filter": MIN_P, "cache_dir": None, "processes": 2}).predict(dataset)
    pd.testing.assert_series_equal(two, scores, check_exact=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return given[0] * 0", "Own should return weights of 0 and more, with one above 0 for each row"),
        ("return given[0][..., :3]", r"Own should return a tensor of the shape \[4, 3, 16\]"),
        ("return given[0] * given[0].sum()", "Own weighs a row by the others of its batch too"),
        ("return given[1]", "Own fails: IndexError"),
    ],
)
def test_a_wrong_filter_is_told_as_the_model_is_made(tmp_path, body, message):
    with pytest.raises(ValueError, match=f"^KronosModel: forecast.filter: {message}"):
        make_model(forecast=ALL | {"filter": own(tmp_path, body)})
    with pytest.raises(ValueError, match="a filter of your own takes the place of top_p and top_k"):
        make_model(forecast=ALL | {"filter": MIN_P, "top_p": 0.9})


# Normalisation

ROBUST = {"class": "MedianAndRange", "module_path": str(EXAMPLES / "robust_normalisation.py")}


def test_windows_are_normalised_by_the_class_and_come_back_in_prices(store):
    dataset = make_dataset(normalisation=ROBUST)
    windows = dataset.training_windows("train")
    rows = np.arange(0, len(windows), 7)
    batch, values = windows.normalised(rows), windows.values(rows).astype(float)
    middle = np.median(values[:, : windows.lookback], axis=1, keepdims=True)
    np.testing.assert_allclose(batch.mean, middle, rtol=1e-12)
    unclipped = np.abs(batch.x) < 5
    np.testing.assert_allclose((batch.x * batch.scale + batch.mean)[unclipped], values[unclipped], rtol=1e-4, atol=1e-3)
    scores = make_model().predict(dataset)
    assert (scores != make_model().predict(make_dataset())).mean() > 0.9
    two = make_model(forecast={"processes": 2}).predict(dataset)
    pd.testing.assert_series_equal(two, scores, check_exact=True)


def test_another_normalisation_is_another_training(store, tmp_path):
    stage = {"epochs": 1, "windows_per_epoch": 32, "batch_size": 32, "valid_windows": 32}
    model = make_model(finetune={"output_dir": str(tmp_path / "out"), "tokenizer": stage})
    model.fit(make_dataset(normalisation=ROBUST))
    with pytest.raises(ValueError, match="holds another training .*normalisation"):
        model.fit(make_dataset())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return np.zeros((len(given[0]), 2, 6))", "Own should return finite numbers, those to divide by above 0"),
        ("return given[0].mean(1)", r"Own returns the shape \[3, 6\], and should return \[3, 2, 6\]"),
        (
            "return np.stack([given[0].mean((0, 1)) + 0 * given[0].mean(1)] * 2, 1)",
            "Own normalises a window by the oth",
        ),
    ],
)
def test_a_wrong_normalisation_is_told_as_the_dataset_is_made(store, tmp_path, body, message):
    with pytest.raises(ValueError, match=f"^KLineDataset: normalisation: {message}"):
        make_dataset(normalisation=own(tmp_path, body))
    with pytest.raises(ValueError, match="normalisation: Input should be 'unit_free' or 'published', not 'none'"):
        make_dataset(normalisation="none")


# Loss and sampler

REGIME = {"class": "RegimeWeighted", "module_path": str(EXAMPLES / "regime_loss.py"), "kwargs": {"weight": 2.0}}
LIQUID = {"class": "MoreOfTheLiquid", "module_path": str(EXAMPLES / "liquid_reweighter.py"), "kwargs": {"power": 8.0}}


def trained(folder: Path, loss: dict | None, processes: int = 1, **stages) -> KronosModel:
    stage = {"epochs": 1, "windows_per_epoch": 64, "batch_size": 32, "valid_windows": 32, "loss": loss}
    settings = {"output_dir": str(folder), "processes": processes, "tokenizer": stage, "predictor": stage} | stages
    model = make_model(finetune=settings)
    model.fit(make_dataset())
    return model


def same(one: KronosModel, other: KronosModel) -> list[bool]:
    pairs = ((one.tokenizer, other.tokenizer), (one.model, other.model))
    return [same_weights(weights(first), weights(second)) for first, second in pairs]


def test_a_loss_changes_both_stages_and_one_of_weight_nothing_neither(store, tmp_path):
    plain, weighted = trained(tmp_path / "plain", None), trained(tmp_path / "regime", REGIME)
    assert same(plain, weighted) == [False, False]
    unweighted = trained(tmp_path / "none", REGIME | {"kwargs": {"weight": 0.0}})
    for one, other in ((plain.tokenizer, unweighted.tokenizer), (plain.model, unweighted.model)):
        for name, tensor in weights(one).items():
            np.testing.assert_allclose(tensor, weights(other)[name], rtol=1e-3, atol=1e-5)
    identity = json.loads((tmp_path / "regime" / "predictor" / "identity.json").read_text())
    assert identity["settings.loss"]["class"] == "RegimeWeighted" and identity["settings.loss"]["digest"]


@pytest.mark.slow
def test_processes_with_a_loss_of_its_own_train_bitwise_as_one(store, tmp_path):
    assert same(trained(tmp_path / "one", REGIME), trained(tmp_path / "two", REGIME, processes=2)) == [True, True]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return given[0].mean()", r"Own should return a finite loss for each window, a tensor of the shape \[3\]"),
        ("return given[0].mean(1).detach()", "Own returns what no gradient can reach the errors through"),
        ("return given[0].mean(1) * given[0].sum()", "Own judges a window by the others of its batch too"),
    ],
)
def test_a_wrong_loss_is_told_as_the_model_is_made(store, tmp_path, body, message):
    with pytest.raises(ValueError, match=f"^KronosModel: finetune.predictor.loss: {message}"):
        make_model(finetune={"output_dir": "x", "predictor": {"epochs": 1, "loss": own(tmp_path, body)}})
    with pytest.raises(ValueError, match="a loss of your own, which is given bars, and cache_codes"):
        make_model(finetune={"output_dir": "x", "predictor": {"epochs": 1, "loss": REGIME, "cache_codes": True}})


def test_a_sampler_of_one_s_own_is_qlib_s_reweighter(store, tmp_path):
    stage = {"epochs": 1, "windows_per_epoch": 64, "batch_size": 32, "valid_windows": 32}
    model, dataset = make_model(finetune={"output_dir": str(tmp_path), "tokenizer": stage}), make_dataset()
    job = model.job(dataset, init_instance_by_config(LIQUID, accept_types=Reweighter))
    amount = pd.Series(job.train.bars.values[job.train.ends, 5], window_index(job.train))
    ranks = amount.groupby(level="datetime").rank(pct=True)
    np.testing.assert_allclose(job.draw_weights / job.draw_weights.max(), ranks**8, rtol=1e-9)


# Quantizer

FSQ = {"class": "FiniteScalarQuantizer", "module_path": str(EXAMPLES / "fsq_quantizer.py")}
OWN_TOKENIZER = TOKENIZER | {"quantizer": FSQ}


def test_a_quantizer_of_one_s_own_makes_the_codes_of_training_and_forecast():
    torch.manual_seed(0)
    tokenizer = KronosTokenizer(**OWN_TOKENIZER).eval()
    x = torch.randn(5, 9, 6)
    latent = tokenizer.latent(x)
    assert latent.shape[-1] == tokenizer.bits // 2, "two bits a coordinate"
    digits = ((torch.tanh(latent) + 1) * 2).floor().long()
    s1, s2 = tokenizer.encode(x, half=True)
    coarse = tokenizer.s1_bits // 2
    assert torch.equal(s1, (digits[..., :coarse] * 4 ** torch.arange(coarse)).sum(-1))
    assert torch.equal(s2, (digits[..., coarse:] * 4 ** torch.arange(digits.shape[-1] - coarse)).sum(-1))
    (_, recon), loss, values, ids = tokenizer(x)
    assert loss == 0 and torch.equal(ids, tokenizer.encode(x)) and torch.equal(ids, s1 + (s2 << tokenizer.s1_bits))
    assert set(values.unique().mul(3).round().tolist()) <= {-3.0, -1.0, 1.0, 3.0}
    torch.testing.assert_close(tokenizer.decode(ids), recon, rtol=1e-4, atol=1e-5)
    model = Kronos(**MODEL).eval()
    weights = prepare_weights(tokenizer, model, 32, torch.float32, 9)
    with torch.inference_mode():
        assert all(torch.equal(one, other) for one, other in zip(encode(weights.tokenizer, x), (s1, s2)))
        values = F.embedding(s1, weights.tokenizer.coarse) + F.embedding(s2, weights.tokenizer.fine)
        expected = tokenizer.post_quant_embed(tokenizer.values(s1, s2))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_training_with_a_quantizer_of_one_s_own(store, tmp_path):
    """Processes that train and forecast load it; a checkpoint says which it is, and not where; a pickle is whole."""
    stage = {"epochs": 1, "windows_per_epoch": 64, "batch_size": 32, "valid_windows": 32}
    models = []
    for processes in (1, 2):
        finetune = {"output_dir": str(tmp_path / str(processes)), "processes": processes, "tokenizer": stage}
        models.append(make_model(tokenizer=OWN_TOKENIZER, finetune=finetune | {"predictor": stage}))
        models[-1].fit(make_dataset())
    assert same(*models) == [True, True]
    scores = models[0].predict(make_dataset())
    again: KronosModel = pickle.loads(pickle.dumps(models[0]))
    pd.testing.assert_series_equal(again.predict(make_dataset()), scores, check_exact=True)
    best = {name: str(tmp_path / "1" / name / "best") for name in ("tokenizer", "predictor")}
    with pytest.raises(
        ValueError, match=r"its quantizer is code, \{'class': 'FiniteScalarQuantizer'.*a checkpoint cannot"
    ):
        make_model(tokenizer=best["tokenizer"], model=best["predictor"])
    assert "module_path" not in (Path(best["tokenizer"]) / "config.json").read_text()
    given = {"start_from": best["tokenizer"], "quantizer": FSQ}
    loaded = make_model(tokenizer=given, model=best["predictor"], forecast={"processes": 2})
    pd.testing.assert_series_equal(loaded.predict(make_dataset()), scores, check_exact=True)
    other = own(tmp_path, "return given") | {"class": "Own"}
    with pytest.raises(ValueError, match="its quantizer is .*, and the one given"):
        make_model(tokenizer=given | {"quantizer": other}, model=best["predictor"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("return values, loss", ""),
        ("return values[..., :1], loss", "should return values of the shape"),
        ("return values.detach(), loss", "returns values through which no gradient can reach the latent"),
        ("return values + 1, loss", "quantizes a latent to other values than those of its codes"),
        ("return values, latent", "should return values of the shape"),
        ("self.seen = self.seen + 1; return values, loss", "changes its own state as it quantizes"),
    ],
)
def test_a_wrong_quantizer_is_told_as_the_tokenizer_is_made(tmp_path, change, message):
    (tmp_path / "own.py").write_text(
        Path(FSQ["module_path"]).read_text()
        + "\n\nclass Own(FiniteScalarQuantizer):\n    def forward(self, latent):\n"
        + f"        values, loss = super().forward(latent)\n        {change}\n"
        + "    def __init__(self, s1_bits, s2_bits):\n        super().__init__(s1_bits, s2_bits)\n"
        + "        self.register_buffer('seen', torch.zeros(()))\n"
    )
    quantizer = {"class": "Own", "module_path": str(tmp_path / "own.py")}
    if not message:
        KronosTokenizer(**TOKENIZER | {"quantizer": quantizer})
        return
    with pytest.raises(ValueError, match=f"Own {message}"):
        make_model(tokenizer=TOKENIZER | {"quantizer": quantizer})


def test_a_quantizer_where_none_belongs_is_refused(tmp_path):
    folder = KronosTokenizer(**TOKENIZER).save_pretrained(tmp_path / "plain") or tmp_path / "plain"
    with pytest.raises(ValueError, match="it was made without a quantizer of one's own"):
        make_model(tokenizer={"start_from": str(folder), "quantizer": FSQ})
    for wrong in ("FSQ", {"module_path": FSQ["module_path"]}):
        with pytest.raises(ValueError, match="should be a configuration with the keys class"):
            make_model(tokenizer=TOKENIZER | {"quantizer": wrong})


# Record, reader, figure


def test_a_record_of_one_s_own_is_kept_beside_the_others(store):
    record = {"class": "TopTurnoverRecord", "module_path": str(EXAMPLES / "turnover_record.py"), "kwargs": {"topk": 3}}
    model, dataset = make_model(), make_dataset()
    with R.start(experiment_name="own_record"):
        recorder = R.get_recorder()
        SignalRecord(model, dataset, recorder).generate()
        init_instance_by_config(record, recorder=recorder).generate()
        table, scores = recorder.load_object("top_turnover/top_turnover.pkl"), recorder.load_object("pred.pkl")["score"]
    assert recorder.list_metrics()["top_turnover"] == pytest.approx(table["new"].mean())
    first, second = (set(scores.loc[date].nlargest(3).index) for date in scores.index.unique("datetime")[:2])
    assert table["new"].iloc[0] == pytest.approx(len(second - first) / 3)


def test_a_reader_of_one_s_own_reads_what_ingest_does_not(tmp_path, capsys):
    days = pd.bdate_range("2024-01-02", periods=30)
    (tmp_path / "candles").mkdir()
    for name, start in (("AAPL", 100.0), ("MSFT", 300.0)):
        lines = [
            {
                "time": str(day.date()),
                "open": start + i,
                "high": start + i + 2,
                "low": start + i - 1,
                "close": start + i + 1,
            }
            | {"volume": 1000 + i}
            for i, day in enumerate(days)
        ]
        (tmp_path / "candles" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = ["--reader", f"{EXAMPLES / 'json_reader.py'}:JsonLines"]
    arguments = ["ingest", str(tmp_path / "candles"), str(tmp_path / "store")]
    assert main(arguments) == 2 and "holds no file of bars" in capsys.readouterr().err
    assert main([*arguments, *reader]) == 0
    use_market(tmp_path / "store")
    bars = KLineHandler("all").bars()
    assert bars.instruments == ("AAPL", "MSFT") and len(bars) == 60
    np.testing.assert_allclose(bars.values[:30, 3], 101.0 + np.arange(30))
    (tmp_path / "candles" / "AAPL.jsonl").write_text("no json")
    arguments[-1] += "2"
    assert main([*arguments, *reader]) == 2
    assert "AAPL.jsonl: JsonLines fails: ArrowInvalid" in capsys.readouterr().err
    assert main([*arguments, "--reader", "JsonLines"]) == 2
    assert "--reader 'JsonLines' should be FILE.py:CLASS" in capsys.readouterr().err


def test_a_figure_of_one_s_own_is_the_last_of_the_report(store, tmp_path, capsys):
    model, dataset, out = make_model(), make_dataset(), ["--out", str(tmp_path / "out")]
    uri = ["--uri", f"sqlite:///{Path.cwd() / 'mlflow.db'}"]
    with R.start(experiment_name="own_figure"):
        for kind, given in ((SignalRecord, (model, dataset)), (SigAnaRecord, ())):
            kind(*given, recorder=R.get_recorder()).generate()
    figure = ["--figure", f"{EXAMPLES / 'worst_days_figure.py'}:WorstDays"]
    assert main(["compare", "own_figure", *uri, *out, *figure]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("Figures of your own") > page.index("Mean label of the tenths")
    assert "The ten worst days of each run, excess return after costs." in page
    (tmp_path / "own.py").write_text("class Own:\n    def __call__(self, runs):\n        return len(runs)\n")
    assert main(["compare", "own_figure", *uri, *out, "--figure", f"{tmp_path / 'own.py'}:Own"]) == 2
    assert "--figure Own should return a plotly Figure, not a int" in capsys.readouterr().err
    assert main(["compare", "own_figure", *uri, *figure]) == 2
    assert "--figure goes with --out" in capsys.readouterr().err

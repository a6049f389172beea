"""KronosRanker: what it learns, what it may see, and that nothing but data, weights, settings and seed decides it."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import MODEL, TOKENIZER
from tampering import LAST_DAY, tampered
from tiny import LOOKBACK, make_dataset, same_weights, use_market, weights

from kronos_qlib import KronosRanker
from kronos_qlib.data.expressions import sessions_ahead
from kronos_qlib.nn.ranker import KronosRankNetwork
from kronos_qlib.train.job import RankerJob
from kronos_qlib.train.launch import launch
from kronos_qlib.train.stages import _ranks, rank_loss
from kronos_qlib.workflow.ranker import labelled_windows

RANKER = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "valid_days": 10, "checkpoint_every": 4, "log_every": 4}
RESULTS = "history.csv", "best/model.safetensors", "best/config.json", "result.json"


def make_ranker(folder: Path, seed: int = 1, **changes: Any) -> KronosRanker:
    ranker = RANKER | {"output_dir": str(folder)} | changes
    return KronosRanker(TOKENIZER, MODEL, ranker=ranker, device="cpu", dtype="float32", seed=seed)


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "ranker" / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def fitted(market: Path, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> KronosRanker:
    use_market(market)
    ranker = make_ranker(tmp_path_factory.mktemp("ranker") / "whole")
    ranker.fit(make_dataset())
    return ranker


def test_scores_are_a_row_for_each_member_and_day_and_survive_a_pickle(store, fitted):
    dataset = make_dataset()
    scores = fitted.predict(dataset)
    windows = dataset.score_windows("test")
    assert scores.name == "score" and scores.dtype == np.float64 and len(scores) == len(windows)
    assert scores.index.names == ["datetime", "instrument"] and scores.index.is_monotonic_increasing
    assert scores.groupby(level="datetime").nunique().min() > 1
    pd.testing.assert_series_equal(pickle.loads(pickle.dumps(fitted)).predict(dataset), scores, check_exact=True)


@pytest.mark.parametrize("how", ["prices", "no volume", "holes", "membership"])
def test_no_score_sees_what_comes_after_it(store, fitted, market, tmp_path, how):
    before = fitted.predict(make_dataset())
    use_market(tampered(market, tmp_path / "market", how))
    after = fitted.predict(make_dataset())
    seen = before[before.index.get_level_values("datetime") <= LAST_DAY]
    pd.testing.assert_series_equal(after.reindex(seen.index), seen, check_exact=True)


@pytest.mark.slow
def test_neither_training_nor_choice_of_weights_sees_a_bar_after_its_segments(store, market, tmp_path):
    """All bars after valid are taken away: with the labels' embargo the very same weights are trained and chosen."""
    use_market(tampered(market, tmp_path / "market", "holes"))
    segments = {"train": ["2018-01-02", "2018-04-30"], "valid": ["2018-05-01", LAST_DAY]}
    other = make_ranker(tmp_path / "other")
    other.fit(make_dataset(segments=segments))
    use_market(market)
    same = make_ranker(tmp_path / "same")
    same.fit(make_dataset(segments=segments))
    assert results(tmp_path / "other") == results(tmp_path / "same")


def test_the_labels_of_a_segment_end_before_its_last_sessions(store):
    assert sessions_ahead("Ref($close, -2)/Ref($close, -1) - 1") == 2 and sessions_ahead("$close/Ref($close, 3)") == 0
    dataset = make_dataset()
    windows, targets = labelled_windows(dataset, "valid")
    sessions = dataset.handler.dates[dataset.handler.dates <= "2018-06-15"]
    assert windows.dates.max() == sessions[-3].to_numpy() and len(targets) == len(windows)
    close = dataset.handler.fetch(col_set="feature")["close"].unstack()
    label = (close.shift(-2) / close.shift(-1) - 1).stack()
    expected = label.reindex(pd.MultiIndex.from_arrays([windows.dates, windows.instruments]))
    np.testing.assert_allclose(targets, expected, rtol=1e-3, atol=1e-6)


def test_other_dates_and_instruments_do_not_matter(store, fitted):
    whole = fitted.predict(make_dataset())
    part = fitted.predict(make_dataset(), slice("2018-07-05", "2018-07-20"))
    pd.testing.assert_series_equal(whole.loc["2018-07-05":"2018-07-20"], part, check_exact=True)
    names = sorted(whole.index.get_level_values("instrument").unique())[:3]
    few = fitted.predict(make_dataset(instruments=names))
    shared = few.index.intersection(whole.index)
    assert len(shared) and (few[shared] == whole[shared]).all()


@pytest.mark.slow
def test_the_same_seed_trains_the_same_and_another_seed_another(store, fitted, tmp_path):
    again, other = make_ranker(tmp_path / "again"), make_ranker(tmp_path / "other", seed=2)
    for ranker in (again, other):
        ranker.fit(make_dataset())
    assert same_weights(weights(again.rankers[0]), weights(fitted.rankers[0]))
    assert not same_weights(weights(other.rankers[0]), weights(fitted.rankers[0]))


def test_a_training_resumed_from_a_checkpoint_ends_bitwise_as_one_that_never_stopped(store, fitted, tmp_path):
    whole = Path(fitted.settings.ranker.output_dir)
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    (folder / "ranker" / "result.json").unlink()
    newest = sorted((folder / "ranker" / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    ranker = make_ranker(folder)
    ranker.fit(make_dataset())
    assert results(folder) == results(whole)


@pytest.mark.slow
def test_two_processes_train_bitwise_as_one(store, fitted, tmp_path):
    ranker = make_ranker(tmp_path / "two", processes=2)
    job = ranker.job(make_dataset(), tmp_path / "two")
    launch(job, 2)
    assert results(tmp_path / "two") == results(Path(fitted.settings.ranker.output_dir))
    assert same_weights(weights(ranker.rankers[0]), weights(fitted.rankers[0]))


@pytest.mark.slow
def test_an_ensemble_scores_by_the_mean_of_its_rankers_ranks(store, tmp_path):
    ranker = make_ranker(tmp_path / "ensemble", ensemble=2, epochs=1, instruments_per_day=4)
    ranker.fit(make_dataset())
    assert sorted(path.name for path in (tmp_path / "ensemble").glob("ranker*")) == ["ranker_1", "ranker_2"]
    assert not same_weights(*(weights(network) for network in ranker.rankers))
    both, scores = ranker.rankers, ranker.predict(make_dataset())
    ranks = []
    for network in both:
        ranker.rankers = [network]
        ranks.append(ranker.predict(make_dataset()).groupby(level="datetime").rank(pct=True))
    pd.testing.assert_series_equal(scores, ((ranks[0] + ranks[1]) / 2).rename("score"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": "bars"},
        {"volume": False, "pooled_bars": 3},
        {"freeze_blocks": 1, "layer_decay": 0.5},
        {"lora": {"rank": 2}},
        {"loss": "listnet"},
        {"loss": "mse", "patience": 1},
    ],
)
def test_every_way_to_train_changes_the_head_and_loads_again(store, tmp_path, changes):
    if "lora" in changes:
        pytest.importorskip("peft")
    ranker = make_ranker(tmp_path / "run", epochs=1, **changes)
    before = weights(ranker.rankers[0])
    ranker.fit(make_dataset())
    after = weights(ranker.rankers[0])
    assert not np.array_equal(before["rank_head.weight"], after["rank_head.weight"])
    kept = KronosRankNetwork.from_pretrained(tmp_path / "run" / "ranker" / "best")
    assert same_weights(weights(kept), after)
    frozen = [name for name in after if name.startswith("transformer.0.")]
    if "freeze_blocks" in changes:
        assert all(np.array_equal(before[name], after[name]) for name in frozen)
    assert np.isfinite(ranker.predict(make_dataset())).all()


def test_hidden_volume_is_not_seen(store, market, tmp_path):
    ranker = make_ranker(tmp_path / "run", volume=False)
    dataset = make_dataset()
    scores = ranker.predict(dataset)
    other = shutil.copytree(market, tmp_path / "market")
    for path in (other / "features").glob("*/volume.day.bin"):
        content = np.fromfile(path, "<f4")
        content[1:] *= np.random.default_rng(0).uniform(0.5, 2, len(content) - 1)
        content.tofile(path)
    use_market(other)
    pd.testing.assert_series_equal(ranker.predict(make_dataset()), scores, check_exact=True)


def test_a_warm_ranker_begins_with_the_models_weights(store, tmp_path):
    ranker = make_ranker(tmp_path / "run")
    own, model = weights(ranker.rankers[0]), weights(ranker.model)
    shared = [name for name in own if not name.startswith("rank_head.")]
    assert len(shared) > 10 and all(np.array_equal(own[name], model[name]) for name in shared)


@pytest.mark.slow
def test_the_ranks_of_labels_are_learnt(store, tmp_path):
    """The label is the last bar's own return, which a ranker of bars can see: it must come close to all of it."""
    dataset = make_dataset()
    dataset.handler = type(dataset.handler)("demo", label="$close/Ref($close, 1) - 1")
    ranker = make_ranker(tmp_path / "run", inputs="bars", epochs=10, batch_size=4, patience=None, learning_rate=2e-2)
    ranker.fit(dataset)
    label = dataset.prepare("test", col_set="label").iloc[:, 0]
    both = pd.DataFrame({"score": ranker.predict(dataset), "label": label}).dropna()
    rank_ic = both.groupby(level="datetime").apply(lambda day: day["score"].corr(day["label"], method="spearman"))
    assert rank_ic.mean() > 0.7


def test_losses_are_least_for_scores_in_the_order_of_the_labels():
    labels = torch.tensor([0.03, -0.01, 0.0, 0.02, -0.05])
    for kind in ("pearson", "listnet", "mse"):
        right, wrong = (rank_loss(sign * labels / labels.std(), labels, kind) for sign in (1, -1))
        assert right < wrong, kind
    flat = torch.zeros(5, requires_grad=True)
    loss = rank_loss(flat, labels, "pearson")
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, flat)[0]).all()
    assert _ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epoch": 3}, "epoch"),
        ({"loss": "spearman"}, "ranker.loss"),
        ({"freeze_blocks": 9}, "ranker.freeze_blocks"),
        ({"inputs": "candles"}, "ranker.inputs"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named) as error:
        make_ranker(tmp_path / "run", **changes)
    assert "\n" not in str(error.value)


def test_what_cannot_be_trained_is_said_before_the_training(store, tmp_path):
    with pytest.raises(ValueError, match="pooled_bars"):
        make_ranker(tmp_path / "run", pooled_bars=LOOKBACK + 1).fit(make_dataset())
    overlapping = {"train": ["2018-01-02", "2018-05-31"], "valid": ["2018-05-01", "2018-06-15"]}
    with pytest.raises(ValueError, match="ends on 2018-05-31"):
        make_ranker(tmp_path / "run").fit(make_dataset(segments=overlapping))
    assert isinstance(make_ranker(tmp_path / "run").job(make_dataset(), tmp_path / "run"), RankerJob)

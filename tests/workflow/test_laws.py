"""Laws of the scores: no look-ahead, and nothing but bars, weights, settings and seed decides them.

The networks of these tests have 256 and 16 codes, so that a draw has more candidates than are looked at first.
"""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forks import environment
from qlib.workflow import R
from tampering import LAST_DAY, tampered
from tiny import MODEL, SEGMENTS, STAGE, TOKENIZER, finetune, make_dataset, make_model, use_market

from kronos_qlib import KronosModel
from kronos_qlib.data.windows import Windows, normalise
from kronos_qlib.forecast.engine.sampling import draw

BITS = {"s1_bits": 8, "s2_bits": 4}
WIDE = {"tokenizer": TOKENIZER | BITS, "model": MODEL | BITS}


def scores_of(market: Path, **changes) -> pd.Series:
    use_market(market)
    return make_model(**WIDE | changes).predict(make_dataset())


@pytest.fixture(scope="module", params=[(b, d) for b in ("auto", 7) for d in ("float32", "bfloat16")], ids=str)
def scored(request, market, workplace):
    """Options of a model, and its scores on the market as it is."""
    batch_size, dtype = request.param
    options = {"dtype": dtype, "forecast": {"batch_size": batch_size}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return options, scores_of(market, **options)


@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.parametrize("how", ["prices", "no volume", "holes", "membership"])
def test_no_score_sees_what_comes_after_it(store, market, tmp_path, how, scored):
    options, before = scored
    after = scores_of(tampered(market, tmp_path / "tampered", how), **options)
    pd.testing.assert_series_equal(before.loc[:LAST_DAY], after.loc[:LAST_DAY], check_exact=True)
    assert len(before.loc[:LAST_DAY]) > 50
    assert not before.loc[LAST_DAY:].equals(after.loc[LAST_DAY:]), "scores after the day do change"


def test_a_score_does_not_depend_on_how_full_its_batch_is(store):
    """A row may be rounded otherwise in a batch of one, and how full the last batch is depends on later bars."""
    dataset, model = make_dataset(), make_model(**WIDE, forecast={"batch_size": 6})
    whole = model.predict(dataset)
    assert len(whole.loc["2018-06-18":"2018-06-18"]) == 7, "the second batch of that day alone holds one window"
    cut = model.predict(dataset, ("2018-06-18", "2018-06-18"))
    pd.testing.assert_series_equal(whole.loc["2018-06-18":"2018-06-18"], cut, check_exact=True)


def test_a_draw_depends_on_its_own_row_alone():
    """Bfloat16 makes many logits equal; how they are ordered must not follow from what else is in the batch."""
    random = torch.Generator().manual_seed(0)
    peaked = (3 * torch.randn(200, 1, 1024, generator=random)).bfloat16().float()
    flat = torch.zeros(1, 1, 1024)  # needs nearly every token as a candidate, where the others need few
    uniform = torch.rand(201, 5, generator=random)
    alone = draw(peaked, uniform[:200], 1.0, 0, 0.9)
    in_company = draw(torch.cat([peaked, flat]), uniform, 1.0, 0, 0.9)
    assert torch.equal(alone, in_company[:200])


@pytest.mark.filterwarnings("ignore:.*disagree")
def test_the_law_of_no_look_ahead_catches_a_normalisation_that_leaks(store, market, tmp_path, monkeypatch):
    honest = Windows.normalised

    def leaking(self: Windows, rows: np.ndarray):
        """As `normalised`, with mean and scale over one bar more than the lookback where there is one."""
        batch, ends = honest(self, rows), self.ends[rows]
        beyond = np.minimum(ends + 1, len(self.bars) - 1)[:, None]
        bars = np.concatenate([ends[:, None] + np.arange(1 - self.lookback, 1), beyond], axis=1)
        x, mean, scale = normalise(self.bars.values[bars], self.lookback + 1)
        return type(batch)(x[:, :-1], batch.stamp, mean, scale, batch.last_close)

    monkeypatch.setattr(Windows, "normalised", leaking)
    before, after = scores_of(market), scores_of(tampered(market, tmp_path / "tampered", "prices"))
    changed = (before != after).groupby("datetime").any()
    assert not changed.loc[:"2018-07-09"].any() and changed.loc[LAST_DAY], "the last day sees one bar too many"


def agreement(one: pd.Series, other: pd.Series) -> float:
    """The share of equal scores, but for rounding; a single other token moves a score by far more."""
    assert one.index.equals(other.index)
    return float(np.isclose(one, other, rtol=1e-4, atol=1e-6).mean())


def test_the_batch_size_does_not_matter(store):
    dataset = make_dataset()
    usual = make_model(**WIDE).predict(dataset)
    for batch_size in (1, 7, 64):
        other = make_model(**WIDE, forecast={"batch_size": batch_size}).predict(dataset)
        assert agreement(usual, other) >= 0.999, batch_size
    assert agreement(usual, make_model(**WIDE, seed=2).predict(dataset)) < 0.1, "agreement is no matter of course"


def test_a_segment_that_starts_elsewhere_has_the_same_scores(store):
    dataset, model = make_dataset(), make_model(**WIDE)
    whole = model.predict(dataset)
    later = model.predict(dataset, ("2018-07-04", "2018-07-31"))
    assert agreement(whole.loc["2018-07-04":], later) >= 0.999
    assert len(later) > 100


def test_other_instruments_do_not_matter(store):
    model = make_model(**WIDE)
    few = ["DEMO0001", "DEMO0004", "DEMO0005"]  # members throughout
    every, alone = model.predict(make_dataset()), model.predict(make_dataset(instruments=few))
    assert agreement(every[every.index.get_level_values(1).isin(few)], alone) >= 0.999


@pytest.mark.slow
def test_the_same_seed_gives_the_same_scores_and_another_seed_others(store, tmp_path):
    def fitted(name: str, seed: int) -> pd.Series:
        stages = {"tokenizer": STAGE | {"epochs": 1}, "predictor": STAGE | {"epochs": 1}}
        model = make_model(seed=seed, finetune=finetune(tmp_path / name, **stages))
        dataset = make_dataset()
        model.fit(dataset)
        return model.predict(dataset)

    first, again, other = fitted("first", 1), fitted("again", 1), fitted("other", 2)
    pd.testing.assert_series_equal(first, again, check_exact=True)
    assert (first != other).mean() > 0.9


@pytest.mark.slow
def test_the_seed_decides_the_draws_of_the_same_weights(run, store):
    settings = {"tokenizer": str(run.folder / "tokenizer" / "best"), "model": str(run.folder / "predictor" / "best")}
    same, other = (make_model(**settings, seed=seed).predict(run.dataset) for seed in (1, 2))
    pd.testing.assert_series_equal(same, run.scores, check_exact=True)
    assert (other != run.scores).mean() > 0.9


@pytest.mark.slow
def test_asking_twice_gives_the_same(run, store):
    pd.testing.assert_series_equal(run.model.predict(run.dataset), run.scores, check_exact=True)


FRESH_PROCESS = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from qlib.data.dataset.handler import DataHandlerLP
from qlib.workflow import R
from tampering import LAST_DAY, PRICES, day_number, tampered
from tiny import use_market

if __name__ == "__main__":
    market, recorder_id, out = sys.argv[2:]
    use_market(market)
    recorder = R.get_recorder(recorder_id=recorder_id, experiment_name="pickled")
    model, dataset = recorder.load_object("params.pkl"), recorder.load_object("dataset")
    as_loaded = model.predict(dataset)
    dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    set_up = model.predict(dataset)
    assert R.exp_manager.active_experiment is None
    with open(out, "wb") as file:
        pickle.dump((as_loaded, set_up), file)
"""


@pytest.fixture(scope="module")
def pickled(market, workplace, tmp_path_factory) -> tuple[str, pd.Series]:
    """A recorder's id, which holds model and dataset as Qlib's trainer saves them, and the scores before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        use_market(market)
        folder = tmp_path_factory.mktemp("pickled")
        start: KronosModel = make_model(**WIDE)
        start.tokenizer.save_pretrained(folder / "start" / "tokenizer")
        start.model.save_pretrained(folder / "start" / "model")
        model = make_model(
            tokenizer=str(folder / "start" / "tokenizer"),
            model=str(folder / "start" / "model"),
            finetune=finetune(folder / "out"),
        )
        dataset = make_dataset()
        with R.start(experiment_name="pickled"):
            model.fit(dataset)
            R.save_objects(**{"params.pkl": model})
            dataset.config(dump_all=False, recursive=True)
            R.save_objects(**{"dataset": dataset})
            recorder_id = R.get_recorder().id
        scores = model.predict(dataset)
        shutil.rmtree(folder)
        return recorder_id, scores


@pytest.mark.slow
def test_a_fresh_process_gives_bitwise_the_same_scores(market, workplace, pickled, tmp_path):
    """From the recorder alone, predicting at once and after Qlib's way to set a dataset up for inference."""
    recorder_id, scores = pickled
    script, out = tmp_path / "fresh.py", tmp_path / "scores.pkl"
    script.write_text(FRESH_PROCESS)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(market), recorder_id, str(out)]
    done = subprocess.run(command, cwd=workplace, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    as_loaded, set_up = pickle.loads(out.read_bytes())
    pd.testing.assert_series_equal(as_loaded, scores, check_exact=True)
    pd.testing.assert_series_equal(set_up, scores, check_exact=True)
    assert scores.index.get_level_values(0).min() == pd.Timestamp(SEGMENTS["test"][0])

"""A cache of codes changes nothing but the time, is kept as uint16, and goes on after a kill."""

import numpy as np
import pytest
import torch
from small import CPU, TRAIN, assert_same_weights, history, predictor_stage, run, weights

from kronos_qlib.train import code_cache as codes
from kronos_qlib.train.distributed import Compute


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.slow
def test_the_cache_gives_the_same_training_as_encoding_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 150)
    cached, anew = predictor_stage(cache_codes=True, epochs=2), predictor_stage(epochs=2)
    run(cached, tmp_path / "cached")
    run(anew, tmp_path / "anew")
    assert history(tmp_path / "cached") == history(tmp_path / "anew")
    assert_same_weights(weights(cached), weights(anew))
    files = sorted((tmp_path / "cached" / "codes").glob("*/*.npy"))
    assert [np.load(path).shape for path in files] == [(150, 25, 2), (150, 25, 2), (100, 25, 2)]
    assert all(np.load(path).dtype == np.uint16 for path in files)


def test_codes_are_those_of_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 150)
    stage = predictor_stage()
    rows = np.array([399, 0, 151, 149, 150])
    taken = codes.encode_windows(tmp_path, stage.frozen_tokenizer, TRAIN, Compute(CPU)).take(rows)
    with torch.no_grad():
        s1, s2 = stage.frozen_tokenizer.encode(torch.from_numpy(TRAIN.normalised(rows).x), half=True)
    np.testing.assert_array_equal(taken, torch.stack([s1, s2], -1))
    assert len(np.unique(taken)) > 4


@pytest.mark.slow
def test_a_killed_encoding_goes_on_after_the_last_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 150)
    killed, resumed, whole = (predictor_stage(cache_codes=True, epochs=1) for _ in range(3))
    encode, batches = killed.frozen_tokenizer.encode, []

    def encode_until_killed(x, half):
        batches.append(len(x))
        if sum(batches) > 200:
            raise Killed
        return encode(x, half=half)

    killed.frozen_tokenizer.encode = encode_until_killed
    with pytest.raises(Killed):
        run(killed, tmp_path / "killed")
    [first] = (tmp_path / "killed" / "codes").glob("*/*.npy")
    written = first.stat().st_mtime_ns
    run(resumed, tmp_path / "killed")
    run(whole, tmp_path / "whole")
    assert first.stat().st_mtime_ns == written
    assert len(list(first.parent.iterdir())) == 3
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_same_weights(weights(resumed), weights(whole))


def test_a_request_to_stop_is_heeded_within_a_file(tmp_path):
    stage, asked = predictor_stage(), []

    def stopped():
        asked.append(1)
        return len(asked) == 2

    assert codes.encode_windows(tmp_path, stage.frozen_tokenizer, TRAIN, Compute(CPU), stopped) is None
    assert len(asked) == 2 and not [*tmp_path.iterdir()]  # of seven times 64 windows in one file

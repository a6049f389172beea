"""The report of a training: what its figures mean, and that its files hold them."""

import json
from dataclasses import replace

import networks
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread
from walks import random_walks

from kronos_qlib.data.windows import COLUMNS, Windows
from kronos_qlib.evaluation.training_figure import draw_training
from kronos_qlib.evaluation.training_report import (
    TrainingReport,
    codebook_use,
    reconstruction_error,
    write_training_report,
)

CPU = torch.device("cpu")
LOOKBACK, FUTURE, LENGTH = 20, 5, 60
HISTORY = """step,epoch,lr,train_loss,val_loss
2,0,0.001,0.9,
4,0,0.002,0.7,0.8
6,1,0.001,0.5,
8,1,0.0005,0.4,0.6
"""


def make_windows(scale=1.0, jump=False):
    """Windows of two instruments; with `jump`, the last bar of the first window is far outside its lookback."""
    bars = random_walks("AB", LENGTH)
    if jump:
        bars.values[LOOKBACK + FUTURE - 1] *= 10
    bars = replace(bars, values=scale * bars.values)
    ends = np.concatenate([np.arange(LOOKBACK - 1, LENGTH - FUTURE) + i * LENGTH for i in range(2)])
    return Windows(bars, ends, LOOKBACK, FUTURE)


def make_tokenizer(**config):
    tokenizer = networks.make_tokenizer(**config)
    with torch.no_grad():  # far from all codes alike, so that the figures are not those of an even spread
        tokenizer.quant_embed.bias.uniform_(-0.5, 0.5)
    return tokenizer.eval()


@torch.no_grad()
def tokenizer_of_signs():
    """Its first coarse bit is the sign of the normalised close, its first fine bit that of the volume, others are 1."""
    tokenizer = make_tokenizer(n_enc_layers=1, d_model=16)
    for layer in (tokenizer.embed, tokenizer.quant_embed):
        layer.weight.zero_()
        layer.bias.zero_()
    tokenizer.embed.weight[:6, :6] = torch.eye(6)
    tokenizer.quant_embed.bias.fill_(1.0)
    for bit, column in ((0, "close"), (4, "volume")):
        tokenizer.quant_embed.bias[bit] = 0
        tokenizer.quant_embed.weight[bit, COLUMNS.index(column)] = 1
    return tokenizer


@torch.no_grad()
def tokenizer_of_a_constant(value):
    """Whatever the bars, they come back as `value` standard deviations above the mean of the lookback."""
    tokenizer = make_tokenizer()
    tokenizer.head.weight.zero_()
    tokenizer.head.bias.fill_(value)
    return tokenizer


def bars_of(windows):
    """The actual bars of all windows, cut out one by one: float64 [W, T, 6]."""
    cuts = [windows.bars.values[end - LOOKBACK + 1 : end + FUTURE + 1] for end in windows.ends]
    return np.stack(cuts).astype(np.float64)


def by_hand(estimate, actual):
    error = np.abs(estimate - actual)
    return error.mean((0, 1)), np.sqrt((error**2).mean((0, 1)))


def make_folder(path, *stages):
    for stage in stages:
        (path / stage).mkdir(parents=True)
        (path / stage / "history.csv").write_text(HISTORY)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def figure_of(folder, windows):
    """The figure of what `write_training_report` would show, to look into."""
    names = [stage for stage in ("tokenizer", "predictor") if (folder / stage).exists()]
    histories = {name: pd.read_csv(folder / name / "history.csv") for name in names}
    tokenizer = make_tokenizer()
    use, error = codebook_use(tokenizer, windows, CPU), reconstruction_error(tokenizer, windows, CPU)
    return draw_training(TrainingReport(histories, use, error, {"s1": 16, "s2": 16}, "some windows"))


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_perplexity_and_use_are_those_of_the_ids_of_every_bar():
    windows = make_windows()
    x = windows.normalised(np.arange(len(windows))).x
    use = codebook_use(tokenizer_of_signs(), windows, CPU)
    for part, column in (("s1", "close"), ("s2", "volume")):
        p = (x[..., COLUMNS.index(column)] > 0).mean()  # two codes occur, with these chances
        assert use[f"perplexity_{part}"] == pytest.approx(np.exp(-p * np.log(p) - (1 - p) * np.log(1 - p)), rel=1e-9)
        assert use[f"used_{part}"] == 2 / 16


def test_one_code_for_everything_is_a_perplexity_of_one():
    tokenizer = make_tokenizer(s1_bits=4, s2_bits=8)
    with torch.no_grad():
        tokenizer.quant_embed.weight.zero_()
    use = codebook_use(tokenizer, make_windows(), CPU)
    assert use == {"perplexity_s1": 1.0, "perplexity_s2": 1.0, "used_s1": 1 / 16, "used_s2": 1 / 256}


def test_errors_are_those_of_decoded_codes_in_price_units():
    windows, tokenizer = make_windows(), make_tokenizer()
    actual = bars_of(windows)
    mean = actual[:, :LOOKBACK].mean(1, keepdims=True)
    scale = actual[:, :LOOKBACK].std(1, keepdims=True) + 1e-5
    x = torch.from_numpy(np.clip((actual - mean) / scale, -5, 5).astype(np.float32))
    with torch.no_grad():
        full = tokenizer.decode(tokenizer.encode(x)).numpy()
        coarse = tokenizer(x)[0][0].numpy()
    mae, rmse = by_hand(full * scale + mean, actual)
    mae_s1, _ = by_hand(coarse * scale + mean, actual)
    errors = reconstruction_error(tokenizer, windows, CPU)
    assert tuple(errors.index) == COLUMNS
    level = np.abs(actual).mean((0, 1))
    expected = {
        "mae": mae,
        "rmse": rmse,
        "mae_share": mae / level,
        "mae_s1": mae_s1,
        "mae_s1_share": mae_s1 / level,
    }
    assert list(errors.columns) == list(expected)
    for name, figure in expected.items():
        np.testing.assert_allclose(errors[name], figure, rtol=1e-4, err_msg=name)
    assert (np.abs(mae_s1 / mae - 1) > 1e-3).all()  # the two are told apart


def test_bars_are_compared_as_they_are_not_as_they_were_clipped():
    windows = make_windows(jump=True).take(slice(0, 1))
    assert np.abs(windows.normalised(np.array([0])).x[0, -1]).min() == 5  # the jump is clipped in every column
    actual = bars_of(windows)
    mean, scale = actual[:, :LOOKBACK].mean(1), actual[:, :LOOKBACK].std(1) + 1e-5
    mae, rmse = by_hand((mean + 5 * scale)[:, None], actual)
    errors = reconstruction_error(tokenizer_of_a_constant(5.0), windows, CPU)
    np.testing.assert_allclose(errors["mae"], mae, rtol=1e-6)
    np.testing.assert_allclose(errors["rmse"], rmse, rtol=1e-6)


def test_the_share_does_not_hang_on_the_unit_of_the_data_and_the_error_does():
    one, ten = (reconstruction_error(tokenizer_of_a_constant(1.0), make_windows(scale), CPU) for scale in (1, 10))
    np.testing.assert_allclose(ten["mae"], 10 * one["mae"], rtol=1e-4)
    np.testing.assert_allclose(ten["mae_share"], one["mae_share"], rtol=1e-4)


def test_a_column_of_zeros_has_no_share():
    windows = make_windows()
    windows.bars.values[:, COLUMNS.index("amount")] = 0
    errors = reconstruction_error(make_tokenizer(), windows, CPU)
    assert np.isnan(errors.loc["amount", "mae_share"])
    assert np.isfinite(errors.loc["volume", "mae_share"])
    assert np.isfinite(errors["mae"]).all()


def test_figures_depend_neither_on_the_batch_size_nor_on_dropout():
    windows, tokenizer = make_windows(), make_tokenizer(resid_dropout_p=0.5)
    use, errors = codebook_use(tokenizer, windows, CPU), reconstruction_error(tokenizer, windows, CPU)
    assert codebook_use(tokenizer.train(), windows, CPU, batch_size=7) == pytest.approx(use, rel=1e-9)
    again = reconstruction_error(tokenizer.train(), windows, CPU, batch_size=7)
    pd.testing.assert_frame_equal(again, errors, rtol=1e-4)


def test_no_windows_are_refused():
    none = make_windows().take(slice(0, 0))
    for judge in (codebook_use, reconstruction_error):
        with pytest.raises(ValueError, match="no windows to measure the tokenizer on"):
            judge(make_tokenizer(), none, CPU)


@pytest.mark.parametrize("stages", [("tokenizer", "predictor"), ("tokenizer",), ("predictor",), ()])
def test_the_files_hold_the_figures_whatever_stages_there_are(tmp_path, stages):
    folder, windows = make_folder(tmp_path / "run", *stages), make_windows()
    paths, metrics = write_training_report(folder, make_tokenizer(), windows, CPU)
    assert sorted(paths) == sorted(path for path in folder.iterdir() if path.is_file())  # no drafts are left
    assert {path.name for path in paths} == {"training.png", "reconstruction.csv", "codebook.json"}
    errors = pd.read_csv(folder / "reconstruction.csv", index_col="column")
    use = json.loads((folder / "codebook.json").read_text())
    told = {f"codebook.{name}": value for name, value in use.items()}
    told |= {f"reconstruction.{column}.{name}": errors.loc[column, name] for column in COLUMNS for name in errors}
    assert metrics == pytest.approx(told, rel=1e-12)
    assert metrics["codebook.perplexity_s1"] == codebook_use(make_tokenizer(), windows, CPU)["perplexity_s1"]
    picture = imread(folder / "training.png")
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05  # not an empty sheet


@pytest.mark.parametrize(
    ("stages", "headings"),
    [
        (("tokenizer", "predictor"), ["Stage 1: tokenizer", "Stage 2: predictor"]),
        (("predictor",), ["Stage 2: predictor"]),
        ((), []),
    ],
)
def test_the_figure_has_the_stages_that_were_trained(tmp_path, stages, headings):
    drawn = panels(figure_of(make_folder(tmp_path / "run", *stages), make_windows()))
    assert [title for title in drawn if title.startswith("Stage")] == headings
    assert {"Use of the codes", "Reconstruction error"} <= set(drawn)


def test_the_curves_are_those_of_the_history_and_the_best_epoch_is_named(tmp_path):
    axes = panels(figure_of(make_folder(tmp_path / "run", "predictor"), make_windows()))["Stage 2: predictor"]
    training, validation, _ = (line.get_xydata().tolist() for line in axes.lines)
    assert training == [[2, 0.9], [4, 0.7], [6, 0.5], [8, 0.4]]
    assert validation == [[4, 0.8], [8, 0.6]]
    assert "validation, best 0.6 after epoch 2" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_steep_start_does_not_press_the_rest_of_a_curve_flat(tmp_path):
    rows = [f"{step},0,0.001,{1000 if step < 4 else 1 + 1 / step}," for step in range(1, 61)]
    folder = make_folder(tmp_path / "run", "tokenizer")
    (folder / "tokenizer" / "history.csv").write_text("\n".join([HISTORY.splitlines()[0], *rows, ""]))
    axes = panels(figure_of(folder, make_windows()))["Stage 1: tokenizer"]
    assert axes.get_ylim()[1] < 2
    assert "from 1e+03" in [text.get_text() for text in axes.texts]


def test_a_damaged_history_is_named_and_leaves_the_report_of_before_as_it_was(tmp_path):
    folder, windows = make_folder(tmp_path / "run", "tokenizer"), make_windows()
    write_training_report(folder, make_tokenizer(), windows, CPU)
    before = contents(folder)
    (folder / "tokenizer" / "history.csv").write_text(HISTORY.replace("0.7", "0.7x"))
    with pytest.raises(ValueError, match=r"tokenizer/history\.csv is damaged"):
        write_training_report(folder, make_tokenizer(), windows.take(slice(0, 3)), CPU)
    assert contents(folder) == before


def test_a_history_without_rows_is_as_good_as_none(tmp_path):
    folder, windows = make_folder(tmp_path / "run", "tokenizer"), make_windows()
    (folder / "tokenizer" / "history.csv").write_text(HISTORY.splitlines()[0] + "\n")
    write_training_report(folder, make_tokenizer(), windows, CPU)
    write_training_report(tmp_path / "none", make_tokenizer(), windows, CPU)
    assert contents(folder) == contents(tmp_path / "none")

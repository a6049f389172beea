"""Windows per second of `sample_paths` beside the authors' generation, and the share it reaches of the machine's limit.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/forecast.py

The other side is the port of the authors' code in sktime 1.2.0 (`auto_regressive_inference`). Both load the same random
weights from one folder and forecast the same windows, in turns, so that a change of the machine's pace meets both.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from machine import MATRIX, cores, describe, matrix_rate, timed
from table import print_row, spread
from torch import Tensor
from work import attention, linears, triangle

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import normalise
from kronos_qlib.forecast import sample_paths
from kronos_qlib.forecast.engine.cuda_graph import GraphedFunction
from kronos_qlib.forecast.engine.generate import generate, path_drawer
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.forecast.engine.weights import prepare_weights
from kronos_qlib.hardware.device import DTYPES, resolve_device, resolve_dtype
from kronos_qlib.nn import zoo
from kronos_qlib.nn.model import CROSS_ATTENTION_HEADS

MAX_CONTEXT = 512
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 0}  # as in the workflows
SHARPEN = 5.0  # the heads' weights times this: entropies near those of a trained network instead of near-uniform ones
AGREEMENT = 1e-3  # greedy outputs in normalised units


@dataclass(frozen=True)
class Case:
    """A network and a shape of forecast, and how many windows each side is timed on at a time.

    on_gpu: the same two numbers for a GPU, which both sides should fill.
    """

    model: str
    lookback: int
    horizon: int
    samples: int
    windows: int
    reference_windows: int
    on_gpu: tuple[int, int]

    @property
    def title(self) -> str:
        return f"{self.model} {self.lookback}+{self.horizon}×{self.samples}"


CASES = [
    Case("mini", 90, 10, 5, 128, 8, (4096, 512)),
    Case("small", 90, 10, 5, 64, 4, (2048, 256)),
    Case("small", 400, 100, 1, 64, 1, (512, 64)),
    Case("mini", 480, 60, 1, 16, 2, (512, 64)),  # slides past MAX_CONTEXT
]


def gflop_per_window(case: Case, max_context: int = MAX_CONTEXT) -> float:
    """Matrix-product work, in 10^9 floating-point operations, that one window needs: a count from shapes.

    What is counted is what the structure of system.md needs and no more: the context once per window, one position per
    sample and step, causal attention over visible pairs only, keys and values alone in the decoder's last layer over
    the context, logits of positions that are drawn from. Embeddings, the fusion projection and the cross-attention's
    query are lookups. Where the window slides, the context and the sample's own positions are run again, as they must
    be, but for what one sample can keep or rearrange (see `forecast/engine/context.py`). Work beyond this counts as
    time lost.
    """
    model, tokenizer = zoo.MODELS[case.model].config, zoo.TOKENIZERS[zoo.MODELS[case.model].tokenizer].config
    length, horizon, samples = case.lookback, case.horizon, case.samples

    bits = tokenizer["s1_bits"] + tokenizer["s2_bits"]
    encoder, decoder = tokenizer["n_enc_layers"] - 1, tokenizer["n_dec_layers"] - 1
    width, d_in = tokenizer["d_model"], tokenizer["d_in"]
    work = encoder * (linears(tokenizer, length) + attention(tokenizer, triangle(length)))
    work += 2 * length * width * (d_in + bits)  # embed, quant_embed

    depth, d = model["n_layers"], model["d_model"]
    cross_kv, cross_out = 4 * d * d, 2 * d * d
    prefix, filled, slid = 0, 0, False
    for step in range(horizon):
        if samples == 1 and length > max_context - step:
            work += slid_step(model, max_context, new=1 if slid else max_context)
            slid = True
            continue
        if step == 0 or prefix != min(length, max_context - step):
            prefix, filled = min(length, max_context - step), 0
            work += depth * (linears(model, prefix) + attention(model, triangle(prefix))) + prefix * cross_kv
        new = step - filled
        pairs = new * prefix + triangle(step) - triangle(filled)
        work += samples * (depth * (linears(model, new) + attention(model, pairs)) + new * cross_kv)
        filled = step
        work += 2 * d * 2 ** model["s1_bits"] * (samples if step else 1)
        work += samples * (attention(model, prefix + step) + cross_out + 2 * d * 2 ** model["s2_bits"])

    kept = min(length, max_context - horizon)
    work += (decoder - 1) * (linears(tokenizer, kept) + attention(tokenizer, triangle(kept))) + kept * 4 * width**2
    own_pairs = horizon * kept + triangle(horizon)
    work += samples * decoder * (linears(tokenizer, horizon) + attention(tokenizer, own_pairs))
    work += 2 * samples * horizon * width * d_in  # head
    return work / 1e9


def slid_step(model: dict[str, Any], seen: int, new: int) -> int:
    """Operations of a step that runs all that is in sight, where the first block's q, k and v are made for some only.

    The cross-attention's query goes through the keys' weights, and what it finds through the values', as it can with
    s2_rotation "reference".
    """
    d = model["d_model"]
    work = model["n_layers"] * (linears(model, seen) + attention(model, triangle(seen))) - 6 * d * d * (seen - new)
    cross = 4 * d * d + CROSS_ATTENTION_HEADS * attention(model, seen) + 2 * d * d
    return work + cross + 2 * d * (2 ** model["s1_bits"] + 2 ** model["s2_bits"])


def save_networks(name: str, folder: Path) -> tuple[Path, Path]:
    """Write new networks of the zoo's shapes, heads sharpened: the folders of tokenizer and model."""
    torch.manual_seed(0)
    entry = zoo.MODELS[name]
    tokenizer, model = KronosTokenizer(**zoo.TOKENIZERS[entry.tokenizer].config), Kronos(**entry.config)
    with torch.no_grad():
        for head in (model.head.proj_s1, model.head.proj_s2):
            head.weight *= SHARPEN
    tokenizer.save_pretrained(folder / name / "tokenizer")
    model.save_pretrained(folder / name / "model")
    return folder / name / "tokenizer", folder / name / "model"


def make_windows(count: int, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised random walks x [count, lookback, 6] and the stamps of business days before and after."""
    random, length = np.random.default_rng(0), case.lookback
    close = 10 * np.exp(np.cumsum(random.normal(0, 0.02, (count, length)), axis=1))
    prices = close[..., None] * (1 + random.normal(0, 0.005, (count, length, 4)))
    volume = 1e6 * np.exp(random.normal(0, 0.5, (count, length, 1)))
    x, _, _ = normalise(np.concatenate([prices, volume, volume * prices.mean(-1, keepdims=True)], -1), length)
    stamp = torch.from_numpy(stamps(pd.bdate_range("2023-01-02", periods=length + case.horizon))).expand(count, -1, -1)
    return torch.from_numpy(x), stamp[:, :length], stamp[:, length:]


def our_forecast(
    networks: tuple[KronosTokenizer, Kronos], case: Case, windows: tuple[Tensor, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Our forecast of some windows, to be called again and again.

    On a CUDA device as one window batch, replayed as `forecast.forecaster` does. Not in it: what a workflow does on the
    host beside it (normalising windows, scores, files), and preparing the weights.
    """
    options = SAMPLING | {"sample_count": case.samples}
    if windows[0].device.type != "cuda":
        return lambda: sample_paths(*networks, *windows, **options, max_context=MAX_CONTEXT, dtype=dtype)
    weights = prepare_weights(*networks, MAX_CONTEXT, dtype, case.lookback)
    sampling = Sampling(**options)
    draw_paths = GraphedFunction(path_drawer(weights, sampling))
    return lambda: generate(weights, *windows, sampling, draw_paths=draw_paths).cpu()


def measure(case: Case, dtype: torch.dtype, device: torch.device, rounds: int, folder: Path) -> dict[str, float | str]:
    """One row of the table: both sides in turns, `rounds` times, after one greedy forecast of each that is compared."""
    from sktime.libs.kronos import kronos as reference

    paths = save_networks(case.model, folder)
    ours = (
        KronosTokenizer.from_pretrained(paths[0]).eval().to(device),
        Kronos.from_pretrained(paths[1]).eval().to(device),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin says that it loads a local folder
        theirs = (
            reference.KronosTokenizer.from_pretrained(str(paths[0])).eval().to(device),
            reference.Kronos.from_pretrained(str(paths[1])).eval().to(device),
        )
    windows = tuple(part.to(device) for part in make_windows(case.windows, case))
    few = tuple(part[: case.reference_windows] for part in windows)

    def reference_forecast(samples: int, top_k: int) -> np.ndarray:
        options = {"T": SAMPLING["temperature"], "top_p": SAMPLING["top_p"], "top_k": top_k, "sample_count": samples}
        mean = reference.auto_regressive_inference(*theirs, *few, MAX_CONTEXT, case.horizon, **options)
        return mean[:, -case.horizon :]  # it returns the context's reconstruction too

    # In float32 whatever the dtype.
    greedy = sample_paths(*ours, *few, top_k=1, max_context=MAX_CONTEXT)[:, 0].cpu().numpy()
    distance = float(np.abs(greedy - reference_forecast(samples=1, top_k=1)).max())

    forecast = our_forecast(ours, case, windows, dtype)
    for _ in range(
        3 if device.type == "cuda" else 1
    ):  # so that memory, and the record, are there before the clock runs
        forecast()
    our_rates, their_rates, products = [], [], []
    for _ in range(rounds):
        our_rates.append(case.windows / timed(forecast))
        their_rates.append(case.reference_windows / timed(lambda: reference_forecast(case.samples, SAMPLING["top_k"])))
        products.append(matrix_rate(dtype, device=device))
    rate, work = statistics.median(our_rates), gflop_per_window(case)
    return {
        "case": case.title,
        "GFLOP/window": f"{work:.2f}",
        "authors' windows/s": f"{statistics.median(their_rates):.2f}",
        "our windows/s": f"{rate:.1f}",
        "ratio (min … max)": spread([ours / theirs for ours, theirs in zip(our_rates, their_rates, strict=True)]),
        "GFLOP/s": f"{rate * work:.0f}",
        f"{MATRIX}² GFLOP/s": f"{statistics.median(products):.0f}",
        "share": f"{rate * work / statistics.median(products):.0%}",
        "greedy": f"{distance:.0e}" if distance <= AGREEMENT else f"{distance:.0e} DIFFERS",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = sorted({case.model for case in CASES})
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="(default: all of them)")
    parser.add_argument("--short", action="store_true", help="leave out small 400+100×1 and mini 480+60×1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, help="windows that we forecast in a turn (default: some window batches for each thread)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of our products (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for both sides (default: %(default)s)")
    options = parser.parse_args()
    try:
        import sktime.libs.kronos  # noqa: F401
    except ImportError:
        parser.error("the extra `bench` is not installed: pip install -c constraints.txt -e '.[bench]'")
    torch.set_num_threads(options.threads)
    dtype, device = DTYPES[options.dtype], resolve_device(options.device)

    print(describe("sktime"))
    if options.threads > cores():
        print(f"caution   {options.threads} threads on {cores()} cores: the figures will be poor")
    if dtype is torch.bfloat16 and resolve_dtype("auto", device) is not dtype:
        print("caution   this device does not multiply bfloat16 in hardware: it will be far slower than float32")
    sampling = ", ".join(f"{name} {value:g}" for name, value in SAMPLING.items())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"settings  {where}, {options.threads} threads, {options.dtype}, {sampling}, "
        f"median of {options.rounds} rounds\n"
    )
    agreed = True
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for case in CASES if case.model in options.models and (case.horizon == 10 or not options.short)]
        for number, case in enumerate(cases):
            usual = case.on_gpu if device.type == "cuda" else (case.windows, case.reference_windows)
            windows = options.windows or usual[0]
            case = replace(case, windows=windows, reference_windows=min(windows, usual[1]))
            row = measure(case, dtype, device, options.rounds, Path(folder))
            print_row(row, with_heading=number == 0)
            agreed &= "DIFFERS" not in row["greedy"]
    if not agreed:
        print(f"\nThe two sides' greedy forecasts differ by more than {AGREEMENT:g}: the comparison is worth nothing.")
    return 0 if agreed else 1


if __name__ == "__main__":
    raise SystemExit(main())

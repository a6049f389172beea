"""How fast a KronosRanker scores, beside KronosModel's sampled forecasts with a network of the same shape.

    python benchmarks/rankers.py
    python benchmarks/rankers.py --samples 50 --windows 2000

Both score the same windows of a synthetic demo market with nano's weights, lookback 90; the forecast draws paths of 10
bars as the workflows do. What a score costs does not depend on what the head has learnt, so it is not trained. Each
round times both, one after the other; the ratio is the median over the rounds. The limit of a ranker is one forward
pass of tokenizer and network over the lookback; the forecast needs the same pass and the steps of its samples.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import qlib
from machine import describe

from kronos_qlib import KLineDataset, KLineHandler, KronosModel, KronosRanker
from kronos_qlib.data.demo_market import UNIVERSE, write_demo_market

LOOKBACK, HORIZON = 90, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50, help="sample paths of a forecast (default %(default)s)")
    parser.add_argument("--windows", type=int, default=1000, help="windows scored, at least (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        market = write_demo_market(Path(folder) / "market", instruments=60, days=300)
        qlib.init(provider_uri=str(market), region="cn", kernels=1, logging_level=40)
        dates = KLineHandler(UNIVERSE).dates
        segments = {"train": [dates[0], dates[150]], "test": [dates[151], dates[150 + -(-options.windows // 50)]]}
        dataset = KLineDataset(KLineHandler(UNIVERSE), segments, LOOKBACK, HORIZON)
        forecast = {"sample_count": options.samples, "temperature": 1.0, "top_p": 0.9}
        models = {
            "forecast": KronosModel("nano", "nano", forecast=forecast, device="cpu", dtype="float32"),
            "ranker": KronosRanker("nano", "nano", ranker={"output_dir": folder}, device="cpu", dtype="float32"),
        }
        count = len(dataset.score_windows("test"))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                started = time.perf_counter()
                scores = model.predict(dataset)
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
                assert len(scores) == count and np.isfinite(scores).all()
    for name, taken in seconds.items():
        print(f"{name:<9} {count / statistics.median(taken):8.0f} windows/s")
    ratios = [slow / fast for slow, fast in zip(seconds["forecast"], seconds["ranker"])]
    print(f"the ranker is {statistics.median(ratios):.1f} times as fast as {options.samples} samples × {HORIZON} bars")


if __name__ == "__main__":
    main()

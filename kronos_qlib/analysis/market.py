"""The simple factors and traded amounts of a Qlib store, read in another process: qlib.init is for a whole process.

Every figure of day t is made of bars up to t.
"""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

# Qlib expressions. AMOUNT stands for the value traded, which `_amount` finds an expression for.
FACTORS = {
    "reversal": "Ref($close, 5)/$close",
    "momentum": "$close/Ref($close, 20)",
    "volatility": "Std($close/Ref($close, 1), 20)",
    "volume_change": "Mean($volume, 5)/(Mean($volume, 20)+1e-12)",  # turnover over its own past: no share counts here
    "size": "Log(Mean(AMOUNT, 20)+1)",
}
# Below this a 32-bit float still tells quarters, so that a share count and a share count over a factor differ.
_FINE = 2**21


class MarketError(Exception):
    """A Qlib store cannot be read; the message says why."""


def read_market(
    store: Path, instruments: Sequence[str], first: pd.Timestamp, last: pd.Timestamp, region: str = "cn"
) -> pd.DataFrame:
    """`FACTORS` and the traded amount of `instruments` from `first` to `last`, both included.

    Index (datetime, instrument), sorted; columns the factors' names and `amount`, in the market's currency. Days
    without a bar are missing, what cannot be computed (the first 20 days of an instrument, say) is NaN.

    Raises MarketError if Qlib cannot read the store.
    """
    with TemporaryDirectory() as scratch:
        ask, answer = Path(scratch) / "ask.pkl", Path(scratch) / "answer.pkl"
        ask.write_bytes(pickle.dumps((str(store.resolve()), list(instruments), first, last, region)))
        command = [sys.executable, "-m", "kronos_qlib.analysis.market", str(ask), str(answer)]
        here = Path(__file__).parents[2]  # -m looks in the working directory first: this very package must lie there
        ran = subprocess.run(command, capture_output=True, text=True, cwd=here)
        if ran.returncode:
            reason = ran.stderr.strip().splitlines() or ["no reason given"]
            raise MarketError(f"the Qlib store {store} cannot be read: {reason[-1]}")
        return pd.read_pickle(answer)


def _read(store: str, instruments: list[str], first: pd.Timestamp, last: pd.Timestamp, region: str) -> pd.DataFrame:
    import qlib
    from qlib.data import D

    qlib.init(provider_uri=store, region=region, kernels=1, logging_level=50)
    amount = _amount(Path(store), instruments, first, last)
    fields = [*(expression.replace("AMOUNT", amount) for expression in FACTORS.values()), amount]
    bars = D.features(instruments, fields, start_time=first, end_time=last)
    return bars.set_axis([*FACTORS, "amount"], axis=1).swaplevel().sort_index()


def _amount(store: Path, instruments: list[str], first: pd.Timestamp, last: pd.Timestamp) -> str:
    """The expression of the value traded: $amount if there is one, else from the volume.

    Qlib's convention is a volume divided by the adjustment factor, which the adjusted price cancels. Some stores hold
    plain share counts, whole numbers, instead; there the factor must go.
    """
    from qlib.data import D

    features = store / "features"
    if any(features.glob("*/amount.day.bin")):
        return "$amount"
    if not any(features.glob("*/factor.day.bin")):
        return "($volume*$close)"
    bars = D.features(instruments, ["$volume", "$factor"], start_time=first, end_time=last)
    volume = bars.loc[bars["$volume"].between(1, _FINE) & ((bars["$factor"] - 1).abs() > 0.01), "$volume"]
    counts = len(volume) > 0 and (volume % 1 == 0).mean() > 0.9
    return "($volume*$close/$factor)" if counts else "($volume*$close)"


if __name__ == "__main__":
    pd.to_pickle(_read(*pickle.loads(Path(sys.argv[1]).read_bytes())), sys.argv[2])

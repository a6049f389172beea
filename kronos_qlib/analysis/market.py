"""Factors, amounts and later returns of a Qlib store, read in another process: qlib.init is for a whole process."""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from kronos_qlib.data.factors import FACTORS, amount_expression, read_factors

HORIZONS = 1, 5, 10, 20  # bars over which later returns are read


class MarketError(Exception):
    """A Qlib store cannot be read; the message names the reason."""


def read_market(
    store: Path,
    instruments: Sequence[str],
    first: pd.Timestamp,
    last: pd.Timestamp,
    region: str = "cn",
    freq: str = "day",
) -> pd.DataFrame:
    """Read `FACTORS`, the traded amount and later returns of `instruments` from `first` to `last`, both included.

    Index (datetime, instrument), sorted; columns the factors' names; `amount`, in the market's currency; `return_5` and
    so on for `HORIZONS`: from the next bar's close to the close so many bars after, the usual label for 1. Bars that an
    instrument lacks are missing, what cannot be computed (of the first 20 bars, say) is NaN.

    Raises MarketError if Qlib cannot read the store.
    """
    with TemporaryDirectory() as scratch:
        ask, answer = Path(scratch) / "ask.pkl", Path(scratch) / "answer.pkl"
        ask.write_bytes(pickle.dumps((str(store.resolve()), list(instruments), first, last, region, freq)))
        command = [sys.executable, "-m", "kronos_qlib.analysis.market", str(ask), str(answer)]
        here = Path(__file__).parents[2]  # -m looks in the working directory first: this very package must lie there
        ran = subprocess.run(command, capture_output=True, text=True, cwd=here)
        if ran.returncode:
            reason = ran.stderr.strip().splitlines() or ["no reason given"]
            raise MarketError(f"the Qlib store {store} cannot be read: {reason[-1]}")
        return pd.read_pickle(answer)  # written below, in a scratch folder  # nosec B301


def _read(
    store: str, instruments: list[str], first: pd.Timestamp, last: pd.Timestamp, region: str, freq: str
) -> pd.DataFrame:
    import qlib
    from qlib.data import D

    qlib.init(provider_uri=store, region=region, kernels=1, logging_level=50)
    amount = amount_expression(instruments, first, last, freq)
    table = read_factors([*FACTORS, "amount"], instruments, first, last, amount, freq)
    later = [f"Ref($close, {-1 - bars})/Ref($close, -1) - 1" for bars in HORIZONS]
    returns = D.features(instruments, later, start_time=first, end_time=last, freq=freq)
    return table.join(returns.set_axis([f"return_{bars}" for bars in HORIZONS], axis=1).swaplevel())


if __name__ == "__main__":
    asked = pickle.loads(Path(sys.argv[1]).read_bytes())  # written above, in a scratch folder  # nosec B301
    pd.to_pickle(_read(*asked), sys.argv[2])

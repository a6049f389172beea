"""The Python code that repeats a forecast of the page, to the digit."""

import pandas as pd

from kronos_qlib.web.networks import NamedNetwork
from kronos_qlib.web.schema import ForecastQuestion
from kronos_qlib.web.sources import FoundBars


def forecast_snippet(
    question: ForecastQuestion,
    bars: pd.DataFrame,
    network: NamedNetwork,
    found: FoundBars,
    paths_shown: bool,
) -> str:
    """Write the code of a forecast from these bars; folders are named where `paths_shown`, elsewhere by their names."""
    source = found.source if paths_shown else f"{question.source}:{found.bars.instrument}"
    model = network.source if paths_shown else network.name
    comment = "" if paths_shown else "  # the folder of this name on the server"
    last = str(bars.index[-1])  # so that bars which come later change nothing
    return f"""import pandas as pd

from kronos_qlib.data.calendar import sessions_after_bars
from kronos_qlib.forecast.predictor import possible_bars
from kronos_qlib.ingest.selection import read_instrument
from kronos_qlib.workflow.named_predictor import load_predictor

last = pd.Timestamp({last!r})
bars = read_instrument({source!r}, until=last).bars.loc[:last]{comment}
times = sessions_after_bars(pd.DatetimeIndex(bars.index), {question.horizon}, {found.exchange!r})
bars = bars.iloc[-{len(bars)}:]
predictor, note = load_predictor({model!r})
paths = predictor.predict_paths_batch(
    [bars], [bars.index], [times], {question.horizon}, T={question.temperature!r}, top_k={question.top_k},
    top_p={question.top_p!r}, sample_count={question.samples}, seed={question.seed},
)
paths = possible_bars(paths)[0]  # [samples, bars, columns]: open, high, low, close, volume, amount
close = pd.DataFrame(paths[..., 3].T, times)
print(close.quantile([0.05, 0.25, 0.5, 0.75, 0.95], axis=1).T)
"""

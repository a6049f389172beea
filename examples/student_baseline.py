"""A baseline forecast of one's own: historical volatility with fat tails."""

import numpy as np
from scipy.stats import t

LEVELS = np.array([0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95])


class StudentVolatility:
    """Log returns of Student's t, with the lookback's variance times the step.

    In a workflow, the kwargs of ForecastRecord:

        baselines: [volatility, {class: StudentVolatility, module_path: examples/student_baseline.py, kwargs: {df: 5}}]
    """

    def __init__(self, df: float = 4.0) -> None:
        if df <= 2:
            raise ValueError(f"df should be above 2, for a variance; it is {df}")
        self.df = df

    def __call__(self, context: np.ndarray, horizon: int) -> np.ndarray:
        """Forecast the close: context [W, L, 6] in prices, the close in column 3; quantiles [W, horizon, 7]."""
        close = context[..., 3]
        volatility = np.diff(np.log(close), axis=1).std(axis=1, ddof=1)
        unit = t.ppf(LEVELS, self.df) * np.sqrt((self.df - 2) / self.df)  # of variance 1
        steps = np.sqrt(np.arange(1, horizon + 1))
        return close[:, -1, None, None] * np.exp(volatility[:, None, None] * steps[None, :, None] * unit)

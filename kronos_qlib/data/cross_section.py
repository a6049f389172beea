"""What is left of a day's values beside others, over the instruments of that day."""

import numpy as np
from numpy.typing import NDArray


def residuals(values: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a least-squares fit of values [n] on a constant and columns [n, k]; their mean is 0."""
    values, against = values - values.mean(), against - against.mean(0)
    return values - against @ np.linalg.lstsq(against, values, rcond=None)[0]

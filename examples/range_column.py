"""A column of one's own: how far each bar ranged, smoothed over the bars before it."""

import numpy as np


class SmoothedRange:
    """Log of high over low, averaged exponentially with a half-life in bars.

    In a workflow, the kwargs of KLineHandler, with a tokenizer of seven columns:

        columns: {range: {class: SmoothedRange, module_path: examples/range_column.py, kwargs: {half_life: 5}}}
    """

    def __init__(self, half_life: float = 5.0) -> None:
        if half_life <= 0:
            raise ValueError(f"half_life should be above 0; it is {half_life}")
        self.weight = 1 - 0.5 ** (1 / half_life)

    def __call__(self, bars: np.ndarray) -> np.ndarray:
        """Compute the column of one instrument's bars [N, 6], oldest first: [N], each from the bars up to it."""
        smoothed = np.log(bars[:, 1] / bars[:, 2])
        for row in range(1, len(smoothed)):
            smoothed[row] = smoothed[row - 1] + self.weight * (smoothed[row] - smoothed[row - 1])
        return smoothed

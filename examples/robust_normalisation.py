"""A normalisation of one's own: by median and interquartile range, which a single wild bar does not move."""

import numpy as np


class MedianAndRange:
    """Subtract the median of each column over the lookback, and divide by its interquartile range over 1.349.

    In a workflow, task.dataset.kwargs; a network has to be fine-tuned on it:

        normalisation: {class: MedianAndRange, module_path: examples/robust_normalisation.py}
    """

    def __call__(self, bars: np.ndarray) -> np.ndarray:
        """Say how windows are normalised: bars of lookbacks [B, L, D]; what to subtract and to divide by [B, 2, D]."""
        low, middle, high = np.quantile(bars, [0.25, 0.5, 0.75], axis=1)
        scale = (high - low) / 1.349  # the standard deviation of a normal distribution
        return np.stack([middle, np.where(scale > 0, scale, np.maximum(np.abs(middle), 1e-12))], axis=1)

"""A score of one's own: what the paths end up at, less what is lost on the way."""

import numpy as np


class UpsideLessDrawdown:
    """Mean return at the horizon less `aversion` times the mean deepest fall from the highest close before it.

    In a workflow, task.model.kwargs:

        score: {class: UpsideLessDrawdown, module_path: examples/upside_score.py, kwargs: {aversion: 0.5}}
        forecast: {keep_paths: true, cache_dir: runs/forecasts}
    """

    def __init__(self, aversion: float = 1.0) -> None:
        self.aversion = aversion

    def __call__(self, paths: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Score windows: paths [B, S, P, 6] and context [B, L, 6] in prices, the close in column 3; [B]."""
        last = context[:, -1, 3]
        close = paths[..., 3] / last[:, None, None]  # [B, S, P], ratios to the last close
        start = np.ones((*close.shape[:2], 1))
        highest = np.maximum.accumulate(np.concatenate([start, close], axis=2), axis=2)[..., 1:]
        fall = (1 - close / highest).max(axis=2)
        return (close[..., -1] - 1).mean(axis=1) - self.aversion * fall.mean(axis=1)

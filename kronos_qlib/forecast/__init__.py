"""Windows → sample paths → scores.

`run.forecast` forecasts all windows of a `task.Task`: it reads finished chunks from the `chunk_store`, and has a
`forecaster.Forecaster` compute the others, here, in `processes` of this machine or on a `ray_cluster`. The forecaster
draws paths with the `engine` and makes `scores` and quantiles of them. `run.embed` reads windows in one pass instead:
an `embedding.Embedder` gives the surprise of their last bars and hidden states. `calibration` maps
paths and quantiles. `predictor` forecasts from DataFrames.

Shapes: B windows of a batch, W windows in all, S samples, L lookback (context bars), P horizon (forecast bars), D
columns of a bar, d width of a network, V tokens of a vocabulary.
"""

from kronos_qlib.forecast.engine.generate import sample_paths

__all__ = ["sample_paths"]

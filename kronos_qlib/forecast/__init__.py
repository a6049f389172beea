"""Windows → sample paths → scores: random numbers, sampling, cached generation, the predictor."""

from kronos_qlib.forecast.engine.generate import sample_paths

__all__ = ["sample_paths"]

"""A calibration whose numbers are made up, for networks that a test has."""

from kronos_qlib.forecast.calibration import GRID, Calibration, FittedOn, ForecastIdentity

IDENTITY = {"tokenizer": "a", "model": "b", "temperature": 1.0, "top_k": 0, "top_p": 1.0}
IDENTITY |= {"s2_rotation": "aligned", "anchor": False}
FITTED_ON = {"segment": "valid", "freq": "day", "synthetic": True, "lookback": 90, "samples": 20, "windows": 900}
FITTED_ON |= {"days": 30, "first": "2020-01-01", "last": "2020-03-01", "until": "2020-03-15"}
STEPS = 3


def make_calibration(identity=None, lookback=90, **changes) -> Calibration:
    values = {
        "identity": ForecastIdentity(**IDENTITY | (identity or {})),
        "fitted_on": FittedOn(**FITTED_ON | {"lookback": lookback}),
        "terciles": (0.01, 0.03),
        "slopes": ((0.0, 0.1, 0.2), (0.3, 0.4, 0.5), (0.6, 0.7, 1.0)),
        "spreads": ((0.5, 1.0, 1.5), (2.0, 2.5, 3.0), (1 / 3, 1.1, 0.7)),
        "conformity": tuple(
            tuple(tuple((GRID - 0.6 + 0.1 * band).tolist()) for band in range(3)) for _ in range(STEPS)
        ),
    }
    return Calibration(**values | changes)


def calibration_of(tokenizer, model, **changes) -> Calibration:
    """One that says it was fitted on forecasts of these networks."""
    from kronos_qlib.forecast.predictor import own_weights

    return make_calibration(own_weights(tokenizer, model) | changes.pop("drawn", {}), **changes)

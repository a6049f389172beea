"""Forecasts and trainings judged against the bars that came: measures, calibration, pictures."""

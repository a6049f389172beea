"""Evaluation of forecasts and of trainings against actual bars: measures, baselines, risk, calibration, figures.

Shapes: W forecasts, S samples, H steps of the horizon; B, T, 6 of a window batch. Closes are ratios to the last close.
"""

"""The machine that a run is on: its CPU cores and heap, its devices, the precision of matrix products.

Knows neither pandas nor Qlib.
"""

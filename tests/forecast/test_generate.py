"""Generation agrees with the reference, and a row's path depends on its own key alone."""

import numpy as np
import pytest
import torch

from kronos_qlib.forecast import sample_paths
from kronos_qlib.nn.quantizer import ids_to_signs


def windows(golden, name="x"):
    length = golden.vectors["s1"].shape[1]
    stamp = golden.tensor("stamp")
    return golden.tensor("x"), stamp[:, :length], stamp[:, length:]


def paths(golden, rows=slice(None), **options):
    x, x_stamp, y_stamp = (tensor[rows] for tensor in windows(golden))
    return sample_paths(golden.tokenizer, golden.model, x, x_stamp, y_stamp, **options)


def test_greedy_paths_are_the_reference_forecast(golden):
    golden.close(paths(golden, top_k=1)[:, 0], "greedy")


def test_the_window_slides_as_in_the_reference(golden):
    limit = {"small-bits": 44, "zoo-like": 512, "fixed-time": 26}[golden.folder.name]
    golden.close(paths(golden, top_k=1, max_context=limit)[:, 0], "greedy_sliding")

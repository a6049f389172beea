"""The two networks, tokenizer and model: layers, quantizer, checkpoints, and the zoo of published weights.

No file of this room imports pandas or Qlib: processes that train and forecast stay small.

Shapes: B windows, T bars (or their codes) in a window, D columns of a bar (`d_in`), d width (`d_model`), H heads.
"""

from kronos_qlib.nn.model import Kronos
from kronos_qlib.nn.tokenizer import KronosTokenizer

__all__ = ["Kronos", "KronosTokenizer"]

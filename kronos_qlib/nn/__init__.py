"""The network: layers, quantizer, tokenizer, model, checkpoints and the zoo. Knows neither pandas nor Qlib."""

from kronos_qlib.nn.model import Kronos
from kronos_qlib.nn.tokenizer import KronosTokenizer

__all__ = ["Kronos", "KronosTokenizer"]

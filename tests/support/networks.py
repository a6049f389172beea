"""Networks so small that a forecast or a training takes a second: their settings, and new ones with fixed weights."""

from typing import Any

import torch

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.nn import zoo

_TINY = {"d_model": 16, "ff_dim": 32, "n_heads": 2, "s1_bits": 4, "s2_bits": 4}
TOKENIZER = zoo.TOKENIZERS["nano"].config | _TINY | {"n_enc_layers": 2, "n_dec_layers": 2}
MODEL = zoo.MODELS["nano"].config | _TINY | {"n_layers": 1, "ffn_dropout_p": 0.1}


def make_tokenizer(**config: Any) -> KronosTokenizer:
    torch.manual_seed(0)
    return KronosTokenizer(**(TOKENIZER | config))


def make_networks(tokenizer: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> tuple:
    """A tokenizer and a model, whose weights are drawn one after the other from one seed."""
    return make_tokenizer(**(tokenizer or {})), Kronos(**(MODEL | (model or {})))

"""Matrix-product work of the networks' parts in floating-point operations, counted from shapes.

A product [m, k] × [k, n] is 2 m k n. `config` is a network's constructor arguments, as in `zoo`.
"""

from typing import Any


def linears(config: dict[str, Any], positions: int) -> int:
    """The linear layers of one block: q, k, v, out and the three of SwiGLU."""
    return 2 * positions * (4 * config["d_model"] ** 2 + 3 * config["d_model"] * config["ff_dim"])


def attention(config: dict[str, Any], pairs: int) -> int:
    """2 d each for q·k and for weights·v of so many visible pairs of a query and a key."""
    return 4 * pairs * config["d_model"]


def triangle(positions: int) -> int:
    """Visible pairs of causal attention."""
    return positions * (positions + 1) // 2

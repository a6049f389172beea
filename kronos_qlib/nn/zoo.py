"""The zoo: the published networks by name, and `nano`, a small one of our own whose weights are in this package.

`nano-new` is a new network of nano's shape, to train from scratch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DROPOUT_FREE = {"ffn_dropout_p": 0.0, "attn_dropout_p": 0.0, "resid_dropout_p": 0.0}
BSQ = {"beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05}
TRAINED_UNTIL = "2024-06-30"
SHIPPED = Path(__file__).with_name("shipped")
SHIPPED_NOTE = (
    "nano, which comes with kronos-qlib, is small (1.7 million parameters) and was trained on daily bars of Chinese "
    "shares only: use small or base for what counts"
)


@dataclass(frozen=True)
class ZooEntry:
    """A named network: its constructor's arguments and, if it has weights, where they are and what is known of them."""

    config: dict[str, Any]
    parameters: int
    hub_id: str | None = None
    folder: Path | None = None  # of weights that come with this package
    digests: Mapping[str, str] = field(default_factory=dict)  # of the folder's files, by name
    revision: str | None = None  # the hub commit that was tried; None: the newest
    max_context: int | None = None  # bars of the longest windows that it was trained on
    trained_until: str | None = None  # the last date of the pre-training data
    tokenizer: str | None = None  # a model's tokenizer, by name


def _tokenizer(**changes: Any) -> dict[str, Any]:
    base = {"d_in": 6, "d_model": 256, "n_heads": 4, "ff_dim": 512, "n_enc_layers": 4, "n_dec_layers": 4}
    return base | DROPOUT_FREE | {"s1_bits": 10, "s2_bits": 10} | BSQ | {"group_size": 4} | changes


def _model(n_layers: int, d_model: int, n_heads: int, ff_dim: int, **changes: Any) -> dict[str, Any]:
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "ff_dim": ff_dim}
    dropouts = {"ffn_dropout_p": 0.2, "attn_dropout_p": 0.0, "resid_dropout_p": 0.2, "token_dropout_p": 0.0}
    return {"s1_bits": 10, "s2_bits": 10} | shape | dropouts | {"learn_te": True} | changes


_NANO_TOKENIZER = _tokenizer(d_model=96, ff_dim=192, n_enc_layers=3, n_dec_layers=3, s1_bits=8, s2_bits=8)
_NANO_MODEL = _model(4, 160, 4, 320, s1_bits=8, s2_bits=8, ffn_dropout_p=0.0, resid_dropout_p=0.0)

TOKENIZERS: dict[str, ZooEntry] = {
    "tokenizer-base": ZooEntry(
        _tokenizer(),
        3_958_042,
        hub_id="NeoQuasar/Kronos-Tokenizer-base",
        revision="0e0117387f39004a9016484a186a908917e22426",
        trained_until=TRAINED_UNTIL,
    ),
    "tokenizer-2k": ZooEntry(
        _tokenizer(group_size=5), 3_958_042, hub_id="NeoQuasar/Kronos-Tokenizer-2k", trained_until=TRAINED_UNTIL
    ),
    "nano": ZooEntry(
        _NANO_TOKENIZER,
        376_246,
        folder=SHIPPED / "nano" / "tokenizer",
        digests={
            "config.json": "4d83fc28ffc9e0b37d449651ef4d851b",
            "model.safetensors": "1fe34a2e38d269d74dd4abcf7529fc2b",
        },
        trained_until=TRAINED_UNTIL,
    ),
    "nano-new": ZooEntry(_NANO_TOKENIZER, 376_246),
}

MODELS: dict[str, ZooEntry] = {
    "mini": ZooEntry(
        _model(4, 256, 4, 512),
        4_108_032,
        hub_id="NeoQuasar/Kronos-mini",
        max_context=2048,
        trained_until=TRAINED_UNTIL,
        tokenizer="tokenizer-2k",
    ),
    "small": ZooEntry(
        _model(8, 512, 8, 1024, ffn_dropout_p=0.25, resid_dropout_p=0.25, attn_dropout_p=0.1, token_dropout_p=0.1),
        24_741_376,
        hub_id="NeoQuasar/Kronos-small",
        revision="901c26c1332695a2a8f243eb2f37243a37bea320",
        max_context=512,
        trained_until=TRAINED_UNTIL,
        tokenizer="tokenizer-base",
    ),
    "base": ZooEntry(
        _model(12, 832, 16, 2048),
        102_310_592,
        hub_id="NeoQuasar/Kronos-base",
        max_context=512,
        trained_until=TRAINED_UNTIL,
        tokenizer="tokenizer-base",
    ),
    "nano": ZooEntry(
        _NANO_MODEL,
        1_368_672,
        folder=SHIPPED / "nano" / "model",
        digests={
            "config.json": "80aeee8ea28a1e5d8a994842f7a0103b",
            "model.safetensors": "1a6bb804dca002111cc7807e4a7171f7",
        },
        max_context=100,
        trained_until=TRAINED_UNTIL,
        tokenizer="nano",
    ),
    "nano-new": ZooEntry(_NANO_MODEL, 1_368_672, max_context=512, tokenizer="nano-new"),
}


def published(hub_id: str) -> ZooEntry | None:
    """Return the zoo's entry of a hub id, or None."""
    entries = [*TOKENIZERS.values(), *MODELS.values()]
    return next((entry for entry in entries if entry.hub_id == hub_id), None)

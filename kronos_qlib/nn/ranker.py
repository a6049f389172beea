"""KronosRankNetwork: the body of a Kronos with a head that scores a window, for `KronosRanker`."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Self

from kronos_qlib.nn.checkpoint import Bits, DropoutRate, HubModule, Layers, Width
from kronos_qlib.nn.dropout import Dropout
from kronos_qlib.nn.layers import Block, RMSNorm, check_heads, initialise
from kronos_qlib.nn.model import CodeEmbedding, Kronos, TimeEmbedding

BAR_COLUMNS = 6  # of the bars that take the place of codes
Inputs = Literal["tokens", "bars"]


class KronosRankNetwork(HubModule):
    """Scores windows: the embeddings and blocks of a Kronos, and a linear head on the last bars' hidden states.

    inputs: `tokens` takes the ids of a tokenizer, as a Kronos does; `bars` takes normalised bars through a layer of its
    own. volume: whether its bars have volume and amount; whoever calls it hides them otherwise. pooled_bars: the head
    reads the mean hidden state of so many last bars. The other arguments are those of `Kronos`.
    """

    def __init__(
        self,
        s1_bits: Bits,
        s2_bits: Bits,
        n_layers: Layers,
        d_model: Width,
        n_heads: Width,
        ff_dim: Width,
        ffn_dropout_p: DropoutRate,
        attn_dropout_p: DropoutRate,
        resid_dropout_p: DropoutRate,
        token_dropout_p: DropoutRate,
        learn_te: bool,
        inputs: Inputs,
        volume: bool,
        pooled_bars: Width,
    ) -> None:
        super().__init__()
        check_heads("KronosRankNetwork", d_model, n_heads)
        self.inputs, self.volume, self.pooled_bars = inputs, volume, pooled_bars
        tokens = inputs == "tokens"
        self.embedding = CodeEmbedding(s1_bits, s2_bits, d_model) if tokens else nn.Linear(BAR_COLUMNS, d_model)
        self.time_emb = TimeEmbedding(d_model, learn_te)
        self.token_drop = Dropout(token_dropout_p)
        self.transformer = nn.ModuleList(
            Block(d_model, n_heads, ff_dim, ffn_dropout_p, attn_dropout_p, resid_dropout_p) for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model)
        self.rank_head = nn.Linear(d_model, 1)
        initialise(self, d_model)

    @classmethod
    def on(cls, model: Kronos, inputs: Inputs, volume: bool, pooled_bars: int) -> Self:
        """Make a ranker with the weights of a Kronos; its head, and a layer for bars, are new.

        Their weights are drawn from torch's global random state.
        """
        network = cls(**model.config, inputs=inputs, volume=volume, pooled_bars=pooled_bars)
        own = network.state_dict()
        kept = {name: value for name, value in model.state_dict().items() if name in own}
        if inputs == "bars":
            kept = {name: value for name, value in kept.items() if not name.startswith("embedding.")}
        network.load_state_dict(own | kept)
        return network

    @classmethod
    def _check_sizes(cls, config: dict[str, Any], config_path: Path, weights_path: Path) -> None:
        checked = config if config.get("inputs") == "tokens" else {k: v for k, v in config.items() if "_bits" not in k}
        super()._check_sizes(checked, config_path, weights_path)

    def forward(self, inputs: Tensor, stamp: Tensor) -> Tensor:
        """Score windows: [B] from ids s1 and s2 [B, T, 2], or normalised bars [B, T, 6], and stamps [B, T, 5]."""
        h = self.embedding(inputs[..., 0], inputs[..., 1]) if self.inputs == "tokens" else self.embedding(inputs)
        h = self.token_drop(h + self.time_emb(stamp))
        *below, top = self.transformer
        for block in below:
            h = block(h)
        h = top(h, last=self.pooled_bars)  # the head reads no others
        return self.rank_head(self.norm(h).mean(1)).squeeze(-1)

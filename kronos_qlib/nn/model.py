"""Kronos: the decoder-only transformer that continues a sequence of (s1, s2) codes."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronos_qlib.nn import zoo
from kronos_qlib.nn.checkpoint import Bits, DropoutRate, HubModule, Layers, Width
from kronos_qlib.nn.dropout import Dropout
from kronos_qlib.nn.layers import Attention, Block, RMSNorm, check_heads, initialise

S2Rotation = Literal["reference", "aligned"]
CROSS_ATTENTION_HEADS = 4  # whatever the model's n_heads
MOST_GROUPS = 126  # of a condition: stamps are of one byte
TIME_TABLES = {"minute": 60, "hour": 24, "weekday": 7, "day": 32, "month": 13}  # in the order of a stamp


class FixedEmbedding(nn.Module):
    """A sinusoidal table (Vaswani et al. 2017) that is not trained."""

    def __init__(self, size: int, d_model: int) -> None:
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, d_model, 2).float() / d_model)
        angle = torch.outer(torch.arange(size).float(), frequency)
        self.emb = nn.Embedding(size, d_model)
        self.emb.weight = nn.Parameter(torch.stack([angle.sin(), angle.cos()], -1).flatten(1), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.emb.weight


class TimeEmbedding(nn.Module):
    """The sum of one embedding for each field of a stamp, and for each condition that follows them."""

    def __init__(self, d_model: int, learn_te: bool) -> None:
        super().__init__()
        for field, size in TIME_TABLES.items():
            table = nn.Embedding(size, d_model) if learn_te else FixedEmbedding(size, d_model)
            self.add_module(f"{field}_embed", table)

    def add_conditions(self, groups: Sequence[int], d_model: int) -> None:
        """Add embeddings of conditions, zero at first, which draw no random numbers: the other weights stay the same.

        Args:
            groups: how many each condition has. In a stamp 0 is a group that is not known, 1 the first.
        """
        if groups:
            zeros = (torch.zeros(count + 1, d_model) for count in groups)
            self.conditions = nn.ModuleList(nn.Embedding.from_pretrained(each, freeze=False) for each in zeros)

    def tables(self) -> list[Tensor]:
        """Return the tables [size, d], in the order of a stamp's fields."""
        own = [cast(nn.Embedding, each).weight for each in getattr(self, "conditions", ())]
        return [cast(Tensor, self.get_submodule(f"{field}_embed").weight) for field in TIME_TABLES] + own

    def forward(self, stamp: Tensor) -> Tensor:
        """Embed stamps [..., 5], or more with conditions (int): [..., d]."""
        fields = stamp.long().unbind(-1)
        embedded = [F.embedding(index, table) for index, table in zip(fields, self.tables(), strict=True)]
        return cast(Tensor, sum(embedded))


def _groups(conditions: Any) -> dict[str, int]:
    """Check the argument `conditions`. Raises ValueError."""
    if conditions is None:
        return {}
    if not isinstance(conditions, Mapping) or not conditions:
        raise ValueError("Kronos: conditions should be a mapping of names to numbers of groups, such as {sector: 12}")
    for name, groups in conditions.items():
        if isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= MOST_GROUPS:
            raise ValueError(f"Kronos: conditions: {name} should have 1 … {MOST_GROUPS} groups, not {groups!r}")
    return dict(conditions)


class CodeEmbedding(nn.Module):
    """Fuses the embeddings of the two ids of a bar."""

    def __init__(self, s1_bits: int, s2_bits: int, d_model: int) -> None:
        super().__init__()
        self.emb_s1 = nn.Embedding(2**s1_bits, d_model)
        self.emb_s2 = nn.Embedding(2**s2_bits, d_model)
        self.fusion_proj = nn.Linear(2 * d_model, d_model)
        self.scale = math.sqrt(d_model)

    def forward(self, s1: Tensor, s2: Tensor) -> Tensor:
        return self.fusion_proj(torch.cat([self.emb_s1(s1), self.emb_s2(s2)], dim=-1) * self.scale)


class DependencyLayer(nn.Module):
    """Cross-attention from the s1 embedding of a bar to the context, by which its s2 depends on its s1."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.cross_attn = Attention(d_model, CROSS_ATTENTION_HEADS, attn_dropout_p=0.0, resid_dropout_p=0.0)
        self.norm = RMSNorm(d_model)


class DualHead(nn.Module):
    """The two classifiers over codes."""

    def __init__(self, s1_bits: int, s2_bits: int, d_model: int) -> None:
        super().__init__()
        self.proj_s1 = nn.Linear(d_model, 2**s1_bits)
        self.proj_s2 = nn.Linear(d_model, 2**s2_bits)

    def compute_loss(
        self, s1_logits: Tensor, s2_logits: Tensor, s1_targets: Tensor, s2_targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropies of logits [B, T, 2^bits] and targets [B, T] in nats: their mean, that of s1, of s2."""
        ce_s1 = F.cross_entropy(s1_logits.flatten(0, -2).float(), s1_targets.flatten().long())
        ce_s2 = F.cross_entropy(s2_logits.flatten(0, -2).float(), s2_targets.flatten().long())
        return (ce_s1 + ce_s2) / 2, ce_s1, ce_s2


class Kronos(HubModule):
    """Autoregressive model of K-line codes (Shi et al. 2025, arXiv 2508.02739).

    Ids s1 and s2 are [B, T] int64; a stamp is [B, T, 5]: minute, hour, weekday (Monday 0), day, month of each bar; None
    leaves the embedding of time out. A padding_mask is bool [B, T], true where a position is padding: what is said of
    the others is then what the window without padding would have. Arguments are named and ordered as the authors'.

    conditions: names of what does not change within a window, such as the sector, and how many groups each has; their
    numbers follow the five fields in a stamp. They have embeddings, zero at first. Published networks have none.
    """

    entries = zoo.MODELS
    conditions: Mapping[str, int] = MappingProxyType({})  # of networks pickled before there were any

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
        conditions: Any = None,
    ) -> None:
        super().__init__()
        check_heads("Kronos", d_model, n_heads)
        self.conditions = _groups(conditions)
        check_heads("Kronos (cross-attention)", d_model, CROSS_ATTENTION_HEADS)
        self.s1_bits, self.s2_bits, self.d_model = s1_bits, s2_bits, d_model
        self.embedding = CodeEmbedding(s1_bits, s2_bits, d_model)
        self.time_emb = TimeEmbedding(d_model, learn_te)
        self.token_drop = Dropout(token_dropout_p)
        self.transformer = nn.ModuleList(
            Block(d_model, n_heads, ff_dim, ffn_dropout_p, attn_dropout_p, resid_dropout_p) for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model)
        self.dep_layer = DependencyLayer(d_model)
        self.head = DualHead(s1_bits, s2_bits, d_model)
        initialise(self, d_model)
        self.time_emb.add_conditions(list(self.conditions.values()), d_model)

    @classmethod
    def _least_parameters(cls, config: dict[str, Any]) -> int:
        codes = 2 ** config["s1_bits"] + 2 ** config["s2_bits"]
        return super()._least_parameters(config) + 2 * codes * config["d_model"]

    def forward(
        self,
        s1_ids: Tensor,
        s2_ids: Tensor,
        stamp: Tensor | None = None,
        padding_mask: Tensor | bool | None = None,
        use_teacher_forcing: bool | Tensor = False,
        s1_targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the next s1 [B, T, 2^s1_bits] and of the next s2 [B, T, 2^s2_bits], both causal.

        The s2 query is the embedding of the next s1: s1_targets [B, T] with teacher forcing, otherwise a draw from
        the s1 logits (torch's global random state), as the published fine-tuning does. Earlier versions had no
        padding_mask: true or false in its place is taken for use_teacher_forcing, and what follows for s1_targets.

        Raises:
            ValueError: teacher forcing without s1_targets.
        """
        if isinstance(padding_mask, bool):
            given = use_teacher_forcing if isinstance(use_teacher_forcing, Tensor) else s1_targets
            padding_mask, use_teacher_forcing, s1_targets = None, padding_mask, given
        s1_logits, context = self.decode_s1(s1_ids, s2_ids, stamp, padding_mask)
        if use_teacher_forcing:
            if s1_targets is None:
                raise ValueError("Kronos: use_teacher_forcing needs s1_targets")
            next_s1 = s1_targets
        else:
            probabilities = s1_logits.detach().float().softmax(-1)
            next_s1 = torch.multinomial(probabilities.flatten(0, -2), 1).view(s1_ids.shape)
        query = self.embedding.emb_s1(next_s1)
        return s1_logits, self._s2_logits(context, self.dep_layer.cross_attn(query, context, padding_mask))

    def decode_s1(
        self, s1_ids: Tensor, s2_ids: Tensor, stamp: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the next s1 [B, T, 2^s1_bits] and the context [B, T, d] that they are read from."""
        h = self.embedding(s1_ids, s2_ids)
        h = self.token_drop(h if stamp is None else h + self.time_emb(stamp))
        for block in self.transformer:
            h = block(h) if padding_mask is None else block(h, padding_mask)
        context = self.norm(h)
        return self.head.proj_s1(context), context

    def decode_s2(
        self,
        context: Tensor,
        s1_ids: Tensor,
        padding_mask: Tensor | None = None,
        *,
        s2_rotation: S2Rotation = "reference",
    ) -> Tensor:
        """Return logits of s2 [B, T, 2^s2_bits] given the context [B, T, d] and the next s1.

        s1_ids [B, 1] is one query to the whole context, as in generation: only the last position's logits mean
        anything. s1_ids [B, T] is one query a position, causal, as in training. s2_rotation is about the former: query
        and keys unrotated as published ("reference") or rotated as in training ("aligned").
        """
        if s2_rotation not in get_args(S2Rotation):
            raise ValueError(f"Kronos: s2_rotation is {s2_rotation!r}; it must be one of {get_args(S2Rotation)}")
        query, aligned = self.embedding.emb_s1(s1_ids), s2_rotation == "aligned"
        if s1_ids.shape[1] == 1:
            attended = self.dep_layer.cross_attn.last_query(query, context, aligned, padding_mask)
        else:
            attended = self.dep_layer.cross_attn(query, context, padding_mask)
        return self._s2_logits(context, attended)

    def _s2_logits(self, context: Tensor, attended: Tensor) -> Tensor:
        return self.head.proj_s2(self.dep_layer.norm(context + attended))

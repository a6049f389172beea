"""The two stages of fine-tuning: what each minimises, how it is validated, and the specification of one's training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kronos_qlib.data.windows import COLUMNS, Windows
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.nn.quantizer import MeanCode
from kronos_qlib.nn.ranker import KronosRankNetwork
from kronos_qlib.train.losses import load_loss
from kronos_qlib.train.settings import LearningSettings, PredictorSettings, RankerSettings, TokenizerSettings

VOLUME, AMOUNT = COLUMNS.index("volume"), COLUMNS.index("amount")
LEAST_VARIANCE = 1e-12  # of scores that are all alike


@dataclass(frozen=True)
class Examples:
    """What a stage learns from: B windows of T bars.

    x: normalised bars float32 `[B, T, d_in]`, or codes: ids s1 and s2, `[B, T, 2]`; one of them is None.
    stamp: `[B, T, 5]`. uniforms: uniform numbers float32 `[B, T - 1]` for what is sampled, None in validation.
    targets: the labels of a ranker's windows, float32 `[B]`, None for other stages.
    """

    x: Tensor | None
    codes: Tensor | None
    stamp: Tensor
    uniforms: Tensor | None
    targets: Tensor | None = None

    def to(self, device: torch.device) -> "Examples":
        """Copy to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Examples":
        """Copy to memory that a GPU can fetch while it computes."""
        return self._map(Tensor.pin_memory)

    def copy_rows(self, rows: slice) -> "Examples":
        """Copy some of the windows to memory of their own: where rows begin in memory decides how products round."""
        return self._map(lambda tensor: tensor[rows].clone())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        return Examples(*(None if tensor is None else change(tensor) for tensor in vars(self).values()))


class Stage(Protocol):
    """All that a training asks of a stage; a class with these attributes and methods is a third one.

    name: of its folder, its metrics and in messages. network: what learns. settings: how it learns.
    frozen_tokenizer: the tokenizer whose codes the network learns from, None if it learns from bars. Its weights are
        part of the training's fingerprint.
    cache_codes: encode all training windows before the first step; needs a frozen_tokenizer.
    latent, mean_code, code_length: for a loss that is no mean over windows, but depends on a mean over the whole
        batch; None, None and 0 for others. Each micro-batch then goes through the network in two halves: `latent` of
        its examples, and `loss` of examples, latent and the mean code of the batch (see `MeanCode`), which is the mean
        of the micro-batches' `mean_code(latent)`, float32 `[code_length]`.
    """

    name: str
    network: HubModule
    settings: LearningSettings
    frozen_tokenizer: KronosTokenizer | None
    cache_codes: bool
    latent: Callable[[Examples], Tensor] | None
    mean_code: Callable[[Tensor], Tensor] | None
    code_length: int

    def loss(self, examples: Examples, latent: Tensor | None = None, mean_code: MeanCode | None = None) -> Tensor:
        """Return the training loss of some examples, a scalar: their mean, but for what `mean_code` replaces."""
        ...

    def validation_metrics(self, examples: Examples) -> dict[str, Tensor]:
        """Return means over some examples by name; `val_loss` is the one that decides which weights are best."""
        ...


class TokenizerStage:
    """Stage 1: reconstruct normalised bars from their codes."""

    name = "tokenizer"
    frozen_tokenizer = None
    cache_codes = False

    def __init__(self, tokenizer: KronosTokenizer, settings: TokenizerSettings) -> None:
        self.network, self.settings, self.code_length = tokenizer, settings, tokenizer.bits
        self._own_loss = None if settings.loss is None else load_loss(settings.loss)
        if tokenizer.own_quantizer is not None:  # whose loss is a mean over positions
            self.latent, self.mean_code, self.code_length = None, None, 0  # type: ignore[method-assign, assignment]

    def latent(self, examples: Examples) -> Tensor:
        """Run the first half of the forward pass: [B, T, bits]."""
        return self.network.latent(examples.x)

    def mean_code(self, latent: Tensor) -> Tensor:
        """Return what the BSQ loss of a batch depends on across its micro-batches: [bits]."""
        return self.network.mean_code(latent)

    def loss(self, examples: Examples, latent: Tensor | None = None, mean_code: MeanCode | None = None) -> Tensor:
        """Return the training loss: (MSE coarse + MSE full + BSQ loss) / 2."""
        latent = self.network.latent(examples.x) if latent is None else latent
        (recon_s1, recon), bsq_loss, _, _ = self.network.reconstruct(latent, mean_code)
        if self._own_loss is not None:
            squares = sum((each.float() - examples.x).square().mean(-1) for each in (recon_s1, recon))
            return self._own_loss(squares / 2, examples.x, examples.stamp).mean() + bsq_loss / 2
        return (F.mse_loss(recon_s1.float(), examples.x) + F.mse_loss(recon.float(), examples.x) + bsq_loss) / 2

    def validation_metrics(self, examples: Examples) -> dict[str, Tensor]:
        """Return the mean squared error from all bits, and that from the coarse bits."""
        x, ((recon_s1, recon), _, _, _) = examples.x, self.network(examples.x)
        return {"val_loss": F.mse_loss(recon.float(), x), "val_mse_s1": F.mse_loss(recon_s1.float(), x)}


class PredictorStage:
    """Stage 2: predict the codes of the next bar. The tokenizer is frozen."""

    name = "predictor"
    latent, mean_code, code_length = None, None, 0  # its loss is a mean over windows

    def __init__(self, model: Kronos, tokenizer: KronosTokenizer, settings: PredictorSettings) -> None:
        self.network, self.frozen_tokenizer, self.settings = model, tokenizer.eval(), settings
        self.cache_codes = settings.cache_codes
        self._own_loss = None if settings.loss is None else load_loss(settings.loss)

    def loss(self, examples: Examples, latent: Tensor | None = None, mean_code: MeanCode | None = None) -> Tensor:
        """Return the training loss: mean cross-entropy of s1 and s2, in nats."""
        teacher_forced = self.settings.s1_query == "teacher_forced"
        if self._own_loss is None:
            return self._losses(examples, teacher_forced)[0]
        s1_logits, s2_logits, s1, s2 = self._logits(examples, teacher_forced)
        errors = sum(
            F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
            for logits, targets in ((s1_logits, s1), (s2_logits, s2))
        )
        return self._own_loss(errors / 2, examples.x, examples.stamp).mean()

    def validation_metrics(self, examples: Examples) -> dict[str, Tensor]:
        """Return cross-entropies in nats, causal and with the true s1 as query: mean of s1 and s2, s1, s2."""
        loss, ce_s1, ce_s2 = self._losses(examples, teacher_forced=True)
        return {"val_loss": loss, "val_ce_s1": ce_s1, "val_ce_s2": ce_s2}

    def _losses(self, examples: Examples, teacher_forced: bool) -> tuple[Tensor, Tensor, Tensor]:
        return self.network.head.compute_loss(*self._logits(examples, teacher_forced))

    def _logits(self, examples: Examples, teacher_forced: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits and targets of s1 and s2 of each next bar."""
        s1, s2 = self._codes(examples)
        s1_logits, context = self.network.decode_s1(s1[:, :-1], s2[:, :-1], examples.stamp[:, :-1])
        query = s1[:, 1:] if teacher_forced else sample_codes(s1_logits.detach(), examples.uniforms)
        s2_logits = self.network.decode_s2(context, query)
        return s1_logits, s2_logits, s1[:, 1:], s2[:, 1:]

    @torch.no_grad()
    def _codes(self, examples: Examples) -> tuple[Tensor, Tensor]:
        if examples.codes is not None:
            return examples.codes[..., 0].long(), examples.codes[..., 1].long()
        s1, s2 = self.frozen_tokenizer.encode(examples.x, half=True)
        return s1, s2


class RankStage:
    """Learn to rank the instruments of a day by their labels. The tokenizer is frozen; the ranker of bars has none."""

    latent, mean_code, code_length = None, None, 0  # its loss is a mean over days, and a day is a micro-batch
    cache_codes = False

    def __init__(
        self, network: KronosRankNetwork, tokenizer: KronosTokenizer, settings: RankerSettings, name: str = "ranker"
    ) -> None:
        self.network, self.settings, self.name = network, settings, name
        self.frozen_tokenizer = tokenizer.eval() if network.inputs == "tokens" else None

    def scores(self, examples: Examples) -> Tensor:
        """Score some windows: [B]."""
        return rank_scores(self.network, self.frozen_tokenizer, examples.x, examples.stamp)

    def loss(self, examples: Examples, latent: Tensor | None = None, mean_code: MeanCode | None = None) -> Tensor:
        """Return the training loss of a day, see `RankerSettings.loss`."""
        scores = self.scores(examples).float()
        # Only the estimate of the memory, which asks for no value, gives no targets.
        targets = torch.zeros_like(scores) if examples.targets is None else examples.targets
        return rank_loss(scores, targets, self.settings.loss)

    def validation_metrics(self, examples: Examples) -> dict[str, Tensor]:
        """Return the rank IC of a day and, as `val_loss`, its negative."""
        ranks = torch.stack([_ranks(self.scores(examples).float()), _ranks(examples.targets)])
        rank_ic = torch.corrcoef(ranks)[0, 1].nan_to_num()  # scores that are all alike say nothing: 0
        return {"val_loss": -rank_ic, "val_rank_ic": rank_ic}


def rank_scores(network: KronosRankNetwork, tokenizer: KronosTokenizer | None, x: Tensor, stamp: Tensor) -> Tensor:
    """Score windows of normalised bars x [B, T, D] with their stamps [B, T, 5]: [B].

    The tokenizer is None for a network whose inputs are bars.
    """
    if not network.volume:
        x = x.clone()
        x[..., [VOLUME, AMOUNT]] = 0
    if tokenizer is None:
        return network(x, stamp)
    with torch.no_grad():
        codes = torch.stack(list(tokenizer.encode(x, half=True)), dim=-1)
    return network(codes, stamp)


def rank_loss(scores: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Return the loss of a day's scores [B] against its labels [B], a scalar; see `RankerSettings.loss`."""
    if kind == "listnet":
        return -(F.softmax(_standardise(targets), 0) * F.log_softmax(scores, 0)).sum()
    if kind == "mse":
        return F.mse_loss(scores, _standardise(targets))
    return 1 - (_standardise(scores) * _standardise(_ranks(targets))).mean()


def _standardise(values: Tensor) -> Tensor:
    centred = values - values.mean()
    return centred / (centred.square().mean() + LEAST_VARIANCE).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Rank values [B] from 0, equal ones by the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[inverse]


def sample_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one code per position from its distribution: ids [B, T] from logits [B, T, V] and uniforms [B, T].

    V is the number of codes. The uniform numbers are given, so that a sample depends neither on the other windows nor
    on the process.
    """
    mass = logits.float().softmax(-1).cumsum(-1)
    target = uniforms.unsqueeze(-1) * mass[..., -1:]
    return torch.searchsorted(mass, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


@dataclass(frozen=True, eq=False)
class StageSpecification:
    """What one stage trains, on what and how: what `train_stage` runs, `fingerprint` digests and the dry run previews.

    stage: network and settings. train, valid: windows with their future bars, `valid` all of the segment's.
    seed: decides the order of the windows, dropout and sampling.
    device: where to. dtype: bfloat16 runs the forward pass under autocast.
    micro_batch_size: windows that go through the network at a time (on a CPU in each thread), or auto: a micro-batch
        for every core, or what an estimate finds room for. A resumed training keeps the size that it began with.
    compile: let torch.compile build the training step.
    checkpoint_every: steps between two checkpoints.
    draw_weights: how often each training window is to be drawn, relative to the others: float `[W]` for W training
        windows; None: all alike.
    train_targets, valid_targets: labels of the windows, float32 `[W]`; with them batches are of whole days, by which
        the windows are sorted. None for stages that learn from bars alone.
    start: the folder of the training whose weights this one begins with, to be recorded; None: of none.
    """

    stage: Stage
    train: Windows
    valid: Windows
    seed: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    micro_batch_size: int | str = "auto"
    compile: bool = False
    checkpoint_every: int = 200
    draw_weights: np.ndarray | None = None
    train_targets: np.ndarray | None = None
    valid_targets: np.ndarray | None = None
    start: str | None = None

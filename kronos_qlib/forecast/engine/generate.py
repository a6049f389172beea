"""Sampled generation: every window's context is computed once and shared by its samples.

The two halves, both in `blocks`: `prefill` runs a window's context through the blocks and keeps keys and values per
layer; `extend` runs the samples' own positions against them and against what each sample has generated before. A single
sample that goes beyond max_context shares nothing and keeps no such caches: see `slide`.

Shapes: B windows, S samples, L context bars, P forecast bars; G groups of n samples that share a cache, G · n = B · S,
or a little more where S does not divide well.
"""

import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kronos_qlib.forecast.engine.attention import Layout, extend, prefill
from kronos_qlib.forecast.engine.context import ContextState, Slide
from kronos_qlib.forecast.engine.sampling import Sampling, Spread, draw, uniforms
from kronos_qlib.forecast.engine.weights import Prepared, TokenizerWeights, prepare
from kronos_qlib.hardware.cpu import core_pool
from kronos_qlib.hardware.device import resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.model import TIME_TABLES, S2Rotation
from kronos_qlib.nn.quantizer import signs_to_ids

PART = 32  # windows that one thread of a CPU takes at a time: more leave its caches, fewer make narrow products


def sample_paths(
    tokenizer: KronosTokenizer,
    model: Kronos,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    *,
    sample_count: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_context: int = 512,
    seed: int = 0,
    keys: Sequence[int] | np.ndarray | Tensor | None = None,
    dtype: torch.dtype | str | None = None,
    s2_rotation: S2Rotation = "reference",
    sampling: Spread = "independent",
) -> Tensor:
    """Draw future paths of normalised windows.

    Args:
        x: normalised bars [B, L, d_in], oldest first.
        x_stamp: their stamps [B, L, 5]: minute, hour, weekday (Monday 0), day, month.
        y_stamp: stamps of the bars to forecast [B, P, 5].
        keys: one integer per row; a row's random numbers depend on (seed, key, sample, step) only. Default: 0 … B−1.
        max_context: bars the model sees at most; beyond it the window slides, and every step is a pass over all of it.
        dtype: of the matrix products: float32 (None), bfloat16 or "auto".
        s2_rotation: "reference" as published, "aligned" as trained.
        sampling: "independent", or "stratified": at each step the samples of a row divide the distribution of the next
            token, in the order of its close, into equal strata, one for each. Each is distributed as it would be alone;
            their mean varies less. The numbers of a sample then depend on how many there are.

    Returns:
        float32 [B, sample_count, P, d_in], normalised units, on x's device.

    Raises:
        ValueError: shapes that do not fit together, NaN in x, an option out of range, networks of different bits.
    """
    how = Sampling(sample_count, temperature, top_k, top_p, seed, s2_rotation, sampling)
    x, x_stamp, y_stamp = (torch.as_tensor(values) for values in (x, x_stamp, y_stamp))
    device = next(model.parameters()).device
    net = prepare(tokenizer, model, max_context, resolve_dtype(dtype, device), x.shape[1])
    paths = generate(net, x, x_stamp, y_stamp, how, keys)
    return paths.to(x.device).clone()  # an ordinary tensor: one made in inference mode cannot be worked on


@torch.inference_mode()
def generate(
    net: Prepared,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    sampling: Sampling,
    keys: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    part: int | None = None,
    part_done: Callable[[int], None] = lambda windows: None,
    progress: bool = False,
    drawn: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`sample_paths` with weights that are prepared already.

    Args:
        part: windows that go through the networks together; on a CPU threads take parts side by side. Default: all of
            them, on a CPU a few for each thread. How a window's path is rounded may hang on it and on nothing else.
        part_done: told how many windows have been forecast, part by part.
        progress: show a bar of steps.
        drawn: `part_drawn` of the same weights and sampling, where it is kept from call to call; no steps are shown.
    """
    _check_shapes(net, x, x_stamp, y_stamp)
    batch, horizon = x.shape[0], y_stamp.shape[1]
    keys = np.arange(batch) if keys is None else _as_integers(keys, batch)
    stratified = sampling.sampling == "stratified"
    uniform = torch.from_numpy(uniforms(sampling.seed, keys, sampling.sample_count, horizon, stratified))
    x, x_stamp, y_stamp, uniform = (tensor.to(net.device) for tensor in (x.float(), x_stamp, y_stamp, uniform))
    on_cpu, alone = net.device.type == "cpu", part is None and batch == 1
    if part is None:
        threads = torch.get_num_threads() if on_cpu else 1
        part = -(-batch // (threads * -(-batch // (threads * PART)))) if on_cpu else batch  # as many for every thread
    parts = [slice(start, min(start + part, batch)) for start in range(0, batch, part)]
    with tqdm(total=len(parts) * horizon, desc="forecast", unit="step", disable=not progress) as bar:

        def step_done() -> None:
            with bar.get_lock():
                bar.update()

        draw_part = drawn or part_drawn(net, sampling, step_done)

        def paths(rows: slice) -> Tensor:
            with torch.inference_mode():  # of this thread
                values = draw_part(x[rows], x_stamp[rows], y_stamp[rows], uniform[:, :, rows])
            part_done(rows.stop - rows.start)
            return values

        if not on_cpu or alone:  # a single window has nothing beside it: torch's threads divide its products
            return torch.cat([paths(rows) for rows in parts])
        with core_pool() as each:
            return torch.cat(list(each(paths, parts)))


def part_drawn(
    net: Prepared, sampling: Sampling, step_done: Callable[[], None] = lambda: None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A function of x [B, L, d_in], x_stamp [B, L, 5], y_stamp [B, P, 5] and uniform numbers [P, 2, B, S], on the
    device of the weights, that gives the windows' paths [B, S, P, d_in] and never waits for the device."""
    ranks = net.ranks if sampling.top_k != 1 else (None, None)  # the likeliest token needs no order
    return lambda *inputs: _paths(net, *inputs, sampling, ranks, step_done)


def _paths(
    net: Prepared,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    uniform: Tensor,
    sampling: Sampling,
    ranks: tuple[Tensor, Tensor] | tuple[None, None],
    step_done: Callable[[], None],
) -> Tensor:
    """Paths [B, S, P, d_in] for uniform numbers [P, 2, B, S]."""
    horizon, _, batch, samples = uniform.shape
    length, limit = x.shape[1], net.max_context
    layout = Layout.of(batch, samples, horizon)
    uniform = F.pad(uniform, (0, layout.copies * layout.size - samples))  # what is too much is drawn and dropped
    uniform = uniform.reshape(horizon, 2, layout.groups, layout.size)
    s1, s2 = _encode(net.tokenizer, x)
    time, own_time = net.model.embed_time(x_stamp[:, -limit:]), net.model.embed_time(y_stamp)
    own_time = own_time.repeat_interleave(layout.copies, 0)
    own_s1 = torch.empty(layout.groups, horizon, layout.size, dtype=torch.long, device=net.device)
    own_s2 = torch.empty_like(own_s1)
    like = net.model.cross_kv.weight
    aligned = sampling.s2_rotation == "aligned"
    filters = sampling.temperature, sampling.top_k, sampling.top_p
    state: ContextState | Slide | None = None
    for step in range(horizon):
        prefix = min(length, limit - step)  # context bars still in sight
        goes_on = isinstance(state, Slide) or (state is not None and state.prefix == prefix)
        if not goes_on:  # the first step, or the window slid and positions restart
            inputs = net.model.embed(s1[:, -prefix:], s2[:, -prefix:], time[:, -prefix:])
            if prefix < length and samples == 1:
                state = Slide(net.model, inputs, horizon, limit, aligned)
            else:
                state = ContextState.start(net.model, inputs, layout, layout.mask(prefix, like), aligned)
        if state.filled < step:
            new = slice(state.filled, step)
            state.append(net.model.embed(own_s1[:, new], own_s2[:, new], own_time[:, new, None]))
        own_s1[:, step] = draw(state.s1_logits(), uniform[step, 0], *filters, ranks[0])
        own_s2[:, step] = draw(state.s2_logits(own_s1[:, step]), uniform[step, 1], *filters, ranks[1])
        step_done()
    out = slice(length - min(length, limit - horizon), length)  # of the context, what the decoder still sees
    mask = layout.mask(length - out.start, like)
    paths = _decode(net.tokenizer, (s1[:, out], s2[:, out]), (own_s1, own_s2), layout, mask)
    return paths.unflatten(0, (batch, -1)).transpose(2, 3).flatten(1, 2)[:, :samples]


def _check_shapes(net: Prepared, x: Tensor, x_stamp: Tensor, y_stamp: Tensor) -> None:
    if x.ndim != 3 or x.shape[-1] != net.tokenizer.embed.weight.shape[1] or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, L, {net.tokenizer.embed.weight.shape[1]}]")
    if x_stamp.shape != (*x.shape[:2], 5):
        raise ValueError(f"x_stamp has shape {list(x_stamp.shape)}; x needs {[*x.shape[:2], 5]}")
    if y_stamp.ndim != 3 or y_stamp.shape[0] != x.shape[0] or y_stamp.shape[2] != 5 or y_stamp.shape[1] == 0:
        raise ValueError(f"y_stamp has shape {list(y_stamp.shape)}; expected [{x.shape[0]}, P, 5]")
    if y_stamp.shape[1] >= net.max_context:
        raise ValueError(f"pred_len ({y_stamp.shape[1]}) must be below max_context ({net.max_context})")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values")
    for name, stamp in (("x_stamp", x_stamp), ("y_stamp", y_stamp)):
        for field, (table, column) in zip(TIME_TABLES, zip(net.model.time, stamp.unbind(-1))):
            if not ((column >= 0) & (column < len(table))).all():
                raise ValueError(f"{name} has a {field} outside 0 … {len(table) - 1}")


def _as_integers(keys: Sequence[int] | np.ndarray | Tensor, count: int) -> np.ndarray:
    """The keys modulo 2^64 as int64."""
    values = keys.tolist() if isinstance(keys, (np.ndarray, Tensor)) else keys
    try:
        integers = [operator.index(value) % 2**64 for value in values]
    except TypeError:
        integers = []
    if len(integers) != count:
        raise ValueError(f"keys must hold one integer for each of the {count} rows, not {keys!r}")
    return np.array(integers, np.uint64).view(np.int64)


def _encode(tokenizer: TokenizerWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes s1 and s2 [B, L] of normalised bars [B, L, d_in]."""
    h, _ = prefill(tokenizer.encoder, tokenizer.embed(x).float())
    signs = torch.where(tokenizer.quant_embed(h) > 0, 1.0, -1.0)
    return signs_to_ids(signs[..., : tokenizer.s1_bits]), signs_to_ids(signs[..., tokenizer.s1_bits :])


def _decode(
    tokenizer: TokenizerWeights,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    layout: Layout,
    mask: Tensor,
) -> Tensor:
    """Normalised bars [G, P, n, d_in] of own codes [G, P, n] that follow the shared codes [B, L]."""
    shared, rows = (
        F.embedding(s1, tokenizer.coarse) + F.embedding(s2, tokenizer.fine)
        for s1, s2 in (context, [codes.flatten(1) for codes in own])
    )
    _, caches = prefill(tokenizer.decoder, shared, layout, keys_only_last=True)
    bars = tokenizer.head(extend(tokenizer.decoder, caches, rows, 0, mask, layout.size))
    return bars.unflatten(1, (-1, layout.size))

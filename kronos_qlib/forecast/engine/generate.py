"""Generate sample paths: each window's context is computed once and shared by its samples.

Shapes beside those of `kronos_qlib.forecast`: G groups of n samples that share a cache, G · n = B · S, or a little more
where S does not divide well.
"""

import itertools
import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kronos_qlib.forecast.engine.attention import CacheLayout, extend, prefill
from kronos_qlib.forecast.engine.context import Context, SharedContext, SlidingContext
from kronos_qlib.forecast.engine.sampling import SampleKind, Sampling, TokenFilter, draw, load_filter, uniforms
from kronos_qlib.forecast.engine.weights import NetworkWeights, TokenizerWeights, check_pair, prepare_weights
from kronos_qlib.hardware.cpu import core_pool
from kronos_qlib.hardware.device import check_memory, resolve_dtype
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.model import TIME_TABLES, S2Rotation

PART = 50  # samples of a window that are drawn on a core: fewer make narrow products, and share less of the context
CPU_BATCH = 32  # windows in a window batch of one thread: more leave its caches, fewer make narrow products
BYTES_PER_BAR = 16  # of a path while it is drawn: its random numbers; and 8 a column: float32, twice
CPU = torch.device("cpu")
DrawPaths = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From x [B, L, D], x_stamp [B, L, 5], y_stamp [B, P, 5] and uniform numbers [P, 2, B, S] to paths [B, S, P, D]."""


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
    sampling: SampleKind = "independent",
    anchor: bool = False,
) -> Tensor:
    """Draw sample paths of normalised windows.

    Args:
        x: normalised bars [B, L, d_in], oldest first.
        x_stamp: their stamps [B, L, 5]: minute, hour, weekday (Monday 0), day, month.
        y_stamp: stamps of the bars to forecast [B, P, 5].
        keys: one integer per row; a row's random numbers depend on (seed, key, sample, step) only. Default: 0 … B−1.
        max_context: bars the model sees at most; beyond it the window slides, and each step computes all of it again.
        dtype: of the matrix products: float32 (None), bfloat16 or "auto".
        s2_rotation: "reference" as published, "aligned" as trained.
        sampling: "independent", or "stratified": at each step the samples of a row divide the distribution of the next
            token, ordered by its close, into equal strata, one for each. Each sample has the distribution of an
            independent one; their mean varies less. A sample's numbers then depend on `sample_count`.
        anchor: measure paths from the last bar as the tokenizer decodes it: its error there is taken out of them.

    Returns:
        float32 [B, sample_count, P, d_in], normalised units, on x's device.

    Raises:
        ValueError: shapes that do not fit together, stamps that are no whole numbers, NaN in x, an option out of range,
            networks of different bits, more samples than fit into memory.
    """
    settings = Sampling(sample_count, temperature, top_k, top_p, seed, s2_rotation, sampling, anchor)
    check_pair(tokenizer, model)
    x, x_stamp, y_stamp = (
        _as_tensor(values, name) for values, name in ((x, "x"), (x_stamp, "x_stamp"), (y_stamp, "y_stamp"))
    )
    if x.ndim != 3:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, L, {tokenizer.d_in}]")
    device = next(model.parameters()).device
    weights = prepare_weights(tokenizer, model, max_context, resolve_dtype(dtype, device), x.shape[1])
    paths = generate(weights, x, x_stamp, y_stamp, settings, keys)
    return paths.to(x.device).clone()  # an ordinary tensor: autograd refuses those made in inference mode


@torch.inference_mode()
def generate(
    weights: NetworkWeights,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    sampling: Sampling,
    keys: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda windows: None,
    progress: bool = False,
    report_share: Callable[[float], None] = lambda share: None,
    draw_paths: DrawPaths | None = None,
) -> Tensor:
    """Draw sample paths as `sample_paths` does, with weights that are prepared already.

    Args:
        batch_size: windows that go through the networks together; on a CPU its threads take window batches side by
            side, and with 1 the parts of a window's many samples. Default: all of them, on a CPU a few for each thread.
            It may change how a path is rounded, and nothing else.
        report: called with the number of windows of each window batch when it is forecast.
        progress: show a bar of steps.
        report_share: called in any thread after each step with the share of all steps that is done; an error that it
            raises ends the generation.
        draw_paths: `path_drawer` of the same weights and sampling, where it is kept from call to call; no steps are
            shown or reported then, and samples are not divided.
    """
    _check_shapes(weights, x, x_stamp, y_stamp)
    windows, horizon = x.shape[0], y_stamp.shape[1]
    needed = windows * sampling.sample_count * horizon * (BYTES_PER_BAR + 8 * x.shape[-1])
    check_memory(f"sample_count {sampling.sample_count} ({windows} windows, {horizon} bars)", needed, CPU)
    keys = np.arange(windows) if keys is None else _as_integers(keys, windows)
    stratified = sampling.sampling == "stratified"
    uniform = torch.from_numpy(uniforms(sampling.seed, keys, sampling.sample_count, horizon, stratified))
    x, x_stamp, y_stamp, uniform = (tensor.to(weights.device) for tensor in (x.float(), x_stamp, y_stamp, uniform))
    on_cpu, single = weights.device.type == "cpu", batch_size is None and windows == 1
    if batch_size is None:
        threads = torch.get_num_threads() if on_cpu else 1
        rounds = -(-windows // (threads * CPU_BATCH))
        batch_size = -(-windows // (threads * rounds)) if on_cpu else windows  # as many for every thread
    slides = x.shape[1] + horizon > weights.max_context  # then the context, which parts do not share, is most of it
    divided = on_cpu and batch_size == 1 and draw_paths is None and not slides
    parts = max(1, sampling.sample_count // PART) if divided else 1
    ends = [sampling.sample_count * part // parts for part in range(parts + 1)]
    tasks = [
        (slice(start, min(start + batch_size, windows)), slice(*part))
        for start in range(0, windows, batch_size)
        for part in itertools.pairwise(ends)
    ]
    steps = len(tasks) * horizon
    with tqdm(total=steps, desc="forecast", unit="step", disable=not progress) as bar:
        done = itertools.count(1)

        def report_step() -> None:
            with bar.get_lock():
                bar.update()
            report_share(next(done) / steps)

        draw_batch = draw_paths or path_drawer(weights, sampling, report_step)

        def forecast(task: tuple[slice, slice]) -> Tensor:
            rows, samples = task
            with torch.inference_mode():  # of this thread
                paths = draw_batch(x[rows], x_stamp[rows], y_stamp[rows], uniform[:, :, rows, samples])
            if samples.stop == sampling.sample_count:  # a window is counted once, with its last part
                report(rows.stop - rows.start)
            return paths

        if not on_cpu or (single and parts == 1):  # torch's threads divide the products of a single window
            drawn = [forecast(task) for task in tasks]
        else:
            with core_pool() as map_on_cores:
                drawn = list(map_on_cores(forecast, tasks))
    return torch.cat([torch.cat(drawn[first : first + parts], dim=1) for first in range(0, len(drawn), parts)])


def path_drawer(
    weights: NetworkWeights, sampling: Sampling, report_step: Callable[[], None] = lambda: None
) -> DrawPaths:
    """Return the function that draws the paths of one window batch, on the device of the weights.

    On a GPU it never waits for the device, so that a CUDA graph can hold it. `report_step` is called after each step.
    """
    ranks = weights.ranks if sampling.top_k != 1 else (None, None)  # the likeliest token needs no order
    tokens_filter = None if sampling.filter is None else load_filter(sampling.filter)

    def draw(x: Tensor, x_stamp: Tensor, y_stamp: Tensor, uniform: Tensor) -> Tensor:
        return _draw_paths(weights, x, x_stamp, y_stamp, uniform, sampling, ranks, report_step, tokens_filter)

    return draw


def _draw_paths(
    weights: NetworkWeights,
    x: Tensor,
    x_stamp: Tensor,
    y_stamp: Tensor,
    uniform: Tensor,
    sampling: Sampling,
    ranks: tuple[Tensor, Tensor] | tuple[None, None],
    report_step: Callable[[], None],
    tokens_filter: TokenFilter | None = None,
) -> Tensor:
    """Draw paths [B, S, P, D] with uniform numbers [P, 2, B, S]: encode, step by step s1 and s2, decode."""
    horizon, _, windows, samples = uniform.shape
    length, max_context = x.shape[1], weights.max_context
    layout = CacheLayout.divide(windows, samples, horizon)
    surplus = layout.groups_per_window * layout.group_size - samples  # samples that are drawn and dropped
    uniform = F.pad(uniform, (0, surplus)).reshape(horizon, 2, layout.groups, layout.group_size)
    s1, s2 = encode(weights.tokenizer, x)
    model = weights.model
    time, own_time = model.embed_time(x_stamp[:, -max_context:]), model.embed_time(y_stamp)
    own_time = own_time.repeat_interleave(layout.groups_per_window, 0)
    own_s1 = torch.empty(layout.groups, horizon, layout.group_size, dtype=torch.long, device=weights.device)
    own_s2 = torch.empty_like(own_s1)
    aligned = sampling.s2_rotation == "aligned"
    rules = sampling.temperature, sampling.top_k, sampling.top_p
    context: Context | None = None
    for step in range(horizon):
        prefix = min(length, max_context - step)  # context bars within max_context
        if context is None or not context.serves(prefix):  # the first step, or the window slid
            inputs = model.embed(s1[:, -prefix:], s2[:, -prefix:], time[:, -prefix:])
            if prefix < length and samples == 1:
                context = SlidingContext(model, inputs, horizon, max_context, aligned)
            else:
                context = SharedContext(model, inputs, layout, aligned)
        if context.steps < step:
            new = slice(context.steps, step)
            context.append(model.embed(own_s1[:, new], own_s2[:, new], own_time[:, new, None]))
        own_s1[:, step] = draw(context.s1_logits(), uniform[step, 0], *rules, ranks[0], tokens_filter)
        own_s2[:, step] = draw(context.s2_logits(own_s1[:, step]), uniform[step, 1], *rules, ranks[1], tokens_filter)
        report_step()
    prefix = min(length, max_context - horizon)  # context bars that the decoder sees
    mask = layout.mask(prefix, model.cross_kv.weight)
    shared = s1[:, length - prefix :], s2[:, length - prefix :]
    paths, decoded = _decode(weights.tokenizer, shared, (own_s1, own_s2), layout, mask, sampling.anchor)
    paths = paths.unflatten(0, (windows, -1)).transpose(2, 3).flatten(1, 2)[:, :samples]
    return paths if decoded is None else paths + (x[:, -1] - decoded)[:, None, None]


def _as_tensor(values: object, name: str) -> Tensor:
    """Return an argument of `sample_paths` as a tensor whose values can be read."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} should be a tensor or an array of numbers ({error})") from None
    if tensor.is_meta or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} should hold numbers, not {'nothing' if tensor.is_meta else tensor.dtype}")
    return tensor


def _check_shapes(weights: NetworkWeights, x: Tensor, x_stamp: Tensor, y_stamp: Tensor) -> None:
    if x.ndim != 3 or x.shape[-1] != weights.tokenizer.embed.weight.shape[1] or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, L, {weights.tokenizer.embed.weight.shape[1]}]")
    fields = len(weights.model.time)  # five, and those of conditions
    if x_stamp.shape != (*x.shape[:2], fields):
        raise ValueError(f"x_stamp has shape {list(x_stamp.shape)}; x needs {[*x.shape[:2], fields]}")
    if y_stamp.ndim != 3 or y_stamp.shape[0] != x.shape[0] or y_stamp.shape[2] != fields or y_stamp.shape[1] == 0:
        raise ValueError(f"y_stamp has shape {list(y_stamp.shape)}; expected [{x.shape[0]}, P, {fields}]")
    if y_stamp.shape[1] >= weights.max_context:
        raise ValueError(f"pred_len ({y_stamp.shape[1]}) must be below max_context ({weights.max_context})")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values")
    for name, stamp in (("x_stamp", x_stamp), ("y_stamp", y_stamp)):
        if stamp.is_floating_point():
            raise ValueError(f"{name} should hold whole numbers, not {stamp.dtype}")
        names = [*TIME_TABLES, *("condition" for _ in range(fields - len(TIME_TABLES)))]
        for field, table, column in zip(names, weights.model.time, stamp.unbind(-1)):
            if not ((column >= 0) & (column < len(table))).all():
                raise ValueError(f"{name} has a {field} outside 0 … {len(table) - 1}")


def _as_integers(keys: Sequence[int] | np.ndarray | Tensor, count: int) -> np.ndarray:
    """Return the keys modulo 2^64, as int64."""
    values = keys.tolist() if isinstance(keys, (np.ndarray, Tensor)) else keys
    try:
        integers = [operator.index(value) % 2**64 for value in values]
    except TypeError:
        integers = []
    if len(integers) != count:
        raise ValueError(f"keys must hold one integer for each of the {count} rows, not {keys!r}")
    return np.array(integers, np.uint64).view(np.int64)


def encode(tokenizer: TokenizerWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode normalised bars [B, L, D] as tokens s1 and s2 [B, L]."""
    h, _ = prefill(tokenizer.encoder, tokenizer.embed_bars(x))
    return tokenizer.codes(tokenizer.quant_embed(h))


def _decode(
    tokenizer: TokenizerWeights,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    layout: CacheLayout,
    mask: Tensor,
    with_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """Decode own tokens [G, P, n] that follow the context's tokens [B, L].

    Returns:
        Normalised bars [G, P, n, D], and with `with_last` the context's last one [B, D].
    """
    shared, rows = (
        F.embedding(s1, tokenizer.coarse) + F.embedding(s2, tokenizer.fine)
        for s1, s2 in (context, [tokens.flatten(1) for tokens in own])
    )
    context_out, caches = prefill(tokenizer.decoder, shared, layout, last_keys_only=not with_last)
    bars = tokenizer.project_bars(extend(tokenizer.decoder, caches, rows, 0, mask, layout.group_size))
    last = tokenizer.project_bars(context_out[:, -1]) if with_last else None
    return bars.unflatten(1, (-1, layout.group_size)), last

"""Generation agrees with the reference, and a row's path depends on its own key alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.forecast import sample_paths
from kronos_qlib.forecast.engine import attention as blocks
from kronos_qlib.forecast.engine.generate import _draw_paths, generate
from kronos_qlib.forecast.engine.sampling import Sampling, draw, uniforms
from kronos_qlib.forecast.engine.weights import prepare_weights
from kronos_qlib.nn import zoo

SAMPLING = {"sample_count": 5, "temperature": 0.6, "top_p": 0.9, "seed": 3}


def inputs(golden):
    length, stamp = golden.vectors["s1"].shape[1], golden.tensor("stamp")
    return golden.tensor("x"), stamp[:, :length], stamp[:, length:]


def paths(golden, rows=slice(None), **options):
    return sample_paths(golden.tokenizer, golden.model, *(tensor[rows] for tensor in inputs(golden)), **options)


@torch.no_grad()
def naive_paths(
    tokenizer, model, x, x_stamp, y_stamp, keys, *, max_context, s2_rotation, sample_count, seed, **filters
):
    """Generation as the architecture page has it, without any cache: every step runs all bars of every sample."""
    horizon = y_stamp.shape[1]
    uniform = torch.from_numpy(uniforms(seed, np.asarray(keys), sample_count, horizon)).flatten(2).unsqueeze(-1)
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | filters
    ranks = prepare_weights(tokenizer, model, max_context, torch.float32, x.shape[1]).ranks
    stamp = torch.cat([x_stamp, y_stamp], 1).repeat_interleave(sample_count, 0)
    s1, s2 = tokenizer.encode(x.repeat_interleave(sample_count, 0), half=True)
    for u_s1, u_s2 in uniform:
        seen = stamp[:, : s1.shape[1]][:, -max_context:]
        logits, context = model.decode_s1(s1[:, -max_context:], s2[:, -max_context:], seen)
        new_s1 = draw(logits[:, -1:], u_s1, **filters, rank=ranks[0])
        new_s2 = draw(model.decode_s2(context, new_s1, s2_rotation=s2_rotation)[:, -1:], u_s2, **filters, rank=ranks[1])
        s1, s2 = torch.cat([s1, new_s1], 1), torch.cat([s2, new_s2], 1)
    bars = tokenizer.decode([s1[:, -max_context:], s2[:, -max_context:]], half=True)[:, -horizon:]
    return bars.unflatten(0, (len(x), sample_count))


def test_greedy_paths_are_the_reference_forecast(golden):
    golden.close(paths(golden, top_k=1)[:, 0], "greedy")


def test_the_window_slides_as_in_the_reference(golden):
    limit = {"small-bits": 44, "zoo-like": 512, "fixed-time": 26}[golden.folder.name]
    golden.close(paths(golden, top_k=1, max_context=limit)[:, 0], "greedy_sliding")


def assert_plain(golden, samples=(3,), **options):
    """Generation agrees with the naive one, for each number of samples."""
    keys = range(4, 4 + len(inputs(golden)[0]))
    options |= {"seed": 9, "top_p": 0.95}
    plain = naive_paths(golden.tokenizer, golden.model, *inputs(golden), keys, sample_count=max(samples), **options)
    for count in samples:
        cached = paths(golden, keys=keys, sample_count=count, **options)
        np.testing.assert_allclose(cached, plain[:, :count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("s2_rotation", ["reference", "aligned"])
@pytest.mark.parametrize("max_context", [512, 44, 30])
def test_cached_generation_is_the_plain_one(small, s2_rotation, max_context):
    assert_plain(small, max_context=max_context, s2_rotation=s2_rotation)


@pytest.mark.parametrize("s2_rotation", ["reference", "aligned"])
@pytest.mark.parametrize("slides", ["at once", "from the second step", "at the last step"])
def test_a_single_sample_that_slides_is_the_plain_one(golden, s2_rotation, slides, monkeypatch):
    length, horizon = inputs(golden)[0].shape[1], inputs(golden)[2].shape[1]
    limit = {"at once": length - 10, "from the second step": length, "at the last step": length + horizon - 2}[slides]
    monkeypatch.setattr(blocks, "PREFILL_ROWS", limit)  # a pass for each window
    assert_plain(golden, [1], max_context=limit, s2_rotation=s2_rotation)


def test_samples_that_fit_no_single_cache_are_the_plain_ones(small):
    assert_plain(small, [8, 11, 12], max_context=30, s2_rotation="aligned")


def test_stratified_samples_have_the_same_mean_and_vary_less_about_it(small):
    """Over many rows that are all the same window: what differs between them is their random numbers."""
    repeated = [tensor[:1].expand(400, *tensor.shape[1:]) for tensor in inputs(small)]
    means = {
        sampling: sample_paths(small.tokenizer, small.model, *repeated, sample_count=4, sampling=sampling)[..., 3].mean(
            (1, 2)
        )
        for sampling in ("independent", "stratified")
    }
    independent, stratified = means["independent"], means["stratified"]
    error = (independent.var() / 400 + stratified.var() / 400).sqrt()
    assert abs(independent.mean() - stratified.mean()) < 4 * error
    assert stratified.var() < 0.9 * independent.var()  # of a new network, whose last bar hangs little on the first


@pytest.mark.parametrize("max_context", [512, 44, 30])
@pytest.mark.parametrize("samples", [1, 11])
def test_anchored_paths_lack_the_tokenizer_s_error_of_the_last_bar(small, max_context, samples):
    x, _, y_stamp = inputs(small)
    options = {"sample_count": samples, "seed": 3, "max_context": max_context}
    plain, anchored = paths(small, **options), paths(small, anchor=True, **options)
    seen = min(x.shape[1], max_context - y_stamp.shape[1])
    with torch.no_grad():
        codes = [part[:, -seen:] for part in small.tokenizer.encode(x, half=True)]
        error = small.tokenizer.decode(codes, half=True)[:, -1] - x[:, -1]
    assert error.abs().max() > 0.01
    np.testing.assert_allclose(anchored, plain - error[:, None, None], rtol=1e-4, atol=1e-4)


def test_the_two_rotations_differ(small):
    assert not torch.equal(paths(small, top_k=1), paths(small, top_k=1, s2_rotation="aligned"))


def test_the_same_settings_give_bitwise_the_same_paths_and_another_seed_others(golden):
    assert torch.equal(paths(golden, **SAMPLING), paths(golden, **SAMPLING))
    assert not torch.equal(paths(golden, **SAMPLING), paths(golden, **(SAMPLING | {"seed": 4})))


def test_samples_differ_and_a_sample_does_not_depend_on_how_many_there_are(small):
    five, two = paths(small, **SAMPLING), paths(small, **(SAMPLING | {"sample_count": 2}))
    assert not torch.equal(five[:, 0], five[:, 1])
    np.testing.assert_allclose(five[:, :2], two, rtol=1e-4, atol=1e-4)


def nano_windows(count):
    tokenizer, model = (kind(**entry.config).eval() for kind, entry in nano_kinds())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 40, 6, generator=generator).cumsum(1) / 3
    stamp = torch.stack([torch.randint(0, size, (count, 48), generator=generator) for size in (60, 24, 7, 32, 13)], -1)
    return tokenizer, model, x.clamp(-5, 5), stamp[:, :40], stamp[:, 40:]


def nano_kinds():
    torch.manual_seed(2)
    return (KronosTokenizer, zoo.TOKENIZERS["nano"]), (Kronos, zoo.MODELS["nano"])


@pytest.fixture(scope="module")
def many():
    """128 windows for a new nano network and their paths, with keys of their own."""
    tokenizer, model, *tensors = nano_windows(128)
    keys = np.random.default_rng(0).integers(0, 2**62, 128)
    return tokenizer, model, tensors, keys, sample_paths(tokenizer, model, *tensors, keys=keys, **SAMPLING)


def same_tokens(first, second):
    """The share of forecast bars that agree: another token moves a bar by far more than rounding does."""
    return torch.isclose(first, second, rtol=1e-3, atol=1e-3).all(-1).double().mean().item()


@pytest.mark.parametrize("size", [1, 16, 128])
def test_paths_do_not_depend_on_the_batch_size(many, size):
    tokenizer, model, tensors, keys, whole = many
    some = slice(32 if size == 1 else None)  # one at a time takes its time
    net = prepare_weights(tokenizer, model, 512, torch.float32, tensors[0].shape[1])
    together = generate(net, *(tensor[some] for tensor in tensors), Sampling(**SAMPLING), keys[some], batch_size=size)
    assert same_tokens(together, whole[some]) >= 0.999


def test_paths_do_not_depend_on_the_order_of_the_rows(many):
    tokenizer, model, tensors, keys, whole = many
    order = torch.from_numpy(np.random.default_rng(1).permutation(128))
    shuffled = sample_paths(tokenizer, model, *(t[order] for t in tensors), keys=keys[order.numpy()], **SAMPLING)
    assert same_tokens(shuffled, whole[order]) >= 0.999


def test_without_keys_rows_are_numbered(small):
    assert torch.equal(paths(small, **SAMPLING), paths(small, keys=[0, 1, 2], **SAMPLING))
    assert not torch.equal(paths(small, **SAMPLING), paths(small, keys=[0, 7, 2], **SAMPLING))


def test_keys_are_integers_of_any_size_as_a_list_an_array_or_a_tensor(small):
    expected = paths(small, keys=[1, 2**64 - 3, 5], **SAMPLING)
    for keys in (np.array([1, -3, 5]), torch.tensor([1, -3, 5]), [2**64 + 1, -3, 5]):
        assert torch.equal(paths(small, keys=keys, **SAMPLING), expected)
    with pytest.raises(ValueError, match="keys must hold one integer"):
        paths(small, keys=[1.5, 2.0, 3.0])


class OnOneDevice(TorchDispatchMode):
    """Every operation is on the meta device: a CUDA graph can hold no copy from the host's memory."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), function
        self.operations += 1
        return result


@pytest.mark.slow
@torch.no_grad()  # in inference mode operations that are made of others would be seen whole
@pytest.mark.parametrize(
    ("max_context", "samples", "options"),
    [
        (512, 3, {"top_p": 0.9}),
        (512, 3, {"top_k": 1}),
        (44, 3, {"top_k": 5}),
        (44, 1, {"top_p": 0.9}),
        (44, 1, {"s2_rotation": "reference"}),
    ],
)
def test_no_step_waits_for_the_device(small, max_context, samples, options, monkeypatch):
    """On the meta device tensors have shapes and no values: whatever looks at one from the host is an error there."""
    tokenizer, model = (copy.deepcopy(network).to("meta") for network in (small.tokenizer, small.model))
    x, x_stamp, y_stamp = (tensor.to("meta") for tensor in inputs(small))
    horizon = y_stamp.shape[1]
    uniform = torch.empty(horizon, 2, len(x), samples, device="meta")
    net = prepare_weights.__wrapped__(tokenizer, model, max_context, torch.bfloat16, x.shape[1])
    sampling = Sampling(**{"sample_count": samples, "s2_rotation": "aligned"} | options)
    masks, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **how):
        masks.append((attn_mask, q))
        return attend(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    ranks = net.ranks
    with OnOneDevice() as mode:
        drawn = _draw_paths(net, x, x_stamp, y_stamp, uniform, sampling, ranks, lambda: None)
    assert mode.operations > 100
    assert drawn.shape == (len(x), samples, horizon, x.shape[2]) and drawn.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(drawn.any())  # as a look would be
    # A GPU's kernels want a mask of the queries' precision that begins on an even address.
    seen = [(mask, q) for mask, q in masks if mask is not None]
    assert seen and all(
        mask.dtype == q.dtype and mask.storage_offset() % 8 == mask.stride(0) % 8 == 0 for mask, q in seen
    )


@pytest.mark.parametrize("max_context", [512, 44])
def test_bfloat16_stays_near_float32(small, max_context):
    options = {"top_k": 1, "max_context": max_context}
    half = paths(small, dtype="bfloat16", **options)
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    share = torch.isclose(half[:, :, :3], paths(small, **options)[:, :, :3], atol=0.2, rtol=0.1).double().mean()
    assert share > 0.5  # random weights: a greedy token near a tie may turn, most do not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_count": 0}, "sample_count"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"s2_rotation": "none"}, "s2_rotation"),
        ({"sampling": "antithetic"}, "sampling"),
        ({"keys": [1, 2]}, "keys"),
        ({"max_context": 12}, "pred_len"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_an_option_out_of_range_is_named(small, change, message):
    with pytest.raises(ValueError, match=message):
        paths(small, **change)


def test_nan_in_the_windows_is_refused(small):
    x, x_stamp, y_stamp = inputs(small)
    x = x.clone()
    x[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        sample_paths(small.tokenizer, small.model, x, x_stamp, y_stamp)


def test_networks_with_different_bits_are_refused(small):
    other = Kronos(**(small.model.config | {"s1_bits": 4}))
    with pytest.raises(ValueError, match=r"\(5, 5\) and \(4, 5\)"):
        sample_paths(small.tokenizer, other, *inputs(small))


def test_seeds_may_be_numpy_integers_and_inputs_arrays(small):
    expected = paths(small, **SAMPLING)
    assert torch.equal(paths(small, **(SAMPLING | {"seed": np.int64(3)})), expected)
    arrays = [tensor.numpy() for tensor in inputs(small)]
    assert torch.equal(sample_paths(small.tokenizer, small.model, *arrays, **SAMPLING), expected)


def test_paths_are_an_ordinary_tensor(small):
    result = paths(small, top_k=1)
    result.mul_(2).requires_grad_()
    result.sum().backward()
    assert torch.equal(result.grad, torch.ones_like(result))


def test_a_stamp_out_of_range_is_named(small):
    x, x_stamp, y_stamp = inputs(small)
    y_stamp = y_stamp.clone()
    y_stamp[0, 0, 4] = 13
    with pytest.raises(ValueError, match=r"y_stamp has a month outside 0 … 12"):
        sample_paths(small.tokenizer, small.model, x, x_stamp, y_stamp)

"""Kronos sees no future, and its three cross-attentions are three; a ranker computes what its head reads."""

import pytest
import torch
from networks import MODEL

from kronos_qlib import Kronos
from kronos_qlib.nn.dropout import use_generator
from kronos_qlib.nn.layers import Block
from kronos_qlib.nn.ranker import KronosRankNetwork


def tokens(golden):
    length = golden.vectors["s1"].shape[1]
    return golden.tensor("s1"), golden.tensor("s2"), golden.tensor("stamp")[:, :length]


@pytest.mark.parametrize("training", [True, False])
def test_logits_up_to_a_bar_do_not_change_with_later_bars(golden, training):
    s1, s2, stamp = tokens(golden)
    model = golden.model.train(training)
    cut, later = 15, [tensor.clone() for tensor in (s1, s2, stamp)]
    for tensor in later:
        tensor[:, cut:] = tensor[:, cut:].flip(1)
    targets, later_targets = s1.roll(-1, 1), s1.roll(-1, 1)
    later_targets[:, cut:] = 0
    before = model(s1, s2, stamp, use_teacher_forcing=True, s1_targets=targets)
    after = model(*later, use_teacher_forcing=True, s1_targets=later_targets)
    for one, other in zip(before, after):
        torch.testing.assert_close(one[:, :cut], other[:, :cut])
        assert not torch.allclose(one[:, cut:], other[:, cut:])


def test_the_tokenizer_sees_no_future(golden):
    x, cut = golden.tensor("x"), 15
    later = x.clone()
    later[:, cut:] += 1
    (coarse, full), _, quantized, _ = golden.tokenizer(x)
    (later_coarse, later_full), _, later_quantized, _ = golden.tokenizer(later)
    for one, other in ((coarse, later_coarse), (full, later_full), (quantized, later_quantized)):
        torch.testing.assert_close(one[:, :cut], other[:, :cut])
        assert not torch.allclose(one[:, cut:], other[:, cut:])


def test_the_aligned_query_is_what_training_computes_at_the_last_position(golden):
    s1, s2, stamp = tokens(golden)
    with torch.no_grad():
        _, context = golden.model.decode_s1(s1, s2, stamp)
        queries = s1.roll(-1, 1)
        trained = golden.model.decode_s2(context, queries)[:, -1]
        aligned = golden.model.decode_s2(context, queries[:, -1:], s2_rotation="aligned")[:, -1]
        reference = golden.model.decode_s2(context, queries[:, -1:])[:, -1]
    torch.testing.assert_close(aligned, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(reference, trained, rtol=1e-2, atol=1e-2)


def test_without_teacher_forcing_s1_is_drawn_from_torch_s_random_state(golden):
    def s2_logits(seed):
        torch.manual_seed(seed)
        return golden.model(*tokens(golden))[1]

    assert torch.equal(s2_logits(1), s2_logits(1))
    assert not torch.equal(s2_logits(1), s2_logits(2))


def test_teacher_forcing_needs_targets(small):
    with pytest.raises(ValueError, match="s1_targets"):
        small.model(*tokens(small), use_teacher_forcing=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_the_other_positions(golden, side):
    s1, s2, stamp = tokens(golden)
    length, padded = s1.shape[1], 5
    place = slice(padded, None) if side == "left" else slice(0, length)

    def pad(tensor):
        wide = torch.zeros(len(tensor), length + padded, *tensor.shape[2:], dtype=tensor.dtype)
        wide[:, place] = tensor
        return wide

    mask = torch.ones(len(s1), length + padded, dtype=torch.bool)
    mask[:, place] = False
    targets = s1.roll(-1, 1)
    with torch.no_grad():
        plain = golden.model(s1, s2, stamp, use_teacher_forcing=True, s1_targets=targets)
        wide = golden.model(pad(s1), pad(s2), pad(stamp), mask, use_teacher_forcing=True, s1_targets=pad(targets))
        for one, other in zip(plain, wide):
            torch.testing.assert_close(other[:, place], one, rtol=1e-4, atol=1e-4)
        _, context = golden.model.decode_s1(s1_ids=s1, s2_ids=s2, stamp=stamp)
        _, wide_context = golden.model.decode_s1(pad(s1), pad(s2), pad(stamp), padding_mask=mask)
        for rotation in ("reference", "aligned"):
            query = targets[:, -1:]
            one = golden.model.decode_s2(context, query, s2_rotation=rotation)[:, -1]
            other = golden.model.decode_s2(wide_context, query, mask, s2_rotation=rotation)[:, place][:, -1]
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_without_a_stamp_time_is_left_out(small):
    s1, s2, stamp = tokens(small)
    with torch.no_grad():
        without = small.model.decode_s1(s1, s2)[0]
        for table in small.model.time_emb.tables():
            table.zero_()
        torch.testing.assert_close(without, small.model.decode_s1(s1, s2, stamp)[0])


def test_arguments_in_the_order_of_earlier_versions_are_taken(small):
    s1, s2, stamp = tokens(small)
    targets = s1.roll(-1, 1)
    with torch.no_grad():
        expected = small.model(s1, s2, stamp, use_teacher_forcing=True, s1_targets=targets)
        for one, other in zip(small.model(s1, s2, stamp, True, targets), expected):
            assert torch.equal(one, other)


def score_by_all_positions(network, codes, stamp):
    """The ranker's score with nothing left out: every block at every position."""
    h = network.token_drop(network.embedding(codes[..., 0], codes[..., 1]) + network.time_emb(stamp))
    for block in network.transformer:
        h = block(h)
    return network.rank_head(network.norm(h)[:, -network.pooled_bars :].mean(1)).squeeze(-1)


@pytest.mark.parametrize("pooled_bars", [1, 3, 12])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_a_ranker_scores_and_learns_as_if_all_positions_were_computed(pooled_bars, n_layers):
    torch.manual_seed(0)
    model = Kronos(**MODEL | {"n_layers": n_layers, "ffn_dropout_p": 0.0})
    network = KronosRankNetwork.on(model, "tokens", True, pooled_bars)
    codes, stamp = torch.randint(0, 16, (5, 12, 2)), torch.randint(0, 7, (5, 12, 5))
    found, expected = network(codes, stamp), score_by_all_positions(network, codes, stamp)
    torch.testing.assert_close(found, expected)
    pull = torch.randn(5)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(scores @ pull, learning) for scores in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("last", [1, 4, 12])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attn_dropout_p", [0.0, 1e-9])  # so little drops nothing, on the path that draws its own masks
def test_the_last_positions_of_a_block_are_those_of_the_whole(last, padded, attn_dropout_p):
    torch.manual_seed(0)
    block, x = Block(16, 2, 32, 0.0, attn_dropout_p, 0.0), torch.randn(3, 12, 16)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[1, :5] = mask[2, :11] = True
    mask = mask if padded else None
    with use_generator(torch.Generator().manual_seed(0)):
        torch.testing.assert_close(block(x, mask, last=last), block(x, mask)[:, -last:])

"""Kronos sees no future, and its three cross-attentions are three."""

import pytest
import torch


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

"""Codes: ids and signs are each other's inverse, least significant bit first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronos_qlib.nn.quantizer import BinarySphericalQuantizer, ids_to_signs, signs_to_ids


@given(
    st.integers(1, 20).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1)))
)
def test_ids_and_signs_are_inverse(case):
    bits, ids = case
    assert signs_to_ids(ids_to_signs(torch.tensor(ids), bits)).tolist() == ids


def test_the_first_coordinate_is_the_least_significant_bit():
    assert signs_to_ids(torch.tensor([1.0, -1.0, -1.0])) == 1
    assert signs_to_ids(torch.tensor([-1.0, -1.0, 1.0])) == 4


def test_a_zero_coordinate_is_negative_and_the_code_has_unit_length():
    quantizer = BinarySphericalQuantizer(4, 0.05, 1.0, 1.1, 0.05, group_size=2)
    quantized, _ = quantizer(torch.tensor([[0.0, 0.6, -0.8, 0.0]]))
    assert quantized.tolist() == [[-0.5, 0.5, -0.5, -0.5]]


def test_group_size_has_to_divide_the_bits():
    with pytest.raises(ValueError, match=r"group_size \(3\)"):
        BinarySphericalQuantizer(4, 0.05, 1.0, 1.1, 0.05, group_size=3)


def test_encode_and_decode_round_trip_through_either_form_of_ids(small):
    x = small.tensor("x")
    s1, s2 = small.tokenizer.encode(x, half=True)
    full = small.tokenizer.encode(x)
    assert torch.equal(full, s1 + (s2 << small.tokenizer.s1_bits))
    assert torch.equal(small.tokenizer.decode(full), small.tokenizer.decode([s1, s2], half=True))

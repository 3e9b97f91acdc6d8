"""The arithmetic: packing is exact, ranges are covered, more bits lose less."""

import pytest
import torch

from labkit.quantization import affine


@pytest.fixture
def weight():
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_pack_keeps_every_code_and_takes_the_bits_it_says(num_bits):
    codes = torch.randint(0, 2**num_bits, (3, 5, 64), dtype=torch.uint8)
    packed = affine.pack(codes, num_bits)
    assert packed.shape == (3, 5, 64 * num_bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(affine.unpack(packed, num_bits), codes)


def test_packed_layout_is_the_documented_one():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert affine.pack(codes, 4).tolist() == [[1 + 16 * 5, 2 + 16 * 6, 3 + 16 * 7, 4]]
    assert affine.pack(codes & 3, 2).tolist() == [[1 + 4 * 3 + 16 * 1 + 64 * 3, 2 + 0 + 16 * 2 + 0]]
    third_bits = sum(1 << i for i, code in enumerate(codes[0].tolist()) if code & 4)
    assert affine.pack(codes, 3).tolist() == [[*affine.pack(codes & 3, 2)[0].tolist(), third_bits]]


@pytest.mark.parametrize(("num_bits", "length"), [(3, 12), (4, 7), (2, 6)])
def test_lengths_that_fill_no_whole_bytes_are_refused(num_bits, length):
    with pytest.raises(ValueError, match="multiple of"):
        affine.pack(torch.zeros(1, length, dtype=torch.uint8), num_bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8, 16])
def test_error_is_at_most_half_a_step(weight, symmetric, group_size):
    scale, zero_point = affine.choose_qparams(weight, 4, group_size, symmetric)
    assert scale.shape == zero_point.shape == (8, 48 // (group_size or 48))
    codes = affine.quantize(weight, scale, zero_point, 4, symmetric)
    back = affine.dequantize(codes, scale, zero_point)
    step = scale.repeat_interleave(group_size or 48, 1)
    # an asymmetric zero point is rounded too, so an end of the range can be off by another half step
    assert ((weight - back).abs() <= step * (0.501 if symmetric else 1.001)).all()


def test_zero_stays_zero_and_a_group_of_zeros_divides_by_nothing(weight):
    weight[0, :16], weight[1, 3] = 0, 0
    scale, zero_point = affine.choose_qparams(weight, 4, 16)
    back = affine.dequantize(affine.quantize(weight, scale, zero_point, 4), scale, zero_point)
    assert (back[0, :16] == 0).all()
    assert back[1, 3] == 0
    assert torch.isfinite(scale).all()


def test_symmetric_codes_of_w_and_minus_w_are_opposite(weight):
    scale, zero_point = affine.choose_qparams(weight, 8, symmetric=True)
    plus = affine.quantize(weight, scale, zero_point, 8, symmetric=True).int() - 128
    minus = affine.quantize(-weight, scale, zero_point, 8, symmetric=True).int() - 128
    assert torch.equal(plus, -minus)
    assert plus.min() >= -127


def test_each_bit_is_worth_about_six_decibels(weight):
    def quality(num_bits, group_size=16):
        scale, zero_point = affine.choose_qparams(weight, num_bits, group_size)
        codes = affine.quantize(weight, scale, zero_point, num_bits)
        return affine.sqnr_db(weight, affine.dequantize(codes, scale, zero_point))

    assert 18 < quality(4) < 30
    assert quality(8) > quality(4) + 18
    assert quality(4) > quality(3) + 4 > quality(2) + 8
    assert quality(4, 8) > quality(4, 48)


def test_a_group_size_that_does_not_divide_is_refused(weight):
    with pytest.raises(ValueError, match="group_size 32 does not divide a row of 48"):
        affine.choose_qparams(weight, 4, 32)

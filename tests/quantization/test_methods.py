"""Searched ranges, awq and hqq: each beats plain rounding in what it is made for, and stores what it says."""

import pytest
import torch
from torch import nn

from labkit.quantization import affine, get_scheme
from labkit.quantization.awq import ScaledInt4Linear, search_input_scale
from labkit.quantization.gptq import trace_error
from labkit.quantization.hqq import fit_grids
from labkit.quantization.range_search import diagonal_blocks, search_qparams, weighted_squares
from labkit.quantization.statistics import InputStatistics


def linear_and_inputs(rows=48, columns=128, seed=0):
    """Weights with a few large values, inputs whose channels differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows)
    linear.weight.data = torch.randn(rows, columns, generator=generator)
    linear.weight.data[torch.rand(rows, columns, generator=generator) < 0.01] *= 4
    sizes = torch.exp(1.2 * torch.randn(columns, generator=generator))
    return linear, torch.randn(500, columns, generator=generator) * sizes


def statistics_of(inputs):
    statistics = InputStatistics(inputs.shape[-1])
    statistics.add(inputs)
    return statistics


def errors_of(weight, scale, zero_point, num_bits, importance, symmetric=False):
    group_size = weight.shape[1] // scale.shape[1]
    groups = weight.unflatten(1, (-1, group_size))
    zero = affine.stored_zero(scale, zero_point, num_bits)[..., None]
    codes = affine.round_to_codes(groups, scale[..., None], zero, num_bits, symmetric)
    error = affine.value_of_codes(codes, scale[..., None], zero, num_bits) - groups
    return weighted_squares(error, importance)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_searched_range_is_never_worse_than_the_whole_one(num_bits, symmetric):
    linear, inputs = linear_and_inputs()
    weight, statistics = linear.weight.detach(), statistics_of(inputs)
    whole = affine.choose_qparams(weight, num_bits, 32, symmetric, torch.bfloat16)
    blocks = diagonal_blocks(statistics.second_moment, 32)
    for importance in (statistics.mean_square, blocks):
        found = search_qparams(weight, num_bits, 32, symmetric, importance)
        judged = importance.view(4, 32) if importance.ndim == 1 else importance
        before = errors_of(weight, *whole, num_bits, judged, symmetric)
        after = errors_of(weight, *found, num_bits, judged, symmetric)
        assert (after <= before * 1.0001).all()
        assert after.sum() < 0.97 * before.sum()


def test_blocks_are_those_of_the_diagonal_and_weigh_errors_as_the_trace_does():
    _, inputs = linear_and_inputs(columns=12)
    moment = statistics_of(inputs).second_moment
    blocks = diagonal_blocks(moment, 4)
    assert torch.equal(blocks[1], moment[4:8, 4:8])
    errors = torch.randn(5, 3, 4)
    expected = torch.stack([((errors[:, g] @ blocks[g]) * errors[:, g]).sum(-1) for g in range(3)], 1)
    torch.testing.assert_close(weighted_squares(errors, blocks), expected)


@pytest.mark.parametrize("num_bits", [3, 4])
def test_awq_loses_less_than_rounding_and_its_module_is_the_scaled_product(num_bits):
    linear, inputs = linear_and_inputs()
    statistics = statistics_of(inputs)
    nearest = get_scheme("int4", num_bits=num_bits, group_size=32).quantize_linear(linear)
    scheme = get_scheme("awq", num_bits=num_bits, group_size=32)
    module = scheme.quantize_linear(linear, statistics=statistics)
    moment, weight = statistics.second_moment, linear.weight.detach()
    errors = [trace_error(weight, m.dequantize(torch.float32), moment) for m in (nearest, module)]
    assert errors[1] < 0.6 * errors[0]
    assert isinstance(module, ScaledInt4Linear)
    expected = inputs @ module.dequantize(torch.float32).T + linear.bias
    with torch.inference_mode():
        torch.testing.assert_close(module(inputs), expected, rtol=1e-3, atol=1e-3)


def test_awqs_scale_is_all_ones_where_nothing_is_gained():
    weight = torch.ones(4, 64) * torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]  # on the grid as it is
    scale = search_input_scale(weight, torch.eye(64), 4, 32, False, 5)
    assert torch.equal(scale, torch.ones(64, dtype=torch.bfloat16))


def test_awq_counts_the_bytes_of_its_scale():
    plain, scaled = get_scheme("int4"), get_scheme("awq")
    assert scaled.predict_bytes(48, 128, True) == plain.predict_bytes(48, 128, True) + 2 * 128


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_hqq_is_nearer_than_rounding_without_calibration(num_bits):
    linear, _ = linear_and_inputs()
    weight = linear.weight.detach()
    errors = [
        (get_scheme(name, num_bits=num_bits).quantize_linear(linear).dequantize(torch.float32) - weight)
        .square()
        .mean()
        for name in ("int4", "hqq")
    ]
    assert errors[1] < 0.9 * errors[0]


def test_hqqs_zero_need_be_no_code_and_the_module_says_so():
    linear, _ = linear_and_inputs()
    assert get_scheme("int4").quantize_linear(linear).has_integer_zero_points
    module = get_scheme("hqq").quantize_linear(linear)
    assert not module.has_integer_zero_points
    codes, scale, zero = fit_grids(linear.weight.detach(), 4, 64)
    assert torch.equal(module.codes, codes)
    assert torch.equal(module.scale, scale)
    groups = affine.value_of_codes(codes.unflatten(1, (-1, 64)).float(), scale[..., None], zero[..., None], 4)
    torch.testing.assert_close(module.dequantize(torch.float32), groups.flatten(1))


@pytest.mark.parametrize("num_bits", [2, 3])
def test_coarse_grids_of_hqq_keep_a_code_for_zero_and_with_it_small_weights_of_large_inputs(num_bits):
    linear, inputs = linear_and_inputs(columns=256)
    linear.weight.data += 0.4  # no grid over the whole range has a code at 0.0 by chance
    large = slice(0, 256, 64)  # one column a group: inputs a hundred times as large, weights near 0.0
    linear.weight.data[:, large] *= 0.02
    inputs[:, large] *= 100
    moment = statistics_of(inputs).second_moment
    modules = {name: get_scheme(name, num_bits=num_bits).quantize_linear(linear) for name in ("int4", "hqq")}
    assert modules["hqq"].has_integer_zero_points
    errors = {
        name: trace_error(linear.weight.detach(), module.dequantize(torch.float32), moment)
        for name, module in modules.items()
    }
    assert errors["hqq"] < errors["int4"]


@pytest.mark.parametrize("num_bits", [3, 4])
def test_groups_of_one_value_and_of_zeros_stay_what_they_are(num_bits):
    weight = torch.cat((torch.zeros(3, 32), torch.full((3, 32), 0.75), torch.full((3, 32), -2.0)))
    codes, scale, zero = fit_grids(weight, num_bits, 32)
    groups = codes.unflatten(1, (-1, 32)).float()
    back = affine.value_of_codes(groups, scale[..., None], zero[..., None], num_bits)
    torch.testing.assert_close(back.flatten(1), weight, rtol=1e-2, atol=0)

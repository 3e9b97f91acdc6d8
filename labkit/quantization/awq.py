"""awq: columns with large activations are scaled up before rounding, so that they are rounded more finely.

The module stores W / r in int4's form and multiplies the inputs by r [K] before the product: the output stays the
same, and a column with a small r has a small share of its group's rounding error. The inputs' second moments give
the exact cost of an r without running the model: for each group of columns ``r = rms ** -alpha`` is tried for
several alphas (and the same divided by the weights' own size), then each channel's range in the group is searched.

Memory: as int4, plus r as bf16 [K], 16/N bits a weight. AWQ's own code folds r into the norm or Linear before; in
a general module it is unknown which tensor feeds which Linear, so here r stays with the module and its bytes count.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (2024).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.common.options import option
from labkit.quantization import affine
from labkit.quantization.int4 import Int4, Int4Linear
from labkit.quantization.kernels.reference import row_slices
from labkit.quantization.linear import ScaledInput
from labkit.quantization.range_search import diagonal_blocks, search_qparams, weighted_squares
from labkit.quantization.scheme import register
from labkit.quantization.statistics import InputStatistics

SLICE_ELEMENTS = 2**20


class ScaledInt4Linear(ScaledInput, Int4Linear):
    """The buffers of `Int4Linear`, and input_scale [K] bf16."""


@torch.no_grad()
def search_input_scale(
    weight: Tensor, moment: Tensor, num_bits: int, group_size: int, symmetric: bool, steps: int
) -> Tensor:
    """The input factors r [K] bf16 of a weight [N, K] with the least error, group by group.

    moment [K, K]: the inputs' second moments. Tries ``steps`` exponents from 0 (all ones) to 1, for the activations'
    size alone and divided by the weights' size.
    """
    blocks = diagonal_blocks(moment.float(), group_size)
    activation = moment.diagonal().float().sqrt()
    size = weight.float().abs().amax(0)
    best = torch.ones(weight.shape[1], dtype=torch.bfloat16, device=weight.device)
    least = _loss(weight, best, blocks, num_bits, symmetric)
    for step in range(1, steps):
        exponent = step / (steps - 1)
        for logarithm in (
            -exponent * _log(activation),
            -exponent * _log(activation) + (1 - exponent) * _log(size),
        ):
            centred = logarithm.view(-1, group_size)
            centred = centred - centred.mean(-1, keepdim=True)  # a group's scale absorbs a common factor
            tried = centred.clamp(-5, 5).exp().to(torch.bfloat16).flatten()
            loss = _loss(weight, tried, blocks, num_bits, symmetric)
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(better.repeat_interleave(group_size), tried, best)
    return best


def _log(values: Tensor) -> Tensor:
    return values.clamp(min=1e-5 * float(values.mean()) + 1e-30).log()


def _loss(weight: Tensor, input_scale: Tensor, blocks: Tensor, num_bits: int, symmetric: bool) -> Tensor:
    """The error of rounding W / r to nearest in each group [K/G], summed over all channels."""
    groups, group_size, _ = blocks.shape
    total = torch.zeros(groups, dtype=torch.float32, device=weight.device)
    factor = input_scale.float()
    for part in row_slices(*weight.shape, weight.device, cpu_elements=SLICE_ELEMENTS):
        stretched = (weight[part].float() / factor).unflatten(1, (groups, group_size))
        scale, zero_point = affine.qparams_of_range(
            stretched.amin(-1), stretched.amax(-1), num_bits, symmetric, torch.bfloat16
        )
        zero = affine.stored_zero(scale, zero_point, num_bits)[..., None]
        codes = affine.round_to_codes(stretched, scale[..., None], zero, num_bits, symmetric)
        errors = affine.value_of_codes(codes, scale[..., None], zero, num_bits).sub_(stretched)
        total += weighted_squares(errors.mul_(factor.view(groups, group_size)), blocks).sum(0)
    return total


@register("awq")
@dataclass(frozen=True)
class Awq(Int4):
    """4-bit weights (or 2, 3, 8), columns stretched by a scale found on calibration before rounding."""

    requires_calibration = True

    scale_steps: int = option(11, "exponents tried for the input scale of each group")
    range_search: bool = option(
        True,
        "search each group's range for the least error instead of taking all of it",
        choices=(True, False),
    )

    def empty_linear(self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16):
        sizes = in_features, out_features, has_bias, self.num_bits, self.group_size
        return ScaledInt4Linear(*sizes, device=device, dtype=dtype)

    def fill_calibrated(self, module: ScaledInt4Linear, weight: Tensor, statistics: InputStatistics) -> None:
        moment = statistics.second_moment
        sizes = self.num_bits, self.group_size, self.symmetric
        module.input_scale.copy_(search_input_scale(weight, moment, *sizes, self.scale_steps))
        factor = module.input_scale.float()
        blocks = diagonal_blocks(moment * factor[:, None] * factor, self.group_size)
        dtype = module.scale_zero.dtype
        for part in row_slices(*weight.shape, weight.device, cpu_elements=SLICE_ELEMENTS):
            rows = weight[part].float() / factor
            if self.range_search:
                qparams = search_qparams(rows, *sizes, blocks, dtype)
            else:
                qparams = affine.choose_qparams(rows, *sizes, dtype)
            zero = affine.stored_zero(*qparams, self.num_bits)
            groups = rows.unflatten(1, (-1, self.group_size))
            codes = affine.round_to_codes(
                groups, qparams[0][..., None], zero[..., None], self.num_bits, self.symmetric
            )
            module.set_codes(codes.flatten(1).to(torch.uint8), *qparams, part)
        module.settle()

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        return super().predict_bytes(out_features, in_features, has_bias, dtype=dtype) + 2 * in_features

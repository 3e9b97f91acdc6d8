"""hqq: scales and zeros fitted so that most weights are near their codes, without calibration.

Memory, kernels and module are those of `int4`. Rounding errors of a few large weights dominate a squared
error; half-quadratic splitting minimizes the p-th power of the error instead, p < 1, which tolerates large errors of
few weights for small errors of most. The problem splits into two easy ones: how much of each error to accept (a
shrinkage), and which scale and zero then fit best (a line through codes and weights); they alternate a few
times, from the whole range and from a clipped range. From 4 bits on the zero is a real number: a group may lack a code
that means 0.0 exactly (see `Int4Linear.has_integer_zero_points`).

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), which fits only the
zero; here the scale is fitted too. As in the source, errors are not normalized: with small weights, such as language
models', the shrinkage with the source's `BETA` accepts no error, and the fit is a least-squares fit. (With errors
counted in steps of the grid the shrinkage takes effect and costs more than it gains: 1.5 % of perplexity on a small
language model at 4 bits, 4 % at 3.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.common.options import option
from labkit.quantization import affine
from labkit.quantization.int4 import Int4, Int4Linear
from labkit.quantization.kernels.reference import row_slices
from labkit.quantization.scheme import register

SLICE_ELEMENTS = 2**18
BETA, GROWTH = 10.0, 1.01  # weight of the split, and its growth from round to round
STARTS = (1.0, 0.9)  # shares of the whole range from which the fit begins
FREE_BITS = 4
"""From this number of bits on the zero is a real number. Coarser grids keep a code that means 0.0: small weights of
columns with large inputs must stay small, and a grid that misses 0.0 by half a coarse step changes all of them."""
JUDGED = {True: 2, False: 4}
"""Power of the error that rounds are compared by, for free and for coarse grids: with few codes the mean square is
least where the largest weights are clipped, which costs a language model more than it gains."""


@dataclass
class _Fit:
    """Codes [n, K/G, G] with scale, zero and mean power of the error [n, K/G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    loss: Tensor

    def keep_better(self, other: "_Fit") -> None:
        """Take the groups with the smaller error from ``other``."""
        better = other.loss < self.loss
        self.codes = torch.where(better[..., None], other.codes, self.codes)
        for name in ("scale", "zero", "loss"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


@torch.no_grad()
def fit_grids(
    weight: Tensor,
    num_bits: int,
    group_size: int,
    power: float = 0.7,
    rounds: int = 20,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K] -> codes [N, K] uint8, scale and zero [N, K/G] in ``scale_dtype``.

    ``zero`` is the value of the middle code (see `int4.py`). Each group keeps the round with the least mean squared
    error, computed with scale and zero as they are stored. Below `FREE_BITS` the mean fourth power replaces the mean
    square, and the zero is a whole number of steps from the middle code, so that a code means 0.0.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    middle = 2 ** (num_bits - 1)
    best = None
    free = num_bits >= FREE_BITS
    for share in STARTS:
        if free:
            scale = ((high - low) * share / (2**num_bits - 1)).to(scale_dtype)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            zero = (low * share + middle * scale.float()).to(scale_dtype)
        else:
            scale, zero_point = affine.qparams_of_range(
                low * share, high * share, num_bits, False, scale_dtype
            )
            zero = affine.stored_zero(scale, zero_point, num_bits)
        beta = BETA
        for _ in range(rounds + 1):
            step = scale.float()[..., None]
            codes = affine.round_to_codes(groups, step, zero[..., None], num_bits)
            errors = groups - affine.value_of_codes(codes, step, zero[..., None], num_bits)
            fit = _Fit(codes, scale, zero, errors.pow(JUDGED[free]).mean(-1))
            if best is None:
                best = fit
            else:
                best.keep_better(fit)
            target = groups - _accepted(errors, beta, power)
            scale, zero = _line(codes - middle, target, scale, scale_dtype)
            if not free:
                scale, zero = _through_zero(codes, target, scale, zero, num_bits)
            beta *= GROWTH
    return best.codes.flatten(1).to(torch.uint8), best.scale, best.zero


def _accepted(errors: Tensor, beta: float, power: float) -> Tensor:
    """The accepted part of errors: nearly all of a large error, nothing of a small one."""
    size = errors.abs()
    return errors.sign() * (size - size.clamp(min=1e-8).pow(power - 1) / beta).clamp(min=0)


def _line(codes: Tensor, target: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slope and value at 0 of the line through codes and targets [n, K/G, G], by least squares."""
    mean_code, mean_target = codes.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
    spread = (codes - mean_code).square().sum(-1)
    slope = ((codes - mean_code) * (target - mean_target)).sum(-1) / spread.clamp(min=0.5)
    slope = torch.where((slope > 0) & (spread > 0), slope, scale.float()).to(dtype)
    return slope, (mean_target[..., 0] - slope.float() * mean_code[..., 0]).to(dtype)


def _through_zero(
    codes: Tensor, target: Tensor, scale: Tensor, zero: Tensor, num_bits: int
) -> tuple[Tensor, Tensor]:
    """The line's slope and value, refitted with 0.0 at the code nearest to the line's root."""
    zero_point = (2 ** (num_bits - 1) - zero.float() / scale.float()).round().clamp(0, 2**num_bits - 1)
    away = codes - zero_point[..., None]
    slope = (away * target).sum(-1) / away.square().sum(-1).clamp(min=0.5)
    slope = torch.where(slope > 0, slope, scale.float()).to(scale.dtype)
    return slope, affine.stored_zero(slope, zero_point.to(torch.int32), num_bits)


@register("hqq")
@dataclass(frozen=True)
class Hqq(Int4):
    """4-bit weights (or 2, 3, 8), scales and zeros fitted so that most are near, without calibration."""

    power: float = option(0.7, "power of the error that is made small; below 1 few may be far off")
    rounds: int = option(20, "rounds of refinement")

    def fill(self, module: Int4Linear, weight: Tensor) -> None:
        dtype = module.scale_zero.dtype
        for part in row_slices(*weight.shape, weight.device, cpu_elements=SLICE_ELEMENTS):
            fitted = fit_grids(weight[part], self.num_bits, self.group_size, self.power, self.rounds, dtype)
            module.set_codes_and_zero(*fitted, part)
        module.settle()

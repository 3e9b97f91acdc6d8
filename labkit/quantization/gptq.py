"""gptq: group-wise codes chosen column by column, each column compensating for the errors of those before it.

Memory, kernels and module are those of `int4`; only the codes are better. For a weight W [N, K] and inputs
with second moments M [K, K], the rows of W are independent problems: find codes whose weight Q makes the
trace of (W - Q) M (W - Q)ᵀ small. With the inverse of M factored as Uᵀ U (U upper triangular), column i is
rounded, its error is divided by U[i, i], and U[i, i:] times that is subtracted from the columns not yet rounded.

Four steps surround the solve. ``drift_correction`` compensates for inputs that have drifted because earlier layers
are quantized: it moves the weight half the way to the weight whose outputs are nearest to the unquantized layer's
(the whole way would also fit the noise of few samples). ``act_order`` takes the columns in the order of falling
activation; scales are chosen beforehand for groups of neighbouring columns, so the stored weight needs no
permutation. ``range_search`` searches each group's range for the least error, weighted as the solve weights it.
``refine_sweeps`` passes of coordinate descent on the same trace then revise a column at a time, the others fixed.

Source: Frantar et al., "GPTQ" (2023), algorithm 1, its Cholesky form without an explicit inverse; the drift as in Li
et al., "GPTAQ" (2025), taken in part as in Arai and Ichikawa, "Quantization Error Propagation" (2025); coordinate
descent as in Behdin et al., "QuantEase" (2023).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.common.errors import SchemeError
from labkit.common.options import option
from labkit.quantization import affine
from labkit.quantization.gptq_blocks import refine_block, run_block, solve_block
from labkit.quantization.int4 import Int4, Int4Linear
from labkit.quantization.kernels.reference import row_slices
from labkit.quantization.range_search import search_qparams
from labkit.quantization.scheme import register
from labkit.quantization.statistics import InputStatistics

TRIES = 8
RAISED_DAMPENING = (
    1e-5  # the least dampening_frac of the second attempt; each further attempt multiplies it by ten
)
SLICE_ELEMENTS = 2**24
SLICE_ELEMENTS_GPU = 2**27  # every slice repeats all steps, so slices are as large as memory allows


@dataclass(frozen=True)
class Columns:
    """A weight's columns in the order of the solve, with the factors it needs.

    Attributes:
        order: [K] the column taken at each step.
        factor: [K, K] fp32, upper triangular, by steps: factorᵀ factor is the inverse of the dampened moment.
        moment: [K, K] fp32, dampened, by steps.
        dampening: the value added to the diagonal.
    """

    order: Tensor
    factor: Tensor
    moment: Tensor
    dampening: float

    @property
    def importance(self) -> Tensor:
        """[K], by columns: the cost of a unit error in a column after the others have compensated for it."""
        out = torch.empty_like(self.factor[0])
        out[self.order] = 1 / self.factor.square().sum(0)
        return out


@dataclass(frozen=True)
class Solution:
    """What `solve` returns: codes [N, K] uint8, and per column [K], in the order of the weight, the error
    that rounding it added to the trace (summed over rows) and the step at which it was solved."""

    codes: Tensor
    column_errors: Tensor
    steps: Tensor


@torch.no_grad()
def prepare_columns(moment: Tensor, dampening_frac: float = 0.01, act_order: bool = True) -> Columns:
    """Order and factor the columns of a second moment [K, K], as `InputStatistics` gives it.

    Adds ``dampening_frac`` times the mean of the diagonal to the diagonal, and ten times more for as long as the
    matrix is not positive definite. A column without inputs is free: its diagonal becomes the mean. Raises
    SchemeError if the matrix stays indefinite.
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        mean = torch.ones_like(mean)
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=moment.device)
    )
    moment = moment[order][:, order].float()
    moment.diagonal().copy_(torch.where(moment.diagonal() > 0, moment.diagonal(), mean))
    fraction = dampening_frac
    for _ in range(TRIES):
        damped = moment.clone()
        damped.diagonal().add_(fraction * mean)
        # flipped back, the lower factor of the flipped matrix is an upper factor R of the matrix, R Rᵀ;
        # the solve needs the inverse of R
        lower, failed = torch.linalg.cholesky_ex(damped.double().flip(0, 1))
        if not failed:
            identity = torch.eye(len(moment), dtype=lower.dtype, device=lower.device)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
            if torch.isfinite(factor).all():
                return Columns(order, factor, damped, float(fraction * mean))
        last, fraction = fraction, max(10 * fraction, RAISED_DAMPENING)
    raise SchemeError(f"the inputs' second moments have no Cholesky factor even with dampening_frac {last:g}")


@torch.no_grad()
def correct_drift(weight: Tensor, columns: Columns, drift: Tensor, share: float = 1.0) -> Tensor:
    """The weight [N, K] fp32 whose outputs on the drifted inputs come nearest to ``weight``'s on the original ones.

    drift [K, K] as `InputStatistics` gives it. With x' the unquantized inputs, W* x is nearest to W x' for
    W* = W + W drift M⁻¹; the result takes ``share`` of that step.
    """
    step = (weight.float() @ drift)[:, columns.order] @ columns.factor.T @ columns.factor
    moved = torch.empty_like(step)
    moved[:, columns.order] = step
    return moved.mul_(share).add_(weight)


@torch.no_grad()
def solve(
    weight: Tensor,
    columns: Columns,
    scale: Tensor,
    zero_point: Tensor,
    num_bits: int,
    symmetric: bool = False,
    column_block_size: int = 128,
) -> Solution:
    """Round a weight [N, K] column by column, given scale and zero_point [N, K/G].

    ``column_block_size`` columns are solved together before their errors reach the rest; it changes the speed, not
    the result.
    """
    count, order = weight.shape[1], columns.order
    values = weight.T[order].float().contiguous()  # by steps [K, N]: a step reads and writes whole rows
    scales, zeros = _by_steps(scale, zero_point, num_bits, order)
    codes = torch.empty_like(values)
    added = torch.zeros(count, dtype=torch.float32, device=weight.device)
    for start in range(0, count, column_block_size):
        stop = min(start + column_block_size, count)
        block = slice(start, stop)
        errors = torch.empty_like(values[block])
        run_block(
            solve_block,
            (values[block], codes[block], errors),
            (scales[block], zeros[block], columns.factor[block, block]),
            num_bits,
            symmetric,
        )
        values[stop:].addmm_(columns.factor[start:stop, stop:].T, errors, alpha=-1)
        added[block] = errors.square().sum(1)
    return _solution(codes, added, order)


@torch.no_grad()
def refine(
    weight: Tensor,
    columns: Columns,
    solution: Solution,
    scale: Tensor,
    zero_point: Tensor,
    num_bits: int,
    symmetric: bool = False,
    column_block_size: int = 128,
    sweeps: int = 2,
) -> Tensor:
    """Codes [N, K] uint8 that are at least as good: each column in turn takes its best code, the others fixed.

    Takes the arguments of `solve`, and its result. The trace never grows.
    """
    if not sweeps:
        return solution.codes
    order, moment = columns.order, columns.moment
    values = weight.T[order].float().contiguous()
    scales, zeros = _by_steps(scale, zero_point, num_bits, order)
    codes = solution.codes.T[order].float()
    errors = values - affine.value_of_codes(codes, scales, zeros, num_bits)  # [K, N]
    slopes = moment @ errors  # half the gradient of the trace
    for start in [*range(0, len(order), column_block_size)] * sweeps:
        stop = min(start + column_block_size, len(order))
        block = slice(start, stop)
        before = errors[block].clone()
        run_block(
            refine_block,
            (codes[block], errors[block], slopes[block]),
            (values[block], scales[block], zeros[block], moment[block, block]),
            num_bits,
            symmetric,
        )
        change = errors[block] - before
        slopes[:start].addmm_(moment[:start, start:stop], change)
        slopes[stop:].addmm_(moment[stop:, start:stop], change)
    return _in_order(codes, order)


def _by_steps(scale: Tensor, zero_point: Tensor, num_bits: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """scale and stored zero [N, K/G] -> [K, N] fp32, one row a step."""
    group = order // (len(order) // scale.shape[1])
    zero = affine.stored_zero(scale, zero_point, num_bits)
    return scale.T[group].float(), zero.T[group].float()


def _in_order(codes: Tensor, order: Tensor) -> Tensor:
    """codes [K, N] by steps -> [N, K] uint8 by columns."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    out[order] = codes.to(torch.uint8)
    return out.T.contiguous()


def _solution(codes: Tensor, added: Tensor, order: Tensor) -> Solution:
    errors, steps = torch.empty_like(added), torch.empty_like(order)
    errors[order] = added
    steps[order] = torch.arange(len(order), device=order.device)
    return Solution(_in_order(codes, order), errors, steps)


def trace_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """The mean squared output error of ``approximation`` as a share of the mean squared output: the traces of
    D M Dᵀ and W M Wᵀ, D = weight - approximation [N, K], M = moment [K, K]."""
    weight, moment = weight.float(), moment.float()
    change = weight - approximation.float()
    return (((change @ moment) * change).sum() / ((weight @ moment) * weight).sum()).item()


@register("gptq")
@dataclass(frozen=True)
class Gptq(Int4):
    """4-bit weights (or 2, 3, 8) as int4 stores them, the codes solved column by column on calibration."""

    requires_calibration = True

    dampening_frac: float = option(0.01, "share of the mean diagonal added to the inputs' second moments")
    act_order: bool = option(
        True, "solve columns in the order of falling activation (scales stay in place)", choices=(True, False)
    )
    column_block_size: int = option(128, "columns solved together; changes the speed alone")
    drift_correction: float = option(
        0.5,
        "share of the inputs' drift, caused by layers quantized before, that the weight makes up for",
        choices=(0.0, 0.25, 0.5, 0.75, 1.0),
    )
    range_search: bool = option(
        True,
        "search each group's range for the least error instead of taking all of it",
        choices=(True, False),
    )
    refine_sweeps: int = option(2, "passes of coordinate descent after the solve", choices=(0, 1, 2, 4, 8))

    @property
    def needs_reference(self) -> bool:
        return self.drift_correction > 0

    def fill_calibrated(self, module: Int4Linear, weight: Tensor, statistics: InputStatistics) -> None:
        columns = prepare_columns(statistics.second_moment, self.dampening_frac, self.act_order)
        dtype = module.scale_zero.dtype
        for part in row_slices(
            *weight.shape, weight.device, cpu_elements=SLICE_ELEMENTS, gpu_elements=SLICE_ELEMENTS_GPU
        ):
            rows = weight[part]
            if statistics.drifting and self.drift_correction:
                rows = correct_drift(rows, columns, statistics.drift, self.drift_correction)
            if self.range_search:
                qparams = search_qparams(
                    rows, self.num_bits, self.group_size, self.symmetric, columns.importance, dtype
                )
            else:
                qparams = affine.choose_qparams(rows, self.num_bits, self.group_size, self.symmetric, dtype)
            options = (*qparams, self.num_bits, self.symmetric, self.column_block_size)
            solution = solve(rows, columns, *options)
            codes = refine(rows, columns, solution, *options, self.refine_sweeps)
            module.set_codes(codes, *qparams, part)
        module.settle()

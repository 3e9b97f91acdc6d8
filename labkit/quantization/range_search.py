"""Search for the range of each group: clipping rare large weights often costs less than a coarse step.

`affine.choose_qparams` takes the whole range of a group, so a single large weight makes the step coarse for all
its neighbours. The search shrinks the range step by step and keeps the range with the least weighted error.

Source: the ``mse`` option of GPTQ's reference code (Frantar et al., 2023) and AWQ's clipping (Lin et al.,
2024); the inverse Hessian's diagonal weights an error as the column solve does.
"""

import torch
from torch import Tensor

from labkit.quantization import affine
from labkit.quantization.kernels.reference import row_slices

STEPS = 32
SMALLEST = 0.55  # of the whole range
SLICE_ELEMENTS = 2**18  # a slice and its intermediate results stay in the cache


@torch.no_grad()
def search_qparams(
    weight: Tensor,
    num_bits: int,
    group_size: int,
    symmetric: bool = False,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with the least weighted squared error of each group.

    weight [N, K] -> scale [N, K/G] in ``scale_dtype``, zero_point [N, K/G] int32. ``importance``: a weight for each
    column [K], or the inputs' second moments within each group [K/G, G, G]; None: all columns alike. The error
    is that of the weight `Int4Linear` dequantizes, with scale and zero rounded as they are stored. Never worse
    than `affine.choose_qparams`, whose range is the first candidate.
    """
    groups = weight.shape[1] // group_size
    scale = torch.empty(weight.shape[0], groups, dtype=scale_dtype, device=weight.device)
    zero_point = torch.empty(scale.shape, dtype=torch.int32, device=weight.device)
    if importance is None:
        importance = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    if importance.ndim == 1:
        importance = importance.float().view(groups, group_size)
    for part in row_slices(*weight.shape, weight.device, cpu_elements=SLICE_ELEMENTS):
        values = weight[part].float().unflatten(1, (groups, group_size))
        scale[part], zero_point[part] = _search(values, num_bits, symmetric, importance, scale_dtype, steps)
    return scale, zero_point


def weighted_squares(errors: Tensor, importance: Tensor) -> Tensor:
    """errors [n, K/G, G], importance [K/G, G] or moments [K/G, G, G] -> the weighted error of each group [n, K/G]."""
    if importance.ndim == 2:
        return errors.square().mul_(importance).sum(-1)
    spread = torch.bmm(errors.transpose(0, 1), importance).transpose(0, 1)
    return spread.mul_(errors).sum(-1)


def diagonal_blocks(moment: Tensor, group_size: int) -> Tensor:
    """The blocks [K/G, G, G] on the diagonal of a second moment [K, K]."""
    groups = moment.shape[0] // group_size
    blocks = moment.view(groups, group_size, groups, group_size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _search(
    values: Tensor, num_bits: int, symmetric: bool, importance: Tensor, dtype: torch.dtype, steps: int
) -> tuple[Tensor, Tensor]:
    """values [n, K/G, G], importance [K/G, G] or [K/G, G, G] -> scale, zero_point [n, K/G]."""
    best_scale = best_zero_point = least = None
    for share in torch.linspace(1.0, SMALLEST, steps).tolist():
        scale, zero_point = affine.qparams_of_range(
            values.amin(-1) * share, values.amax(-1) * share, num_bits, symmetric, dtype
        )
        zero = affine.stored_zero(scale, zero_point, num_bits)
        error = affine.round_to_codes(values, scale[..., None], zero[..., None], num_bits, symmetric)
        error = affine.value_of_codes(error, scale[..., None], zero[..., None], num_bits).sub_(values)
        error = weighted_squares(error, importance)
        if least is None:
            best_scale, best_zero_point, least = scale, zero_point, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point
